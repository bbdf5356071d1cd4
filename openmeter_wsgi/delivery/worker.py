"""The worker: takes batches from a source and has a sender deliver them.

A put into the source wakes it, or it looks by itself. `Worker._deliver` is the loop:
gather a batch, attempt to send it, pause. It runs in a thread of the worker's own, and
where there is none in the thread that flushes or closes.
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

#: At exit attempts follow each other this closely: the deadline is near.
CLOSING_DELAY = 0.5
#: Seconds between two looks of a close whether the worker still delivers.
_JOIN_INTERVAL = 0.02
#: Seconds of processor time that other threads get for each second of the worker: it
#: takes a twentieth of a process that could use a whole core.
_SHARE = 20
_NEVER = sys.maxsize
_B = TypeVar("_B", bound=Batch)


class Source(Generic[_B]):
    """A place where events wait for the worker.

    A source has a length and a `take`. The rest are defaults: of a source that belongs
    to this process alone, and that nobody has to look into for something new.
    """

    #: Seconds between two looks for new events. None: whoever puts wakes the worker,
    #: and an idle one waits without a timeout.
    poll: float | None = None

    def __len__(self) -> int:
        """Return how many events wait to be taken, as far as is known."""
        raise NotImplementedError

    def take(self, *, max_events: int, max_bytes: int) -> _B:
        """Return the oldest events, as many as one batch may hold."""
        raise NotImplementedError

    def turn(self, *, wait: bool) -> AbstractContextManager[bool]:  # noqa: ARG002
        """Take from the source within this context, if it yields True.

        With *wait* it may block until another process has stopped taking.
        """
        return contextlib.nullcontext(True)

    @property
    def is_waiting(self) -> bool:
        """True if the worker's thread waits for its turn."""
        return False

    def look(self, *, last: bool) -> None:
        """Look for new events; with *last* for every one."""

    def tell(self, answer: str | None, *, next_in: float) -> None:
        """Tell others why events wait: the *answer*, None if OpenMeter took the batch.

        The next attempt is *next_in* seconds away.
        """

    def wake_from(self, waiting: int) -> None:
        """Have a put wake the worker from so many *waiting* events on."""

    @property
    def due_in(self) -> float | None:
        """The seconds until delayed events are due, None if there are none."""
        return None

    @property
    def is_ours(self) -> bool:
        """True if this process may still take from it."""
        return True

    @property
    def is_full(self) -> bool:
        """True if a batch can be filled without more events."""
        return False

    @property
    def is_pressed(self) -> bool:
        """True if so much waits that soon there might be no room for more."""
        return False


