"""Who holds a lock, asked without taking it.

A lock that is tried is held for a moment, and in that moment another asker would
see a dead owner alive, or a worker would fail to be elected.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from typing import TYPE_CHECKING

from openmeter_wsgi.spool.files import open_file

if TYPE_CHECKING:
    from pathlib import Path

#: The fields of C's ``struct flock`` in their order, and which are type and pid.
_FLOCK, _TYPE, _PID = ("hhqqi4x", 0, 4) if sys.platform == "linux" else ("qqihh", 3, 2)


def holder(path: Path) -> int | None:
    """Return the id of the process that holds the lock of *path*, None if none does.

    It is 0 or less where that process is in another container.
    """
    try:
        fd = open_file(path)
    except FileNotFoundError:
        return None
    fields = [0] * 5
    fields[_TYPE] = fcntl.F_WRLCK
    try:
        answer = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack(_FLOCK, *fields))
    finally:
        os.close(fd)
    found = struct.unpack(_FLOCK, answer)
    return None if found[_TYPE] == fcntl.F_UNLCK else found[_PID]
