"""What importing costs, and that it opens nothing.

    python -m benchmarks.start [--rounds 25]

Each round starts an interpreter for either import, one after the other; what is added
is the difference within the round, in processor time: on a busy machine the clock on
the wall says more of the other processes. Bytecode is there, as an installer puts it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import NamedTuple

from benchmarks import report

BASE = "import werkzeug, requests"
OURS = f"{BASE}, openmeter_wsgi"
#: Milliseconds that the import may add.
MOST_ADDED = 25.0

_TIMED = """
import os, threading, time
began = time.process_time()
{}
taken = time.process_time() - began
open_now = [os.readlink(f"/proc/self/fd/{{fd}}") for fd in range(3, 64)
            if os.path.exists(f"/proc/self/fd/{{fd}}")]
print(taken * 1e3, threading.active_count() - 1, len(open_now))
"""


class Started(NamedTuple):
    """What an import took, and what it left behind."""

    milliseconds: float
    threads: float
    #: Files and sockets.
    descriptors: float


def imported(statement: str, cache: str) -> Started:
    """Import in a process of its own, whose bytecode is in *cache*."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", _TIMED.format(statement)],
        env={**inherited, "PYTHONPYCACHEPREFIX": cache},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Started(*map(float, done.stdout.split()))


def measure(rounds: int) -> list[report.Row]:
    with tempfile.TemporaryDirectory() as cache:
        imported(OURS, cache)  # compiles
        pairs = [(imported(BASE, cache), imported(OURS, cache)) for _ in range(rounds)]
    added = [ours.milliseconds - base.milliseconds for base, ours in pairs]
    ours = [ours for _, ours in pairs]
    return [
        report.Row(f"`{BASE}`", "ms", [base.milliseconds for base, _ in pairs]),
        report.Row("added by `import openmeter_wsgi`", "ms", added, MOST_ADDED),
        report.Row("threads started", "", [each.threads for each in ours], 0.0),
        report.Row(
            "files and sockets opened", "", [each.descriptors for each in ours], 0.0
        ),
    ]


def main() -> None:
    given = report.arguments(__doc__, rounds=25).parse_args()
    report.show("Start", measure(given.rounds), given.json)


if __name__ == "__main__":
    main()
