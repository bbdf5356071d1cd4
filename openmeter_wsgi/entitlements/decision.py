"""The decision on one request: a `Decision` with its denials and its quota."""

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

#: ``no_access``: OpenMeter denies access. ``limit_reached``: the quota is used up.
#: ``unknown_customer``: OpenMeter has no such customer. ``no_subject``: the request
#: names no subject. ``unavailable``: OpenMeter gives no answer. ``busy``: the queue of
#: questions to OpenMeter is too long, or OpenMeter has answered 429.
Reason: TypeAlias = Literal[
    "no_access", "limit_reached", "unknown_customer", "no_subject", "unavailable",
    "busy",
]  # fmt: skip
#: ``openmeter``: an answer of OpenMeter to this request. ``cache``: a cached answer.
#: ``stale``: a cached answer that has expired. ``countdown``: the local quota.
#: ``fail_mode``: no answer. ``request``: the request alone, without a question.
DecisionSource: TypeAlias = Literal[
    "openmeter", "cache", "stale", "countdown", "fail_mode", "request"
]


class Denial(msgspec.Struct, frozen=True):
    """The denial of one feature."""

    #: The feature's key; empty if the request names no subject.
    feature: str
    #: The reason.
    reason: Reason
    #: The balance of a metered feature, None if OpenMeter did not state it.
    balance: float | None = None
    #: The usage in this period, None if OpenMeter did not state it.
    usage: float | None = None
    #: The usage beyond the limit, None if OpenMeter did not state it.
    overage: float | None = None
    #: The wall-clock time from which a retry makes sense, None if unknown.
    retry_at: float | None = None

    @property
    def retry_after(self) -> int | None:
        """Seconds from now until `retry_at`, at least 1."""
        if self.retry_at is None:
            return None
        return max(math.ceil(self.retry_at - time.time()), 1)


class Decision(msgspec.Struct, frozen=True):
    """The decision on a request, with the denials behind it."""

    #: True if the request may begin.
    allowed: bool
    #: The denied features. Not empty if ``fail_mode`` allowed the request.
    denied: tuple[Denial, ...] = ()
    #: The source of the decision.
    source: DecisionSource = "openmeter"
    #: The monotonic time at which the oldest answer used was asked for.
    answered_at: float | None = None
    #: The quota of the metered feature with the least left, None if none is metered.
    quota: Quota | None = None
    #: The values of static entitlements: pairs of feature and JSON text.
    static_values: tuple[tuple[str, str], ...] = ()

    @property
    def config(self) -> Any:
        """The value of the static entitlement, None unless there is exactly one."""
        configs = self.configs
        return next(iter(configs.values())) if len(configs) == 1 else None

    @property
    def configs(self) -> dict[str, Any]:
        """The values of all static entitlements, by feature.

        Each call returns a new copy, which the handler may change.
        """
        return {name: msgspec.json.decode(text) for name, text in self.static_values}

    @property
    def age(self) -> float | None:
        """Seconds since the answer was asked for, None if no answer was used."""
        if self.answered_at is None:
            return None
        return max(time.monotonic() - self.answered_at, 0.0)


class Quota(msgspec.Struct, frozen=True):
    """The quota of a metered feature."""

    feature: str
    limit: float | None
    remaining: float
    #: The wall-clock time at which the usage period ends.
    period_end: float | None = None

    @property
    def reset(self) -> int | None:
        """Seconds from now until `period_end`."""
        if self.period_end is None:
            return None
        return max(math.ceil(self.period_end - time.time()), 0)


def no_answer_decision(
    features: Iterable[str], fail_mode: FailMode, busy_for: float | None = None
) -> Decision:
    """Return the decision of *fail_mode* on features without any answer.

    *busy_for*: seconds until an answer is expected if the reason is ``busy``, or None.
    """
    reason: Reason = "unavailable" if busy_for is None else "busy"
    retry_at = None if busy_for is None else time.time() + busy_for
    denied = tuple(Denial(feature, reason, retry_at=retry_at) for feature in features)
    return Decision(fail_mode != "closed", denied, source="fail_mode")


#: From the most to the least reliable source.
_SOURCES: tuple[DecisionSource, ...] = (
    "request", "openmeter", "cache", "countdown", "stale", "fail_mode",
)  # fmt: skip


def combined(decisions: Sequence[Decision]) -> Decision:
    """Return one decision on all features of *decisions*."""
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
    """Return the denial of *feature* by *answer*.

    *reason* replaces the reason that follows from *answer*.
    """
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
    """Return one shared denial: made-up customer names must not cost memory."""
    return Denial(feature, "unknown_customer")


def denial_reason(answer: Answer) -> Reason:
    """Return the reason for which *answer* denies."""
    if not answer.known_customer:
        return "unknown_customer"
    # OpenMeter states no reason. Only metered entitlements have a balance or usage.
    has_numbers = answer.balance is not None or answer.usage is not None
    return "limit_reached" if has_numbers or answer.is_metered else "no_access"
