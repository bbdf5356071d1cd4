"""Progress through a numbered sequence: sets of ranges, and marks of moments.

A mark is a moment, and how much had been put by then. Once all of that is delivered,
or set aside for good, everything that was put before that moment is. So no event
needs to be looked into, and none can mislead by a time of its own.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

#: From where to where, the end excluded; sorted, apart.
Ranges: TypeAlias = list[tuple[int, int]]


def add(ranges: Ranges, start: int, end: int) -> None:
    """Add a range to sorted ones, joining those that touch."""
    at = len(ranges)
    while at and ranges[at - 1][1] >= start:
        at -= 1
    after = at
    while after < len(ranges) and ranges[after][0] <= end:
        start = min(start, ranges[after][0])
        end = max(end, ranges[after][1])
        after += 1
    ranges[at:after] = [(start, end)]


def first_gap(ranges: Ranges) -> int:
    """Return up to where all is there, from the beginning."""
    return ranges[0][1] if ranges and ranges[0][0] == 0 else 0


def subtract(ranges: Ranges, start: int, end: int) -> Ranges:
    """Return *ranges* without what is from *start* to *end*."""
    left: Ranges = []
    for low, high in ranges:
        if low < start:
            left.append((low, min(high, start)))
        if high > end:
            left.append((max(low, end), high))
    return [(low, high) for low, high in left if low < high]


def overlap(ranges: Ranges, start: int, end: int) -> bool:
    """Return True if anything from *start* to *end* is in *ranges*."""
    return any(low < end and start < high for low, high in ranges)


#: More marks than this are thinned out; the watermark then moves in larger steps.
_MAX_MARKS = 512

_Put = TypeVar("_Put")


class Marks(Generic[_Put]):
    """The marks that are not reached yet, the oldest first. One thread at a time.

    Each stands on the one before it: *join* makes one of two that follow each other.
    """

    def __init__(
        self, join: Callable[[_Put, _Put], _Put] = lambda _, newer: newer
    ) -> None:
        self._join = join
        self._marks: deque[tuple[float, _Put]] = deque()
        self._reached = 0.0
        #: Seconds between two of them at least: longer, the longer none is reached.
        self._spacing = 0.0

    def add(self, moment: float, put: _Put) -> bool:
        """Remember how much was *put* by *moment* (wall clock); say if it is."""
        marks = self._marks
        if marks and marks[-1][1] == put:
            marks.pop()  # nothing came since
        elif marks and 0 <= moment - marks[-1][0] < self._spacing:
            return False
        marks.append((moment, put))
        if len(marks) > _MAX_MARKS:
            self._thin_out()
        return True

    def renew(self, moment: float, nothing: _Put) -> None:
        """Remember that nothing was put since the last mark, or since all were."""
        put = self._marks.pop()[1] if self._marks else nothing
        self._marks.append((moment, put))

    def _thin_out(self) -> None:
        first, *others = self._marks
        pairs = zip(others[::2], others[1::2], strict=False)
        joined = [(b[0], self._join(a[1], b[1])) for a, b in pairs]
        self._marks = deque([first, *joined, *others[len(joined) * 2 :]])
        self._spacing = 2 * abs(self._marks[-1][0] - first[0]) / _MAX_MARKS

    def reached(self, is_done: Callable[[_Put], bool]) -> float:
        """Return the newest moment by which all that was put is done."""
        while self._marks and is_done(self._marks[0][1]):
            self._reached = self._marks.popleft()[0]
        if not self._marks:
            self._spacing = 0.0
        return self._reached
