"""Lookups: questions to OpenMeter, which wait in line for a token and a thread."""

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


#: Seconds between two questions that try whether OpenMeter is back. Each failure
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
        """True if the last question got no answer."""
        return self._pause > 0

    @property
    def is_due(self) -> bool:
        """True if `may_try` may return True."""
        return self._clock() >= self._try_at

    @property
    def due_in(self) -> float:
        """The seconds until the next question may be asked, 0.0 if it may be now."""
        return max(self._try_at - self._clock(), 0.0)

    def may_try(self) -> bool:
        """Return True if a question may be asked; while open, to one caller a pause."""
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
        """Note that no answer came."""
        self._pause = min(max(self._pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
        self._try_at = self._clock() + self._pause

    def slow_down(self, seconds: float) -> None:
        """Ask nothing for so long: OpenMeter answers, but was asked too often."""
        self._try_at = max(self._try_at, self._clock() + seconds)


class Question(NamedTuple):
    """A question: may this customer use these features?"""

    customer: str
    features: tuple[str, ...]


def questions_about(customer: str, features: Sequence[str]) -> list[Question]:
    """Return one question about *features*, and one for each key OpenMeter refuses.

    In an answer about several features, a refused key would only be missing, as if
    there were no access. Asked for alone, it does not affect the others.
    """
    if len(features) == 1:
        return [Question(customer, (features[0],))]
    refused = unaddressable(features)
    fine = tuple(feature for feature in features if feature not in refused)
    alone = [Question(customer, (feature,)) for feature in refused]
    return [Question(customer, fine), *alone] if fine else alone


#: Waits for a token to send one more request; returns False if there is none in time.
HasToken: TypeAlias = "Callable[[], bool]"
#: Puts the question to OpenMeter and remembers the answer. Its first callable is
#: called once, when the waiting requests need wait no longer.
Answering: TypeAlias = (
    "Callable[[EntitlementClient, Question, Callable[[], None], HasToken], None]"
)


class Recalled(NamedTuple):
    """The result of a look into the answers that other processes have shared."""

    #: True if they answer the question, so that OpenMeter need not be asked.
    is_answered: bool = False
    #: True if they hold an answer of whatever age: this customer is known.
    is_known: bool = False


#: Looks for shared answers to a question that were asked for since a moment
#: (monotonic), and remembers them.
Recall: TypeAlias = "Callable[[Question, float], Recalled]"


def nothing_recalled(_question: Question, _since: float) -> Recalled:
    """Return that no answers are shared."""
    return Recalled()


class Lookup(Protocol):
    """Puts questions to OpenMeter, or to a stand-in. Any thread."""

    breaker: Breaker

    def ask(self, question: Question, *, is_known: bool) -> float | None:
        """Ask, and wait for the answer, if asking makes sense now.

        Returns the seconds after which to come back if the line is too long, or else
        None. *is_known*: there was an answer about this customer before.
        """

    def refresh(self, question: Question, *, since: float = 0.0) -> None:
        """Ask without waiting, if asking makes sense now.

        An answer that another process asked for *since* that moment (monotonic) will
        do.
        """

    @property
    def is_busy(self) -> bool:
        """True if requests wait in line for other questions."""

    def has_token(self) -> bool:
        """Take a token for a further question, if there is one."""

    def close(self) -> None:
        """Close the idle connections, and drop the questions that wait in line."""


#: So many threads ask at once: about customers that are seen for the first time, and
#: about those that are known.
_FIRST_SIGHT_THREADS, _KNOWN_THREADS = 8, 4
#: So many questions wait in each line at most; with keys of 256 characters that is
#: less than 4 MiB.
MAX_LINE = 2_048
#: The measured pace of a line follows the last question by this share.
_FOLLOW = 0.2
#: After a 429 without Retry-After, in seconds.
_SLOW_DOWN = 1.0
#: A question that OpenMeter calls a mistake is not asked again for so many seconds …
_MISTAKE_HOLDS = 5.0
#: … and so many such questions are remembered.
_MAX_MISTAKES = 1_000


#: Held while the event of a question is made or looked for. Reentrant, as a middleware
#: may be collected meanwhile.
_waiting = threading.RLock()


class _Pending:
    """A question that waits or is being asked, and what ends the wait."""

    __slots__ = (
        "_event", "_is_done", "line", "number", "question", "recalled_at", "since",
    )  # fmt: skip

    def __init__(self, question: Question, since: float) -> None:
        self.question = question
        self.since = since
        self._is_done = False
        #: Made by the first that waits: for most questions in a long line nobody does.
        self._event: threading.Event | None = None
        #: Where requests wait for it, and its place among all that ever waited there.
        self.line: _Line | None = None
        self.number = 0
        self.recalled_at = 0.0

    def wait(self, timeout: float) -> bool:
        """Wait until the question is done; return False if that takes longer."""
        with _waiting:
            event = self._event = self._event or threading.Event()
        return self._is_done or event.wait(timeout)

    def done(self) -> None:
        """End the wait of all requests. Called once or more."""
        self._is_done = True
        with _waiting:
            event = self._event
        if event is not None:
            event.set()

    @property
    def is_in_line(self) -> bool:
        """True if requests wait for it, and it has no token yet."""
        return self.line is not None and self.line.is_ahead_of(self.number)


class _Line:
    """Questions in the order in which they came. The lookup's lock guards it.

    Those that requests wait for go before those that nobody waits for.
    """

    def __init__(self, *, threads: int, reserve: float, pace: float) -> None:
        self.max_threads = threads
        #: So many tokens are left to others.
        self.reserve = reserve
        self.threads = 0
        #: How many of these threads wait for the next question, or for its token.
        self.takers = 0
        #: Held by the thread that waits for a token: tokens are taken in order.
        self.turn = threading.Lock()
        self._urgent: deque[_Pending] = deque()
        self._later: deque[_Pending] = deque()
        self._added = self._taken = 0
        #: Seconds from one question to the next, while some wait.
        self._pace = pace
        self._taken_at = 0.0

    def __len__(self) -> int:
        return len(self._urgent) + len(self._later)

    @property
    def waiting(self) -> int:
        """How many questions that requests wait for have no token yet."""
        return self._added - self._taken

    def add(self, pending: _Pending, *, urgent: bool) -> None:
        """Let *pending* wait behind the others."""
        if not urgent:
            self._later.append(pending)
            return
        if not self._urgent:
            self._taken_at = time.monotonic()
        self._added += 1
        pending.line, pending.number = self, self._added
        self._urgent.append(pending)

    def promote(self, pending: _Pending) -> None:
        """Let *pending*, for which nobody waited, wait with those that are urgent."""
        try:
            self._later.remove(pending)
        except ValueError:
            return
        self.add(pending, urgent=True)

    def take(self) -> _Pending | None:
        """Take out the first one."""
        if not self._urgent:
            return self._later.popleft() if self._later else None
        return self._urgent.popleft()

    def note_asked(self, pending: _Pending) -> None:
        """Note that *pending* has got its token."""
        if not pending.number:
            return
        now = time.monotonic()
        self._taken += 1
        self._pace += (now - self._taken_at - self._pace) * _FOLLOW
        self._taken_at = now

    def note_dropped(self, pending: _Pending) -> None:
        """Note that *pending* needs no token any more."""
        self._taken += bool(pending.number)

    def is_ahead_of(self, number: int) -> bool:
        """Return True if the question of this number has not got its token."""
        return number > self._taken

    def wait_for(self, number: int | None = None) -> float:
        """Return about how many seconds are before this number, or before a new one."""
        last = self._added + 1 if number is None else number
        return max(last - self._taken - 1, 0) * self._pace

    def clear(self) -> list[_Pending]:
        """Take out all."""
        found = [*self._urgent, *self._later]
        self._taken += len(self._urgent)
        self._urgent.clear()
        self._later.clear()
        return found


class BackgroundLookup:
    """Puts questions to OpenMeter from threads that end when no question waits.

    Belongs to one process; any thread. There are two lines: of customers that are
    seen for the first time, and of those that are known, to whom the first line leaves
    a part of the tokens. A question stays in line when the requests that wait for it
    have given up: their clients come back.
    """

    def __init__(
        self,
        *,
        new_client: Callable[[], EntitlementClient],
        answering: Answering,
        take_question: Callable[[float], float],
        timeout: float,
        rate: float,
        reserve: float,
        recall: Recall = nothing_recalled,
    ) -> None:
        self.breaker: Breaker = Breaker()
        self._new_client = new_client
        self._answering = answering
        self._recall = recall
        #: Takes a token, and returns the seconds to wait if there is none.
        self._take_question = take_question
        self._timeout = timeout
        self._rate = rate
        #: How many tokens a first sight leaves to customers that are known.
        self._reserve = reserve
        self._clients: deque[EntitlementClient] = deque()
        self._pending: dict[Question, _Pending] = {}
        #: Until when not to ask what OpenMeter calls a mistake: for features, whoever
        #: the customer is, or for one customer.
        self._mistaken: dict[tuple[str, ...] | Question, float] = {}
        # Reentrant, as `close` is also called when a middleware is collected.
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._first_sights, self._known = self._new_lines()

    def _new_lines(self) -> tuple[_Line, _Line]:
        pace = 1 / self._rate
        return (
            _Line(threads=_FIRST_SIGHT_THREADS, reserve=self._reserve, pace=pace),
            _Line(threads=_KNOWN_THREADS, reserve=0.0, pace=pace),
        )

    @property
    def is_busy(self) -> bool:
        """True if requests wait in line for other questions."""
        return self._first_sights.waiting + self._known.waiting > 0

    def ask(self, question: Question, *, is_known: bool = False) -> float | None:
        """Ask, and wait for the answer within the timeout, if asking makes sense now.

        Returns the seconds after which to come back if the line is too long, or else
        None. Requests that come while the same is being asked wait for that answer.
        """
        if self.breaker.is_open:
            self.refresh(question)  # the request that tries is nobody's
            return None
        if sys.is_finalizing():  # a thread would not run, and its start() wait for it
            return None
        if (pause := self.breaker.due_in) > 0:
            return pause
        pending, is_first = self._begin(question, since=0.0)
        if pending is None:
            return None
        if is_first:
            return self._ask_first(pending, is_known=is_known)
        if pending.line is None:
            with self._lock:
                self._known.promote(pending)
        return self._wait(pending)

    def refresh(self, question: Question, *, since: float = 0.0) -> None:
        """Ask without waiting, unless that is being done or must not be done now."""
        if not self.breaker.is_due or sys.is_finalizing():
            return
        pending, is_first = self._begin(question, since)
        if pending is not None and is_first:
            self._enlist(pending, self._known, urgent=False)

    def close(self) -> None:
        """Close the idle connections, and drop the questions that wait in line.

        A connection that is in use is closed when its question has ended.
        """
        with self._lock:
            closed, self._closed = self._closed, threading.Event()
            lines = self._first_sights, self._known
            self._first_sights, self._known = self._new_lines()
            dropped = [pending for line in lines for pending in line.clear()]
            idle, self._clients = self._clients, deque()
        closed.set()
        for pending in dropped:
            self._end(pending)
        for client in idle:
            client.close()

    # -- In the thread of a request

    def _begin(self, question: Question, since: float) -> tuple[_Pending | None, bool]:
        """Return the question as it is pending, and whether this caller began it."""
        with self._lock:
            if (pending := self._pending.get(question)) is not None:
                pending.since = max(pending.since, since)
                return pending, False
            if self._is_mistaken(question):
                return None, False
            pending = self._pending[question] = _Pending(question, since)
            return pending, True

    def _ask_first(self, pending: _Pending, *, is_known: bool) -> float | None:
        """Look for a shared answer, or let *pending* wait in line, and wait for it."""
        recalled = self._look_at_shared(pending)
        if recalled.is_answered:
            self._end(pending)
            return None
        is_known = is_known or recalled.is_known
        line = self._known if is_known else self._first_sights
        if not self._enlist(pending, line, urgent=True):
            return self._say_busy(line, line.wait_for())
        return self._wait(pending)

    def _look_at_shared(self, pending: _Pending) -> Recalled:
        pending.recalled_at = time.monotonic()
        return self._recall(pending.question, pending.since)

    def _enlist(self, pending: _Pending, line: _Line, *, urgent: bool) -> bool:
        """Let *pending* wait in *line*; return False if that is full."""
        with self._lock:
            if is_full := len(line) >= MAX_LINE:
                self._end(pending)
            else:
                line.add(pending, urgent=urgent)
        if not is_full:
            self._see_to_a_taker(line)
        return not is_full

    def _wait(self, pending: _Pending) -> float | None:
        """Wait for the answer; return the seconds to come back after, if it is far."""
        line, number = pending.line, pending.number
        if line is not None and (far := line.wait_for(number)) > self._timeout:
            return self._say_busy(line, far)
        if pending.wait(self._timeout):
            return None
        if line is None or not pending.is_in_line:
            return None
        return self._say_busy(line, line.wait_for(number))

    def _say_busy(self, line: _Line, seconds: float) -> float:
        logger.warning(
            "%s: %d customers wait in line to be asked for, the last one for about "
            "%.0f s, as question_rate=%g allows; their requests are decided by "
            "fail_mode meanwhile",
            "entitlements", line.waiting, line.wait_for(), self._rate,
        )  # fmt: skip
        return max(seconds, 1.0)

    def _is_mistaken(self, question: Question) -> bool:
        now = time.monotonic()
        return any(
            now < self._mistaken.get(what, 0) for what in (question, question.features)
        )

    def _remember_mistake(self, what: tuple[str, ...] | Question) -> None:
        with self._lock:
            if len(self._mistaken) >= _MAX_MISTAKES:
                self._mistaken.clear()
            self._mistaken[what] = time.monotonic() + _MISTAKE_HOLDS

    def _see_to_a_taker(self, line: _Line) -> None:
        """Start a thread, unless one is about to take the next question of *line*."""
        with self._lock:
            if not line or line.takers or line.threads >= line.max_threads:
                return
            line.takers += 1
            line.threads += 1
            thread = threading.Thread(
                target=self._run,
                args=(line, self._closed),
                name="openmeter_wsgi.question",
                daemon=True,
            )
        try:
            thread.start()
        except RuntimeError as error:
            logger.error("%s: no thread can be started to ask OpenMeter", error)
            with self._lock:
                line.takers -= 1
                line.threads -= 1
                dropped = line.clear()
            for pending in dropped:
                self._end(pending)

    # -- In a thread of the lookup's own

    def _run(self, line: _Line, closed: threading.Event) -> None:
        """Ask one question after the other. The body of a thread."""
        while (pending := self._next(line, closed)) is not None:
            self._see_to_a_taker(line)
            try:
                self._put(pending)
            except Exception:
                self._remember_mistake(pending.question)
                logger.exception("%s: a question about %s broke off", "entitlements",
                                 pending.question.customer)  # fmt: skip
            finally:
                self._end(pending)
            with self._lock:
                line.takers += 1

    def _next(self, line: _Line, closed: threading.Event) -> _Pending | None:
        """Take the first question of *line* that has to be asked, with its token."""
        with line.turn:
            while True:
                with self._lock:
                    pending = line.take()
                    if pending is None:
                        line.takers -= 1
                        line.threads -= 1
                        return None
                if self._must_be_asked(pending) and self._wait_for_token(line, closed):
                    with self._lock:
                        line.note_asked(pending)
                        line.takers -= 1
                    return pending
                with self._lock:
                    line.note_dropped(pending)
                self._end(pending)

    def _must_be_asked(self, pending: _Pending) -> bool:
        """Return False if OpenMeter must not be asked now, or another process has."""
        waited = time.monotonic() - pending.recalled_at
        if waited > _FIRST_PAUSE and self._look_at_shared(pending).is_answered:
            return False
        return self.breaker.may_try()

    def _wait_for_token(self, line: _Line, closed: threading.Event) -> bool:
        """Wait for a token; return False if the lookup was closed meanwhile."""
        while not closed.is_set():
            wait = self._take_question(line.reserve)
            if not wait:
                return True
            closed.wait(wait)
        return False

    def has_token(self) -> bool:
        """Wait for a token for one request more; return False if none came in time."""
        deadline = time.monotonic() + self._timeout
        closed = self._closed
        while wait := self._take_question(0.0):
            if time.monotonic() + wait > deadline or closed.wait(wait):
                logger.warning(
                    "%s: more questions than question_rate=%g allows; some requests "
                    "are decided without an answer",
                    "entitlements", self._rate,
                )  # fmt: skip
                return False
        return True

    def _end(self, pending: _Pending) -> None:
        with self._lock:
            self._pending.pop(pending.question, None)
        pending.done()

    def _put(self, pending: _Pending) -> None:
        clients = self._clients
        try:
            client = clients.pop()
        except IndexError:
            client = self._new_client()
        try:
            question = pending.question
            self._answering(client, question, pending.done, self.has_token)
        except DeliveryError as error:
            client.close()
            self._log_failure(error, pending.question)
            if error.status is None and self._note_silence(pending):
                return
            self._failed(error, pending.question, client)
        else:
            self._note_answer()
        self._give_back(client, clients)

    def _give_back(
        self, client: EntitlementClient, clients: deque[EntitlementClient]
    ) -> None:
        """Keep *client* for the next question, unless all were closed meanwhile."""
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

    def _note_silence(self, pending: _Pending) -> bool:
        """Open the breaker, as no answer came; return True if it was open before.

        Nobody waits any longer, whichever question it is for.
        """
        was_open = self.breaker.is_open
        self.breaker.failed()
        with self._lock:
            dropped = [*self._first_sights.clear(), *self._known.clear()]
        pending.done()
        for one in dropped:
            self._end(one)
        return was_open

    def _failed(
        self, error: DeliveryError, question: Question, client: EntitlementClient
    ) -> None:
        """Note a failure where it belongs: to one customer, to features, or to all."""
        if self._is_too_much(error):
            return
        refusal = self._refusal_of_nobody(question.features, client)
        if refusal is None:
            self._remember_mistake(question)
        elif refusal.status == 400:
            # Of these features alone; of the others it may know all there is.
            self._remember_mistake(question.features)
        elif not self._is_too_much(refusal) and error.status is not None:
            self.breaker.failed()

    def _refusal_of_nobody(
        self, features: tuple[str, ...], client: EntitlementClient
    ) -> DeliveryError | None:
        """Ask for a customer that does not exist; return the error, if there is one.

        A caller that chooses the name of a customer could otherwise stop the questions
        for all others, with a name that OpenMeter or a proxy has no right answer for.
        """
        if not self.has_token():
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
