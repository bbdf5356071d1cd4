"""The entitlement service of a process: decisions from cached and new answers.

`EntitlementService.decide` runs in the thread of a request. It reads the `AnswerCache`;
for a missing or expired answer it asks the `Lookup` and waits. The lookup calls
`_ask_openmeter` in a worker thread, which asks over HTTP, caches the answer, hands its
balance to the local quota (`countdown`) and shares it with other processes.

The *terms* of an entitlement (usage period, soft limit) are not part of an answer: they
cost a second HTTP request, and are used for minutes.
"""

from __future__ import annotations

import hashlib
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgspec.structs import replace

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.cache import (
    AnswerCache,
    CachedAnswer,
    Lifetimes,
    allow_from_cache,
)
from openmeter_wsgi.entitlements.client import ClientV1, is_key
from openmeter_wsgi.entitlements.client_v3 import ClientV3
from openmeter_wsgi.entitlements.customers import CustomerCache, answers_about
from openmeter_wsgi.entitlements.decision import (
    Decision,
    DecisionSource,
    Denial,
    combined,
    no_answer_decision,
)
from openmeter_wsgi.entitlements.lookup import BackgroundLookup, SharedResult
from openmeter_wsgi.entitlements.questions import (
    Question,
    invalid_features,
    questions_about,
)
from openmeter_wsgi.entitlements.shared_answers import SharedAnswers
from openmeter_wsgi.errors import DeliveryError
from openmeter_wsgi.options import question_rate
from openmeter_wsgi.quota.fallback_store import open_store
from openmeter_wsgi.quota.ledger import Ledger, LocalQuota
from openmeter_wsgi.quota.store import StoreAway
from openmeter_wsgi.quota.visibility_mark import FixedLag
from openmeter_wsgi.stats import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from openmeter_wsgi.entitlements.cache import AllowFromCache
    from openmeter_wsgi.entitlements.client import Answer, EntitlementClient, Terms
    from openmeter_wsgi.entitlements.lookup import (
        AskOpenMeter,
        LoadShared,
        Lookup,
        WaitForToken,
    )
    from openmeter_wsgi.entitlements.shared_answers import SharedAnswer
    from openmeter_wsgi.entitlements.visibility_probes import Sending, Visibility
    from openmeter_wsgi.policy import FailMode, Policy
    from openmeter_wsgi.quota.store import Store
    from openmeter_wsgi.stats import Counts
    from openmeter_wsgi.subject import FindSubject

logger: Final = log.get_logger(__name__)

#: Seconds after which the terms of an entitlement are fetched again.
_TERMS_TTL = 600.0
#: Remaining share of the grant below which the terms are fetched with each answer.
_LOW_SHARE = 0.2


