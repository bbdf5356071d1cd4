"""The cache of entitlement answers, and requests that it allows at once."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.decision import (
    Decision,
    Denial,
    Quota,
    denial_of,
    denial_reason,
)
from openmeter_wsgi.request import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.entitlements.client import Answer, Terms
    from openmeter_wsgi.request import RequestRecord
    from openmeter_wsgi.stats import Counts
    from openmeter_wsgi.subject import FindSubject

logger: Final = log.get_logger(__name__)


#: An allowance that has outlived its time is still given for as long again, while it
#: is asked for anew behind the request's back.
_GRACE = 2.0


#: Answers that a process keeps of each feature, and customers that it keeps of lookups.
CACHE_SIZE = 10_000


class Lifetimes(NamedTuple):
    """Seconds for which an answer holds."""

    allow: float
    deny: float
    #: How much longer it holds when OpenMeter cannot be asked.
    max_stale: float


class CachedAnswer:
    """One answer, and what follows from it. Any thread; nothing but `used` changes.

    Times are monotonic, in seconds. Its lifetime is *at_least* and *at_most* so many.
    """

    __slots__ = (
        "answer", "asked_at", "counts_down", "decision", "fresh_until",
        "graceful_until", "terms", "terms_at", "usable_until", "used",
    )  # fmt: skip

    def __init__(
        self,
        feature: str,
        answer: Answer,
        terms: Terms | None,
        *,
        asked_at: float,
        terms_at: float,
        lifetimes: Lifetimes,
        at_most: float = math.inf,
        at_least: float = 0.0,
    ) -> None:
        self.answer: Answer = answer
        self.terms: Terms | None = terms
        self.terms_at: float = terms_at
        self.asked_at: float = asked_at
        lifetime = lifetimes.allow if answer.has_access else lifetimes.deny
        lifetime = min(max(lifetime, at_least), at_most)
        self.fresh_until: float = asked_at + lifetime
        # A denial is never given away on suspicion: its customer may have paid.
        self.graceful_until: float = asked_at + lifetime * (
            _GRACE if answer.has_access else 1
        )
        self.usable_until: float = self.fresh_until + lifetimes.max_stale
        #: True if a request went by it since this was last cleared.
        self.used: bool = False
        #: True if there is a balance that can be used up. Access without one is a
        #: soft limit, whether the terms are known or not.
        self.counts_down: bool = bool(
            answer.balance
            and answer.has_access
            and (terms is None or not terms.soft_limit)
        )
        #: Made once: this is all that a request with a known answer needs.
        self.decision: Decision = Decision(
            answer.has_access,
            () if answer.has_access else (_denial(feature, answer, terms),),
            source="cache",
            answered_at=asked_at,
            quota=_quota(feature, answer, terms),
            static_values=_static_values(feature, answer),
        )


class AnswerCache:
    """The known answers by feature and customer.

    Belongs to one process; any thread. Of each feature so many are kept, and of too
    many that one goes which was not used since it was last spared (a clock, as
    operating systems do it): a hit then costs no more than setting a flag.
    """

    def __init__(
        self, size: int = CACHE_SIZE, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._size = size
        #: Monotonic, in seconds.
        self.clock = clock
        #: Reading needs no lock; a dictionary never moves once it is here.
        self._tables: dict[str, dict[str, CachedAnswer]] = {}
        self._finders: dict[str, Callable[[str], Decision | None]] = {}
        #: When customers were forgotten: an answer to an older question is not kept.
        self._forgotten: dict[str, float] = {}
        self._changing = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._tables.values()))

    def get(self, customer: str, feature: str) -> CachedAnswer | None:
        """Return what is known, however old it is."""
        return self._table(feature).get(customer)

    @property
    def features(self) -> tuple[str, ...]:
        """The features that were asked for."""
        return tuple(self._tables)

    def finder(self, feature: str) -> Callable[[str], CachedAnswer | None]:
        """Return what finds what is known of a customer, however old it is."""
        return self._table(feature).get

    def fresh(self, feature: str) -> Callable[[str], Decision | None]:
        """Return what finds the decision on a customer, None where it must be asked.

        This is all that most requests pay for, so it is one call.
        """
        finder = self._finders.get(feature)
        if finder is None:
            finder = self._finders[feature] = self._finder(feature)
        return finder

    def _finder(self, feature: str) -> Callable[[str], Decision | None]:
        find = self._table(feature).get
        clock = self.clock

        def fresh(customer: str) -> Decision | None:
            known = find(customer)
            if known is None or clock() >= known.fresh_until:
                return None
            known.used = True
            return known.decision

        return fresh

    def put(self, customer: str, feature: str, known: CachedAnswer) -> None:
        """Remember *known*, unless something newer is there."""
        table = self._table(feature)
        with self._changing:
            before = table.get(customer)
            if before is not None and before.asked_at > known.asked_at:
                return
            if known.asked_at <= self._forgotten.get(customer, -math.inf):
                return
            while before is None and len(table) >= self._size:
                oldest = next(iter(table))
                entry = table.pop(oldest)
                if entry.used:
                    entry.used = False
                    table[oldest] = entry
            table[customer] = known

    def forget(self, customer: str, feature: str | None = None) -> None:
        """Forget one feature of *customer*, or all of them."""
        with self._changing:
            self._forgotten.pop(customer, None)
            self._forgotten[customer] = self.clock()
            if len(self._forgotten) > self._size:
                del self._forgotten[next(iter(self._forgotten))]
            for name, table in self._tables.items():
                if feature is None or name == feature:
                    table.pop(customer, None)

    def _table(self, feature: str) -> dict[str, CachedAnswer]:
        return self._tables.get(feature) or self._tables.setdefault(feature, {})


def _denial(feature: str, answer: Answer, terms: Terms | None) -> Denial:
    period_end = terms.period_end if terms else None
    is_limit = denial_reason(answer) == "limit_reached"
    return denial_of(feature, answer, retry_at=period_end if is_limit else None)


def _quota(feature: str, answer: Answer, terms: Terms | None) -> Quota | None:
    if answer.balance is None:
        return None
    return Quota(
        feature,
        answer.total_available_grant_amount,
        answer.balance,
        terms.period_end if terms else None,
    )


def _static_values(feature: str, answer: Answer) -> tuple[tuple[str, str], ...]:
    if answer.config is None or not answer.has_access:
        return ()
    try:
        msgspec.json.decode(answer.config)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        logger.error("feature %r: the value of a static entitlement is no JSON (%s); "
                     "the handler gets none", feature, error)  # fmt: skip
        return ()
    return ((feature, answer.config),)


#: Says whether a request may pass, as far as that is known.
AllowFromCache: TypeAlias = "Callable[[dict[str, Any], RequestRecord], bool]"


def allow_nothing(_: dict[str, Any], __: RequestRecord) -> bool:
    """Let each request go the long way."""
    return False


def allow_from_cache(
    known_of: Callable[[str], CachedAnswer | None],
    clock: Callable[[], float],
    *,
    find_subject: FindSubject,
    anonymous: str | None,
    counts: Counts,
) -> AllowFromCache:
    """Return what lets a request pass whose customer is known to have access.

    For one feature that is not counted down. *anonymous* is who has to have access
    where a request does not say who is calling, None where *find_subject* has to be
    asked all the same. Whoever does not pass is not denied: that is for the gate to
    decide.
    """

    def passes(environ: dict[str, Any], request: RequestRecord) -> bool:
        # In one piece: each call costs a request.
        if environ.get("REQUEST_METHOD") in OPTIONS:
            return False
        if anonymous is None or request.caller or "REMOTE_USER" in environ:
            subject = find_subject(environ)
        else:
            subject = anonymous
        known = known_of(subject)  # type: ignore[arg-type] # nobody knows None
        if known is None or clock() >= known.fresh_until:
            return False
        decision = known.decision
        if not decision.allowed:
            return False
        known.used = True
        request.decision = decision
        counts.passed += 1
        return True

    return passes
