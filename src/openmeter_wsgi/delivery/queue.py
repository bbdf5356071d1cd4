"""Delivery from memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from openmeter_wsgi import log
from openmeter_wsgi.delivery.background import BackgroundDelivery
from openmeter_wsgi.delivery.memory import MemoryQueue
from openmeter_wsgi.delivery.sender import Sender
from openmeter_wsgi.delivery.watching import Backlog
from openmeter_wsgi.health import Problem
from openmeter_wsgi.timestamps import moment_of

if TYPE_CHECKING:
    from openmeter_wsgi.client import OpenMeterClient
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.stats import Counts

logger = log.get_logger(__name__)


class DeliveryQueue(BackgroundDelivery):
    """Takes encoded events and delivers them from a thread of its own.

    Belongs to one process: after a fork the child makes another and forgets this
    one, whose events are its parent's. The first `put` starts the thread; nothing
    runs before. At exit what waits is sent within ``shutdown_timeout``.
    """

    _events: MemoryQueue

    def __init__(
        self,
        policy: Policy,
        client: OpenMeterClient,
        counts: Counts,
        *,
        when_full: str = "queue_full",
    ) -> None:
        super().__init__(policy, client)
        self.counts = counts
        self._events = MemoryQueue(
            max_events=policy.max_queue_events,
            max_bytes=policy.max_queue_bytes,
            counts=counts,
            when_full=when_full,
        )
        self._sender = Sender(
            client, counts, self._done, waiting=lambda: self._events.waiting
        )
        self._when_full = when_full
        #: Since when events are dropped, and how many had been before.
        self._full: tuple[float, int] | None = None

    def start(self) -> None:
        """Start the thread."""
        self.started = True
        self._beginning.make()
        self._start()

    def put(self, event: bytes) -> None:
        """Take *event*. Any thread; never raises, never waits for delivery."""
        waiting = self._events.put(event)
        if waiting >= self._wake_at:
            self._rouse()
        elif not waiting:
            if self._full is None:
                dropped = self.counts.dropped[self._when_full] - 1
                self._full = (time.monotonic(), dropped)
            logger.error(
                "%s: the queue is full, %d events wait in memory; new ones are lost "
                "and counted as %s until some are delivered",
                "max_queue_events or max_queue_bytes", self.waiting, self._when_full,
            )  # fmt: skip

    def _done(self, events: list[bytes]) -> None:
        self._events.done(events)
        full = self._full
        if full is not None and not self._events.is_full:
            self._full = None
            since, dropped = full
            logger.warning(
                "%s: there is room again after %.0f s, in which %d events were lost",
                "max_queue_events or max_queue_bytes",
                time.monotonic() - since,
                self.counts.dropped[self._when_full] - dropped,
            )

    @property
    def waiting(self) -> int:
        """How many events are not delivered yet."""
        return self._events.waiting

    @property
    def in_memory(self) -> Backlog:
        """What is not delivered yet."""
        oldest = [*self._sender.oldest, *self._events.first]
        moments = [at for event in oldest if (at := moment_of(event)) is not None]
        return Backlog(
            self._events.waiting, self._events.size, min(moments, default=None)
        )

    @property
    def problems(self) -> list[Problem]:
        """What is wrong with the delivery now."""
        found = []
        if (problem := self._sender.trouble.problem) is not None:
            found.append(problem)
        if self._events.is_full:
            found.append(
                Problem(
                    "queue_full",
                    f"{self.waiting} events wait in memory and no more find room: "
                    "new ones are dropped until some are delivered",
                    loses=True,
                )
            )
        if self._thread is None and self.waiting:
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
        return self._events.delivered_until()

    def flush(self, timeout: float | None = None) -> bool:
        """Send what waits now, and say whether all of it is done within *timeout*."""
        if not self.waiting:
            return True
        self._hurry()
        if self._thread is None:
            self._deliver_here(timeout)
        return self._events.wait_until_done(timeout if self._thread else 0)
