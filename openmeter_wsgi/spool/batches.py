"""Batches of a spool: slices of segments, without an object for each event.

A thousand events are a few texts and a few numbers. One call turns a text into the body
of a request. A text is split into lines only where a batch is cut: at its end, and when
the server refuses it.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, NamedTuple, Self, overload

from openmeter_wsgi.delivery.client import Array

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Iterable, Iterator


class ByteRange(NamedTuple):
    """The half-open range of consecutive lines in one segment, in bytes."""

    #: The key of the segment.
    key: str
    start: int
    end: int


class Slice(NamedTuple):
    """Consecutive whole lines of one segment."""

    #: The key of the segment.
    key: str
    text: bytes
    #: The offset of the text in the segment.
    start: int
    #: The number of lines that are not empty.
    events: int
    #: True if some lines are empty: one form writes a newline before each line, too.
    sparse: bool

    @property
    def end(self) -> int:
        """The end of the text in the segment."""
        return self.start + len(self.text)

    @property
    def size(self) -> int:
        """The bytes of the events, without their newlines."""
        return len(self.text) - self.events

    @property
    def lines(self) -> list[bytes]:
        """The events."""
        return list(filter(None, self.text.split(b"\n")))

    def joined(self) -> bytes:
        """Return the events with commas between them."""
        if self.sparse:
            return b",".join(self.lines)
        return self.text[:-1].replace(b"\n", b",")

    def split_at(self, events: int) -> tuple[Slice, Slice]:
        """Return the part with the first *events*, and the rest."""
        lines = self.text.split(b"\n")
        return self._split_before(_line_after(events, lines), lines)

    def split_to_fit(self, *, max_events: int, max_bytes: int) -> tuple[Slice, Slice]:
        """Return the largest first part within both limits, and the rest."""
        lines = self.text.split(b"\n")
        line = len(lines)
        if self.events > max_events:
            line = _line_after(max_events, lines)
        if self.size > max_bytes:
            line = min(line, bisect_right(list(accumulate(map(len, lines))), max_bytes))
        return self._split_before(line, lines)

    def _split_before(self, line: int, lines: list[bytes]) -> tuple[Slice, Slice]:
        while line < len(lines) and not lines[line]:
            line += 1  # otherwise the rest might hold empty lines only
        before = lines[:line]
        events = line - before.count(b"")
        middle = min(sum(map(len, before)) + line, len(self.text))
        return (
            self._replace(text=self.text[:middle], events=events),
            self._replace(
                text=self.text[middle:],
                start=self.start + middle,
                events=self.events - events,
            ),
        )


def _line_after(events: int, lines: list[bytes]) -> int:
    """Return the number of the line that follows the first *events*."""
    line = events
    # Each empty line before it moves it by one.
    while missing := events - line + lines[:line].count(b""):
        line += missing
    return line


def take_from(waiting: deque[Slice], *, max_events: int, max_bytes: int) -> list[Slice]:
    """Remove and return the slices of one batch, with at least one event.

    A slice is split only if the batch lacks more than a 32nd of its events.
    """
    taken: list[Slice] = []
    left = max_events
    while waiting:
        part = waiting[0]
        if part.events > left or part.size > max_bytes:
            break
        taken.append(waiting.popleft())
        left -= part.events
        max_bytes -= part.size
    if waiting and left > max_events // 32:
        whole = waiting.popleft()
        part, rest = whole.split_to_fit(max_events=left, max_bytes=max_bytes)
        if not taken and not part.events:
            part, rest = whole.split_at(1)
        taken += [part] if part.text else []
        waiting.extendleft([rest] if rest.text else [])
    return taken


class SpoolBatch(Array):
    """A batch of slices of segments."""

    def __init__(self, parts: Iterable[Slice]) -> None:
        self.parts: list[Slice] = list(parts)
        #: The ranges of the slices, with adjacent ranges merged.
        self.ranges: list[ByteRange] = _merged_ranges(self.parts)
        self._events = sum(part.events for part in self.parts)

    def __len__(self) -> int:
        return self._events

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._lines)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if index == 0:
            text = self.parts[0].text.lstrip(b"\n")
            return text[: text.index(b"\n")]
        return self._lines[index]

    @cached_property
    def _lines(self) -> list[bytes]:
        return list(chain.from_iterable(part.lines for part in self.parts))

    def joined(self) -> bytes:
        """Return the JSON array of all events."""
        first, *others = [part.joined() for part in self.parts if part.events]
        *others, last = [b"[" + first, *others]
        return b",".join([*others, last + b"]"])

    @property
    def texts(self) -> Iterable[bytes]:
        """Texts that together hold all events, several in each."""
        return (part.text for part in self.parts)

    def split_at(self, events: int) -> tuple[Self, Self]:
        """Return the first *events* and the other events; neither part is empty."""
        missing = events
        first: list[Slice] = []
        second: list[Slice] = []
        for part in self.parts:
            if missing >= part.events:
                first.append(part)
            elif missing:
                before, after = part.split_at(missing)
                first.append(before)
                second.append(after)
            else:
                second.append(part)
            missing = max(missing - part.events, 0)
        return type(self)(first), type(self)(second)


def _merged_ranges(parts: Iterable[Slice]) -> list[ByteRange]:
    ranges: list[ByteRange] = []
    for part in parts:
        last = ranges[-1] if ranges else None
        if last and last.end == part.start and last.key == part.key:
            ranges[-1] = last._replace(end=part.end)
        else:
            ranges.append(ByteRange(part.key, part.start, part.end))
    return ranges
