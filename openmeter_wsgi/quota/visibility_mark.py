"""The visibility mark: the moment up to which OpenMeter's balances contain all usage.

OpenMeter shows usage seconds after it has accepted the events. A balance that is asked
for now contains all usage that was settled before the mark; later usage is still
subtracted locally. A mark belongs to an origin: a spool, or a process without one.

`Probes` computes the mark from *probes*: ids of accepted events that OpenMeter must
list. Amounts could not tell this origin's usage from that of other writers. The sender
adds some ids of each accepted batch to an open group (`add`). `close_group` closes the
group and notes with it the time before which all usage was delivered. As soon as all
ids of the oldest group are listed (`note_listed`), its time becomes the mark.

`FixedLag` is the fallback for servers that do not list events.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from openmeter_wsgi import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

logger: Final = log.get_logger(__name__)

#: Maximum number of ids per batch, and per group of batches.
MAX_PROBES = 8


class ProbeGroup(msgspec.Struct):
    """The probes of the batches accepted between two calls of `close_group`."""

    #: The ids that OpenMeter has not listed yet.
    ids: list[str]
    #: The wall-clock time at which the last of the batches was accepted.
    accepted_at: float
    #: Usage settled before this moment was accepted with this group or earlier.
    until: float = 0.0


class ProbeState(msgspec.Struct):
    """The probes in the form that one sender hands to the next."""

    visible_until: float
    groups: list[ProbeGroup]


class Probes:
    """The probes of accepted batches until OpenMeter lists them. Any thread.

    *max_lag*: seconds after which an id that is not listed counts as listed, because
    its event is lost.
    """

    def __init__(self, max_lag: float, clock: Callable[[], float] = time.time) -> None:
        self._max_lag = max_lag
        self._clock = clock
        self._lock = threading.Lock()
        self._visible_until = 0.0
        #: Closed groups, the oldest first.
        self._groups: deque[ProbeGroup] = deque()
        #: The group of the batches since the last call of `close_group`.
        self._open: ProbeGroup | None = None

    @property
    def visible_until(self) -> float:
        """The mark (wall clock): OpenMeter lists all usage settled before it."""
        return self._visible_until

    @property
    def lag(self) -> float:
        """Seconds since the acceptance of the oldest group that is not listed."""
        with self._lock:
            first = self._groups[0] if self._groups else self._open
            return max(self._clock() - first.accepted_at, 0.0) if first else 0.0

    def add(self, ids: Sequence[str]) -> None:
        """Add some ids of a batch that OpenMeter has accepted."""
        with self._lock:
            if self._open is None:
                self._open = ProbeGroup([], self._clock())
            self._open.ids += sample(ids)
            self._open.accepted_at = self._clock()

    def close_group(self, until: float) -> None:
        """Close the open group: all usage settled before *until* was accepted.

        The batches of that usage must have been added before.
        """
        with self._lock:
            group, self._open = self._open, None
            if group is not None:
                group.ids = sample(group.ids)
                self._groups.append(group)
            if self._groups:
                self._groups[-1].until = max(until, self._groups[-1].until)
            elif until > self._visible_until:
                self._visible_until = until

    def oldest_unlisted(self, at_most: int) -> list[str]:
        """Return the oldest ids that are not listed yet, after expiring lost ones."""
        ids: list[str] = []
        with self._lock:
            self._expire()
            for group in self._groups:
                ids += group.ids
                if len(ids) >= at_most:
                    break
        return ids[:at_most]

    def note_listed(self, ids: Iterable[str]) -> None:
        """Remove the ids that OpenMeter lists, and move the mark."""
        listed = {*ids}
        with self._lock:
            for group in self._groups:
                if listed:
                    group.ids = [
                        event_id for event_id in group.ids if event_id not in listed
                    ]
            self._move_mark()

    def _move_mark(self) -> None:
        groups = self._groups
        while groups and not groups[0].ids:
            until = groups.popleft().until
            self._visible_until = max(self._visible_until, until)

    def _expire(self) -> None:
        """Treat ids that are not listed after the maximum lag as listed."""
        oldest = self._clock() - self._max_lag
        for group in self._groups:
            if group.accepted_at > oldest:
                break
            if group.ids:
                logger.error(
                    "%s: OpenMeter accepted the event %s and does not list it after "
                    "%.0f s: the event is lost there, or OpenMeter's sink has stopped. "
                    "Quotas no longer wait for it",
                    "visibility", group.ids[0], self._max_lag,
                )  # fmt: skip
                group.ids = []
        self._move_mark()

    def state(self) -> ProbeState:
        """Return the state for the next sender."""
        with self._lock:
            groups = [*self._groups, *([self._open] if self._open else [])]
            return ProbeState(self._visible_until, [_copy(group) for group in groups])

    def restore(self, state: ProbeState) -> None:
        """Continue with the state of the last sender."""
        with self._lock:
            self._visible_until = max(self._visible_until, state.visible_until)
            self._groups.extendleft(reversed(state.groups))


def _copy(group: ProbeGroup) -> ProbeGroup:
    return ProbeGroup([*group.ids], group.accepted_at, group.until)


def sample(ids: Sequence[str]) -> list[str]:
    """Return at most `MAX_PROBES` of *ids*, with the first and the last of them."""
    if len(ids) <= MAX_PROBES:
        return [*ids]
    step = (len(ids) - 1) / (MAX_PROBES - 1)
    return [ids[round(number * step)] for number in range(MAX_PROBES)]


class _Delivered(NamedTuple):
    """All usage settled before *until* was delivered at the time *at*."""

    at: float
    until: float


#: Minimum seconds between two entries that are kept.
_SPACING = 0.2


class FixedLag:
    """The visibility mark of a server that lists no events: *lag* s after delivery.

    *delivered_until* returns a moment before which all usage is delivered.
    """

    def __init__(
        self,
        delivered_until: Callable[[], float],
        lag: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._delivered_until = delivered_until
        self._lag = lag
        self._clock = clock
        self._history: deque[_Delivered] = deque()
        self._lock = threading.Lock()

    def until(self) -> float:
        """Return the mark. It moves only with repeated calls, which sample delivery."""
        with self._lock:
            return self._moved_mark()

    def _moved_mark(self) -> float:
        now = self._clock()
        history = self._history
        while history and history[-1].at > now:  # the clock was set back since
            history.pop()
        if not history or now - history[-1].at >= min(_SPACING, self._lag):
            history.append(_Delivered(now, self._delivered_until()))
        while len(history) > 1 and history[1].at <= now - self._lag:
            history.popleft()
        return history[0].until if history[0].at <= now - self._lag else 0.0
