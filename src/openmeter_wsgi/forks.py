"""Whether this is still the process that made something, asked on every request.

A fork made in C, such as uWSGI's, calls no hook of Python's; `os.getpid()` is a system
call. Where the kernel empties a page of memory in every child, reading one byte of it
says the same at a quarter of the price.
"""

from __future__ import annotations

import mmap
import os
import sys
from typing import Protocol

#: ``MADV_WIPEONFORK`` of Linux 4.14 and later, which `mmap` does not name.
_WIPE_ON_FORK = 18


class Mark(Protocol):
    """Is true at 0 in the process that made it, and in no child of it."""

    def __getitem__(self, index: int, /) -> int:
        """Return whether this is the process that made it."""


def mark_process() -> Mark:
    """Return what tells this process from those that are forked from it."""
    if sys.platform != "linux":
        return _ProcessId()
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page.madvise(_WIPE_ON_FORK)
    except (OSError, ValueError):
        page.close()  # an older kernel
        return _ProcessId()
    page[0] = 1
    return page


class _ProcessId:
    """Asks the kernel for the process id."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def __getitem__(self, _: int) -> int:
        return os.getpid() == self._pid
