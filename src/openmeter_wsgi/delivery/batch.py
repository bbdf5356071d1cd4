"""Events that go to OpenMeter in one request."""

from __future__ import annotations

from typing import Self


class Batch(list[bytes]):
    """Encoded events in their order. What takes them from somewhere adds where."""

    __slots__ = ()

    def halves(self) -> tuple[Self, Self]:
        """Return the first half and the second: it holds at least two events."""
        middle = len(self) // 2
        return type(self)(self[:middle]), type(self)(self[middle:])
