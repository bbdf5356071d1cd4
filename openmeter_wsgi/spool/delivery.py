"""Delivery from a spool: settled events survive the process.

A `SpoolDelivery` joins these parts of one process:

- the writer appends events to segments, files in the directory of the server;
- the maintenance thread prepares and syncs segments, and supervises the sender;
- the own sender delivers the whole directory while this process is elected, and the
  inherited senders deliver directories that were assigned to the server;
- the overflow delivers events from memory. It exists once the disk refused an event.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from time import monotonic as now
from typing import TYPE_CHECKING, Any, Final, Protocol

from openmeter_wsgi import log
from openmeter_wsgi.deadline import MAX_STUCK
from openmeter_wsgi.delivery.queue import Backlog, MemoryDelivery
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.lock import sender_seen_at
from openmeter_wsgi.spool import watermark
from openmeter_wsgi.spool.files import SEGMENT_BYTES
from openmeter_wsgi.spool.segment_maintenance import FLUSH, SegmentMaintenance
from openmeter_wsgi.spool.sender import InheritedSenders, SpoolSender
from openmeter_wsgi.spool.server_directories import (
    KeyWatch,
    forget_sender_key,
    name_server,
    orphans,
    prepare_server_directory,
    server_directory,
    server_of_policy,
)
from openmeter_wsgi.spool.writer import SpoolWriter
from openmeter_wsgi.stats import Problem
from openmeter_wsgi.threads import ExitHook, threads_starve

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from openmeter_wsgi.delivery.batch import Batch
    from openmeter_wsgi.delivery.client import OpenMeterClient
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.stats import Counts

logger: Final = log.get_logger(__name__)

#: Seconds between two checks of a close whether its events are delivered.
_CHECK_INTERVAL = 0.02
#: Minimum number of seconds that a close waits for the thread that writes to the disk.
_DISK_TIMEOUT = 1.0
#: Seconds without a sign of life after which other processes report the sender.
FROZEN_AFTER = 60.0


class DeliveryListener(Protocol):
    """A listener to the sender of a spool. Its methods must not raise."""

    def elected(self) -> None:
        """Handle the start of this process's turn as the sender."""

    def accepted(self, batch: Batch) -> None:
        """Handle a *batch* that OpenMeter accepted, before it counts as delivered."""

    def ended(self) -> None:
        """Handle the end of this process's turn; the next sender may not run yet."""


