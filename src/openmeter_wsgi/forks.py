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

from openmeter_wsgi.threads import threads_are_greenlets

#: ``MADV_WIPEONFORK`` of Linux 4.14 and later, which `mmap` does not name.
_WIPE_ON_FORK = 18


class Mark(Protocol):
    """Is true at 0 where it was set, and in no child of that process."""

    def __getitem__(self, index: int, /) -> int:
        """Return whether it was set in this process."""

    def __setitem__(self, index: int, value: int, /) -> None:
        """Set it."""


class ProcessGuard:
    """Knows the process, and the kind of threads, that something was made for.

    Locks made before gevent patches `threading` block all greenlets of a process. So
    the mark is not set before the first request, which looks whether all still fits.
    """

    def __init__(self) -> None:
        #: For the way of a request; set by `confirm`.
        self.mark = _new_mark()
        self._pid = os.getpid()
        self._greenlets = threads_are_greenlets()

    def is_current(self) -> bool:
        """Say whether what was made can be used in this process."""
        same_threads = threads_are_greenlets() == self._greenlets
        return bool(self.mark[0]) or (os.getpid() == self._pid and same_threads)

    def confirm(self) -> None:
        """Set the mark: a request has come, and what was made fits."""
        self.mark[0] = 1


def _new_mark() -> Mark:
    if sys.platform != "linux":
        return _ProcessId()
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page.madvise(_WIPE_ON_FORK)
    except (OSError, ValueError):
        page.close()  # an older kernel
        return _ProcessId()
    return page


class _ProcessId:
    """Asks the kernel for the process id."""

    def __init__(self) -> None:
        self._pid = 0

    def __getitem__(self, _: int) -> int:
        return os.getpid() == self._pid

    def __setitem__(self, _: int, value: int) -> None:
        self._pid = os.getpid() if value else 0
