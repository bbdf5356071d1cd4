"""The mark *visible until*: it tells how much of the delivered usage OpenMeter shows.

All usage that was settled before the mark is in each balance that is asked for from now
on. Event ids tell, and not amounts: those cannot tell our usage from that of others.
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

#: So many ids of a batch, and of a group of batches, are looked for.
PROBES = 8


class Group(msgspec.Struct):
    """Probes of batches that were accepted between two moments."""

    #: Those that OpenMeter has not listed yet.
    ids: list[str]
    #: When the last of the batches was accepted, by the wall clock.
    accepted_at: float
    #: All usage that was settled before was accepted with this group, or earlier.
    until: float = 0.0


class State(msgspec.Struct):
    """The probes as they are handed to the next sender."""

    visible_until: float
    groups: list[Group]


class Probes:
    """Ids of accepted batches, until OpenMeter lists them. Any thread.

    *max_lag*: an id that is not listed so many seconds after its batch was accepted
    counts as visible: the event is lost.
    """

    def __init__(self, max_lag: float, clock: Callable[[], float] = time.time) -> None:
        self._max_lag = max_lag
        self._clock = clock
        self._lock = threading.Lock()
        self._visible_until = 0.0
        self._groups: deque[Group] = deque()
        #: Of batches that were accepted since the last mark.
        self._open: Group | None = None

    @property
    def visible_until(self) -> float:
        """The mark (wall clock): all usage settled before it is listed."""
        return self._visible_until

    @property
    def lag(self) -> float:
        """For how many seconds the oldest unseen probe has been accepted."""
        with self._lock:
            first = self._groups[0] if self._groups else self._open
            return max(self._clock() - first.accepted_at, 0.0) if first else 0.0

    def accepted(self, ids: Sequence[str]) -> None:
        """Remember some ids of a batch that OpenMeter has accepted."""
        with self._lock:
            if self._open is None:
                self._open = Group([], self._clock())
            self._open.ids += spread(ids)
            self._open.accepted_at = self._clock()

    def mark(self, until: float) -> None:
        """Note that all usage settled before *until* was accepted, and told here."""
        with self._lock:
            group, self._open = self._open, None
            if group is not None:
                group.ids = spread(group.ids)
                self._groups.append(group)
            if self._groups:
                self._groups[-1].until = max(until, self._groups[-1].until)
            elif until > self._visible_until:
                self._visible_until = until

    def due(self, at_most: int) -> list[str]:
        """Return the oldest unseen ids."""
        found: list[str] = []
        with self._lock:
            self._give_up()
            for group in self._groups:
                found += group.ids
                if len(found) >= at_most:
                    break
        return found[:at_most]

    def seen(self, ids: Iterable[str]) -> None:
        """Note the ids that OpenMeter lists, and move the mark."""
        listed = {*ids}
        with self._lock:
            for group in self._groups:
                if listed:
                    group.ids = [one for one in group.ids if one not in listed]
            self._move()

    def _move(self) -> None:
        groups = self._groups
        while groups and not groups[0].ids:
            until = groups.popleft().until
            self._visible_until = max(self._visible_until, until)

    def _give_up(self) -> None:
        """Let ids that are missing for too long count as visible."""
        oldest = self._clock() - self._max_lag
        for group in self._groups:
            if group.accepted_at > oldest:
                break
            if group.ids:
                logger.error(
                    "%s: OpenMeter accepted the event %s and does not list it after "
                    "%.0f s: it is lost there, or its sink stands still. Quotas no "
                    "longer wait for it",
                    "visibility", group.ids[0], self._max_lag,
                )  # fmt: skip
                group.ids = []
        self._move()

    def state(self) -> State:
        """Return what the next sender has to know."""
        with self._lock:
            groups = [*self._groups, *([self._open] if self._open else [])]
            return State(self._visible_until, [_copy(group) for group in groups])

    def restore(self, state: State) -> None:
        """Go on where another sender has ended."""
        with self._lock:
            self._visible_until = max(self._visible_until, state.visible_until)
            self._groups.extendleft(reversed(state.groups))


def _copy(group: Group) -> Group:
    return Group([*group.ids], group.accepted_at, group.until)


def spread(ids: Sequence[str]) -> list[str]:
    """Return some of *ids*, the first and the last among them."""
    if len(ids) <= PROBES:
        return [*ids]
    step = (len(ids) - 1) / (PROBES - 1)
    return [ids[round(number * step)] for number in range(PROBES)]


class _Mark(NamedTuple):
    at: float
    until: float


#: Seconds between two marks that are kept.
_SPACING = 0.2


class FixedLag:
    """The mark where OpenMeter lists no events: *lag* seconds after delivery.

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
        self._marks: deque[_Mark] = deque()
        self._lock = threading.Lock()

    def until(self) -> float:
        """Return the mark. It moves only if it is asked for again and again."""
        with self._lock:
            return self._moved()

    def _moved(self) -> float:
        now = self._clock()
        marks = self._marks
        while marks and marks[-1].at > now:  # of a clock that was put back since
            marks.pop()
        if not marks or now - marks[-1].at >= min(_SPACING, self._lag):
            marks.append(_Mark(now, self._delivered_until()))
        while len(marks) > 1 and marks[1].at <= now - self._lag:
            marks.popleft()
        return marks[0].until if marks[0].at <= now - self._lag else 0.0