class SpoolDelivery:
    """The spool of one process: it stores events in files and delivers the directory.

    If the disk takes no event, events are sent from memory, as without a spool, and
    counted as ``unspooled``. *elected* is called whenever this process becomes the
    sender.
    """

    def __init__(
        self,
        policy: Policy,
        new_client: Callable[[], OpenMeterClient],
        counts: Counts,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        form: str | None = None,
        elected: Callable[[], None] = lambda: None,
        listener: DeliveryListener | None = None,
    ) -> None:
        self.pid: int = os.getpid()
        self.counts = counts
        self._policy = policy
        self._new_client = new_client
        self._elected = elected
        self._listener = listener
        server = server_of_policy(policy)
        root = Path(os.path.abspath(policy.spool_dir or ""))
        self._directory = server_directory(root, server)
        self._exit_hook = ExitHook(self.close_at_exit)
        self._has_no_threads = False
        self._writer = SpoolWriter(
            self._directory,
            policy,
            counts,
            new_overflow=self._new_overflow,
            request_segment=self._request_segment,
            segment_bytes=segment_bytes,
            form=form,
        )
        self._own_sender = self._new_own_sender()
        self._inherited = InheritedSenders(root, server, self._new_inherited_sender)
        self._keys = KeyWatch(self._directory, server, policy.key)
        self._orphans_are_logged = False
        #: Senders that were stuck and deposed.
        self._abandoned: list[SpoolSender] = []
        self._maintenance = SegmentMaintenance(
            self._directory,
            self._writer,
            hurry=self._hurry,
            supervise=self._supervise,
            interval=self._own_sender.source.interval,
        )
        #: Take an event. Any thread; never raises, never waits for delivery. The method
        #: of the writer itself saves one call per event.
        self.put: Callable[[bytes], None] = self._writer.put

    # -- Starting and ending

    def at_exit(self, call: Callable[[], None]) -> None:
        """Call *call* at the end of the process, after the delivery was closed."""
        self._exit_hook.add(call)

    @property
    def started(self) -> bool:
        """True if the worker's thread runs, or this process starts no thread."""
        return (
            self._own_sender.worker.is_running
            or self._has_no_threads
            or self._policy.delivery == "ship"
        )

    def start(self, _: Mapping[str, Any] | None = None) -> None:
        """Start the threads, if this process may have threads."""
        if self._policy.delivery == "ship":
            return
        if threads_starve():
            self._prepare_without_threads()
            return
        self._prepare_directory()
        self._own_sender.worker.start()
        if self._own_sender.worker.is_running:
            self._maintenance.start()

    def _prepare_directory(self) -> None:
        if self._directory.is_dir():
            return
        # The first put logs the problem.
        with contextlib.suppress(ConfigError, OSError):
            prepare_server_directory(
                self._directory.parent, server_of_policy(self._policy)
            )

    def _prepare_without_threads(self) -> None:
        """Deliver in flush() and close() only: another process can be the sender."""
        if not self._has_no_threads:
            self._has_no_threads = True
            self._exit_hook.register(self)
            logger.warning(
                "%s: uWSGI leaves threads no time, so this process delivers the events "
                "in %s only at its exit: set enable-threads, or run 'openmeter-wsgi "
                "ship'",
                "delivery", self._directory,
            )  # fmt: skip

    def _new_own_sender(self) -> SpoolSender:
        return SpoolSender(
            self._directory,
            self._policy,
            self._new_client(),
            self.counts,
            exit_hook=self._exit_hook,
            waiting=self._count_waiting,
            began=self._turn_began,
            ended=self._turn_ended,
            accepted=self._listener.accepted if self._listener else lambda _: None,
        )

    def _new_inherited_sender(self, directory: Path) -> SpoolSender:
        return SpoolSender(
            directory,
            self._policy,
            self._new_client(),
            self.counts,
            exit_hook=self._exit_hook,
            waiting=self._count_waiting,
            began=lambda: None,
            ended=lambda _: None,
        )

    def _new_overflow(self, drop_reason: str) -> MemoryDelivery:
        return MemoryDelivery(
            self._policy, self._new_client(), self.counts, drop_reason=drop_reason
        )

    def _request_segment(self) -> None:
        """Make the maintenance thread prepare the next segment; start it if needed."""
        if not self.started:
            self.start()
        self._own_sender.worker.wake_if_running()
        self._maintenance.wake()

    def _turn_began(self) -> None:
        forget_sender_key(self._directory)
        self._maintenance.elected = True
        self._log_orphans()
        self._elected()
        if self._listener is not None:
            self._listener.elected()

    def _turn_ended(self, sender: SpoolSender) -> None:
        if self._listener is not None:
            self._listener.ended()
        if sender is self._own_sender:
            self._maintenance.elected = False

    def _log_orphans(self) -> None:
        """Log once the directories of other servers that no process delivers."""
        if self._orphans_are_logged:
            return
        self._orphans_are_logged = True
        with contextlib.suppress(OSError):
            root, server = self._directory.parent, server_of_policy(self._policy)
            for orphan in orphans(root, but=server):
                logger.warning(
                    "%s: %d events wait for %s, and no running process sends there; "
                    "they are kept until one does, or 'openmeter-wsgi spool assign' "
                    "gives them to another server",
                    orphan.directory, orphan.events, orphan.address,
                )  # fmt: skip

    def _hurry(self) -> None:
        self._own_sender.worker.hurry()

    # -- Supervision of the sender

    def _supervise(self) -> None:
        """Replace a stuck sender, report a frozen one, and compare the API keys."""
        if self._own_sender.is_stuck:
            self._replace_own_sender()
        elif self._own_sender.source.is_elected:
            self._own_sender.source.touch()
        elif (problem := self._frozen_problem) is not None:
            logger.error("%s: %s", self._directory, problem.text)
        if self._own_sender.source.is_elected:
            name_server(self._directory, server_of_policy(self._policy))
            self._inherited.replace_stuck()
            self._inherited.update()
        with contextlib.suppress(OSError):  # the directory may have been removed
            self._keys.compare(
                self._writer.owner,
                self._writer.write_key_mark,
                is_sender=self._own_sender.source.is_elected,
                is_waiting=self._own_sender.source.is_waiting,
            )

    def _replace_own_sender(self) -> None:
        stuck = self._own_sender
        stuck.depose()
        self._maintenance.elected = False
        running = [s for s in self._abandoned if s.worker.is_running]
        self._abandoned = [*running, *({stuck} - set(running))]
        successor = "another process takes over"
        if len(self._abandoned) <= MAX_STUCK:
            self._own_sender = self._new_own_sender()
            self._own_sender.worker.start()
            successor = "another thread or process takes over"
        logger.error(
            "%s: an attempt to deliver has not ended for %.0f s; all events are kept, "
            "and %s",
            self._directory, stuck.sender.attempt_lasts, successor,
        )  # fmt: skip

    @property
    def _frozen_problem(self) -> Problem | None:
        """The problem of a frozen sender in another process, None if it is alive."""
        if self._own_sender.source.is_elected or self._policy.delivery == "ship":
            return None
        seen_at = sender_seen_at(self._directory)
        silent = 0.0 if seen_at is None else time.time() - seen_at
        if silent < FROZEN_AFTER or not self._own_sender.source.is_waiting:
            return None
        return Problem(
            "not_delivering",
            f"the process that delivers the spool has not moved for {silent:.0f} s, "
            "but holds its lock: it may be stopped or frozen; all events are kept "
            "until it moves or ends",
        )

    def close(self, timeout: float | None = None) -> None:
        """Seal the segments of this process, and deliver until *timeout*.

        The sender delivers the whole directory; a process without threads delivers its
        own events. May be called twice. In the child of a fork it does nothing.
        """
        if os.getpid() != self.pid:
            return
        deadline = now() + (
            self._policy.shutdown_timeout if timeout is None else timeout
        )
        owner = self._writer.owner
        self._writer.close(max(deadline - now(), 0))
        ended = True
        if self._own_sender.worker.is_running:
            ended = self._own_sender.worker.finish(deadline)
            ended = self._inherited.finish(deadline) and ended
        elif owner is not None and self._policy.delivery != "ship":
            self._deliver_own(owner, deadline)
        self._own_sender.worker.stop()
        self._maintenance.close(max(deadline - now(), _DISK_TIMEOUT))
        self._inherited.stop()
        self._has_no_threads = False
        self._log_remaining(unfinished=not ended)
        if overflow := self._writer.overflow:
            overflow.close(max(deadline - now(), 0))

    def release(self) -> None:
        """Seal the segments, and end: the delivery is no longer used."""
        if os.getpid() == self.pid:
            self._writer.close()
            self._maintenance.close()
            self._inherited.stop()
            self._own_sender.worker.end_when_empty()

    def forget_exit(self) -> None:
        """Do nothing at the exit of the process: the delivery was closed before."""
        self._exit_hook.clear()

    def close_at_exit(self) -> None:
        """Close for good. The exit hook of the process calls this."""
        self.close()
        self._own_sender.worker.forbid_start()

    def _log_remaining(self, *, unfinished: bool) -> None:
        """Log the remaining events if the delivery was *unfinished* or fails."""
        fails = unfinished or self._own_sender.sender.outage.problem is not None
        if fails and (left := self.in_spool.events):
            logger.warning(
                "%s: %d events are kept in %s and are delivered as soon as a process "
                "that uses it runs and OpenMeter accepts them",
                "shutdown", left, self._directory,
            )  # fmt: skip

    def _deliver_own(self, owner: str, deadline: float) -> None:
        """Deliver this process's events, or wait until another process has done it."""
        ends = watermark.ends(self._directory, owner)
        while not watermark.all_done(self._directory, ends):
            if (left := deadline - now()) <= 0:
                break
            self._own_sender.worker.deliver_in_this_thread(left)
            self._inherited.deliver_in_this_thread(deadline)
            time.sleep(_CHECK_INTERVAL)

    # -- Waiting for delivery

    def _count_waiting(self) -> int:
        return self.waiting

    @property
    def waiting(self) -> int:
        """The number of events that are not delivered yet."""
        return self.in_spool.events + self.in_memory.events

    @property
    def directory(self) -> Path:
        """The directory of the spool."""
        return self._directory

    @property
    def is_sender(self) -> bool:
        """True if this process sends the events in the spool."""
        return self._own_sender.source.is_elected

    @property
    def in_spool(self) -> Backlog:
        """The undelivered events in all directories of the server.

        The number is an estimate above some ten thousand events.
        """
        backlogs = [watermark.backlog(path) for path in self._all_directories]
        times = (b.oldest_at for b in backlogs if b.oldest_at is not None)
        return Backlog(
            sum(b.events for b in backlogs),
            sum(b.bytes for b in backlogs),
            min(times, default=None),
        )

    @property
    def in_memory(self) -> Backlog:
        """The events that wait in memory because the disk did not take them."""
        overflow = self._writer.overflow
        return overflow.in_memory if overflow else Backlog()

    @property
    def problems(self) -> list[Problem]:
        """The current problems of which this process knows."""
        outage = self._own_sender.sender.outage
        candidates = [
            outage.problem if self._own_sender.source.is_elected else None,
            self._writer.problem,
            self._frozen_problem,
            self._keys.problem,
        ]
        problems = [problem for problem in candidates if problem is not None]
        overflow = self._writer.overflow
        return problems + overflow.problems if overflow else problems

    def delivered_until(self) -> float:
        """Return a time (wall clock) before which each put event is done, or 0.0.

        Events of all processes count, except those in the overflow of another process.
        """
        until = min(map(watermark.read, self._all_directories))
        overflow = self._writer.overflow
        return min(until, overflow.delivered_until()) if overflow else until

    def flush(self, timeout: float | None = None) -> bool:
        """Deliver the waiting events; return True if all are done within *timeout*.

        In the sender's process these are all events in the directory. In another
        process they are its own events, and the sender needs a moment to deliver them.
        """
        deadline = None if timeout is None else now() + timeout
        losses = -1
        while losses != self._writer.losses:  # again, if removed events were put back
            if not self._writer.check_files_within(_left(deadline)):
                return False
            losses = self._writer.losses
            if not self._flush_directory(deadline):
                return False
            if not self._writer.check_files_within(_left(deadline)):
                return False
        overflow = self._writer.overflow
        return not overflow or overflow.flush(_left(deadline))

    def _flush_directory(self, deadline: float | None) -> bool:
        owner = None if self._own_sender.source.is_elected else self._writer.owner
        directories = [self._directory] if owner else self._all_directories
        ends = {path: watermark.ends(path, owner) for path in directories}
        for sender in (self._own_sender, *self._inherited.senders):
            sender.worker.hurry()
        self._ask_for_delivery()
        if not self.started:
            self.start()
        if not self._own_sender.worker.is_running and self._policy.delivery != "ship":
            ends_at = deadline or now() + self._policy.shutdown_timeout
            self._own_sender.worker.deliver_in_this_thread(max(ends_at - now(), 0))
            self._inherited.deliver_in_this_thread(ends_at)
        return all(
            watermark.wait_until_done(path, ends[path], _left(deadline))
            for path in directories
        )

    @property
    def _all_directories(self) -> list[Path]:
        """The directory of the server, and the directories assigned to it."""
        return [self._directory, *self._inherited.directories]

    def _ask_for_delivery(self) -> None:
        if not self._own_sender.source.is_elected:  # the sender polls for this file
            with contextlib.suppress(OSError):
                (self._directory / FLUSH).touch(mode=0o600)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - now(), 0)
