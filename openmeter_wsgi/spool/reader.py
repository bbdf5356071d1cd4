"""The read side of a spool: the elected sender's view of all segments.

It reads live segments too, up to the last whole line, so what an idle process put
leaves although no thread of that process runs.
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
    final_text,
    is_event,
    live_text,
    open_file,
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

#: While enough is known to be sent, the directory is not looked at more often.
_SCAN_INTERVAL = 0.1
#: Seconds until an unreadable place is tried again.
_READ_AGAIN = 1.0
#: So many deletions are brought on the disk together.
_DELETIONS = 16


class SpoolReader:
    """The segments of a directory as a source of batches.

    Belongs to the elected sender; a new one is made with every election. It reads
    ahead as much as a batch of *max_events* may hold.
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
        self._readings: dict[str, SegmentReader] = {}
        #: The lines of deleted segments, all done: a loss of power may bring a segment
        #: back until the directory is on the disk.
        self._deleted: dict[str, Ranges] = {}
        self._names: dict[str, SegmentName] = {}
        #: The segment of each owner that is read next, and the owners that have no more
        #: until the next look.
        self._heads: list[SegmentReader] = []
        self._exhausted: set[str] = set()
        self._waiting: deque[Slice] = deque()
        self._waiting_events = 0
        self._waiting_bytes = 0
        #: Batches in flight when the last sender died: each goes again, alone.
        self._again: deque[SpoolBatch] = deque()
        #: The places of events that were handed out and are not to be sent yet. They
        #: are read once more when they are due, or by the next sender.
        self._delayed: Delayed[list[ByteRange]] = Delayed()
        self._in_flight = InFlight()
        #: Whether there is progress that the disk did not take.
        self._unsaved = False
        self._liveness = Liveness(directory)
        self._loaded = progress.recover(directory)
        self._file = ProgressFile(directory, self._loaded.number)
        self._scan()
        self._load_in_flight()

    def __len__(self) -> int:
        """Return the number of events that are read and not taken."""
        return self._waiting_events + sum(map(len, self._again))

    @property
    def segments(self) -> int:
        """The number of segments that are not delivered yet, those in use included."""
        return len(self._readings)

    @property
    def has_full_batch(self) -> bool:
        """True if a batch can be filled with what was read."""
        return (
            self._waiting_events >= self._max_events
            or self._waiting_bytes >= MAX_BATCH_BYTES
        )

    def refresh(self, *, everything: bool = False) -> None:
        """Look for new segments, lines and deaths; with *everything* for every one."""
        if everything:
            self._liveness.look_now_next()
        due = everything or monotonic() >= self._scan_at
        if due:
            self._scan()
        self._fill()
        if not due and not self.has_full_batch:
            due = True
            self._scan()
            self._fill()
        if self._unsaved:
            self._save(lasting=True)
        if due:
            self._forget_done(list(self._readings.values()))

    def close(self) -> None:
        """Close what is open. The directory stays as it is."""
        self._file.close()

    def take(self, *, max_events: int, max_bytes: int) -> SpoolBatch:
        """Return the oldest events, as many as one batch may hold.

        What was delayed and is due now comes before them, as the batch that it was.
        """
        if (places := self._delayed.take_due()) is not None and (
            batch := self._delayed_batch(places)
        ):
            return batch
        self._fill()
        if self._again:
            return self._again.popleft()
        parts = take_from(self._waiting, max_events=max_events, max_bytes=max_bytes)
        self._waiting_events -= sum(part.events for part in parts)
        self._waiting_bytes -= sum(part.size for part in parts)
        return SpoolBatch(parts)

    def done(self, batch: SpoolBatch) -> None:
        """Remember, for good, that *batch* is delivered or set aside."""
        self._in_flight.forget(batch.runs)
        found = (self._readings.get(run.key) for run in batch.runs)
        touched = {reading.key: reading for reading in found if reading}
        for key, start, end in batch.runs:
            if key in touched:
                number_ranges.add(touched[key].done, start, end)
        # Not synced here: the next `record` syncs it. After a crash before that, the
        # disk shows this batch alone as in flight.
        self._save(lasting=False)
        self._forget_done(touched.values())

    # -- Delay

    def delay(self, batch: SpoolBatch, seconds: float) -> None:
        """Hand out *batch*, which was taken, once more after so many seconds."""
        self._delayed.add(batch.runs, seconds)

    @property
    def due_in(self) -> float | None:
        """The seconds until delayed events are due, None if there are none."""
        return self._delayed.due_in

    def _delayed_batch(self, places: list[ByteRange]) -> SpoolBatch | None:
        try:
            parts = [part for place in places for part in self._read_place(place)]
        except OSError:
            self._delayed.add(places, _READ_AGAIN)  # being renamed, it may be
            return None
        return SpoolBatch(parts) if parts else None

    def _read_place(self, place: ByteRange) -> list[Slice]:
        """Return the content of a place that was read before.

        :raises OSError: if the segment cannot be read.
        """
        if (reading := self._readings.get(place.key)) is None:
            return []
        parts, damaged = reading.read_range(place.start, place.end)
        self._set_aside(reading, damaged)
        return parts

    # -- In flight

    def in_flight_since(self, batch: SpoolBatch) -> float | None:
        """Return the time of the first attempt that may have arrived, or None."""
        return self._in_flight.since(batch.runs)

    def record(self, batch: SpoolBatch, since: float) -> None:
        """Write down that *batch* is about to be sent."""
        self._in_flight.add(batch.runs, since)
        self._save(lasting=True)

    def withdraw(self, batch: SpoolBatch) -> None:
        """Write down that *batch* has certainly not arrived."""
        self._in_flight.forget(batch.runs)
        self._save(lasting=True)

    def check(self) -> None:
        """Go on only as the sender.

        :raises Deposed: if another one has taken its place.
        """
        with self._in_office():
            pass

    # -- Progress

    def _load_in_flight(self) -> None:
        for in_flight in self._loaded.in_flight:
            places = [
                ByteRange(key, start, end)
                for key, ranges_ in in_flight.lines.items()
                for start, end in ranges_
            ]
            if parts := [part for place in places for part in self._read_place(place)]:
                batch = SpoolBatch(parts)
                self._in_flight.add(batch.runs, in_flight.since)
                self._again.append(batch)

    def _set_aside(self, reading: SegmentReader, damaged: list[Line]) -> None:
        for line in damaged:
            self._letters.set_aside(line.text, reading.name.key, line.start)
            number_ranges.add(reading.done, line.start, line.end)

    def _save(self, *, lasting: bool) -> None:
        done = {key: r.done for key, r in self._readings.items() if r.done}
        done.update(self._deleted)
        try:
            with self._in_office():
                self._file.save(Progress(done, self._in_flight.known), lasting=lasting)
            self._unsaved = False
        except OSError as error:
            # Sending on is what makes room on a full disk.
            self._unsaved = True
            logger.error(
                "%s: progress cannot be written; after a crash several batches may be "
                "sent twice under the same ids",
                error,
            )

    @contextlib.contextmanager
    def _in_office(self) -> Iterator[None]:
        """Write only as long as no other can be the sender.

        :raises Deposed: if another thread has given the election up.
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
        """Find the segments, and the owners that have died."""
        self._scan_at = monotonic() + _SCAN_INTERVAL
        entries = sorted(os.listdir(self._directory))
        names = {e: n for e in entries if (n := self._names.get(e) or read_name(e))}
        self._names = names
        self._liveness.look(entries, names.values())
        found = {name.key: name for name in names.values() if not name.unfinished}
        for key in self._readings.keys() - found.keys():
            del self._readings[key]
        for key, name in found.items():
            reading = self._readings.get(key)
            if reading is None:
                done = self._loaded.done.get(key, [])
                reading = self._readings[key] = SegmentReader(
                    self._directory, name, done
                )
            reading.name = name
            adopted = self._liveness.is_dead(name.owner, reading)
            if adopted and not reading.adopted and self._liveness.has_died(name.owner):
                self._truncate_unused(name)
            reading.adopted = adopted
        self._heads, self._exhausted = [], set()

    def _fill(self) -> None:
        """Read ahead. An owner's next segment is read when its last is at its end."""
        while not self.has_full_batch:
            if not self._heads or self._heads[0].at_end:
                self._heads = first_of_each(self._readings, but=self._exhausted)
            if not self._heads:
                return
            if not self._read(self._heads[0]):
                self._exhausted.add(self._heads.pop(0).name.owner)

    def _read(self, reading: SegmentReader) -> bool:
        """Read on in a segment and say whether its owner may have more."""
        before = reading.offset
        try:
            parts, damaged = reading.read()
        except FileNotFoundError:
            return False  # sealed at this moment; the next scan finds it
        except OSError as error:
            logger.error(
                "%s: cannot be read (%s); its events wait until it can be",
                reading.name.key, error,
            )  # fmt: skip
            return False
        self._set_aside(reading, damaged)
        for part in parts:
            self._waiting.append(part)
            self._waiting_events += part.events
            self._waiting_bytes += part.size
        return reading.at_end or reading.offset > before

    def _truncate_unused(self, name: SegmentName) -> None:
        """Cut the unused end off a dead owner's segment, which no process maps."""
        path = self._directory / str(name)
        with contextlib.suppress(OSError), self._in_office():
            fd = open_file(path, os.O_RDWR)
            try:
                os.ftruncate(fd, used_end(fd))
            finally:
                os.close(fd)

    def _forget_done(self, readings: Iterable[SegmentReader]) -> None:
        """Delete those segments of which nothing is left to do."""
        for reading in readings:
            if reading.is_final and reading.is_done:
                with self._in_office():
                    self._delete(reading)
                self._readings.pop(reading.key, None)
                self._deleted[reading.key] = reading.done
        if len(self._deleted) >= _DELETIONS:
            with contextlib.suppress(OSError):
                progress.sync_directory(self._directory)
                self._deleted.clear()

    def _delete(self, reading: SegmentReader) -> None:
        path = self._directory / str(reading.name)
        with contextlib.suppress(FileNotFoundError):
            # The mode tells an owner that has it open: delivered, not lost.
            path.chmod(DELIVERED)
            path.unlink()


