"""When a batch goes to the sender: by size, by time, or at once."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from openmeter_wsgi.delivery.sender import MAX_DELAY
from openmeter_wsgi.delivery.waking import Signal
from openmeter_wsgi.events import MAX_BATCH_BYTES

if TYPE_CHECKING:
    from openmeter_wsgi.delivery.batch import Batch
    from openmeter_wsgi.delivery.sender import Sender
    from openmeter_wsgi.policy import Policy

#: After an outage, events go in batches of up to this many.
BACKLOG_BATCH = 1_000
#: Batches that are not full are at least this many seconds apart: a request costs the
#: same for a hundred events as for a thousand.
SPACING = 0.1
#: At exit attempts follow each other this closely: the deadline is near.
CLOSING_DELAY = 0.5
_NEVER = sys.maxsize


class Source(Protocol):
    """Where the events of a delivery wait."""

    def __len__(self) -> int:
        """Return how many wait to be taken, as far as is known."""

    def take(self, *, max_events: int, max_bytes: int) -> Batch:
        """Return the oldest events, as many as one batch may hold."""

    @property
    def due_in(self) -> float | None:
        """The seconds until delayed events are due, None if there are none."""


class Gathering:
    """Waits until a batch has come together in a source, and between attempts.

    The waits are those of the thread that delivers; any other cuts them short. A
    subclass says what the source is (`_events`) and, where nobody wakes the thread
    when events come, how often to look (`_poll`, in seconds).
    """

    _events: Source
    _sender: Sender[Any]
    #: None: whoever puts wakes the thread, and an idle one waits for ever.
    _poll: float | None = None

    def __init__(self, policy: Policy) -> None:
        self._batch_size = policy.batch_size
        # Behind a collector that takes one event a request, a backlog is no excuse.
        self._max_batch = max(
            policy.batch_size, BACKLOG_BATCH if self._batch_size > 1 else 1
        )
        self._flush_interval = policy.flush_interval
        self._spacing = min(SPACING, policy.flush_interval)
        self._gathered_at = -self._spacing
        self._wake = Signal()
        #: Whether what waits now goes without waiting for more.
        self._hurried = False
        #: Whether the next wait after a failure is left out.
        self._retry_now = False
        self._closing = False

    def _wake_from(self, waiting: int) -> None:
        """Have the thread woken by a put from so many *waiting* events on.

        A Signal.set() costs as much as the rest of an event, so there is one per
        batch. Nothing to do where nobody wakes the thread.
        """

    def _hurry(self) -> None:
        self._hurried = self._retry_now = True
        self._wake.set()

    def _gather(self) -> None:
        """Wait for a batch: its size, or the flush interval after its first event.

        Where batches follow each other closely, they are filled as far as they may be.
        """
        waited = self._fill_up()
        self._wait_for(1, self._until_others())
        if len(self._events):
            self._wait_for(self._batch_size, self._flush_interval - waited)
        hurried, self._hurried = self._hurried, False
        self._retry_now = False  # an attempt follows
        if events := self._events.take(
            max_events=self._max_batch, max_bytes=MAX_BATCH_BYTES
        ):
            self._gathered_at = time.monotonic()
            self._sender.load(events)
        else:
            self._sender.retry_suspects()
        if hurried and (len(events) >= self._max_batch or len(self._events)):
            self._hurried = True  # until all is taken that the flush found

    def _until_others(self) -> float | None:
        """Return the seconds until there is something else to try, None for never."""
        waits = [MAX_DELAY] if self._sender.doubtful else []
        if (due_in := self._events.due_in) is not None:
            waits.append(due_in)
        return min(waits, default=None)

    def _fill_up(self) -> float:
        """Wait for a full batch until another may follow.

        Return how long the first event may have waited meanwhile.
        """
        began = time.monotonic()
        left = self._gathered_at + self._spacing - began
        if left > 0:
            self._wait_for(self._max_batch, left)
        return time.monotonic() - began if len(self._events) else 0.0

    def _wait_for(self, events: int, timeout: float | None) -> None:
        """Wait for so many events, a flush or a close; for ever without a timeout.

        An idle thread has no timeout: waking for nothing it would sooner or later
        hold a lock at the moment of a fork.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._wake_from(events)
        while not self._ready(events):
            self._wake.clear()
            if self._ready(events):
                break  # a set() before the clear() is seen no more
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            self._wake.wait(self._at_most(left))
        self._wake_from(_NEVER)

    def _at_most(self, left: float | None) -> float | None:
        if left is None or self._poll is None:
            return self._poll if left is None else left
        return min(left, self._poll)

    def _ready(self, events: int) -> bool:
        return len(self._events) >= events or self._hurried or self._closing

    def _pause(self, delay: float) -> None:
        """Wait before the next attempt; a flush or a close cuts it short."""
        if self._closing:
            delay = min(delay, CLOSING_DELAY)
        if delay <= 0:
            return
        self._wake.clear()
        if not self._retry_now:
            self._wake.wait(delay)
        self._retry_now = False
