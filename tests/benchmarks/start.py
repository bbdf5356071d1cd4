"""Cost of the import and of making a middleware; files and threads that they open.

    python -m tests.benchmarks.start [--rounds 15] [--guard]

Each round starts an interpreter that imports werkzeug and requests, then this package,
then makes a middleware. It measures processor time, which depends less on other
processes than wall time. The bytecode is compiled before, as an installer does.

With --guard valgrind counts the instructions of both imports instead, which do not
depend on other processes. The exit status is 1 if this package exceeds its share.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks import report

#: Maximum number of milliseconds that the import adds.
MOST_ADDED = 25.0
#: Maximum instructions of the import, divided by those of werkzeug and requests.
MOST_SHARE = 0.12
#: Factor by which the guard lets the share be exceeded, for other releases of the
#: imported libraries.
TOLERANCE = 1.05

#: The options of each middleware that is made, by its label.
MADE: dict[str, dict[str, Any]] = {
    "in memory": {},
    "with a spool": {"spool_dir": "spool"},
    "with entitlements": {
        "required_entitlements": ["calls"], "entitlement_meters": ["calls"],
    },
    "with routes": {"routes": {"/v1/users/<id>": {"meters": {"calls": 2}}}},
    "with `llm_usage()`": {"meters": {"tokens": "$llm.total_tokens"}},
}  # fmt: skip
_USUAL = {"meters": {"calls": 1}, "api_url": "http://127.0.0.1:9"}

_TIMED = """
import json, os, sys, threading, time
began = time.process_time()
import werkzeug, requests
base = time.process_time()
import openmeter_wsgi
openmeter_wsgi.OpenMeterMiddleware
taken = time.process_time()
open_now = [fd for fd in range(3, 64) if os.path.exists(f"/proc/self/fd/{fd}")]
options = json.loads(sys.argv[1])
making = time.process_time()
openmeter_wsgi.OpenMeterMiddleware(print, **options)
made = time.process_time()
print((base - began) * 1e3, (taken - base) * 1e3, (made - making) * 1e3,
      threading.active_count() - 1, len(open_now), flush=True)
os._exit(0)
"""

#: A system call that nothing else makes. At each call valgrind writes a report of the
#: instructions since the report before.
_MARK = os.getpgrp
_COUNTED = f"""
import os
mark = os.{_MARK.__name__}
mark()
import werkzeug, requests
mark()
import openmeter_wsgi
openmeter_wsgi.OpenMeterMiddleware
mark()
"""


class Started(NamedTuple):
    """Milliseconds of one start, and the threads and files that the imports opened."""

    #: Import of werkzeug and requests.
    base: float
    #: Import of this package after that.
    added: float
    #: Making a middleware.
    made: float
    threads: float
    #: Open files and sockets.
    descriptors: float


def imported(cache: str, options: dict[str, Any] | None = None) -> Started:
    """Start a new interpreter whose bytecode and spool are in *cache*."""
    done = subprocess.run(
        [sys.executable, "-c", _TIMED, json.dumps(_USUAL | (options or {}))],
        env=_with_bytecode(cache), cwd=cache,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Started(*map(float, done.stdout.split()))


def counted(cache: str) -> tuple[int, int]:
    """Return the instructions of both imports: werkzeug and requests, this package."""
    imported(cache)  # compiles
    subprocess.run(
        [
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={cache}/out",
            f"--dump-before={_MARK.__name__}*", sys.executable, "-c", _COUNTED,
        ],
        # Equal hashes make equal dictionaries, and so equal counts.
        env={**_with_bytecode(cache), "PYTHONHASHSEED": "0"},
        capture_output=True, check=True,
    )  # fmt: skip
    # The first report counts the instructions before the first mark.
    return _total(Path(cache, "out.2")), _total(Path(cache, "out.3"))


def _total(report: Path) -> int:
    found = re.search(r"^summary: (\d+)$", report.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{report}: expected a line 'summary: …', found none")
    return int(found[1])


def _with_bytecode(cache: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, "PYTHONPYCACHEPREFIX": cache}


def measure(rounds: int) -> list[report.Row]:
    with tempfile.TemporaryDirectory() as cache:
        runs = {}
        for name, options in MADE.items():
            imported(cache, options)  # compiles
            runs[name] = [imported(cache, options) for _ in range(rounds)]
    imports = [run for made in runs.values() for run in made]
    return [
        report.Row(
            "`import werkzeug, requests`", "ms", [run.base for run in imports]
        ),
        report.Row(
            "added by `from openmeter_wsgi import OpenMeterMiddleware`", "ms",
            [run.added for run in imports], MOST_ADDED,
        ),
        report.Row(
            "the same, ÷ werkzeug and requests", "x",
            [run.added / run.base for run in imports],
        ),
        *(
            report.Row(f"making a middleware {name}", "ms", [run.made for run in made])
            for name, made in runs.items()
        ),
        report.Row("threads started", "", [run.threads for run in imports], 0.0),
        report.Row(
            "files and sockets opened", "", [run.descriptors for run in imports], 0.0
        ),
    ]  # fmt: skip


def guard() -> None:
    """Exit with status 1 if the import exceeds its share."""
    with tempfile.TemporaryDirectory() as cache:
        base, added = counted(cache)
    share = added / base
    print(
        f"import openmeter_wsgi: {added:,} instructions, {share:.3f} of the {base:,} "
        f"of werkzeug and requests (at most {MOST_SHARE})"
    )
    if share > MOST_SHARE * TOLERANCE:
        sys.exit(
            f"import openmeter_wsgi: expected at most {MOST_SHARE} of the instructions "
            f"of werkzeug and requests, got {share:.3f}"
        )


def main() -> None:
    parser = report.arguments(__doc__, rounds=15)
    parser.add_argument(
        "--guard", action="store_true", help="count instructions, fail above the share"
    )
    args = parser.parse_args()
    if args.guard:
        guard()
    else:
        report.show("Start", measure(args.rounds), args.json)


if __name__ == "__main__":
    main()
