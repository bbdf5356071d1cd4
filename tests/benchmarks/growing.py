"""What one event costs where there is so much of something else, in nanoseconds."""

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

#: So many are timed at once, and so many times; the smallest is what it costs.
_EVENTS = 1_000
_REPEATS = 5


def _nanoseconds(act: Callable[[bytes], object], on: Iterable[bytes]) -> float:
    given = list(on)
    began = time.thread_time_ns()
    for each in given:
        act(each)
    return (time.thread_time_ns() - began) / len(given)


def waiting_events(size: int, directory: str) -> dict[str, float]:
    """Put and take where so many wait already."""
    events = waiting.events(RequestIds())
    far = waiting.middleware(flush_interval=3_600.0, batch_size=100_000)
    spooled = waiting.middleware(spool_dir=f"{directory}/spool", delivery="ship")
    found = {}
    for name, middleware in (("memory", far), ("spool", spooled)):
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
    """Append in so many processes at once; the median of what they took."""
    go_read, go = os.pipe()
    result, told = os.pipe()
    children = [_forked(directory, go_read, go, told) for _ in range(size)]
    for _ in children:
        os.read(result, 1)  # its journal is open
    os.close(go)
    os.close(go_read)
    for child in children:
        os.waitpid(child, 0)
    os.close(told)
    figures = os.read(result, 8 * size)
    os.close(result)
    taken = [figure for (figure,) in struct.iter_unpack("d", figures)]
    return {"append, spool": statistics.median(taken)}


def _forked(directory: str, go_read: int, go: int, told: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.close(go)
        middleware = waiting.middleware(spool_dir=directory, delivery="ship")
        put = middleware.process().transport.put
        events = waiting.events(RequestIds())
        put(next(events))
        os.write(told, b".")
        os.read(go_read, 1)  # ends when the parent has closed the other end
        taken = [
            _nanoseconds(put, itertools.islice(events, _EVENTS))
            for _ in range(_REPEATS)
        ]
        os.write(told, struct.pack("d", min(taken)))
    finally:
        os._exit(0)


def routes(size: int, directory: str) -> dict[str, float]:
    """Serve the last of so many routes."""
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
    """Serve, and decide on, any of so many known subjects."""
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
