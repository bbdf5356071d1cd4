"""The read side of a spool: a source of batches from the segments of a directory.

A segment is a file of events, one per line. Its *owner*, a process, appends to it until
it is *sealed*. The elected sender reads all segments, also the live ones up to their
last whole line: so the events of an idle process are delivered, too. It *adopts* the
segments of owners that have died. A segment whose lines are all done is deleted. Some
segments are mapped into memory at their full size: the unused end is zeros.

`SpoolReader` reads the directory, `SegmentReader` one segment, and `Liveness` finds the
owners that have died.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Final

from openmeter_wsgi import log
from openmeter_wsgi.delivery import number_ranges
from openmeter_wsgi.delivery.batch import Delayed
from openmeter_wsgi.errors import Deposed
from openmeter_wsgi.events import MAX_BATCH_BYTES
from openmeter_wsgi.lock import is_alive, is_there, owner_of_lock, remove_lock
from openmeter_wsgi.spool import progress
from openmeter_wsgi.spool.batches import ByteRange, Slice, SpoolBatch, take_from
from openmeter_wsgi.spool.files import (
    DELIVERED,
    WRITTEN,
    Line,
    SegmentName,
    are_events,
    is_event,
    open_file,
    read_final_text,
    read_live_text,
    read_name,
    split_lines,
    used_end,
)
from openmeter_wsgi.spool.progress import InFlight, Progress, ProgressFile

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping
    from pathlib import Path

    from openmeter_wsgi.delivery.number_ranges import Ranges
    from openmeter_wsgi.lock import Election
    from openmeter_wsgi.spool.dead_letters import DeadLetters

logger: Final = log.get_logger(__name__)

#: Minimum number of seconds between two scans of the directory while a batch is full.
_SCAN_INTERVAL = 0.1
#: Seconds until a failed read of a delayed batch is repeated.
_REREAD_DELAY = 1.0
#: Number of deleted segments after which the directory is synced.
_DELETIONS_PER_SYNC = 16


class SpoolReader:
    """The segments of a directory as a source of batches.

    Belongs to the elected sender. Each election makes a new reader. It stops reading
    ahead once a batch of *max_events* is full.
    """

    def __init__(
        self,
        directory: Path,
        letters: DeadLetters,
        *,
        max_events: int = 1_000,
        election: Election | None = None,
    ) -> None:
        self._directory = directory
        self._election = election
        self._max_events = max_events
        self._letters = letters
        self._segments: dict[str, SegmentReader] = {}
        #: The done lines of deleted segments. A loss of power may restore a segment
        #: until the directory is synced.
        self._deleted: dict[str, Ranges] = {}
        self._names: dict[str, SegmentName] = {}
        #: The segment of each owner that is read next, the oldest first.
        self._heads: list[SegmentReader] = []
        #: Owners without unread lines, until the next scan.
        self._exhausted: set[str] = set()
        #: Lines that are read and not taken.
        self._waiting: deque[Slice] = deque()
        self._waiting_events = 0
        self._waiting_bytes = 0
        #: Batches in flight when the previous sender died: sent again unchanged.
        self._resend: deque[SpoolBatch] = deque()
        #: The ranges of events that were taken and must not be sent yet. They are read
        #: again when they are due, or by the next sender.
        self._delayed: Delayed[list[ByteRange]] = Delayed()
        self._in_flight = InFlight()
        #: True if the last write of the progress failed.
        self._is_unsaved = False
        self._liveness = Liveness(directory)
        #: The progress of the previous sender.
        self._previous = progress.recover(directory)
        self._file = ProgressFile(directory, self._previous.number)
        self._scan()
        self._load_in_flight()

    def __len__(self) -> int:
        """Return the number of events that are read and not taken."""
        return self._waiting_events + sum(map(len, self._resend))

    @property
    def segment_count(self) -> int:
        """The number of segments in the directory."""
        return len(self._segments)

    @property
    def has_full_batch(self) -> bool:
        """True if the events that were read fill a batch."""
        return (
            self._waiting_events >= self._max_events
            or self._waiting_bytes >= MAX_BATCH_BYTES
        )

    def refresh(self, *, everything: bool = False) -> None:
        """Look for new segments, new lines and dead owners.

        If *everything* is True, do so even if the interval has not passed.
        """
        if everything:
            self._liveness.force_next()
        scans = everything or monotonic() >= self._scan_at
        if scans:
            self._scan()
        self._read_ahead()
        if not scans and not self.has_full_batch:
            scans = True
            self._scan()
            self._read_ahead()
        if self._is_unsaved:
            self._save(lasting=True)
        if scans:
            self._delete_done(list(self._segments.values()))

    def close(self) -> None:
        """Close the progress file. The directory does not change."""
        self._file.close()

    def take(self, *, max_events: int, max_bytes: int) -> SpoolBatch:
        """Remove and return the oldest events, at most those of one batch.

        A delayed batch that is due comes first, unchanged.
        """
        if (ranges := self._delayed.take_due()) is not None and (
            batch := self._delayed_batch(ranges)
        ):
            return batch
        self._read_ahead()
        if self._resend:
            return self._resend.popleft()
        parts = take_from(self._waiting, max_events=max_events, max_bytes=max_bytes)
        self._waiting_events -= sum(part.events for part in parts)
        self._waiting_bytes -= sum(part.size for part in parts)
        return SpoolBatch(parts)

    def done(self, batch: SpoolBatch) -> None:
        """Record that the events of *batch* are delivered, or dead letters."""
        self._in_flight.forget(batch.ranges)
        segments = (self._segments.get(key) for key, _, _ in batch.ranges)
        touched = {segment.key: segment for segment in segments if segment}
        for key, start, end in batch.ranges:
            if key in touched:
                number_ranges.add(touched[key].done, start, end)
        # Not synced here: the next `record` syncs it. After a loss of power before
        # that, at least this batch is in flight on the disk and is sent again.
        self._save(lasting=False)
        self._delete_done(touched.values())

    # -- Delay

    def delay(self, batch: SpoolBatch, seconds: float) -> None:
        """Make `take` return the taken *batch* again after *seconds*."""
        self._delayed.add(batch.ranges, seconds)

    @property
    def due_in(self) -> float | None:
        """The seconds until delayed events are due, None without delayed events."""
        return self._delayed.due_in

    def _delayed_batch(self, ranges: list[ByteRange]) -> SpoolBatch | None:
        try:
            parts = self._read_ranges(ranges)
        except OSError:  # the owner may be renaming the segment
            self._delayed.add(ranges, _REREAD_DELAY)
            return None
        return SpoolBatch(parts) if parts else None

    def _read_ranges(self, ranges: Iterable[ByteRange]) -> list[Slice]:
        """Return the lines of ranges that were taken before.

        :raises OSError: if a segment cannot be read.
        """
        parts: list[Slice] = []
        for key, start, end in ranges:
            if (segment := self._segments.get(key)) is not None:
                lines, damaged = segment.read_range(start, end)
                self._set_aside(segment, damaged)
                parts += lines
        return parts

    # -- In flight

    def in_flight_since(self, batch: SpoolBatch) -> float | None:
        """Return the time of the first attempt that may have arrived, or None."""
        return self._in_flight.since(batch.ranges)

    def record(self, batch: SpoolBatch, since: float) -> None:
        """Write to the progress file that *batch* is about to be sent."""
        self._in_flight.add(batch.ranges, since)
        self._save(lasting=True)

    def withdraw(self, batch: SpoolBatch) -> None:
        """Write to the progress file that *batch* has certainly not arrived."""
        self._in_flight.forget(batch.ranges)
        self._save(lasting=True)

    def check_is_sender(self) -> None:
        """Raise an error unless this process is still the sender.

        :raises Deposed: if another sender may have taken its place.
        """
        with self._as_sender():
            pass

    # -- Progress

    def _load_in_flight(self) -> None:
        for in_flight in self._previous.in_flight:
            ranges = (
                ByteRange(key, start, end)
                for key, pairs in in_flight.lines.items()
                for start, end in pairs
            )
            if parts := self._read_ranges(ranges):
                batch = SpoolBatch(parts)
                self._in_flight.add(batch.ranges, in_flight.since)
                self._resend.append(batch)

    def _set_aside(self, segment: SegmentReader, damaged: list[Line]) -> None:
        """Keep damaged lines among the dead letters, and mark them as done."""
        for line in damaged:
            self._letters.add_unreadable(line.text, segment.name.key, line.start)
            number_ranges.add(segment.done, line.start, line.end)

    def _save(self, *, lasting: bool) -> None:
        """Write the progress file; if *lasting* is True, sync it to the disk."""
        done = {key: r.done for key, r in self._segments.items() if r.done}
        done.update(self._deleted)
        try:
            with self._as_sender():
                self._file.save(
                    Progress(done, self._in_flight.batches), lasting=lasting
                )
            self._is_unsaved = False
        except OSError as error:
            # Go on: on a full disk, delivered segments make room.
            self._is_unsaved = True
            logger.error(
                "%s: progress cannot be written; delivery goes on, and after a crash "
                "several batches may be sent twice under the same ids",
                error,
            )

    @contextlib.contextmanager
    def _as_sender(self) -> Iterator[None]:
        """Keep this process the sender within the context.

        :raises Deposed: if another thread of this process has given up the election.
        """
        if self._election is None:
            yield
            return
        with self._election.guard:
            if not self._election.is_held:
                raise Deposed("the place of the sender was given up")
            yield

    # -- Segments

    def _scan(self) -> None:
        """List the segments, and adopt those of owners that have died."""
        self._scan_at = monotonic() + _SCAN_INTERVAL
        entries = sorted(os.listdir(self._directory))
        names = {e: n for e in entries if (n := self._names.get(e) or read_name(e))}
        self._names = names
        self._liveness.update(entries, names.values())
        by_key = {name.key: name for name in names.values() if not name.being_made}
        for key in self._segments.keys() - by_key.keys():
            del self._segments[key]
        for key, name in by_key.items():
            segment = self._segments.get(key)
            if segment is None:
                done = self._previous.done.get(key, [])
                segment = self._segments[key] = SegmentReader(
                    self._directory, name, done
                )
            segment.name = name
            adopted = self._liveness.is_abandoned(segment)
            if adopted and not segment.adopted and self._liveness.has_died(name.owner):
                self._truncate_unused(name)
            segment.adopted = adopted
        self._heads, self._exhausted = [], set()

    def _read_ahead(self) -> None:
        """Read lines until they fill a batch. Each owner's segments come in order."""
        while not self.has_full_batch:
            if not self._heads or self._heads[0].at_end:
                self._heads = next_segments(self._segments, exclude=self._exhausted)
            if not self._heads:
                return
            if not self._read(self._heads[0]):
                self._exhausted.add(self._heads.pop(0).name.owner)

    def _read(self, segment: SegmentReader) -> bool:
        """Read the segment's next lines; return False if its owner has no more now."""
        before = segment.offset
        try:
            parts, damaged = segment.read()
        except FileNotFoundError:
            return False  # the owner is sealing it; the next scan finds its new name
        except OSError as error:
            logger.error(
                "%s: cannot be read (%s); its events are kept until it can be read",
                segment.name.key, error,
            )  # fmt: skip
            return False
        self._set_aside(segment, damaged)
        for part in parts:
            self._waiting.append(part)
            self._waiting_events += part.events
            self._waiting_bytes += part.size
        return segment.at_end or segment.offset > before

    def _truncate_unused(self, name: SegmentName) -> None:
        """Cut off the unused end of a dead owner's segment: no process maps it."""
        path = self._directory / str(name)
        with contextlib.suppress(OSError), self._as_sender():
            fd = open_file(path, os.O_RDWR)
            try:
                os.ftruncate(fd, used_end(fd))
            finally:
                os.close(fd)

    def _delete_done(self, segments: Iterable[SegmentReader]) -> None:
        """Delete the segments that are complete and done."""
        for segment in segments:
            if segment.is_final and segment.is_done:
                with self._as_sender():
                    self._delete(segment)
                self._segments.pop(segment.key, None)
                self._deleted[segment.key] = segment.done
        if len(self._deleted) >= _DELETIONS_PER_SYNC:
            with contextlib.suppress(OSError):
                progress.sync_directory(self._directory)
                self._deleted.clear()

    def _delete(self, segment: SegmentReader) -> None:
        path = self._directory / str(segment.name)
        with contextlib.suppress(FileNotFoundError):
            # The mode tells the owner, which has the file open: delivered, not lost.
            path.chmod(DELIVERED)
            path.unlink()


