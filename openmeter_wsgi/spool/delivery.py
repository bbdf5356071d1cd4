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
from typing import TYPE_CHECKING, Any, Final, Protocol

from openmeter_wsgi import log
from openmeter_wsgi.deadline import MAX_STUCK
from openmeter_wsgi.delivery.queue import Backlog, MemoryDelivery
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.lock import sender_seen_at
from openmeter_wsgi.spool import watermark
from openmeter_wsgi.spool.files import SEGMENT_BYTES
from openmeter_wsgi.spool.maintenance import FLUSH, SegmentMaintenance
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

_JOIN_INTERVAL = 0.02
#: Closing waits at least so many seconds for the thread that writes to the disk.
_DISK_TIMEOUT = 1.0
#: A sender that has said nothing for so many seconds is reported by the others.
SILENT_TOO_LONG = 60.0


class DeliveryListener(Protocol):
    """Is told what the sender of a spool does. Its calls must not raise."""

    def elected(self) -> None:
        """Note that this process begins to send."""

    def accepted(self, batch: Batch) -> None:
        """Note that OpenMeter has accepted *batch*, before it counts as delivered."""

    def ended(self) -> None:
        """Note that this process does not send any more; the next one may not yet."""


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
        self._does_without_threads = False
        self._writer = SpoolWriter(
            self._directory,
            policy,
            counts,
            new_overflow=self._new_overflow,
            moved_on=self._moved_on,
            segment_bytes=segment_bytes,
            form=form,
        )
        self._sending = self._new_sending()
        self._inherited = InheritedSenders(root, server, self._new_inherited_sender)
        self._keys = KeyWatch(self._directory, server, policy.key)
        self._has_named_orphans = False
        #: Senders that were stuck and are given up.
        self._abandoned: list[SpoolSender] = []
        self._maintenance = SegmentMaintenance(
            self._directory,
            self._writer,
            hurry=self._hurry,
            tend=self._tend,
            interval=self._sending.source.interval,
        )
        #: Take an event. Any thread; never raises, never waits for delivery. Past
        #: this layer: a put is one call less.
        self.put: Callable[[bytes], None] = self._writer.put

    # -- Starting and ending

    def at_exit(self, call: Callable[[], None]) -> None:
        """Have *call* made when the process ends, after the delivery was closed."""
        self._exit_hook.add(call)

    @property
    def started(self) -> bool:
        """True if all was done that the first settled request brings about."""
        return (
            self._sending.worker.is_running
            or self._does_without_threads
            or self._policy.delivery == "ship"
        )

    def start(self, _: Mapping[str, Any] | None = None) -> None:
        """Start the threads, if this process has any: see to what others left."""
        if self._policy.delivery == "ship":
            return
        if threads_starve():
            self._do_without_threads()
            return
        self._prepare_directory()
        self._sending.worker.start()
        if self._sending.worker.is_running:
            self._maintenance.start()

    def _prepare_directory(self) -> None:
        if self._directory.is_dir():
            return
        with contextlib.suppress(ConfigError, OSError):  # a put says what is wrong
            prepare_server_directory(
                self._directory.parent, server_of_policy(self._policy)
            )

    def _do_without_threads(self) -> None:
        """Deliver in flush() and close() only: the election is for who can do it."""
        if not self._does_without_threads:
            self._does_without_threads = True
            self._exit_hook.register(self)
            logger.warning(
                "%s: uWSGI leaves threads no time, so this process delivers what is in "
                "%s only at its exit: set enable-threads, or run 'openmeter-wsgi ship'",
                "delivery", self._directory,
            )  # fmt: skip

    def _new_sending(self) -> SpoolSender:
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

    def _moved_on(self) -> None:
        """Have the next segment prepared, by a thread that may have to be started."""
        if not self.started:
            self.start()
        self._sending.worker.wake_if_running()
        self._maintenance.wake()

    def _turn_began(self) -> None:
        forget_sender_key(self._directory)
        self._maintenance.elected = True
        self._name_orphans()
        self._elected()
        if self._listener is not None:
            self._listener.elected()

    def _turn_ended(self, sending: SpoolSender) -> None:
        if self._listener is not None:
            self._listener.ended()
        if sending is self._sending:
            self._maintenance.elected = False

    def _name_orphans(self) -> None:
        """Say once which events of other servers nobody delivers."""
        if self._has_named_orphans:
            return
        self._has_named_orphans = True
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
        self._sending.worker.hurry()

    # -- Whether the sender is well

    def _tend(self) -> None:
        """See that a sender of this process that is stuck loses its place."""
        if self._sending.is_stuck:
            self._replace_sending()
        elif self._sending.source.is_elected:
            self._sending.source.touch()
        elif (problem := self._frozen) is not None:
            logger.error("%s: %s", self._directory, problem.text)
        if self._sending.source.is_elected:
            name_server(self._directory, server_of_policy(self._policy))
            self._inherited.replace_stuck()
            self._inherited.look()
        with contextlib.suppress(OSError):  # the directory is gone for a moment
            self._keys.look(
                self._writer.owner,
                self._writer.write_key_mark,
                is_sender=self._sending.source.is_elected,
                is_waiting=self._sending.source.is_waiting,
            )

    def _replace_sending(self) -> None:
        stuck = self._sending
        stuck.depose()
        self._maintenance.elected = False
        still = [one for one in self._abandoned if one.worker.is_running]
        self._abandoned = [*still, *({stuck} - set(still))]
        others = "another process takes over"
        if len(self._abandoned) <= MAX_STUCK:
            self._sending = self._new_sending()
            self._sending.worker.start()
            others = "another thread or process takes over"
        logger.error(
            "%s: an attempt to deliver has not ended for %.0f s; %s",
            self._directory, stuck.sender.attempt_lasts, others,
        )  # fmt: skip

    @property
    def _frozen(self) -> Problem | None:
        """The problem of the sender, if it is another process."""
        if self._sending.source.is_elected or self._policy.delivery == "ship":
            return None
        seen_at = sender_seen_at(self._directory)
        silent = 0.0 if seen_at is None else time.time() - seen_at
        if silent < SILENT_TOO_LONG or not self._sending.source.is_waiting:
            return None
        return Problem(
            "not_delivering",
            f"the process that delivers the spool has not moved for {silent:.0f} s, "
            "and holds its lock: it may be stopped, or frozen; all events are kept",
        )

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
        self._writer.close(max(deadline - now(), 0))
        ended = True
        if self._sending.worker.is_running:
            ended = self._sending.worker.finish(deadline)
            ended = self._inherited.finish(deadline) and ended
        elif owner is not None and self._policy.delivery != "ship":
            self._deliver_own(owner, deadline)
        self._sending.worker.stop()
        self._maintenance.close(max(deadline - now(), _DISK_TIMEOUT))
        self._inherited.stop()
        self._does_without_threads = False
        self._say_what_stays(unfinished=not ended)
        if overflow := self._writer.overflow:
            overflow.close(max(deadline - now(), 0))

    def release(self) -> None:
        """Give up what this process owns, and end: nobody holds this any more."""
        if os.getpid() == self.pid:
            self._writer.close()
            self._maintenance.close()
            self._inherited.stop()
            self._sending.worker.end_when_empty()

    def forget_exit(self) -> None:
        """Do nothing at the exit of the process: it was closed before."""
        self._exit_hook.clear()

    def close_at_exit(self) -> None:
        """Close, and deliver nothing any more: the exit hook of the process."""
        self.close()
        self._sending.worker.forbid_start()

    def _say_what_stays(self, *, unfinished: bool) -> None:
        """Say it where nobody may be there to deliver it, or could."""
        fails = unfinished or self._sending.sender.outage.problem is not None
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
            self._sending.worker.deliver_in_this_thread(left)
            self._inherited.deliver_in_this_thread(max(deadline - now(), 0))
            time.sleep(_JOIN_INTERVAL)

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
        """Whether this process sends what is in the spool."""
        return self._sending.source.is_elected

    @property
    def in_spool(self) -> Backlog:
        """The events of the directories that no process has delivered yet.

        An estimate where it is more than some ten thousand.
        """
        events, size, oldest_at = watermark.backlog(self._directory)
        for directory in self._inherited.directories:
            more, bytes_, at = watermark.backlog(directory)
            events, size = events + more, size + bytes_
            oldest_at = min((t for t in (oldest_at, at) if t is not None), default=None)
        return Backlog(events, size, oldest_at)

    @property
    def in_memory(self) -> Backlog:
        """The events that wait in memory because the disk did not take them."""
        overflow = self._writer.overflow
        return overflow.in_memory if overflow else Backlog()

    @property
    def problems(self) -> list[Problem]:
        """The problems now, as far as this process knows."""
        found = []
        problem = self._sending.sender.outage.problem
        if self._sending.source.is_elected and problem is not None:
            found.append(problem)
        found += [p for p in (self._writer.problem, self._frozen) if p is not None]
        if self._keys.problem is not None:
            found.append(self._keys.problem)
        overflow = self._writer.overflow
        return found + overflow.problems if overflow else found

    def delivered_until(self) -> float:
        """Return a moment (wall clock) before which all that was put is delivered.

        By any process; 0.0 if none is known. What waits in the memory of another
        process, because the disk takes nothing, is not seen.
        """
        until = min(map(watermark.read, self._all_directories))
        overflow = self._writer.overflow
        return min(until, overflow.delivered_until()) if overflow else until

    def flush(self, timeout: float | None = None) -> bool:
        """Have delivered what waits now, and say whether it is within *timeout*.

        In the sender's process that is all the directory holds, elsewhere what this
        process has put. Another process is asked for it and needs a moment.
        """
        deadline = None if timeout is None else now() + timeout
        losses = -1
        while losses != self._writer.losses:  # removed, so not delivered
            if not self._writer.look_within(_left(deadline)):
                return False
            losses = self._writer.losses
            if not self._flush_directory(_left(deadline)):
                return False
            if not self._writer.look_within(_left(deadline)):
                return False
        overflow = self._writer.overflow
        return not overflow or overflow.flush(_left(deadline))

    def _flush_directory(self, timeout: float | None) -> bool:
        owner = None if self._sending.source.is_elected else self._writer.owner
        directories = [self._directory] if owner else self._all_directories
        ends = {one: watermark.ends(one, owner) for one in directories}
        for sender in (self._sending, *self._inherited.senders):
            sender.worker.hurry()
        self._ask_for_delivery()
        if not self.started:
            self.start()
        if not self._sending.worker.is_running and self._policy.delivery != "ship":
            limit = self._policy.shutdown_timeout if timeout is None else timeout
            self._sending.worker.deliver_in_this_thread(limit)
            self._inherited.deliver_in_this_thread(limit)
        deadline = None if timeout is None else now() + timeout
        return all(
            watermark.wait_until_done(one, ends[one], _left(deadline))
            for one in directories
        )

    @property
    def _all_directories(self) -> list[Path]:
        """The directory of the server, and those whose events it got besides."""
        return [self._directory, *self._inherited.directories]

    def _ask_for_delivery(self) -> None:
        if not self._sending.source.is_elected:  # another one polls for this
            with contextlib.suppress(OSError):
                (self._directory / FLUSH).touch(mode=0o600)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - now(), 0)
