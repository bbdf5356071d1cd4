"""The two forms in which a process appends to a segment.

Mapped: one C call that copies the line into the page cache. The GIL is kept for all
of it, so no writer is ever in the middle when another one seals. Written: one
system call, during which others run; so writers say when they come and go.

Both raise ValueError once the segment is sealed, and neither takes a lock: `write`
may run in a finaliser that interrupts another `write` of the same thread.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from typing import TYPE_CHECKING, Protocol

from openmeter_wsgi.delivery.segment import MAPPED, SEALED, SegmentName
from openmeter_wsgi.ownership import UNFINISHED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Segment(Protocol):
    """A segment of this process."""

    @property
    def write(self) -> Callable[[bytes], object]:
        """What appends one line, newline included."""

    #: ``next``: what takes over once this one is sealed. Set once, for good.
    links: dict[str, Segment]

    @property
    def quiet(self) -> bool:
        """Whether it is sealed and every writer has left."""

    def seal(self) -> None:
        """Let nobody write from now on. May be repeated."""

    def remove(self) -> None:
        """Delete it: nobody has written."""


def make_segment(directory: Path, name: SegmentName, size: int) -> Segment:
    """Make an empty segment of *size* bytes.

    :raises OSError: if there is no room for it, or no permission.
    """
    path = directory / str(name)
    unfinished = path.with_name(path.name + UNFINISHED)
    form: type[_Mapped | _Written] = _Mapped if name.form == MAPPED else _Written
    fd = os.open(unfinished, _NEW_FILE | form.flags, 0o600)
    try:
        segment = form(fd, path, size)
        unfinished.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    return segment


class _Mapped:
    """A preallocated file, mapped: a full disk is an error here and no SIGBUS later.

    Never truncated while it is mapped, never used twice.
    """

    flags = 0

    def __init__(self, fd: int, path: Path, size: int) -> None:
        self._path = path
        self.links: dict[str, Segment] = {}
        self.quiet = False
        try:
            os.posix_fallocate(fd, 0, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self.write: Callable[[bytes], object] = self._map.write

    def seal(self) -> None:
        # One C call: whoever writes after it gets ValueError, whoever wrote before
        # has written all of its line.
        self._map.seek(0, os.SEEK_END)
        self.quiet = True
        _rename_sealed(self._path)

    def remove(self) -> None:
        self._map.seek(0, os.SEEK_END)
        self._path.unlink(missing_ok=True)


class _Written:
    """A file that grows by one system call a line."""

    flags = os.O_APPEND

    def __init__(self, fd: int, path: Path, size: int) -> None:
        self._path = path
        self.links: dict[str, Segment] = {}
        #: One descriptor; taken out by the one who closes it.
        self._fds = [fd]
        self._left = size
        self._sealed = False
        #: One token a writer between its entry and its leaving.
        self._inside: set[object] = set()

    def write(self, line: bytes) -> None:
        token = object()
        self._inside.add(token)
        try:
            # Looked at after the entry: the sealer looks the other way round.
            if self._sealed or self._left < len(line):
                raise ValueError("the segment is full")
            self._left -= len(line)
            # A line that a full disk cut short must not spoil the next one.
            text = b"\n" + line
            if os.write(self._fds[0], text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            self._inside.discard(token)
            if self._sealed:
                self._publish()

    @property
    def quiet(self) -> bool:
        return self._sealed and not self._inside

    def seal(self) -> None:
        self._sealed = True
        self._publish()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        self.seal()

    def _publish(self) -> None:
        """Say that it is sealed: by the sealer, or by the last writer to leave."""
        if self.quiet:
            _rename_sealed(self._path)
            with contextlib.suppress(IndexError):
                os.close(self._fds.pop())


def _rename_sealed(path: Path) -> None:
    # Gone if it has been done, or if the sender was even faster.
    with contextlib.suppress(OSError):
        path.rename(path.with_name(path.name + SEALED))
