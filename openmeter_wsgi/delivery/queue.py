"""Delivery from memory: a bounded queue, without a lock on the way in."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections import deque
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from openmeter_wsgi import log
from openmeter_wsgi.delivery import number_ranges
from openmeter_wsgi.delivery.batch import Delayed, ListedBatch
from openmeter_wsgi.delivery.number_ranges import Marks
from openmeter_wsgi.delivery.sender import Sender
from openmeter_wsgi.delivery.worker import Source, Worker
from openmeter_wsgi.stats import Problem
from openmeter_wsgi.threads import ExitHook, ends_without_hooks
from openmeter_wsgi.values import moment_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from openmeter_wsgi.delivery.batch import Batch
    from openmeter_wsgi.delivery.client import OpenMeterClient
    from openmeter_wsgi.delivery.number_ranges import Ranges
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.stats import Counts

logger: Final = log.get_logger(__name__)
#: The option that bounds it, for the log.
_BOUND = "max_queue_bytes"
_TYPICAL_EVENT = 250
#: A larger event is checked against the bounds before it is put.
_LARGE_EVENT = 16_384


class Backlog(NamedTuple):
    """The amount that waits for delivery."""

    events: int = 0
    bytes: int = 0
    #: The time of the oldest of them, in seconds since 1970, None if there is none.
    oldest_at: float | None = None


class NumberedBatch(ListedBatch):
    """Events, their size, and how many had been taken before them."""

    __slots__ = ("first", "size")

    def __init__(
        self, events: Iterable[bytes], *, first: int, size: int | None = None
    ) -> None:
        super().__init__(events)
        self.first: int = first
        self.size: int = sum(map(len, self)) if size is None else size

    def split_at(self, events: int) -> tuple[Self, Self]:
        """Return the first *events* and the others: neither is empty."""
        return (
            type(self)(self[:events], first=self.first),
            type(self)(self[events:], first=self.first + events),
        )


class MemoryQueue(Source[NumberedBatch]):
    """Encoded events of one process, waiting or being sent.

    Any thread puts; one thread takes, and says when it is done with what it took.
    `put` takes no lock: it may run in a finaliser that interrupts another `put` of
    the same thread. The bound includes what is being sent.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        counts: Counts,
        when_full: str = "queue_full",
        wake: Callable[[], object] = lambda: None,
    ) -> None:
        self._max_bytes = max_bytes
        self._counts = counts
        self._when_full = when_full
        self._events: deque[bytes] = deque()
        #: A put calls *wake* when so many events wait.
        self._wake_at = 1
        self._wake = wake
        #: While fewer events than this wait, `put` appends a small event without
        #: checking the bounds. In a list, which the taking thread replaces, so that
        #: a put that is late changes only a list that nobody reads any more.
        self._unchecked_below = [0]
        #: When the queue became full, and the number of drops before.
        self._full_since: tuple[float, int] | None = None
        self._put_bytes = 0
        # Written by the taking thread alone.
        self._taken = 0
        self._done = 0
        self._done_bytes = 0
        self._moved = threading.Condition()
        #: The number of events ever taken, and the numbers of those that are done.
        self._ever_taken = 0
        self._done_numbers: Ranges = []
        self._marks: Marks[int] = Marks()
        #: Taken, and not to be sent yet.
        self._delayed: Delayed[NumberedBatch] = Delayed()

    def put(self, event: bytes) -> bool:
        """Append *event*, and say whether there was room for it.

        Never blocks, never raises. If there is no room, the new event is dropped.
        """
        events = self._events
        size = len(event)
        if len(events) >= self._unchecked_below[0] or size > _LARGE_EVENT:
            return self._put_with_care(event, size)
        events.append(event)
        self._put_bytes += size
        return True

    def _put_with_care(self, event: bytes, size: int) -> bool:
        # Read first: if the taking thread replaces the list meanwhile, the write below
        # changes only the old list.
        unchecked_below = self._unchecked_below
        waiting = len(self._events)
        if self.size + size > self._max_bytes:
            return self._refuse()
        self._events.append(event)
        self._put_bytes += size
        if waiting + 1 >= self._wake_at:
            self._wake()
        else:
            unchecked_below[0] = self._safe_count()
        return True

    def wake_from(self, waiting: int) -> None:
        """Have a put call *wake* from so many waiting events on. One thread."""
        self._wake_at = waiting
        self._renew_unchecked_below()

    def _renew_unchecked_below(self) -> None:
        """Set the count up to which `put` checks no bounds. One thread."""
        self._unchecked_below = [self._safe_count()]

    def _safe_count(self) -> int:
        return min(
            self._wake_at - 1,
            len(self._events) + (self._max_bytes - self.size) // _LARGE_EVENT,
        )

    def _refuse(self) -> bool:
        self._counts.dropped[self._when_full] += 1
        if self._full_since is None:
            dropped = self._counts.dropped[self._when_full] - 1
            self._full_since = (time.monotonic(), dropped)
        logger.error(
            "%s: the queue is full, %d events wait in memory; new ones are lost "
            "and counted as %s until some are delivered",
            _BOUND, len(self._events) + self._taken, self._when_full,
        )  # fmt: skip
        return False

    def __len__(self) -> int:
        """Return how many events wait to be taken."""
        return len(self._events)

    @property
    def waiting(self) -> int:
        """The number of events that wait or are being sent."""
        with self._moved:
            return len(self._events) + self._taken

    @property
    def size(self) -> int:
        """The size of all events that wait or are being sent."""
        return self._put_bytes - self._done_bytes

    @property
    def has_no_room(self) -> bool:
        """True if an event of usual size would find no room."""
        return self.size + _TYPICAL_EVENT > self._max_bytes

    @property
    def is_pressed(self) -> bool:
        """True if what waits takes half of the room or more."""
        return 2 * self.size >= self._max_bytes

    @property
    def first(self) -> list[bytes]:
        """The event that is taken next, if there is one."""
        try:
            return [self._events[0]]
        except IndexError:
            return []

    def take(self, *, max_events: int, max_bytes: int) -> NumberedBatch:
        """Return the oldest events, as many as one batch may hold, at least one.

        What was delayed and is due now comes before them, as the batch that it was.
        """
        if (due := self._delayed.take_due()) is not None:
            return due
        with self._moved:
            popleft = self._events.popleft
            taken = [popleft() for _ in range(min(len(self._events), max_events))]
            size = sum(map(len, taken))
            if size > max_bytes:
                fit = max(bisect_right(list(accumulate(map(len, taken))), max_bytes), 1)
                self._events.extendleft(reversed(taken[fit:]))
                del taken[fit:]
                size = sum(map(len, taken))
            batch = NumberedBatch(taken, first=self._ever_taken, size=size)
            self._ever_taken += len(batch)
            self._taken += len(batch)
            self._renew_unchecked_below()
        return batch

    def delay(self, batch: NumberedBatch, seconds: float) -> None:
        """Hand out *batch*, which was taken, once more after so many seconds."""
        self._delayed.add(batch, seconds)

    @property
    def due_in(self) -> float | None:
        """The seconds until delayed events are due, None if there are none."""
        return self._delayed.due_in

    def done(self, batch: NumberedBatch) -> None:
        """Forget *batch*: it is delivered, or buried."""
        with self._moved:
            self._taken -= len(batch)
            self._done += len(batch)
            self._done_bytes += batch.size
            self._renew_unchecked_below()
            number_ranges.add(self._done_numbers, batch.first, batch.first + len(batch))
            self._moved.notify_all()
        if self._full_since is not None and not self.has_no_room:
            (since, dropped), self._full_since = self._full_since, None
            logger.warning(
                "%s: there is room again after %.0f s, in which %d events were lost",
                _BOUND, time.monotonic() - since,
                self._counts.dropped[self._when_full] - dropped,
                extra=log.OVER,
            )  # fmt: skip

    def delivered_until(self) -> float:
        """Return a moment (wall clock) before which all that was put is done."""
        with self._moved:
            moment = time.time()  # before the count: what comes later belongs to it
            self._marks.add(moment, self._ever_taken + len(self._events))
            done = number_ranges.first_gap(self._done_numbers)
            return self._marks.reached(lambda put: put <= done)

    def wait_until_done(self, timeout: float | None) -> bool:
        """Wait until all that waits now is done, and say whether it is."""
        with self._moved:
            target = self._done + self._taken + len(self._events)
            return self._moved.wait_for(lambda: self._done >= target, timeout)


