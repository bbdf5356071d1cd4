"""The gate of one policy: it decides, per request, if the request may begin.

`Gate.admit` runs in the thread of the request, before the application. It finds the
subject and its customer, and gets a decision from the entitlement service: a cached
answer of OpenMeter, or a new one. If the quota of a feature is counted down locally
(``entitlement_meters``), the gate then *reserves* an amount of it. When the response
has ended, `Gate.settle_reservations` replaces the reservation with the amount that is
billed. The *account* of a customer is the name under which its quotas are counted down.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec
from msgspec.structs import replace

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.cache import allow_nothing
from openmeter_wsgi.entitlements.decision import (
    Decision,
    Denial,
    denial_of,
    no_answer_decision,
)
from openmeter_wsgi.options import amounts as read_amounts
from openmeter_wsgi.quota.account import NotReserved
from openmeter_wsgi.request import record_of, reservations_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence

    from openmeter_wsgi.entitlements.cache import AllowFromCache, CachedAnswer
    from openmeter_wsgi.entitlements.service import EntitlementService
    from openmeter_wsgi.events import Meter
    from openmeter_wsgi.options import CountedMeter
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.quota.account import Reservation
    from openmeter_wsgi.request import RequestRecord
    from openmeter_wsgi.stats import Counts
    from openmeter_wsgi.subject import SubjectFinder

logger: Final = log.get_logger(__name__)


class Amounts:
    """The amounts that requests of one policy reserve and use, by counted feature.

    Any thread. The amounts of the policy's static meters are computed once, because
    most requests use only these. *account_of* returns the account of a subject.
    """

    def __init__(self, policy: Policy, account_of: Callable[[str], str]) -> None:
        self._meters = policy.entitlement_meters
        self._account_of = account_of
        self._static = policy.static_meters
        self._used_by_static = self._of(self._static)
        #: True if all static meters bill the subject of the request.
        self._static_is_of_subject = not any(meter.subject for meter in self._static)
        #: The option ``reserve``, if it is a callable.
        self._reserve = policy.reserve if callable(policy.reserve) else None
        #: The default amount to reserve for a request, by feature.
        self.default: dict[str, float] = {**self._used_by_static}
        if policy.reserve is not None and self._reserve is None:
            self.default.update(policy.reserve)  # type: ignore[arg-type]

    @property
    def are_constant(self) -> bool:
        """True if the same amounts are reserved for all requests."""
        return self._reserve is None

    def to_reserve(self, environ: MutableMapping[str, Any]) -> Mapping[str, float]:
        """Return the amounts to reserve for the request of *environ*, by feature."""
        if self._reserve is None:
            return self.default
        try:
            return {**self.default, **read_amounts(self._reserve(environ))}  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - the user's code, on our path
            logger.error("reserve: %r raised %r; the default amounts are reserved",
                         self._reserve, error)  # fmt: skip
            return self.default

    def used(
        self, meters: Sequence[Meter], subject: str | None
    ) -> dict[tuple[str, str], float]:
        """Return the amounts that *meters* use, by account and feature.

        *subject* is the subject of the meters that name none.
        """
        if subject and self._static_is_of_subject and meters == self._static:
            account = self._account(subject)
            return {
                (account, feature): amount
                for feature, amount in self._used_by_static.items()
                if account is not None
            }
        used: defaultdict[tuple[str, str], float] = defaultdict(float)
        for meter in meters:
            amounts = self._of((meter,))
            user = meter.subject or subject
            if amounts and user and (account := self._account(user)):
                for feature, amount in amounts.items():
                    used[account, feature] += amount
        return used

    def _account(self, subject: str) -> str | None:
        """Return the account of *subject*, None if the policy's callable fails."""
        try:
            return self._account_of(subject)
        except Exception as error:  # noqa: BLE001 - the user's code, on our path
            logger.error("customer: raised %r; the usage of subject %r is billed, but "
                         "not counted down", error, subject)  # fmt: skip
            return None

    def _of(self, meters: Iterable[Meter]) -> dict[str, float]:
        """Return the amounts that *meters* use, by feature."""
        return {
            feature: amount
            for feature, counted in self._meters.items()
            if (amount := amount_of(meters, counted))
        }


def amount_of(meters: Iterable[Meter], counted: CountedMeter) -> float:
    """Return the sum of the property of *counted* over the *meters* of its type."""
    return math.fsum(
        _number(meter, counted.property)
        for meter in meters
        if meter.type == counted.type
    )


def _number(meter: Meter, name: str) -> float:
    """Return the number at *name* in the data of *meter*, or 1 without such a name.

    As in OpenMeter, text counts as the number it contains. A value that is no positive
    number counts as 0.
    """
    value = msgspec.json.decode(meter.data).get(name, 1)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0


Environ: TypeAlias = dict[str, Any]

_NO_SUBJECT = Decision(False, (Denial("", "no_subject"),), source="request")
_NOTHING_REQUIRED = Decision(True, source="request")
#: Minimum seconds in Retry-After; by then a reservation may have been released.
_MIN_RETRY = 1.0
#: Maximum seconds in Retry-After while OpenMeter does not show all usage yet.
_MAX_RETRY = 30.0


