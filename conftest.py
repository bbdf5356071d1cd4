"""Run the code blocks of the README and of the documentation as tests."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import requests
from sybil import Sybil
from sybil.integration.pytest import SybilItem
from werkzeug.test import Client, TestResponse

from openmeter_wsgi import OpenMeterMiddleware
from openmeter_wsgi.sandbox import Sandbox

sys.path.insert(0, str(Path(__file__).parent / "tests"))

from documented import parsers


class Page:
    """The objects that the code blocks of one page can use without defining them.

    Blocks inside a comment of the page, which readers do not see, use them to check
    the visible blocks before them.
    """

    def __init__(self) -> None:
        self.sandbox = Sandbox()
        self._seen: set[str] = set()
        self._used: list[OpenMeterMiddleware] = []
        self._spool = tempfile.TemporaryDirectory()
        self._variables = mock.patch.dict(
            os.environ,
            {"OPENMETER_API_KEY": "om_example", "OPENMETER_API_URL": self.sandbox.url},
        )
        self._variables.start()

    @property
    def names(self) -> dict[str, Any]:
        return {
            "sandbox": self.sandbox,
            "spool_dir": self._spool.name,
            "call": self.call,
            "billed": self.billed,
        }

    def call(self, app: Any, path: str = "/", **request: Any) -> TestResponse:
        """Send a request to *app* and read the response to its end."""
        request.setdefault("method", "GET")
        with Client(app).open(path, **request) as response:
            response.get_data()
        if hasattr(app, "wsgi_app"):
            # Flask accepts no views after the first request, but a page adds some.
            app._got_first_request = False
        return response

    def billed(self, middleware: OpenMeterMiddleware) -> list[tuple[str, str, Any]]:
        """Return subject, type and data of the events billed since the last call."""
        self._used.append(middleware)
        assert middleware.flush(20)
        answer = requests.get(f"{self.sandbox.url}/api/v2/events", timeout=20)
        events = [item["event"] for item in answer.json()["items"]]
        new = [event for event in events if event["id"] not in self._seen]
        self._seen |= {event["id"] for event in events}
        return sorted(((e["subject"], e["type"], e["data"]) for e in new), key=repr)

    def close(self) -> None:
        """Close the middlewares, the sandbox and the spool of the page."""
        for middleware in self._used:
            middleware.close(5)
        self._variables.stop()
        self.sandbox.close()
        self._spool.cleanup()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the blocks of a page into its order: each builds on those before it."""
    blocks = [item for item in items if isinstance(item, SybilItem)]
    in_order = iter(sorted(blocks, key=lambda item: (item.path, item.example.line)))
    items[:] = [
        next(in_order) if isinstance(item, SybilItem) else item for item in items
    ]


def _setup(namespace: dict[str, Any]) -> None:
    from django.conf import settings

    if not settings.configured:
        settings.configure(SECRET_KEY="example", ROOT_URLCONF=(), ALLOWED_HOSTS=["*"])
    page = Page()
    namespace.update(page.names, __name__="__main__", page=page)


def _teardown(namespace: dict[str, Any]) -> None:
    namespace["page"].close()


pytest_collect_file = Sybil(
    parsers=parsers(),
    patterns=["README.md", "docs/*.md"],
    setup=_setup,
    teardown=_teardown,
).pytest()