#: Typical number of bytes checked by one C call, which blocks all other threads.
_BLOCK_BYTES = 32 * 1024


class SegmentReader:
    """Reader of one segment, which returns each line once.

    Belongs to the sender. *done* are the ranges that an earlier sender has delivered.
    """

    __slots__ = (
        "_directory", "_skipped", "adopted", "at_end", "done", "key", "name", "offset",
    )  # fmt: skip

    def __init__(self, directory: Path, name: SegmentName, done: Ranges) -> None:
        self.name: SegmentName = name
        self.key: str = name.key
        self.done: Ranges = done
        #: True if its owner has died, or seems so. A crash may have damaged its lines.
        self.adopted: bool = False
        #: True if all lines were read and no more can come.
        self.at_end: bool = False
        self._directory = directory
        #: The number of bytes read.
        self.offset: int = 0
        #: Ranges that `read` skips: done, or in flight when the previous sender died.
        self._skipped: Ranges = list(done)

    @property
    def is_final(self) -> bool:
        """True if no process writes into the segment any more."""
        return self.name.sealed or self.adopted

    @property
    def is_done(self) -> bool:
        """True if all lines are delivered, dead letters or set aside."""
        if not self.at_end:
            return False
        return not self.offset or self.done == [(0, self.offset)]

    def read(self) -> tuple[list[Slice], list[Line]]:
        """Return the next events and the next damaged lines, or two empty lists.

        :raises OSError: if it cannot be read, e.g. because it was just renamed.
        """
        fd = open_file(self._directory / str(self.name))
        try:
            start, text = self._read_text(fd)
        finally:
            os.close(fd)
        return self._classify(text, start)

    def read_range(self, start: int, end: int) -> tuple[list[Slice], list[Line]]:
        """Return the events and damaged lines of a range, which `read` then skips."""
        number_ranges.add(self._skipped, start, end)
        parts: list[Slice] = []
        damaged: list[Line] = []
        fd = open_file(self._directory / str(self.name))
        try:
            while start < end and (text := read_final_text(fd, start, end)):
                good, bad = self._classify(text, start)
                parts += good
                damaged += bad
                start += len(text)
        finally:
            os.close(fd)
        if start < end:
            number_ranges.add(self.done, start, end)  # the rest is zeros
        return parts, damaged

    def _classify(self, text: bytes, start: int) -> tuple[list[Slice], list[Line]]:
        """Return the events and the damaged lines of *text*, read at *start*."""
        parts: list[Slice] = []
        damaged: list[Line] = []
        for block in _blocks(text):
            part = self._valid_slice(block, start)
            if part is None:
                self._classify_lines(split_lines(block, start), parts, damaged)
            elif part.events:
                parts.append(part)
            else:
                number_ranges.add(self.done, part.start, part.end)  # empty lines
            start += len(block)
        return parts, damaged

    def _valid_slice(self, text: bytes, start: int) -> Slice | None:
        """Return *text* as a slice, None if a line may not be an event."""
        if not text.endswith(b"\n"):
            return None
        if self.adopted or self.name.form == WRITTEN:
            lines = text.split(b"\n")
            events = len(lines) - lines.count(b"")
            sparse = events + 1 < len(lines)
            valid = are_events(text, events)
        else:
            # A live owner copies a whole line or none, and never an empty line.
            valid, sparse = b"\0" not in text, False
            # Several times as fast as count().
            events = len(text) - len(text.replace(b"\n", b""))
        return Slice(self.key, text, start, events, sparse) if valid else None

    def _classify_lines(
        self, lines: Iterator[Line], parts: list[Slice], damaged: list[Line]
    ) -> None:
        """Add each line to the events or to the damaged lines."""
        for text, start, end in lines:
            whole = end - start > len(text)  # it ends with a newline
            if whole and not text:
                number_ranges.add(self.done, start, end)
            elif whole and is_event(text):
                parts.append(Slice(self.key, text + b"\n", start, 1, sparse=False))
            else:
                damaged.append(Line(text, start, end))

    def _read_text(self, fd: int) -> tuple[int, bytes]:
        """Read the next bytes; return their offset and the bytes."""
        limit = self._skip_ranges()
        start = self.offset
        # Before the read: a segment that is final now has all its lines.
        final = self.is_final
        text = (read_final_text if final else read_live_text)(fd, start, limit)
        self.offset += len(text)
        if not text and final and limit is None:
            self.at_end = True
        elif not text and final and limit is not None:
            # Only zeros before the next skipped range.
            number_ranges.add(self.done, start, limit)
            self.offset = limit
        return start, text

    def _skip_ranges(self) -> int | None:
        """Move the offset past a skipped range; return the start of the next one."""
        for start, end in self._skipped:
            if start <= self.offset < end:
                self.offset = end
            elif start > self.offset:
                return start
        return None


