"""Lookups: questions to OpenMeter, queued for a token and asked by worker threads.

A request whose answer is not cached puts a question into a queue and waits for the
answer, at most ``entitlement_timeout``. Worker threads take the questions in order.
Each HTTP request to OpenMeter needs a *token*; all processes that use one store share
``question_rate`` tokens a second. A question that is already queued is not queued
again: all its requests wait for the same answer. If no answer comes, a circuit breaker
opens: from then on single questions, with pauses between them, try OpenMeter again.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeAlias

from openmeter_wsgi import log
from openmeter_wsgi.errors import DeliveryError, Misconfigured
from openmeter_wsgi.options import unaddressable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from openmeter_wsgi.entitlements.client import EntitlementClient

logger: Final = log.get_logger(__name__)


#: Minimum and maximum seconds between two tries of an open breaker. Each failure
#: doubles the pause.
_MIN_PAUSE, _MAX_PAUSE = 0.5, 5.0


class Breaker:
    """A circuit breaker: open while OpenMeter does not answer.

    Any thread. Two threads that call it at once may both try, which does no harm.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause = 0.0
        self._try_at = 0.0

    @property
    def is_open(self) -> bool:
        """True if the last question got no answer."""
        return self._pause > 0

    @property
    def is_due(self) -> bool:
        """True if `may_try` would return True now."""
        return self._clock() >= self._try_at

    @property
    def due_in(self) -> float:
        """Seconds until the next question may be asked, 0.0 if it may be asked now."""
        return max(self._try_at - self._clock(), 0.0)

    def may_try(self) -> bool:
        """Return True if a question may be asked.

        While the breaker is open, one caller per pause gets True.
        """
        now = self._clock()
        if now < self._try_at:
            return False
        if self._pause:
            self._try_at = now + self._pause
        return True

    def succeeded(self) -> None:
        """Close the breaker: OpenMeter answered."""
        self._pause = self._try_at = 0.0

    def failed(self) -> None:
        """Open the breaker, or double its pause: no answer came."""
        self._pause = min(max(self._pause * 2, _MIN_PAUSE), _MAX_PAUSE)
        self._try_at = self._clock() + self._pause

    def slow_down(self, seconds: float) -> None:
        """Allow no question for *seconds*: OpenMeter answered 429."""
        self._try_at = max(self._try_at, self._clock() + seconds)


class Question(NamedTuple):
    """A question to OpenMeter: the access of one customer to some features."""

    customer: str
    features: tuple[str, ...]


def questions_about(customer: str, features: Sequence[str]) -> list[Question]:
    """Return one question about all valid *features*, and one for each invalid key.

    In an answer about several features an invalid key would only be missing, which
    looks like a denial. Asked for alone, it is answered with an error.
    """
    if len(features) == 1:
        return [Question(customer, (features[0],))]
    refused = unaddressable(features)
    valid = tuple(feature for feature in features if feature not in refused)
    alone = [Question(customer, (feature,)) for feature in refused]
    return [Question(customer, valid), *alone] if valid else alone


#: Waits for a token for one more HTTP request; returns False if none comes in time.
WaitForToken: TypeAlias = "Callable[[], bool]"
#: Asks OpenMeter and caches the answer. Calls its first callable once, as soon as the
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

        Returns the seconds until the answer is expected if the queue is too long,
        else None. *is_known*: an earlier answer about this customer exists.
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
#: Maximum number of questions per queue; less than 4 MiB with keys of 256 characters.
MAX_QUEUE = 2_048
#: Weight of the last question in the moving average of a queue's pace.
_PACE_WEIGHT = 0.2
#: Seconds without questions after a 429 that has no Retry-After.
_SLOW_DOWN = 1.0
#: Seconds for which a question that OpenMeter rejects is not asked again.
_REJECTION_TTL = 5.0
#: Maximum number of rejected questions that are remembered.
_MAX_REJECTIONS = 1_000
#: Seconds in the queue after which the shared answers are read once more.
_REREAD_AFTER = 0.5


#: Held while the event of a question is created or read. Reentrant, because the garbage
#: collector may finalize a middleware meanwhile.
_event_lock = threading.RLock()


class _Pending:
    """A question that is queued or being asked, with the event for its waiters."""

    __slots__ = (
        "_event", "_is_done", "position", "question", "queue", "shared_read_at",
        "since",
    )  # fmt: skip

    def __init__(self, question: Question, since: float) -> None:
        self.question = question
        self.since = since
        self._is_done = False
        #: Created by the first waiter: most questions in a long queue have none.
        self._event: threading.Event | None = None
        #: The queue if the question is urgent, and its serial number there.
        self.queue: _Queue | None = None
        self.position = 0
        self.shared_read_at = 0.0

    def wait(self, timeout: float) -> bool:
        """Wait until the question is done; return False after *timeout* seconds."""
        with _event_lock:
            event = self._event = self._event or threading.Event()
        return self._is_done or event.wait(timeout)

    def finish(self) -> None:
        """Wake all requests that wait. May be called more than once."""
        self._is_done = True
        with _event_lock:
            event = self._event
        if event is not None:
            event.set()

    @property
    def is_queued(self) -> bool:
        """True if the question is urgent and has no token yet."""
        return self.queue is not None and self.queue.contains(self.position)


