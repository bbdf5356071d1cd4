"""The sender: delivers batches in order and handles failed attempts.

A failed attempt means one of two things:

- OpenMeter is unavailable (no answer, 5xx, 429) or misconfigured (a wrong key or
  address). All events are concerned: the batch stays at the head and is sent again.
  After ten 5xx in a row its events may be the cause: it is handled as a refused batch.
- OpenMeter refuses the batch (400, 413). At least one event is at fault: the batch is
  split in halves, again and again, until that event is alone.

One refusal of a single event proves nothing: a proxy may refuse everything. The event
becomes a *suspect* and waits. If OpenMeter accepts another batch and then refuses the
suspect again, the suspect becomes a dead letter. The refusal of a batch that held the
event counts as its first refusal.

A 500 is ambiguous: Kafka is down, or Kafka does not take one of these events. So the
next attempts send one event of the batch and the others in turn. If OpenMeter accepts
one part and answers 500 to the other, the other is split at once. A single event that
causes a 500 becomes a suspect, too. It becomes a dead letter after ten more 500s, if
OpenMeter accepted another batch before each of them.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from http.client import responses
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, Protocol, TypeVar

from openmeter_wsgi import log
from openmeter_wsgi.delivery.batch import MAX_AHEAD, Batch, shortened, split_by_date
from openmeter_wsgi.errors import (
    DeliveryError,
    Deposed,
    Expired,
    Misconfigured,
    Rejected,
    Unavailable,
)
from openmeter_wsgi.stats import Problem
from openmeter_wsgi.values import age_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.stats import Counts

logger: Final = log.get_logger(__name__)

#: Maximum number of seconds between two attempts, unless the server asks for more.
MAX_DELAY = 30.0
#: Maximum number of seconds between the first attempt and the second.
FIRST_DELAY = 1.0
#: Random numbers of the kernel. The application may have seeded `random`, and processes
#: that were forked from one draw the same numbers from it.
_JITTER = random.SystemRandom()
#: Number of 5xx in a row after which a batch may be the cause and is split; also the
#: number of 500s after which a suspect becomes a dead letter.
MAX_SERVER_ERRORS = 10
#: OpenMeter's status when Kafka does not take an event, now or ever.
_KAFKA_ERROR = 500


_Sent = TypeVar("_Sent", contravariant=True)


class Client(Protocol[_Sent]):
    """The part of a client that a sender needs."""

    def ingest(self, events: _Sent, /) -> None:
        """Deliver *events* or raise a DeliveryError."""


_B = TypeVar("_B", bound=Batch)


class _PendingBatch(Generic[_B]):
    """A batch and the history of its attempts."""

    __slots__ = (
        "accepted_before_500", "batch", "failures", "lone_500s", "refusal_baseline",
        "server_errors", "was_suspect",
    )  # fmt: skip

    def __init__(
        self, batch: _B, refusal_baseline: tuple[int | None, int] | None = None
    ) -> None:
        self.batch = batch
        #: Number of failures from which the backoff is computed. The parts of a batch
        #: inherit it, and a 500 that makes an event a suspect counts twice.
        self.failures = 0
        #: Number of 5xx in a row.
        self.server_errors = 0
        #: The refusal that the next one is compared with: its status, and the number of
        #: batches accepted before it. Each 500 in `lone_500s` replaces it.
        self.refusal_baseline = refusal_baseline
        #: Number of batches accepted before the first 500 to this batch or to the batch
        #: that it was split from. None without a 500.
        self.accepted_before_500: int | None = None
        #: Number of 500s to a suspect, with another accepted batch before each.
        self.lone_500s = 0
        #: True if the batch has been a suspect.
        self.was_suspect = False


class Sender(Generic[_B]):
    """Delivery of batches, one after the other and in order.

    Belongs to one thread at a time. `attempt` makes one request and returns the seconds
    until the next one. The caller does the waiting, so that it can be interrupted.
    """

    def __init__(
        self,
        client: Client[_B],
        counts: Counts,
        done: Callable[[_B], None],
        jitter: Callable[[float, float], float] = _JITTER.uniform,
        keep_dead_letter: Callable[[bytes, DeliveryError], None] | None = None,
        waiting: Callable[[], int] = lambda: 0,
        delay: Callable[[_B, float], None] | None = None,
        clock_ahead: Callable[[], float] = lambda: 0.0,
        accepted: Callable[[_B], object] = lambda _: None,
    ) -> None:
        self._client = client
        self._counts = counts
        #: Called with each batch that is delivered or made dead letters.
        self._done = done
        self._jitter = jitter
        self._keep_dead_letter = keep_dead_letter
        #: Gives a part of a batch back to the source, which hands it out again after
        #: the given number of seconds.
        self._delay = delay
        #: Returns the seconds by which our clock is ahead of OpenMeter's.
        self._clock_ahead = clock_ahead
        #: Called with each batch that OpenMeter has accepted, before `_done`.
        self._on_accepted = accepted
        self._pending: deque[_PendingBatch[_B]] = deque()
        self._suspects: deque[_PendingBatch[_B]] = deque()
        #: Number of batches accepted so far.
        self._accepted = 0
        #: Number of refusals that made a suspect, since the last accepted batch.
        self._refused_in_a_row = 0
        self.outage: Outage = Outage(waiting)
        self._attempt_began: float | None = None

    @property
    def first_events(self) -> list[bytes]:
        """The first event of each batch that is pending or a suspect."""
        return [p.batch[0] for p in [*self._pending, *self._suspects]]

    @property
    def attempt_lasts(self) -> float:
        """The seconds since the current attempt began, 0 between attempts."""
        began = self._attempt_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def busy(self) -> bool:
        """True if a batch is pending."""
        return bool(self._pending)

    @property
    def has_suspects(self) -> bool:
        """True if events wait that were refused alone."""
        return bool(self._suspects)

    def reset(self) -> None:
        """Forget all batches: the caller reads its source from the beginning."""
        self._pending.clear()
        self._suspects.clear()
        self._refused_in_a_row = 0
        self.outage.forget()

    def load(self, batch: _B) -> None:
        """Queue a batch for delivery, and delay events dated too far ahead."""
        if self._delay is None:
            self._pending.append(_PendingBatch(batch))
            return
        clock_ahead = self._clock_ahead()
        for part, wait in split_by_date(batch, clock_ahead):
            if wait:
                self._log_ahead(len(part), wait, clock_ahead)
                self._delay(part, wait)
            else:
                self._pending.append(_PendingBatch(part))

    def retry_suspects(self) -> None:
        """Make the suspects the next batches.

        OpenMeter may have accepted no other batch since it refused them.
        """
        self._pending.extendleft(reversed(self._suspects))
        self._suspects.clear()

    def attempt(self) -> float:
        """Send the batch at the head once; return the seconds to the next attempt."""
        head = self._pending[0]
        if head.failures:
            self._counts.retries += 1
        began = time.perf_counter()
        self._attempt_began = time.monotonic()
        try:
            self._client.ingest(head.batch)
        except Deposed:
            return self._handle_deposition()
        except Expired as error:
            return self._handle_expiry(error)
        except Rejected as error:
            return self._handle_refusal(error)
        except DeliveryError as error:
            return self._handle_failure(head, error)
        finally:
            self._attempt_began = None
            self._counts.attempt_seconds.add(time.perf_counter() - began)
        try:
            self._handle_delivery()
        except Deposed:
            return self._handle_deposition()
        return 0.0

    def _handle_deposition(self) -> float:
        """Log that another sender has taken over, and return the wait."""
        logger.warning(
            "%s: another process or thread has become the sender during an attempt; "
            "it sends these events again under the same ids",
            "delivery",
        )
        return FIRST_DELAY

    def note_broken_attempt(self, error: Exception) -> float:
        """Record an attempt that raised an unexpected exception; return the wait."""
        self.outage.note(Unavailable(f"an attempt broke off, {error!r}"))
        if not self._pending:
            return FIRST_DELAY
        head = self._pending[0]
        head.failures += 1
        return self._backoff(head.failures)

    def _handle_delivery(self) -> None:
        batch = self._pending.popleft().batch
        self._accepted += 1
        self._refused_in_a_row = 0
        n = len(batch)
        self._counts.delivered += n
        self._counts.delivery_seconds.add(age_of(batch[0]))
        self.outage.end(n)  # before `_done` lets a flush return
        self._on_accepted(batch)
        self._done(batch)
        self.retry_suspects()

    def _handle_failure(self, head: _PendingBatch[_B], error: DeliveryError) -> float:
        """Keep the batch at the head, or treat it as refused; return the wait."""
        head.failures += 1
        self._counts.ambiguous += error.ambiguous
        is_server_error = error.status is not None and error.status >= 500
        head.server_errors = head.server_errors + 1 if is_server_error else 0
        is_cause = error.status == _KAFKA_ERROR and self._note_500(head)
        if is_cause or head.server_errors >= MAX_SERVER_ERRORS:
            return self._handle_refusal(error)
        delay = self._backoff(head.failures)
        if error.retry_after is not None:
            delay = max(delay, error.retry_after)  # never less than the backoff
        self.outage.note(error)
        self._log_failure(head, error, delay)
        if error.status == _KAFKA_ERROR:
            self._try_another_part(head)
        return delay

    def _note_500(self, head: _PendingBatch[_B]) -> bool:
        """Record a 500 to this batch; return True if the batch is its cause.

        It is the cause if another batch was accepted since its first 500, or if it has
        been a suspect before.
        """
        if head.accepted_before_500 is None:
            head.accepted_before_500 = self._accepted
        return head.was_suspect or self._accepted > head.accepted_before_500

    def _try_another_part(self, head: _PendingBatch[_B]) -> None:
        """Make the next attempt with one event of the batch, or with the others."""
        pending = self._pending
        # Both numbers are equal only if both batches are parts of one batch.
        next_is_other_part = (
            len(pending) > 1
            and pending[1].accepted_before_500 == head.accepted_before_500
        )
        if next_is_other_part:
            pending[0], pending[1] = pending[1], pending[0]
        elif len(head.batch) > 1:
            pending.popleft()
            for events in reversed(head.batch.split_at(1)):
                part = _PendingBatch(events)
                part.failures = head.failures
                part.server_errors = head.server_errors
                part.accepted_before_500 = head.accepted_before_500
                pending.appendleft(part)

    def _handle_refusal(self, error: DeliveryError) -> float:
        """Split the batch, or make its event a suspect or a dead letter."""
        head = self._pending.popleft()
        if head.refusal_baseline is None or head.refusal_baseline[0] != error.status:
            head.refusal_baseline = (error.status, self._accepted)
        if len(head.batch) > 1:
            self._split(head, error)
        elif self._note_lone_refusal(head, error):
            self._log_refused_event(head.batch, error)
            self._make_dead_letters(head.batch, error)
        else:
            head.failures += 1
            head.server_errors = 0
            head.was_suspect = True
            self._suspects.append(head)
            self._refused_in_a_row += 1
        if self._refused_in_a_row:
            self.outage.note(error, refused=self._refused_in_a_row > 1)
        if self._refused_in_a_row < 2:
            return 0.0  # the next event may be accepted
        delay = self._backoff(self._refused_in_a_row)
        logger.error(
            "OpenMeter answered %s (%s) to every event tried, which may be the answer "
            "of a proxy; all events are kept, next attempt in %.1f s",
            error.status, reason_of(error), delay,
        )  # fmt: skip
        return delay

    def _note_lone_refusal(self, head: _PendingBatch[_B], error: DeliveryError) -> bool:
        """Record a refusal of a single event; return True if it is final.

        It is final if another batch was accepted since the baseline. A 500 is final
        only if that has happened ten times.
        """
        status, accepted = head.refusal_baseline or (None, self._accepted)
        if self._accepted <= accepted:
            return False
        if isinstance(error, Rejected) or head.server_errors >= MAX_SERVER_ERRORS:
            return True
        head.lone_500s += 1
        head.refusal_baseline = (status, self._accepted)
        return head.lone_500s >= MAX_SERVER_ERRORS

    def _split(self, head: _PendingBatch[_B], error: DeliveryError) -> None:
        # A 5xx to a batch does not count as a refusal of each of its events.
        is_refusal = isinstance(error, Rejected)
        for events in reversed(head.batch.split_at(len(head.batch) // 2)):
            part = _PendingBatch(events, head.refusal_baseline if is_refusal else None)
            part.accepted_before_500 = head.accepted_before_500
            # In an outage the pauses do not become short again.
            part.failures = 0 if is_refusal else head.failures
            self._pending.appendleft(part)

    def _handle_expiry(self, error: DeliveryError) -> float:
        """Make the batch dead letters: sent again, it might be billed twice."""
        batch = self._pending.popleft().batch
        logger.error(
            "%s; its %d events are kept among the dead letters and not sent again",
            error.reason, len(batch),
        )  # fmt: skip
        self._make_dead_letters(batch, error)
        return 0.0

    def _make_dead_letters(self, batch: _B, error: DeliveryError) -> None:
        if self._keep_dead_letter is not None:
            for event in batch:
                self._keep_dead_letter(event, error)
        self._counts.dead_lettered += len(batch)
        self._done(batch)  # last: it lets a flush return

    def _log_refused_event(self, batch: _B, error: DeliveryError) -> None:
        # With the event as first argument, each line differs and none is suppressed.
        logger.error(
            "event %s is refused by OpenMeter for good (%s: %s) and not sent again; "
            "others are accepted; it is %s",
            shortened(batch[0]).decode(errors="replace"),
            error.status, reason_of(error),
            "kept among the dead letters" if self._keep_dead_letter else
            "kept only in this line",
        )  # fmt: skip

    def _backoff(self, failures: int) -> float:
        """Return a random wait (full jitter): senders that fail together spread out."""
        return self._jitter(0, min(MAX_DELAY, FIRST_DELAY * 2 ** min(failures - 1, 10)))

    def _log_ahead(self, events: int, wait: float, clock_ahead: float) -> None:
        logger.error(
            "%s: %d events are dated %.0f s or more ahead of OpenMeter's time and are "
            "kept until they are less than half an hour ahead, in %.0f s; Kafka would "
            "drop them and others with them. This host's clock is %.0f s %s "
            "OpenMeter's",
            "clock", events, wait + MAX_AHEAD, wait, abs(clock_ahead),
            "ahead of" if clock_ahead > 0 else "behind",
        )  # fmt: skip

    def _log_failure(
        self, head: _PendingBatch[_B], error: DeliveryError, delay: float
    ) -> None:
        is_misconfigured = isinstance(error, Misconfigured)
        logger.log(
            logging.ERROR if is_misconfigured else logging.WARNING,
            "OpenMeter %s (%s); %d events and all behind them are kept%s, next attempt "
            "in %.1f s",
            _status_of(error), reason_of(error), len(head.batch),
            " until the key or the address is corrected" if is_misconfigured else "",
            delay,
        )  # fmt: skip


#: Minimum number of seconds of an outage whose end is logged.
MIN_LOGGED_OUTAGE = 5.0


class _State(NamedTuple):
    #: Start of the outage, by the clock of `Outage`.
    since: float
    #: Code of the problem in `health`.
    code: str
    answer: str


class Outage:
    """The time since which a sender's attempts fail, and the last reason.

    The thread of the sender records attempts; any thread reads the problem.
    """

    def __init__(
        self,
        waiting: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waiting = waiting
        self._clock = clock
        #: None while OpenMeter accepts events.
        self._state: _State | None = None

    def note(self, error: DeliveryError, *, refused: bool = False) -> None:
        """Record a failed attempt; *refused*: OpenMeter refused every event tried."""
        code = "held" if isinstance(error, Misconfigured) else "unavailable"
        since = self._state.since if self._state else self._clock()
        self._state = _State(since, "refused" if refused else code, answer_of(error))

    def end(self, delivered: int) -> None:
        """Record an accepted batch; its *delivered* events still count as waiting."""
        state, self._state = self._state, None
        if state is None:
            return
        lasted = self._clock() - state.since
        if lasted >= MIN_LOGGED_OUTAGE:
            logger.warning(
                "OpenMeter accepts events again after %.0f s; %d events are delivered, "
                "the %d that still wait follow now",
                lasted, delivered, max(self._waiting() - delivered, 0), extra=log.OVER,
            )  # fmt: skip

    def forget(self) -> None:
        """Forget the outage without a log line."""
        self._state = None

    @property
    def answer(self) -> str | None:
        """OpenMeter's answer to the last attempt, None if it accepted the events."""
        return self._state.answer if self._state else None

    @property
    def problem(self) -> Problem | None:
        """The current problem, None without one."""
        state = self._state
        if state is None:
            return None
        lasted = self._clock() - state.since
        return Problem(
            state.code,
            f"OpenMeter {state.answer} for {lasted:.0f} s now; "
            f"{_CONSEQUENCES[state.code]}",
        )


_CONSEQUENCES = {
    "held": "all events are kept until the key or the address is corrected",
    "unavailable": "all events are kept and sent again",
    "refused": "it refused every event tried, which may be the answer of a proxy; all "
    "events are kept",
}


def answer_of(error: DeliveryError) -> str:
    """Return a text of the status and the reason in OpenMeter's answer."""
    return f"{_status_of(error)} ({reason_of(error)})"


def _status_of(error: DeliveryError) -> str:
    return f"answered {error.status}" if error.status else "did not answer"


def reason_of(error: DeliveryError) -> str:
    """Return the reason in OpenMeter's answer, or else the name of the status."""
    return error.reason or responses.get(error.status or 0, "no reason")
