"""Lookups: questions to OpenMeter, queued for a token and asked by worker threads.

A request whose answer is not cached puts a question into a queue and waits for the
answer, at most ``entitlement_timeout``. Worker threads take the questions in order.
Each HTTP request to OpenMeter needs a *token*; all processes that use one store share
``question_rate`` tokens a second. A question that is already queued is not queued
again: all its requests wait for the same answer. If OpenMeter gives no usable answer, a
circuit breaker opens: requests wait no longer, and single questions, with pauses
between them, try OpenMeter again.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeAlias

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.questions import Breaker, Pending, Question, Queue
from openmeter_wsgi.errors import DeliveryError, Misconfigured

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.entitlements.client import EntitlementClient

logger: Final = log.get_logger(__name__)


#: Waits for a token for one more HTTP request; returns False if none comes in time.
WaitForToken: TypeAlias = "Callable[[], bool]"
#: Asks OpenMeter and caches the answer. Calls its third argument once, as soon as the
#: requests that wait for the question need not wait any longer.
AskOpenMeter: TypeAlias = (
    "Callable[[EntitlementClient, Question, Callable[[], None], WaitForToken], None]"
)


class SharedResult(NamedTuple):
    """The result of reading the answers that other processes have shared."""

    #: True if the shared answers are fresh: OpenMeter need not be asked.
    is_answered: bool = False
    #: True if there is an answer of any age: the customer is known.
    is_known: bool = False


#: Puts shared answers to a question into the cache. The second argument is the
#: monotonic time after which an answer must have been asked for.
LoadShared: TypeAlias = "Callable[[Question, float], SharedResult]"


def nothing_shared(_question: Question, _since: float) -> SharedResult:
    """Return the result for a process that shares no answers."""
    return SharedResult()


class Lookup(Protocol):
    """A way to ask OpenMeter, or a stand-in for tests. Any thread."""

    breaker: Breaker

    def ask(self, question: Question, *, is_known: bool) -> float | None:
        """Ask and wait for the answer, unless the breaker is open.

        Returns the seconds until an answer is expected if the queue is too long or
        OpenMeter has answered 429, else None. *is_known*: an earlier answer about this
        customer exists.
        """

    def refresh(self, question: Question, *, since: float = 0.0) -> None:
        """Ask without waiting, unless the breaker is open.

        A shared answer that was asked for after *since* (monotonic) suffices.
        """

    @property
    def is_busy(self) -> bool:
        """True if requests wait for queued questions."""

    def wait_for_token(self) -> bool:
        """Wait for a token for one more HTTP request; return False if none comes."""

    def close(self) -> None:
        """Close the idle connections, and drop the queued questions."""


#: Maximum number of threads that ask about new customers, and about known customers.
_NEW_CUSTOMER_THREADS, _KNOWN_CUSTOMER_THREADS = 8, 4
#: Seconds without questions after a 429 that has no Retry-After.
_SLOW_DOWN = 1.0
#: Seconds for which a question that OpenMeter rejects is not asked again.
_REJECTION_TTL = 5.0
#: Maximum number of rejected questions that are remembered.
_MAX_REJECTIONS = 1_000
#: Seconds in the queue after which the shared answers are read once more.
_REREAD_AFTER = 0.5


class BackgroundLookup:
    """A `Lookup` whose worker threads start with a question and end without one.

    Belongs to one process; any thread. There is one queue for new customers and one
    for known customers. The first leaves part of the tokens to the second, so that
    made-up names cannot delay known customers. A question stays queued when its
    requests have timed out, because their clients come back.
    """

    def __init__(
        self,
        *,
        new_client: Callable[[], EntitlementClient],
        ask_openmeter: AskOpenMeter,
        take_token: Callable[[float], float],
        timeout: float,
        rate: float,
        tokens_kept_back: float,
        load_shared: LoadShared = nothing_shared,
    ) -> None:
        self.breaker: Breaker = Breaker()
        self._new_client = new_client
        self._ask_openmeter = ask_openmeter
        self._load_shared = load_shared
        #: Takes a token and returns 0.0, or returns the seconds until there is one.
        self._take_token = take_token
        self._timeout = timeout
        self._rate = rate
        #: Number of tokens left for known customers.
        self._tokens_kept_back = tokens_kept_back
        self._clients: deque[EntitlementClient] = deque()
        self._pending: dict[Question, Pending] = {}
        #: The monotonic time until which a rejected question is not asked again. Keys
        #: are questions, or features that are rejected for every customer.
        self._rejected_until: dict[tuple[str, ...] | Question, float] = {}
        # Reentrant, because `close` also runs when a middleware is garbage-collected.
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._new_customers, self._known_customers = self._new_queues()

    def _new_queues(self) -> tuple[Queue, Queue]:
        pace = 1 / self._rate
        return (
            Queue(
                threads=_NEW_CUSTOMER_THREADS,
                tokens_kept_back=self._tokens_kept_back,
                pace=pace,
            ),
            Queue(threads=_KNOWN_CUSTOMER_THREADS, tokens_kept_back=0.0, pace=pace),
        )

    @property
    def is_busy(self) -> bool:
        """True if requests wait for queued questions."""
        return self._new_customers.waiting + self._known_customers.waiting > 0

    def ask(self, question: Question, *, is_known: bool = False) -> float | None:
        """Ask and wait for the answer, at most the timeout, unless the breaker is open.

        Returns the seconds until an answer is expected if the queue is too long or
        OpenMeter has answered 429, else None. The answer itself is in the cache.
        """
        if self.breaker.is_open:
            self.refresh(question)  # no request waits for the try
            return None
        if sys.is_finalizing():  # thread.start() would wait for ever
            return None
        if (pause := self.breaker.due_in) > 0:  # after a 429
            return pause
        pending, is_first = self._register(question, since=0.0)
        if pending is None:
            return None
        if is_first:
            return self._ask_new(pending, is_known=is_known)
        if pending.queue is None:  # a refresh, or not queued yet
            with self._lock:
                self._known_customers.promote(pending)
        return self._wait(pending)

    def refresh(self, question: Question, *, since: float = 0.0) -> None:
        """Ask without waiting, unless the question is pending or not allowed now."""
        if not self.breaker.is_due or sys.is_finalizing():
            return
        pending, is_first = self._register(question, since)
        if pending is not None and is_first:
            self._enqueue(pending, self._known_customers, urgent=False)

    def close(self) -> None:
        """Close the idle connections, and drop the queued questions.

        A connection in use is closed when its question has ended.
        """
        with self._lock:
            closed, self._closed = self._closed, threading.Event()
            queues = self._new_customers, self._known_customers
            self._new_customers, self._known_customers = self._new_queues()
            dropped = [pending for queue in queues for pending in queue.clear()]
            idle, self._clients = self._clients, deque()
        closed.set()
        for pending in dropped:
            self._finish(pending)
        for client in idle:
            client.close()

    # -- In the thread of a request

    def _register(
        self, question: Question, since: float
    ) -> tuple[Pending | None, bool]:
        """Return the pending question, and True if this call created it.

        Returns None for a question that OpenMeter has rejected recently.
        """
        with self._lock:
            if (pending := self._pending.get(question)) is not None:
                pending.since = max(pending.since, since)
                return pending, False
            if self._is_rejected(question):
                return None, False
            pending = self._pending[question] = Pending(question, since)
            return pending, True

    def _ask_new(self, pending: Pending, *, is_known: bool) -> float | None:
        """Read the shared answers; if they do not suffice, queue *pending* and wait."""
        result = self._read_shared(pending)
        if result.is_answered:
            self._finish(pending)
            return None
        is_known = is_known or result.is_known
        queue = self._known_customers if is_known else self._new_customers
        if not self._enqueue(pending, queue, urgent=True):
            return self._busy_for(queue, queue.seconds_until())
        return self._wait(pending)

    def _read_shared(self, pending: Pending) -> SharedResult:
        pending.shared_read_at = time.monotonic()
        return self._load_shared(pending.question, pending.since)

    def _enqueue(self, pending: Pending, queue: Queue, *, urgent: bool) -> bool:
        """Put *pending* into *queue*; return False if the queue is full."""
        with self._lock:
            if is_full := queue.is_full:
                self._finish(pending)
            else:
                queue.add(pending, urgent=urgent)
        if not is_full:
            self._start_thread_if_needed(queue)
        return not is_full

    def _wait(self, pending: Pending) -> float | None:
        """Wait for the answer; return the estimated wait if it exceeds the timeout."""
        queue, position = pending.queue, pending.position
        if queue is not None and queue.seconds_until(position) > self._timeout:
            return self._busy_for(queue, queue.seconds_until(position))
        if pending.wait(self._timeout):
            return None
        if queue is None or not pending.is_queued:
            return None
        return self._busy_for(queue, queue.seconds_until(position))

    def _busy_for(self, queue: Queue, seconds: float) -> float:
        """Log the length of *queue*; return *seconds*, at least 1."""
        logger.warning(
            "%s: %d questions to OpenMeter are queued, the last one for about %.0f s "
            "at question_rate=%g; until then fail_mode decides the requests that need "
            "their answers",
            "entitlements", queue.waiting, queue.seconds_until(), self._rate,
        )  # fmt: skip
        return max(seconds, 1.0)

    def _is_rejected(self, question: Question) -> bool:
        now = time.monotonic()
        return any(
            now < self._rejected_until.get(key, 0)
            for key in (question, question.features)
        )

    def _remember_rejection(self, key: tuple[str, ...] | Question) -> None:
        with self._lock:
            if len(self._rejected_until) >= _MAX_REJECTIONS:
                self._rejected_until.clear()
            self._rejected_until[key] = time.monotonic() + _REJECTION_TTL

    def _start_thread_if_needed(self, queue: Queue) -> None:
        """Start a thread, unless one waits for the next question of *queue* already."""
        with self._lock:
            if not queue or queue.waiting_threads or queue.threads >= queue.max_threads:
                return
            queue.waiting_threads += 1
            queue.threads += 1
            thread = threading.Thread(
                target=self._run,
                args=(queue, self._closed),
                name="openmeter_wsgi.question",
                daemon=True,
            )
        try:
            thread.start()
        except RuntimeError as error:
            logger.error("%s: no thread can be started to ask OpenMeter; fail_mode "
                         "decides the queued requests", error)  # fmt: skip
            with self._lock:
                queue.waiting_threads -= 1
                queue.threads -= 1
                dropped = queue.clear()
            for pending in dropped:
                self._finish(pending)

    # -- In a worker thread

    def _run(self, queue: Queue, closed: threading.Event) -> None:
        """Ask questions until *queue* is empty. The body of a worker thread."""
        while (pending := self._next_question(queue, closed)) is not None:
            self._start_thread_if_needed(queue)  # for the next question
            try:
                self._send(pending)
            except Exception:
                self._remember_rejection(pending.question)
                logger.exception(
                    "%s: the question about customer %r failed; cached answers are "
                    "used for max_stale, then fail_mode decides",
                    "entitlements", pending.question.customer,
                )  # fmt: skip
            finally:
                self._finish(pending)
            with self._lock:
                queue.waiting_threads += 1

    def _next_question(self, queue: Queue, closed: threading.Event) -> Pending | None:
        """Return the next question that must be asked, after taking a token for it."""
        with queue.token_lock:
            while True:
                with self._lock:
                    pending = queue.take()
                    if pending is None:
                        queue.waiting_threads -= 1
                        queue.threads -= 1
                        return None
                if self._may_be_sent(pending, queue, closed):
                    with self._lock:
                        queue.note_token_taken(pending)
                        queue.waiting_threads -= 1
                    return pending
                with self._lock:
                    queue.note_dropped(pending)
                self._finish(pending)

    def _may_be_sent(
        self, pending: Pending, queue: Queue, closed: threading.Event
    ) -> bool:
        """Take a token for *pending*; return False if it must be dropped instead."""
        try:
            return self._must_be_asked(pending) and self._wait_for_queue_token(
                queue, closed
            )
        except Exception:  # must not end the thread, which the queue has counted
            logger.exception(
                "%s: the store failed; customer %r is not asked about, fail_mode "
                "decides the requests that wait for it",
                "entitlements", pending.question.customer,
            )  # fmt: skip
            return False

    def _must_be_asked(self, pending: Pending) -> bool:
        """Return False if another process has asked, or the breaker does not allow it.

        If the breaker is open, True is its one try per pause.
        """
        waited = time.monotonic() - pending.shared_read_at
        if waited > _REREAD_AFTER and self._read_shared(pending).is_answered:
            return False
        return self.breaker.may_try()

    def _wait_for_queue_token(self, queue: Queue, closed: threading.Event) -> bool:
        """Wait for a token; return False if the lookup is closed meanwhile."""
        while not closed.is_set():
            wait = self._take_token(queue.tokens_kept_back)
            if not wait:
                return True
            closed.wait(wait)
        return False

    def wait_for_token(self) -> bool:
        """Wait for a token for one more HTTP request; return False if none comes."""
        deadline = time.monotonic() + self._timeout
        closed = self._closed
        while wait := self._take_token(0.0):
            if time.monotonic() + wait > deadline or closed.wait(wait):
                logger.warning(
                    "%s: more questions than question_rate=%g allows; fail_mode "
                    "decides some requests",
                    "entitlements", self._rate,
                )  # fmt: skip
                return False
        return True

    def _finish(self, pending: Pending) -> None:
        """Remove a question that is answered or dropped, and wake its requests."""
        with self._lock:
            self._pending.pop(pending.question, None)
        pending.finish()

    def _send(self, pending: Pending) -> None:
        """Ask OpenMeter with an idle client or a new one; handle its errors."""
        clients = self._clients
        try:
            client = clients.pop()
        except IndexError:
            client = self._new_client()
        try:
            question = pending.question
            self._ask_openmeter(client, question, pending.finish, self.wait_for_token)
        except DeliveryError as error:
            client.close()
            self._log_failure(error, pending.question)
            if error.status is None and self._note_no_answer(pending):
                return  # an outage that goes on needs no probe
            self._handle_failure(error, pending.question, client)
        except Exception:
            client.close()
            raise
        else:
            self._note_answer()
        self._return_client(client, clients)

    def _return_client(
        self, client: EntitlementClient, clients: deque[EntitlementClient]
    ) -> None:
        """Keep *client* for the next question, or close it if the lookup was closed."""
        with self._lock:
            if clients is self._clients:
                clients.append(client)
                return
        client.close()

    def _note_answer(self) -> None:
        if self.breaker.is_open:
            logger.warning(
                "%s: OpenMeter answers again", "entitlements", extra=log.OVER
            )
        self.breaker.succeeded()

    def _note_no_answer(self, pending: Pending) -> bool:
        """Open the breaker, drop all questions; return True if it was open already.

        No answer means that the connection failed or timed out.
        """
        was_open = self.breaker.is_open
        self.breaker.failed()
        with self._lock:
            dropped = [*self._new_customers.clear(), *self._known_customers.clear()]
        pending.finish()
        for other in dropped:
            self._finish(other)
        return was_open

    def _handle_failure(
        self, error: DeliveryError, question: Question, client: EntitlementClient
    ) -> None:
        """Stop the questions that *error* concerns: this one, its features, or all.

        A probe finds out which. Without a probe, only this question is stopped.
        """
        if self._slow_down_if_429(error):
            return
        probe_error = self._probe_error(question.features, client)
        if probe_error is None:
            self._remember_rejection(question)
        elif probe_error.status == 400:
            # Questions about other features may work.
            self._remember_rejection(question.features)
        elif not self._slow_down_if_429(probe_error) and error.status is not None:
            # Without a status, `_note_no_answer` has opened the breaker already.
            self.breaker.failed()

    def _probe_error(
        self, features: tuple[str, ...], client: EntitlementClient
    ) -> DeliveryError | None:
        """Ask about a customer that does not exist; return the error.

        Returns None if there is no error, or no token for the probe. Without probes, a
        caller who sends a customer name that OpenMeter or a proxy answers with an error
        could stop the questions for all others.
        """
        if not self.wait_for_token():
            return None
        try:
            client.probe(features)
        except DeliveryError as error:
            client.close()
            return error
        self._note_answer()
        return None

    def _slow_down_if_429(self, error: DeliveryError) -> bool:
        """Pause all questions and return True if OpenMeter answered 429."""
        if error.status != 429:
            return False
        pause = error.retry_after or _SLOW_DOWN
        self.breaker.slow_down(pause)
        logger.warning(
            "%s: OpenMeter answered 429; no questions are sent for %.1f s, cached "
            "answers remain in use",
            "entitlements", pause,
        )  # fmt: skip
        return True

    def _log_failure(self, error: DeliveryError, question: Question) -> None:
        if error.status == 429:
            return
        logger.log(
            logging.ERROR if isinstance(error, Misconfigured) else logging.WARNING,
            "%s: OpenMeter gives no answer about customer %r (status %s: %s); cached "
            "answers are used for max_stale, then fail_mode decides",
            "entitlements", question.customer, error.status or "none", error.reason,
        )  # fmt: skip
