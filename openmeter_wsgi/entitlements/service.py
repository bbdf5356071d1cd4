"""The entitlement service of a process: decisions from answers and local quotas."""

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
from openmeter_wsgi.entitlements.customers import FoundCustomers, answers_about
from openmeter_wsgi.entitlements.decision import (
    Decision,
    DecisionSource,
    Denial,
    together,
    undecided,
)
from openmeter_wsgi.entitlements.lookup import (
    BackgroundLookup,
    Question,
    Recalled,
    questions_about,
)
from openmeter_wsgi.entitlements.shared_answers import SharedAnswers
from openmeter_wsgi.errors import DeliveryError
from openmeter_wsgi.options import feature_problem, question_rate
from openmeter_wsgi.quota.fallback_store import open_store
from openmeter_wsgi.quota.ledger import Ledger, LocalQuota
from openmeter_wsgi.quota.store import StoreAway
from openmeter_wsgi.quota.visibility_mark import FixedLag
from openmeter_wsgi.stats import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from openmeter_wsgi.entitlements.cache import AllowFromCache
    from openmeter_wsgi.entitlements.client import Answer, EntitlementClient, Terms
    from openmeter_wsgi.entitlements.lookup import Answering, HasToken, Lookup, Recall
    from openmeter_wsgi.entitlements.shared_answers import SharedAnswer
    from openmeter_wsgi.entitlements.visibility_probes import Sending, Visibility
    from openmeter_wsgi.policy import FailMode, Policy
    from openmeter_wsgi.quota.store import Store
    from openmeter_wsgi.stats import Counts
    from openmeter_wsgi.subject import FindSubject

logger: Final = log.get_logger(__name__)


#: The terms of an entitlement are asked for anew when they are older than this, in
#: seconds, and when so small a part of the grant is left that they may decide.
_TERMS_HOLD = 600.0
_LITTLE = 0.2


