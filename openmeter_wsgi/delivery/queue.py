"""Delivery from memory: a bounded queue and the parts that deliver its events.

Request threads put events into a `MemoryQueue` without a lock. The worker's thread
takes batches out of it and the sender delivers them. An event counts against the bound
until it is *done*: delivered, or a dead letter. `MemoryDelivery` joins these parts.
"""

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
#: The option that bounds the queue, for the log.
_OPTION = "max_queue_bytes"
#: Bytes of a typical event.
_TYPICAL_EVENT = 250
#: Maximum number of bytes of an event that is put without a check of the bounds.
_LARGE_EVENT = 16_384


class Backlog(NamedTuple):
    """The number, size and age of the events that wait for delivery."""

    events: int = 0
    bytes: int = 0
    #: The time of the oldest event, in seconds since 1970, None without events.
    oldest_at: float | None = None


class NumberedBatch(ListedBatch):
    """A batch with its size and the number of events taken before its first one."""

    __slots__ = ("first", "size")

    def __init__(
        self, events: Iterable[bytes], *, first: int, size: int | None = None
    ) -> None:
        super().__init__(events)
        self.first: int = first
        self.size: int = sum(map(len, self)) if size is None else size

    def split_at(self, events: int) -> tuple[Self, Self]:
        """Return the first *events* and the other events; neither part is empty."""
        return (
            type(self)(self[:events], first=self.first),
            type(self)(self[events:], first=self.first + events),
        )


