"""From a batch to OpenMeter: retry, hold, split, bury.

A failure means one of three things. *Not now* (no answer, 5xx, 429) and *not
this way* (a wrong key or address) concern every event alike: the batch stays at
the head and nothing behind it is tried. *Not these* (400, 413) concerns at least
one event in the batch: it is split until that one stands alone.

One refusal of an event proves nothing: a proxy may refuse everything. The event waits
as a suspect. If the server accepts another batch and then refuses the event again, it
is buried. A refusal of a batch that held the event counts as its first.

A 500 may mean either: Kafka is away, or it does not take one of these events. So one
event of the batch is tried alone, and if the server accepts it while the others still
get a 500, they are split without a wait. An event that gets a 500 alone steps aside, so
that others can be sent. It is buried after ten such answers, if the server accepted
another batch before each.
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

#: Attempts are at most this many seconds apart, unless the server asks for more.
MAX_DELAY = 30.0
#: The first repetition comes within this many seconds.
FIRST_DELAY = 1.0
#: Of the kernel: the random numbers of `random` are the application's, who may have
#: seeded it, and the same in all processes that were forked from one.
_JITTER = random.SystemRandom()
#: A batch that gets a 5xx this often in a row may itself be the cause, and an event is
#: buried that alone gets as many while others are accepted.
MAX_SERVER_ERRORS = 10
#: OpenMeter's status when Kafka does not take an event, now or ever.
_KAFKA_ERROR = 500


_Sent = TypeVar("_Sent", contravariant=True)


class Client(Protocol[_Sent]):
    """The part of a client that a sender needs."""

    def ingest(self, events: _Sent, /) -> None:
        """Deliver *events* or raise a DeliveryError."""


_B = TypeVar("_B", bound=Batch)


class _Trial(Generic[_B]):
    """A batch that is tried, and how that went so far."""

    __slots__ = (
        "accepted_before", "blamed", "events", "failures", "refusal", "server_errors",
        "was_suspect",
    )  # fmt: skip

    def __init__(
        self, events: _B, refusal: tuple[int | None, int] | None = None
    ) -> None:
        self.events = events
        self.failures = 0
        self.server_errors = 0
        #: The first refusal: its status, and the number of batches accepted before
        #: it.
        self.refusal = refusal
        #: The number of batches accepted before the server first answered 500 to this
        #: one, or to one of which it was a part. None: it has not.
        self.accepted_before: int | None = None
        #: How many times an event got a 500 alone, with an acceptance before each.
        self.blamed = 0
        #: Whether it stood aside before.
        self.was_suspect = False


class Sender(Generic[_B]):
    """Delivers one batch after the other, in order.

    Belongs to one thread at a time. `attempt` makes one request and returns how
    long to wait before the next: waiting is the caller's, so that it can be
    interrupted.
    """

    def __init__(
        self,
        client: Client[_B],
        counts: Counts,
        done: Callable[[_B], None],
        jitter: Callable[[float, float], float] = _JITTER.uniform,
        bury: Callable[[bytes, DeliveryError], None] | None = None,
        waiting: Callable[[], int] = lambda: 0,
        delay: Callable[[_B, float], None] | None = None,
        clock_ahead: Callable[[], float] = lambda: 0.0,
        accepted: Callable[[_B], object] = lambda _: None,
    ) -> None:
        self._client = client
        self._counts = counts
        self._done = done
        self._jitter = jitter
        self._keep_buried = bury
        #: Gives a part of a batch back, to be loaded again after as many seconds.
        self._delay = delay
        #: By how many seconds our clock is ahead of OpenMeter's, as far as is known.
        self._clock_ahead = clock_ahead
        #: Is told of each batch that OpenMeter has accepted, before it is done.
        self._tell_accepted = accepted
        self._pending: deque[_Trial[_B]] = deque()
        self._suspects: deque[_Trial[_B]] = deque()
        self._accepted = 0
        self._refused_in_a_row = 0
        self.outage: Outage = Outage(waiting)
        self._attempt_began: float | None = None

    @property
    def oldest(self) -> list[bytes]:
        """The first event of each batch that is being tried or stands aside."""
        return [batch.events[0] for batch in [*self._pending, *self._suspects]]

    @property
    def attempt_lasts(self) -> float:
        """For how many seconds the attempt that is being made lasts; 0 if none is."""
        began = self._attempt_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def busy(self) -> bool:
        """True if there is a batch to be tried."""
        return bool(self._pending)

    @property
    def doubtful(self) -> bool:
        """True if events stand aside that were refused alone."""
        return bool(self._suspects)

    def reset(self) -> None:
        """Forget all batches: another source is delivered, or the same one anew."""
        self._pending.clear()
        self._suspects.clear()
        self._refused_in_a_row = 0
        self.outage.forget()

    def load(self, events: _B) -> None:
        """Take over a batch, but for events that are dated too far ahead."""
        if self._delay is None:
            self._pending.append(_Trial(events))
            return
        clock_ahead = self._clock_ahead()
        for part, wait in split_by_date(events, clock_ahead):
            if wait:
                self._say_ahead(len(part), wait, clock_ahead)
                self._delay(part, wait)
            else:
                self._pending.append(_Trial(part))

    def retry_suspects(self) -> None:
        """Try the suspects again, though nothing else was accepted since."""
        self._pending.extendleft(reversed(self._suspects))
        self._suspects.clear()

    def attempt(self) -> float:
        """Try the batch at the head once; return the seconds until the next try."""
        batch = self._pending[0]
        if batch.failures:
            self._counts.retries += 1
        began = time.perf_counter()
        self._attempt_began = time.monotonic()
        try:
            self._client.ingest(batch.events)
        except Deposed:
            return self._deposed()
        except Expired as error:
            return self._expired(error)
        except Rejected as error:
            return self._refused(error)
        except DeliveryError as error:
            return self._failed(batch, error)
        finally:
            self._attempt_began = None
            self._counts.attempt_seconds.add(time.perf_counter() - began)
        try:
            self._delivered()
        except Deposed:
            return self._deposed()
        return 0.0

    def _deposed(self) -> float:
        """Return the wait of a sender whose place another one has taken."""
        logger.warning(
            "%s: another process or thread has become the sender during an attempt; "
            "it sends these events again under the same ids",
            "delivery",
        )
        return FIRST_DELAY

    def give_up_attempt(self, error: Exception) -> float:
        """Return the wait after an attempt that ended in an unexpected exception."""
        self.outage.note(Unavailable(f"an attempt broke off, {error!r}"))
        if not self._pending:
            return FIRST_DELAY
        batch = self._pending[0]
        batch.failures += 1
        return self._backoff(batch.failures)

    def _delivered(self) -> None:
        batch = self._pending.popleft()
        self._accepted += 1
        self._refused_in_a_row = 0
        n = len(batch.events)
        self._counts.delivered += n
        self._counts.delivery_seconds.add(age_of(batch.events[0]))
        self.outage.is_over(n)  # before a flush says that all is done
        self._tell_accepted(batch.events)
        self._done(batch.events)
        self.retry_suspects()

    def _failed(self, batch: _Trial[_B], error: DeliveryError) -> float:
        batch.failures += 1
        self._counts.ambiguous += error.ambiguous
        is_server_error = error.status is not None and error.status >= 500
        batch.server_errors = batch.server_errors + 1 if is_server_error else 0
        is_cause = error.status == _KAFKA_ERROR and self._is_cause(batch)
        if is_cause or batch.server_errors >= MAX_SERVER_ERRORS:
            return self._refused(error)
        delay = self._backoff(batch.failures)
        if error.retry_after is not None:
            delay = max(delay, error.retry_after)  # 0 is no leave to hammer
        self.outage.note(error)
        self._say_failed(batch, error, delay)
        if error.status == _KAFKA_ERROR:
            self._try_another_part(batch)
        return delay

    def _is_cause(self, batch: _Trial[_B]) -> bool:
        """Return True if a 500 is about this batch: the server accepts others."""
        if batch.accepted_before is None:
            batch.accepted_before = self._accepted
        return batch.was_suspect or self._accepted > batch.accepted_before

    def _try_another_part(self, batch: _Trial[_B]) -> None:
        """Let the next attempt be of one event, or of the others after it."""
        pending = self._pending
        if len(pending) > 1 and pending[1].accepted_before == batch.accepted_before:
            pending[0], pending[1] = pending[1], pending[0]
        elif len(batch.events) > 1:
            pending.popleft()
            for events in reversed(batch.events.split_at(1)):
                part = _Trial(events)
                part.failures = batch.failures
                part.server_errors = batch.server_errors
                part.accepted_before = batch.accepted_before
                pending.appendleft(part)

    def _refused(self, error: DeliveryError) -> float:
        batch = self._pending.popleft()
        if batch.refusal is None or batch.refusal[0] != error.status:
            batch.refusal = (error.status, self._accepted)
        if len(batch.events) > 1:
            self._split(batch, error)
        elif self._is_guilty(batch, error):
            self._bury(batch.events, error)
        else:
            batch.failures += 1
            batch.server_errors = 0
            batch.was_suspect = True
            self._suspects.append(batch)
            self._refused_in_a_row += 1
        if self._refused_in_a_row:
            self.outage.note(error, refused=True)
        if self._refused_in_a_row < 2:
            return 0.0  # the next event may be accepted
        delay = self._backoff(self._refused_in_a_row)
        logger.error(
            "OpenMeter answered %s (%s) to every event tried, which may be a proxy "
            "speaking; all are kept, next attempt in %.1f s",
            error.status, reason_of(error), delay,
        )  # fmt: skip
        return delay

    def _is_guilty(self, batch: _Trial[_B], error: DeliveryError) -> bool:
        """Return True if an event that is refused alone will never be accepted."""
        status, accepted = batch.refusal or (None, self._accepted)
        if self._accepted <= accepted:
            return False
        if isinstance(error, Rejected) or batch.server_errors >= MAX_SERVER_ERRORS:
            return True
        batch.blamed += 1
        batch.refusal = (status, self._accepted)
        return batch.blamed >= MAX_SERVER_ERRORS

    def _split(self, batch: _Trial[_B], error: DeliveryError) -> None:
        # A 5xx for a batch is too weak an evidence against each of its events.
        refusal = batch.refusal if isinstance(error, Rejected) else None
        for events in reversed(batch.events.split_at(len(batch.events) // 2)):
            part = _Trial(events, refusal)
            part.accepted_before = batch.accepted_before
            # In an outage the pauses do not become short again.
            part.failures = batch.failures if refusal is None else 0
            self._pending.appendleft(part)

    def _expired(self, error: DeliveryError) -> float:
        """Set the batch aside: sent once more, it might be billed twice."""
        events = self._pending.popleft().events
        logger.error(
            "%s; its %d events are kept among the dead letters and not sent again",
            error.reason, len(events),
        )  # fmt: skip
        self._set_aside(events, error)
        return 0.0

    def _set_aside(self, events: _B, error: DeliveryError) -> None:
        # Last of all: what a flush says is done has been logged and kept.
        if self._keep_buried is not None:
            for event in events:
                self._keep_buried(event, error)
        n = len(events)
        self._counts.dead_lettered += n
        self._done(events)

    def _bury(self, events: _B, error: DeliveryError) -> None:
        # The event comes first: each one is a line of its own, never thinned.
        logger.error(
            "event %s is refused by OpenMeter for good (%s: %s) and not sent again; "
            "others are accepted; it is %s",
            shortened(events[0]).decode(errors="replace"),
            error.status, reason_of(error),
            "kept among the dead letters" if self._keep_buried else
            "nowhere but in this line",
        )  # fmt: skip
        self._set_aside(events, error)

    def _backoff(self, failures: int) -> float:
        """Full jitter: what failed together is not tried again together."""
        return self._jitter(0, min(MAX_DELAY, FIRST_DELAY * 2 ** min(failures - 1, 10)))

    def _say_ahead(self, events: int, wait: float, clock_ahead: float) -> None:
        logger.error(
            "%s: %d events are dated %.0f s or more ahead of OpenMeter's time and are "
            "kept until they are less than half an hour ahead, in %.0f s; Kafka would "
            "drop them and others with them. This host's clock is %.0f s %s "
            "OpenMeter's",
            "clock", events, wait + MAX_AHEAD, wait, abs(clock_ahead),
            "ahead of" if clock_ahead > 0 else "behind",
        )  # fmt: skip

    def _say_failed(
        self, batch: _Trial[_B], error: DeliveryError, delay: float
    ) -> None:
        answer = f"answered {error.status}" if error.status else "did not answer"
        held = isinstance(error, Misconfigured)
        logger.log(
            logging.ERROR if held else logging.WARNING,
            "OpenMeter %s (%s); %d events and all behind them are kept%s, next attempt "
            "in %.1f s",
            answer, reason_of(error), len(batch.events),
            " until the key or the address is mended" if held else "", delay,
        )  # fmt: skip


#: The end of an outage is logged only if it lasted this many seconds.
WORTH_TELLING = 5.0


class _Now(NamedTuple):
    since: float
    code: str
    answer: str


class Outage:
    """The reason why a sender cannot deliver. Its thread notes it, any thread asks."""

    def __init__(
        self,
        waiting: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waiting = waiting
        self._clock = clock
        self._now: _Now | None = None

    def note(self, error: DeliveryError, *, refused: bool = False) -> None:
        """Note an attempt that failed, or that all events are *refused*."""
        code = "held" if isinstance(error, Misconfigured) else "unavailable"
        since = self._now.since if self._now else self._clock()
        self._now = _Now(since, "refused" if refused else code, answer_of(error))

    def is_over(self, delivered: int) -> None:
        """Note that so many events were taken, of those that still count as waiting."""
        now, self._now = self._now, None
        if now is None:
            return
        lasted = self._clock() - now.since
        if lasted >= WORTH_TELLING:
            logger.warning(
                "OpenMeter takes events again after %.0f s; delivered: %d, waiting and "
                "following now: %d",
                lasted, delivered, max(self._waiting() - delivered, 0), extra=log.OVER,
            )  # fmt: skip

    def forget(self) -> None:
        """Note that nothing is known any more."""
        self._now = None

    @property
    def answer(self) -> str | None:
        """OpenMeter's reaction to the last attempt, None if it took the events."""
        return self._now.answer if self._now else None

    @property
    def problem(self) -> Problem | None:
        """The problem now, None if none is known."""
        now = self._now
        if now is None:
            return None
        lasted = self._clock() - now.since
        return Problem(
            now.code,
            f"OpenMeter {now.answer} for {lasted:.0f} s now; {_NEXT[now.code]}",
        )


_NEXT = {
    "held": "all events are kept until the key or the address is mended",
    "unavailable": "all events are kept and tried again",
    "refused": "that is every event tried, so it may be a proxy; all are kept",
}


def answer_of(error: DeliveryError) -> str:
    """Return what OpenMeter did."""
    answer = f"answered {error.status}" if error.status else "did not answer"
    return f"{answer} ({reason_of(error)})"


def reason_of(error: DeliveryError) -> str:
    """Return what it said, or else what its status says."""
    return error.reason or responses.get(error.status or 0, "no reason")
