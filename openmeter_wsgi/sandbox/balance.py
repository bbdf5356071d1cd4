"""The balance of an entitlement: its grants minus its usage.

`burn_down` computes it from the beginning: for each usage period, grants are renewed
or roll over, and usage *burns* them in the order of their priority. Usage that no grant
covers is *overage*.
"""

from __future__ import annotations

import calendar
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from openmeter_wsgi.sandbox.request_validation import (
    Document,
    Problem,
    parse_time,
    rfc3339,
)
from openmeter_wsgi.sandbox.usage import Edge

_NAMES = {"DAY": "P1D", "WEEK": "P1W", "MONTH": "P1M", "YEAR": "P1Y"}
_ISO = re.compile(
    r"P(?:(?P<years>\d+)Y)?(?:(?P<months>\d+)M)?(?:(?P<weeks>\d+)W)?(?:(?P<days>\d+)D)?"
    r"(?:T(?:(?P<hours>\d+)H)?(?:(?P<minutes>\d+)M)?(?:(?P<seconds>\d+)S)?)?",
    re.ASCII,
)
_SECONDS = {"weeks": 604_800, "days": 86_400, "hours": 3600, "minutes": 60}
#: Minimum length of a usage period in OpenMeter, in seconds.
SHORTEST = 3600
#: Seconds of the longest month.
_MONTH = 31 * 86_400
#: A time after all others, in Unix seconds.
NEVER = 2**40
#: Maximum length of an interval in months: a thousand years.
_LONGEST = 12_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A length of time; its months have the length of calendar months."""

    months: int
    seconds: int

    def after(self, moment: int, times: int) -> int:
        """Return the time *times* intervals after *moment*, in Unix seconds."""
        return _add_months(moment, self.months * times) + self.seconds * times

    @property
    def longest(self) -> int:
        """The maximum length of the interval in seconds."""
        return self.months * _MONTH + self.seconds


def _add_months(moment: int, months: int) -> int:
    """Return *moment* some months later; the last day of a month that is too short."""
    if not months:
        return moment
    date = datetime.fromtimestamp(moment, UTC)
    years, month = divmod(date.month - 1 + months, 12)
    year = date.year + years
    if not 1 <= year <= 9999:  # the range of Python's datetime
        return NEVER if years > 0 else -NEVER
    day = min(date.day, calendar.monthrange(year, month + 1)[1])
    return int(date.replace(year=year, month=month + 1, day=day).timestamp())


def parse_interval(text: str) -> Interval:
    """Parse *text*, a name or an ISO 8601 duration; answer 400 if it is invalid."""
    match = _ISO.fullmatch(_NAMES.get(text, text))
    if match is None and "." in text:
        raise Problem(501, f"the sandbox takes no fractions of a period: {text!r}")
    if match is None:
        raise Problem(400, f"failed to map interval: cannot parse period {text!r}")
    parts = {k: int(v) for k, v in match.groupdict("0").items()}
    seconds = sum(parts[name] * length for name, length in _SECONDS.items())
    months = parts["years"] * 12 + parts["months"]
    if months + seconds / _MONTH > _LONGEST:
        raise Problem(400, f"failed to map interval: {text} is too long")
    return Interval(months, seconds + parts["seconds"])


def recurring(period: dict[str, Any], now: float) -> dict[str, Any]:
    """Return the usage period of a request in the form of OpenMeter's responses."""
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
    """Round *moment* down to a minute, which is OpenMeter's resolution."""
    return int(moment // 60) * 60


@dataclass(frozen=True, slots=True)
class Recurrence:
    """The boundaries of periods: one interval apart, before and after the anchor."""

    anchor: int
    interval: Interval

    def start(self, moment: float) -> int:
        """Return the last boundary that is not after *moment*."""
        return self._boundary(self._index(moment))

    def end(self, moment: float) -> int:
        """Return the first boundary after *moment*."""
        return self._boundary(self._index(moment) + 1)

    def between(self, after: float, until: float) -> list[int]:
        """Return the boundaries after *after*, up to and including *until*."""
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
        # The first guess takes all months to be 31 days long. So it is too early after
        # the anchor and too late before it, by a few boundaries.
        index = int((moment - self.anchor) // self.interval.longest)
        while self._boundary(index) > moment:
            index -= 1
        while self._boundary(index + 1) <= moment:
            index += 1
        return index


#: A function that returns the usage between two edges.
Usage = Callable[[Edge, Edge], float]


class Period(NamedTuple):
    """A usage period. The current period ends at the time of the balance."""

    start: Edge
    end: Edge
    #: True if the overage of the previous period is carried over.
    preserve: bool
    #: The number of manual resets before the period. A grant has an epoch too: usage
    #: before a reset does not burn a grant made after it, even in the same second.
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
    """Return all periods that began at or before *at*; the last ends at *until*."""
    data = entitlement["_"]
    interval = parse_interval(entitlement["usagePeriod"]["intervalISO"])
    preserve = entitlement["preserveOverageAtReset"]
    first = {"edge": data["measureFrom"], "anchor": data["anchor"], "preserve": False}
    resets = [first, *data["resets"]]
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
    """Return the start and the end of the period that contains *at*."""
    start = periods(entitlement, at, math.ceil(at))[-1].start.time
    data = entitlement["_"]
    anchors = [r["anchor"] for r in data["resets"] if r["edge"][0] <= at]
    interval = parse_interval(entitlement["usagePeriod"]["intervalISO"])
    anchor = anchors[-1] if anchors else data["anchor"]
    return start, Recurrence(anchor, interval).end(max(at, start))


def burn_down(entitlement: Document, at: float, until: int, usage: Usage) -> Balance:
    """Return the balance at the time *at*.

    :param until: the end of the current minute, up to which usage counts.
    """
    grants = [_Grant(document) for document in entitlement["_"]["grants"]]
    # Grants are burnt by priority, then by expiry, then by creation (a stable sort).
    grants.sort(key=lambda grant: (grant.priority, grant.expires))
    balance = Balance(Edge(0))
    for period in periods(entitlement, at, until):
        balance = _start_period(balance, period, grants)
        _burn_period(balance, period, grants, at, usage)
    return balance


class _Grant:
    """A parsed grant: times are Unix seconds, missing members have their defaults."""

    def __init__(self, document: Document) -> None:
        self.id = document["id"]
        self.amount = float(document["amount"])
        self.priority = document.get("priority", 1)
        self.epoch = document["_"]["epoch"]
        self.min_rollover = document["minRolloverAmount"]
        self.max_rollover = document["maxRolloverAmount"]
        self.effective = parse_time(document["effectiveAt"])
        expires = document.get("expiresAt")
        self.expires = parse_time(expires) if expires else math.inf
        self._recurs = document.get("recurrence")

    def renewals(self, after: int, until: float) -> list[int]:
        """Return the times of its start and renewals, in the range (after, until]."""
        until = min(until, self.expires - 1)
        moments = [self.effective] if after < self.effective <= until else []
        if self._recurs:
            interval = parse_interval(self._recurs["intervalISO"])
            recurrence = Recurrence(parse_time(self._recurs["anchor"]), interval)
            moments += recurrence.between(max(after, self.effective), until)
        return moments


def _start_period(before: Balance, period: Period, grants: list[_Grant]) -> Balance:
    """Return the balance at the start of *period*, after the rollover of grants."""
    balance = Balance(period.start)
    now = period.start.time
    for grant in grants:
        if grant.id in before.grants and now < grant.expires:
            left = max(before.grants[grant.id], grant.min_rollover)
            balance.grants[grant.id] = min(left, grant.max_rollover)
        elif grant.epoch <= period.epoch and grant.effective <= now < grant.expires:
            balance.grants[grant.id] = grant.amount
    if period.preserve:
        _burn(balance, before.overage, grants)
    return balance


def _burn_period(
    balance: Balance, period: Period, grants: list[_Grant], at: float, usage: Usage
) -> None:
    """Burn the usage of *period*, in spans between the changes of the grants."""
    start = period.start.time
    last = min(at, period.end.time - 1)
    # A manual reset ends a period within a second: a grant made earlier in that second
    # belongs to the ended period.
    last_with_end = min(at, period.end.time) if period.end.seq else last
    renewals = {
        grant.id: grant.renewals(
            start, last_with_end if grant.epoch <= period.epoch else last
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
    # The overage is burnt again with the new usage: a new grant may cover it.
    overage, balance.overage = balance.overage, 0.0
    # The usage of a LATEST meter can decrease; burnt grants are not restored.
    added = max(0.0, used - balance.usage)
    balance.usage = used
    _burn(balance, overage + added, grants)


def _burn(balance: Balance, amount: float, grants: list[_Grant]) -> None:
    for grant in grants:
        covered = min(amount, balance.grants.get(grant.id, 0.0))
        if covered > 0:
            balance.grants[grant.id] -= covered
            balance.burnt += covered
            amount -= covered
    balance.overage = amount
