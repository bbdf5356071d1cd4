"""Count the instructions of Python code with valgrind.

The code runs in a new process. It writes the names of its cases to the file NAMES, and
calls `begin` and `end` around each case, in the order of the names.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

#: Name of the file with the names of the cases, in the directory of --run.
NAMES = "names.json"
#: System calls that nothing else makes. At each call valgrind writes a report of the
#: instructions since the report before.
begin, end = os.getpgrp, os.getppid


def count(module: str, option: str, times: int) -> dict[str, float]:
    """Run ``python -m`` *module* and return the instructions of one run of each case.

    *option* gives *module* the number of *times*, and ``--run`` a directory.
    """
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [
                "valgrind", "--tool=callgrind", f"--callgrind-out-file={directory}/out",
                f"--dump-before={begin.__name__}*", f"--dump-before={end.__name__}*",
                sys.executable, "-m", module, "--run", directory, option, str(times),
            ],
            # Equal hashes make equal dictionaries, and so equal counts.
            env={**os.environ, "PYTHONHASHSEED": "0"},
            cwd=Path(__file__).parents[2],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"expected valgrind to count, got {done.stderr}")
        names = json.loads(Path(directory, NAMES).read_text())
        return {
            # Every other report counts the instructions between begin and end.
            name: _total(Path(directory, f"out.{2 * number}")) / times
            for number, name in enumerate(names, 1)
        }


def _total(report: Path) -> int:
    match = re.search(r"^summary: (\d+)$", report.read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"{report}: expected a line 'summary: …', found none")
    return int(match[1])