class EntitlementService:
    """The entitlements of one process: known answers, lookups and local quotas.

    Any thread.
    """

    def __init__(
        self,
        *,
        new_asker: Callable[[Answering, Recall], Lookup],
        countdown: LocalQuota,
        lifetimes: Lifetimes,
        id_lifetimes: Lifetimes | None = None,
        tells_periods: bool,
        close_store: Callable[[], None],
        shared: SharedAnswers | None = None,
        visibility: Visibility | None = None,
    ) -> None:
        self.countdown = countdown
        self._close_store = close_store
        #: None where there are no other processes that could have asked.
        self._shared = shared
        #: None where nothing is counted down, or nothing is sent.
        self._visibility = visibility
        #: True if quotas are counted down, and by this process for itself.
        self._counts_alone = shared is None and bool(countdown.meters)
        #: True if responses say when a quota is granted anew.
        self._tells_periods = tells_periods
        self._answers = AnswerCache()
        self._customers = FoundCustomers(id_lifetimes or lifetimes)
        self._lifetimes = lifetimes
        self._asker = new_asker(self._answer, self.recall)

    def begin(self, environ: Mapping[str, Any]) -> None:
        """Warn where several processes count a quota, and each for itself.

        With the first request of a process.
        """
        if not self._counts_alone or not environ.get("wsgi.multiprocess"):
            return
        self._counts_alone = False
        logger.warning(
            "%s: %s counted down by several processes, and each counts for itself: "
            "together they may serve a multiple of a quota. Set spool_dir, or "
            "redis_url where they are on several hosts",
            "entitlement_meters", ", ".join(map(repr, self.countdown.meters)),
        )  # fmt: skip

    def decide(
        self, customer: str, features: tuple[str, ...], fail_mode: FailMode
    ) -> Decision:
        """Decide whether *customer* may use all of *features*. Never raises.

        Waits only for an answer that has never been heard or has outlived its time,
        and at most ``entitlement_timeout``.
        """
        fresh = [self._answers.fresh(feature)(customer) for feature in features]
        if None not in fresh:
            return together(fresh)  # type: ignore[arg-type]
        if not is_key(customer):  # OpenMeter can have no such customer
            denied = tuple(Denial(feature, "unknown_customer") for feature in features)
            return Decision(False, denied, source="request")
        if refused := _impossible(features):
            denied = tuple(Denial(feature, "no_access") for feature in refused)
            return Decision(False, denied, source="request")
        now = time.monotonic()
        found, busy_for = self._found(customer, features, now, fail_mode)
        return together(
            [
                undecided((feature,), fail_mode, busy_for)
                if known is None
                else _decision(known, now)
                for feature, known in zip(features, found, strict=True)
            ]
        )

    def fresh(self, feature: str) -> Callable[[str], Decision | None]:
        """Return what finds a decision that needs no question, by customer."""
        return self._answers.fresh(feature)

    def passing(
        self,
        feature: str,
        *,
        find_subject: FindSubject,
        anonymous: str | None,
        counts: Counts,
    ) -> AllowFromCache:
        """Return what allows a request from the cache (see `allow_from_cache`)."""
        return allow_from_cache(
            self._answers.finder(feature),
            self._answers.clock,
            find_subject=find_subject,
            anonymous=anonymous,
            counts=counts,
        )

    def known(self, customer: str, feature: str) -> CachedAnswer | None:
        """Return what is known, however old it is."""
        return self._answers.get(customer, feature)

    def refresh(self, customer: str, feature: str, *, since: float = 0.0) -> None:
        """Ask anew, behind the request's back.

        The answer that another process asked for *since* that moment (monotonic) will
        do.
        """
        self._asker.refresh(Question(customer, (feature,)), since=since)

    def account(self, customer: str) -> str:
        """Return the name under which the quota of *customer* is counted down."""
        return self._customers.account(customer)

    def invalidate(self, customer: str, feature: str | None = None) -> None:
        """Forget what was said of *customer*: the next request asks."""
        features = self._answers.features if feature is None else (feature,)
        for name in {customer, *self._customers.forget(customer)}:
            self._answers.forget(name, feature)
            if self._shared is not None:
                self._shared.forget(name, features)

    @property
    def problems(self) -> list[Problem]:
        """The problems with asking OpenMeter now."""
        if not self._asker.breaker.is_open:
            return []
        text = (
            "OpenMeter does not say who may; known answers hold for max_stale, then "
            "fail_mode decides"
        )
        return [Problem("entitlements", text)]

    def close_connections(self) -> None:
        """Close the connections. The next question opens new ones."""
        self._asker.close()

    def close(self) -> None:
        """Hand back what was set apart for this process, and close connections."""
        self._asker.close()
        self.countdown.close()
        self._close_store()

    def end(self) -> None:
        """End the thread that looks how far usage is visible, after the delivery."""
        if self._visibility is not None:
            self._visibility.close()

    @property
    def visibility_lag(self) -> float | None:
        """The seconds until OpenMeter shows usage; None if that is not looked for."""
        return self._visibility.lag if self._visibility is not None else None

    def _found(
        self, customer: str, features: Sequence[str], now: float, fail_mode: FailMode
    ) -> tuple[list[CachedAnswer | None], float | None]:
        """Return what is known, and the seconds to come back after if the line is long.

        Asks for what is not known or has aged.
        """
        found = [self._answers.get(customer, feature) for feature in features]
        pairs = list(zip(features, found, strict=True))
        if missing := [f for f, k in pairs if k is None or now >= k.graceful_until]:
            is_known = any(known is not None for known in found)
            waits = [
                self._asker.ask(question, is_known=is_known)
                for question in questions_about(customer, missing)
            ]
            found = [self._answers.get(customer, feature) for feature in features]
            after = time.monotonic()
            any_age = fail_mode == "stale"
            usable = [k if k and (any_age or after < k.usable_until) else None
                      for k in found]  # fmt: skip
            return usable, max((w for w in waits if w is not None), default=None)
        if aged := [f for f, k in pairs if k is not None and now >= k.fresh_until]:
            for question in questions_about(customer, aged):
                self._asker.refresh(question)
        return found, None

    def recall(self, question: Question, since: float) -> Recalled:
        """Look for the answer among those that other processes have shared."""
        if self._shared is None:
            return Recalled()
        customer, features = question
        for feature, found in zip(
            features, self._shared.get(customer, features), strict=True
        ):
            if found is not None:
                self._take_over(customer, feature, found)
        now = time.monotonic()
        known = [self._answers.get(customer, feature) for feature in features]
        return Recalled(
            all(k and k.asked_at >= since and now < k.fresh_until for k in known),
            any(known),
        )

    def _take_over(self, customer: str, feature: str, found: SharedAnswer) -> None:
        """Remember an answer of another process as one of ours."""
        known = self._answers.get(customer, feature)
        if known is not None and known.asked_at >= found.asked_at:
            return
        if found.customer is not None:
            self._customers.put(customer, found.customer, found.asked_at, found.names)
        heard = _Heard(
            customer, self.account(customer), feature, found.answer, found.asked_at,
            found.asked_wall, found.asked_wall,
        )  # fmt: skip
        self._believe(heard, known, found.terms, found.terms_at)

    # -- In the thread of a question

    def _answer(
        self,
        client: EntitlementClient,
        question: Question,
        answered: Callable[[], None],
        has_token: HasToken,
    ) -> None:
        customer, asked_at, asked_wall = question[0], time.monotonic(), time.time()
        answers = answers_about(client, question, self._customers, has_token)
        account = self.account(customer)
        server_time = asked_wall - client.clock_ahead
        all_heard = [
            _Heard(
                customer, account, feature, answer, asked_at, asked_wall, server_time
            )
            for feature, answer in answers.items()
            if not isinstance(answer, DeliveryError)
        ]
        later = [heard for heard in all_heard if self._hear(client, heard)]
        answered()
        for heard in later:
            # While others wait in line, their first questions go before.
            if not self._asker.is_busy:
                self._learn_terms(client, heard)
        self._share(customer, answers)
        if errors := [a for a in answers.values() if isinstance(a, DeliveryError)]:
            raise errors[0]

    def _hear(self, client: EntitlementClient, heard: _Heard) -> bool:
        """Remember an answer; return True if its terms are to be asked for later."""
        before = self._answers.get(heard.customer, heard.feature)
        terms, terms_at = _terms_for(heard.answer, before)
        if not self._believe(heard, before, terms, terms_at):
            return False
        if not self._wants_terms(heard, terms, terms_at):
            return False
        if self._asker.is_busy or not self._decides_by_terms(heard, terms):
            return True
        self._learn_terms(client, heard)
        return False

    def _believe(
        self,
        heard: _Heard,
        before: CachedAnswer | None,
        terms: Terms | None,
        terms_at: float,
    ) -> bool:
        """Remember an answer, unless it speaks of a period that has not begun.

        In the last minute of a period OpenMeter answers for the next one. Then the
        last answer holds until the end, and the local quota counts down on.
        """
        if before is not None and _is_early(heard, before):
            end = (before.terms and before.terms.period_end) or heard.server_time
            held = heard._replace(answer=before.answer)
            left = end + 1 - heard.server_time
            self._remember(held, before.terms, before.terms_at, at_least=left)
            return False
        balance, since = heard.answer.balance, _period_start(heard, before, terms)
        self.countdown.answered(
            heard.account, heard.feature, balance, heard.asked_wall, since
        )
        self._remember(heard, terms, terms_at)
        return True

    def _share(self, customer: str, features: Iterable[str]) -> None:
        """Let other processes know the answers."""
        if self._shared is None:
            return
        found = self._customers.fresh(customer)
        for feature in features:
            if (known := self._answers.get(customer, feature)) is not None:
                self._shared.put(customer, feature, known, found)

    def _remember(
        self,
        heard: _Heard,
        terms: Terms | None,
        terms_at: float,
        at_least: float = 0.0,
    ) -> None:
        """Keep an answer, but no longer than its period lasts."""
        at_most = math.inf
        if terms is not None and terms.period_end is not None:
            left = terms.period_end + 1 - heard.server_time
            at_most = left if left > 0 else at_most
        known = CachedAnswer(
            heard.feature,
            heard.answer,
            terms,
            asked_at=heard.asked_at,
            terms_at=terms_at,
            lifetimes=self._lifetimes,
            at_least=at_least,
            at_most=at_most,
        )
        self._answers.put(heard.customer, heard.feature, known)

    def _wants_terms(self, heard: _Heard, terms: Terms | None, terms_at: float) -> bool:
        answer = heard.answer
        if answer.balance is None:
            return False
        if not answer.has_access:
            return True
        is_counted = heard.feature in self.countdown.meters
        if not is_counted and not self._tells_periods:
            return False
        if terms is None or heard.asked_at - terms_at > _TERMS_HOLD:
            return True
        granted = answer.total_available_grant_amount or 0.0
        is_low = is_counted and answer.balance <= granted * _LITTLE
        return is_low or terms.is_over(time.time())

    def _decides_by_terms(self, heard: _Heard, terms: Terms | None) -> bool:
        """Return True if the request that waits needs the terms, too.

        A denial tells when the quota is granted anew; a soft limit is not counted
        down.
        """
        if not heard.answer.has_access:
            return True
        return terms is None and heard.feature in self.countdown.meters

    def _learn_terms(self, client: EntitlementClient, heard: _Heard) -> None:
        if not self._asker.has_token():
            return
        try:
            terms = client.terms(heard.account, heard.feature)
        except DeliveryError as error:
            logger.warning(
                "%s: OpenMeter does not say when the period of %r ends (status %s: %s)",
                "entitlements", heard.feature, error.status or "none", error.reason,
            )  # fmt: skip
            return
        self._remember(heard, terms, time.monotonic())


