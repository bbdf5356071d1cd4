"""What delivering costs: at a usual rate, at full speed, and beside requests.

    python -m benchmarks.delivery [--rounds 5] [--seconds 3] [--events 100000]

Each round takes memory and spool in turns, to a sink in a process of its own on
loopback. The part of a core is the processor time of the threads that deliver, not of
the one that puts events. Catching up is the throughput of a Flask application
meanwhile, divided by that of the same application before the backlog was there.
"""

from __future__ import annotations

import gc
import itertools
import logging
import tempfile
import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from benchmarks import paths, report, waiting
from benchmarks.sink import running_sink
from openmeter_wsgi.events import RequestIds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import WSGIApplication

    from openmeter_wsgi import OpenMeterMiddleware

PLACES = ("memory", "spool")
RATE = 10_000
#: Events and requests come in turns of so many: the sleeps of a finer pace, and a look
#: at the delivery after each request, would cost more.
_TURN = 100
_BATCH = 1_000
#: How long an application is served to know its throughput, in requests.
_REQUESTS = 1_500

CORE = f"{RATE:,} events a second, {{}}: part of a core"
SPEED = "at full speed, {}"
CATCHING_UP = "throughput of a Flask application while it catches up, {}"
JOIN = f"joining {_BATCH:,} events, one C call"
#: In what it is given, what is demanded, and whether that is the least.
_DEMANDED: dict[str, tuple[str, float, bool]] = {
    CORE: ("%", 2.0, False),
    SPEED: ("events/s", 100_000.0, True),
    CATCHING_UP: ("%", 90.0, True),
    JOIN: ("ms", 0.2, False),
}


def delivering(url: str, place: str, directory: str) -> OpenMeterMiddleware:
    spool = {"spool_dir": f"{directory}/{time.monotonic_ns()}"}
    return waiting.middleware(url, **(spool if place == "spool" else {}))


def percent_of_core(middleware: OpenMeterMiddleware, seconds: float) -> float:
    """Put events at the rate, and return what their delivery takes."""
    put = middleware.metering().put
    events = waiting.events(RequestIds())
    put(next(events))
    middleware.flush(10)  # threads and connections are there
    began = time.perf_counter()
    before = time.process_time() - time.thread_time()
    for turn in range(1, int(seconds * RATE / _TURN) + 1):
        for event in itertools.islice(events, _TURN):
            put(event)
        time.sleep(max(began + turn * _TURN / RATE - time.perf_counter(), 0))
    taken = time.process_time() - time.thread_time() - before
    return 100 * taken / (time.perf_counter() - began)


def events_a_second(middleware: OpenMeterMiddleware, count: int) -> float:
    """Return how many are delivered in a second, from the first put to the last."""
    put = middleware.metering().put
    made = list(itertools.islice(waiting.events(RequestIds()), count))
    began = time.perf_counter()
    for event in made:
        put(event)
    if not middleware.flush(60):
        raise RuntimeError(f"expected {count} events to be delivered within 60 s")
    return count / (time.perf_counter() - began)


def percent_of_throughput(middleware: OpenMeterMiddleware, count: int) -> float:
    """Serve requests before there is a backlog, and while one is delivered.

    One backlog follows another until as many were served beside them as before: a
    short one may be gone before its first request is.
    """
    app = paths.flask_app()
    paths.serve(app, 300)
    bare = _REQUESTS / paths.serve(app, _REQUESTS)
    events = waiting.events(RequestIds())
    served, taken = 0, 0.0
    while served < _REQUESTS:
        backlog = itertools.islice(events, count)
        beside, seconds = _served_beside(app, middleware, backlog)
        served += beside
        taken += seconds
    return 100 * served / taken / bare


def _served_beside(
    app: WSGIApplication, middleware: OpenMeterMiddleware, backlog: Iterable[bytes]
) -> tuple[int, float]:
    """Return how many requests are served while *backlog* is delivered, and how long.

    The time begins before the delivery does: it may hold up the first request.
    """
    put = middleware.metering().put
    for event in backlog:
        put(event)
    flushing = threading.Thread(target=middleware.flush, args=(60,))
    served = 0
    began = time.perf_counter()
    flushing.start()
    while not served or flushing.is_alive():
        paths.serve(app, _TURN)
        served += _TURN
    taken = time.perf_counter() - began
    flushing.join()
    return served, taken


def join_milliseconds() -> float:
    events = list(itertools.islice(waiting.events(RequestIds()), _BATCH))
    began = time.perf_counter()
    b",".join(events)
    return (time.perf_counter() - began) * 1e3


def measure(rounds: int, seconds: float, count: int) -> list[report.Row]:
    found: defaultdict[str, list[float]] = defaultdict(list)
    with running_sink() as url, tempfile.TemporaryDirectory() as directory:
        for _, place in itertools.product(range(rounds), PLACES):
            for what, measured in _measures(seconds, count).items():
                gc.collect()
                middleware = delivering(url, place, directory)
                found[what.format(place)].append(measured(middleware))
                middleware.close(60)
            found[JOIN].append(join_milliseconds())
    return [
        report.Row(what.format(place), unit, found[what.format(place)], *limit)
        for what, (unit, *limit) in _DEMANDED.items()
        for place in (PLACES if "{}" in what else PLACES[:1])
    ]


def _measures(
    seconds: float, count: int
) -> dict[str, Callable[[OpenMeterMiddleware], float]]:
    return {
        CORE: lambda of: percent_of_core(of, seconds),
        SPEED: lambda of: events_a_second(of, count),
        CATCHING_UP: lambda of: percent_of_throughput(of, count),
    }


def main() -> None:
    parser = report.arguments(__doc__, rounds=5, seconds=3, events=100_000)
    given = parser.parse_args()
    logging.getLogger("openmeter_wsgi").addHandler(logging.NullHandler())
    rows = measure(given.rounds, given.seconds, given.events)
    report.show("Delivery", rows, given.json)


if __name__ == "__main__":
    main()
