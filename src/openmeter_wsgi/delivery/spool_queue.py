"""Delivery from a spool: what is settled survives the process."""

from __future__ import annotations

import atexit
import contextlib
import os
from pathlib import Path
from time import monotonic as now
from typing import TYPE_CHECKING

from openmeter_wsgi import log
from openmeter_wsgi.delivery import watching, watermark
from openmeter_wsgi.delivery.background import BackgroundDelivery
from openmeter_wsgi.delivery.dead_letters import DeadLetters
from openmeter_wsgi.delivery.doubt import RecordingClient
from openmeter_wsgi.delivery.intake import Intake
from openmeter_wsgi.delivery.keeper import FLUSH, Keeper
from openmeter_wsgi.delivery.queue import DeliveryQueue
from openmeter_wsgi.delivery.segment import SEGMENT_BYTES
from openmeter_wsgi.delivery.sender import FIRST_DELAY, MAX_DELAY, Sender
from openmeter_wsgi.delivery.spool import Spool
from openmeter_wsgi.ownership import elected

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.client import OpenMeterClient
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.stats import Counts

logger = log.get_logger(__name__)

#: The sender looks at least this often for what others put.
_MAX_POLL = 1.0
_MIN_POLL = 0.02
_JOIN_INTERVAL = 0.02


