"""The worker: takes batches from a source and passes them to a sender.

`Worker._deliver` is the loop: gather a batch, attempt to send it, pause. It runs in a
thread of the worker's own. Without such a thread, the thread that calls `flush` or
`close` runs it. A new event wakes the worker, or the worker polls its source.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from openmeter_wsgi import log
from openmeter_wsgi.delivery.batch import Batch
from openmeter_wsgi.delivery.sender import FIRST_DELAY, MAX_DELAY, Sender
from openmeter_wsgi.events import MAX_BATCH_BYTES
from openmeter_wsgi.threads import Wakeup

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.threads import ExitHook

logger: Final = log.get_logger(__name__)

#: Maximum number of seconds between two attempts at exit, where the deadline is near.
CLOSING_DELAY = 0.5
#: Seconds between two checks of a close whether the worker still delivers.
_JOIN_INTERVAL = 0.02
#: Seconds of processor time that other threads get for each second of the worker: the
#: worker takes about a twentieth of a process that could use a whole core.
_OTHERS_SHARE = 20
#: The wake threshold of a worker that waits for nothing.
_NEVER = sys.maxsize
_B = TypeVar("_B", bound=Batch)


class Source(Generic[_B]):
    """The place where events wait for the worker.

    A subclass defines the length and `take`. The defaults of the other members fit a
    source that only this process uses and that needs no polling.
    """

    #: Seconds between two polls for new events. None: a new event wakes the worker,
    #: and an idle worker waits without a timeout.
    poll: float | None = None

    def __len__(self) -> int:
        """Return the known number of events that can be taken."""
        raise NotImplementedError

    def take(self, *, max_events: int, max_bytes: int) -> _B:
        """Remove and return the oldest events, at most those of one batch."""
        raise NotImplementedError

    def turn(self, *, wait: bool) -> AbstractContextManager[bool]:  # noqa: ARG002
        """Reserve the source for this process within the context.

        Yields False if another process has reserved it. With *wait* the call blocks
        until that process gives it up.
        """
        return contextlib.nullcontext(True)

    @property
    def is_waiting(self) -> bool:
        """True if the worker's thread waits for its turn."""
        return False

    def refresh(self, *, everything: bool) -> None:
        """Look for new events; with *everything* also where it looked a moment ago."""

    def share_answer(self, answer: str | None, *, next_in: float) -> None:
        """Show OpenMeter's *answer* to other processes, None if it took the batch.

        The next attempt is *next_in* seconds away.
        """

    def set_wake_threshold(self, waiting: int) -> None:
        """Set the number of *waiting* events at which a new event wakes the worker."""

    @property
    def due_in(self) -> float | None:
        """The seconds until delayed events are due, None without delayed events."""
        return None

    @property
    def is_ours(self) -> bool:
        """True if this process may still take events."""
        return True

    @property
    def has_full_batch(self) -> bool:
        """True if the waiting events fill a batch."""
        return False

    @property
    def is_half_full(self) -> bool:
        """True if the waiting events take half of the allowed bytes or more."""
        return False


