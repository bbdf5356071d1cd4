"""What a spool holds, read beside its sender: nothing here writes or locks."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, NamedTuple

from openmeter_wsgi.commands.locks import holder
from openmeter_wsgi.lock import ELECTION, LOCK
from openmeter_wsgi.spool import progress
from openmeter_wsgi.spool.files import (
    Line,
    SegmentName,
    is_event,
    open_file,
    read_final,
    read_live,
    read_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from openmeter_wsgi.delivery.ranges import Ranges
    from openmeter_wsgi.spool.progress import Progress


class Segment(NamedTuple):
    """One file of events, and what is known of its owner."""

    name: SegmentName
    bytes: int
    alive: bool


class Census:
    """The segments of a directory at one moment, and how far they are delivered.

    The sender goes on meanwhile: what it delivers and deletes is simply not there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # In this order: what is delivered later is then still counted, and never
        # is something counted as delivered that is not.
        self.progress: Progress = progress.load(directory) or progress.Progress()
        self.segments = list(self._find())

    @property
    def sender(self) -> int | None:
        """The process id of the sender, None if there is none."""
        return holder(self._directory / ELECTION)

    def waiting(self, segment: Segment) -> Iterator[bytes]:
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

    def _find(self) -> Iterator[Segment]:
        names = [n for n in map(read_name, os.listdir(self._directory)) if n]
        alive = {
            owner: holder(self._directory / (owner + LOCK)) is not None
            for owner in {name.owner for name in names}
        }
        for name in sorted(name for name in names if not name.unfinished):
            if (fd := self._open(name)) is not None:
                size = os.fstat(fd).st_size
                os.close(fd)
                yield Segment(name, size, alive[name.owner])

    def _open(self, name: SegmentName) -> int | None:
        for path in (name, name._replace(sealed=True)):
            with contextlib.suppress(FileNotFoundError):  # sealed, or delivered
                return open_file(self._directory / str(path))
        return None

    def _between(
        self, segment: Segment, start: int, end: int | None
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
