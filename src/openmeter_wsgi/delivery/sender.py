"""From a batch to OpenMeter: retry, hold, split, bury.

A failure means one of three things. *Not now* (no answer, 5xx, 429) and *not
this way* (a wrong key or address) concern every event alike: the batch stays at
the head and nothing behind it is tried. *Not these* (400, 413) concerns at least
one event in the batch: it is split until that one stands alone.

An event refused alone is not yet guilty: a proxy may be refusing everything. It
is buried if the server refused it, accepted another event, and refused it again;
until then it steps aside as a suspect and is tried again after each acceptance.
Being refused as part of a larger batch counts as the first refusal.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from http.client import responses
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, Self, TypeVar

from openmeter_wsgi import log
from openmeter_wsgi.errors import DeliveryError, Expired, Held, Rejected
from openmeter_wsgi.health import Problem
from openmeter_wsgi.timestamps import age_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openmeter_wsgi.stats import Counts

logger = log.get_logger(__name__)

#: Attempts are at most this many seconds apart, unless the server asks for more.
MAX_DELAY = 30.0
#: The first repetition comes within this many seconds.
FIRST_DELAY = 1.0
#: Of the kernel: the random numbers of `random` are the application's, who may have
#: seeded it, and the same in all processes that were forked from one.
_JITTER = random.SystemRandom()
#: A batch that gets a 5xx this often in a row may itself be the cause.
MAX_SERVER_ERRORS = 10


#: Of an event this much is logged.
_MAX_LOGGED = 4_096

_Sent = TypeVar("_Sent", contravariant=True)


class Batch(Protocol):
    """Encoded events that go to OpenMeter in one request, in their order."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __iter__(self) -> Iterator[bytes]:
        """Return an iterator over all."""

    def __getitem__(self, index: int, /) -> bytes:
        """Return one."""

    def halves(self) -> tuple[Self, Self]:
        """Return the first half and the second: it holds at least two events."""


class Client(Protocol[_Sent]):
    """What a sender needs of a client."""

    def ingest(self, events: _Sent, /) -> None:
        """Deliver *events* or raise a DeliveryError."""


_B = TypeVar("_B", bound=Batch)


class _Trial(Generic[_B]):
    """A batch that is tried, and how that went so far."""

    __slots__ = ("events", "failures", "refusal", "server_errors")

    def __init__(
        self, events: _B, refusal: tuple[int | None, int] | None = None
    ) -> None:
        self.events = events
        self.failures = 0
        self.server_errors = 0
        #: Of the first refusal: its status, and how many batches the server had
        #: accepted before it.
        self.refusal = refusal


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
    ) -> None:
        self._client = client
        self._counts = counts
        self._done = done
        self._jitter = jitter
        self._keep_buried = bury
        self._pending: deque[_Trial[_B]] = deque()
        self._suspects: deque[_Trial[_B]] = deque()
        self._accepted = 0
        self._refused_in_a_row = 0
        self.outage = Outage(waiting)
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
        """Whether there is a batch to be tried."""
        return bool(self._pending)

    @property
    def doubtful(self) -> bool:
        """Whether events stand aside that were refused alone."""
        return bool(self._suspects)

    def reset(self) -> None:
        """Forget all batches: another source is delivered, or the same one anew."""
        self._pending.clear()
        self._suspects.clear()
        self._refused_in_a_row = 0
        self.outage.forget()

    def load(self, events: _B) -> None:
        """Take over a batch."""
        self._pending.append(_Trial(events))

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
        except Expired as error:
            return self._expired(error)
        except Rejected as error:
            return self._refused(error)
        except DeliveryError as error:
            return self._failed(batch, error)
        finally:
            self._attempt_began = None
            self._counts.attempt_seconds.add(time.perf_counter() - began)
        self._delivered()
        return 0.0

    def give_up_attempt(self) -> float:
        """Return the wait after an attempt that broke off in a way nobody foresaw."""
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
        self._done(batch.events)
        self.retry_suspects()

    def _failed(self, batch: _Trial[_B], error: DeliveryError) -> float:
        batch.failures += 1
        self._counts.ambiguous += error.ambiguous
        is_server_error = error.status is not None and error.status >= 500
        batch.server_errors = batch.server_errors + 1 if is_server_error else 0
        if batch.server_errors >= MAX_SERVER_ERRORS:
            return self._refused(error)
        delay = self._backoff(batch.failures)
        if error.retry_after is not None:
            delay = max(delay, error.retry_after)  # 0 is no leave to hammer
        self.outage.note(error)
        self._say_failed(batch, error, delay)
        return delay

    def _refused(self, error: DeliveryError) -> float:
        batch = self._pending.popleft()
        if batch.refusal is None or batch.refusal[0] != error.status:
            batch.refusal = (error.status, self._accepted)
        if len(batch.events) > 1:
            self._split(batch, error)
        elif self._accepted > batch.refusal[1]:
            self._bury(batch.events, error)
        else:
            batch.failures += 1
            batch.server_errors = 0
            self._suspects.append(batch)
            self._refused_in_a_row += 1
        if self._refused_in_a_row < 2:
            return 0.0
        self.outage.note(error, refused=True)
        delay = self._backoff(self._refused_in_a_row)
        logger.error(
            "OpenMeter answered %s (%s) to every event tried, which may be a proxy "
            "speaking; all are kept, next attempt in %.1f s",
            error.status, reason_of(error), delay,
        )  # fmt: skip
        return delay

    def _split(self, batch: _Trial[_B], error: DeliveryError) -> None:
        # What a 5xx says of a batch is too weak to be held against each event of it.
        refusal = batch.refusal if isinstance(error, Rejected) else None
        first, second = batch.events.halves()
        self._pending.appendleft(_Trial(second, refusal))
        self._pending.appendleft(_Trial(first, refusal))

    def _expired(self, error: DeliveryError) -> float:
        """Set the batch aside: sent once more, it might be billed twice."""
        events = self._pending.popleft().events
        logger.error(
            "%s; %d events are not, and kept among the dead letters",
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

    def _say_failed(
        self, batch: _Trial[_B], error: DeliveryError, delay: float
    ) -> None:
        answer = f"answered {error.status}" if error.status else "did not answer"
        held = isinstance(error, Held)
        logger.log(
            logging.ERROR if held else logging.WARNING,
            "OpenMeter %s (%s); %d events and all behind them are kept%s, next attempt "
            "in %.1f s",
            answer, reason_of(error), len(batch.events),
            " until the key or the address is mended" if held else "", delay,
        )  # fmt: skip


#: The end of what lasted as many seconds is told; a single attempt in vain was told
#: to be repeated at once.
WORTH_TELLING = 5.0


class _Now(NamedTuple):
    since: float
    code: str
    answer: str


class Outage:
    """What keeps one sender from delivering. Its thread notes it, any thread asks."""

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
        code = "held" if isinstance(error, Held) else "unavailable"
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
    def problem(self) -> Problem | None:
        """What is wrong now, None if nothing is known to be."""
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


def shortened(event: bytes) -> bytes:
    """Leave out the middle of a long event; subject and id are at its end."""
    if len(event) <= _MAX_LOGGED:
        return event
    return event[: _MAX_LOGGED // 2] + b" [...] " + event[-_MAX_LOGGED // 2 :]
