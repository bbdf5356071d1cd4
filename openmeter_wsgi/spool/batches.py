"""Lines of segments, handed out in batches as they are.

A thousand events are a few texts and a few numbers here. One call makes the body of a
request of a whole text. Lines are told apart only where a batch is cut: at its end, and
when the server refuses it.
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
    """The place of consecutive lines in one segment."""

    #: The segment's.
    key: str
    start: int
    end: int


class Slice(NamedTuple):
    """Whole lines of one segment that follow each other."""

    #: The segment's.
    key: str
    text: bytes
    start: int
    #: The number of lines that are not empty.
    events: int
    #: Whether any are: one form writes a newline before a line as well as after it.
    sparse: bool

    @property
    def end(self) -> int:
        """Its end in the segment."""
        return self.start + len(self.text)

    @property
    def size(self) -> int:
        """The bytes of its events."""
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

    def cut(self, events: int) -> tuple[Slice, Slice]:
        """Return the part that ends with so many events, and the rest."""
        lines = self.text.split(b"\n")
        return self._cut_before(_after(events, lines), lines)

    def fitting(self, *, max_events: int, max_bytes: int) -> tuple[Slice, Slice]:
        """Return the part that is not more than that, and the rest."""
        lines = self.text.split(b"\n")
        line = len(lines)
        if self.events > max_events:
            line = _after(max_events, lines)
        if self.size > max_bytes:
            line = min(line, bisect_right(list(accumulate(map(len, lines))), max_bytes))
        return self._cut_before(line, lines)

    def _cut_before(self, line: int, lines: list[bytes]) -> tuple[Slice, Slice]:
        while line < len(lines) and not lines[line]:
            line += 1  # or the rest might hold no event
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


def _after(events: int, lines: list[bytes]) -> int:
    """Return the number of the line that follows so many events."""
    line = events
    while missing := events - line + lines[:line].count(b""):
        line += missing
    return line


def take_from(waiting: deque[Slice], *, max_events: int, max_bytes: int) -> list[Slice]:
    """Take the first lines, as many as one batch may hold: at least one event.

    For the few that a nearly full one still lacks no part is cut.
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
        part, rest = whole.fitting(max_events=left, max_bytes=max_bytes)
        if not taken and not part.events:
            part, rest = whole.cut(1)
        taken += [part] if part.text else []
        waiting.extendleft([rest] if rest.text else [])
    return taken


class SpoolBatch(Array):
    """Events, and the parts of segments that they are."""

    def __init__(self, parts: Iterable[Slice]) -> None:
        self.parts: list[Slice] = list(parts)
        #: The same without the text, as few as may be.
        self.runs: list[ByteRange] = _merged(self.parts)
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
        """Return the JSON array of all."""
        first, *others = [part.joined() for part in self.parts if part.events]
        *others, last = [b"[" + first, *others]
        return b",".join([*others, last + b"]"])

    @property
    def texts(self) -> Iterable[bytes]:
        """All events, in texts that may hold several."""
        return (part.text for part in self.parts)

    def split_at(self, events: int) -> tuple[Self, Self]:
        """Return the first *events* and the others: neither is empty."""
        missing = events
        first: list[Slice] = []
        second: list[Slice] = []
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


def _merged(parts: Iterable[Slice]) -> list[ByteRange]:
    runs: list[ByteRange] = []
    for part in parts:
        last = runs[-1] if runs else None
        if last and last.end == part.start and last.key == part.key:
            runs[-1] = last._replace(end=part.end)
        else:
            runs.append(ByteRange(part.key, part.start, part.end))
    return runs