class Worker(Generic[_B]):
    """The delivery loop between a source and a sender, and the thread that runs it.

    Belongs to one process. The thread starts with `start` or the first `wake`.
    *exit_hook* closes the delivery at the end of the process. *idle* is called whenever
    the loop ends.
    """

    def __init__(
        self,
        source: Source[_B],
        sender: Sender[_B],
        policy: Policy,
        *,
        exit_hook: ExitHook,
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = source
        self._sender = sender
        self._exit_hook = exit_hook
        self._idle = idle
        self._batch_size = policy.batch_size
        self._flush_interval = policy.flush_interval
        self._wakeup = Wakeup()
        #: True: send the waiting events without waiting for more events.
        self._hurried = False
        #: True: skip the next wait after a failure.
        self._retry_now = False
        #: True: deliver all waiting events, then end.
        self._closing = False
        #: True: end at once.
        self._stopping = False
        #: True: the process ends, and no thread may start.
        self._exiting = False
        #: True: end once no event waits.
        self._ends_when_empty = False
        #: The deadline of a calling thread that delivers, None in the worker's thread.
        self._caller_deadline: float | None = None
        self._thread: threading.Thread | None = None
        #: Held while a thread is started, and while a thread runs the loop.
        self._starting = threading.Lock()
        self._delivering = threading.Lock()
        self._pace = Pace()

    # -- From other threads

    @property
    def is_running(self) -> bool:
        """True if the worker's thread exists."""
        return self._thread is not None

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self._exiting or sys.is_finalizing():
            # A new thread would not run now, and its start() would block.
            logger.error(
                "%s: the process is ending; events that come now are not delivered",
                "shutdown",
            )
            return
        # Never wait: the holder of the lock is starting the thread. It may be this very
        # thread, interrupted by a finaliser.
        if not self._starting.acquire(blocking=False):
            return
        try:
            if self._thread is None:
                self._closing = self._stopping = False
                self._thread = threading.Thread(
                    target=self._run, name="openmeter_wsgi.delivery", daemon=True
                )
                # Before the start: if it fails, the exit hook delivers the events.
                self._exit_hook.register(self)
                self._thread.start()
        except RuntimeError as error:
            # The limit of threads is reached, or the interpreter is shutting down.
            self._thread = None
            logger.error(
                "%s: the delivery thread could not be started; all events are kept "
                "until flush() or close() delivers them",
                error,
            )
        finally:
            self._starting.release()

    def wake(self) -> None:
        """Make the worker look at its source; start its thread if it does not run."""
        if self._thread is None:
            self.start()
        self._wakeup.set()

    def wake_if_running(self) -> None:
        """Make the worker look at its source, if its thread runs."""
        if self._thread is not None:
            self._wakeup.set()

    def hurry(self) -> None:
        """Deliver the waiting events now, not after a full batch or a backoff."""
        self._hurried = self._retry_now = True
        self._wakeup.set()

    def finish(self, deadline: float) -> bool:
        """Deliver the waiting events until *deadline*, end, and return True if ended.

        A worker that waits for its turn has nothing to deliver: it goes on waiting.
        """
        thread = self._thread
        self._closing = True
        self.hurry()
        if thread is None or not thread.is_alive():
            self.deliver_in_this_thread(max(deadline - time.monotonic(), 0))
            return True
        while thread.is_alive() and not self._source.is_waiting:
            if (left := deadline - time.monotonic()) <= 0:
                return False
            thread.join(left if self._source.poll is None else _JOIN_INTERVAL)
        return True

    def reopen(self) -> None:
        """Deliver at the usual pace again, after a `finish` that returned False."""
        self._closing = False

    def stop(self) -> None:
        """End, and leave the waiting events in the source."""
        self._stopping = True
        self._wakeup.set()

    def end_when_empty(self) -> None:
        """End once no event waits: the delivery is no longer used."""
        self._ends_when_empty = True
        self._wakeup.set()

    def forbid_start(self) -> None:
        """Start no thread from now on: the process is ending."""
        self._exiting = True

    def deliver_in_this_thread(self, timeout: float) -> None:
        """Deliver in the calling thread: the worker has no thread of its own."""
        deadline = time.monotonic() + timeout
        try:
            with self._source.turn(wait=False) as is_ours:
                if is_ours and self._delivering.acquire(timeout=timeout):
                    try:
                        self._caller_deadline = deadline
                        self._deliver()
                    finally:
                        self._caller_deadline = None
                        self._delivering.release()
        except OSError as error:
            logger.error(
                "%s: no event can be delivered now; all events are kept in the spool",
                error,
            )

    # -- The thread

    def _run(self) -> None:
        """Run the thread: deliver until the worker is closed."""
        try:
            while not (self._take_turn() or self._stopping or self._ends_when_empty):
                pass
        finally:
            self._source.set_wake_threshold(1)
            self._exit_hook.unregister(self)
            self._thread = None  # from now on a new event starts another thread
        if len(self._source):
            # They came after the last look, when `wake` still found this thread.
            self.wake()

    def _take_turn(self) -> bool:
        """Deliver once this process has its turn; return True to end the thread."""
        try:
            with self._source.turn(wait=True) as is_ours:
                if is_ours:
                    with self._delivering:
                        self._deliver()
        except OSError as error:
            logger.error(
                "%s: no process can become the sender; all events are kept in the "
                "spool, next attempt in %.0f s",
                error, MAX_DELAY,
            )  # fmt: skip
            self._pause(MAX_DELAY)
        except Exception:
            logger.exception(
                "%s: failed and starts again; all events are kept", "delivery"
            )
            self._pause(FIRST_DELAY)
        return self._closing

    def _deliver(self) -> None:
        """Gather and send batches until the turn of this process ends."""
        self._pace = Pace()
        try:
            while not self._is_finished():
                self._step()
        finally:
            self._source.set_wake_threshold(1)
            self._idle()

    @property
    def _is_ending(self) -> bool:
        """True if a caller waits for the delivery to end."""
        return self._closing or self._caller_deadline is not None

    def _is_finished(self) -> bool:
        """Return True if the loop must end."""
        deadline = self._caller_deadline
        if not self._source.is_ours:
            return True
        if deadline is None and (self._stopping or not self._closing):
            return self._stopping or (self._ends_when_empty and not self._has_work())
        if deadline is not None and time.monotonic() > deadline:
            return True
        self._source.refresh(everything=True)
        # `finish` sets _hurried: one more `_gather` makes a last attempt with suspects.
        return not (len(self._source) or self._sender.busy or self._hurried)

    def _has_work(self) -> bool:
        """Return True if the source or the sender has events."""
        sender = self._sender
        self._source.refresh(everything=True)
        delayed = self._source.due_in is not None
        return bool(len(self._source) or sender.busy or sender.has_suspects or delayed)

    def _step(self) -> None:
        if not self._sender.busy:
            self._gather()
        if self._sender.busy and self._source.is_ours:
            delay = self._attempt()
            self._source.share_answer(self._sender.outage.answer, next_in=delay)
            self._pause(max(delay, self._rest()))

    def _rest(self) -> float:
        """Return the seconds to leave the processor to the application."""
        rest = self._pace.rest()
        is_urgent = self._hurried or self._is_ending or self._source.is_half_full
        return 0.0 if is_urgent else rest

    def _attempt(self) -> float:
        try:
            return self._sender.attempt()
        except Exception as error:
            # No exception of an attempt may end the thread.
            logger.exception(
                "%s: an attempt broke off; its events are kept and sent again",
                "delivery",
            )
            return self._sender.note_broken_attempt(error)

    # -- Waiting

    def _gather(self) -> None:
        """Load a batch when it is full or its first event has waited long enough.

        Without an event for a long time, load the suspects again.
        """
        self._wait_for(1, self._next_retry_in())
        if len(self._source):
            self._wait_for(self._batch_size, self._flush_interval)
        hurried, self._hurried = self._hurried, False
        self._retry_now = False  # an attempt follows
        if batch := self._source.take(
            max_events=self._batch_size, max_bytes=MAX_BATCH_BYTES
        ):
            self._sender.load(batch)
        else:
            self._sender.retry_suspects()
        if hurried and (len(batch) >= self._batch_size or len(self._source)):
            self._hurried = True  # a flush continues until no event waits

    def _next_retry_in(self) -> float | None:
        """Return the seconds until suspects or delayed events are sent, or None."""
        waits = [MAX_DELAY] if self._sender.has_suspects else []
        if (due_in := self._source.due_in) is not None:
            waits.append(due_in)
        return min(waits, default=None)

    def _wait_for(self, events: int, timeout: float | None) -> None:
        """Wait for a number of *events*, a flush or a close; None: without a timeout.

        An idle thread has no timeout. If it woke from time to time, it would some day
        hold a lock at the moment of a fork.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._source.set_wake_threshold(events)
        while not self._is_ready(events):
            self._wakeup.clear()
            if self._is_ready(events):
                break  # the event may have come before clear(), which forgets its set()
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            self._wakeup.wait(self._limited_by_poll(left))
        self._source.set_wake_threshold(_NEVER)

    def _limited_by_poll(self, seconds: float | None) -> float | None:
        """Return the shorter of *seconds* and the poll interval; None: no limit."""
        limits = [s for s in (seconds, self._source.poll) if s is not None]
        return min(limits, default=None)

    def _is_ready(self, events: int) -> bool:
        """Return True if the wait for a number of *events* is over."""
        source, is_ending = self._source, self._is_ending
        source.refresh(everything=is_ending)
        may_end = self._ends_when_empty and source.due_in is None
        must_end = is_ending or self._stopping or may_end or not source.is_ours
        has_enough = len(source) >= events or self._hurried
        return has_enough or must_end or source.has_full_batch

    def _pause(self, delay: float) -> None:
        """Wait before the next attempt; a flush or a close ends the wait."""
        if self._is_ending:
            delay = min(delay, CLOSING_DELAY)
        if self._caller_deadline is not None:
            delay = min(delay, self._caller_deadline - time.monotonic())
        if delay <= 0:
            return
        self._wakeup.clear()
        deadline = time.monotonic() + delay
        while not (self._retry_now or self._stopping):
            began = time.monotonic()
            seconds = self._limited_by_poll(max(deadline - began, 0)) or 0.0
            self._wakeup.wait(seconds)
            now = time.monotonic()
            if now < began + seconds or now >= deadline:
                break  # woken early, or the time is over
            # A spool deletes files of processes that have died, which makes room.
            self._source.refresh(everything=False)
        self._retry_now = False


class Pace:
    """A timer of the worker's rest after each batch. Belongs to the worker's thread.

    It measures the processor time of the other threads. There is no rest if they need
    almost none, or had their share while the worker waited for the network or the disk.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        own: Callable[[], float] = time.thread_time,
        process: Callable[[], float] = time.process_time,
    ) -> None:
        self._clock = clock
        self._own = own
        self._process = process
        self._last: tuple[float, float, float] | None = None

    def rest(self) -> float:
        """Return the seconds to rest after the work since the last call."""
        now = (self._clock(), self._own(), self._process())
        last, self._last = self._last, now
        if last is None:
            return 0.0
        passed, own, process = (b - a for a, b in zip(last, now, strict=True))
        others = max(process - own, 0.0)
        owed = max(_OTHERS_SHARE * own - others, 0.0)
        return owed * min(others / passed, 1.0) if passed > 0 else 0.0
