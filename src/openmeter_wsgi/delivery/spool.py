"""The read side of a spool: the elected sender's view of all segments.

It reads live segments too, up to the last whole line, so what an idle process put
leaves although no thread of that process runs.
"""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING

from openmeter_wsgi import log
from openmeter_wsgi.delivery import progress
from openmeter_wsgi.delivery.progress import Doubt, Progress
from openmeter_wsgi.delivery.reading import Place, Reading, runs
from openmeter_wsgi.delivery.roll_call import RollCall
from openmeter_wsgi.delivery.segment import Piece, read_name
from openmeter_wsgi.events import MAX_BATCH_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from openmeter_wsgi.delivery.dead_letters import DeadLetters

logger = log.get_logger(__name__)


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
        self._waiting: deque[tuple[bytes, Place]] = deque()
        self._waiting_bytes = 0
        #: Batches in doubt when the last sender died: each goes again, alone.
        self._again: deque[list[bytes]] = deque()
        #: Where the events come from that are being sent, by their object's id.
        self._places: dict[int, Place] = {}
        self._since: dict[int, float] = {}
        #: Whether there is progress that the disk did not take.
        self._unsaved = False
        self._roll = RollCall(directory)
        self._loaded = progress.recover(directory)
        self._scan()
        self._load_doubts()

    def __len__(self) -> int:
        """Return how many events are read and not taken."""
        return len(self._waiting) + sum(map(len, self._again))

    @property
    def is_full(self) -> bool:
        """Whether a batch can be filled with what was read."""
        return (
            len(self._waiting) >= self._max_events
            or self._waiting_bytes >= MAX_BATCH_BYTES
        )

    def refresh(self, *, last: bool = False) -> None:
        """Look for new segments, lines and deaths; with *last* for every one."""
        if last:
            self._roll.due()
        self._scan()
        self._fill()
        if self._unsaved:
            self._save()
        self._forget_done()

    def take(self, *, max_events: int, max_bytes: int) -> list[bytes]:
        """Return the oldest events, as many as one batch may hold."""
        if self._again:
            return self._again.popleft()
        self._fill()
        batch: list[bytes] = []
        size = 0
        while self._waiting and len(batch) < max_events:
            event, place = self._waiting[0]
            size += len(event)
            if batch and size > max_bytes:
                break
            self._waiting.popleft()
            self._waiting_bytes -= len(event)
            self._places[id(event)] = place
            batch.append(event)
        return batch

    def done(self, events: list[bytes]) -> None:
        """Remember, for good, that *events* are delivered or set aside."""
        for event in events:
            self._since.pop(id(event), None)
        places = [self._places.pop(id(event)) for event in events]
        for reading, start, end in runs(places):
            progress.add(reading.done, start, end)
        self._save()
        self._forget_done()

    # -- Doubt

    def in_doubt_since(self, events: list[bytes]) -> float | None:
        """Return when the first attempt was that may have arrived, None if none."""
        times = [self._since[id(event)] for event in events if id(event) in self._since]
        return min(times, default=None)

    def doubt(self, events: list[bytes], since: float) -> None:
        """Write down that *events* are about to be sent."""
        for event in events:
            self._since[id(event)] = since
        self._save()

    def trust(self, events: list[bytes]) -> None:
        """Write down that *events* have certainly not arrived."""
        for event in events:
            self._since.pop(id(event), None)
        self._save()

    # -- Progress

    def _load_doubts(self) -> None:
        for doubt in self._loaded.doubts:
            batch: list[bytes] = []
            for key, ranges in doubt.lines.items():
                if (reading := self._readings.get(key)) is None:
                    continue
                for start, end in ranges:
                    events, damaged = reading.read_range(start, end)
                    self._set_aside(reading, damaged)
                    batch += [self._placed(piece, reading) for piece in events]
            for event in batch:
                self._since[id(event)] = doubt.since
            if batch:
                self._again.append(batch)

    def _placed(self, piece: Piece, reading: Reading) -> bytes:
        self._places[id(piece.text)] = Place(reading, piece.start, piece.end)
        return piece.text

    def _set_aside(self, reading: Reading, damaged: list[Piece]) -> None:
        for piece in damaged:
            self._letters.set_aside(piece.text, reading.name.key, piece.start)
            progress.add(reading.done, piece.start, piece.end)

    def _save(self) -> None:
        done = {key: r.done for key, r in self._readings.items() if r.done}
        doubts = {since: Doubt(since, {}) for since in set(self._since.values())}
        for since, doubt in doubts.items():
            places = [self._places[e] for e, of in self._since.items() if of == since]
            for reading, start, end in runs(places):
                ranges = doubt.lines.setdefault(reading.name.key, [])
                progress.add(ranges, start, end)
        try:
            progress.save(self._directory, Progress(done, list(doubts.values())))
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
        entries = sorted(os.listdir(self._directory))
        names = [name for entry in entries if (name := read_name(entry))]
        self._roll.call(entries, names)
        found = {name.key: name for name in names if not name.unfinished}
        for key in self._readings.keys() - found.keys():
            del self._readings[key]
        for key, name in found.items():
            reading = self._readings.get(key)
            if reading is None:
                done = self._loaded.done.get(key, [])
                reading = self._readings[key] = Reading(self._directory, name, done)
            reading.name = name
            reading.adopted = name.owner in self._roll.dead

    def _heads(self) -> list[Reading]:
        """Return of each owner the segment that is read next, the oldest first."""
        heads: dict[str, Reading] = {}
        for reading in self._readings.values():
            name = reading.name
            head = heads.get(name.owner)
            if not reading.at_end and (head is None or head.name.number > name.number):
                heads[name.owner] = reading
        return sorted(heads.values(), key=lambda reading: reading.name)

    def _fill(self) -> None:
        """Read ahead. An owner's next segment is read when its last is at its end."""
        exhausted: set[str] = set()
        while not self.is_full:
            heads = [r for r in self._heads() if r.name.owner not in exhausted]
            if not heads:
                return
            if not self._read(heads[0]):
                exhausted.add(heads[0].name.owner)

    def _read(self, reading: Reading) -> bool:
        """Read on in a segment and say whether its owner may have more."""
        before = reading.offset
        try:
            events, damaged = reading.read()
        except FileNotFoundError:
            return False  # sealed at this moment; the next scan finds it
        except OSError as error:
            logger.error(
                "%s: cannot be read (%s); its events wait until it can be",
                reading.name.key, error,
            )  # fmt: skip
            return False
        self._set_aside(reading, damaged)
        for piece in events:
            place = Place(reading, piece.start, piece.end)
            self._waiting.append((piece.text, place))
            self._waiting_bytes += len(piece.text)
        return reading.at_end or reading.offset > before

    def _forget_done(self) -> None:
        """Delete the segments of which nothing is left to do."""
        for key, reading in list(self._readings.items()):
            if reading.is_final and reading.is_done:
                (self._directory / str(reading.name)).unlink(missing_ok=True)
                del self._readings[key]