class EntitlementService:
    """The cached answers, lookups and local quotas of one process. Any thread."""

    def __init__(
        self,
        *,
        new_lookup: Callable[[AskOpenMeter, LoadShared], Lookup],
        countdown: LocalQuota,
        lifetimes: Lifetimes,
        id_lifetimes: Lifetimes | None = None,
        shows_periods: bool,
        close_store: Callable[[], None],
        shared: SharedAnswers | None = None,
        visibility: Visibility | None = None,
    ) -> None:
        self.countdown = countdown
        self._close_store = close_store
        #: None if the policy names no store that processes share.
        self._shared = shared
        #: None if no quota is counted down, or nothing is sent.
        self._visibility = visibility
        #: True if quotas are counted down, but not shared with other processes.
        self._is_unshared = shared is None and bool(countdown.meters)
        #: True if responses tell when a quota's period ends.
        self._shows_periods = shows_periods
        self._answers = AnswerCache()
        self._customers = CustomerCache(id_lifetimes or lifetimes)
        self._lifetimes = lifetimes
        self._lookup = new_lookup(self._ask_openmeter, self.load_shared)

    def begin(self, environ: Mapping[str, Any]) -> None:
        """Warn if several processes count a quota down without sharing the count.

        Called with the first request of a process.
        """
        if not self._is_unshared or not environ.get("wsgi.multiprocess"):
            return
        self._is_unshared = False
        logger.warning(
            "%s: several processes count %s down without a shared store; together "
            "they may serve a multiple of each quota. Set spool_dir, or redis_url for "
            "several hosts",
            "entitlement_meters", ", ".join(map(repr, self.countdown.meters)),
        )  # fmt: skip

    def decide(
        self, customer: str, features: tuple[str, ...], fail_mode: FailMode
    ) -> Decision:
        """Return the decision on the use of all *features* by *customer*. Never raises.

        Waits, at most ``entitlement_timeout``, if an answer is missing or long expired.
        """
        fresh = [self._answers.fresh_decisions(f)(customer) for f in features]
        if None not in fresh:
            return combined(fresh)  # type: ignore[arg-type]
        if not is_key(customer):  # no valid key: OpenMeter need not be asked
            denied = tuple(Denial(feature, "unknown_customer") for feature in features)
            return Decision(False, denied, source="request")
        if invalid := invalid_features(features):
            denied = tuple(Denial(feature, "no_access") for feature in invalid)
            return Decision(False, denied, source="request")
        now = time.monotonic()
        answers, busy_for = self._usable_answers(customer, features, now, fail_mode)
        return combined(
            [
                no_answer_decision((feature,), fail_mode, busy_for)
                if cached is None
                else _decision(cached, now)
                for feature, cached in zip(features, answers, strict=True)
            ]
        )

    def fresh_decisions(self, feature: str) -> Callable[[str], Decision | None]:
        """Return a function from a customer to its unexpired decision, or None."""
        return self._answers.fresh_decisions(feature)

    def allow_from_cache(
        self,
        feature: str,
        *,
        find_subject: FindSubject,
        anonymous: str | None,
        counts: Counts,
    ) -> AllowFromCache:
        """Return a function that allows requests from the cache: `allow_from_cache`."""
        return allow_from_cache(
            self._answers.getter(feature),
            self._answers.clock,
            find_subject=find_subject,
            anonymous=anonymous,
            counts=counts,
        )

    def cached_answer(self, customer: str, feature: str) -> CachedAnswer | None:
        """Return the cached answer of any age, or None."""
        return self._answers.get(customer, feature)

    def refresh(self, customer: str, feature: str, *, since: float = 0.0) -> None:
        """Ask for a new answer without waiting.

        A shared answer that was asked for after *since* (monotonic) suffices.
        """
        self._lookup.refresh(Question(customer, (feature,)), since=since)

    def account(self, customer: str) -> str:
        """Return the name under which the quota of *customer* is counted down."""
        return self._customers.account(customer)

    def invalidate(self, customer: str, feature: str | None = None) -> None:
        """Remove the answers about *customer*: the next request asks again."""
        features = self._answers.features if feature is None else (feature,)
        for name in {customer, *self._customers.forget(customer)}:
            self._answers.forget(name, feature)
            if self._shared is not None:
                self._shared.forget(name, features)

    @property
    def problems(self) -> list[Problem]:
        """The current problems with lookups."""
        if not self._lookup.breaker.is_open:
            return []
        text = (
            "OpenMeter gives no answers; cached answers are used for max_stale, then "
            "fail_mode decides"
        )
        return [Problem("entitlements", text)]

    def close_connections(self) -> None:
        """Close the connections; the next question opens new ones."""
        self._lookup.close()

    def close(self, timeout: float | None = None) -> None:
        """Return this process's leases to the store, and close all connections.

        Waits for a locked store at most 1 s, and at most *timeout* seconds.
        """
        self._lookup.close()
        self.countdown.close(timeout)
        self._close_store()

    def end(self) -> None:
        """End the visibility thread. Called after the delivery has ended."""
        if self._visibility is not None:
            self._visibility.close()

    @property
    def visibility_lag(self) -> float | None:
        """Seconds until OpenMeter shows delivered usage, None if not measured."""
        return self._visibility.lag if self._visibility is not None else None

    def _usable_answers(
        self, customer: str, features: Sequence[str], now: float, fail_mode: FailMode
    ) -> tuple[list[CachedAnswer | None], float | None]:
        """Return the usable answer or None for each feature, and the estimated wait.

        Waits for answers that are missing or long expired. Otherwise refreshes the
        expired ones in the background. The estimated wait is None unless the queue of
        questions is too long, or OpenMeter has answered 429.
        """
        cached = [self._answers.get(customer, feature) for feature in features]
        missing, expired = [], []
        for feature, answer in zip(features, cached, strict=True):
            if answer is None or now >= answer.graceful_until:
                missing.append(feature)
            elif now >= answer.fresh_until:
                expired.append(feature)
        if not missing:
            for question in questions_about(customer, expired):
                self._lookup.refresh(question)
            return cached, None
        waits = [
            self._lookup.ask(question, is_known=any(cached))
            for question in questions_about(customer, missing)
        ]
        cached = [self._answers.get(customer, feature) for feature in features]
        now = time.monotonic()
        any_age = fail_mode == "stale"
        usable = [
            answer if answer and (any_age or now < answer.usable_until) else None
            for answer in cached
        ]
        return usable, max((wait for wait in waits if wait is not None), default=None)

    def load_shared(self, question: Question, since: float) -> SharedResult:
        """Cache the answers to *question* that other processes have shared."""
        if self._shared is None:
            return SharedResult()
        customer, features = question
        answers = self._shared.get(customer, features)
        for feature, shared in zip(features, answers, strict=True):
            if shared is not None:
                self._adopt_shared(customer, feature, shared)
        now = time.monotonic()
        cached = [self._answers.get(customer, feature) for feature in features]
        fresh = all(k and k.asked_at >= since and now < k.fresh_until for k in cached)
        return SharedResult(is_answered=fresh, is_known=any(cached))

    def _adopt_shared(self, customer: str, feature: str, shared: SharedAnswer) -> None:
        """Cache an answer of another process, unless the cached one is newer."""
        cached = self._answers.get(customer, feature)
        if cached is not None and cached.asked_at >= shared.asked_at:
            return
        if (found := shared.customer) is not None:
            self._customers.put(customer, found, shared.asked_at, shared.names)
        new = _NewAnswer(
            customer, self.account(customer), feature, shared.answer, shared.asked_at,
            shared.asked_wall, shared.asked_wall,
        )  # fmt: skip
        self._accept(new, cached, shared.terms, shared.terms_at)

    # -- In a worker thread of the lookup

    def _ask_openmeter(
        self,
        client: EntitlementClient,
        question: Question,
        answered: Callable[[], None],
        wait_for_token: WaitForToken,
    ) -> None:
        """Ask OpenMeter, cache and share the answers.

        Calls *answered* before the terms that no request waits for are fetched.
        """
        customer = question.customer
        asked_at, asked_wall = time.monotonic(), time.time()
        answers = answers_about(client, question, self._customers, wait_for_token)
        account = self.account(customer)
        server_time = asked_wall - client.clock_ahead
        all_new = [
            _NewAnswer(
                customer, account, feature, answer, asked_at, asked_wall, server_time
            )
            for feature, answer in answers.items()
            if not isinstance(answer, DeliveryError)
        ]
        without_terms = [new for new in all_new if self._store_answer(client, new)]
        answered()
        for new in without_terms:
            # Queued questions have priority.
            if not self._lookup.is_busy:
                self._fetch_terms(client, new)
        self._share(customer, answers)
        if errors := [a for a in answers.values() if isinstance(a, DeliveryError)]:
            raise errors[0]  # the lookup handles it

    def _store_answer(self, client: EntitlementClient, new: _NewAnswer) -> bool:
        """Cache an answer, with its terms if a request waits for them.

        Returns True if its terms must be fetched later.
        """
        before = self._answers.get(new.customer, new.feature)
        terms, terms_at = _terms_for(new.answer, before)
        is_accepted = self._accept(new, before, terms, terms_at)
        if not is_accepted or not self._needs_terms(new, terms, terms_at):
            return False
        if self._lookup.is_busy or not self._waits_for_terms(new, terms):
            return True
        self._fetch_terms(client, new)
        return False

    def _accept(
        self,
        new: _NewAnswer,
        before: CachedAnswer | None,
        terms: Terms | None,
        terms_at: float,
    ) -> bool:
        """Cache an answer and return True, unless it is about the next period.

        In the last minute of a usage period OpenMeter answers for the next one. The
        previous answer then remains valid until the period ends, and the local quota
        is counted down from there.
        """
        if before is not None and _is_of_next_period(new, before):
            end = (before.terms and before.terms.period_end) or new.server_time
            previous = new._replace(answer=before.answer)
            left = end + 1 - new.server_time
            self._cache(previous, before.terms, before.terms_at, at_least=left)
            return False
        balance, since = new.answer.balance, _period_start(new, before, terms)
        self.countdown.answered(
            new.account, new.feature, balance, new.asked_wall, since
        )
        self._cache(new, terms, terms_at)
        return True

    def _share(self, customer: str, features: Iterable[str]) -> None:
        """Share the cached answers about *features* with other processes."""
        if self._shared is None:
            return
        customer_lookup = self._customers.fresh(customer)
        for feature in features:
            if (cached := self._answers.get(customer, feature)) is not None:
                self._shared.put(customer, feature, cached, customer_lookup)

    def _cache(
        self,
        new: _NewAnswer,
        terms: Terms | None,
        terms_at: float,
        at_least: float = 0.0,
    ) -> None:
        """Cache an answer until it expires or its usage period ends."""
        at_most = math.inf
        if terms is not None and terms.period_end is not None:
            left = terms.period_end + 1 - new.server_time
            at_most = left if left > 0 else math.inf
        cached = CachedAnswer(
            new.feature,
            new.answer,
            terms,
            asked_at=new.asked_at,
            terms_at=terms_at,
            lifetimes=self._lifetimes,
            at_least=at_least,
            at_most=at_most,
        )
        self._answers.put(new.customer, new.feature, cached)

    def _needs_terms(self, new: _NewAnswer, terms: Terms | None, at: float) -> bool:
        """Return True if an answer needs newer terms than *terms*, fetched at *at*."""
        answer = new.answer
        if answer.balance is None:
            return False
        if not answer.has_access:
            return True
        is_counted = new.feature in self.countdown.meters
        if not is_counted and not self._shows_periods:
            return False
        if terms is None or new.asked_at - at > _TERMS_TTL:
            return True
        granted = answer.total_available_grant_amount or 0.0
        is_low = is_counted and answer.balance <= granted * _LOW_SHARE
        return is_low or terms.is_over(time.time())

    def _waits_for_terms(self, new: _NewAnswer, terms: Terms | None) -> bool:
        """Return True if the waiting request needs the terms.

        A denial tells the end of the period, and a quota is counted down only if it
        has no soft limit. Both are in the terms.
        """
        if not new.answer.has_access:
            return True
        return terms is None and new.feature in self.countdown.meters

    def _fetch_terms(self, client: EntitlementClient, new: _NewAnswer) -> None:
        """Ask for the terms, and cache the answer with them."""
        if not self._lookup.wait_for_token():
            return
        try:
            terms = client.terms(new.account, new.feature)
        except DeliveryError as error:
            logger.warning(
                "%s: OpenMeter does not state the usage period of feature %r (status "
                "%s: %s); the answer is used without it",
                "entitlements", new.feature, error.status or "none", error.reason,
            )  # fmt: skip
            return
        self._cache(new, terms, time.monotonic())


