"""Batches: the events of one POST to OpenMeter, and the delay of events dated ahead.

An event that is dated ahead of OpenMeter's clock waits until it is due. If it is more
than an hour ahead, OpenMeter accepts it, but then Kafka refuses it together with all
events that arrive at the same moment.
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

#: Maximum number of bytes of an event in a log line.
_MAX_LOGGED = 4_096
#: Number of events in one text. A search in the text is one C call, which blocks all
#: other threads.
_EVENTS_PER_TEXT = 250


class Batch(Protocol):
    """A sequence of encoded events. Its source keeps track of where they came from."""

    def __len__(self) -> int:
        """Return the number of events."""

    def __iter__(self) -> Iterator[bytes]:
        """Return an iterator over the events."""

    def __getitem__(self, index: int, /) -> bytes:
        """Return one event."""

    def split_at(self, events: int) -> tuple[Self, Self]:
        """Return the first *events* and the other events; neither part is empty."""

    @property
    def texts(self) -> Iterable[bytes]:
        """Texts that together hold all events, one or several in each."""


class ListedBatch(list[bytes]):
    """A batch that is a list of single events."""

    __slots__ = ()

    def split_at(self, events: int) -> tuple[Self, Self]:
        """Return the first *events* and the other events; neither part is empty."""
        return type(self)(self[:events]), type(self)(self[events:])

    @property
    def texts(self) -> Iterable[bytes]:
        """Texts that together hold all events, several in each."""
        size = _EVENTS_PER_TEXT
        return (b"".join(self[at : at + size]) for at in range(0, len(self), size))


def shortened(event: bytes) -> bytes:
    """Return *event* without the middle of a long one; subject and id are last."""
    if len(event) <= _MAX_LOGGED:
        return event
    return event[: _MAX_LOGGED // 2] + b" [...] " + event[-_MAX_LOGGED // 2 :]


#: Maximum number of seconds that an event may be dated ahead when it is sent.
MAX_AHEAD = 1_800.0

_DATE = re.compile(rb'"time":"([^"]{%d})' % WHOLE_SECONDS)
#: Length of the part of a date that stays the same for ten minutes.
_TEN_MINUTES = len("2026-01-02T03:0")

_B = TypeVar("_B", bound=Batch)
_Item = TypeVar("_Item")


class Delayed(Generic[_Item]):
    """Items that wait until they are due. Belongs to one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._added = 0
        #: The due time, the number and the item. Equal times are in order of addition.
        self._heap: list[tuple[float, int, _Item]] = []

    @property
    def due_in(self) -> float | None:
        """The seconds until the first item is due, None without items."""
        return max(self._heap[0][0] - self._clock(), 0.0) if self._heap else None

    def add(self, item: _Item, seconds: float) -> None:
        """Add *item*, which is due in a number of *seconds*."""
        self._added += 1
        heapq.heappush(self._heap, (self._clock() + seconds, self._added, item))

    def take_due(self) -> _Item | None:
        """Remove and return an item that is due, or return None."""
        if not self._heap or self._heap[0][0] > self._clock():
            return None
        return heapq.heappop(self._heap)[2]


def split_by_date(batch: _B, clock_ahead: float) -> Iterator[tuple[_B, float]]:
    """Yield *batch* in parts, each with the seconds until it may be sent.

    Our clock is *clock_ahead* seconds ahead of OpenMeter's.
    """
    latest = time.time() - clock_ahead + MAX_AHEAD
    if not _may_have_later(batch.texts, latest):
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


def _may_have_later(texts: Iterable[bytes], moment: float) -> bool:
    """Return True if an event may be dated later than *moment*.

    A quick search: a field ``time`` in the data of an event counts, too.
    """
    latest = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)).encode()
    return any(_has_later_date(text, latest) for text in texts)


def _has_later_date(text: bytes, latest: bytes) -> bool:
    first = _DATE.search(text)
    if first is None:
        return False
    # Nearly always all dates are in the same ten minutes as the first one.
    prefix = first[1][:_TEN_MINUTES]
    if prefix < latest[:_TEN_MINUTES]:
        other_prefix = re.compile(b'"time":"(?!%s)' % re.escape(prefix))
        if other_prefix.search(text) is None:
            return False
    return any(date > latest for date in _DATE.findall(text))