class Worker(Generic[_B]):
    """Brings batches from a source to a sender until it is closed.

    Belongs to one process. Nothing runs before `start` or the first `wake`.
    *exit_hook* closes the delivery when the process ends. *idle* is called when the
    worker stops delivering.
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
        #: True: send the waiting events without waiting for more.
        self._hurried = False
        #: True: skip the next wait after a failure.
        self._retry_now = False
        self._closing = False
        self._stopping = False
        self._exiting = False
        self._released = False
        #: Until when a calling thread delivers, None if the worker's own thread does.
        self._until: float | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._delivering = threading.Lock()
        self._pace = Pace()

    # -- From other threads

    @property
    def is_running(self) -> bool:
        """True if there is a thread."""
        return self._thread is not None

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self._exiting or sys.is_finalizing():
            # A thread started now would not run, and its start() wait for it.
            logger.error(
                "%s: the process is ending; events that come now are not delivered",
                "shutdown",
            )
            return
        # Not waited for: whoever holds it is starting the thread, perhaps this
        # very one, interrupted by a finaliser.
        if not self._starting.acquire(blocking=False):
            return
        try:
            if self._thread is None:
                self._closing = self._stopping = False
                self._thread = threading.Thread(
                    target=self._run, name="openmeter_wsgi.delivery", daemon=True
                )
                # Before the start, which may fail: then all waits for the exit.
                self._exit_hook.register(self)
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

    def wake(self) -> None:
        """Have the worker look at its source, starting it if it does not run."""
        if self._thread is None:
            self.start()
        self._wakeup.set()

    def wake_if_running(self) -> None:
        """Have a worker that runs try again what it waits to try again."""
        if self._thread is not None:
            self._wakeup.set()

    def hurry(self) -> None:
        """Have what waits now delivered without waiting for more, or for a backoff."""
        self._hurried = self._retry_now = True
        self._wakeup.set()

    def finish(self, deadline: float) -> bool:
        """Deliver what waits until *deadline* and end; say whether it has ended.

        A worker that waits for its turn has nothing to deliver and is left alone.
        """
        thread = self._thread
        self._closing = True
        self.hurry()
        if thread is None or not thread.is_alive():
            self.deliver_here(max(deadline - time.monotonic(), 0))
            return True
        while thread.is_alive() and not self._source.is_waiting:
            if (left := deadline - time.monotonic()) <= 0:
                return False
            thread.join(left if self._source.poll is None else _JOIN_INTERVAL)
        return True

    def go_on(self) -> None:
        """Deliver at the usual pace again, after a `finish` that was not in time."""
        self._closing = False

    def stop(self) -> None:
        """End without delivering any more."""
        self._stopping = True
        self._wakeup.set()

    def release(self) -> None:
        """End as soon as nothing waits: nobody holds the delivery any more."""
        self._released = True
        self._wakeup.set()

    def end(self) -> None:
        """Start no thread any more: the process is ending."""
        self._exiting = True

    def deliver_here(self, timeout: float) -> None:
        """Deliver in the calling thread, where no other can be had."""
        deadline = time.monotonic() + timeout
        try:
            with self._source.turn(wait=False) as is_ours:
                if is_ours and self._delivering.acquire(timeout=timeout):
                    try:
                        self._until = deadline
                        self._deliver()
                    finally:
                        self._until = None
                        self._delivering.release()
        except OSError as error:
            logger.error(
                "%s: nothing can be delivered now; all events stay in the spool",
                error,
            )

    # -- The thread

    def _run(self) -> None:
        """Deliver until closed. The thread's body."""
        try:
            while not (self._take_turn() or self._stopping or self._released):
                pass
        finally:
            self._source.wake_from(1)
            self._exit_hook.unregister(self)
            self._thread = None  # from here on a put starts another, at exit as well
        if len(self._source):
            # Put after the last look, by one who still found this thread.
            self.wake()

    def _take_turn(self) -> bool:
        """Deliver when it is this process's turn; say whether the thread is to end."""
        try:
            with self._source.turn(wait=True) as is_ours:
                if is_ours:
                    with self._delivering:
                        self._deliver()
        except OSError as error:
            logger.error(
                "%s: no process can become the sender; events in the spool wait, "
                "next try in %.0f s",
                error, MAX_DELAY,
            )  # fmt: skip
            self._pause(MAX_DELAY)
        except Exception:
            logger.exception("%s: failed and starts again; all are kept", "delivery")
            self._pause(FIRST_DELAY)
        return self._closing

    def _deliver(self) -> None:
        """Gather and send, batch after batch."""
        self._pace = Pace()
        try:
            while not self._finished():
                self._step()
        finally:
            self._source.wake_from(1)
            self._idle()

    @property
    def _is_hasty(self) -> bool:
        """True if somebody waits for the end."""
        return self._closing or self._until is not None

    def _finished(self) -> bool:
        if not self._source.is_ours:
            return True
        if self._until is None and (self._stopping or not self._closing):
            return self._stopping or (self._released and not self._has_work())
        if self._until is not None and time.monotonic() > self._until:
            return True
        self._source.look(last=True)
        # `finish` sets _hurried, so suspects get one more attempt.
        return not (len(self._source) or self._sender.busy or self._hurried)

    def _has_work(self) -> bool:
        """Look whether anything waits, for a delivery that nobody holds any more."""
        sender = self._sender
        self._source.look(last=True)
        delays = self._source.due_in is not None
        return bool(len(self._source) or sender.busy or sender.has_suspects or delays)

    def _step(self) -> None:
        if not self._sender.busy:
            self._gather()
        if self._sender.busy and self._source.is_ours:
            delay = self._attempt()
            self._source.tell(self._sender.outage.answer, next_in=delay)
            self._pause(max(delay, self._rest()))

    def _rest(self) -> float:
        """Return the seconds to wait for the application's sake."""
        rest = self._pace.rest()
        spared = not (self._hurried or self._is_hasty or self._source.is_pressed)
        return rest if spared else 0.0

    def _attempt(self) -> float:
        try:
            return self._sender.attempt()
        except Exception as error:
            # Of all that can happen here nothing may end the thread.
            logger.exception(
                "%s: an attempt broke off; its events are kept", "delivery"
            )
            return self._sender.note_broken_attempt(error)

    # -- Waiting

    def _gather(self) -> None:
        """Wait for a batch: its size, or the flush interval after its first event."""
        self._wait_for(1, self._until_others())
        if len(self._source):
            self._wait_for(self._batch_size, self._flush_interval)
        hurried, self._hurried = self._hurried, False
        self._retry_now = False  # an attempt follows
        if events := self._source.take(
            max_events=self._batch_size, max_bytes=MAX_BATCH_BYTES
        ):
            self._sender.load(events)
        else:
            self._sender.retry_suspects()
        if hurried and (len(events) >= self._batch_size or len(self._source)):
            self._hurried = True  # until all is taken that the flush found

    def _until_others(self) -> float | None:
        """Return the seconds until there is something else to try, None for never."""
        waits = [MAX_DELAY] if self._sender.has_suspects else []
        if (due_in := self._source.due_in) is not None:
            waits.append(due_in)
        return min(waits, default=None)

    def _wait_for(self, events: int, timeout: float | None) -> None:
        """Wait for so many events, a flush or a close; for ever without a timeout.

        An idle thread has no timeout: waking for nothing it would sooner or later
        hold a lock at the moment of a fork.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._source.wake_from(events)
        while not self._ready(events):
            self._wakeup.clear()
            if self._ready(events):
                break  # a set() before the clear() is seen no more
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            self._wakeup.wait(self._at_most(left))
        self._source.wake_from(_NEVER)

    def _at_most(self, left: float | None) -> float | None:
        poll = self._source.poll
        if left is None or poll is None:
            return poll if left is None else left
        return min(left, poll)

    def _ready(self, events: int) -> bool:
        hasty = self._is_hasty
        self._source.look(last=hasty)
        released = self._released and self._source.due_in is None
        ends = hasty or self._stopping or released or not self._source.is_ours
        return (
            len(self._source) >= events or self._hurried or ends or self._source.is_full
        )

    def _pause(self, delay: float) -> None:
        """Wait before the next attempt; a flush or a close cuts it short."""
        if self._is_hasty:
            delay = min(delay, CLOSING_DELAY)
        if self._until is not None:
            delay = min(delay, self._until - time.monotonic())
        if delay <= 0:
            return
        self._wakeup.clear()
        deadline = time.monotonic() + delay
        while not (self._retry_now or self._stopping):
            before = time.monotonic()
            at_most = self._at_most(max(deadline - before, 0)) or 0.0
            self._wakeup.wait(at_most)
            if time.monotonic() < before + at_most or time.monotonic() >= deadline:
                break
            self._source.look(last=False)  # who has died meanwhile, and left room
        self._retry_now = False


class Pace:
    """The rest of the worker after a batch. Belongs to its thread.

    It measures the processor time of the other threads. If they need almost none, or
    had their share while the worker waited for the network or the disk, it does not
    rest.
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
        """Return the seconds to rest now, after what was done since the last call."""
        now = (self._clock(), self._own(), self._process())
        last, self._last = self._last, now
        if last is None:
            return 0.0
        passed, own, process = (b - a for a, b in zip(last, now, strict=True))
        others = max(process - own, 0.0)
        owed = max(_SHARE * own - others, 0.0)
        return owed * min(others / passed, 1.0) if passed > 0 else 0.0
