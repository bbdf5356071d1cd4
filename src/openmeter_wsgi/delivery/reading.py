"""One segment as its reader sees it: what was read, what is done."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from openmeter_wsgi.delivery import ranges
from openmeter_wsgi.delivery.part import Part
from openmeter_wsgi.delivery.segment import (
    WRITTEN,
    Piece,
    SegmentName,
    are_events,
    final_text,
    is_event,
    live_text,
    open_file,
    pieces,
)

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping
    from pathlib import Path

    from openmeter_wsgi.delivery.ranges import Ranges

#: So much is looked at by one call: each keeps all other threads waiting.
_BLOCK_BYTES = 32 * 1024


class Reading:
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
        self.name = name
        self.key = name.key
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

    def read(self) -> tuple[list[Part], list[Piece]]:
        """Return the next lines, and what should be an event and is not.

        Both are empty where there is nothing to read now.

        :raises OSError: if it cannot be read, e.g. because it was just renamed.
        """
        fd = open_file(self._directory / str(self.name))
        try:
            start, text = self._read_on(fd)
        finally:
            os.close(fd)
        return self._sorted(text, start)

    def read_range(self, start: int, end: int) -> tuple[list[Part], list[Piece]]:
        """Return what is in a range that was handed out before a crash, as `read`."""
        ranges.add(self._taken, start, end)
        parts: list[Part] = []
        damaged: list[Piece] = []
        fd = open_file(self._directory / str(self.name))
        try:
            while start < end and (text := final_text(fd, start, end)):
                good, bad = self._sorted(text, start)
                parts += good
                damaged += bad
                start += len(text)
        finally:
            os.close(fd)
        if start < end:
            ranges.add(self.done, start, end)  # zeros
        return parts, damaged

    def _sorted(self, text: bytes, start: int) -> tuple[list[Part], list[Piece]]:
        parts: list[Part] = []
        damaged: list[Piece] = []
        for block in _blocks(text):
            part = self._part(block, start)
            if part is None:
                self._sort(pieces(block, start), parts, damaged)
            elif part.events:
                parts.append(part)
            else:
                ranges.add(self.done, part.start, part.end)  # empty lines
            start += len(block)
        return parts, damaged

    def _part(self, text: bytes, start: int) -> Part | None:
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
        return Part(self.key, text, start, events, sparse) if good else None

    def _sort(
        self, found: Iterator[Piece], parts: list[Part], damaged: list[Piece]
    ) -> None:
        """Look at each line."""
        for text, start, end in found:
            whole = end - start > len(text)
            if whole and not text:
                ranges.add(self.done, start, end)
            elif whole and is_event(text):
                parts.append(Part(self.key, text + b"\n", start, 1, sparse=False))
            else:
                damaged.append(Piece(text, start, end))

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
            ranges.add(self.done, start, limit)
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
    readings: Mapping[str, Reading], *, but: Container[str]
) -> list[Reading]:
    """Return of each owner, *but* some, what is read next, the oldest first."""
    heads: dict[str, Reading] = {}
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
