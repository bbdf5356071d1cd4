"""Events that go to OpenMeter in one request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Iterator


class Batch(Protocol):
    """Encoded events in their order. Who hands them out knows where they came from."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __iter__(self) -> Iterator[bytes]:
        """Return an iterator over all."""

    def __getitem__(self, index: int, /) -> bytes:
        """Return one."""

    def halves(self) -> tuple[Self, Self]:
        """Return the first half and the second: it holds at least two events."""


class ListedBatch(list[bytes]):
    """A batch of events that are there one by one."""

    __slots__ = ()

    def halves(self) -> tuple[Self, Self]:
        """Return the first half and the second: it holds at least two events."""
        middle = len(self) // 2
        return type(self)(self[:middle]), type(self)(self[middle:])
