"""Memory used by waiting events.

    python -m tests.benchmarks.memory [--events 1000000] [--in-memory 200000]

Each figure is measured in a process of its own: its anonymous memory (RssAnon) with the
events, minus that before the first event. OpenMeter is down, and the delivery thread
retries.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from openmeter_wsgi.events import RequestIds
from tests.benchmarks import report, waiting

MOST_BYTES = 340.0
#: Number of events in a spool whose memory is the reference for larger numbers.
FEW = 1_000
#: More events than the sender reads ahead: memory must not grow beyond this number.
MORE = 10_000
#: Difference in KiB between two equal processes, caused by pages of the allocator.
NOISE_KIB = 1_024.0
_RUNS = 3


def anonymous_bytes() -> int:
    gc.collect()
    status = Path("/proc/self/status").read_text()
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    if match is None:
        raise RuntimeError("expected RssAnon in /proc/self/status")
    return int(match[1]) * 1_024


def hold(count: int, spool_dir: str | None) -> int:
    """Return the bytes that *count* waiting events take in this process."""
    logging.getLogger("openmeter_wsgi").addHandler(logging.NullHandler())
    middleware = waiting.middleware(spool_dir=spool_dir, flush_interval=0.5)
    put = middleware.process().transport.put
    events = waiting.events(RequestIds())
    put(next(events))
    middleware.flush(1.0)  # warms up: starts the thread, connects, writes to the disk
    before = anonymous_bytes()
    for event in itertools.islice(events, count):
        put(event)
    middleware.flush(3.0)
    return anonymous_bytes() - before


def held(count: int, directory: str | None = None) -> int:
    """Return the result of hold() in a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--hold", str(count)]
    if directory is not None:
        command += ["--spool", f"{directory}/{count}-{os.urandom(4).hex()}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def measure(in_memory: int, in_spool: int) -> list[report.Row]:
    per_event = [held(in_memory) / in_memory for _ in range(_RUNS)]
    with tempfile.TemporaryDirectory() as directory:
        few = [held(FEW, directory) / 1_024 for _ in range(_RUNS)]
        more = [held(MORE, directory) / 1_024 for _ in range(_RUNS)]
        many = [held(in_spool, directory) / 1_024 for _ in range(_RUNS)]
    least = statistics.median(few)
    return [
        report.Row(
            f"{in_memory:,} events of {waiting.EVENT_BYTES} bytes in memory, each",
            "bytes", per_event, MOST_BYTES,
        ),
        report.Row(f"{FEW:,} events in the spool", "KiB", few),
        report.Row(f"{MORE:,} events in the spool", "KiB", more),
        report.Row(
            f"{in_spool:,} events in the spool", "KiB", many, least + NOISE_KIB
        ),
    ]  # fmt: skip


def main() -> None:
    parser = report.arguments(__doc__, events=1_000_000)
    parser.add_argument("--in-memory", type=int, default=200_000)
    parser.add_argument("--hold", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--spool", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hold is not None:
        print(hold(args.hold, args.spool), flush=True)
        os._exit(0)  # without delivering the events
    rows = measure(args.in_memory, args.events)
    report.show("Memory", rows, args.json)


if __name__ == "__main__":
    main()
