"""The journal of one process: its segments, to which any thread appends lines.

A segment is live until it is full, then it is *sealed* and the next one takes over. It
has one of two forms:

- mapped: `write` is one C call that copies the line into the page cache. It holds the
  GIL, so no thread is in the middle of a line when another thread seals;
- written: `write` makes one system call, during which other threads run. So the
  segment keeps a record of the threads that are in `write`.

In both forms `write` raises ValueError once the segment is sealed. It takes no lock: it
may run in a finaliser that interrupts another `write` of the same thread.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import itertools
import mmap
import os
import stat
import time
from typing import TYPE_CHECKING, Final, Protocol

from openmeter_wsgi import log
from openmeter_wsgi.errors import SpoolError, SpoolFull
from openmeter_wsgi.lock import UNFINISHED, SegmentLock
from openmeter_wsgi.spool.files import (
    DELIVERED,
    MAPPED,
    SEALED,
    SEGMENT_BYTES,
    SegmentName,
    is_event,
    read_name,
    split_lines,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from openmeter_wsgi.spool.files import Line

logger: Final = log.get_logger(__name__)

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: Seconds after a failure during which the disk is not used.
RETRY_DELAY = 1.0
#: Maximum number of seconds that a close waits for threads in the middle of a line.
_CLOSE_TIMEOUT = 5.0
#: Maximum number of sealed segments that are held open until they are delivered.
MAX_KEPT = 32


class JournalClosed(Exception):
    """The journal is closed: the line must go into another journal."""


class RecordTooLarge(Exception):
    """The line is larger than a segment."""


class _Closed:
    """The last element of a closed chain of segments. It refuses every call."""

    is_quiet = True

    def __init__(self) -> None:
        self.links: dict[str, SegmentWriter] = {}
        self.file: SegmentFile | None = None

    def write(self, _: bytes) -> None:
        """Raise `JournalClosed`."""
        raise JournalClosed

    position = 0

    def seal(self) -> None:
        """Raise `JournalClosed`."""
        raise JournalClosed

    def remove(self) -> None:
        """Raise `JournalClosed`."""
        raise JournalClosed

    def release(self) -> None:
        """Raise `JournalClosed`."""
        raise JournalClosed


#: Also stands for a journal that is not open yet.
CLOSED: SegmentWriter = _Closed()


class Journal:
    """The lines of one process, appended to segments one after the other.

    Any thread writes, and no thread waits for another. The segments form a chain. Each
    link is set once: in advance by `prepare`, or else by a writer.

    :raises SpoolError: if the first segment cannot be made.
    """

    def __init__(
        self,
        directory: Path,
        *,
        form: str,
        max_bytes: int,
        segment_bytes: int = SEGMENT_BYTES,
        kept: KeptSegments | None = None,
    ) -> None:
        self._directory = directory
        self._kept = KeptSegments() if kept is None else kept
        self._form = form
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._numbers = itertools.count(1)
        self._failure: SpoolError | None = None
        self._retry_at = 0.0
        try:
            self._owner = SegmentLock.register(directory)
        except OSError as error:
            raise self._note_failure(error) from error
        try:
            self._current: SegmentWriter = self._new_segment()
        except SpoolError:
            self._owner.leave(nothing_left=True)
            raise
        #: Append one whole line to the current segment. On ValueError call `append`.
        self.write: Callable[[bytes], object] = self._current.write

    @property
    def owner(self) -> str:
        """The owner in the names of the segments."""
        return self._owner.token

    @property
    def position(self) -> tuple[int, int]:
        """A value that changes with each line."""
        current = self._current
        return id(current), current.position

    @property
    def is_intact(self) -> bool:
        """True if the lock and the live segments still have their names."""
        following = self._current.links.get("next")
        files = [segment.file for segment in (self._current, following) if segment]
        return self._owner.is_intact and all(
            file is None or file.fate() is Fate.IN_PLACE for file in files
        )

    def touch(self) -> None:
        """Renew the time of the lock, so that no cleaner removes it."""
        self._owner.touch()

    def write_key_mark(self, mark: str) -> None:
        """Write the *mark* of the API key into the lock file."""
        self._owner.write_mark(mark)

    def append(self, line: bytes) -> None:
        """Append *line*, and go to the next segment if necessary.

        :raises RecordTooLarge: if no segment could hold it.
        :raises SpoolError: if there is no room, or the disk fails.
        :raises JournalClosed: if the journal was closed.
        """
        if len(line) > self._segment_bytes:
            raise RecordTooLarge(
                f"an event of {len(line)} bytes, expected at most {self._segment_bytes}"
            )
        while True:
            segment = self._current
            try:
                segment.write(line)
            except ValueError:
                self._advance(segment)
            except OSError as error:
                segment.seal()
                raise self._note_failure(error) from error
            else:
                return

    @property
    def is_prepared(self) -> bool:
        """True if the next segment exists."""
        return "next" in self._current.links

    def prepare(self) -> None:
        """Make the next segment, unless it exists.

        :raises SpoolError: if that is impossible now.
        """
        if not self.is_prepared:
            self._link(self._current)

    def close(self) -> None:
        """Seal the segments and release the lock: the sender may adopt the segments."""
        segment = self._current
        segments = [segment]
        while (segment := segment.links.setdefault("next", CLOSED)) is not CLOSED:
            segments.append(segment)
        self._current, self.write = CLOSED, CLOSED.write
        for segment in segments:
            segment.seal()
            self._kept.add(segment)
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        while not all(segment.is_quiet for segment in segments):
            # Keep the lock while a thread writes: a sender could delete the segment.
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)
        for segment in segments:
            segment.release()
        self._owner.leave()

    def _advance(self, full: SegmentWriter) -> None:
        """Seal *full* and go to the next segment. Any thread."""
        successor = full.links.get("next") or self._link(full)
        full.seal()
        self._kept.add(full)
        if self._current is full:
            self._current = successor
            self.write = successor.write

    def _link(self, last: SegmentWriter) -> SegmentWriter:
        made = self._new_segment()
        # No lock: of several threads the first one sets the link.
        winner = last.links.setdefault("next", made)
        if winner is not made:
            made.remove()
        return winner

    def _new_segment(self) -> SegmentWriter:
        if self._failure is not None and time.monotonic() < self._retry_at:
            raise self._failure
        try:
            self._check_space()
            name = SegmentName(
                time.time_ns() // 1_000_000,
                self._owner.token,
                next(self._numbers),
                self._form,
            )
            segment = make_segment(self._directory, name, self._segment_bytes)
        except OSError as error:
            raise self._note_failure(error) from error
        self._failure = None
        return segment

    def _check_space(self) -> None:
        used = used_bytes(self._directory)
        if used + self._segment_bytes > self._max_bytes:
            raise OSError(
                errno.ENOSPC,
                f"max_spool_bytes is {self._max_bytes}, {used} are in use",
            )

    def _note_failure(self, error: OSError) -> SpoolError:
        self._retry_at = time.monotonic() + RETRY_DELAY
        kind = SpoolFull if error.errno in _NO_ROOM else SpoolError
        self._failure = kind(f"{self._directory}: {error}")
        return self._failure


def used_bytes(directory: Path) -> int:
    """Return the bytes of all segments, including the free room in live segments."""
    used = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if read_name(entry.name):
                try:
                    used += entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:  # delivered and deleted meanwhile
                    continue
    return used


_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class SegmentWriter(Protocol):
    """A segment of this process."""

    @property
    def write(self) -> Callable[[bytes], object]:
        """A function that appends one line, newline included."""

    #: The following segment, under "next". Set once, with `setdefault`.
    links: dict[str, SegmentWriter]
    file: SegmentFile | None

    @property
    def position(self) -> int:
        """A value that changes with each line."""

    @property
    def is_quiet(self) -> bool:
        """True if the segment is sealed and no thread is writing."""

    def seal(self) -> None:
        """Refuse all further lines. May be repeated."""

    def remove(self) -> None:
        """Delete the unused segment."""

    def release(self) -> None:
        """Free the unused room of a sealed and quiet segment."""


class Fate(enum.Enum):
    """The fate of a segment file that this process has made."""

    IN_PLACE = "it has its name"
    DELIVERED = "the sender has deleted it"
    REMOVED = "another program has removed or replaced it"


class SegmentFile:
    """The file of a segment. It stays open, so it can be read after a removal."""

    _fd: int = -1

    def __init__(self, path: Path, key: str, fd: int) -> None:
        self.key = key
        self._path = path
        self._fd = os.dup(fd)

    def fate(self) -> Fate:
        """Return the fate of the file."""
        status = os.fstat(self._fd)
        for path in (self._path, self._path.with_name(self._path.name + SEALED)):
            with contextlib.suppress(OSError):
                if os.path.samestat(status, path.stat(follow_symlinks=False)):
                    return Fate.IN_PLACE
        # Read the mode again: the sender first sets it, then deletes the file.
        mode = stat.S_IMODE(os.fstat(self._fd).st_mode)
        return Fate.DELIVERED if mode == DELIVERED else Fate.REMOVED

    def lines(self) -> Iterator[Line]:
        """Yield the whole lines that are events."""
        text = os.pread(self._fd, os.fstat(self._fd).st_size, 0).rstrip(b"\0")
        for line in split_lines(text, 0):
            if line.end - line.start > len(line.text) and is_event(line.text):
                yield line

    def truncate(self, size: int) -> None:
        """Cut the file to *size* bytes. No process may have it mapped."""
        os.ftruncate(self._fd, size)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class KeptSegments:
    """Sealed segments of this process that are not known to be delivered.

    The newest `MAX_KEPT` are held open, so that the events of a removed segment can be
    put back.
    """

    def __init__(self) -> None:
        self._files: dict[str, SegmentFile] = {}

    def __len__(self) -> int:
        return len(self._files)

    def add(self, segment: SegmentWriter) -> None:
        """Keep *segment*. May be repeated."""
        if segment.file is not None:
            self._files[segment.file.key] = segment.file
        for key in list(self._files)[:-MAX_KEPT]:
            self._files.pop(key, None)

    def take_lost(self) -> list[SegmentFile]:
        """Forget the delivered and the removed segments; return the removed ones."""
        lost = []
        for key, file in list(self._files.items()):
            fate = file.fate()
            if fate is not Fate.IN_PLACE:
                self._files.pop(key, None)
            if fate is Fate.REMOVED:
                lost.append(file)
        return lost


def make_segment(directory: Path, name: SegmentName, size: int) -> SegmentWriter:
    """Make an empty segment of *size* bytes.

    :raises OSError: if there is no room for it, or no permission.
    """
    path = directory / str(name)
    unfinished = path.with_name(path.name + UNFINISHED)
    form: type[MmapWriter | AppendWriter] = (
        MmapWriter if name.form == MAPPED else AppendWriter
    )
    fd = os.open(unfinished, _NEW_FILE | form.flags, 0o600)
    try:
        segment = form(fd, path, name.key, size)
        unfinished.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    return segment


class MmapWriter:
    """A segment in mapped form: a preallocated file that is mapped into memory.

    As it is preallocated, a full disk is an error here, not a SIGBUS during a write.
    The file is not truncated while it is mapped, and never reused.
    """

    flags = 0

    def __init__(self, fd: int, path: Path, key: str, size: int) -> None:
        self._path = path
        self.file: SegmentFile | None = None
        self.links: dict[str, SegmentWriter] = {}
        self.is_quiet: bool = False
        try:
            os.posix_fallocate(fd, 0, size)
            self._map = mmap.mmap(fd, size)
            self.file = SegmentFile(path, key, fd)
        finally:
            os.close(fd)
        self.write: Callable[[bytes], object] = self._map.write

    @property
    def position(self) -> int:
        """A value that changes with each line."""
        return 0 if self._map.closed else self._map.tell()

    def seal(self) -> None:
        """Refuse all further lines. May be repeated."""
        # One C call: a later `write` raises ValueError, an earlier one is complete.
        with contextlib.suppress(ValueError):  # released already
            self._map.seek(0, os.SEEK_END)
        self.is_quiet = True
        _rename_sealed(self._path)

    def release(self) -> None:
        """Free the unused room of a sealed and quiet segment."""
        with contextlib.suppress(ValueError, OSError):
            end = self._map.rfind(b"\n", 0) + 1
            self._map.close()  # before truncate(): a later write would get a SIGBUS
            if self.file is not None:
                self.file.truncate(end)

    def remove(self) -> None:
        """Delete the unused segment."""
        self._map.seek(0, os.SEEK_END)
        self._path.unlink(missing_ok=True)


class AppendWriter:
    """A segment in written form: a file that grows by one system call per line."""

    flags: int = os.O_APPEND

    def __init__(self, fd: int, path: Path, key: str, size: int) -> None:
        #: The file descriptor. The thread that closes it takes it out of the list.
        self._fds = [fd]
        self._path = path
        self.file: SegmentFile | None = SegmentFile(path, key, fd)
        self.links: dict[str, SegmentWriter] = {}
        self._room = size
        self._sealed = False
        #: One token for each call of `write` that has not returned.
        self._writing: set[object] = set()

    @property
    def position(self) -> int:
        """A value that changes with each line."""
        return self._room

    def release(self) -> None:
        """Do nothing: the file has no unused room."""

    def write(self, line: bytes) -> None:
        """Append one line, newline included."""
        token = object()
        self._writing.add(token)
        try:
            # After adding the token: `seal` sets the flag before it checks the tokens.
            if self._sealed or self._room < len(line):
                raise ValueError("the segment is full")
            self._room -= len(line)
            # The first newline ends a line that a full disk has cut short.
            text = b"\n" + line
            if os.write(self._fds[0], text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            self._writing.discard(token)
            if self._sealed:
                self._finish_if_quiet()

    @property
    def is_quiet(self) -> bool:
        """True if the segment is sealed and no thread is writing."""
        return self._sealed and not self._writing

    def seal(self) -> None:
        """Refuse all further lines. May be repeated."""
        self._sealed = True
        self._finish_if_quiet()

    def remove(self) -> None:
        """Delete the unused segment."""
        self._path.unlink(missing_ok=True)
        self.seal()

    def _finish_if_quiet(self) -> None:
        """Rename and close the sealed segment, once no thread is writing."""
        if self.is_quiet:
            _rename_sealed(self._path)
            self._close()

    def _close(self) -> None:
        with contextlib.suppress(IndexError):
            os.close(self._fds.pop())

    __del__ = _close  # a segment that could not be made is never sealed


def _rename_sealed(path: Path) -> None:
    # The file has another name, or none, if another thread or the sender was faster.
    with contextlib.suppress(OSError):
        path.rename(path.with_name(path.name + SEALED))