class Gate:
    """The decisions on the requests of one policy. One process, any thread."""

    def __init__(
        self,
        policy: Policy,
        entitlements: EntitlementService,
        *,
        subjects: SubjectFinder,
        counts: Counts,
    ) -> None:
        self.policy = policy
        self.required: tuple[str, ...] = policy.required_entitlements
        self._entitlements = entitlements
        self._find_subject = subjects.find
        self._customer_of = customer_finder(policy)
        self._counts = counts
        self._countdown = entitlements.countdown
        self._amounts = Amounts(policy, self._account_of)
        #: True if at least one required feature is counted down.
        self._is_counted = not self._countdown.meters.keys().isdisjoint(self.required)
        #: Fast path: returns True if the request may begin. If False, `admit` decides.
        self.is_allowed_by_cache: AllowFromCache = allow_nothing
        #: Fast path of `admit` for exactly one required feature that is counted down
        #: by a constant amount: returns the cached decision on a customer, or None.
        self._fresh_decision = None
        if len(self.required) != 1 or policy.customer:
            return
        (feature,) = self.required
        if not self._is_counted:
            self.is_allowed_by_cache = entitlements.allow_from_cache(
                feature,
                find_subject=subjects.find,
                anonymous=subjects.anonymous,
                counts=counts,
            )
        elif self._amounts.are_constant and not policy.usage_headers:
            self._fresh_decision = entitlements.fresh_decisions(feature)

    def admit(self, environ: Environ) -> Decision:
        """Return the decision on a request that is about to begin. Never raises."""
        if (
            self._fresh_decision is not None
            and (subject := self._find_subject(environ))
            and (decision := self._fresh_decision(subject))
            and decision.allowed
            and self._reserve_default(environ, subject)
        ):
            record_of(environ).decision = decision
            self._counts.allowed["cache"] += 1
            return decision
        return self.check(environ, self.required)

    def check(
        self,
        environ: Environ,
        features: Iterable[str],
        reserve: Mapping[str, float] | None = None,
    ) -> Decision:
        """Return the decision on the use of all *features* by the request's subject.

        *reserve* contains the amounts to reserve, by feature, instead of the policy's.

        :raises ValueError: if a value in *reserve* is not a valid amount.
        """
        if reserve is not None:
            reserve = read_amounts(reserve)
        names = tuple(dict.fromkeys(features))
        if not names:
            return _NOTHING_REQUIRED
        subject = self._find_subject(environ)
        decision = _NO_SUBJECT
        if subject is not None:
            decision = self._decide(environ, subject, names, reserve)
        record_of(environ).decision = decision
        self._count_and_log(decision, subject)
        return decision

    def _decide(
        self,
        environ: Environ,
        subject: str,
        features: tuple[str, ...],
        reserve: Mapping[str, float] | None,
    ) -> Decision:
        try:
            customer = self._customer_of(subject)
        except Exception as error:  # noqa: BLE001 - the user's code, on our path
            logger.error("customer: raised %r; fail_mode decides a request of subject "
                         "%r", error, subject)  # fmt: skip
            return no_answer_decision(features, self.policy.fail_mode)
        if not customer:
            denied = tuple(Denial(feature, "unknown_customer") for feature in features)
            return Decision(False, denied, source="request")
        decision = self._entitlements.decide(customer, features, self.policy.fail_mode)
        if not decision.allowed or not self._countdown.meters:
            return decision
        amounts = self._amounts.to_reserve(environ) if reserve is None else reserve
        counted = [name for name in features if name in self._countdown.meters]
        return self._reserve(environ, customer, counted, amounts, decision)

    def invalidate(self, subject: str, feature: str | None = None) -> None:
        """Remove OpenMeter's answers about *subject* from the cache."""
        self._entitlements.invalidate(self._customer_of(subject) or subject, feature)

    # -- Local quotas

    def _account_of(self, subject: str) -> str:
        """Return the account of a subject; raises if the policy's callable does."""
        customer = self._customer_of(subject) or subject
        return self._entitlements.account(customer)

    def _reserve_default(self, environ: Environ, customer: str) -> bool:
        """Reserve the default amount of the one feature; return True if that works."""
        (feature,) = self.required
        request = record_of(environ)
        if request.reserved is not None:  # `check` replaces the earlier reservation
            return False
        # The cached answer may have changed since `admit` read it: check it again.
        cached = self._entitlements.cached_answer(customer, feature)
        if cached is None or not cached.decision.allowed:
            return False
        if cached.counts_down:
            amount = self._amounts.default.get(feature, 0.0)
            account = self._entitlements.account(customer)
            outcome = self._countdown.reserve(account, feature, amount)
            if isinstance(outcome, NotReserved):
                return False
            request.reserved = {feature: outcome}
        return True

    def settle_reservations(
        self, request: RequestRecord, meters: Sequence[Meter], subject: str | None
    ) -> None:
        """Replace the reservations of a request with the usage in *meters*."""
        reserved, request.reserved = request.reserved or {}, None
        self._countdown.settle(reserved.values(), self._amounts.used(meters, subject))

    def _reserve(
        self,
        environ: Environ,
        customer: str,
        features: Iterable[str],
        amounts: Mapping[str, float],
        decision: Decision,
    ) -> Decision:
        """Reserve *amounts* of *features*; return *decision*, or a denial.

        A second reservation for the same request replaces the first. If one feature is
        refused, nothing changes.
        """
        reserved = reservations_of(environ)
        new: dict[str, Reservation] = {}
        account = self._entitlements.account(customer)
        for feature in features:
            cached = self._entitlements.cached_answer(customer, feature)
            if cached is not None and _denies(cached):
                # This answer came after *decision*.
                _release(new)
                return cached.decision
            if cached is None or not cached.counts_down:
                continue
            if feature in reserved and feature not in amounts:
                continue  # its earlier reservation stays
            outcome = self._countdown.reserve(
                account, feature, amounts.get(feature, 0.0)
            )
            if isinstance(outcome, NotReserved):
                _release(new)
                return self._limit_reached(
                    customer, feature, cached, held_back=outcome.held_back
                )
            new[feature] = outcome
        for feature, reservation in new.items():
            if (before := reserved.get(feature)) is not None:
                before.settle(0.0)
            reserved[feature] = reservation
        return self._with_remaining(account, decision)

    def _limit_reached(
        self, customer: str, feature: str, cached: CachedAnswer, *, held_back: bool
    ) -> Decision:
        """Return the denial of a quota that is used up by the local count.

        If OpenMeter's answer is older than ``deny_ttl``, ask for a new one, which may
        differ. *held_back*: enough would be left without the reservations of others.
        """
        oldest = time.monotonic() - self.policy.deny_ttl
        if cached.asked_at < oldest:
            self._entitlements.refresh(customer, feature, since=oldest)
        # In a new period the next answer brings a new balance.
        is_period_over = cached.terms is not None and cached.terms.is_over(time.time())
        wait = _MIN_RETRY if held_back or is_period_over else self._until_visible()
        denial = denial_of(feature, cached.answer, "limit_reached", time.time() + wait)
        quota = cached.decision.quota and replace(cached.decision.quota, remaining=0.0)
        return Decision(
            False,
            (denial,),
            source="countdown",
            answered_at=cached.asked_at,
            quota=quota,
        )

    def _until_visible(self) -> float:
        """Return the seconds until a new answer may contain all usage counted here.

        Within ``deny_ttl`` no new answer is asked for.
        """
        lag = self._entitlements.visibility_lag
        if lag is None:
            lag = self.policy.visibility_lag
        return min(max(lag, self.policy.deny_ttl, _MIN_RETRY), _MAX_RETRY)

    def _with_remaining(self, account: str, decision: Decision) -> Decision:
        """Return *decision* with the locally counted amount left, for the headers."""
        quota = decision.quota
        if not self.policy.usage_headers or quota is None:
            return decision
        if quota.feature not in self._countdown.meters:
            return decision
        remaining = self._countdown.remaining(account, quota.feature)
        return replace(decision, quota=replace(quota, remaining=remaining))

    # -- Counts and log

    def _count_and_log(self, decision: Decision, subject: str | None) -> None:
        """Count a decision, and log its denials."""
        counts = self._counts
        if decision.allowed and not decision.denied:
            counts.allowed[decision.source] += 1
            return
        passes = decision.allowed or not self.policy.enforce
        by_reason = counts.let_through if passes else counts.denied
        by_source = counts.let_through_by_source if passes else counts.denied_by_source
        by_source[decision.source] += 1
        for denial in decision.denied:
            by_reason[denial.reason] += 1
            _log_denial(denial, subject, passes=passes)


