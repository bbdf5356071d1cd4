"""Lines of segments: handed out in batches, without a look at each of them.

A thousand events are a few lists and a few numbers here. What is done with them is
done by calls that take all of a list at once; where an event lies is only reckoned
where a batch is cut.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, chain
from typing import TYPE_CHECKING, NamedTuple, Self

from openmeter_wsgi.delivery.batch import Batch

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Iterable

    from openmeter_wsgi.delivery.reading import Reading


class Run(NamedTuple):
    """Where lines are that follow each other in one segment."""

    reading: Reading
    start: int
    end: int


class Part(NamedTuple):
    """Whole lines of one segment that follow each other, without their newlines.

    Some may be empty: one form writes a newline before a line as well as after it.
    """

    reading: Reading
    lines: list[bytes]
    start: int
    end: int
    #: How many of the lines are no empty ones.
    events: int

    @classmethod
    def of(cls, reading: Reading, lines: list[bytes], start: int, end: int) -> Self:
        """Return a part; counts its events."""
        return cls(reading, lines, start, end, len(lines) - lines.count(b""))

    @property
    def size(self) -> int:
        """The bytes of all lines, without their newlines."""
        return self.end - self.start - len(self.lines)

    def cut(self, events: int) -> tuple[Part, Part]:
        """Return the part that ends with so many events, and the rest."""
        return self._cut_before(self._after(events))

    def fitting(self, *, max_events: int, max_bytes: int) -> tuple[Part, Part]:
        """Return the part that is not more than that, and the rest."""
        line = len(self.lines)
        if self.events > max_events:
            line = self._after(max_events)
        if self.size > max_bytes:
            ends = list(accumulate(map(len, self.lines)))
            line = min(line, bisect_right(ends, max_bytes))
        return self._cut_before(line)

    def _after(self, events: int) -> int:
        """Return the number of the line that follows so many events."""
        line = events
        while missing := events - line + self.lines[:line].count(b""):
            line += missing
        return line

    def _cut_before(self, line: int) -> tuple[Part, Part]:
        while line < len(self.lines) and not self.lines[line]:
            line += 1  # or the rest might hold no event
        lines = self.lines[:line]
        middle = self.start + sum(map(len, lines)) + len(lines)
        return (
            Part.of(self.reading, lines, self.start, middle),
            Part.of(self.reading, self.lines[line:], middle, self.end),
        )


def take_from(waiting: deque[Part], *, max_events: int, max_bytes: int) -> list[Part]:
    """Take the first lines, as many as one batch may hold: at least one event."""
    taken: list[Part] = []
    while waiting:
        part = waiting.popleft()
        if part.events > max_events or part.size > max_bytes:
            whole = part
            part, rest = whole.fitting(max_events=max_events, max_bytes=max_bytes)
            if not taken and not part.events:
                part, rest = whole.cut(1)
            if part.lines:
                taken.append(part)
            if rest.lines:
                waiting.appendleft(rest)
            break
        taken.append(part)
        max_events -= part.events
        max_bytes -= part.size
    return taken


class SpoolBatch(Batch):
    """Events, and the parts of segments that they are."""

    __slots__ = ("parts", "runs")

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = list(parts)
        #: The same without the lines, as few as may be.
        self.runs = _joined(self.parts)
        super().__init__(filter(None, chain.from_iterable(p.lines for p in self.parts)))

    def halves(self) -> tuple[Self, Self]:
        """Return the first half and the second: it holds at least two events."""
        missing = len(self) // 2
        first: list[Part] = []
        second: list[Part] = []
        for part in self.parts:
            if missing >= part.events:
                first.append(part)
            elif missing:
                before, after = part.cut(missing)
                first.append(before)
                second.append(after)
            else:
                second.append(part)
            missing = max(missing - part.events, 0)
        return type(self)(first), type(self)(second)


def _joined(parts: Iterable[Part]) -> list[Run]:
    joined: list[Run] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last and last.end == part.start and last.reading is part.reading:
            joined[-1] = last._replace(end=part.end)
        else:
            joined.append(Run(part.reading, part.start, part.end))
    return joined