class _NewAnswer(NamedTuple):
    """An answer about one feature that has just come, with its question."""

    customer: str
    #: The customer's key or id in OpenMeter.
    account: str
    feature: str
    answer: Answer
    #: The time of the question: monotonic …
    asked_at: float
    #: … by the wall clock of this host …
    asked_wall: float
    #: … and by the clock of the server.
    server_time: float


def _is_of_next_period(new: _NewAnswer, before: CachedAnswer) -> bool:
    """Return True if *new* is about the period that follows *before*'s.

    Before that period begins, its usage is lower than that of the current period.
    """
    answer, terms = new.answer, before.terms
    if terms is None or answer.balance is None or not terms.is_ending(new.server_time):
        return False
    return not answer.usage or answer.usage < (before.answer.usage or 0.0)


def _period_start(
    new: _NewAnswer, before: CachedAnswer | None, terms: Terms | None
) -> float:
    """Return the start of the usage period of *new*, or -inf if unknown."""
    if before is not None and before.terms and before.terms.is_over(new.server_time):
        return before.terms.period_end or -math.inf
    if terms is not None and terms.period_start is not None:
        return terms.period_start
    return -math.inf


def _terms_for(
    answer: Answer, before: CachedAnswer | None
) -> tuple[Terms | None, float]:
    """Return the terms of the previous answer, and their time."""
    if before is None:
        return None, -math.inf
    granted = before.answer.total_available_grant_amount
    if granted != answer.total_available_grant_amount:
        return before.terms, -math.inf  # perhaps another entitlement: fetch its terms
    return before.terms, before.terms_at


