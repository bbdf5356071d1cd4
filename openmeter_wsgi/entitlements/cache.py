"""The cache of entitlement answers, and the fast path that allows requests from it.

A cached answer is *fresh* for ``allow_ttl`` or ``deny_ttl`` seconds. An expired
allowance is still used for as long again while a worker thread refreshes it. After
that, requests wait for a new answer; if none comes, the answer remains usable until
``max_stale`` seconds after its expiry.
"""

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


#: Multiple of its lifetime for which an allowance is used while it is refreshed.
_GRACE = 2.0
#: Maximum number of cached answers per feature, and of cached customer lookups.
CACHE_SIZE = 10_000


class Lifetimes(NamedTuple):
    """Seconds for which an answer is fresh: an allowance, and a denial."""

    allow: float
    deny: float
    #: Seconds after expiry for which it is usable if OpenMeter gives no answer.
    max_stale: float


class CachedAnswer:
    """One answer with its decision and expiry times. Any thread; only `used` changes.

    Times are monotonic, in seconds. *at_least* and *at_most* limit the lifetime.
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
        # An expired denial is not used during a refresh: the customer may have paid.
        self.graceful_until: float = asked_at + lifetime * (
            _GRACE if answer.has_access else 1
        )
        self.usable_until: float = self.fresh_until + lifetimes.max_stale
        #: True if a request used the answer since the flag was last cleared.
        self.used: bool = False
        #: True if the balance limits access. Access with a balance of 0 is a soft
        #: limit, even if the terms are unknown.
        self.counts_down: bool = bool(
            answer.balance
            and answer.has_access
            and (terms is None or not terms.soft_limit)
        )
        #: Created once, for all requests.
        self.decision: Decision = Decision(
            answer.has_access,
            () if answer.has_access else (_denial(feature, answer, terms),),
            source="cache",
            answered_at=asked_at,
            quota=_quota(feature, answer, terms),
            static_values=_static_values(feature, answer),
        )


class AnswerCache:
    """The cached answers by feature and customer.

    Belongs to one process; any thread. Each feature has a table of at most *size*
    answers. The clock algorithm (second chance) evicts from a full table, so that a
    cache hit only sets a flag.
    """

    def __init__(
        self, size: int = CACHE_SIZE, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._size = size
        #: Monotonic, in seconds.
        self.clock = clock
        #: By feature and customer. Reads need no lock: a table is never replaced.
        self._tables: dict[str, dict[str, CachedAnswer]] = {}
        self._fresh_functions: dict[str, Callable[[str], Decision | None]] = {}
        #: When customers were removed: answers to older questions are not cached.
        self._forgotten: dict[str, float] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._tables.values()))

    def get(self, customer: str, feature: str) -> CachedAnswer | None:
        """Return the cached answer of any age, or None."""
        return self._table(feature).get(customer)

    @property
    def features(self) -> tuple[str, ...]:
        """All features that were ever read or cached."""
        return tuple(self._tables)

    def getter(self, feature: str) -> Callable[[str], CachedAnswer | None]:
        """Return a function from a customer to its answer of any age, or None."""
        return self._table(feature).get

    def fresh_decisions(self, feature: str) -> Callable[[str], Decision | None]:
        """Return a function from a customer to its fresh decision, or None.

        Most requests need nothing else, so a cache hit costs one call.
        """
        function = self._fresh_functions.get(feature)
        if function is None:
            function = self._fresh_functions[feature] = self._fresh_function(feature)
        return function

    def _fresh_function(self, feature: str) -> Callable[[str], Decision | None]:
        find = self._table(feature).get
        clock = self.clock

        def fresh(customer: str) -> Decision | None:
            cached = find(customer)
            if cached is None or clock() >= cached.fresh_until:
                return None
            cached.used = True
            return cached.decision

        return fresh

    def put(self, customer: str, feature: str, new: CachedAnswer) -> None:
        """Cache *new*, unless a newer answer is cached."""
        table = self._table(feature)
        with self._lock:
            before = table.get(customer)
            if before is not None and before.asked_at > new.asked_at:
                return
            if new.asked_at <= self._forgotten.get(customer, -math.inf):
                return
            while before is None and len(table) >= self._size:
                oldest = next(iter(table))
                entry = table.pop(oldest)
                if entry.used:
                    entry.used = False
                    table[oldest] = entry
            table[customer] = new

    def forget(self, customer: str, feature: str | None = None) -> None:
        """Remove the answer about *customer* and one feature, or all features."""
        with self._lock:
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
        logger.error("feature %r: the value of the static entitlement is not valid "
                     "JSON (%s), the handler gets none", feature, error)  # fmt: skip
        return ()
    return ((feature, answer.config),)


#: Returns True if a request may begin by a cached answer.
AllowFromCache: TypeAlias = "Callable[[dict[str, Any], RequestRecord], bool]"


def allow_nothing(_: dict[str, Any], __: RequestRecord) -> bool:
    """Return False: the gate decides all requests."""
    return False


def allow_from_cache(
    get_cached: Callable[[str], CachedAnswer | None],
    clock: Callable[[], float],
    *,
    find_subject: FindSubject,
    anonymous: str | None,
    counts: Counts,
) -> AllowFromCache:
    """Return a function that returns True for a request with a fresh allowance.

    For one feature that is not counted down. *anonymous* is the subject of requests
    without a caller, None if *find_subject* must be called for these, too. If the
    function returns False, the request is not denied: the gate decides.
    """

    def is_allowed_by_cache(environ: dict[str, Any], request: RequestRecord) -> bool:
        # One function without calls to helpers: it runs in every request.
        if environ.get("REQUEST_METHOD") in OPTIONS:
            return False
        if anonymous is None or request.caller or "REMOTE_USER" in environ:
            subject = find_subject(environ)
        else:
            subject = anonymous
        cached = get_cached(subject)  # type: ignore[arg-type] # None is never cached
        if cached is None or clock() >= cached.fresh_until:
            return False
        decision = cached.decision
        if not decision.allowed:
            return False
        cached.used = True
        request.decision = decision
        counts.passed += 1
        return True

    return is_allowed_by_cache
