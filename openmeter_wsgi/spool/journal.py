"""The append side of a spool: one live segment of one process, in one of two forms.

Mapped: one C call that copies the line into the page cache. The GIL is kept for all
of it, so no writer is ever in the middle when another one seals. Written: one
system call, during which others run; so writers say when they come and go.

Both raise ValueError once the segment is sealed, and neither takes a lock: `write`
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
#: After a failure the disk is left alone for so many seconds.
RETRY_DELAY = 1.0
#: Closing waits so long for writers that are in the middle of a line.
_LEAVING_TIMEOUT = 5.0
#: So many sealed segments are held open until they are delivered.
MAX_KEPT = 32


class JournalClosed(Exception):
    """The journal was closed; another one takes the line."""


class RecordTooLarge(Exception):
    """No segment could hold the line."""


class _Closed:
    """The end of a chain of segments: whoever comes here has come too late."""

    quiet = True

    def __init__(self) -> None:
        self.links: dict[str, SegmentWriter] = {}
        self.file: SegmentFile | None = None

    def write(self, _: bytes) -> None:
        """Refuse a line."""
        raise JournalClosed

    position = 0

    def seal(self) -> None:
        """Refuse to go on."""
        raise JournalClosed

    def remove(self) -> None:
        """Refuse to go on."""
        raise JournalClosed

    def release(self) -> None:
        """Refuse to go on."""
        raise JournalClosed


#: Stands for a journal that was not opened yet, too.
CLOSED: SegmentWriter = _Closed()


class Journal:
    """Appends the lines of one process to segments, one after the other.

    Any thread writes and none waits for another. Segments form a chain in which
    each link is set once: by `prepare`, beforehand, or else by a writer.

    :raises SpoolError: if the directory cannot take it now.
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
            raise self._failed(error) from error
        try:
            self._head: SegmentWriter = self._made()
        except SpoolError:
            self._owner.leave(nothing_left=True)
            raise
        #: Append one whole line. ValueError: `append` must do it.
        self.write: Callable[[bytes], object] = self._head.write

    @property
    def owner(self) -> str:
        """The owner in the names of the segments."""
        return self._owner.token

    @property
    def position(self) -> tuple[int, int]:
        """A value that changes with each line."""
        head = self._head
        return id(head), head.position

    @property
    def is_intact(self) -> bool:
        """True if its lock and its segments are where they were made."""
        following = self._head.links.get("next")
        files = [segment.file for segment in (self._head, following) if segment]
        return self._owner.is_intact and all(
            file is None or file.fate() is Fate.HERE for file in files
        )

    def touch(self) -> None:
        """Say to a cleaner that the lock is in use."""
        self._owner.touch()

    def write_key_mark(self, mark: str) -> None:
        """Write into the lock which key this process uses."""
        self._owner.write_mark(mark)

    def append(self, line: bytes) -> None:
        """Append *line*, going to the next segment where that is needed.

        :raises RecordTooLarge: if no segment could hold it.
        :raises SpoolError: if there is no room, or no way to write.
        :raises JournalClosed: if it was closed.
        """
        if len(line) > self._segment_bytes:
            raise RecordTooLarge(
                f"an event of {len(line)} bytes, expected at most {self._segment_bytes}"
            )
        while True:
            segment = self._head
            try:
                segment.write(line)
            except ValueError:
                self._advance(segment)
            except OSError as error:
                segment.seal()
                raise self._failed(error) from error
            else:
                return

    @property
    def is_prepared(self) -> bool:
        """True if the next segment is there."""
        return "next" in self._head.links

    def prepare(self) -> None:
        """Make the segment that will be needed next, if there is none yet.

        :raises SpoolError: if that is impossible now.
        """
        if not self.is_prepared:
            self._link(self._head)

    def close(self) -> None:
        """Seal, and give up what is owned: others may deliver and delete it."""
        segment = self._head
        segments = [segment]
        while (segment := segment.links.setdefault("next", CLOSED)) is not CLOSED:
            segments.append(segment)
        self._head, self.write = CLOSED, CLOSED.write
        for segment in segments:
            segment.seal()
            self._kept.add(segment)
        deadline = time.monotonic() + _LEAVING_TIMEOUT
        while not all(segment.quiet for segment in segments):
            # Not given up while somebody writes: it would be deleted under him.
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)
        for segment in segments:
            segment.release()
        self._owner.leave()

    def _advance(self, full: SegmentWriter) -> None:
        """Seal *full* and go on to what follows. Every writer may do so."""
        successor = full.links.get("next") or self._link(full)
        full.seal()
        self._kept.add(full)
        if self._head is full:
            self._head = successor
            self.write = successor.write

    def _link(self, last: SegmentWriter) -> SegmentWriter:
        made = self._made()
        # Atomic: of several that come here together, one wins.
        winner = last.links.setdefault("next", made)
        if winner is not made:
            made.remove()
        return winner

    def _made(self) -> SegmentWriter:
        if self._failure is not None and time.monotonic() < self._retry_at:
            raise self._failure
        try:
            self._check_room()
            name = SegmentName(
                time.time_ns() // 1_000_000,
                self._owner.token,
                next(self._numbers),
                self._form,
            )
            segment = make_segment(self._directory, name, self._segment_bytes)
        except OSError as error:
            raise self._failed(error) from error
        self._failure = None
        return segment

    def _check_room(self) -> None:
        used = used_bytes(self._directory)
        if used + self._segment_bytes > self._max_bytes:
            raise OSError(
                errno.ENOSPC,
                f"max_spool_bytes is {self._max_bytes}, {used} are in use",
            )

    def _failed(self, error: OSError) -> SpoolError:
        self._retry_at = time.monotonic() + RETRY_DELAY
        kind = SpoolFull if error.errno in _NO_ROOM else SpoolError
        self._failure = kind(f"{self._directory}: {error}")
        return self._failure


