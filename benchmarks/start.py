"""What importing costs, and that it opens nothing.

    python -m benchmarks.start [--rounds 25]

Each round starts an interpreter that imports what everybody has, then this package. It
is timed in processor time: on a busy machine the clock on the wall says more of the
other processes. Bytecode is there, as an installer puts it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import NamedTuple

from benchmarks import report

#: Milliseconds that the import may add.
MOST_ADDED = 25.0

_TIMED = """
import os, threading, time
began = time.process_time()
import werkzeug, requests
base = time.process_time()
import openmeter_wsgi
taken = time.process_time() - base
open_now = [fd for fd in range(3, 64) if os.path.exists(f"/proc/self/fd/{fd}")]
print((base - began) * 1e3, taken * 1e3, threading.active_count() - 1, len(open_now))
"""


class Started(NamedTuple):
    """What the imports took, in milliseconds, and what they left behind."""

    base: float
    added: float
    threads: float
    #: Files and sockets.
    descriptors: float


def imported(cache: str) -> Started:
    """Import in a process of its own, whose bytecode is in *cache*."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", _TIMED],
        env={**inherited, "PYTHONPYCACHEPREFIX": cache},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Started(*map(float, done.stdout.split()))


def measure(rounds: int) -> list[report.Row]:
    with tempfile.TemporaryDirectory() as cache:
        imported(cache)  # compiles
        found = [imported(cache) for _ in range(rounds)]
    ratios = [each.added / each.base for each in found]
    return [
        report.Row("`import werkzeug, requests`", "ms", [each.base for each in found]),
        report.Row(
            "added by `import openmeter_wsgi`", "ms", [each.added for each in found],
            MOST_ADDED,
        ),
        report.Row("the same, beside werkzeug and requests", "x", ratios),
        report.Row("threads started", "", [each.threads for each in found], 0.0),
        report.Row(
            "files and sockets opened", "", [each.descriptors for each in found], 0.0
        ),
    ]  # fmt: skip


def main() -> None:
    given = report.arguments(__doc__, rounds=25).parse_args()
    report.show("Start", measure(given.rounds), given.json)


if __name__ == "__main__":
    main()
