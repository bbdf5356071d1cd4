"""Progress through a numbered sequence: sets of ranges, and marks of times.

A mark is a time and the amount of events put by then: their number, or the ends of the
segments that hold them. Once this amount is done, each event put before that time is
done. So this time (the watermark) does not depend on the times in the events.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

#: Half-open ranges (start, end): sorted and disjoint.
Ranges: TypeAlias = list[tuple[int, int]]


def add(ranges: Ranges, start: int, end: int) -> None:
    """Add a range to *ranges*, and join the ranges that touch it."""
    first = len(ranges)
    while first and ranges[first - 1][1] >= start:
        first -= 1
    after = first
    while after < len(ranges) and ranges[after][0] <= end:
        start = min(start, ranges[after][0])
        end = max(end, ranges[after][1])
        after += 1
    ranges[first:after] = [(start, end)]


def first_gap(ranges: Ranges) -> int:
    """Return the end of the range that begins at 0, or 0."""
    return ranges[0][1] if ranges and ranges[0][0] == 0 else 0


def subtract(ranges: Ranges, start: int, end: int) -> Ranges:
    """Return *ranges* without the numbers from *start* to *end*."""
    left: Ranges = []
    for low, high in ranges:
        if low < start:
            left.append((low, min(high, start)))
        if high > end:
            left.append((max(low, end), high))
    return [(low, high) for low, high in left if low < high]


def overlap(ranges: Ranges, start: int, end: int) -> bool:
    """Return True if *ranges* contain a number from *start* to *end*."""
    return any(low < end and start < high for low, high in ranges)


#: Maximum number of marks. More are joined: the watermark then moves in larger steps.
_MAX_MARKS = 512

_Amount = TypeVar("_Amount")


class Marks(Generic[_Amount]):
    """The marks that are not reached yet, the oldest first. One thread at a time.

    The amount in a mark may be relative to the mark before. *join* returns the amount
    of a mark that replaces two neighbours, an older and a newer one.
    """

    def __init__(
        self, join: Callable[[_Amount, _Amount], _Amount] = lambda _, newer: newer
    ) -> None:
        self._join = join
        self._marks: deque[tuple[float, _Amount]] = deque()
        self._reached = 0.0
        #: Minimum number of seconds between two marks. It grows while none is reached.
        self._spacing = 0.0

    def add(self, moment: float, amount: _Amount) -> bool:
        """Add a mark of *moment* (wall clock), or return False if it is too early.

        *amount* is the amount of events put by then.
        """
        marks = self._marks
        if marks and marks[-1][1] == amount:
            marks.pop()  # no event came since
        elif marks and 0 <= moment - marks[-1][0] < self._spacing:
            return False
        marks.append((moment, amount))
        if len(marks) > _MAX_MARKS:
            self._thin_out()
        return True

    def move_last(self, moment: float, zero: _Amount) -> None:
        """Move the last mark to *moment*, as no event came; or add a mark of *zero*."""
        amount = self._marks.pop()[1] if self._marks else zero
        self._marks.append((moment, amount))

    def _thin_out(self) -> None:
        """Join the marks in pairs, except the first one, which is reached next."""
        first, *others = self._marks
        pairs = zip(others[::2], others[1::2], strict=False)
        joined = [(b[0], self._join(a[1], b[1])) for a, b in pairs]
        self._marks = deque([first, *joined, *others[len(joined) * 2 :]])
        self._spacing = 2 * abs(self._marks[-1][0] - first[0]) / _MAX_MARKS

    def reached(self, is_done: Callable[[_Amount], bool]) -> float:
        """Return the time of the newest mark that is done, and forget such marks."""
        while self._marks and is_done(self._marks[0][1]):
            self._reached = self._marks.popleft()[0]
        if not self._marks:
            self._spacing = 0.0
        return self._reached