def next_segments(
    segments: Mapping[str, SegmentReader], *, exclude: Container[str]
) -> list[SegmentReader]:
    """Return each owner's next segment to read, the oldest first.

    Owners in *exclude* are left out.
    """
    heads: dict[str, SegmentReader] = {}
    for segment in segments.values():
        name = segment.name
        if not segment.at_end and name.owner not in exclude:
            head = heads.get(name.owner)
            if head is None or head.name.number > name.number:
                heads[name.owner] = segment
    return sorted(heads.values(), key=lambda segment: segment.name)


def _blocks(text: bytes) -> Iterator[bytes]:
    """Yield *text* in blocks of whole lines, of about `_BLOCK_BYTES` if possible."""
    at = 0
    while len(text) - at > _BLOCK_BYTES:
        newline = text.rfind(b"\n", at, at + _BLOCK_BYTES)
        if newline < 0:
            newline = text.find(b"\n", at + _BLOCK_BYTES)
        if newline < 0:
            break
        yield text[at : newline + 1]
        at = newline + 1
    if at < len(text):
        yield text[at:]


#: Seconds without growth after which a segment whose owner has no lock is adopted.
LOCKLESS_TIME = 3_600.0
#: Minimum number of seconds between two checks of the owners' locks.
LIVENESS_INTERVAL = 0.5