class MemoryDelivery:
    """Takes encoded events and delivers them from a thread of its own.

    Belongs to one process: after a fork the child makes another and forgets this
    one, whose events are its parent's. The first `put` starts the thread; nothing
    runs before. At exit what waits is sent within ``shutdown_timeout``.
    """

    def __init__(
        self,
        policy: Policy,
        client: OpenMeterClient,
        counts: Counts,
        *,
        when_full: str = "queue_full",
        accepted: Callable[[Batch], object] = lambda _: None,
    ) -> None:
        self.pid: int = os.getpid()
        self.counts = counts
        self._shutdown_timeout = policy.shutdown_timeout
        self._is_begun = False
        self._exit_hook = ExitHook(self.close_at_exit)
        self._queue = MemoryQueue(
            max_bytes=policy.max_queue_bytes,
            counts=counts,
            when_full=when_full,
            wake=self.wake,
        )
        self._sender: Sender[NumberedBatch] = Sender(
            client,
            counts,
            self._queue.done,
            waiting=lambda: self._queue.waiting,
            delay=self._queue.delay,
            clock_ahead=lambda: client.clock_ahead,
            accepted=accepted,
        )
        self._worker = Worker(
            self._queue,
            self._sender,
            policy,
            exit_hook=self._exit_hook,
            idle=client.close,
        )
        #: Take an event. Any thread; never raises, never waits for delivery. It is the
        #: queue's own method, which saves a call.
        self.put: Callable[[bytes], bool] = self._queue.put

    # -- Starting and ending

    def at_exit(self, call: Callable[[], None]) -> None:
        """Have *call* made when the process ends, after the delivery was closed."""
        self._exit_hook.add(call)

    @property
    def started(self) -> bool:
        """True if all was done that the first settled request brings about."""
        return self._is_begun

    def start(self, environ: Mapping[str, Any] | None = None) -> None:
        """Do what is done with the first request. The first put starts the thread."""
        self._is_begun = True
        if environ and ends_without_hooks(environ):
            logger.error(
                "%s: this server ends its processes without exit hooks: events in "
                "their memory are lost; set spool_dir, or use another server",
                "shutdown",
            )

    def wake(self) -> None:
        """Have the worker look at the queue, starting it if it does not run."""
        self._worker.wake()

    def close(self, timeout: float | None = None) -> None:
        """Send the waiting events until *timeout*, then stop and log the rest.

        May be called twice, and after a fork in the child, where it does nothing.
        """
        if os.getpid() != self.pid:
            return
        limit = self._shutdown_timeout if timeout is None else timeout
        self._worker.finish(time.monotonic() + limit)
        # Past the deadline the thread goes on at its usual pace, if the process does.
        self._worker.go_on()
        if left := self.waiting:
            logger.error(
                "%s: %d events could not be delivered within %.1f s and are lost if "
                "this process ends now",
                "shutdown", left, limit,
            )  # fmt: skip

    def release(self) -> None:
        """Deliver what waits, and end: nobody holds this any more."""
        if os.getpid() == self.pid:
            self._worker.release()

    def close_at_exit(self) -> None:
        """Close, and deliver nothing any more: the exit hook of the process."""
        self.close()
        self._worker.end()

    @property
    def directory(self) -> None:
        """The directory of a spool: there is none."""
        return None

    @property
    def is_sender(self) -> bool:
        """True if this process sends its events itself."""
        return True

    # -- Waiting for delivery

    @property
    def waiting(self) -> int:
        """The number of events that are not delivered yet."""
        return self._queue.waiting

    @property
    def in_spool(self) -> Backlog:
        """The events in a spool: none."""
        return Backlog()

    @property
    def in_memory(self) -> Backlog:
        """The events that are lost if this process dies: all."""
        oldest = [*self._sender.oldest, *self._queue.first]
        moments = [at for event in oldest if (at := moment_of(event)) is not None]
        return Backlog(
            self._queue.waiting, self._queue.size, min(moments, default=None)
        )

    @property
    def problems(self) -> list[Problem]:
        """The problems of the delivery now."""
        found = []
        if (problem := self._sender.outage.problem) is not None:
            found.append(problem)
        if self._queue.has_no_room:
            found.append(
                Problem(
                    "queue_full",
                    f"{self.waiting} events wait in memory and no more find room: "
                    "new ones are dropped until some are delivered",
                    loses=True,
                )
            )
        if not self._worker.is_running and self.waiting:
            found.append(
                Problem(
                    "not_delivering",
                    f"{self.waiting} events wait in memory and no thread delivers "
                    "them: flush() or close() does",
                )
            )
        return found

    def delivered_until(self) -> float:
        """Return a moment (wall clock) before which all that was put is delivered.

        It moves on only when it is asked for, best about twice a second.
        """
        return self._queue.delivered_until()

    def flush(self, timeout: float | None = None) -> bool:
        """Send the waiting events; return True if all are done within *timeout*."""
        if not self.waiting:
            return True
        self._worker.hurry()
        if not self._worker.is_running:
            limit = self._shutdown_timeout if timeout is None else timeout
            self._worker.deliver_here(limit)
        return self._queue.wait_until_done(timeout if self._worker.is_running else 0)