class SpoolQueue(BackgroundDelivery):
    """Takes encoded events into a journal and delivers what the directory holds.

    Belongs to one process. Of all that share the directory one delivers; the thread
    of every other sleeps until it takes over. Where the disk takes nothing, events
    go the way they would go without a spool, from memory, and are counted.
    """

    #: There as long as this process is the sender.
    _spool: Spool

    def __init__(
        self,
        policy: Policy,
        new_client: Callable[[], OpenMeterClient],
        counts: Counts,
        *,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        super().__init__(policy, new_client())
        self.counts = counts
        self.started = policy.delivery == "ship"
        self._policy = policy
        self._new_client = new_client
        self._directory = Path(os.path.abspath(policy.spool_dir or ""))
        self._poll = max(min(policy.flush_interval, _MAX_POLL), _MIN_POLL)
        self._intake = Intake(
            self._directory,
            policy,
            counts,
            new_fallback=self._new_fallback,
            moved_on=self._moved_on,
            segment_bytes=segment_bytes,
        )
        #: Past its layer: a put is one call less.
        self.put = self._intake.put
        self._keeper = Keeper(
            self._directory,
            prepare=self._intake.prepare,
            hurry=self._hurry,
            interval=self._poll,
        )
        self._elected = False
        #: Whether the thread sleeps until another process ends.
        self._is_waiting = False
        self._stopping = False

    def start(self) -> None:
        """Start the threads, if this process has any: see to what others left."""
        self._start()

    def _new_fallback(self, when_full: str) -> DeliveryQueue:
        return DeliveryQueue(
            self._policy, self._new_client(), self.counts, when_full=when_full
        )

    def _moved_on(self) -> None:
        """Have the next segment prepared, by a thread that may have to be started."""
        if not self.started:
            self._start()
        self._keeper.wake()

    # -- Waiting for delivery

    @property
    def waiting(self) -> int:
        """How many events of the directory are not delivered, by any process.

        An estimate where it is more than some ten thousand.
        """
        fallback = self._intake.fallback
        return watching.waiting(self._directory) + (fallback.waiting if fallback else 0)

    def delivered_until(self) -> float:
        """Return a moment (wall clock) before which all that was put is delivered.

        By any process; 0.0 if none is known. What waits in the memory of another
        process, because the disk takes nothing, is not seen.
        """
        until = watermark.read(self._directory)
        fallback = self._intake.fallback
        return min(until, fallback.delivered_until()) if fallback else until

    def flush(self, timeout: float | None = None) -> bool:
        """Have delivered what waits now, and say whether it is within *timeout*.

        In the sender's process that is all the directory holds, elsewhere what this
        process has put. Another process is asked for it and needs a moment.
        """
        deadline = None if timeout is None else now() + timeout
        owner = None if self._elected else self._intake.owner
        ends = watching.ends(self._directory, owner)
        self._hurry()
        self._ask_for_delivery()
        if not self.started:
            self._start()
        if self._thread is None and self._policy.delivery != "ship":
            self._deliver_here(timeout)
        if not watching.wait_until_done(self._directory, ends, timeout):
            return False
        fallback = self._intake.fallback
        return not fallback or fallback.flush(deadline and max(deadline - now(), 0))

    def _ask_for_delivery(self) -> None:
        if not self._elected:  # another one polls for this
            with contextlib.suppress(OSError):
                (self._directory / FLUSH).touch(mode=0o600)

    def close(self, timeout: float | None = None) -> None:
        """Give up what this process owns; the sender delivers first until *timeout*.

        May be called twice, and after a fork in the child, where it does nothing.
        """
        if os.getpid() != self.pid:
            return
        limit = self._shutdown_timeout if timeout is None else timeout
        deadline = now() + limit
        has_put = self._intake.close()
        self._closing = True
        self._hurry()
        thread = self._thread
        if thread is not None:
            # A process that waits for another one to die has nothing to deliver.
            while thread.is_alive() and not self._is_waiting and now() < deadline:
                thread.join(_JOIN_INTERVAL)
        elif has_put and self._policy.delivery != "ship":
            self._deliver_here(limit)
        self._stopping = True
        self._wake.set()
        self._keeper.stop()
        self.started = self._policy.delivery == "ship"
        if fallback := self._intake.fallback:
            fallback.close(max(deadline - now(), 0))

    # -- The sender's thread

    def _start(self) -> None:
        self._closing = self._stopping = False
        if self._policy.delivery != "ship":
            super()._start()
            if self._thread is not None:
                self._keeper.start()
            self.started = self._thread is not None

    def _run(self) -> None:
        """Be elected, deliver until closed. The thread's body."""
        try:
            while self._take_turn():
                pass
        finally:
            self.started = self._at_exit = False
            atexit.unregister(self.close_at_exit)
            self._thread = None

    def _take_turn(self) -> bool:
        """Deliver when it is this process's turn; say whether to go on after it."""
        try:
            with elected(self._directory, wait=False) as won:
                if won:
                    self._deliver()
            if not won:
                self._wait_for_turn()
        except OSError as error:
            logger.error("%s: no election for a sender is possible", error)
            self._pause(MAX_DELAY)
        except Exception:
            logger.exception("%s: broke off and begins anew", "delivery")
            self._pause(FIRST_DELAY)
        return not self._closing

    def _wait_for_turn(self) -> None:
        self._is_waiting = True
        try:
            with elected(self._directory):
                self._is_waiting = False
                if not self._closing:
                    self._deliver()
        finally:
            self._is_waiting = False

    def _deliver(self, deadline: float | None = None) -> None:
        """Be the sender. Everything known of the spool is read anew."""
        letters = DeadLetters(self._directory, self.counts)
        spool = Spool(self._directory, letters, max_events=self._max_batch)
        client = RecordingClient(
            self._client, spool, resend_window=self._policy.resend_window
        )
        self._sender = Sender(client, self.counts, spool.done, bury=letters.bury)
        self._spool = self._events = spool
        self._elected = self._keeper.elected = True
        try:
            while not self._finished():
                if deadline is not None and now() > deadline:
                    break
                self._step()
        finally:
            self._elected = self._keeper.elected = False
            del self._spool, self._events, self._sender
            self._client.close()

    def _finished(self) -> bool:
        if self._stopping or not self._closing:
            return self._stopping
        self._spool.refresh(last=True)
        return super()._finished()

    def _ready(self, events: int) -> bool:
        self._spool.refresh(last=self._closing)
        return super()._ready(events) or self._spool.is_full

    def _deliver_here(self, timeout: float | None) -> None:
        """Deliver in the calling thread, where no other can be had."""
        limit = self._shutdown_timeout if timeout is None else timeout
        closing, self._closing = self._closing, True
        try:
            with elected(self._directory, wait=False) as won:
                if won:
                    self._deliver(now() + limit)
        except OSError as error:
            logger.error("%s: nothing can be delivered now", error)
        finally:
            self._closing = closing