class Liveness:
    """The owners that have died.

    `update` deletes their lock files, and the files that they were just making (named
    ``*.new``), which hold no event yet. Their segments are adopted by the reader.

    Only the elected sender uses it. If two processes tried a lock at the same time,
    each would mistake the other for its living owner.
    """

    def __init__(self, directory: Path) -> None:
        self._dead: set[str] = set()
        self._directory = directory
        self._due_at = 0.0
        #: Owners without a lock file: a cleaner may have deleted it.
        self._without_lock: set[str] = set()
        #: The number of bytes read of their segments, and the time of the last change.
        self._last_growth: dict[str, tuple[int, float]] = {}

    def force_next(self) -> None:
        """Make the next `update` run even within the interval."""
        self._due_at = 0.0

    def update(self, entries: Iterable[str], names: Iterable[SegmentName]) -> None:
        """Find the owners that have died; *entries* are the files of the directory."""
        now = monotonic()
        if now < self._due_at:
            return
        self._due_at = now + LIVENESS_INTERVAL
        owners = {name.owner for name in names}
        # The owner of a free lock is dead. A missing lock proves nothing.
        self._without_lock = {o for o in owners if not is_there(self._directory, o)}
        unknown = owners - self._dead - self._without_lock
        alive = {owner for owner in unknown if is_alive(self._directory, owner)}
        self._dead = (owners - alive - self._without_lock) | (self._dead & owners)
        for name in names:
            if name.being_made and name.owner in self._dead:
                (self._directory / str(name)).unlink(missing_ok=True)
        for entry in entries:
            owner = owner_of_lock(entry)
            if owner is not None and owner not in owners:
                remove_lock(self._directory / entry)

    def is_abandoned(self, segment: SegmentReader) -> bool:
        """Return True if the owner of a segment has died, or seems so.

        An owner without a lock file may be alive. Its segment counts as abandoned if it
        has not grown for an hour.
        """
        owner = segment.name.owner
        if owner not in self._without_lock:
            self._last_growth.pop(segment.key, None)
            return owner in self._dead
        now = monotonic()
        offset, since = self._last_growth.get(segment.key, (-1, now))
        if offset != segment.offset:
            since = now
        self._last_growth[segment.key] = (segment.offset, since)
        return now - since >= LOCKLESS_TIME

    def has_died(self, owner: str) -> bool:
        """Return True if the process of an owner is known to have ended."""
        return owner in self._dead
