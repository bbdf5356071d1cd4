"""Batches: the events of one POST to OpenMeter, and which of them wait for their date.

An event that is dated ahead of OpenMeter's clock waits until it is due. Kafka refuses
one that is more than an hour ahead after OpenMeter has taken it, and with it all events
that come at the same moment.
"""

from __future__ import annotations

import heapq
import re
import time
from itertools import groupby
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

from openmeter_wsgi.values import WHOLE_SECONDS, moment_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

#: The bytes of an event that are logged.
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


#: An event that is more than this many seconds ahead is not sent.
MAX_AHEAD = 1_800.0

_DATE = re.compile(rb'"time":"([^"]{%d})' % WHOLE_SECONDS)
#: So much of a date is the same for ten minutes.
_TEN_MINUTES = len("2026-01-02T03:0")

_B = TypeVar("_B", bound=Batch)
_Item = TypeVar("_Item")


class Delayed(Generic[_Item]):
    """Items that wait until they are due. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._added = 0
        #: When each is due; which was added first decides between equals.
        self._heap: list[tuple[float, int, _Item]] = []

    @property
    def due_in(self) -> float | None:
        """The seconds until the first is due, None if none waits."""
        return max(self._heap[0][0] - self._clock(), 0.0) if self._heap else None

    def add(self, item: _Item, seconds: float) -> None:
        """Let *item* wait for so many seconds."""
        self._added += 1
        heapq.heappush(self._heap, (self._clock() + seconds, self._added, item))

    def take_due(self) -> _Item | None:
        """Return one that is due, and forget it; None if none is."""
        if not self._heap or self._heap[0][0] > self._clock():
            return None
        return heapq.heappop(self._heap)[2]


def split_by_date(batch: _B, clock_ahead: float) -> Iterator[tuple[_B, float]]:
    """Yield *batch* in parts, each with the seconds until it may be sent.

    Our clock is *clock_ahead* seconds ahead of OpenMeter's.
    """
    latest = time.time() - clock_ahead + MAX_AHEAD
    if not _may_be_later(batch.texts, latest):
        yield batch, 0.0
        return
    waits = [max((moment_of(event) or 0.0) - latest, 0.0) for event in batch]
    for _, group in groupby(waits, key=bool):
        part = list(group)
        if len(part) == len(batch):
            yield batch, min(part)
        else:
            first, batch = batch.split_at(len(part))
            yield first, min(part)


def _may_be_later(texts: Iterable[bytes], moment: float) -> bool:
    """Return True if an event may be dated later: what only data says counts as well.

    Nearly always all dates begin as the first one does, so that is looked at first.
    """
    latest = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)).encode()
    return any(_has_later(text, latest) for text in texts)


def _has_later(text: bytes, latest: bytes) -> bool:
    first = _DATE.search(text)
    if first is None:
        return False
    begins = first[1][:_TEN_MINUTES]
    if begins < latest[:_TEN_MINUTES]:
        others = re.compile(b'"time":"(?!%s)' % re.escape(begins))
        if others.search(text) is None:
            return False
    return any(date > latest for date in _DATE.findall(text))
