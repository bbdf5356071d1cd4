"""What importing costs, and making a middleware, and that neither opens anything.

    python -m tests.benchmarks.start [--rounds 15] [--guard]

Each round starts an interpreter that imports what everybody has, then this package,
then makes a middleware. It is timed in processor time: on a busy machine the clock on
the wall says more of the other processes. Bytecode is there, as an installer puts it.

With --guard it counts the instructions of both imports instead, by valgrind, which a
busy machine does not disturb, and ends with 1 if the package takes more than its share.
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

#: Milliseconds that the import may add.
MOST_ADDED = 25.0
#: The same beside the import of werkzeug and requests, which takes 208 ms.
MOST_SHARE = 0.12
#: What the guard lets pass, for other releases of what both imports consist of.
TOLERANCE = 1.05

#: What is made, by the options that it is made with.
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

#: A system call that nothing else makes: where it sees it valgrind writes a report of
#: what was executed since the last one.
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
    """What it took, in milliseconds, and what the imports left behind."""

    base: float
    added: float
    #: Making a middleware.
    made: float
    threads: float
    #: Files and sockets.
    descriptors: float


def imported(cache: str, options: dict[str, Any] | None = None) -> Started:
    """Start in a process of its own, whose bytecode and spool are in *cache*."""
    done = subprocess.run(
        [sys.executable, "-c", _TIMED, json.dumps(_USUAL | (options or {}))],
        env=_with_bytecode(cache), cwd=cache,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Started(*map(float, done.stdout.split()))


def counted(cache: str) -> tuple[int, int]:
    """Return the instructions of the import of what everybody has, and of ours."""
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
    # The first report is of what was executed before the first mark.
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
        found = {}
        for name, options in MADE.items():
            imported(cache, options)  # compiles
            found[name] = [imported(cache, options) for _ in range(rounds)]
    imports = [each for of_kind in found.values() for each in of_kind]
    return [
        report.Row(
            "`import werkzeug, requests`", "ms", [each.base for each in imports]
        ),
        report.Row(
            "added by `import openmeter_wsgi`", "ms", [each.added for each in imports],
            MOST_ADDED,
        ),
        report.Row(
            "the same, beside werkzeug and requests", "x",
            [each.added / each.base for each in imports],
        ),
        *(
            report.Row(f"making a middleware {name}", "ms", [each.made for each in of])
            for name, of in found.items()
        ),
        report.Row("threads started", "", [each.threads for each in imports], 0.0),
        report.Row(
            "files and sockets opened", "", [each.descriptors for each in imports], 0.0
        ),
    ]  # fmt: skip


def guard() -> None:
    """End with 1 if the import takes more than its share."""
    with tempfile.TemporaryDirectory() as cache:
        base, added = counted(cache)
    share = added / base
    print(
        f"import openmeter_wsgi: {added:,} instructions beside {base:,} of werkzeug "
        f"and requests, {share:.3f} of it (at most {MOST_SHARE})"
    )
    if share > MOST_SHARE * TOLERANCE:
        sys.exit(f"import: expected at most {MOST_SHARE} of the other, got {share:.3f}")


def main() -> None:
    parser = report.arguments(__doc__, rounds=15)
    parser.add_argument(
        "--guard", action="store_true", help="count, fail above the share"
    )
    given = parser.parse_args()
    if given.guard:
        guard()
    else:
        report.show("Start", measure(given.rounds), given.json)


if __name__ == "__main__":
    main()