class _Heard(NamedTuple):
    """One answer, and what was asked."""

    customer: str
    #: The name under which OpenMeter has the customer.
    account: str
    feature: str
    answer: Answer
    #: Monotonic, by the wall clock of this host, and by the server's.
    asked_at: float
    asked_wall: float
    server_time: float


def _impossible(features: Iterable[str]) -> list[str]:
    """Return the *features* that OpenMeter cannot have, and log each of them.

    Options with such a feature are refused at the start. A view may name one only when
    a request comes.
    """
    problems = {feature: feature_problem(feature) for feature in features}
    refused = [feature for feature, problem in problems.items() if problem]
    for feature in refused:
        logger.error(
            "feature %r: every request that requires it is denied: %s",
            feature, problems[feature],
        )  # fmt: skip
    return refused


def _is_early(heard: _Heard, before: CachedAnswer) -> bool:
    """Return True if *heard* speaks of the period after the one of *before*.

    Before it has begun no usage is in it.
    """
    answer, terms = heard.answer, before.terms
    if (
        terms is None
        or answer.balance is None
        or not terms.is_ending(heard.server_time)
    ):
        return False
    return not answer.usage or answer.usage < (before.answer.usage or 0.0)


def _period_start(
    heard: _Heard, before: CachedAnswer | None, terms: Terms | None
) -> float:
    """Return when the period began that *heard* speaks of, as far as is known."""
    if before is not None and before.terms and before.terms.is_over(heard.server_time):
        return before.terms.period_end or -math.inf
    if terms is not None and terms.period_start is not None:
        return terms.period_start
    return -math.inf