#: So much is looked at by one call: each keeps all other threads waiting.
_BLOCK_BYTES = 32 * 1024


class SegmentReader:
    """The lines of one segment, each handed out once.

    Belongs to the sender. *done* is what an earlier sender delivered of it.
    """

    __slots__ = (
        "_directory",
        "_taken",
        "adopted",
        "at_end",
        "done",
        "key",
        "name",
        "offset",
    )

    def __init__(self, directory: Path, name: SegmentName, done: Ranges) -> None:
        self.name: SegmentName = name
        self.key: str = name.key
        self.done: Ranges = done
        #: Nobody owns it any more, and a crash may have damaged it.
        self.adopted: bool = False
        #: All that will ever be in it was read.
        self.at_end: bool = False
        self._directory = directory
        #: The end of the part that was read, in bytes.
        self.offset: int = 0
        #: Ranges that `read` skips: done, or loaded as in flight.
        self._taken: Ranges = list(done)

    @property
    def is_final(self) -> bool:
        """True if nobody writes into it any more."""
        return self.name.sealed or self.adopted

    @property
    def is_done(self) -> bool:
        """True if all that was read of it is delivered or set aside."""
        if not self.at_end:
            return False
        return not self.offset or self.done == [(0, self.offset)]

    def read(self) -> tuple[list[Slice], list[Line]]:
        """Return the next lines, and what should be an event and is not.

        Both are empty where there is nothing to read now.

        :raises OSError: if it cannot be read, e.g. because it was just renamed.
        """
        fd = open_file(self._directory / str(self.name))
        try:
            start, text = self._read_on(fd)
        finally:
            os.close(fd)
        return self._classified(text, start)

    def read_range(self, start: int, end: int) -> tuple[list[Slice], list[Line]]:
        """Return what is in a range that was handed out before a crash, as `read`."""
        number_ranges.add(self._taken, start, end)
        parts: list[Slice] = []
        damaged: list[Line] = []
        fd = open_file(self._directory / str(self.name))
        try:
            while start < end and (text := final_text(fd, start, end)):
                good, bad = self._classified(text, start)
                parts += good
                damaged += bad
                start += len(text)
        finally:
            os.close(fd)
        if start < end:
            number_ranges.add(self.done, start, end)  # zeros
        return parts, damaged

    def _classified(self, text: bytes, start: int) -> tuple[list[Slice], list[Line]]:
        parts: list[Slice] = []
        damaged: list[Line] = []
        for block in _blocks(text):
            part = self._part(block, start)
            if part is None:
                self._classify_lines(split_lines(block, start), parts, damaged)
            elif part.events:
                parts.append(part)
            else:
                number_ranges.add(self.done, part.start, part.end)  # empty lines
            start += len(block)
        return parts, damaged

    def _part(self, text: bytes, start: int) -> Slice | None:
        """Return what was read at *start*, None if each line must be looked at."""
        if not text.endswith(b"\n"):
            return None
        if self.adopted or self.name.form == WRITTEN:
            lines = text.split(b"\n")
            events = len(lines) - lines.count(b"")
            sparse = events + 1 < len(lines)
            good = are_events(text, events)
        else:
            # Copied by one who lives: all of it or nothing, and never an empty line.
            good, sparse = b"\0" not in text, False
            # Several times as fast as count().
            events = len(text) - len(text.replace(b"\n", b""))
        return Slice(self.key, text, start, events, sparse) if good else None

    def _classify_lines(
        self, found: Iterator[Line], parts: list[Slice], damaged: list[Line]
    ) -> None:
        """Add each line to the events or to the damaged lines."""
        for text, start, end in found:
            whole = end - start > len(text)
            if whole and not text:
                number_ranges.add(self.done, start, end)
            elif whole and is_event(text):
                parts.append(Slice(self.key, text + b"\n", start, 1, sparse=False))
            else:
                damaged.append(Line(text, start, end))

    def _read_on(self, fd: int) -> tuple[int, bytes]:
        """Read on from where the last call ended; return from where, and what."""
        limit = self._skip_taken()
        start = self.offset
        # Before the bytes: what is sealed or adopted now has been written.
        final = self.is_final
        text = (final_text if final else live_text)(fd, start, limit)
        self.offset += len(text)
        if not text and final and limit is None:
            self.at_end = True
        elif not text and final and limit is not None:
            # A hole before what was done: there is nothing in it.
            number_ranges.add(self.done, start, limit)
            self.offset = limit
        return start, text

    def _skip_taken(self) -> int | None:
        """Go past what was taken; return where the next such range begins."""
        for start, end in self._taken:
            if start <= self.offset < end:
                self.offset = end
            elif start > self.offset:
                return start
        return None


