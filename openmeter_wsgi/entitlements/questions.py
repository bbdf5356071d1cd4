"""Questions to OpenMeter: their queue, and the circuit breaker that stops them.

`lookup.BackgroundLookup` puts a `Pending` question into a `Queue` and lets its worker
threads take it out. Requests wait in `Pending.wait`. The `Breaker` decides if OpenMeter
may be asked at all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from openmeter_wsgi import log
from openmeter_wsgi.options import feature_problem, invalid_feature_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

logger: Final = log.get_logger(__name__)


#: Minimum and maximum seconds between two tries of an open breaker. Each failure
#: doubles the pause.
_MIN_PAUSE, _MAX_PAUSE = 0.5, 5.0


class Breaker:
    """A circuit breaker: open while OpenMeter gives no usable answers.

    Any thread. Two threads that call it at once may both try, which does no harm.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause = 0.0
        self._try_at = 0.0

    @property
    def is_open(self) -> bool:
        """True if questions have failed, and none has been answered since."""
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
        """Close the breaker: OpenMeter answered a question."""
        self._pause = self._try_at = 0.0

    def failed(self) -> None:
        """Open the breaker, or double its pause: no answer came, or only an error."""
        self._pause = min(max(self._pause * 2, _MIN_PAUSE), _MAX_PAUSE)
        self._try_at = self._clock() + self._pause

    def slow_down(self, seconds: float) -> None:
        """Allow no question for *seconds*: OpenMeter answered 429."""
        self._try_at = max(self._try_at, self._clock() + seconds)


class Question(NamedTuple):
    """A question to OpenMeter: the access of one customer to some features."""

    customer: str
    features: tuple[str, ...]


def invalid_features(features: Iterable[str]) -> list[str]:
    """Return the *features* that OpenMeter cannot have, and log an error for each.

    Options with such a feature are rejected at the start. A view may name one only when
    a request comes.
    """
    problems = {feature: feature_problem(feature) for feature in features}
    invalid = [feature for feature, problem in problems.items() if problem]
    for feature in invalid:
        logger.error(
            "feature %r: every request that requires it is denied: %s",
            feature, problems[feature],
        )  # fmt: skip
    return invalid


def questions_about(customer: str, features: Sequence[str]) -> list[Question]:
    """Return one question about all feature keys, and one for each feature id.

    OpenMeter's answer about several features contains only keys. An id would be missing
    there, which looks like a denial.
    """
    if len(features) == 1:
        return [Question(customer, (features[0],))]
    ids = invalid_feature_keys(features)
    keys = tuple(feature for feature in features if feature not in ids)
    alone = [Question(customer, (feature,)) for feature in ids]
    return [Question(customer, keys), *alone] if keys else alone


#: Maximum number of questions per queue; less than 4 MiB with keys of 256 characters.
MAX_QUEUE = 2_048
#: Weight of the last question in the moving average of a queue's pace.
_PACE_WEIGHT = 0.2

#: Held while the event of a question is created or read. Reentrant, because the garbage
#: collector may finalize a middleware meanwhile.
_event_lock = threading.RLock()


class Pending:
    """A question that is queued or being asked, with the event for its waiters."""

    __slots__ = (
        "_event", "_is_done", "position", "question", "queue", "shared_read_at",
        "since",
    )  # fmt: skip

    def __init__(self, question: Question, since: float) -> None:
        self.question: Question = question
        #: A shared answer suffices if it was asked for after this monotonic time.
        self.since: float = since
        #: The monotonic time at which the shared answers were read last.
        self.shared_read_at: float = 0.0
        #: The queue of an urgent question, and the question's serial number there;
        #: None and 0 for a refresh.
        self.queue: Queue | None = None
        self.position: int = 0
        self._is_done = False
        #: Created by the first waiter: most questions in a long queue have none.
        self._event: threading.Event | None = None

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


class Queue:
    """A queue of questions, first in, first out. The lookup's lock guards it.

    Urgent questions, which requests wait for, go before refreshes.
    """

    def __init__(self, *, threads: int, tokens_kept_back: float, pace: float) -> None:
        self.max_threads: int = threads
        #: Number of tokens left for the other queue.
        self.tokens_kept_back: float = tokens_kept_back
        #: Number of worker threads of this queue.
        self.threads: int = 0
        #: Number of those that wait for the next question or for its token.
        self.waiting_threads: int = 0
        #: Held by the thread that waits for a token, so that tokens go in order.
        self.token_lock: threading.Lock = threading.Lock()
        self._urgent: deque[Pending] = deque()
        self._refreshes: deque[Pending] = deque()
        #: Number of urgent questions ever added, and of those that got a token or were
        #: dropped.
        self._urgent_added = self._urgent_taken = 0
        #: Seconds between two tokens while urgent questions wait: a moving average.
        self._pace = pace
        #: The monotonic time of the last token.
        self._taken_at = 0.0

    def __len__(self) -> int:
        return len(self._urgent) + len(self._refreshes)

    @property
    def is_full(self) -> bool:
        """True if no question may be added."""
        return len(self) >= MAX_QUEUE

    @property
    def waiting(self) -> int:
        """The number of urgent questions without a token."""
        return self._urgent_added - self._urgent_taken

    def add(self, pending: Pending, *, urgent: bool) -> None:
        """Append *pending*."""
        if not urgent:
            self._refreshes.append(pending)
            return
        if not self._urgent:
            self._taken_at = time.monotonic()
        self._urgent_added += 1
        pending.queue, pending.position = self, self._urgent_added
        self._urgent.append(pending)

    def promote(self, pending: Pending) -> None:
        """Make *pending* urgent, if it is queued here: a request waits for it now."""
        try:
            self._refreshes.remove(pending)
        except ValueError:
            return
        self.add(pending, urgent=True)

    def take(self) -> Pending | None:
        """Remove and return the first question, None if there is none."""
        if self._urgent:
            return self._urgent.popleft()
        return self._refreshes.popleft() if self._refreshes else None

    def note_token_taken(self, pending: Pending) -> None:
        """Note that *pending* has its token; update the pace."""
        if not pending.position:  # a refresh
            return
        now = time.monotonic()
        self._urgent_taken += 1
        self._pace += (now - self._taken_at - self._pace) * _PACE_WEIGHT
        self._taken_at = now

    def note_dropped(self, pending: Pending) -> None:
        """Note that *pending*, which `take` returned, needs no token."""
        self._urgent_taken += bool(pending.position)

    def contains(self, position: int) -> bool:
        """Return True if the urgent question at *position* has no token yet."""
        return position > self._urgent_taken

    def seconds_until(self, position: int | None = None) -> float:
        """Return the estimated wait at *position*, or at the end of the queue."""
        last = self._urgent_added + 1 if position is None else position
        return max(last - self._urgent_taken - 1, 0) * self._pace

    def clear(self) -> list[Pending]:
        """Remove and return all questions."""
        removed = [*self._urgent, *self._refreshes]
        self._urgent_taken += len(self._urgent)
        self._urgent.clear()
        self._refreshes.clear()
        return removed
