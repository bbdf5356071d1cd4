"""Application of `tests.benchmarks.latency`, loaded by gunicorn."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.events import RequestIds
from tests.benchmarks import waiting
from tests.benchmarks.pacing import BODY

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_wsgi import OpenMeterMiddleware

_LOOPS = int(os.environ.get("BENCH_LOOPS", "0"))
_RATE, _TURN = 10_000, 100


def work(loops: int) -> int:
    """Compute in Python and hold the GIL, as an application does."""
    total = 0
    for n in range(loops):
        total += n
    return total


def handler(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    work(_LOOPS)
    start_response("200 OK", [("Content-Length", str(len(BODY)))])
    return [BODY]


def _fed(metered: OpenMeterMiddleware) -> WSGIApplication:
    """Return *metered*, with a thread that puts events at _RATE during requests."""
    asked_at = [0.0]
    asked = threading.Event()

    def feed() -> None:
        events = waiting.events(RequestIds())
        while asked.wait():
            asked.clear()
            due = time.perf_counter()
            while time.perf_counter() - asked_at[0] < 0.5:
                for event in itertools.islice(events, _TURN):
                    metered.process().transport.put(event)
                due += _TURN / _RATE
                time.sleep(max(due - time.perf_counter(), 0))

    def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if not threads:
            threads.append(threading.Thread(target=feed, daemon=True))
            threads[0].start()
        if time.perf_counter() - asked_at[0] > 0.1:
            asked_at[0] = time.perf_counter()
            asked.set()
        return metered(environ, start_response)

    threads: list[threading.Thread] = []
    return app


def _app() -> WSGIApplication:
    url = os.environ.get("BENCH_URL")
    if not url:
        return handler
    # Log lines about the outage are not part of this benchmark.
    logging.getLogger("openmeter_wsgi").addHandler(logging.NullHandler())
    spool = os.environ.get("BENCH_SPOOL")
    metered = waiting.middleware(url, app=handler, spool_dir=spool or None)
    return _fed(metered) if os.environ.get("BENCH_FEED") else metered


app = _app()
