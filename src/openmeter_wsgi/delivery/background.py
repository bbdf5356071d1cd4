"""A thread that brings batches to a sender: woken by size or by time."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Protocol

from openmeter_wsgi import log
from openmeter_wsgi.delivery.beginning import Beginning
from openmeter_wsgi.delivery.sender import MAX_DELAY
from openmeter_wsgi.delivery.waking import Signal
from openmeter_wsgi.delivery.watching import Backlog
from openmeter_wsgi.events import MAX_BATCH_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.client import OpenMeterClient
    from openmeter_wsgi.delivery.sender import Sender
    from openmeter_wsgi.policy import Policy

logger = log.get_logger(__name__)

#: After an outage, events go in batches of up to this many.
BACKLOG_BATCH = 1_000
#: At exit attempts follow each other this closely: the deadline is near.
_CLOSING_DELAY = 0.5
_NEVER = sys.maxsize


class Source(Protocol):
    """Where the events of a delivery wait."""

    def __len__(self) -> int:
        """Return how many wait to be taken, as far as is known."""

    def take(self, *, max_events: int, max_bytes: int) -> list[bytes]:
        """Return the oldest events, as many as one batch may hold."""


class BackgroundDelivery:
    """Delivers what waits in a source, from a thread of its own.

    Belongs to one process. Nothing runs before `_start`. A subclass says what the
    source is (`_events`), how much of it is left (`waiting`) and, where nobody
    wakes the thread when events come, how often to look (`_poll`, in seconds).
    """

    _events: Source
    _sender: Sender
    #: Whether all was done that the first settled request brings about.
    started = True
    #: None: whoever puts wakes the thread, and an idle one waits for ever.
    _poll: float | None = None

    def __init__(self, policy: Policy, client: OpenMeterClient) -> None:
        self.pid = os.getpid()
        self._client = client
        self._batch_size = policy.batch_size
        # Behind a collector that takes one event a request, a backlog is no excuse.
        self._max_batch = max(
            policy.batch_size, BACKLOG_BATCH if self._batch_size > 1 else 1
        )
        self._flush_interval = policy.flush_interval
        self._shutdown_timeout = policy.shutdown_timeout
        self._wake = Signal()
        #: Whether what waits now goes without waiting for more.
        self._hurried = False
        #: Whether the next wait after a failure is left out.
        self._retry_now = False
        self._closing = False
        self._at_exit = False
        self._exiting = False
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._beginning = Beginning()
        self._sending = threading.Lock()

    def announce(self, begin: Callable[[], None]) -> None:
        """Have *begin* called once, when the first request is settled."""
        self._beginning.add(begin)
        self.started = False

    @property
    def waiting(self) -> int:
        """How many events are not delivered yet."""
        return self.in_spool.events + self.in_memory.events

    @property
    def in_spool(self) -> Backlog:
        """What of them any process that shares the spool can deliver."""
        return Backlog()

    @property
    def in_memory(self) -> Backlog:
        """What of them is lost if this process dies."""
        return Backlog()

    def _wake_from(self, waiting: int) -> None:
        """Have the thread woken by a put from so many *waiting* events on.

        A Signal.set() costs as much as the rest of an event, so there is one per
        batch. Nothing to do where nobody wakes the thread.
        """

    def close(self, timeout: float | None = None) -> None:
        """Send what waits until *timeout*, then stop and say what is left.

        May be called twice, and after a fork in the child, where it does nothing.
        """
        if os.getpid() != self.pid:
            return
        limit = self._shutdown_timeout if timeout is None else timeout
        thread = self._thread
        self._closing = True
        self._hurry()
        if thread is None or not thread.is_alive():
            self._deliver_here(limit)
        else:
            thread.join(limit)
        # Past the deadline the thread goes on at its usual pace, if the process does.
        self._closing = False
        self._say_left(limit)

    def _say_left(self, limit: float) -> None:
        if left := self.waiting:
            logger.error(
                "%s: %d events could not be delivered within %.1f s and are lost if "
                "this process ends now",
                "shutdown", left, limit,
            )  # fmt: skip

    def _hurry(self) -> None:
        self._hurried = self._retry_now = True
        self._wake.set()

    def _rouse(self) -> None:
        if self._thread is None:
            self._start()
        self._wake.set()

    def close_at_exit(self) -> None:
        """Close, and deliver nothing any more: the exit hook of the process."""
        self.close()
        self._exiting = True

    def _start(self) -> None:
        if self._exiting or sys.is_finalizing():
            # A thread started now would not run, and its start() wait for it.
            logger.error(
                "%s: the process is ending and delivers nothing that comes now",
                "shutdown",
            )
            return
        # Not waited for: whoever holds it is starting the thread, perhaps this
        # very one, interrupted by a finaliser.
        if not self._starting.acquire(blocking=False):
            return
        try:
            if self._thread is None:
                self._closing = False
                self._thread = threading.Thread(
                    target=self._run, name="openmeter_wsgi.delivery", daemon=True
                )
                if not self._at_exit:
                    # Before the start, which may fail: then all waits for the exit.
                    self._at_exit = True
                    atexit.register(self.close_at_exit)
                self._thread.start()
        except RuntimeError as error:
            # No more threads here, or the interpreter is shutting down.
            self._thread = None
            logger.error(
                "%s: the delivery thread could not be started; events wait for "
                "flush() or close()",
                error,
            )
        finally:
            self._starting.release()

    def _run(self) -> None:
        """Deliver until closed. The thread's body."""
        try:
            with self._sending:
                while not self._finished():
                    self._step()
                self._client.close()
        finally:
            self._wake_from(1)
            self._at_exit = False
            atexit.unregister(self.close_at_exit)
            self._thread = None  # from here on a put starts another, at exit as well
        if len(self._events):
            # Put after the last look, by one who still found this thread.
            self._rouse()

    def _finished(self) -> bool:
        # Hurried by close() itself, so that suspects are tried once more.
        waits = len(self._events) or self._sender.busy or self._hurried
        return self._closing and not waits

    def _step(self) -> None:
        if not self._sender.busy:
            self._gather()
        if self._sender.busy:
            self._pause(self._attempt())

    def _attempt(self) -> float:
        try:
            return self._sender.attempt()
        except Exception:
            # Of all that can happen here nothing may end the thread.
            logger.exception(
                "%s: an attempt broke off; its events are kept", "delivery"
            )
            return self._sender.give_up_attempt()

    def _gather(self) -> None:
        """Wait for a batch: its size, or the flush interval after its first event."""
        self._wait_for(1, MAX_DELAY if self._sender.doubtful else None)
        if len(self._events):
            self._wait_for(self._batch_size, self._flush_interval)
        hurried, self._hurried = self._hurried, False
        self._retry_now = False  # an attempt follows
        if events := self._events.take(
            max_events=self._max_batch, max_bytes=MAX_BATCH_BYTES
        ):
            self._sender.load(events)
        else:
            self._sender.retry_suspects()
        if hurried and len(self._events):
            self._hurried = True  # until all is taken that the flush found

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
            delay = min(delay, _CLOSING_DELAY)
        if delay <= 0:
            return
        self._wake.clear()
        if not self._retry_now:
            self._wake.wait(delay)
        self._retry_now = False

    def _deliver_here(self, timeout: float | None) -> None:
        """Deliver in the calling thread, where no other can be had."""
        limit = self._shutdown_timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        if not self._sending.acquire(timeout=limit):
            return
        try:
            self._sender.retry_suspects()
            while len(self._events) or self._sender.busy:
                if not self._sender.busy:
                    self._hurried = True
                    self._gather()
                delay = min(self._attempt(), _CLOSING_DELAY)
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._wake.clear()
                self._wake.wait(min(delay, left))
        finally:
            self._wake_from(1)  # the next put tries to start the thread
            self._sending.release()
