"""Measurements of `tests.benchmarks.growth`: nanoseconds of one event, by size."""

from __future__ import annotations

import itertools
import os
import random
import statistics
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

from openmeter_wsgi.entitlements.cache import AnswerCache, CachedAnswer, Lifetimes
from openmeter_wsgi.entitlements.client import Answer
from openmeter_wsgi.events import MAX_BATCH_BYTES, RequestIds
from openmeter_wsgi.spool.dead_letters import DeadLetters
from openmeter_wsgi.spool.reader import SpoolReader
from tests.benchmarks import waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from openmeter_wsgi import OpenMeterMiddleware

#: Number of events timed together, and of repetitions. The fastest one is the result.
_EVENTS = 1_000
_REPEATS = 5


def _nanoseconds(put: Callable[[bytes], object], events: Iterable[bytes]) -> float:
    made = list(events)
    began = time.thread_time_ns()
    for event in made:
        put(event)
    return (time.thread_time_ns() - began) / len(made)


def waiting_events(size: int, directory: str) -> dict[str, float]:
    """Put and take events while *size* events wait."""
    events = waiting.events(RequestIds())
    in_memory = waiting.middleware(flush_interval=3_600.0, batch_size=100_000)
    spooled = waiting.middleware(spool_dir=f"{directory}/spool", delivery="ship")
    found = {}
    for name, middleware in (("memory", in_memory), ("spool", spooled)):
        put = middleware.process().transport.put
        for event in itertools.islice(events, size):
            put(event)
        found[f"put, {name}"] = min(
            _nanoseconds(put, itertools.islice(events, _EVENTS))
            for _ in range(_REPEATS)
        )
    found["take and done, spool"] = _taken(spooled, f"{directory}/spool")
    spooled.close(0)
    return found


def _taken(middleware: OpenMeterMiddleware, directory: str) -> float:
    """Take batches out of a spool as its sender does."""
    letters = DeadLetters(Path(directory), middleware.process().counts)
    spool = SpoolReader(Path(directory), letters)
    taken = []
    for _ in range(_REPEATS):
        began = time.thread_time_ns()
        spool.refresh()
        batch = spool.take(max_events=_EVENTS, max_bytes=MAX_BATCH_BYTES)
        spool.done(batch)
        taken.append((time.thread_time_ns() - began) / len(batch))
    return min(taken)


def workers(size: int, directory: str) -> dict[str, float]:
    """Append in *size* processes at once, and return the median of their times."""
    start_read, start_write = os.pipe()
    results_read, results_write = os.pipe()
    children = [
        _forked(directory, start_read, start_write, results_write) for _ in range(size)
    ]
    for _ in children:
        os.read(results_read, 1)  # one byte per child, written when its journal is open
    os.close(start_write)
    os.close(start_read)
    for child in children:
        os.waitpid(child, 0)
    os.close(results_write)
    figures = os.read(results_read, 8 * size)
    os.close(results_read)
    taken = [figure for (figure,) in struct.iter_unpack("d", figures)]
    return {"append, spool": statistics.median(taken)}


def _forked(
    directory: str, start_read: int, start_write: int, results_write: int
) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.close(start_write)
        middleware = waiting.middleware(spool_dir=directory, delivery="ship")
        put = middleware.process().transport.put
        events = waiting.events(RequestIds())
        put(next(events))
        os.write(results_write, b".")
        os.read(start_read, 1)  # ends when the parent has closed the other end
        taken = [
            _nanoseconds(put, itertools.islice(events, _EVENTS))
            for _ in range(_REPEATS)
        ]
        os.write(results_write, struct.pack("d", min(taken)))
    finally:
        os._exit(0)


def routes(size: int, directory: str) -> dict[str, float]:
    """Serve a request to the last of *size* routes."""
    exact = {f"/v1/{n}": {"meters": {"calls": 1}} for n in range(size)}
    variable = {f"/v1/{n}/<id>": {"meters": {"calls": 1}} for n in range(size)}
    return {
        "a request, by an exact route": _request(f"/v1/{size - 1}", routes=exact),
        "by a variable route, werkzeug's matching with it": _request(
            f"/v1/{size - 1}/x", routes=variable
        ),
    }


def _request(path: str, **options: Any) -> float:
    app = waiting.middleware(flush_interval=3_600.0, batch_size=100_000, **options)
    environ: dict[str, Any] = {"PATH_INFO": path}
    setup_testing_defaults(environ)
    return min(_served(app, [environ] * _EVENTS) for _ in range(_REPEATS))


def _served(app: OpenMeterMiddleware, environs: list[dict[str, Any]]) -> float:
    began = time.thread_time_ns()
    for environ in environs:
        response = app(dict(environ), _start_response)
        for _chunk in response:
            pass
        response.close()  # type: ignore[attr-defined]
    return (time.thread_time_ns() - began) / len(environs)


def _start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
    return None


def subjects(size: int, directory: str) -> dict[str, float]:
    """Serve and decide requests of random subjects, of *size* known ones."""
    app = waiting.middleware(flush_interval=3_600.0, batch_size=100_000)
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    choose = random.Random(size)
    names = [f"subject-{choose.randrange(size)}" for _ in range(_EVENTS)]
    environs = [{**environ, "REMOTE_USER": name} for name in names]
    served = min(_served(app, environs) for _ in range(_REPEATS))
    fresh = _known(size).fresh_decisions("api_requests")
    return {
        "a request": served,
        "a known decision": min(_decided(fresh, names) for _ in range(_REPEATS)),
    }


def _known(size: int) -> AnswerCache:
    answers = AnswerCache(size)
    known = CachedAnswer(
        "api_requests", Answer(has_access=True), None,
        asked_at=time.monotonic(), terms_at=0.0, lifetimes=Lifetimes(3_600, 1, 1),
    )  # fmt: skip
    for number in range(size):
        answers.put(f"subject-{number}", "api_requests", known)
    return answers


def _decided(fresh: Callable[[str], object], names: list[str]) -> float:
    began = time.thread_time_ns()
    for name in names:
        fresh(name)
    return (time.thread_time_ns() - began) / len(names)
