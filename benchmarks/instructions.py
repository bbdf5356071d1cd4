"""How many instructions one static meter adds to a request, in memory and in the spool.

    python -m benchmarks.instructions [--requests 1000]

Counted by valgrind, so it is the same on a busy machine and on an idle one: each
variant runs twice with different numbers of requests, and the difference is what the
requests take, without start and end. The delivery thread sleeps meanwhile; what it
does later is not the request's. What the kernel does in a system call is not counted.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.request_cost import serve, trivial_app
from openmeter_wsgi import OpenMeterMiddleware

QUEUES = ("bare", "memory", "spool mmap", "spool write")
#: How many times the instructions of memory the spool may take.
TARGET = 2.2
_WARM_UP = 200


def run(queue: str, requests: int, directory: str) -> None:
    """Serve so many requests and end at once: the part that is counted."""
    options: dict[str, Any] = {
        "meter": {"type": "api-request", "data": {"count": 1}},
        "api_url": "http://127.0.0.1:9",
        "on_missing_subject": "acme",
        "flush_interval": 3_600.0,
        "batch_size": 100_000,
    }
    spool, _, journal = queue.partition(" ")
    if spool == "spool":
        # Without the thread, which would look for work while requests are counted.
        options |= {"spool_dir": directory, "journal": journal, "delivery": "ship"}
    app = trivial_app
    if queue != "bare":
        app = OpenMeterMiddleware(trivial_app, **options)
    serve(app, _WARM_UP + requests)
    os._exit(0)


def instructions(queue: str, requests: int) -> int:
    """Return how many instructions a process with so many requests executes."""
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [
                "valgrind", "--tool=cachegrind", "--cache-sim=no",
                f"--cachegrind-out-file={directory}/out",
                sys.executable, "-m", "benchmarks.instructions",
                "--run", queue, "--requests", str(requests),
                "--directory", f"{directory}/spool",
            ],
            env={**os.environ, "PYTHONHASHSEED": "0"},
            cwd=Path(__file__).parent.parent,
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    match = re.search(r"I\s+refs:\s+([\d,]+)", done.stderr)
    if match is None:
        raise ValueError(f"expected valgrind's count, got {done.stderr!r}")
    return int(match[1].replace(",", ""))


def per_request(queue: str, requests: int) -> float:
    once, twice = instructions(queue, requests), instructions(queue, 2 * requests)
    return (twice - once) / requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--run", choices=QUEUES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(given.run, given.requests, given.directory)
    counts = {queue: per_request(queue, given.requests) for queue in QUEUES}
    added = {queue: counts[queue] - counts["bare"] for queue in QUEUES[1:]}
    print("| queue | instructions per request | added by one meter |")
    print("|---|---:|---:|")
    print(f"| none | {counts['bare']:,.0f} | |")
    for queue, more in added.items():
        print(f"| {queue} | {counts[queue]:,.0f} | {more:,.0f} |")
    ratio = max(added["spool mmap"], added["spool write"]) / added["memory"]
    print(f"\nspool to memory: {ratio:.2f} (at most {TARGET})")
    if ratio > TARGET:
        sys.exit(1)


if __name__ == "__main__":
    main()