class _Queue:
    """A queue of questions, first in, first out. The lookup's lock guards it.

    Urgent questions, which requests wait for, go before refreshes.
    """

    def __init__(self, *, threads: int, reserve: float, pace: float) -> None:
        self.max_threads = threads
        #: Number of tokens left for the other queue.
        self.reserve = reserve
        self.threads = 0
        #: Number of threads that wait for the next question or for its token.
        self.waiting_threads = 0
        #: Held by the thread that waits for a token, so that tokens go in order.
        self.token_lock = threading.Lock()
        self._urgent: deque[_Pending] = deque()
        self._later: deque[_Pending] = deque()
        #: Number of urgent questions ever added, and removed.
        self._urgent_added = self._urgent_taken = 0
        #: Seconds between two tokens while urgent questions wait: a moving average.
        self._pace = pace
        self._taken_at = 0.0

    def __len__(self) -> int:
        return len(self._urgent) + len(self._later)

    @property
    def waiting(self) -> int:
        """The number of urgent questions without a token."""
        return self._urgent_added - self._urgent_taken

    def add(self, pending: _Pending, *, urgent: bool) -> None:
        """Append *pending*."""
        if not urgent:
            self._later.append(pending)
            return
        if not self._urgent:
            self._taken_at = time.monotonic()
        self._urgent_added += 1
        pending.queue, pending.position = self, self._urgent_added
        self._urgent.append(pending)

    def promote(self, pending: _Pending) -> None:
        """Make *pending* urgent: a request waits for it now."""
        try:
            self._later.remove(pending)
        except ValueError:
            return
        self.add(pending, urgent=True)

    def take(self) -> _Pending | None:
        """Remove and return the first question."""
        if not self._urgent:
            return self._later.popleft() if self._later else None
        return self._urgent.popleft()

    def note_token_taken(self, pending: _Pending) -> None:
        """Note that *pending* has its token; update the pace."""
        if not pending.position:
            return
        now = time.monotonic()
        self._urgent_taken += 1
        self._pace += (now - self._taken_at - self._pace) * _PACE_WEIGHT
        self._taken_at = now

    def note_dropped(self, pending: _Pending) -> None:
        """Note that *pending* needs no token."""
        self._urgent_taken += bool(pending.position)

    def contains(self, position: int) -> bool:
        """Return True if the urgent question at *position* has no token yet."""
        return position > self._urgent_taken

    def seconds_until(self, position: int | None = None) -> float:
        """Return the estimated wait at *position*, or at the end of the queue."""
        last = self._urgent_added + 1 if position is None else position
        return max(last - self._urgent_taken - 1, 0) * self._pace

    def clear(self) -> list[_Pending]:
        """Remove and return all questions."""
        removed = [*self._urgent, *self._later]
        self._urgent_taken += len(self._urgent)
        self._urgent.clear()
        self._later.clear()
        return removed


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
        reserve: float,
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
        self._reserve = reserve
        self._clients: deque[EntitlementClient] = deque()
        self._pending: dict[Question, _Pending] = {}
        #: The monotonic time until which a rejected question is not asked again. Keys
        #: are questions, or features that are rejected for every customer.
        self._rejected_until: dict[tuple[str, ...] | Question, float] = {}
        # Reentrant, because `close` also runs when a middleware is garbage-collected.
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._new_customers, self._known_customers = self._new_queues()

    def _new_queues(self) -> tuple[_Queue, _Queue]:
        pace = 1 / self._rate
        return (
            _Queue(threads=_NEW_CUSTOMER_THREADS, reserve=self._reserve, pace=pace),
            _Queue(threads=_KNOWN_CUSTOMER_THREADS, reserve=0.0, pace=pace),
        )

    @property
    def is_busy(self) -> bool:
        """True if requests wait for queued questions."""
        return self._new_customers.waiting + self._known_customers.waiting > 0

    def ask(self, question: Question, *, is_known: bool = False) -> float | None:
        """Ask and wait for the answer, at most the timeout, unless the breaker is open.

        Returns the seconds until the answer is expected if the queue is too long, else
        None. Requests with the same question wait for the same answer.
        """
        if self.breaker.is_open:
            self.refresh(question)  # no request waits for the try
            return None
        if sys.is_finalizing():  # thread.start() would wait for ever
            return None
        if (pause := self.breaker.due_in) > 0:
            return pause
        pending, is_first = self._register(question, since=0.0)
        if pending is None:
            return None
        if is_first:
            return self._ask_new(pending, is_known=is_known)
        if pending.queue is None:
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
    ) -> tuple[_Pending | None, bool]:
        """Return the pending question, and True if this call created it.

        Returns None for a question that OpenMeter has rejected recently.
        """
        with self._lock:
            if (pending := self._pending.get(question)) is not None:
                pending.since = max(pending.since, since)
                return pending, False
            if self._is_rejected(question):
                return None, False
            pending = self._pending[question] = _Pending(question, since)
            return pending, True

    def _ask_new(self, pending: _Pending, *, is_known: bool) -> float | None:
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

    def _read_shared(self, pending: _Pending) -> SharedResult:
        pending.shared_read_at = time.monotonic()
        return self._load_shared(pending.question, pending.since)

    def _enqueue(self, pending: _Pending, queue: _Queue, *, urgent: bool) -> bool:
        """Put *pending* into *queue*; return False if the queue is full."""
        with self._lock:
            if is_full := len(queue) >= MAX_QUEUE:
                self._finish(pending)
            else:
                queue.add(pending, urgent=urgent)
        if not is_full:
            self._start_thread_if_needed(queue)
        return not is_full

    def _wait(self, pending: _Pending) -> float | None:
        """Wait for the answer; return the estimated wait if it exceeds the timeout."""
        queue, position = pending.queue, pending.position
        if queue is not None and queue.seconds_until(position) > self._timeout:
            return self._busy_for(queue, queue.seconds_until(position))
        if pending.wait(self._timeout):
            return None
        if queue is None or not pending.is_queued:
            return None
        return self._busy_for(queue, queue.seconds_until(position))

    def _busy_for(self, queue: _Queue, seconds: float) -> float:
        """Log the length of *queue*; return *seconds*, at least 1."""
        logger.warning(
            "%s: %d customers are queued for a question to OpenMeter, the last one "
            "for about %.0f s at question_rate=%g; fail_mode decides their requests "
            "until then",
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

    def _start_thread_if_needed(self, queue: _Queue) -> None:
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

    def _run(self, queue: _Queue, closed: threading.Event) -> None:
        """Ask questions until *queue* is empty. The body of a worker thread."""
        while (pending := self._next_question(queue, closed)) is not None:
            self._start_thread_if_needed(queue)
            try:
                self._send(pending)
            except Exception:
                self._remember_rejection(pending.question)
                logger.exception("%s: the question about %s failed", "entitlements",
                                 pending.question.customer)  # fmt: skip
            finally:
                self._finish(pending)
            with self._lock:
                queue.waiting_threads += 1

    def _next_question(self, queue: _Queue, closed: threading.Event) -> _Pending | None:
        """Return the next question that must be asked, after taking a token for it."""
        with queue.token_lock:
            while True:
                with self._lock:
                    pending = queue.take()
                    if pending is None:
                        queue.waiting_threads -= 1
                        queue.threads -= 1
                        return None
                if self._must_be_asked(pending) and self._wait_for_queue_token(
                    queue, closed
                ):
                    with self._lock:
                        queue.note_token_taken(pending)
                        queue.waiting_threads -= 1
                    return pending
                with self._lock:
                    queue.note_dropped(pending)
                self._finish(pending)

    def _must_be_asked(self, pending: _Pending) -> bool:
        """Return False if another process has asked, or the breaker forbids it."""
        waited = time.monotonic() - pending.shared_read_at
        if waited > _REREAD_AFTER and self._read_shared(pending).is_answered:
            return False
        return self.breaker.may_try()

    def _wait_for_queue_token(self, queue: _Queue, closed: threading.Event) -> bool:
        """Wait for a token; return False if the lookup is closed meanwhile."""
        while not closed.is_set():
            wait = self._take_token(queue.reserve)
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

    def _finish(self, pending: _Pending) -> None:
        """Remove a question that is answered or dropped, and wake its requests."""
        with self._lock:
            self._pending.pop(pending.question, None)
        pending.finish()

    def _send(self, pending: _Pending) -> None:
        """Ask OpenMeter with an idle client or a new one, and handle errors."""
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
                return
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

    def _note_no_answer(self, pending: _Pending) -> bool:
        """Open the breaker, drop all questions; return True if it was open before."""
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
        """Stop the questions that *error* concerns: this one, its features, or all."""
        if self._slow_down_if_429(error):
            return
        probe_error = self._probe(question.features, client)
        if probe_error is None:
            self._remember_rejection(question)
        elif probe_error.status == 400:
            # Questions about other features may work.
            self._remember_rejection(question.features)
        elif not self._slow_down_if_429(probe_error) and error.status is not None:
            self.breaker.failed()

    def _probe(
        self, features: tuple[str, ...], client: EntitlementClient
    ) -> DeliveryError | None:
        """Ask about a customer that does not exist; return the error, or None.

        Without this probe, a caller who sends a customer name that OpenMeter or a
        proxy answers with an error could stop the questions for all others.
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
