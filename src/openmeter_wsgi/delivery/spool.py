"""The read side of a spool: the elected sender's view of all segments.

It reads live segments too, up to the last whole line, so what an idle process put
leaves although no thread of that process runs.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from time import monotonic as now
from typing import TYPE_CHECKING

from openmeter_wsgi import log
from openmeter_wsgi.delivery import progress, ranges
from openmeter_wsgi.delivery.delayed import Delayed
from openmeter_wsgi.delivery.doubts import Doubts
from openmeter_wsgi.delivery.part import Part, Run, SpoolBatch, take_from
from openmeter_wsgi.delivery.progress import Progress, ProgressFile
from openmeter_wsgi.delivery.reading import Reading, first_of_each
from openmeter_wsgi.delivery.roll_call import RollCall
from openmeter_wsgi.delivery.segment import Piece, SegmentName, read_name
from openmeter_wsgi.events import MAX_BATCH_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from openmeter_wsgi.delivery.dead_letters import DeadLetters
    from openmeter_wsgi.delivery.ranges import Ranges

logger = log.get_logger(__name__)

#: While enough is known to be sent, the directory is not looked at more often.
_SCAN_INTERVAL = 0.1
#: What cannot be read now is tried again after as many seconds.
_READ_AGAIN = 1.0
#: So many deletions are brought on the disk together.
_DELETIONS = 16


class Spool:
    """The segments of a directory as a source of batches.

    Belongs to the elected sender; a new one is made with every election. It reads
    ahead as much as a batch of *max_events* may hold.
    """

    def __init__(
        self, directory: Path, letters: DeadLetters, *, max_events: int = 1_000
    ) -> None:
        self._directory = directory
        self._max_events = max_events
        self._letters = letters
        self._readings: dict[str, Reading] = {}
        #: What was done of deleted segments, all of it: a loss of power may bring one
        #: back until the directory is on the disk without it.
        self._deleted: dict[str, Ranges] = {}
        self._names: dict[str, SegmentName] = {}
        #: What is read next of each owner, and who has no more until the next look.
        self._heads: list[Reading] = []
        self._exhausted: set[str] = set()
        self._waiting: deque[Part] = deque()
        self._waiting_events = 0
        self._waiting_bytes = 0
        #: Batches in doubt when the last sender died: each goes again, alone.
        self._again: deque[SpoolBatch] = deque()
        #: Where events are that were handed out, and are not to be sent yet. They are
        #: read once more when they are due, or by the next sender.
        self._delayed: Delayed[list[Run]] = Delayed()
        self._doubts = Doubts()
        #: Whether there is progress that the disk did not take.
        self._unsaved = False
        self._roll = RollCall(directory)
        self._loaded = progress.recover(directory)
        self._file = ProgressFile(directory, self._loaded.number)
        self._scan()
        self._load_doubts()

    def __len__(self) -> int:
        """Return how many events are read and not taken."""
        return self._waiting_events + sum(map(len, self._again))

    @property
    def segments(self) -> int:
        """How many segments are not delivered yet, those in use included."""
        return len(self._readings)

    @property
    def is_full(self) -> bool:
        """Whether a batch can be filled with what was read."""
        return (
            self._waiting_events >= self._max_events
            or self._waiting_bytes >= MAX_BATCH_BYTES
        )

    def refresh(self, *, last: bool = False) -> None:
        """Look for new segments, lines and deaths; with *last* for every one."""
        if last:
            self._roll.due()
        due = last or now() >= self._scan_at
        if due:
            self._scan()
        self._fill()
        if not due and not self.is_full:
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
        if (runs := self._delayed.take_due()) is not None and (
            batch := self._delayed_batch(runs)
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
        self._doubts.forget(batch.runs)
        found = (self._readings.get(run.key) for run in batch.runs)
        touched = {reading.key: reading for reading in found if reading}
        for key, start, end in batch.runs:
            if key in touched:
                ranges.add(touched[key].done, start, end)
        # The doubt about the next batch brings it on the disk. Until then this one is
        # still in doubt there, and no other is.
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

    def _delayed_batch(self, runs: list[Run]) -> SpoolBatch | None:
        try:
            parts = [part for run in runs for part in self._read_run(run)]
        except OSError:
            self._delayed.add(runs, _READ_AGAIN)  # being renamed, it may be
            return None
        return SpoolBatch(parts) if parts else None

    def _read_run(self, run: Run) -> list[Part]:
        """Return what is in a place that was read before.

        :raises OSError: if the segment cannot be read.
        """
        if (reading := self._readings.get(run.key)) is None:
            return []
        parts, damaged = reading.read_range(run.start, run.end)
        self._set_aside(reading, damaged)
        return parts

    # -- Doubt

    def in_doubt_since(self, batch: SpoolBatch) -> float | None:
        """Return when the first attempt was that may have arrived, None if none."""
        return self._doubts.since(batch.runs)

    def doubt(self, batch: SpoolBatch, since: float) -> None:
        """Write down that *batch* is about to be sent."""
        self._doubts.add(batch.runs, since)
        self._save(lasting=True)

    def trust(self, batch: SpoolBatch) -> None:
        """Write down that *batch* has certainly not arrived."""
        self._doubts.forget(batch.runs)
        self._save(lasting=True)

    # -- Progress

    def _load_doubts(self) -> None:
        for doubt in self._loaded.doubts:
            runs = [
                Run(key, start, end)
                for key, places in doubt.lines.items()
                for start, end in places
            ]
            if parts := [part for run in runs for part in self._read_run(run)]:
                batch = SpoolBatch(parts)
                self._doubts.add(batch.runs, doubt.since)
                self._again.append(batch)

    def _set_aside(self, reading: Reading, damaged: list[Piece]) -> None:
        for piece in damaged:
            self._letters.set_aside(piece.text, reading.name.key, piece.start)
            ranges.add(reading.done, piece.start, piece.end)

    def _save(self, *, lasting: bool) -> None:
        done = {key: r.done for key, r in self._readings.items() if r.done}
        done.update(self._deleted)
        try:
            self._file.save(Progress(done, self._doubts.known), lasting=lasting)
            self._unsaved = False
        except OSError as error:
            # Sending on is what makes room on a full disk.
            self._unsaved = True
            logger.error(
                "%s: progress cannot be written; after a crash more than one batch "
                "would be sent twice",
                error,
            )

    # -- Segments

    def _scan(self) -> None:
        """Look what segments there are, and who of their owners lives."""
        self._scan_at = now() + _SCAN_INTERVAL
        entries = sorted(os.listdir(self._directory))
        names = {e: n for e in entries if (n := self._names.get(e) or read_name(e))}
        self._names = names
        self._roll.call(entries, names.values())
        found = {name.key: name for name in names.values() if not name.unfinished}
        for key in self._readings.keys() - found.keys():
            del self._readings[key]
        for key, name in found.items():
            reading = self._readings.get(key)
            if reading is None:
                done = self._loaded.done.get(key, [])
                reading = self._readings[key] = Reading(self._directory, name, done)
            reading.name = name
            reading.adopted = name.owner in self._roll.dead
        self._heads, self._exhausted = [], set()

    def _fill(self) -> None:
        """Read ahead. An owner's next segment is read when its last is at its end."""
        while not self.is_full:
            if not self._heads or self._heads[0].at_end:
                self._heads = first_of_each(self._readings, but=self._exhausted)
            if not self._heads:
                return
            if not self._read(self._heads[0]):
                self._exhausted.add(self._heads.pop(0).name.owner)

    def _read(self, reading: Reading) -> bool:
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

    def _forget_done(self, readings: Iterable[Reading]) -> None:
        """Delete those segments of which nothing is left to do."""
        for reading in readings:
            if reading.is_final and reading.is_done:
                (self._directory / str(reading.name)).unlink(missing_ok=True)
                self._readings.pop(reading.key, None)
                self._deleted[reading.key] = reading.done
        if len(self._deleted) >= _DELETIONS:
            with contextlib.suppress(OSError):
                progress.sync_directory(self._directory)
                self._deleted.clear()
