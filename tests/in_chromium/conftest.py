"""Collect these tests only on request: they need the script `install`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from openmeter_wsgi.sandbox import Sandbox
from test_sandbox_support import Api

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chromium import Chromium


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_requested = any("in_chromium" in argument for argument in config.args)
    return None if is_requested else True


@pytest.fixture(scope="session")
def _chromium() -> Iterator[Chromium]:
    from chromium import Chromium

    with Chromium() as browser:
        yield browser


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def browser(_chromium: Chromium, sandbox: Sandbox) -> Iterator[Chromium]:
    """A browser window in its initial state; the test fails if its console has entries.

    It leaves the page before the sandbox ends, as the page would log errors then.
    """
    _chromium.resize(1400, 900)
    _chromium.prefer(dark=False)
    _chromium.console()
    yield _chromium
    entries = _chromium.console()
    _chromium.get("about:blank")
    assert entries == []


@pytest.fixture
def api(sandbox: Sandbox) -> Iterator[Api]:
    with Api(sandbox.url) as api:
        yield api


@pytest.fixture
def varied(sandbox: Sandbox, api: Api) -> Sandbox:
    """A sandbox with few entries of every kind, since axe checks each of them."""
    from shown import fill

    fill(sandbox, api, 30)
    return sandbox


@pytest.fixture
def filled(sandbox: Sandbox, api: Api) -> Sandbox:
    """A sandbox with entries of every kind that the page can show."""
    from shown import fill

    fill(sandbox, api, 300)
    return sandbox
