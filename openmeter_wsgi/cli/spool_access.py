"""Access of the commands to a spool: its segments and its dead letters.

To read the state, locks are queried (`holder`), not tried. A tried lock is held for a
moment, in which another process would take a dead owner for alive, or lose an election.

A sender may append to the dead letters at any time, so their file is rewritten only
while no sender is running. Letters that are requeued or purged are first marked as
settled, in a second file that only these commands write.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from itertools import chain
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

    from openmeter_wsgi.spool.progress import Progress


class SegmentState(NamedTuple):
    """The name and size of a segment, and the state of the process that writes it."""

    name: SegmentName
    bytes: int
    #: True if the process is alive.
    alive: bool


class SpoolContents:
    """The segments of a directory at one moment, and the progress of their delivery.

    The sender may deliver and delete segments meanwhile; these are then empty.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Progress is loaded first: events delivered in between count as waiting, and no
        # event counts as delivered by mistake.
        self.progress: Progress = (
            progress.load_progress(directory) or progress.Progress()
        )
        self.segments: list[SegmentState] = list(self._find())

    @property
    def sender(self) -> int | None:
        """The process id of the sender, None without a sender."""
        return holder(self._directory / ELECTION)

    def waiting(self, segment: SegmentState) -> Iterator[bytes]:
        """Yield the undelivered events of a segment."""
        start = 0
        for low, high in self.progress.done.get(segment.name.key, []):
            yield from self._events(segment, start, low)
            start = high
        yield from self._events(segment, start, None)

    def in_doubt(self) -> Iterator[bytes]:
        """Yield the events that were sent without an answer, or are being sent."""
        segments = {segment.name.key: segment for segment in self.segments}
        in_flight = (batch.lines.items() for batch in self.progress.in_flight)
        for key, ranges in chain.from_iterable(in_flight):
            if segment := segments.get(key):
                for low, high in ranges:
                    yield from self._events(segment, low, high)

    def _find(self) -> Iterator[SegmentState]:
        try:
            entries = os.listdir(self._directory)
        except FileNotFoundError:  # an empty directory is removed
            return
        names = [name for name in map(read_name, entries) if name]
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
            with contextlib.suppress(FileNotFoundError):  # sealed or deleted meanwhile
                return open_file(self._directory / str(path))
        return None

    def _events(
        self, segment: SegmentState, start: int, end: int | None
    ) -> Iterator[bytes]:
        if (fd := self._open(segment.name)) is None:
            return
        final = segment.name.sealed or not segment.alive
        read = read_final if final else read_live
        with open(fd, "rb", buffering=0):
            while (end is None or start < end) and (lines := read(fd, start, end)):
                yield from events_of(lines)
                start = lines[-1].end


def events_of(lines: Iterable[Line]) -> Iterator[bytes]:
    """Yield the events among *lines* of a segment."""
    for line in lines:
        # A line without its newline may be incomplete.
        is_complete = len(line.text) < line.end - line.start
        if is_complete and is_event(line.text):
            yield line.text


#: Name of the file of marks.
MARKS = "dead-letters.settled.jsonl"
_COMMAND_LOCK = "dead-letters.lock"
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class _WrittenLetter(msgspec.Struct):
    """A dead letter as the sender writes it."""

    event: msgspec.Raw
    reason: str
    status: int | None = None
    time: str = ""


class _Mark(NamedTuple):
    """The position of a letter: the inode of its file, and the offset in it."""

    inode: int
    offset: int


class Letter(NamedTuple):
    """A dead letter: an event that is not sent again, and the reason."""

    mark: _Mark
    event: bytes
    reason: str
    status: int | None
    time: str

    @property
    def expired(self) -> bool:
        """True if no answer came, so that the event may have arrived."""
        return self.status is None

    @property
    def document(self) -> Any:
        """The decoded event; text if the letter is not an event."""
        return msgspec.json.decode(self.event)

    @property
    def can_be_sent(self) -> bool:
        """True if the letter is an event."""
        return is_event(self.event)


class DeadLetterFile:
    """The file of the dead letters of a directory, and the file of marks."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / DEAD_LETTERS
        self._marks_path = directory / MARKS

    def read(self) -> list[Letter]:
        """Return the letters that are neither requeued nor purged, the oldest first."""
        with contextlib.suppress(FileNotFoundError):
            settled = self._settled()
            return [
                letter
                for mark, line in self._lines()
                if mark not in settled and (letter := _parse(mark, line))
            ]
        return []

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Lock the files against other commands.

        :raises BlockingIOError: if another command holds the lock.
        """
        fd = open_file(self.directory / _COMMAND_LOCK, os.O_RDWR | os.O_CREAT)
        try:
            os.fchmod(fd, 0o600)
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(fd)

    def settle(self, letters: Iterable[Letter]) -> None:
        """Mark *letters* as requeued or purged, on the disk. Requires `changing`."""
        lines = b"".join(msgspec.json.encode(letter.mark) + b"\n" for letter in letters)
        fd = _open_new(self._marks_path, _APPEND)
        with open(fd, "ab") as file:
            # After a killed process the file may end within a line.
            file.write(b"\n" + lines)
            file.flush()
            os.fsync(fd)
        _sync_directory(self.directory)

    def erase_settled(self) -> bool:
        """Erase marked letters from the disk; return False while a sender is running.

        Requires `changing`.
        """
        with election(self.directory, wait=False) as elected:
            if elected and self._settled():
                self._rewrite()
            return elected is not None

    def _rewrite(self) -> None:
        settled = self._settled()
        kept = [line for mark, line in self._lines() if mark not in settled]
        unfinished = self._path.with_name(DEAD_LETTERS + ".new")
        fd = _open_new(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        with open(fd, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(fd)
        # The new file is another inode, so left-over marks do not apply to it.
        unfinished.rename(self._path)
        self._marks_path.unlink(missing_ok=True)
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
            text = self._marks_path.read_bytes()
        except FileNotFoundError:
            return set()
        marks = set()
        for line in text.splitlines():
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                marks.add(msgspec.json.decode(line, type=_Mark))
        return {mark for mark in marks if mark.inode == inode}


def requeue(directory: Path, letters: Sequence[Letter], max_bytes: int) -> None:
    """Write the events of *letters* to new segments, on the disk.

    The letters stay. If the process is killed before they are marked, an event exists
    twice, under one id.

    :raises SpoolError: if the spool is full.
    """
    journal = Journal(directory, form=WRITTEN, max_bytes=max_bytes)
    try:
        for event in dict.fromkeys(letter.event for letter in letters):
            journal.append(event + b"\n")
        _sync_segments(directory, journal.owner)
    finally:
        # From now on the sender owns the segments, and deletes them after delivery.
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


def _parse(mark: _Mark, line: bytes) -> Letter | None:
    """Parse a line, and return None if a full disk has truncated it."""
    try:
        letter = msgspec.json.decode(line, type=_WrittenLetter)
        msgspec.json.decode(letter.event)  # still raw
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return Letter(mark, bytes(letter.event), letter.reason, letter.status, letter.time)
