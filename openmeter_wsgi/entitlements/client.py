"""Questions about entitlements: the HTTP client, and lookups in the background."""

from __future__ import annotations

import datetime  # noqa: TC003 - decoded into
import logging
import re
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias
from urllib.parse import quote

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.connection import Connection, Reply, delivery_error
from openmeter_wsgi.errors import DeliveryError, Misconfigured
from openmeter_wsgi.options import unaddressable
from openmeter_wsgi.values import text_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from openmeter_wsgi.options import ApiKey

logger = log.get_logger(__name__)


_VALUE = "/api/v2/customers/{}/entitlements/{}/value"
_ACCESS = "/api/v1/customers/{}/access"
_TERMS = "/api/v2/customers/{}/entitlements/{}"
_CUSTOMERS = "/api/v1/customers?subject={}&page={}&pageSize={}"
#: A key that no customer has.
NOBODY = "openmeter_wsgi.nobody"
#: OpenMeter's own default.
_PAGE_SIZE = 100
#: A customer with hundreds of features still fits.
_MAX_ANSWER_BYTES = 1_048_576
#: OpenMeter's own bound, in characters.
_MAX_KEY = 256
#: What a server or a proxy could resolve to the path of another customer, and NUL,
#: for which OpenMeter's database has an error only.
_NO_KEY = re.compile(r"(?:^|[/\\])\.{1,2}(?:[/\\]|$)|^/|//|/$|\0")
#: 412: the customer was deleted.
_UNKNOWN = {404, 412}


class Answer(msgspec.Struct, frozen=True, rename="camel"):
    """What OpenMeter says of one customer and one feature (``EntitlementValue``)."""

    #: OpenMeter leaves this out where it is false.
    has_access: bool = False
    #: These three where the entitlement is metered.
    balance: float | None = None
    usage: float | None = None
    overage: float | None = None
    #: All that was granted in this period.
    total_available_grant_amount: float | None = None
    #: Where it is static: JSON, as text.
    config: str | None = None
    #: Whether OpenMeter knows the customer at all.
    known_customer: bool = True
    #: Whether it is known to be metered, although nothing is said of a balance.
    is_metered: bool = False


class Terms(msgspec.Struct, frozen=True):
    """What only the entitlement itself says, and not its value."""

    #: Whether access goes on when the balance is used up.
    soft_limit: bool = False
    #: When the usage period ends, in seconds since 1970; None where it has none.
    period_end: float | None = None

    def is_over(self, now: float) -> bool:
        """Say whether that period has ended."""
        return self.period_end is not None and self.period_end <= now


class _Period(msgspec.Struct):
    to: datetime.datetime


class _Entitlement(msgspec.Struct, rename="camel"):
    is_soft_limit: bool = False
    current_usage_period: _Period | None = None


class _Access(msgspec.Struct):
    #: Each is decoded by itself, and only if it was asked for.
    entitlements: dict[str, msgspec.Raw]


class _Attribution(msgspec.Struct, rename="camel"):
    subject_keys: list[str] = []


class _Customer(msgspec.Struct, rename="camel"):
    id: str
    key: str | None = None
    usage_attribution: _Attribution | None = None

    def has_subject(self, subject: str) -> bool:
        attribution = self.usage_attribution
        return attribution is not None and subject in attribution.subject_keys


class _CustomerPage(msgspec.Struct, rename="camel"):
    items: list[_Customer]
    total_count: int
    page_size: int


class CustomerPage(NamedTuple):
    """What one request of a lookup found: the customer of a subject, or none."""

    #: The key or id by which that customer is asked for.
    customer: str | None
    is_last: bool
    #: The key and the id of that customer, as far as they are known.
    names: tuple[str, ...] = ()


NO_ACCESS = Answer()
UNKNOWN_CUSTOMER = Answer(known_customer=False)
#: By feature: the answer, or the error in its place.
Answers: TypeAlias = "dict[str, Answer | DeliveryError]"


