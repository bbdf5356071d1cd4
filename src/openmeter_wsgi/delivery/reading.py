"""One segment as its reader sees it: what was read, what is done."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from openmeter_wsgi.delivery import progress
from openmeter_wsgi.delivery.segment import (
    WRITTEN,
    Piece,
    SegmentName,
    is_event,
    open_file,
    read_final,
    read_live,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from openmeter_wsgi.delivery.progress import Ranges


class Reading:
    """The lines of one segment, each handed out once.

    Belongs to the sender. *done* is what an earlier sender delivered of it.
    """

    def __init__(self, directory: Path, name: SegmentName, done: Ranges) -> None:
        self.name = name
        self.done = done
        #: Nobody owns it any more, and a crash may have damaged it.
        self.adopted = False
        #: All that will ever be in it was read.
        self.at_end = False
        self._directory = directory
        #: How far it was read, in bytes.
        self.offset = 0
        #: What is not to be handed out again: done, or loaded with a doubt.
        self._taken: Ranges = list(done)

    @property
    def is_final(self) -> bool:
        """Whether nobody writes into it any more."""
        return self.name.sealed or self.adopted

    @property
    def is_done(self) -> bool:
        """Whether it can be deleted."""
        if not self.at_end:
            return False
        return not self.offset or self.done == [(0, self.offset)]

    def read(self) -> tuple[list[Piece], list[Piece]]:
        """Return the next events, and what should be one and is not.

        Both are empty where there is nothing to read now.

        :raises OSError: if it cannot be read, e.g. because it was just renamed.
        """
        fd = open_file(self._directory / str(self.name))
        try:
            pieces = self._pieces(fd)
        finally:
            os.close(fd)
        return self._sorted(pieces)

    def read_range(self, start: int, end: int) -> tuple[list[Piece], list[Piece]]:
        """Return what is in a range that was handed out before a crash, as `read`."""
        progress.add(self._taken, start, end)
        pieces: list[Piece] = []
        fd = open_file(self._directory / str(self.name))
        try:
            while start < end and (more := read_final(fd, start, end)):
                pieces += more
                start = more[-1].end
        finally:
            os.close(fd)
        if start < end:
            progress.add(self.done, start, end)  # zeros
        return self._sorted(pieces)

    def _sorted(self, pieces: list[Piece]) -> tuple[list[Piece], list[Piece]]:
        good: list[Piece] = []
        bad: list[Piece] = []
        for piece in pieces:
            if piece.text:
                (good if self._is_good(piece) else bad).append(piece)
            else:
                progress.add(self.done, piece.start, piece.end)
        return good, bad

    def _is_good(self, piece: Piece) -> bool:
        if piece.end - piece.start == len(piece.text):
            return False  # without its newline
        if self.adopted or self.name.form == WRITTEN:
            return is_event(piece.text)
        # Copied by one who lives: all of it or nothing.
        return b"\0" not in piece.text

    def _pieces(self, fd: int) -> list[Piece]:
        """Read on from where the last call ended."""
        limit = self._skip_taken()
        # Before the bytes: what is sealed or adopted now has been written.
        final = self.is_final
        pieces = (read_final if final else read_live)(fd, self.offset, limit)
        if pieces:
            self.offset = pieces[-1].end
        elif final and limit is None:
            self.at_end = True
        elif final and limit is not None:
            # A hole before what was done: there is nothing in it.
            progress.add(self.done, self.offset, limit)
            self.offset = limit
        return pieces

    def _skip_taken(self) -> int | None:
        """Go past what was taken; return where the next such range begins."""
        for start, end in self._taken:
            if start <= self.offset < end:
                self.offset = end
            elif start > self.offset:
                return start
        return None


class Place(NamedTuple):
    """Where an event was read, or several that follow each other."""

    reading: Reading
    start: int
    end: int


def runs(places: Iterable[Place]) -> list[Place]:
    """Join those that follow each other: of a batch that is nearly all."""
    joined: list[list[Any]] = []
    for reading, start, end in places:
        if joined and joined[-1][2] == start and joined[-1][0] is reading:
            joined[-1][2] = end
        else:
            joined.append([reading, start, end])
    return [Place(*run) for run in joined]
