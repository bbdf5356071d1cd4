"""Count what Python code executes, in instructions, under valgrind.

What is counted runs in a process of its own, between `begin` and `end`, once for each
name that it has written to a file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

#: The file, in the directory given, with the names of what is counted, in its order.
NAMES = "names.json"
#: System calls that nothing else makes: where it sees them valgrind writes a report of
#: what was executed since the last one.
begin, end = os.getpgrp, os.getppid


def count(module: str, option: str, times: int) -> dict[str, float]:
    """Return the instructions of one time of each, run by ``python -m`` *module*.

    It is told by *option* how many *times*, and by ``--run`` which directory.
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
            # Every other report is of what was executed in between.
            name: _total(Path(directory, f"out.{2 * number}")) / times
            for number, name in enumerate(names, 1)
        }


def _total(report: Path) -> int:
    found = re.search(r"^summary: (\d+)$", report.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{report}: expected a line 'summary: …', found none")
    return int(found[1])