def _decision(cached: CachedAnswer, now: float) -> Decision:
    """Return the decision of a cached answer, with its source."""
    source: DecisionSource = "openmeter" if cached.asked_at >= now else "cache"
    if source == "cache":
        cached.used = True
    if now >= cached.fresh_until:
        source = "stale"
    return replace(cached.decision, source=source)


#: Share of the tokens that is kept back for known customers.
_KEPT_BACK_SHARE = 0.5
#: Minimum seconds for which a customer's id for version 3 of the API is cached. If the
#: customer is deleted meanwhile, OpenMeter's answer says so.
_ID_TTL = 600.0


def question_client(policy: Policy, timeout: float) -> EntitlementClient:
    """Return a client for *policy*'s server and API version."""
    client = ClientV3 if policy.api_flavor == "v3" else ClientV1
    url, key = _questions_url(policy), policy.entitlements_key
    return client(url=url, key=key, timeout=timeout)


def _scope(policy: Policy) -> str:
    """Return a short hash of the server's URL and the API key.

    Processes with another server or key share no accounts with this one.

    :raises StoreAway: if the key cannot be read now.
    """
    try:
        key = policy.entitlements_key.current()
    except ValueError as error:
        raise StoreAway(f"the API key cannot be read: {error}") from error
    url_and_key = f"{_questions_url(policy)}\0{key or ''}"
    return hashlib.sha256(url_and_key.encode()).hexdigest()[:12]


