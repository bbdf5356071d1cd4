"""Delivery from memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmeter_wsgi import log
from openmeter_wsgi.delivery.background import BackgroundDelivery
from openmeter_wsgi.delivery.memory import MemoryQueue
from openmeter_wsgi.delivery.sender import Sender

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
    #: The first put does it; there is nothing to be done before.
    started = True

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
        self._sender = Sender(client, counts, self._events.done)

    def start(self) -> None:
        """Start the thread."""
        self._start()

    def put(self, event: bytes) -> None:
        """Take *event*. Any thread; never raises, never waits for delivery."""
        waiting = self._events.put(event)
        if waiting >= self._wake_at:
            self._rouse()
        elif not waiting:
            logger.error(
                "%s: the queue is full, the newest events are dropped and counted",
                "max_queue_events or max_queue_bytes",
            )

    @property
    def waiting_in_memory(self) -> int:
        """How many events are not delivered yet."""
        return self._events.waiting

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
