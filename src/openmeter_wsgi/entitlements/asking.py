"""Asking OpenMeter: off the request's thread, each thing once, and never too much."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.breaker import Breaker
from openmeter_wsgi.errors import DeliveryError, Held
from openmeter_wsgi.options.entitlement_values import unaddressable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from openmeter_wsgi.questions import QuestionClient

logger = log.get_logger(__name__)

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
    "Callable[[QuestionClient, Question, Callable[[], None], HasToken], None]"
)


class Asks(Protocol):
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


class Asker:
    """Puts questions to OpenMeter, each in a thread that ends with it.

    Belongs to one process; any thread. There is no pool: questions are few, because
    answers are kept, and a thread costs less than the request that it makes.
    """

    def __init__(
        self,
        *,
        new_client: Callable[[], QuestionClient],
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
        self._clients: deque[QuestionClient] = deque()
        self._under_way: dict[Question, threading.Event] = {}
        #: Until when not to ask what OpenMeter calls a mistake: for features, whoever
        #: the customer is, or for one customer.
        self._mistaken: dict[tuple[str, ...] | Question, float] = {}
        self._starting = threading.Lock()
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
        """Close the connections that are idle."""
        while self._clients:
            self._clients.popleft().close()

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
        try:
            client = self._clients.pop()
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
            self._clients.append(client)

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
        client: QuestionClient,
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
        self, features: tuple[str, ...], client: QuestionClient, has_token: HasToken
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
        self._clients.append(client)
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
            logging.ERROR if isinstance(error, Held) else logging.WARNING,
            "%s: OpenMeter does not say what %r may (status %s: %s); known answers "
            "hold for max_stale, then fail_mode decides",
            "entitlements", question.customer, error.status or "none", error.reason,
        )  # fmt: skip
