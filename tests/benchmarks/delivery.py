"""Cost of delivery: at 10,000 events a second, at full speed, and during requests.

    python -m tests.benchmarks.delivery [--rounds 5] [--seconds 3] [--events 100000]

Each round measures memory and spool in turn, with a sink in another process on
loopback. "Part of a core" is the processor time of the threads that deliver, without
that of the thread that puts events. "While it catches up" is the throughput of a Flask
application during delivery, divided by its throughput before and after.
"""

from __future__ import annotations

import gc
import itertools
import logging
import tempfile
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from openmeter_wsgi.events import RequestIds
from tests.benchmarks import paths, report, waiting
from tests.benchmarks.calls import Calls
from tests.benchmarks.paths import written_process
from tests.benchmarks.sink import running_sink

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi import OpenMeterMiddleware

PLACES = ("memory", "spool")
#: The spool with a journal that the sender parses line by line, as after a crash.
_PARSED = "spool, os.write"
RATE = 10_000
#: Number of events or requests per turn. Shorter turns would add the cost of sleeping
#: and of reading the counters.
_TURN = 100
#: Number of requests that measure the throughput of an application.
_REQUESTS = 1_500

CORE = f"{RATE:,} events a second, {{}}: part of a core"
SPEED = "at full speed, {}"
CATCHING_UP = "throughput of a Flask application while it catches up, {}"
LONGEST = "longest C call of the sender, {}"
#: Unit, target, and True if the target is a minimum.
_TARGETS: dict[str, tuple[str, float, bool]] = {
    CORE: ("%", 2.0, False),
    SPEED: ("events/s", 100_000.0, True),
    CATCHING_UP: ("%", 90.0, True),
    LONGEST: ("ms", 0.2, False),
}
_THREAD = "openmeter_wsgi.delivery"


def delivering(url: str, place: str, directory: str) -> OpenMeterMiddleware:
    spool = {"spool_dir": f"{directory}/{time.monotonic_ns()}"}
    middleware = waiting.middleware(url, **({} if place == "memory" else spool))
    if place == _PARSED:
        middleware.replace_process(written_process)
    return middleware


def percent_of_core(middleware: OpenMeterMiddleware, seconds: float) -> float:
    """Put events at RATE and return the part of a core that their delivery takes."""
    put, counts = middleware.process().transport.put, middleware.process().counts
    events = waiting.events(RequestIds())
    put(next(events))
    middleware.flush(10)  # starts the thread and opens the connection
    began, delivered = time.perf_counter(), counts.delivered
    before = time.process_time() - time.thread_time()
    for turn in range(1, int(seconds * RATE / _TURN) + 1):
        for event in itertools.islice(events, _TURN):
            put(event)
        time.sleep(max(began + turn * _TURN / RATE - time.perf_counter(), 0))
    taken = time.process_time() - time.thread_time() - before
    # Per delivered event, not per second: the last events are not delivered yet.
    return 100 * taken / (counts.delivered - delivered) * RATE


def events_a_second(middleware: OpenMeterMiddleware, count: int) -> float:
    """Return the delivered events per second, from first put to last delivery."""
    put = middleware.process().transport.put
    events = list(itertools.islice(waiting.events(RequestIds()), count))
    began = time.perf_counter()
    for event in events:
        put(event)
    if not middleware.flush(60):
        raise RuntimeError(f"expected {count} events to be delivered within 60 s")
    return count / (time.perf_counter() - began)


def percent_of_throughput(middleware: OpenMeterMiddleware, count: int) -> float:
    """Return the throughput during delivery of a backlog, in percent of that without.

    A new backlog is put whenever one is delivered, until enough requests were served
    during delivery: a short backlog may be delivered before the first request ends.
    """
    app = paths.flask_app()
    paths.serve(app, 300)
    before = paths.serve(app, _REQUESTS)
    put, counts = middleware.process().transport.put, middleware.process().counts
    events = waiting.events(RequestIds())
    served, taken, made = 0, 0.0, 0
    while served < _REQUESTS or counts.delivered < made:
        if counts.delivered >= made:
            for event in itertools.islice(events, count):
                put(event)
            made += count
        taken += paths.serve(app, _TURN)
        served += _TURN
    bare = 2 * _REQUESTS / (before + paths.serve(app, _REQUESTS))
    return 100 * served / taken / bare


def longest_call(url: str, place: str, directory: str, count: int) -> tuple[str, float]:
    """Return the name of the longest C call of a sender, and its milliseconds."""
    with Calls(_THREAD) as calls:
        middleware = delivering(url, place, directory)
        events_a_second(middleware, count)
        middleware.close(60)
    name, seconds = calls.longest
    return name, seconds * 1e3


def measure(rounds: int, seconds: float, count: int) -> list[report.Row]:
    figures: defaultdict[str, list[float]] = defaultdict(list)
    names: defaultdict[str, Counter[str]] = defaultdict(Counter)
    with running_sink() as url, tempfile.TemporaryDirectory() as directory:
        for _, place in itertools.product(range(rounds), PLACES):
            for label, measured in _measures(seconds, count).items():
                gc.collect()
                middleware = delivering(url, place, directory)
                figures[label.format(place)].append(measured(middleware))
                middleware.close(60)
        for _, place in itertools.product(range(rounds), (*PLACES, _PARSED)):
            name, longest = longest_call(url, place, directory, count)
            figures[LONGEST.format(place)].append(longest)
            names[LONGEST.format(place)][name] += 1
    return [_row(label, names[label], taken) for label, taken in figures.items()]


def _row(label: str, names: Counter[str], taken: list[float]) -> report.Row:
    unit, *limit = next(
        target
        for template, target in _TARGETS.items()
        if label.startswith(template.partition("{}")[0])
    )
    named = f"{label}: `{names.most_common(1)[0][0]}`" if names else label
    return report.Row(named, unit, taken, *limit)


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
    args = parser.parse_args()
    logging.getLogger("openmeter_wsgi").addHandler(logging.NullHandler())
    rows = measure(args.rounds, args.seconds, args.events)
    report.show("Delivery", rows, args.json)


if __name__ == "__main__":
    main()
