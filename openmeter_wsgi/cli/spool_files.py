"""A spool as commands read it: segments, locks and dead letters.

A lock that is tried is held for a moment, and in that moment another asker would
see a dead owner alive, or a worker would fail to be elected.

A sender may append to the dead letters at any moment, so their file is never
rewritten while there is one. What is put back or purged is first marked in a second
file, which only these commands write; it is erased as soon as no sender is running.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from openmeter_wsgi.lock import ELECTION, LOCK, election, holder
from openmeter_wsgi.spool import progress
from openmeter_wsgi.spool.dead_letters import DEAD_LETTERS
from openmeter_wsgi.spool.files import (
    WRITTEN,
    Line,
    SegmentName,
    is_event,
    open_file,
    read_final,
    read_live,
    read_name,
)
from openmeter_wsgi.spool.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from openmeter_wsgi.delivery.number_ranges import Ranges
    from openmeter_wsgi.spool.progress import Progress


class SegmentState(NamedTuple):
    """One file of events, and what is known of its owner."""

    name: SegmentName
    bytes: int
    alive: bool


class SpoolContents:
    """The segments of a directory at one moment, and how far they are delivered.

    The sender goes on meanwhile: what it delivers and deletes is simply not there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # In this order: what is delivered later is then still counted, and never
        # is something counted as delivered that is not.
        self.progress: Progress = (
            progress.load_progress(directory) or progress.Progress()
        )
        self.segments: list[SegmentState] = list(self._find())

    @property
    def sender(self) -> int | None:
        """The process id of the sender, None if there is none."""
        return holder(self._directory / ELECTION)

    def waiting(self, segment: SegmentState) -> Iterator[bytes]:
        """Yield the events of a segment that are not delivered."""
        start = 0
        for low, high in self.progress.done.get(segment.name.key, []):
            yield from self._between(segment, start, low)
            start = high
        yield from self._between(segment, start, None)

    def in_doubt(self) -> Iterator[bytes]:
        """Yield the events that were sent, or are being sent, without an answer."""
        segments = {segment.name.key: segment for segment in self.segments}
        for key, ranges in self._doubts():
            if segment := segments.get(key):
                for low, high in ranges:
                    yield from self._between(segment, low, high)

    def _doubts(self) -> Iterator[tuple[str, Ranges]]:
        for doubt in self.progress.in_flight:
            yield from doubt.lines.items()

    def _find(self) -> Iterator[SegmentState]:
        try:
            entries = os.listdir(self._directory)
        except FileNotFoundError:  # removed, as nothing was left in it
            return
        names = [n for n in map(read_name, entries) if n]
        alive = {
            owner: holder(self._directory / (owner + LOCK)) is not None
            for owner in {name.owner for name in names}
        }
        for name in sorted(name for name in names if not name.being_made):
            if (fd := self._open(name)) is not None:
                size = os.fstat(fd).st_size
                os.close(fd)
                yield SegmentState(name, size, alive[name.owner])

    def _open(self, name: SegmentName) -> int | None:
        for path in (name, name._replace(sealed=True)):
            with contextlib.suppress(FileNotFoundError):  # sealed, or delivered
                return open_file(self._directory / str(path))
        return None

    def _between(
        self, segment: SegmentState, start: int, end: int | None
    ) -> Iterator[bytes]:
        if (fd := self._open(segment.name)) is None:
            return
        final = segment.name.sealed or not segment.alive
        read = read_final if final else read_live
        with open(fd, "rb", buffering=0):
            while (end is None or start < end) and (pieces := read(fd, start, end)):
                yield from _events(pieces)
                start = pieces[-1].end


def _events(pieces: list[Line]) -> Iterator[bytes]:
    for piece in pieces:
        # Without its newline a line may be the first half of one.
        if len(piece.text) < piece.end - piece.start and is_event(piece.text):
            yield piece.text


MARKS = "dead-letters.settled.jsonl"
_COMMAND_LOCK = "dead-letters.lock"
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class _Line(msgspec.Struct):
    """A line that the sender wrote."""

    event: msgspec.Raw
    reason: str
    status: int | None = None
    time: str = ""


class _Mark(NamedTuple):
    """The place of a letter: the inode of its file, and the offset."""

    inode: int
    offset: int