def _questions_url(policy: Policy) -> str:
    return policy.entitlements_url or policy.api_url


def _id_lifetimes(policy: Policy, lifetimes: Lifetimes) -> Lifetimes:
    """Return the lifetimes of a cached customer of a subject."""
    if policy.api_flavor == "v3":
        return lifetimes._replace(allow=max(lifetimes.allow, _ID_TTL))
    return lifetimes


def visibility_of(policy: Policy) -> Visibility | None:
    """Return the `Visibility` of *policy*, None if no quota is counted down."""
    if not policy.entitlement_meters or policy.dry_run:
        return None
    # Imported here, because only some applications count quotas down.
    from openmeter_wsgi.entitlements.visibility_probes import Visibility

    return Visibility(policy)


def follow_delivery(
    policy: Policy, visibility: Visibility, transport: Sending, store: Store | None
) -> None:
    """Let *visibility* follow *transport*, with tokens from *store* or a new store."""
    tokens = store or _open_store(policy)
    rate = question_rate(policy.question_rate, url=_questions_url(policy))
    visibility.follow(transport, lambda: tokens.take_token(rate))


def _open_store(policy: Policy) -> Store:
    return open_store(policy.spool_dir, policy.redis_url, partial(_scope, policy))


def entitlement_service(
    policy: Policy, transport: Sending, visibility: Visibility | None
) -> EntitlementService:
    """Return the service of one process. Opens nothing and starts no thread."""
    rate = question_rate(policy.question_rate, url=_questions_url(policy))
    store = _open_store(policy)
    if visibility is None:
        visible_until = FixedLag(transport.delivered_until, policy.visibility_lag).until
    else:
        visible_until = visibility.until
        follow_delivery(policy, visibility, transport, store)
    ledger = Ledger(store, visible_until=visible_until)
    has_shared_store = policy.spool_dir is not None or policy.redis_url is not None
    lifetimes = Lifetimes(policy.allow_ttl, policy.deny_ttl, policy.max_stale)
    return EntitlementService(
        new_lookup=lambda ask_openmeter, load_shared: BackgroundLookup(
            new_client=partial(question_client, policy, policy.entitlement_timeout),
            ask_openmeter=ask_openmeter,
            load_shared=load_shared,
            take_token=lambda kept_back: store.take_token(rate, reserve=kept_back),
            timeout=policy.entitlement_timeout,
            rate=rate,
            tokens_kept_back=max(min(rate * _KEPT_BACK_SHARE, rate - 1), 0),
        ),
        countdown=LocalQuota(ledger, policy.entitlement_meters),
        lifetimes=lifetimes,
        id_lifetimes=_id_lifetimes(policy, lifetimes),
        close_store=store.close,
        shared=SharedAnswers(store) if has_shared_store else None,
        visibility=visibility,
        shows_periods=any(
            each.usage_headers
            for each in (policy, *(own for _, own in policy.route_policies))
            if each is not None
        ),
    )
