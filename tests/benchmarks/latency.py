"""Latency of requests on a threaded server: bare, metered, and during an outage.

    python -m tests.benchmarks.latency [--rounds 5] [--seconds 3]

gunicorn's gthread with 8 threads serves a handler that computes for 200 µs. Requests
are sent at fixed times over 8 connections, and each is timed from its planned start.
Each round measures all servers in turn. Two of them are bare: their difference shows
the noise.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from tests.benchmarks import report
from tests.benchmarks.pacing import ask
from tests.benchmarks.sink import running_sink
from tests.benchmarks.waiting import NOWHERE

if TYPE_CHECKING:
    from collections.abc import Iterator

BARE = "bare"
#: The address of OpenMeter (the sink, or nobody listens), and two booleans: with a
#: spool; with events put at 10,000 a second by a thread of the server.
SERVERS = {
    BARE: None,
    "bare, once more": None,
    "memory, at rest": ("sink", False, False),
    "spool, at rest": ("sink", True, False),
    "memory, 10,000 events a second": ("sink", False, True),
    "spool, 10,000 events a second": ("sink", True, True),
    "memory, outage": ("away", False, True),
    "spool, outage": ("away", True, True),
}
HANDLER_SECONDS = 200e-6
#: Requests per second. They take less than a sixth of one core, so that few requests
#: wait for others.
PACE = 400
_GUNICORN = ("--worker-class", "gthread", "--threads", "8", "--log-level", "error")


def loops() -> int:
    """Return the number of loops that take HANDLER_SECONDS on this machine."""
    from tests.benchmarks.latency_app import work

    taken = []
    for _ in range(50):
        began = time.perf_counter()
        work(1_000)
        taken.append(time.perf_counter() - began)
    return int(1_000 * HANDLER_SECONDS / min(taken))


@contextlib.contextmanager
def serving(options: tuple[str, bool, bool] | None, variables: dict[str, str],
            sink: str) -> Iterator[int]:  # fmt: skip
    """Run one server and yield its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        os.set_inheritable(listener.fileno(), True)
        own = dict(variables)
        if options is not None:
            where, spool, feed = options
            own["BENCH_URL"] = sink if where == "sink" else NOWHERE
            own["BENCH_FEED"] = "1" * feed
            own["BENCH_SPOOL"] = tempfile.mkdtemp(dir=own["TMPDIR"]) if spool else ""
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *_GUNICORN, "--bind",
             f"fd://{listener.fileno()}", "tests.benchmarks.latency_app:app"],
            env={**os.environ, **own}, pass_fds=[listener.fileno()],
        )  # fmt: skip
        try:
            yield listener.getsockname()[1]
        finally:
            process.terminate()
            process.wait()


def measure(rounds: int, seconds: float) -> dict[str, list[list[float]]]:
    """Return the seconds of all requests, by server and round."""
    seconds_of: defaultdict[str, list[list[float]]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(running_sink())
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        variables = {"BENCH_LOOPS": str(loops()), "TMPDIR": directory}
        ports = {
            name: stack.enter_context(serving(options, variables, sink))
            for name, options in SERVERS.items()
        }
        for port in ports.values():
            ask(port, PACE, 0.5)
        for _, (name, port) in itertools.product(range(rounds), ports.items()):
            seconds_of[name].append(ask(port, PACE, seconds))
    return seconds_of


def rows(seconds_of: dict[str, list[list[float]]]) -> list[report.Row]:
    table = []
    for percent, place in (("50", 499), ("99", 989), ("99.9", 998)):
        for name, by_round in seconds_of.items():
            cut = [
                statistics.quantiles(seconds, n=1_000)[place] * 1e3
                for seconds in by_round
            ]
            table.append(report.Row(f"p{percent}, {name}", "ms", cut))
    return table


def main() -> None:
    args = report.arguments(__doc__, rounds=5, seconds=3).parse_args()
    seconds_of = measure(args.rounds, args.seconds)
    report.show("Latency", rows(seconds_of), args.json)


if __name__ == "__main__":
    main()