def used_bytes(directory: Path) -> int:
    """Return the bytes that segments take, free room in live ones included."""
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

    #: ``next``: what takes over once this one is sealed. Set once, for good.
    links: dict[str, SegmentWriter]
    file: SegmentFile | None

    @property
    def position(self) -> int:
        """A value that changes with each line."""

    @property
    def quiet(self) -> bool:
        """True if it is sealed and every writer has left."""

    def seal(self) -> None:
        """Let nobody write from now on. May be repeated."""

    def remove(self) -> None:
        """Delete it: nobody has written."""

    def release(self) -> None:
        """Give back what no line takes: it is sealed, and quiet."""


class Fate(enum.Enum):
    """The fate of a segment that this process has made."""

    HERE = "it is where it was made"
    DELIVERED = "the sender has deleted it"
    GONE = "somebody else has removed or replaced it"


class SegmentFile:
    """The file of a segment, held open: it can be read whatever becomes of its name."""

    def __init__(self, path: Path, key: str, fd: int) -> None:
        self.key = key
        self._path = path
        self._fd = os.dup(fd)

    def fate(self) -> Fate:
        """Return its fate."""
        status = os.fstat(self._fd)
        for path in (self._path, self._path.with_name(self._path.name + SEALED)):
            with contextlib.suppress(OSError):
                if os.path.samestat(status, path.stat(follow_symlinks=False)):
                    return Fate.HERE
        # Only now: the sender marks a segment and then deletes it.
        mode = stat.S_IMODE(os.fstat(self._fd).st_mode)
        return Fate.DELIVERED if mode == DELIVERED else Fate.GONE

    def lines(self) -> Iterator[Line]:
        """Yield the whole lines that are events."""
        text = os.pread(self._fd, os.fstat(self._fd).st_size, 0).rstrip(b"\0")
        for line in split_lines(text, 0):
            if line.end - line.start > len(line.text) and is_event(line.text):
                yield line

    def truncate(self, size: int) -> None:
        """Give back what is behind so many bytes. Nobody may have it mapped."""
        os.ftruncate(self._fd, size)

    def __del__(self) -> None:
        os.close(self._fd)


class KeptSegments:
    """Sealed segments of this process that are not delivered, as far as is known.

    They are held open, up to a number, so that one that is removed can be put back.
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
        """Forget what was delivered; return, and forget, what is gone."""
        lost = []
        for key, file in list(self._files.items()):
            fate = file.fate()
            if fate is not Fate.HERE:
                self._files.pop(key, None)
            if fate is Fate.GONE:
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
    """A preallocated file, mapped: a full disk is an error here and no SIGBUS later.

    Never truncated while it is mapped, never used twice.
    """

    flags = 0

    def __init__(self, fd: int, path: Path, key: str, size: int) -> None:
        self._path = path
        self.file: SegmentFile | None = None
        self.links: dict[str, SegmentWriter] = {}
        self.quiet: bool = False
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
        """Let nobody write from now on. May be repeated."""
        # One C call: whoever writes after it gets ValueError, whoever wrote before
        # has written all of its line.
        with contextlib.suppress(ValueError):  # released already
            self._map.seek(0, os.SEEK_END)
        self.quiet = True
        _rename_sealed(self._path)

    def release(self) -> None:
        """Give back what no line takes: it is sealed, and quiet."""
        with contextlib.suppress(ValueError, OSError):
            end = self._map.rfind(b"\n", 0) + 1
            self._map.close()  # or to truncate it would be SIGBUS for a writer
            if self.file is not None:
                self.file.truncate(end)

    def remove(self) -> None:
        """Delete it: nobody has written."""
        self._map.seek(0, os.SEEK_END)
        self._path.unlink(missing_ok=True)


class AppendWriter:
    """A file that grows by one system call a line."""

    flags: int = os.O_APPEND

    def __init__(self, fd: int, path: Path, key: str, size: int) -> None:
        self._path = path
        self.file: SegmentFile | None = None
        self.links: dict[str, SegmentWriter] = {}
        #: One descriptor; taken out by the one who closes it.
        self._fds = [fd]
        self.file = SegmentFile(path, key, fd)
        self._left = size
        self._sealed = False
        #: One token a writer between its entry and its leaving.
        self._inside: set[object] = set()

    @property
    def position(self) -> int:
        """A value that changes with each line."""
        return self._left

    def release(self) -> None:
        """Do nothing: it takes no more than its lines."""

    def write(self, line: bytes) -> None:
        """Append one line, newline included."""
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
        """True if it is sealed and every writer has left."""
        return self._sealed and not self._inside

    def seal(self) -> None:
        """Let nobody write from now on. May be repeated."""
        self._sealed = True
        self._publish()

    def remove(self) -> None:
        """Delete it: nobody has written."""
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