def _terms_for(
    answer: Answer, before: CachedAnswer | None
) -> tuple[Terms | None, float]:
    """Return what is known of the terms, and since when."""
    if before is None:
        return None, -math.inf
    granted = before.answer.total_available_grant_amount
    if granted != answer.total_available_grant_amount:
        return before.terms, -math.inf  # perhaps it is another entitlement now
    return before.terms, before.terms_at


def _decision(known: CachedAnswer, now: float) -> Decision:
    source: DecisionSource = "cache"
    if known.asked_at >= now:
        source = "openmeter"
    else:
        known.used = True
    if now >= known.fresh_until:
        source = "stale"
    decision = known.decision
    return replace(decision, source=source)


#: First sights leave this part of the questions to customers that are known.
_RESERVED_QUESTIONS = 0.5


#: Seconds for which the id of a customer holds by which version 3 is asked. Of a
#: customer that is deleted meanwhile OpenMeter says so.
_IDS_HOLD = 600.0


def question_client(policy: Policy, timeout: float) -> EntitlementClient:
    """Return a client for the version and the server that *policy* names."""
    url = _questions_url(policy)
    key = policy.questions_key
    if policy.api_flavor == "v3":
        return ClientV3(url=url, key=key, timeout=timeout)
    return ClientV1(url=url, key=key, timeout=timeout)


