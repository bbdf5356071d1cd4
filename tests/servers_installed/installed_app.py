"""What the servers here serve: `/` is billed, `/ticks` tells whether threads run."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

from openmeter_wsgi import OpenMeterMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse

INTERVAL = 0.02


class _Ticks:
    """A thread that counts, from the first question on how far it is."""

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
    length = str(len(body))
    start_response("200 OK", [("Content-Length", length)])
    return [body]


#: Where to and by which way is in the server's environment.
application = OpenMeterMiddleware(
    _app,
    meters={"requests": 1},
    subject="header:X-Subject",
    flush_interval=0.05,
    shutdown_timeout=4,
)
