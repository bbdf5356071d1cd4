"""WSGI application that these servers serve.

`/` is billed. `/ticks` returns the count of a thread, which shows if threads run
between requests. `/closes-slowly` is billed when its response is closed, which takes
half a second.
"""

from __future__ import annotations

import itertools
import os
import threading
from typing import TYPE_CHECKING, Any

from openmeter_wsgi import OpenMeterMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from wsgiref.types import StartResponse

INTERVAL = 0.02


class _Ticks:
    """A thread that counts; the first call of `so_far` starts it."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._never = threading.Event()
        self._thread: threading.Thread | None = None
        self._counted = 0

    def so_far(self) -> int:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._count, daemon=True)
                self._thread.start()
        return self._counted

    def _count(self) -> None:
        for self._counted in itertools.count():
            self._never.wait(INTERVAL)


_ticks = _Ticks()


def _app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    body = b"all at once"
    if environ["PATH_INFO"] == "/ticks":
        body = str(_ticks.so_far()).encode()
    slow = environ["PATH_INFO"] == "/closes-slowly"
    length = str(len(body))
    start_response("200 OK", [("Content-Length", length)])
    return _ClosesSlowly(body) if slow else [body]


class _ClosesSlowly:
    def __init__(self, body: bytes) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        yield self._body

    def close(self) -> None:
        threading.Event().wait(0.5)


#: Variables of the environment set OpenMeter's address and the spool.
application = OpenMeterMiddleware(
    _app,
    meters={"requests": 1},
    subject="header:X-Subject",
    flush_interval=float(os.environ.get("OPENMETER_FLUSH_INTERVAL", "0.05")),
    shutdown_timeout=4,
)
