"""The decision on one request, and its reason."""

from __future__ import annotations

import functools
import math
import time
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from openmeter_wsgi.entitlements.client import Answer
    from openmeter_wsgi.policy import FailMode

#: ``no_access``: OpenMeter says no. ``limit_reached``: the quota is used up.
#: ``unknown_customer``: OpenMeter has no such customer. ``no_subject``: nobody was
#: named who could be asked for. ``unavailable``: there is no answer. ``busy``: too
#: many customers wait in line to be asked for.
Reason: TypeAlias = Literal[
    "no_access", "limit_reached", "unknown_customer", "no_subject", "unavailable",
    "busy",
]  # fmt: skip
#: ``openmeter``: asked just now. ``cache``: a known answer. ``stale``: one that has
#: outlived its time. ``countdown``: counted from a known balance. ``fail_mode``: there
#: was no answer. ``request``: nothing had to be asked.
DecisionSource: TypeAlias = Literal[
    "openmeter", "cache", "stale", "countdown", "fail_mode", "request"
]


class Denial(msgspec.Struct, frozen=True):
    """One feature that was denied, and what is known of it."""

    #: Its key; empty where the request names nobody.
    feature: str
    #: Why.
    reason: Reason
    #: The balance of a metered feature, as far as OpenMeter said it …
    balance: float | None = None
    #: … what was used of it …
    usage: float | None = None
    #: … and what beyond the limit.
    overage: float | None = None
    #: The wall clock's time from which on asking again makes sense, where it is known.
    retry_at: float | None = None

    @property
    def retry_after(self) -> int | None:
        """The seconds from now until `retry_at`, at least one."""
        if self.retry_at is None:
            return None
        return max(math.ceil(self.retry_at - time.time()), 1)


class Decision(msgspec.Struct, frozen=True):
    """The decision on a request: it may pass, or not, and why."""

    #: Let it through, or not.
    allowed: bool
    #: The denials. Not empty although allowed: the fail mode let it through.
    denied: tuple[Denial, ...] = ()
    #: Its source.
    source: DecisionSource = "openmeter"
    #: The monotonic time of the oldest answer in it.
    answered_at: float | None = None
    #: Of the feature of which least is left: what was granted, what remains, and the
    #: seconds until it is granted anew. None where nothing is metered.
    quota: Quota | None = None
    #: The values of static entitlements as OpenMeter sends them: feature and JSON text.
    static_values: tuple[tuple[str, str], ...] = ()

    @property
    def config(self) -> Any:
        """The value of the static entitlement; None unless there is exactly one."""
        configs = self.configs
        return next(iter(configs.values())) if len(configs) == 1 else None

    @property
    def configs(self) -> dict[str, Any]:
        """The values of all static entitlements in it, by feature.

        Each call returns values of its own, which the handler may change.
        """
        return {name: msgspec.json.decode(text) for name, text in self.static_values}

    @property
    def age(self) -> float | None:
        """The seconds since OpenMeter said so, None if it said nothing."""
        if self.answered_at is None:
            return None
        return max(time.monotonic() - self.answered_at, 0.0)


class Quota(msgspec.Struct, frozen=True):
    """The quota of a metered feature."""

    feature: str
    limit: float | None
    remaining: float
    #: The wall clock's time at which the usage period ends.
    period_end: float | None = None

    @property
    def reset(self) -> int | None:
        """The seconds from now until `period_end`."""
        if self.period_end is None:
            return None
        return max(math.ceil(self.period_end - time.time()), 0)


def undecided(
    features: Iterable[str], fail_mode: FailMode, busy_for: float | None = None
) -> Decision:
    """Return the decision where nothing is known and there is no answer.

    *busy_for*: the seconds after which there will be one, as the line is so long.
    """
    reason: Reason = "unavailable" if busy_for is None else "busy"
    retry_at = None if busy_for is None else time.time() + busy_for
    denied = tuple(Denial(feature, reason, retry_at=retry_at) for feature in features)
    return Decision(fail_mode != "closed", denied, source="fail_mode")


#: The source of which least can be said comes last.
_SOURCES: tuple[DecisionSource, ...] = (
    "request", "openmeter", "cache", "countdown", "stale", "fail_mode",
)  # fmt: skip


def together(decisions: Sequence[Decision]) -> Decision:
    """Return the decision that several features make together."""
    if len(decisions) == 1:
        return decisions[0]
    times = [d.answered_at for d in decisions if d.answered_at is not None]
    quotas = [d.quota for d in decisions if d.quota is not None]
    sources = {d.source for d in decisions}
    return Decision(
        False not in [d.allowed for d in decisions],
        tuple([denial for d in decisions for denial in d.denied]),
        source=max(sources, key=_SOURCES.index),
        answered_at=min(times, default=None),
        quota=min(quotas, key=lambda quota: quota.remaining, default=None),
        static_values=tuple([pair for d in decisions for pair in d.static_values]),
    )


def denial_of(
    feature: str,
    answer: Answer,
    reason: Reason | None = None,
    retry_at: float | None = None,
) -> Denial:
    """Return the denial of *feature*, for the reason that *answer* has or another."""
    if not answer.known_customer:
        return _unknown_customer(feature)
    return Denial(
        feature,
        reason or denial_reason(answer),
        balance=answer.balance,
        usage=answer.usage,
        overage=answer.overage,
        retry_at=retry_at,
    )


@functools.cache
def _unknown_customer(feature: str) -> Denial:
    """Return the one denial for all whose names anybody can make up."""
    return Denial(feature, "unknown_customer")


def denial_reason(answer: Answer) -> Reason:
    """Return why *answer* denies."""
    if not answer.known_customer:
        return "unknown_customer"
    # The value carries no reason: only a metered entitlement has these.
    has_numbers = answer.balance is not None or answer.usage is not None
    return "limit_reached" if has_numbers or answer.is_metered else "no_access"
