"""Being the one of all processes that delivers a spool."""

from __future__ import annotations

import atexit
import os
from pathlib import Path
from time import monotonic as now
from typing import TYPE_CHECKING

from openmeter_wsgi import log
from openmeter_wsgi.delivery import deduplication
from openmeter_wsgi.delivery.background import BackgroundDelivery
from openmeter_wsgi.delivery.dead_letters import DeadLetters
from openmeter_wsgi.delivery.doubt import RecordingClient
from openmeter_wsgi.delivery.keeper import Keeper
from openmeter_wsgi.delivery.pace import Pace
from openmeter_wsgi.delivery.segment import SEGMENT_BYTES
from openmeter_wsgi.delivery.sender import FIRST_DELAY, MAX_DELAY, Sender
from openmeter_wsgi.delivery.spool import Spool
from openmeter_wsgi.delivery.trouble import Trouble
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


class SpoolSender(BackgroundDelivery):
    """Delivers what a directory holds, when it is this process's turn.

    Of all that share the directory one delivers; the thread of every other sleeps
    until it takes over.
    """

    #: There as long as this process is the sender.
    _spool: Spool

    def __init__(
        self,
        policy: Policy,
        client: OpenMeterClient,
        counts: Counts,
        *,
        prepare: Callable[[], None],
    ) -> None:
        super().__init__(policy, client)
        self.counts = counts
        self.started = policy.delivery == "ship"
        self._policy = policy
        self._directory = Path(os.path.abspath(policy.spool_dir or ""))
        self._poll = max(min(policy.flush_interval, _MAX_POLL), _MIN_POLL)
        # What comes is only seen when it is looked for, and then best all of it.
        self._spacing = min(self._poll, policy.flush_interval)
        self._keeper = Keeper(
            self._directory,
            prepare=prepare,
            hurry=self._hurry,
            interval=self._poll,
        )
        self._elected = False
        #: That of this process's last turn.
        self._trouble = Trouble()
        #: Whether it was said what is known of the server's deduplication.
        self._said = False
        #: Whether the thread sleeps until another process ends.
        self._is_waiting = False
        self._stopping = False

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
            logger.error(
                "%s: no election for a sender is possible; what is in the spool waits, "
                "next try in %.0f s",
                error, MAX_DELAY,
            )  # fmt: skip
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
        if deadline is None and not self._said:
            self._said = True
            deduplication.say(self._directory, self._policy.api_url)
        letters = DeadLetters(self._directory, self.counts)
        spool = Spool(self._directory, letters, max_events=self._max_batch)
        client = RecordingClient(
            self._client, spool, resend_window=self._policy.resend_window
        )
        self._sender = Sender(
            client,
            self.counts,
            spool.done,
            bury=letters.bury,
            waiting=lambda: self.waiting,
            delay=spool.delay,
            clock_ahead=lambda: self._client.clock_ahead,
        )
        self._trouble = self._sender.trouble
        self._spool = self._events = spool
        self._pace = Pace()
        self._elected = self._keeper.elected = True
        try:
            while not self._finished():
                if deadline is not None and now() > deadline:
                    break
                self._step()
        finally:
            self._elected = self._keeper.elected = False
            del self._spool, self._events, self._sender
            spool.close()
            self._client.close()

    @property
    def _is_pressed(self) -> bool:
        return 2 * self._spool.segments * SEGMENT_BYTES >= self._policy.max_spool_bytes

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
            logger.error(
                "%s: nothing can be delivered now; it stays in the spool", error
            )
        finally:
            self._closing = closing