def _denies(cached: CachedAnswer) -> bool:
    """Return True if *cached* denies and is not too old to be used."""
    return not cached.decision.allowed and time.monotonic() < cached.usable_until


def _release(reservations: Mapping[str, Reservation]) -> None:
    for reservation in reservations.values():
        reservation.settle(0.0)


def _log_denial(denial: Denial, subject: str | None, *, passes: bool) -> None:
    # A denial is normal. A request that passes without access is not: its warning is
    # written once a minute for all subjects.
    if passes:
        logger.warning(
            "%s: subject %r is let through%s",
            f"feature {denial.feature!r}, {denial.reason}",
            subject, _figures(denial),
        )  # fmt: skip
    else:
        logger.info(
            "%s: %s, denied%s",
            f"subject {subject!r}, feature {denial.feature!r}",
            denial.reason, _figures(denial),
        )  # fmt: skip


def _figures(denial: Denial) -> str:
    """Return the known amounts of a denial for the log, in parentheses."""
    amounts = {name: getattr(denial, name) for name in ("balance", "usage", "overage")}
    known = [f"{name} {n:g}" for name, n in amounts.items() if n is not None]
    return f" ({', '.join(known)})" if known else ""


def customer_finder(policy: Policy) -> Callable[[str], str | None]:
    """Return a function that maps a subject to the key of its customer, or None."""
    customer = policy.customer
    if customer is None:
        return lambda subject: subject
    return customer if callable(customer) else customer.get
