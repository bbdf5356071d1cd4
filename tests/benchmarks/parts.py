"""Parts of the instructions that the middleware adds to a request.

    python -m tests.benchmarks.parts [--times 500]

valgrind counts them, as in `tests.benchmarks.instructions`. Each part runs in a loop of
its own, and the instructions of an empty loop are subtracted.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

from openmeter_wsgi.delivery.queue import MemoryQueue
from openmeter_wsgi.events import RequestIds, quoted
from openmeter_wsgi.policy import Policy
from openmeter_wsgi.process import Process, ProcessGuard
from openmeter_wsgi.request import REQUEST, SETTLED, RequestRecord, new_record
from openmeter_wsgi.response import Response, SizedResponse
from openmeter_wsgi.stats import Counts
from openmeter_wsgi.values import clock
from tests.benchmarks import counting, paths, waiting

if TYPE_CHECKING:
    from collections.abc import Callable

_LOOP = "an empty loop"


class _Callable:
    def __call__(self, environ: object, start_response: object) -> None:
        pass


def parts() -> dict[str, Callable[[int], None]]:  # noqa: C901 - many, all small
    """Return for each part a function that repeats it."""
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    body = [paths.BODY]
    process = Process(Policy(on_missing_subject="acme", dry_run=True))
    record = new_record()
    record.billing = process.billing
    record.state = SETTLED
    record.status = "200 OK"
    event = next(waiting.events(RequestIds()))
    application = _Callable()
    guard = ProcessGuard()
    guard.confirm()
    ids = RequestIds()
    queue = MemoryQueue(max_bytes=4 * 10**9, counts=Counts())
    queue.set_wake_threshold(10**6)
    put = queue.put

    def function(environ: object, start_response: object) -> None:
        pass

    def server_start(status: str, headers: Any, exc_info: Any = None) -> Any:
        pass

    def loop(times: int) -> None:
        for _ in range(times):
            pass

    def call_function(times: int) -> None:
        for _ in range(times):
            function(environ, None)

    def call_object(times: int) -> None:
        for _ in range(times):
            application(environ, None)

    def ask_guard(times: int) -> None:
        for _ in range(times):
            if not guard.is_confirmed():
                return

    def response() -> Response:
        made = SizedResponse()
        made.environ, made.request, made.iterable = environ, record, body
        return made

    def make_record(times: int) -> None:
        for _ in range(times):
            made = environ[REQUEST] = RequestRecord()
            made.billing = process.billing
            made.state = SETTLED
            made.server_start = server_start
            made.status = made.server_write = made.capture = None
            made.caller = made.usage = made.route = None
            made.decision = made.reserved = made.remembered = None

    def make_response(times: int) -> None:
        for _ in range(times):
            response()

    def start_response(times: int) -> None:
        started = new_record()
        started.server_start = server_start
        for _ in range(times):
            start = started.start_response
            start("200 OK", [])

    def iterate_list(times: int) -> None:
        for _ in range(times):
            for _chunk in body:
                pass

    def iterate_response(times: int) -> None:
        made = response()
        for _ in range(times):
            for _chunk in made:
                pass

    def count_unbilled(times: int) -> None:
        fast_path = process.billing.fast_path
        for _ in range(times):
            if fast_path is None or fast_path.events(environ, record) != ():
                return

    def look_for_options(times: int) -> None:
        for _ in range(times):
            if environ["REQUEST_METHOD"] == "OPTIONS":
                return

    def make_id(times: int) -> None:
        for _ in range(times):
            ids.new()

    def read_clock(times: int) -> None:
        clock.renew()
        clock.until = float("inf")
        for _ in range(times):
            monotonic = clock.monotonic
            clock.text if monotonic() < clock.until else clock.renew()

    def encode(times: int) -> None:
        head, block, number, middle = "h" * 80, "b" * 26, "123", ":a','time':'"
        time, subject = clock.text, "acme"
        for _ in range(times):
            f'{head}{block}{number}{middle}{time}","subject":{quoted(subject)}}}'.encode()

    def put_event(times: int) -> None:
        for _ in range(times):
            put(event)

    return {
        _LOOP: loop,
        "call a function": call_function,
        "call an object, as a server calls the middleware": call_object,
        "check twice that the process has not forked": ask_guard,
        "put a record into the environ": make_record,
        "wrap the server's `start_response`": start_response,
        "make and free a response object": make_response,
        "iterate the body as a list": iterate_list,
        "iterate the body through the response": iterate_response,
        "count a request that is not billed": count_unbilled,
        "check for OPTIONS": look_for_options,
        "make an id": make_id,
        "read the time": read_clock,
        "encode the event": encode,
        "put it into the queue": put_event,
    }


def run(times: int, directory: str) -> None:
    """Repeat each part, and exit. Runs under valgrind."""
    repeats = parts()
    Path(directory, counting.NAMES).write_text(json.dumps(list(repeats)))
    for repeat in repeats.values():
        repeat(300)
        counting.begin()
        repeat(times)
        counting.end()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=500)
    parser.add_argument("--run", metavar="DIRECTORY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.times, args.run)
    counted = counting.count("tests.benchmarks.parts", "--times", args.times)
    loop = counted.pop(_LOOP)
    print("| part | instructions |\n|---|---:|")
    for name, instructions in counted.items():
        print(f"| {name} | {round(instructions - loop):,} |")


if __name__ == "__main__":
    main()