def _has_others(policy: Policy) -> bool:
    """Return True if there is a store that other processes use, too."""
    return policy.spool_dir is not None or policy.redis_url is not None


def _scope(policy: Policy) -> str:
    """Return a short name for the server and the key that questions are asked with.

    Accounts of another server, or of another key of the same one, are not ours.

    :raises StoreAway: if the key cannot be read now.
    """
    try:
        key = policy.questions_key.current()
    except ValueError as error:
        raise StoreAway(f"no account can be named: {error}") from error
    named = f"{_questions_url(policy)}\0{key or ''}"
    return hashlib.sha256(named.encode()).hexdigest()[:12]


def _questions_url(policy: Policy) -> str:
    return policy.entitlements_url or policy.api_url


def _id_lifetimes(policy: Policy, lifetimes: Lifetimes) -> Lifetimes:
    """Return how long the customer of a subject is known."""
    if policy.api_flavor == "v3":
        return lifetimes._replace(allow=max(lifetimes.allow, _IDS_HOLD))
    return lifetimes


def visibility_of(policy: Policy) -> Visibility | None:
    """Return what looks how far usage is visible, None if no quota is counted down."""
    if not policy.entitlement_meters or policy.dry_run:
        return None
    # Here, as only some applications count quotas down.
    from openmeter_wsgi.entitlements.visibility_probes import Visibility

    return Visibility(policy)


def follow_delivery(
    policy: Policy, visibility: Visibility, transport: Sending, store: Store | None
) -> None:
    """Let *visibility* watch *transport*, with the tokens of *store* or a new one."""
    taking = store or _open_store(policy)
    rate = question_rate(policy.question_rate, url=_questions_url(policy))
    visibility.follow(transport, lambda: taking.take_question(rate))


def _open_store(policy: Policy) -> Store:
    return open_store(policy.spool_dir, policy.redis_url, partial(_scope, policy))


def entitlement_service(
    policy: Policy, transport: Sending, visibility: Visibility | None
) -> EntitlementService:
    """Return the entitlements of one process. Opens nothing and starts no thread."""
    rate = question_rate(policy.question_rate, url=_questions_url(policy))
    store = _open_store(policy)
    if visibility is None:
        visible_until = FixedLag(transport.delivered_until, policy.visibility_lag).until
    else:
        visible_until = visibility.until
        follow_delivery(policy, visibility, transport, store)
    ledger = Ledger(store, visible_until=visible_until)
    new_client = partial(question_client, policy, policy.entitlement_timeout)
    lifetimes = Lifetimes(policy.allow_ttl, policy.deny_ttl, policy.max_stale)
    return EntitlementService(
        new_asker=lambda answering, recall: BackgroundLookup(
            new_client=new_client,
            answering=answering,
            recall=recall,
            take_question=lambda reserve: store.take_question(rate, reserve=reserve),
            timeout=policy.entitlement_timeout,
            rate=rate,
            reserve=max(min(rate * _RESERVED_QUESTIONS, rate - 1), 0),
        ),
        countdown=LocalQuota(ledger, policy.entitlement_meters),
        lifetimes=lifetimes,
        id_lifetimes=_id_lifetimes(policy, lifetimes),
        close_store=store.close,
        shared=SharedAnswers(store) if _has_others(policy) else None,
        visibility=visibility,
        tells_periods=any(
            each.usage_headers
            for each in (policy, *(own for _, own in policy.of_routes))
            if each is not None
        ),
    )
