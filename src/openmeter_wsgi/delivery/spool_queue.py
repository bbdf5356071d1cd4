"""Delivery from a spool: what is settled survives the process."""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from pathlib import Path
from time import monotonic as now
from typing import TYPE_CHECKING

from openmeter_wsgi import log
from openmeter_wsgi.delivery import watching, watermark
from openmeter_wsgi.delivery.intake import Intake
from openmeter_wsgi.delivery.keeper import FLUSH
from openmeter_wsgi.delivery.queue import DeliveryQueue
from openmeter_wsgi.delivery.segment import SEGMENT_BYTES
from openmeter_wsgi.delivery.spool_sender import SpoolSender
from openmeter_wsgi.delivery.starvation import threads_starve
from openmeter_wsgi.delivery.watching import Backlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.client import OpenMeterClient
    from openmeter_wsgi.health import Problem
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.stats import Counts

logger = log.get_logger(__name__)

_JOIN_INTERVAL = 0.02


class SpoolQueue(SpoolSender):
    """Takes encoded events into a journal and delivers what the directory holds.

    Belongs to one process. Where the disk takes nothing, events go the way they would
    go without a spool, from memory, and are counted.
    """

    def __init__(
        self,
        policy: Policy,
        new_client: Callable[[], OpenMeterClient],
        counts: Counts,
        *,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._new_client = new_client
        self._intake = Intake(
            Path(os.path.abspath(policy.spool_dir or "")),
            policy,
            counts,
            new_fallback=self._new_fallback,
            moved_on=self._moved_on,
            segment_bytes=segment_bytes,
        )
        super().__init__(policy, new_client(), counts, prepare=self._intake.prepare)
        #: Past its layer: a put is one call less.
        self.put = self._intake.put

    def start(self) -> None:
        """Start the threads, if this process has any: see to what others left."""
        self._beginning.make()
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
    def in_spool(self) -> Backlog:
        """What of the directory is not delivered, by any process.

        An estimate where it is more than some ten thousand.
        """
        return watching.backlog(self._directory)

    @property
    def in_memory(self) -> Backlog:
        """What waits here because the disk did not take it."""
        fallback = self._intake.fallback
        return fallback.in_memory if fallback else Backlog()

    @property
    def problems(self) -> list[Problem]:
        """What is wrong now, as far as this process knows."""
        found = []
        if self._elected and (problem := self._trouble.problem) is not None:
            found.append(problem)
        if (problem := self._intake.problem) is not None:
            found.append(problem)
        fallback = self._intake.fallback
        return found + fallback.problems if fallback else found

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
        owner = self._intake.owner
        self._intake.close()
        self._closing = True
        self._hurry()
        thread = self._thread
        if thread is not None:
            # A process that waits for another one to die has nothing to deliver.
            while thread.is_alive() and not self._is_waiting and now() < deadline:
                thread.join(_JOIN_INTERVAL)
        elif owner is not None and self._policy.delivery != "ship":
            self._deliver_own(owner, deadline)
        self._stopping = True
        self._wake.set()
        self._keeper.stop()
        self.started = self._policy.delivery == "ship"
        self._say_what_stays(
            unfinished=thread is not None and thread.is_alive() and not self._is_waiting
        )
        if fallback := self._intake.fallback:
            fallback.close(max(deadline - now(), 0))

    def _say_what_stays(self, *, unfinished: bool) -> None:
        """Say it where nobody may be there to deliver it, or could."""
        in_trouble = unfinished or self._trouble.problem is not None
        if in_trouble and (left := self.in_spool.events):
            logger.warning(
                "%s: %d events stay in %s and are delivered as soon as a process that "
                "uses it runs and OpenMeter takes them",
                "shutdown", left, self._directory,
            )  # fmt: skip

    def _deliver_own(self, owner: str, deadline: float) -> None:
        """Deliver what this process has put, or see another process do it."""
        ends = watching.ends(self._directory, owner)
        while not watching.all_done(self._directory, ends):
            if (left := deadline - now()) <= 0:
                break
            self._deliver_here(left)
            time.sleep(_JOIN_INTERVAL)

    # -- Threads

    def _start(self) -> None:
        self._closing = self._stopping = False
        if self._policy.delivery == "ship":
            self.started = True
            return
        if threads_starve():
            self._do_without_threads()
            return
        super()._start()
        if self._thread is not None:
            self._keeper.start()
        self.started = self._thread is not None

    def _do_without_threads(self) -> None:
        """Deliver in flush() and close() only: the election is for who can do it."""
        self.started = True
        if not self._at_exit:
            self._at_exit = True
            atexit.register(self.close_at_exit)
            logger.warning(
                "%s: uWSGI leaves threads no time, so this process delivers what is in "
                "%s only at its exit: set enable-threads, or run 'openmeter-wsgi ship'",
                "delivery", self._directory,
            )  # fmt: skip
