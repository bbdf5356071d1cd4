"""WSGI application whose processes write their stats to a file when they end."""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING, Any

import msgspec

from openmeter_wsgi import OpenMeterMiddleware, Stats, add_meters, set_meters

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse

#: The paths, each of which ends its request in a different way.
ENDINGS = ("/", "/two", "/nothing", "/missing", "/breaks", "/nobody")


def _answer(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    if path == "/two":
        add_meters(environ, {"type": "exports", "data": {"rows": 2}})
    elif path == "/nothing":
        set_meters(environ, {"requests": 0})
    elif path == "/breaks":
        raise ValueError("the application broke")
    status = "404 Not Found" if path == "/missing" else "200 OK"
    start_response(status, [("Content-Type", "text/plain")])
    return [b"answered"]


def _settled_stats(application: OpenMeterMiddleware) -> Stats:
    """Return the stats once they no longer change."""
    before = application.stats()
    while (after := application.stats()) != before:
        before = after
    return after


def _write_stats(application: OpenMeterMiddleware, path: str) -> None:
    line = msgspec.json.encode(_settled_stats(application)) + b"\n"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, line)
    os.close(fd)


def left_behind(path: str) -> list[Stats]:
    with open(path, "rb") as file:
        return [msgspec.json.decode(line, type=Stats) for line in file]


def __getattr__(name: str) -> Any:
    """Make `application` when gunicorn loads it, so only in its workers."""
    if name != "application":
        raise AttributeError(name)
    app = OpenMeterMiddleware(
        _answer,
        meters={"requests": 1},
        subject="header:X-Subject",
        flush_interval=0.05,
        batch_size=20,
        shutdown_timeout=0.3,
    )
    # Exit hooks run in reverse order. The middleware registers its own later, so this
    # one runs after it.
    atexit.register(_write_stats, app, os.environ["ACCOUNTS"])
    return app