class EntitlementClient(ABC):
    """Asks one OpenMeter server. Belongs to one thread at a time.

    Each method but `lookup` and `probe` sends one request per question.

    :raises Unavailable: from each question, if there is no answer now.
    :raises Held: if the question cannot be answered as it is configured.
    """

    #: Whether a feature can be asked for without all others of the customer.
    asks_singly: ClassVar[bool]

    def __init__(self, *, url: str, key: ApiKey, timeout: float) -> None:
        self._url = url
        self._connection = Connection(
            key=key, timeout=timeout, max_answer_bytes=_MAX_ANSWER_BYTES
        )

    @abstractmethod
    def addresses(self, customer: str) -> bool:
        """Return True if OpenMeter takes *customer* as it is, without a lookup."""

    @abstractmethod
    def answers(self, customer: str, features: Sequence[str]) -> Answers:
        """Ask for *features* of *customer*."""

    @abstractmethod
    def can_look_up(self, subject: str) -> bool:
        """Return True if *subject* may belong to a customer of another name."""

    @abstractmethod
    def lookup(self, subject: str, step: int) -> CustomerPage:
        """Send the request number *step*, from 1, for the customer of *subject*."""

    @abstractmethod
    def terms(self, customer: str, feature: str) -> Terms:
        """Ask for the entitlement itself."""

    @abstractmethod
    def probe(self, features: Sequence[str]) -> None:
        """Ask for a customer that does not exist, to see whether OpenMeter answers."""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _get(self, path: str) -> Reply:
        return self._connection.request("GET", self._url + path)


class ClientV1(EntitlementClient):
    """Asks by version 1 and 2 of the API, which take the key of a customer."""

    asks_singly = True

    def addresses(self, customer: str) -> bool:
        """Return True if *customer* can be a key."""
        return is_key(customer)

    def answers(self, customer: str, features: Sequence[str]) -> Answers:
        """Ask for *features* of *customer*; several of them cost one request."""
        if not is_key(customer):
            return dict.fromkeys(features, UNKNOWN_CUSTOMER)
        if len(features) > 1:
            return self._access(customer, features)
        return {feature: self._answer(customer, feature) for feature in features}

    def can_look_up(self, subject: str) -> bool:
        """Return True if *subject* may belong to a customer of another key."""
        return is_key(subject)

    def lookup(self, subject: str, step: int) -> CustomerPage:
        """Look for the customer that has *subject* on one page of the list.

        OpenMeter lists all customers with a subject that contains this one, in
        capitals or not.
        """
        url = _CUSTOMERS.format(quote(subject, safe=""), step, _PAGE_SIZE)
        listed = decoded(self._get(url), _CustomerPage)
        is_last = not listed.items or step * listed.page_size >= listed.total_count
        for customer in listed.items:
            if customer.has_subject(subject):
                key = customer.key
                name = key if key and is_key(key) else customer.id
                return CustomerPage(name, True, (name,))
        return CustomerPage(None, is_last)

    def terms(self, customer: str, feature: str) -> Terms:
        """Ask for the entitlement itself."""
        reply = self._get(_path(_TERMS, customer, feature))
        if reply.status == 404:
            return Terms()
        said = decoded(reply, _Entitlement)
        period = said.current_usage_period
        return Terms(said.is_soft_limit, period and period.to.timestamp())

    def probe(self, features: Sequence[str]) -> None:
        """Ask for *features* of a customer that does not exist."""
        self.answers(NOBODY, features)

    def _answer(self, customer: str, feature: str) -> Answer:
        reply = self._get(_path(_VALUE, customer, feature))
        if reply.status in _UNKNOWN and detail_of(reply):
            return UNKNOWN_CUSTOMER
        return decoded(reply, Answer)  # type: ignore[no-any-return]

    def _access(self, customer: str, features: Sequence[str]) -> Answers:
        reply = self._get(_path(_ACCESS, customer))
        if reply.status in _UNKNOWN and detail_of(reply):
            return dict.fromkeys(features, UNKNOWN_CUSTOMER)
        found = decoded(reply, _Access).entitlements
        return {feature: _entry(found.get(feature)) for feature in features}


