"""Delivery from memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmeter_wsgi.delivery.background import BackgroundDelivery
from openmeter_wsgi.delivery.memory import MemoryQueue, NumberedBatch
from openmeter_wsgi.delivery.sender import Sender
from openmeter_wsgi.delivery.watching import Backlog
from openmeter_wsgi.health import Problem
from openmeter_wsgi.timestamps import moment_of

if TYPE_CHECKING:
    from openmeter_wsgi.client import OpenMeterClient
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.stats import Counts


class DeliveryQueue(BackgroundDelivery):
    """Takes encoded events and delivers them from a thread of its own.

    Belongs to one process: after a fork the child makes another and forgets this
    one, whose events are its parent's. The first `put` starts the thread; nothing
    runs before. At exit what waits is sent within ``shutdown_timeout``.
    """

    _events: MemoryQueue
    _sender: Sender[NumberedBatch]

    def __init__(
        self,
        policy: Policy,
        client: OpenMeterClient,
        counts: Counts,
        *,
        when_full: str = "queue_full",
    ) -> None:
        self._events = MemoryQueue(
            max_events=policy.max_queue_events,
            max_bytes=policy.max_queue_bytes,
            counts=counts,
            when_full=when_full,
            rouse=self._rouse,
        )
        super().__init__(policy, client)
        self.counts = counts
        #: Take an event. Any thread; never raises, never waits for delivery. Past
        #: this layer: a put is one call less.
        self.put = self._events.put
        self._sender = Sender(
            client,
            counts,
            self._events.done,
            waiting=lambda: self._events.waiting,
            delay=self._events.delay,
            clock_ahead=lambda: client.clock_ahead,
        )

    def start(self) -> None:
        """Do what is done with the first request. The first put starts the thread."""
        self.started = True
        self._beginning.make()

    def _wake_from(self, waiting: int) -> None:
        self._events.wake_from(waiting)

    @property
    def _is_pressed(self) -> bool:
        return self._events.is_half_full

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
