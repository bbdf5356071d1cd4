"""Delivery from a spool: what is settled survives the process.

A process has three parts: the maintenance of its segments, always; the overflow, a
delivery from memory, made when the disk first refuses an event; and the worker that
sends what the directory holds, while this process is elected.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from time import monotonic as now
from typing import TYPE_CHECKING

from openmeter_wsgi import log
from openmeter_wsgi.delivery.queue import Backlog, MemoryDelivery
from openmeter_wsgi.delivery.sender import Sender
from openmeter_wsgi.delivery.worker import BACKLOG_BATCH, FirstRequestHooks, Worker
from openmeter_wsgi.spool import watermark
from openmeter_wsgi.spool.files import SEGMENT_BYTES
from openmeter_wsgi.spool.maintenance import FLUSH, SegmentMaintenance
from openmeter_wsgi.spool.progress import RecordingClient
from openmeter_wsgi.spool.sender import SpoolSource
from openmeter_wsgi.spool.writer import SpoolWriter
from openmeter_wsgi.threads import ExitHook, threads_starve

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.delivery.client import OpenMeterClient
    from openmeter_wsgi.health import Problem
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.stats import Counts

logger = log.get_logger(__name__)

_JOIN_INTERVAL = 0.02


class SpoolDelivery:
    """Takes encoded events into a journal and delivers what the directory holds.

    Belongs to one process. Where the disk takes nothing, events go the way they would
    go without a spool, from memory, and are counted. *elected* is called whenever this
    process becomes the sender.
    """

    def __init__(
        self,
        policy: Policy,
        new_client: Callable[[], OpenMeterClient],
        counts: Counts,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        elected: Callable[[], None] = lambda: None,
    ) -> None:
        self.pid = os.getpid()
        self.counts = counts
        self._policy = policy
        self._new_client = new_client
        self._elected = elected
        self._directory = Path(os.path.abspath(policy.spool_dir or ""))
        self._hooks = FirstRequestHooks()
        self._exit_hook = ExitHook(self.close_at_exit)
        self._does_without_threads = False
        self._writer = SpoolWriter(
            self._directory,
            policy,
            counts,
            new_overflow=self._new_overflow,
            moved_on=self._moved_on,
            segment_bytes=segment_bytes,
        )
        self._source = SpoolSource(
            self._directory,
            policy,
            counts,
            max_events=max(
                policy.batch_size, BACKLOG_BATCH if policy.batch_size > 1 else 1
            ),
            began=self._turn_began,
            ended=self._turn_ended,
        )
        client = new_client()
        self._sender = Sender(
            RecordingClient(client, self._source, resend_window=policy.resend_window),
            counts,
            self._source.done,
            bury=self._source.letters.bury,
            waiting=lambda: self.waiting,
        )
        self._worker = Worker(
            self._source,
            self._sender,
            policy,
            exit_hook=self._exit_hook,
            idle=client.close,
        )
        self._maintenance = SegmentMaintenance(
            self._directory,
            prepare=self._writer.prepare,
            hurry=self._worker.hurry,
            interval=self._source.interval,
        )
        #: Take an event. Any thread; never raises, never waits for delivery. Past
        #: this layer: a put is one call less.
        self.put = self._writer.put

    # -- Starting and ending

    def announce(self, begin: Callable[[], None]) -> None:
        """Have *begin* called once, when the first request is settled."""
        self._hooks.add(begin)

    @property
    def started(self) -> bool:
        """Whether all was done that the first settled request brings about."""
        return self._hooks.made and (
            self._worker.is_running
            or self._does_without_threads
            or self._policy.delivery == "ship"
        )

    def start(self) -> None:
        """Start the threads, if this process has any: see to what others left."""
        self._hooks.make()
        if self._policy.delivery == "ship":
            return
        if threads_starve():
            self._do_without_threads()
            return
        self._worker.start()
        if self._worker.is_running:
            self._maintenance.start()

    def _do_without_threads(self) -> None:
        """Deliver in flush() and close() only: the election is for who can do it."""
        if not self._does_without_threads:
            self._does_without_threads = True
            self._exit_hook.register()
            logger.warning(
                "%s: uWSGI leaves threads no time, so this process delivers what is in "
                "%s only at its exit: set enable-threads, or run 'openmeter-wsgi ship'",
                "delivery", self._directory,
            )  # fmt: skip

    def _new_overflow(self, when_full: str) -> MemoryDelivery:
        return MemoryDelivery(
            self._policy, self._new_client(), self.counts, when_full=when_full
        )

    def _moved_on(self) -> None:
        """Have the next segment prepared, by a thread that may have to be started."""
        if not self.started:
            self.start()
        self._maintenance.wake()

    def _turn_began(self) -> None:
        self._sender.reset()
        self._maintenance.elected = True
        self._elected()

    def _turn_ended(self) -> None:
        self._maintenance.elected = False

    def close(self, timeout: float | None = None) -> None:
        """Give up what this process owns; the sender delivers first until *timeout*.

        May be called twice, and after a fork in the child, where it does nothing.
        """
        if os.getpid() != self.pid:
            return
        deadline = now() + (
            self._policy.shutdown_timeout if timeout is None else timeout
        )
        owner = self._writer.owner
        self._writer.close()
        ended = True
        if self._worker.is_running:
            ended = self._worker.finish(deadline)
        elif owner is not None and self._policy.delivery != "ship":
            self._deliver_own(owner, deadline)
        self._worker.stop()
        self._maintenance.close()
        self._does_without_threads = False
        self._say_what_stays(unfinished=not ended)
        if overflow := self._writer.overflow:
            overflow.close(max(deadline - now(), 0))

    def close_at_exit(self) -> None:
        """Close, and deliver nothing any more: the exit hook of the process."""
        self.close()
        self._worker.end()

    def _say_what_stays(self, *, unfinished: bool) -> None:
        """Say it where nobody may be there to deliver it, or could."""
        fails = unfinished or self._sender.outage.problem is not None
        if fails and (left := self.in_spool.events):
            logger.warning(
                "%s: %d events stay in %s and are delivered as soon as a process that "
                "uses it runs and OpenMeter takes them",
                "shutdown", left, self._directory,
            )  # fmt: skip

    def _deliver_own(self, owner: str, deadline: float) -> None:
        """Deliver what this process has put, or see another process do it."""
        ends = watermark.ends(self._directory, owner)
        while not watermark.all_done(self._directory, ends):
            if (left := deadline - now()) <= 0:
                break
            self._worker.deliver_here(left)
            time.sleep(_JOIN_INTERVAL)

    # -- Waiting for delivery

    @property
    def waiting(self) -> int:
        """How many events are not delivered yet."""
        return self.in_spool.events + self.in_memory.events

    @property
    def in_spool(self) -> Backlog:
        """What of the directory is not delivered, by any process.

        An estimate where it is more than some ten thousand.
        """
        return watermark.backlog(self._directory)

    @property
    def in_memory(self) -> Backlog:
        """What waits here because the disk did not take it."""
        overflow = self._writer.overflow
        return overflow.in_memory if overflow else Backlog()

    @property
    def problems(self) -> list[Problem]:
        """What is wrong now, as far as this process knows."""
        found = []
        problem = self._sender.outage.problem
        if self._source.is_elected and problem is not None:
            found.append(problem)
        if (problem := self._writer.problem) is not None:
            found.append(problem)
        overflow = self._writer.overflow
        return found + overflow.problems if overflow else found

    def delivered_until(self) -> float:
        """Return a moment (wall clock) before which all that was put is delivered.

        By any process; 0.0 if none is known. What waits in the memory of another
        process, because the disk takes nothing, is not seen.
        """
        until = watermark.read(self._directory)
        overflow = self._writer.overflow
        return min(until, overflow.delivered_until()) if overflow else until

    def flush(self, timeout: float | None = None) -> bool:
        """Have delivered what waits now, and say whether it is within *timeout*.

        In the sender's process that is all the directory holds, elsewhere what this
        process has put. Another process is asked for it and needs a moment.
        """
        deadline = None if timeout is None else now() + timeout
        owner = None if self._source.is_elected else self._writer.owner
        ends = watermark.ends(self._directory, owner)
        self._worker.hurry()
        self._ask_for_delivery()
        if not self.started:
            self.start()
        if not self._worker.is_running and self._policy.delivery != "ship":
            limit = self._policy.shutdown_timeout if timeout is None else timeout
            self._worker.deliver_here(limit)
        if not watermark.wait_until_done(self._directory, ends, timeout):
            return False
        overflow = self._writer.overflow
        return not overflow or overflow.flush(deadline and max(deadline - now(), 0))

    def _ask_for_delivery(self) -> None:
        if not self._source.is_elected:  # another one polls for this
            with contextlib.suppress(OSError):
                (self._directory / FLUSH).touch(mode=0o600)
