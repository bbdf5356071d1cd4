"""The balance of an entitlement: grants, burnt down by usage, period after period."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from openmeter_wsgi.sandbox.cloudevent import parse_time
from openmeter_wsgi.sandbox.periods import Recurrence, parse_interval
from openmeter_wsgi.sandbox.readings import Edge

Document = dict[str, Any]
#: The usage between two edges.
Usage = Callable[[Edge, Edge], float]


class Period(NamedTuple):
    """One usage period, as far as it has come."""

    start: Edge
    end: Edge
    #: Whether what was used beyond the grants before is owed still.
    preserve: bool
    #: How many resets by hand came before: a grant made after one is not burnt by
    #: what was used before it, even within a second.
    epoch: int


@dataclass(slots=True)
class Balance:
    """What is left of the grants, and what was used, in the current period."""

    start: Edge
    usage: float = 0.0
    #: Used, and covered by no grant.
    overage: float = 0.0
    #: Used, and covered.
    burnt: float = 0.0
    #: What is left of each grant, by its id.
    grants: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """What is left of all grants; never negative."""
        return sum(self.grants.values())


def periods(entitlement: Document, at: float, until: int) -> list[Period]:
    """Return all periods that have begun by *at*; the last one goes to *until*."""
    own = entitlement["_"]
    interval = parse_interval(entitlement["usagePeriod"]["intervalISO"])
    preserve = entitlement["preserveOverageAtReset"]
    first = Reset(own["measureFrom"], own["anchor"], preserve=False)
    resets = [first, *(Reset(**reset) for reset in own["resets"])]
    resets = [reset for reset in resets if reset.edge[0] <= at or reset is first]
    starts: list[tuple[Edge, bool, int]] = []
    for epoch, reset in enumerate(resets):
        starts.append((Edge(*reset.edge), reset.preserve, epoch))
        last = at if reset is resets[-1] else resets[epoch + 1].edge[0] - 1
        recurrence = Recurrence(reset.anchor, interval)
        starts += [
            (Edge(moment), preserve, epoch)
            for moment in recurrence.between(reset.edge[0], last)
        ]
    ends = [*(start[0] for start in starts[1:]), Edge(until)]
    return [
        Period(edge, end, kept, epoch)
        for (edge, kept, epoch), end in zip(starts, ends, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Reset:
    """A period that was begun by hand."""

    edge: list[int]
    anchor: int
    preserve: bool


def current_period(entitlement: Document, at: float) -> tuple[int, int]:
    """Return when the period of *at* began and when it will end, in Unix seconds."""
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
        """Return when it is full again, or for the first time."""
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
    # What was owed comes first: a new grant covers it.
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