def first_of_each(
    readings: Mapping[str, SegmentReader], *, but: Container[str]
) -> list[SegmentReader]:
    """Return of each owner, *but* some, what is read next, the oldest first."""
    heads: dict[str, SegmentReader] = {}
    for reading in readings.values():
        name = reading.name
        if not reading.at_end and name.owner not in but:
            head = heads.get(name.owner)
            if head is None or head.name.number > name.number:
                heads[name.owner] = reading
    return sorted(heads.values(), key=lambda reading: reading.name)


def _blocks(text: bytes) -> Iterator[bytes]:
    """Cut *text* after newlines, so that no block is long without need."""
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


#: A segment without a lock is taken for a dead owner's after so many seconds.
LOCKLESS_TIME = 3_600.0
#: Seconds between two looks at the owners' locks.
LIVENESS_INTERVAL = 0.5


class Liveness:
    """Knows which owners have died, and deletes their unfinished segments and locks.

    Only the elected sender uses it: of two processes that test one lock at a time,
    each would think that its owner is alive.
    """

    def __init__(self, directory: Path) -> None:
        self.dead: set[str] = set()
        self._directory = directory
        self._due_at = 0.0
        #: Owners whose lock file somebody has deleted.
        self._lockless: set[str] = set()
        #: The end of the part of their segments that was read, and since when.
        self._still: dict[str, tuple[int, float]] = {}

    def look_now_next(self) -> None:
        """Make the next `look` run without waiting for its time."""
        self._due_at = 0.0

    def look(self, entries: Iterable[str], names: Iterable[SegmentName]) -> None:
        """Find the owners that have died; *entries* is the content of the directory."""
        now = monotonic()
        if now < self._due_at:
            return
        self._due_at = now + LIVENESS_INTERVAL
        owners = {name.owner for name in names}
        # A free lock means that its owner is dead. A missing one proves nothing.
        self._lockless = {o for o in owners if not is_there(self._directory, o)}
        unknown = owners - self.dead - self._lockless
        alive = {owner for owner in unknown if self._is_alive(owner)}
        self.dead = (owners - alive - self._lockless) | (self.dead & owners)
        for name in names:
            if name.unfinished and name.owner in self.dead:
                (self._directory / str(name)).unlink(missing_ok=True)
        for entry in entries:
            owner = owner_of_lock(entry)
            if owner is not None and owner not in owners:
                remove_lock(self._directory / entry)

    def is_dead(self, owner: str, reading: SegmentReader) -> bool:
        """Return True if nobody writes into a segment any more.

        An owner without a lock file may be alive. It is taken for dead if the segment
        has not grown for an hour.
        """
        if owner not in self._lockless:
            self._still.pop(reading.key, None)
            return owner in self.dead
        now = monotonic()
        offset, since = self._still.get(reading.key, (-1, now))
        if offset != reading.offset:
            since = now
        self._still[reading.key] = (reading.offset, since)
        return now - since >= LOCKLESS_TIME

    def has_died(self, owner: str) -> bool:
        """Return True if an owner's process is known to have ended."""
        return owner in self.dead

    def _is_alive(self, owner: str) -> bool:
        return is_alive(self._directory, owner)