class MemoryQueue(Source[NumberedBatch]):
    """The encoded events of one process that wait or are being sent.

    Any thread puts. One thread takes batches, and reports each batch as done. `put`
    takes no lock: it may run in a finaliser that interrupts another `put` of the same
    thread. The bound includes the events that are being sent.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        counts: Counts,
        drop_reason: str = "queue_full",
        wake: Callable[[], object] = lambda: None,
    ) -> None:
        self._max_bytes = max_bytes
        self._counts = counts
        self._drop_reason = drop_reason
        self._events: deque[bytes] = deque()
        #: The number of waiting events at which `put` calls *wake*.
        self._wake_at = 1
        self._wake = wake
        #: While fewer events than this wait, `put` appends a small event without
        #: checking the bounds. The number is in a list, which the taking thread
        #: replaces: a late `put` then changes only a list that is no longer used.
        self._unchecked_below = [0]
        #: The time at which the queue became full, and the number of drops before it.
        self._full_since: tuple[float, int] | None = None
        self._put_bytes = 0
        # Only the taking thread writes these: events taken and not done, events done.
        self._taken = 0
        self._done = 0
        self._done_bytes = 0
        self._changed = threading.Condition()
        #: Number of events taken so far. It numbers the events.
        self._total_taken = 0
        #: The numbers of the events that are done.
        self._done_numbers: Ranges = []
        self._marks: Marks[int] = Marks()
        #: Batches that were taken and must not be sent yet.
        self._delayed: Delayed[NumberedBatch] = Delayed()

    def put(self, event: bytes) -> bool:
        """Append *event* and return True, or drop it and return False without room.

        Never blocks, never raises.
        """
        events = self._events
        size = len(event)
        if len(events) >= self._unchecked_below[0] or size > _LARGE_EVENT:
            return self._put_checked(event, size)
        events.append(event)
        self._put_bytes += size
        return True

    def _put_checked(self, event: bytes, size: int) -> bool:
        """Append *event* if there is room, and wake the worker if it is due."""
        # Read before the events are counted: if the taking thread replaces the list
        # meanwhile, the write below changes only the old list.
        unchecked_below = self._unchecked_below
        waiting = len(self._events)
        if self.size + size > self._max_bytes:
            return self._drop()
        self._events.append(event)
        self._put_bytes += size
        if waiting + 1 >= self._wake_at:
            self._wake()
        else:
            unchecked_below[0] = self._unchecked_limit()
        return True

    def set_wake_threshold(self, waiting: int) -> None:
        """Set the number of *waiting* events at which `put` wakes. One thread."""
        self._wake_at = waiting
        self._update_unchecked_below()

    def _update_unchecked_below(self) -> None:
        self._unchecked_below = [self._unchecked_limit()]

    def _unchecked_limit(self) -> int:
        """Return the number of waiting events below which `put` needs no checks."""
        return min(
            self._wake_at - 1,
            len(self._events) + (self._max_bytes - self.size) // _LARGE_EVENT,
        )

    def _drop(self) -> bool:
        self._counts.dropped[self._drop_reason] += 1
        if self._full_since is None:
            dropped = self._counts.dropped[self._drop_reason] - 1
            self._full_since = (time.monotonic(), dropped)
        logger.error(
            "%s: the queue is full, %d events wait in memory; new events are lost and "
            "counted as %s until some are delivered",
            _OPTION, len(self._events) + self._taken, self._drop_reason,
        )  # fmt: skip
        return False

    def __len__(self) -> int:
        """Return the number of events that wait to be taken."""
        return len(self._events)

    @property
    def waiting(self) -> int:
        """The number of events that wait or are being sent."""
        with self._changed:
            return len(self._events) + self._taken

    @property
    def size(self) -> int:
        """The bytes of all events that wait or are being sent."""
        return self._put_bytes - self._done_bytes

    @property
    def has_no_room(self) -> bool:
        """True if there is no room for a typical event."""
        return self.size + _TYPICAL_EVENT > self._max_bytes

    @property
    def is_half_full(self) -> bool:
        """True if the events take half of the allowed bytes or more."""
        return 2 * self.size >= self._max_bytes

    @property
    def next_event(self) -> list[bytes]:
        """The event that is taken next, or an empty list."""
        try:
            return [self._events[0]]
        except IndexError:
            return []

    def take(self, *, max_events: int, max_bytes: int) -> NumberedBatch:
        """Remove and return the oldest events, at most those of one batch.

        A single event may exceed *max_bytes*. A delayed batch that is due comes first,
        unchanged.
        """
        if (due := self._delayed.take_due()) is not None:
            return due
        with self._changed:
            popleft = self._events.popleft
            taken = [popleft() for _ in range(min(len(self._events), max_events))]
            size = sum(map(len, taken))
            if size > max_bytes:
                fit = max(bisect_right(list(accumulate(map(len, taken))), max_bytes), 1)
                self._events.extendleft(reversed(taken[fit:]))
                del taken[fit:]
                size = sum(map(len, taken))
            batch = NumberedBatch(taken, first=self._total_taken, size=size)
            self._total_taken += len(batch)
            self._taken += len(batch)
            self._update_unchecked_below()
        return batch

    def delay(self, batch: NumberedBatch, seconds: float) -> None:
        """Make `take` return *batch*, which was taken, again after some *seconds*."""
        self._delayed.add(batch, seconds)

    @property
    def due_in(self) -> float | None:
        """The seconds until delayed events are due, None without delayed events."""
        return self._delayed.due_in

    def done(self, batch: NumberedBatch) -> None:
        """Forget *batch*: its events are delivered, or dead letters."""
        with self._changed:
            self._taken -= len(batch)
            self._done += len(batch)
            self._done_bytes += batch.size
            self._update_unchecked_below()
            number_ranges.add(self._done_numbers, batch.first, batch.first + len(batch))
            self._changed.notify_all()
        if self._full_since is not None and not self.has_no_room:
            (since, dropped), self._full_since = self._full_since, None
            logger.warning(
                "%s: there is room again after %.0f s, in which %d events were lost",
                _OPTION, time.monotonic() - since,
                self._counts.dropped[self._drop_reason] - dropped,
                extra=log.OVER,
            )  # fmt: skip

    def delivered_until(self) -> float:
        """Return a time (wall clock) before which each put event is done."""
        with self._changed:
            moment = time.time()  # before the count, which includes all earlier events
            self._marks.add(moment, self._total_taken + len(self._events))
            done = number_ranges.first_gap(self._done_numbers)
            return self._marks.reached(lambda amount: amount <= done)

    def wait_until_done(self, timeout: float | None) -> bool:
        """Wait for the events that wait now; return True if all of them are done."""
        with self._changed:
            target = self._done + self._taken + len(self._events)
            return self._changed.wait_for(lambda: self._done >= target, timeout)


class MemoryDelivery:
    """The queue of one process with its worker, sender and exit hook.

    After a fork the child makes a delivery of its own and forgets this one: the events
    in it belong to the parent. The first `put` starts the thread. At exit the waiting
    events are sent within ``shutdown_timeout``.
    """

    def __init__(
        self,
        policy: Policy,
        client: OpenMeterClient,
        counts: Counts,
        *,
        drop_reason: str = "queue_full",
        accepted: Callable[[Batch], object] = lambda _: None,
    ) -> None:
        self.pid: int = os.getpid()
        self.counts = counts
        self._shutdown_timeout = policy.shutdown_timeout
        self._is_started = False
        self._exit_hook = ExitHook(self.close_at_exit)
        self._queue = MemoryQueue(
            max_bytes=policy.max_queue_bytes,
            counts=counts,
            drop_reason=drop_reason,
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
        #: Take an event. Any thread; never raises, never waits for delivery. The method
        #: of the queue itself saves one call per event.
        self.put: Callable[[bytes], bool] = self._queue.put

    # -- Starting and ending

    def at_exit(self, call: Callable[[], None]) -> None:
        """Call *call* at the end of the process, after the delivery was closed."""
        self._exit_hook.add(call)

    @property
    def started(self) -> bool:
        """True once `start` was called."""
        return self._is_started

    def start(self, environ: Mapping[str, Any] | None = None) -> None:
        """Warn about a server without exit hooks. The first put starts the thread."""
        self._is_started = True
        if environ and ends_without_hooks(environ):
            logger.error(
                "%s: this server ends its processes without exit hooks: events in "
                "their memory are lost; set spool_dir, or use another server",
                "shutdown",
            )

    def wake(self) -> None:
        """Make the worker look at the queue; start its thread if it does not run."""
        self._worker.wake()

    def close(self, timeout: float | None = None) -> None:
        """Send the waiting events within *timeout*, stop, and log the remaining events.

        May be called twice. In the child of a fork it does nothing.
        """
        if os.getpid() != self.pid:
            return
        limit = self._shutdown_timeout if timeout is None else timeout
        self._worker.finish(time.monotonic() + limit)
        # If the process goes on, so does a thread that missed the deadline.
        self._worker.reopen()
        if left := self.waiting:
            logger.error(
                "%s: %d events could not be delivered within %.1f s and are lost if "
                "this process ends now",
                "shutdown", left, limit,
            )  # fmt: skip

    def release(self) -> None:
        """Deliver the waiting events, and end: the delivery is no longer used."""
        if os.getpid() == self.pid:
            self._worker.end_when_empty()

    def close_at_exit(self) -> None:
        """Close for good. The exit hook of the process calls this."""
        self.close()
        self._worker.forbid_start()

    @property
    def directory(self) -> None:
        """The directory of the spool: None without a spool."""
        return None

    @property
    def is_sender(self) -> bool:
        """True: without a spool each process sends its own events."""
        return True

    # -- Waiting for delivery

    @property
    def waiting(self) -> int:
        """The number of events that are not delivered yet."""
        return self._queue.waiting

    @property
    def in_spool(self) -> Backlog:
        """The events in the spool: none without a spool."""
        return Backlog()

    @property
    def in_memory(self) -> Backlog:
        """The events that are lost if this process dies: all waiting events."""
        oldest = [*self._sender.first_events, *self._queue.next_event]
        moments = [at for event in oldest if (at := moment_of(event)) is not None]
        return Backlog(
            self._queue.waiting, self._queue.size, min(moments, default=None)
        )

    @property
    def problems(self) -> list[Problem]:
        """The current problems of the delivery."""
        problems = []
        if (problem := self._sender.outage.problem) is not None:
            problems.append(problem)
        if self._queue.has_no_room:
            problems.append(
                Problem(
                    "queue_full",
                    f"{self.waiting} events wait in memory and the queue is full: new "
                    "events are dropped until some are delivered",
                    loses=True,
                )
            )
        if not self._worker.is_running and self.waiting:
            problems.append(
                Problem(
                    "not_delivering",
                    f"{self.waiting} events wait in memory and no thread delivers "
                    "them: flush() or close() does",
                )
            )
        return problems

    def delivered_until(self) -> float:
        """Return a time (wall clock) before which each put event is done.

        Each call makes a mark, so call it regularly, best about twice a second.
        """
        return self._queue.delivered_until()

    def flush(self, timeout: float | None = None) -> bool:
        """Send the waiting events; return True if all are done within *timeout*."""
        if not self.waiting:
            return True
        self._worker.hurry()
        if not self._worker.is_running:
            limit = self._shutdown_timeout if timeout is None else timeout
            self._worker.deliver_in_this_thread(limit)
        return self._queue.wait_until_done(timeout if self._worker.is_running else 0)