class Letter(NamedTuple):
    """One event that is not sent again, and why."""

    mark: _Mark
    event: bytes
    reason: str
    status: int | None
    time: str

    @property
    def expired(self) -> bool:
        """True if it may have arrived: it was set aside without an answer."""
        return self.status is None

    @property
    def document(self) -> Any:
        """The event as JSON types; text if it is no event."""
        return msgspec.json.decode(self.event)

    @property
    def can_be_sent(self) -> bool:
        """True if it is an event at all."""
        return is_event(self.event)


class DeadLetterFile:
    """The dead letters of a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / DEAD_LETTERS
        self._marks = directory / MARKS

    def read(self) -> list[Letter]:
        """Return the letters that are neither put back nor purged, the oldest first."""
        with contextlib.suppress(FileNotFoundError):
            settled = self._settled()
            return [
                letter
                for mark, line in self._lines()
                if mark not in settled and (letter := _read(mark, line))
            ]
        return []

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Keep other commands from changing it meanwhile.

        :raises BlockingIOError: if one is doing so.
        """
        fd = open_file(self.directory / _COMMAND_LOCK, os.O_RDWR | os.O_CREAT)
        try:
            os.fchmod(fd, 0o600)
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(fd)

    def settle(self, letters: Iterable[Letter]) -> None:
        """Mark *letters*, for good, as put back or purged. Only while `changing`."""
        lines = b"".join(msgspec.json.encode(one.mark) + b"\n" for one in letters)
        fd = _open_new(self._marks, _APPEND)
        with open(fd, "ab") as file:
            # A kill may have left half a line.
            file.write(b"\n" + lines)
            file.flush()
            os.fsync(fd)
        _sync_directory(self.directory)

    def erase_settled(self) -> bool:
        """Take marked letters off the disk and say if that was possible.

        Only while `changing`. It is not while there is a sender, who may append.
        """
        with election(self.directory, wait=False) as won:
            if won and self._settled():
                self._rewrite()
            return won is not None

    def _rewrite(self) -> None:
        settled = self._settled()
        kept = [line for mark, line in self._lines() if mark not in settled]
        unfinished = self._path.with_name(DEAD_LETTERS + ".new")
        fd = _open_new(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        with open(fd, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(fd)
        # Another inode: marks that a kill leaves behind mark nothing any more.
        unfinished.rename(self._path)
        self._marks.unlink(missing_ok=True)
        _sync_directory(self.directory)

    def _lines(self) -> Iterator[tuple[_Mark, bytes]]:
        with open(open_file(self._path), "rb") as file:
            inode, offset = os.fstat(file.fileno()).st_ino, 0
            for line in file:
                yield _Mark(inode, offset), line
                offset += len(line)

    def _settled(self) -> set[_Mark]:
        try:
            inode = self._path.stat().st_ino
            text = self._marks.read_bytes()
        except FileNotFoundError:
            return set()
        marks = set()
        for line in text.splitlines():
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                marks.add(msgspec.json.decode(line, type=_Mark))
        return {mark for mark in marks if mark.inode == inode}


def requeue(directory: Path, letters: Sequence[Letter], max_bytes: int) -> None:
    """Put the events of *letters* into segments of their own, on the disk.

    The letters stay: after a kill an event is there twice, under the same id.

    :raises SpoolError: if there is no room.
    """
    journal = Journal(directory, form=WRITTEN, max_bytes=max_bytes)
    try:
        for event in dict.fromkeys(letter.event for letter in letters):
            journal.append(event + b"\n")
        _sync_segments(directory, journal.owner)
    finally:
        # From now on the sender owns them, and deletes them when they are delivered.
        journal.close()


def _sync_segments(directory: Path, owner: str) -> None:
    for entry in os.listdir(directory):
        name = read_name(entry)
        if name is None or name.owner != owner:
            continue
        with contextlib.suppress(FileNotFoundError):  # delivered already
            fd = open_file(directory / entry)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_new(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _read(mark: _Mark, line: bytes) -> Letter | None:
    """Return the letter in a line, None if a full disk cut it short."""
    try:
        said = msgspec.json.decode(line, type=_Line)
        msgspec.json.decode(said.event)  # raw until now
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return Letter(mark, bytes(said.event), said.reason, said.status, said.time)
