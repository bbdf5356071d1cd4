"""The gate of one policy: from a request to the decision on it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec
from msgspec.structs import replace

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.cache import allow_nothing
from openmeter_wsgi.entitlements.decision import Decision, Denial, denial_of, undecided
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
    """The amounts that requests of one policy use of features that are counted down.

    Any thread. What the policy's own meters say is worked out once: it is all that
    most requests use.
    """

    def __init__(
        self, policy: Policy, customer_of: Callable[[str], str | None]
    ) -> None:
        self._meters = policy.entitlement_meters
        self._customer_of = customer_of
        self._static = policy.static_meters
        self._used_by_static = self._of(self._static)
        self._static_is_of_subject = not any(meter.subject for meter in self._static)
        #: The callable that returns the amounts for a request, if they differ.
        self._reserve = policy.reserve if callable(policy.reserve) else None
        #: The amounts that are set apart for a request, by feature.
        self.fast_paths: dict[str, float] = {**self._used_by_static}
        if policy.reserve is not None and self._reserve is None:
            self.fast_paths.update(policy.reserve)  # type: ignore[arg-type]

    @property
    def are_usual(self) -> bool:
        """True if the same is set apart for all requests."""
        return self._reserve is None

    def to_reserve(self, environ: MutableMapping[str, Any]) -> Mapping[str, float]:
        """Return what is set apart for the request of *environ*, by feature."""
        if self._reserve is None:
            return self.fast_paths
        try:
            return {**self.fast_paths, **read_amounts(self._reserve(environ))}  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - the user's code, on our path
            logger.error("reserve: %r raised %r; nothing is set apart",
                         self._reserve, error)  # fmt: skip
            return self.fast_paths

    def used(
        self, meters: Sequence[Meter], subject: str | None
    ) -> dict[tuple[str, str], float]:
        """Return what *meters* use, by customer and feature."""
        if subject and self._static_is_of_subject and meters == self._static:
            customer = self._customer(subject)
            return {
                (customer, feature): amount
                for feature, amount in self._used_by_static.items()
            }
        used: defaultdict[tuple[str, str], float] = defaultdict(float)
        for meter in meters:
            if who := meter.subject or subject:
                for feature, amount in self._of((meter,)).items():
                    used[self._customer(who), feature] += amount
        return used

    def _customer(self, subject: str) -> str:
        try:
            return self._customer_of(subject) or subject
        except Exception as error:  # noqa: BLE001 - the user's code, on our path
            # What is billed does not depend on it.
            logger.error("customer: raised %r; no quota is counted down for it", error)
            return subject

    def _of(self, meters: Iterable[Meter]) -> dict[str, float]:
        return {
            feature: amount
            for feature, counted in self._meters.items()
            if (amount := amount_of(meters, counted))
        }


def amount_of(meters: Iterable[Meter], counted: CountedMeter) -> float:
    """Return the usage in *meters* of the feature that counts *counted*."""
    return math.fsum(
        _number(meter, counted.property)
        for meter in meters
        if meter.type == counted.type
    )


def _number(meter: Meter, name: str) -> float:
    """Return the number in the data of an event, 1 where it has none of that name.

    Text counts as the number that it says, as it does in OpenMeter; what says none
    is left out there, too.
    """
    value = msgspec.json.decode(meter.data).get(name, 1)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0


Environ: TypeAlias = dict[str, Any]

_NO_SUBJECT = Decision(False, (Denial("", "no_subject"),), source="request")
#: Where no feature is named there is nothing to ask, and nobody to ask for.
_NOTHING_REQUIRED = Decision(True, source="request")
#: Seconds after which a reservation of another request may have come back.
_SOON = 1.0
#: Longer than this no client is sent away for usage that OpenMeter does not show yet.
_LONGEST = 30.0


class Gate:
    """Decides which requests of one policy may pass. One process, any thread."""

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
        self._is_counted = not self._countdown.meters.keys().isdisjoint(self.required)
        #: True if a request is let through at once; if not, `admit` decides.
        self.passes: AllowFromCache = allow_nothing
        #: What finds the decision on the one feature that is needed, if what requests
        #: usually use of it is counted down.
        self._fresh = None
        if len(self.required) != 1 or policy.customer:
            return
        (feature,) = self.required
        if not self._is_counted:
            self.passes = entitlements.passing(
                feature,
                find_subject=subjects.find,
                anonymous=subjects.anonymous,
                counts=counts,
            )
        elif self._amounts.are_usual and not policy.usage_headers:
            self._fresh = entitlements.fresh(feature)

    def admit(self, environ: Environ) -> Decision:
        """Decide whether a request may begin. Never raises."""
        if (
            self._fresh is not None
            and (subject := self._find_subject(environ))
            and (decision := self._fresh(subject))
            and decision.allowed
            and self._counts_one(environ, subject)
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
        """Decide whether the subject of *environ* may use *features*, all of them.

        *reserve* says how much is set apart of a counted feature, in place of what
        the policy says.

        :raises ValueError: if an amount in *reserve* is none.
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
        self._account_for(decision, subject)
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
            logger.error("customer: raised %r; nobody can be asked for", error)
            return undecided(features, self.policy.fail_mode)
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
        """Forget what OpenMeter said of *subject*."""
        self._entitlements.invalidate(self._customer_of(subject) or subject, feature)

    # -- Counting down

    def _account_of(self, subject: str) -> str:
        customer = self._customer_of(subject) or subject
        return self._entitlements.account(customer)

    def _counts_one(self, environ: Environ, customer: str) -> bool:
        """Set apart what a request usually uses of the one feature, if it is there."""
        (feature,) = self.required
        known = self._entitlements.known(customer, feature)
        # Perhaps another answer than the one that let the request pass: a newer one.
        request = record_of(environ)
        if known is None or not known.decision.allowed or request.reserved is not None:
            return False
        if known.counts_down:
            amount = self._amounts.fast_paths.get(feature, 0.0)
            account = self._entitlements.account(customer)
            outcome = self._countdown.reserve(account, feature, amount)
            if isinstance(outcome, NotReserved):
                return False
            request.reserved = {feature: outcome}
        return True

    def settle(
        self, request: RequestRecord, meters: Sequence[Meter], subject: str | None
    ) -> None:
        """Let what the request has reserved become what it is billed: *meters*."""
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
        held = reservations_of(environ)
        taken: dict[str, Reservation] = {}
        account = self._entitlements.account(customer)
        for feature in features:
            known = self._entitlements.known(customer, feature)
            if known is not None and _denies(known):
                # It came after the decision: without a balance nothing would count.
                _give_back(taken)
                return known.decision
            if known is None or not known.counts_down:
                continue
            if feature in held and feature not in amounts:
                continue
            outcome = self._countdown.reserve(
                account, feature, amounts.get(feature, 0.0)
            )
            if isinstance(outcome, NotReserved):
                _give_back(taken)
                return self._refused(
                    customer, feature, known, held_back=outcome.held_back
                )
            taken[feature] = outcome
        for feature, reservation in taken.items():
            if (before := held.get(feature)) is not None:
                before.settle(0.0)
            held[feature] = reservation
        return self._with_remaining(account, decision)

    def _refused(
        self, customer: str, feature: str, known: CachedAnswer, *, held_back: bool
    ) -> Decision:
        """Deny what only we count so far: the next answer will say so, or not."""
        policy = self.policy
        newest = time.monotonic() - policy.deny_ttl
        if known.asked_at < newest:
            self._entitlements.refresh(customer, feature, since=newest)
        # The answer for the new period is being fetched.
        is_over = known.terms is not None and known.terms.is_over(time.time())
        wait = _SOON if held_back or is_over else self._until_visible()
        denial = denial_of(feature, known.answer, "limit_reached", time.time() + wait)
        quota = known.decision.quota and replace(known.decision.quota, remaining=0.0)
        return Decision(
            False,
            (denial,),
            source="countdown",
            answered_at=known.asked_at,
            quota=quota,
        )

    def _until_visible(self) -> float:
        """Return the seconds until an answer may say more than is counted here.

        No other is asked for within ``deny_ttl``.
        """
        lag = self._entitlements.visibility_lag
        if lag is None:
            lag = self.policy.visibility_lag
        return min(max(lag, self.policy.deny_ttl, _SOON), _LONGEST)

    def _with_remaining(self, account: str, decision: Decision) -> Decision:
        quota = decision.quota
        if not self.policy.usage_headers or quota is None:
            return decision
        if quota.feature not in self._countdown.meters:
            return decision
        remaining = self._countdown.remaining(account, quota.feature)
        return replace(decision, quota=replace(quota, remaining=remaining))

    # -- Counting and telling

    def _account_for(self, decision: Decision, subject: str | None) -> None:
        counts = self._counts
        if decision.allowed and not decision.denied:
            counts.allowed[decision.source] += 1
            return
        passes = decision.allowed or not self.policy.enforce
        told = counts.let_through if passes else counts.denied
        by_source = counts.let_through_by_source if passes else counts.denied_by_source
        by_source[decision.source] += 1
        for denial in decision.denied:
            told[denial.reason] += 1
            _tell(denial, subject, passes=passes)


def _denies(known: CachedAnswer) -> bool:
    """Say whether it is a denial, and of an age at which the fail mode has no say."""
    return not known.decision.allowed and time.monotonic() < known.usable_until


def _give_back(taken: Mapping[str, Reservation]) -> None:
    for reservation in taken.values():
        reservation.settle(0.0)


def _tell(denial: Denial, subject: str | None, *, passes: bool) -> None:
    # A denial is expected. A request that is let through without access is not; its
    # line is repeated once a minute, whoever the subject is.
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
    """Return the figures of a denial that are known, in parentheses."""
    figures = {name: getattr(denial, name) for name in ("balance", "usage", "overage")}
    known = [f"{name} {n:g}" for name, n in figures.items() if n is not None]
    return f" ({', '.join(known)})" if known else ""


def customer_finder(policy: Policy) -> Callable[[str], str | None]:
    """Return what maps a subject to the key of its customer."""
    customer = policy.customer
    if customer is None:
        return lambda subject: subject
    return customer if callable(customer) else customer.get
