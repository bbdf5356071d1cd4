"""Events that go to OpenMeter in one request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Of an event this much is logged.
_MAX_LOGGED = 4_096
#: So many events are looked at by one call: each keeps all other threads waiting.
_JOINED = 250


class Batch(Protocol):
    """Encoded events in their order. Who hands them out knows where they came from."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __iter__(self) -> Iterator[bytes]:
        """Return an iterator over all."""

    def __getitem__(self, index: int, /) -> bytes:
        """Return one."""

    def split_at(self, events: int) -> tuple[Self, Self]:
        """Return the first *events* and the others: neither is empty."""

    @property
    def texts(self) -> Iterable[bytes]:
        """All events, in texts that may hold several."""


class ListedBatch(list[bytes]):
    """A batch of events that are there one by one."""

    __slots__ = ()

    def split_at(self, events: int) -> tuple[Self, Self]:
        """Return the first *events* and the others: neither is empty."""
        return type(self)(self[:events]), type(self)(self[events:])

    @property
    def texts(self) -> Iterable[bytes]:
        """All events, in texts that may hold several."""
        return (
            b"".join(self[at : at + _JOINED]) for at in range(0, len(self), _JOINED)
        )


def shortened(event: bytes) -> bytes:
    """Leave out the middle of a long event; subject and id are at its end."""
    if len(event) <= _MAX_LOGGED:
        return event
    return event[: _MAX_LOGGED // 2] + b" [...] " + event[-_MAX_LOGGED // 2 :]
