"""How long requests take under threads: bare, metered, while events go, in an outage.

    python -m tests.benchmarks.latency [--rounds 5] [--seconds 3]

gunicorn's gthread with 8 threads serves a handler that computes for 200 µs. Requests
come at a fixed pace over 8 connections and are timed from the moment at which each
was due. Each round asks all servers in turns; two of them are bare, so that the spread
of equal servers stands beside every difference.
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
#: Where OpenMeter is, whether with a spool, whether events come besides.
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
#: Of one core less than a sixth: what waits for another request is not the subject.
PACE = 400
_GUNICORN = ("--worker-class", "gthread", "--threads", "8", "--log-level", "error")


def loops() -> int:
    """Return how often the handler must count to take its time on this machine."""
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
    found: defaultdict[str, list[list[float]]] = defaultdict(list)
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
            found[name].append(ask(port, PACE, seconds))
    return found


def rows(found: dict[str, list[list[float]]]) -> list[report.Row]:
    made = []
    for percent, place in (("50", 499), ("99", 989), ("99.9", 998)):
        for name, by_round in found.items():
            cut = [statistics.quantiles(of, n=1_000)[place] * 1e3 for of in by_round]
            made.append(report.Row(f"p{percent}, {name}", "ms", cut))
    return made


def main() -> None:
    given = report.arguments(__doc__, rounds=5, seconds=3).parse_args()
    found = measure(given.rounds, given.seconds)
    report.show("Latency", rows(found), given.json)


if __name__ == "__main__":
    main()
