"""The balance of an entitlement: grants, burnt down by usage, period after period."""

from __future__ import annotations

import calendar
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from openmeter_wsgi.sandbox.usage import Edge
from openmeter_wsgi.sandbox.validation import Document, Problem, parse_time, rfc3339

_NAMES = {"DAY": "P1D", "WEEK": "P1W", "MONTH": "P1M", "YEAR": "P1Y"}
_ISO = re.compile(
    r"P(?:(?P<years>\d+)Y)?(?:(?P<months>\d+)M)?(?:(?P<weeks>\d+)W)?(?:(?P<days>\d+)D)?"
    r"(?:T(?:(?P<hours>\d+)H)?(?:(?P<minutes>\d+)M)?(?:(?P<seconds>\d+)S)?)?",
    re.ASCII,
)
_SECONDS = {"weeks": 604_800, "days": 86_400, "hours": 3600, "minutes": 60}
#: OpenMeter meters by the minute, and lets no usage period be shorter than this.
SHORTEST = 3600
_MONTH = 31 * 86_400
#: After all times, in Unix seconds.
NEVER = 2**40
#: A thousand years; later dates are not supported.
_LONGEST = 12_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A length of time, of which months are not always equally long."""

    months: int
    seconds: int

    def after(self, moment: int, times: int) -> int:
        """Return the time *times* intervals after *moment*, in Unix seconds."""
        return _add_months(moment, self.months * times) + self.seconds * times

    @property
    def longest(self) -> int:
        """The most seconds that one interval can last."""
        return self.months * _MONTH + self.seconds


def _add_months(moment: int, months: int) -> int:
    """Return the same day some months on; the last of a month that is too short."""
    if not months:
        return moment
    date = datetime.fromtimestamp(moment, UTC)
    years, month = divmod(date.month - 1 + months, 12)
    year = date.year + years
    if not 1 <= year <= 9999:  # the years that Python knows
        return NEVER if years > 0 else -NEVER
    day = min(date.day, calendar.monthrange(year, month + 1)[1])
    return int(date.replace(year=year, month=month + 1, day=day).timestamp())


def parse_interval(text: str) -> Interval:
    """Return the interval *text*, a name or an ISO 8601 duration, or answer 400."""
    found = _ISO.fullmatch(_NAMES.get(text, text))
    if found is None and "." in text:
        raise Problem(501, f"the sandbox takes no fractions of a period: {text!r}")
    if found is None:
        raise Problem(400, f"failed to map interval: cannot parse period {text!r}")
    parts = {k: int(v) for k, v in found.groupdict("0").items()}
    seconds = sum(parts[name] * length for name, length in _SECONDS.items())
    months = parts["years"] * 12 + parts["months"]
    if months + seconds / _MONTH > _LONGEST:
        raise Problem(400, f"failed to map interval: {text} is too long")
    return Interval(months, seconds + parts["seconds"])


def recurring(period: dict[str, Any], now: float) -> dict[str, Any]:
    """Return the usage period that a client asked for as OpenMeter answers it."""
    text = period["interval"]
    interval = parse_interval(text)
    if interval.longest < SHORTEST:
        raise Problem(400, "validation error: UsagePeriod must be at least 1 hour")
    names = {iso: name for name, iso in _NAMES.items()}
    iso = _NAMES.get(text, text)
    anchor = parse_time(period["anchor"]) if "anchor" in period else int(now)
    return {
        "interval": names.get(iso, iso),
        "intervalISO": iso,
        "anchor": rfc3339(whole_minute(anchor)),
    }


def whole_minute(moment: float) -> int:
    """Return the start of the minute of *moment*: OpenMeter's resolution."""
    return int(moment // 60) * 60


@dataclass(frozen=True, slots=True)
class Recurrence:
    """The moments an interval apart, before and after an anchor in Unix seconds."""

    anchor: int
    interval: Interval

    def start(self, moment: float) -> int:
        """Return the last of the moments that is not after *moment*."""
        return self._boundary(self._index(moment))

    def end(self, moment: float) -> int:
        """Return the first of the moments that is after *moment*."""
        return self._boundary(self._index(moment) + 1)

    def between(self, after: float, until: float) -> list[int]:
        """Return the moments after *after*, up to and including *until*."""
        moments = []
        index = self._index(after) + 1
        while (moment := self._boundary(index)) <= until:
            moments.append(moment)
            index += 1
        return moments

    def _boundary(self, index: int) -> int:
        return self.interval.after(self.anchor, index)

    def _index(self, moment: float) -> int:
        """Return the index of the last boundary that is not after *moment*."""
        # Months are shorter than their longest: the guess is at most a little early
        # after the anchor, and a little late before it.
        index = int((moment - self.anchor) // self.interval.longest)
        while self._boundary(index) > moment:
            index -= 1
        while self._boundary(index + 1) <= moment:
            index += 1
        return index


#: The usage between two edges.
Usage = Callable[[Edge, Edge], float]


class Period(NamedTuple):
    """One usage period; the current one ends at the time of the balance."""

    start: Edge
    end: Edge
    #: True if the overage of the period before is carried over.
    preserve: bool
    #: The number of resets by hand before it: usage before a reset does not burn a
    #: grant made after it, even within a second.
    epoch: int


@dataclass(slots=True)
class Balance:
    """The remaining grants and the usage of the current period."""

    start: Edge
    usage: float = 0.0
    #: Usage that no grant covers.
    overage: float = 0.0
    #: Usage that grants cover.
    burnt: float = 0.0
    #: The remaining amount of each grant, by its id.
    grants: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """The sum of the remaining grants; never negative."""
        return sum(self.grants.values())


def periods(entitlement: Document, at: float, until: int) -> list[Period]:
    """Return all periods that have begun by *at*; the last one goes to *until*."""
    own = entitlement["_"]
    interval = parse_interval(entitlement["usagePeriod"]["intervalISO"])
    preserve = entitlement["preserveOverageAtReset"]
    first = {"edge": own["measureFrom"], "anchor": own["anchor"], "preserve": False}
    resets = [first, *own["resets"]]
    resets = [reset for reset in resets if reset["edge"][0] <= at or reset is first]
    starts: list[tuple[Edge, bool, int]] = []
    for epoch, reset in enumerate(resets):
        starts.append((Edge(*reset["edge"]), reset["preserve"], epoch))
        last = at if reset is resets[-1] else resets[epoch + 1]["edge"][0] - 1
        recurrence = Recurrence(reset["anchor"], interval)
        starts += [
            (Edge(moment), preserve, epoch)
            for moment in recurrence.between(reset["edge"][0], last)
        ]
    ends = [*(start[0] for start in starts[1:]), Edge(until)]
    return [
        Period(edge, end, kept, epoch)
        for (edge, kept, epoch), end in zip(starts, ends, strict=True)
    ]


def current_period(entitlement: Document, at: float) -> tuple[int, int]:
    """Return the start and the end of the period of *at*, in Unix seconds."""
    start = periods(entitlement, at, math.ceil(at))[-1].start.time
    own = entitlement["_"]
    anchors = [r["anchor"] for r in own["resets"] if r["edge"][0] <= at]
    interval = parse_interval(entitlement["usagePeriod"]["intervalISO"])
    anchor = anchors[-1] if anchors else own["anchor"]
    return start, Recurrence(anchor, interval).end(max(at, start))


def burn_down(entitlement: Document, at: float, until: int, usage: Usage) -> Balance:
    """Return the balance of *at*.

    :param until: the end of the minute of *at*, whose usage counts as a whole.
    """
    grants = [_Grant(document) for document in entitlement["_"]["grants"]]
    # The order in which they are used up: priority, then the first to expire, then
    # the first that was made.
    grants.sort(key=lambda grant: (grant.priority, grant.expires))
    balance = Balance(Edge(0))
    for period in periods(entitlement, at, until):
        balance = _begin(balance, period, grants)
        _run(balance, period, grants, at, usage)
    return balance


class _Grant:
    """A grant, with its times in Unix seconds."""

    def __init__(self, document: Document) -> None:
        self.id = document["id"]
        self.amount = float(document["amount"])
        self.priority = document.get("priority", 1)
        self.epoch = document["_"]["epoch"]
        self.least = document["minRolloverAmount"]
        self.most = document["maxRolloverAmount"]
        self.effective = parse_time(document["effectiveAt"])
        expires = document.get("expiresAt")
        self.expires = parse_time(expires) if expires else math.inf
        self._recurs = document.get("recurrence")

    def renewals(self, after: int, until: float) -> list[int]:
        """Return the times at which the grant is renewed, the first time included."""
        until = min(until, self.expires - 1)
        moments = [self.effective] if after < self.effective <= until else []
        if self._recurs:
            interval = parse_interval(self._recurs["intervalISO"])
            recurrence = Recurrence(parse_time(self._recurs["anchor"]), interval)
            moments += recurrence.between(max(after, self.effective), until)
        return moments


def _begin(before: Balance, period: Period, grants: list[_Grant]) -> Balance:
    """Return the balance at the start of *period*: grants roll over."""
    balance = Balance(period.start)
    now = period.start.time
    for grant in grants:
        if grant.id in before.grants and now < grant.expires:
            left = max(before.grants[grant.id], grant.least)
            balance.grants[grant.id] = min(left, grant.most)
        elif grant.epoch <= period.epoch and grant.effective <= now < grant.expires:
            balance.grants[grant.id] = grant.amount
    if period.preserve:
        _burn(balance, before.overage, grants)
    return balance


def _run(
    balance: Balance, period: Period, grants: list[_Grant], at: float, usage: Usage
) -> None:
    """Burn the usage of *period*, change after change of the grants."""
    start = period.start.time
    last = min(at, period.end.time - 1)
    # A reset by hand ends a period within a second: what was granted earlier in that
    # second is of the period before.
    with_end = min(at, period.end.time) if period.end.seq else last
    renewals = {
        grant.id: grant.renewals(
            start, with_end if grant.epoch <= period.epoch else last
        )
        for grant in grants
    }
    moments = {moment for times in renewals.values() for moment in times}
    moments |= {int(g.expires) for g in grants if start < g.expires <= last}
    for moment in sorted(moments):
        _burn_until(balance, Edge(moment), grants, usage)
        for grant in grants:
            if moment in renewals[grant.id]:
                balance.grants[grant.id] = grant.amount
            elif grant.expires <= moment:
                balance.grants.pop(grant.id, None)
    _burn_until(balance, period.end, grants, usage)


def _burn_until(
    balance: Balance, end: Edge, grants: list[_Grant], usage: Usage
) -> None:
    used = usage(balance.start, end)
    # The overage comes first: a new grant covers it.
    owed, balance.overage = balance.overage, 0.0
    # A meter of the latest value can fall; what is burnt stays burnt.
    added = max(0.0, used - balance.usage)
    balance.usage = used
    _burn(balance, owed + added, grants)


def _burn(balance: Balance, amount: float, grants: list[_Grant]) -> None:
    for grant in grants:
        covered = min(amount, balance.grants.get(grant.id, 0.0))
        if covered > 0:
            balance.grants[grant.id] -= covered
            balance.burnt += covered
            amount -= covered
    balance.overage = amount
