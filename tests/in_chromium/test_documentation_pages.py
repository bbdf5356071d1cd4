"""The built pages of the documentation: checks of axe, and of their width.

`make docs` builds them.
"""

from __future__ import annotations

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGES = sorted(page.stem for page in (ROOT / "docs").glob("*.md"))


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/favicon.ico":  # every browser asks for it
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_arguments: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """Return the address of the built pages."""
    handler = functools.partial(_Handler, directory=str(ROOT / "build" / "docs"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_the_window_and_axe_finds_nothing_wrong(browser, site, page, width):
    browser.resize(width, 900)
    browser.get(f"{site}/{page}.html")

    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
    assert list(browser.violations()) == []