def is_key(customer: str) -> bool:
    """Return True if OpenMeter can have a customer of this key.

    A caller that names itself could otherwise bring about an error, which speaks of
    the configuration, or get the answer about another customer.
    """
    if not customer or len(customer) > _MAX_KEY or _NO_KEY.search(customer):
        return False
    return text_problem(customer) is None


def _path(template: str, *keys: str) -> str:
    # Encoded whole, so that none of them can leave its place in the path.
    return template.format(*(quote(key, safe="") for key in keys))


def _entry(value: msgspec.Raw | None) -> Answer | DeliveryError:
    if value is None:
        return NO_ACCESS
    try:
        return parsed(value, Answer)  # type: ignore[no-any-return]
    except Misconfigured as error:
        return error


def decoded(reply: Reply, kind: type[Any]) -> Any:
    """Return the answer in *reply* as *kind*, or raise what it means."""
    if reply.status != 200 or reply.is_page:
        raise delivery_error(reply)
    return parsed(reply.body, kind)


def parsed(body: bytes | msgspec.Raw, kind: type[Any]) -> Any:
    """Return the JSON in *body* as *kind*.

    :raises Held: if it is something else.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Misconfigured(
            f"an answer that cannot be read: {error}", status=200
        ) from None


def detail_of(reply: Reply) -> str:
    """Return the detail of a problem, empty where the path itself is wrong.

    Of a route that it does not have OpenMeter says no more than "Not Found".
    """
    try:
        problem = msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    detail = problem.get("detail") if isinstance(problem, dict) else None
    return detail if isinstance(detail, str) else ""


#: Seconds between two questions that try whether OpenMeter is back; each that fails
#: doubles the wait.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0


class Breaker:
    """Knows whether OpenMeter answers.

    Any thread: two that come at once may both try, which does no harm.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause = 0.0
        self._try_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the last question found nobody."""
        return self._pause > 0

    @property
    def is_due(self) -> bool:
        """Whether `may_try` may say yes."""
        return self._clock() >= self._try_at

    def may_try(self) -> bool:
        """Say whether it is time for a question; one caller a pause gets a yes."""
        now = self._clock()
        if now < self._try_at:
            return False
        if self._pause:
            self._try_at = now + self._pause
        return True

    def succeeded(self) -> None:
        """Note an answer."""
        self._pause = self._try_at = 0.0

    def failed(self) -> None:
        """Note that none came."""
        self._pause = min(max(self._pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
        self._try_at = self._clock() + self._pause

    def slow_down(self, seconds: float) -> None:
        """Ask nothing for so long: OpenMeter answers, but was asked too much."""
        self._try_at = max(self._try_at, self._clock() + seconds)


#: Of customers seen for the first time so many wait for an answer at once; were there
#: no bound, a client that makes up names would occupy every thread of the server.
FIRST_SIGHTS = 4
_REFRESHES = 2
#: After a 429 without Retry-After, in seconds.
_SLOW_DOWN = 1.0
#: For so long nobody asks again what OpenMeter calls a mistake …
_MISTAKE_HOLDS = 5.0
#: … and so many such questions are remembered.
_MAX_MISTAKES = 1_000


class Question(NamedTuple):
    """What is asked: these features of that customer."""

    customer: str
    features: tuple[str, ...]


def questions_about(customer: str, features: Sequence[str]) -> list[Question]:
    """Return what to ask: one question, and each key that OpenMeter refuses by itself.

    Together with others such a key would only be missing from the answer, as if there
    were no access; and what is known of the others does not depend on it.
    """
    if len(features) == 1:
        return [Question(customer, (features[0],))]
    refused = unaddressable(features)
    fine = tuple(feature for feature in features if feature not in refused)
    alone = [Question(customer, (feature,)) for feature in refused]
    return [Question(customer, fine), *alone] if fine else alone


#: Waits for leave to send one request more; returns False if there is none in time.
HasToken: TypeAlias = "Callable[[], bool]"
#: Puts the question to OpenMeter and remembers the answer. Its first callable is
#: called once, when the waiting requests need wait no longer.
Answering: TypeAlias = (
    "Callable[[EntitlementClient, Question, Callable[[], None], HasToken], None]"
)


class Lookup(Protocol):
    """Puts questions to OpenMeter, or to what stands in for it. Any thread."""

    breaker: Breaker

    def ask(self, question: Question) -> None:
        """Ask, and wait for the answer, if asking makes sense now."""

    def refresh(self, question: Question) -> None:
        """Ask without waiting, if asking makes sense now."""

    def has_token(self) -> bool:
        """Take a token for a further question, if there is one."""

    def close(self) -> None:
        """Close the connections that are idle."""


class BackgroundLookup:
    """Puts questions to OpenMeter, each in a thread that ends with it.

    Belongs to one process; any thread. There is no pool: questions are few, because
    answers are kept, and a thread costs less than the request that it makes.
    """

    def __init__(
        self,
        *,
        new_client: Callable[[], EntitlementClient],
        answering: Answering,
        take_question: Callable[[float], float],
        timeout: float,
        reserve: float,
    ) -> None:
        self.breaker = Breaker()
        self._new_client = new_client
        self._answering = answering
        #: Takes a token of the host's and says how long to wait for one.
        self._take_question = take_question
        self._timeout = timeout
        #: How many tokens a first sight leaves to customers that are known.
        self._reserve = reserve
        self._clients: deque[EntitlementClient] = deque()
        self._under_way: dict[Question, threading.Event] = {}
        #: Until when not to ask what OpenMeter calls a mistake: for features, whoever
        #: the customer is, or for one customer.
        self._mistaken: dict[tuple[str, ...] | Question, float] = {}
        # Reentrant, as `close` is also called when a middleware is collected.
        self._starting = threading.RLock()
        self._first_sights = threading.Semaphore(FIRST_SIGHTS)
        self._refreshes = threading.Semaphore(_REFRESHES)

    def ask(self, question: Question) -> None:
        """Ask, and wait for the answer within the timeout, if asking makes sense now.

        Those who come while the same is being asked wait for that answer.
        """
        if self.breaker.is_open:
            self.refresh(question)  # who tries is nobody's request
            return
        done = self._under_way.get(question)
        if done is None:
            done = self._start(question, self._first_sights, reserve=self._reserve)
        if done is not None:
            done.wait(self._timeout)

    def refresh(self, question: Question) -> None:
        """Ask without waiting, unless that is being done or must not be done now."""
        if self.breaker.is_due and question not in self._under_way:
            self._start(question, self._refreshes, reserve=0)

    def close(self) -> None:
        """Close the connections: those in use when their questions have ended."""
        with self._starting:
            idle, self._clients = self._clients, deque()
        for client in idle:
            client.close()

    def _start(
        self, question: Question, slots: threading.Semaphore, *, reserve: float
    ) -> threading.Event | None:
        """Start the thread that asks; None where nobody may ask now."""
        if sys.is_finalizing():  # it would not run, and its start() wait for it
            return None
        with self._starting:
            if (under_way := self._under_way.get(question)) is not None:
                return under_way
            if self._is_mistaken(question):
                return None
            if not slots.acquire(blocking=False):
                return None
            if not self.breaker.may_try():
                slots.release()
                return None
            done = self._under_way[question] = threading.Event()
        thread = threading.Thread(
            target=self._run,
            args=(question, done, slots, reserve),
            name="openmeter_wsgi.question",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:
            logger.error("%s: no thread can be started to ask OpenMeter", error)
            self._end(question, done, slots)
        return done

    def _is_mistaken(self, question: Question) -> bool:
        now = time.monotonic()
        return any(
            now < self._mistaken.get(what, 0) for what in (question, question.features)
        )

    def _remember_mistake(self, what: tuple[str, ...] | Question) -> None:
        with self._starting:
            if len(self._mistaken) >= _MAX_MISTAKES:
                self._mistaken.clear()
            self._mistaken[what] = time.monotonic() + _MISTAKE_HOLDS

    def _run(
        self,
        question: Question,
        done: threading.Event,
        slots: threading.Semaphore,
        reserve: float,
    ) -> None:
        try:
            if self.has_token(reserve):
                self._put(question, done, partial(self.has_token, reserve))
        except Exception:
            self._remember_mistake(question)
            logger.exception("%s: a question about %s broke off", "entitlements",
                             question.customer)  # fmt: skip
        finally:
            self._end(question, done, slots)

    def _end(
        self, question: Question, done: threading.Event, slots: threading.Semaphore
    ) -> None:
        self._under_way.pop(question, None)
        slots.release()
        done.set()

    def has_token(self, reserve: float = 0.0) -> bool:
        """Wait for leave to ask one thing more; say whether there was any in time."""
        deadline = time.monotonic() + self._timeout
        while wait := self._take_question(reserve):
            if time.monotonic() + wait > deadline:
                logger.warning(
                    "%s: more questions than question_rate allows; some requests are "
                    "decided without an answer",
                    "entitlements",
                )
                return False
            time.sleep(wait)
        return True

    def _put(
        self, question: Question, done: threading.Event, has_token: HasToken
    ) -> None:
        clients = self._clients
        try:
            client = clients.pop()
        except IndexError:
            client = self._new_client()
        try:
            self._answering(client, question, done.set, has_token)
        except DeliveryError as error:
            client.close()
            self._log_failure(error, question)
            if error.status is None and self._note_silence(done):
                return
            self._failed(error, question, client, has_token)
        else:
            self._note_answer()
        self._give_back(client, clients)

    def _give_back(
        self, client: EntitlementClient, clients: deque[EntitlementClient]
    ) -> None:
        """Keep *client* for the next question, unless all were closed meanwhile."""
        with self._starting:
            if clients is self._clients:
                clients.append(client)
                return
        client.close()

    def _note_answer(self) -> None:
        if self.breaker.is_open:
            logger.warning("%s: OpenMeter answers again", "entitlements")
        self.breaker.succeeded()

    def _note_silence(self, done: threading.Event) -> bool:
        """Open the breaker, as nobody answered; return True if it was open before."""
        was_open = self.breaker.is_open
        self.breaker.failed()
        done.set()  # who waits has waited long enough
        return was_open

    def _failed(
        self,
        error: DeliveryError,
        question: Question,
        client: EntitlementClient,
        has_token: HasToken,
    ) -> None:
        """Note a failure where it belongs: to one customer, to features, or to all."""
        if self._is_too_much(error):
            return
        refusal = self._refusal_of_nobody(question.features, client, has_token)
        if refusal is None:
            self._remember_mistake(question)
        elif refusal.status == 400:
            # Of these features alone; of the others it may know all there is.
            self._remember_mistake(question.features)
        elif not self._is_too_much(refusal) and error.status is not None:
            self.breaker.failed()

    def _refusal_of_nobody(
        self, features: tuple[str, ...], client: EntitlementClient, has_token: HasToken
    ) -> DeliveryError | None:
        """Ask for a customer that does not exist; return the error, if there is one.

        Whoever chooses the name of a customer could otherwise stop the questions for
        all others, with a name that OpenMeter or a proxy has no right answer for.
        """
        if not has_token():
            return None
        try:
            client.probe(features)
        except DeliveryError as refusal:
            client.close()
            return refusal
        self._note_answer()
        return None

    def _is_too_much(self, error: DeliveryError) -> bool:
        """Slow down if OpenMeter was asked too often."""
        if error.status != 429:
            return False
        pause = error.retry_after or _SLOW_DOWN
        self.breaker.slow_down(pause)
        logger.warning(
            "%s: OpenMeter was asked too often, no questions for %.1f s; known answers "
            "go on to hold",
            "entitlements", pause,
        )  # fmt: skip
        return True

    def _log_failure(self, error: DeliveryError, question: Question) -> None:
        if error.status == 429:
            return
        logger.log(
            logging.ERROR if isinstance(error, Misconfigured) else logging.WARNING,
            "%s: OpenMeter does not say what %r may (status %s: %s); known answers "
            "hold for max_stale, then fail_mode decides",
            "entitlements", question.customer, error.status or "none", error.reason,
        )  # fmt: skip
