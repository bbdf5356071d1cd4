"""The delivery of one directory of a spool, by one of the processes that use it.

Each process has a `SpoolSender`, whose thread waits for its turn: for the election, a
lock that one process holds at a time. The elected process reads all segments of the
directory and sends their events. When it ends, the next process is elected.
"""

from __future__ import annotations

import contextlib
from time import monotonic
from typing import TYPE_CHECKING, Final

from openmeter_wsgi import log
from openmeter_wsgi.delivery.sender import Sender
from openmeter_wsgi.delivery.worker import Source, Worker
from openmeter_wsgi.lock import Election, election
from openmeter_wsgi.spool import stored_answers
from openmeter_wsgi.spool.batches import SpoolBatch
from openmeter_wsgi.spool.dead_letters import DeadLetters
from openmeter_wsgi.spool.files import SEGMENT_BYTES
from openmeter_wsgi.spool.progress import RecordingClient
from openmeter_wsgi.spool.reader import SpoolReader
from openmeter_wsgi.spool.server_directories import (
    inherited_directories,
    remove_if_drained,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from openmeter_wsgi.delivery.client import OpenMeterClient
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.spool.server_directories import Server
    from openmeter_wsgi.stats import Counts
    from openmeter_wsgi.threads import ExitHook

logger: Final = log.get_logger(__name__)

#: Bounds, in seconds, of the time between two looks for events of other processes.
_MAX_POLL = 1.0
_MIN_POLL = 0.02


#: Number of request timeouts after which an attempt counts as stuck.
_STUCK_AFTER = 3


class SpoolSender:
    """The worker of a directory, with its source and its sender.

    *began* and *ended* are called at the start and the end of each turn.
    """

    def __init__(
        self,
        directory: Path,
        policy: Policy,
        client: OpenMeterClient,
        counts: Counts,
        *,
        exit_hook: ExitHook,
        waiting: Callable[[], int],
        began: Callable[[], None],
        ended: Callable[[SpoolSender], None],
        accepted: Callable[[SpoolBatch], object] = lambda _: None,
    ) -> None:
        self._policy = policy
        self._began = began
        self.source: SpoolSource = SpoolSource(
            directory,
            policy,
            counts,
            max_events=policy.batch_size,
            began=self._begin_turn,
            ended=lambda: ended(self),
        )
        self.sender: Sender[SpoolBatch] = Sender(
            RecordingClient(client, self.source, resend_window=policy.resend_window),
            counts,
            self.source.done,
            keep_dead_letter=self.source.letters.add_event,
            waiting=waiting,
            delay=self.source.delay,
            clock_ahead=lambda: client.clock_ahead,
            accepted=accepted,
        )
        self.worker: Worker[SpoolBatch] = Worker(
            self.source, self.sender, policy, exit_hook=exit_hook, idle=client.close
        )

    def _begin_turn(self) -> None:
        self.sender.reset()
        self._began()

    @property
    def is_stuck(self) -> bool:
        """True if an attempt lasts far longer than its deadline."""
        lasts = self.sender.attempt_lasts
        return lasts > _STUCK_AFTER * self._policy.request_timeout

    def depose(self) -> None:
        """End its turn. Its attempt may go on, but then writes nothing to the spool."""
        self.worker.stop()
        self.source.depose()


class InheritedSenders:
    """The senders of the directories that were assigned to a server.

    Each directory keeps its progress and has a sender of its own, until it is empty.
    Belongs to the process that delivers the server's own directory.
    """

    def __init__(
        self, root: Path, server: Server, new_sender: Callable[[Path], SpoolSender]
    ) -> None:
        self._root = root
        self._server = server
        self._new_sender = new_sender
        self._senders: dict[Path, SpoolSender] = {}
        #: Senders of empty directories. They may still be closing.
        self._drained: dict[Path, SpoolSender] = {}
        #: The time of the last change of the root directory that was looked at.
        self._root_changed_at: int | None = None

    @property
    def directories(self) -> list[Path]:
        """The assigned directories that still have events."""
        return inherited_directories(self._root, self._server)

    @property
    def senders(self) -> list[SpoolSender]:
        """The senders of directories with events."""
        return list(self._senders.values())

    def update(self) -> None:
        """Start a sender for each new directory, and end those of empty directories."""
        with contextlib.suppress(OSError):
            changed_at = self._root.stat().st_mtime_ns
            if self._senders or self._drained or changed_at != self._root_changed_at:
                self._root_changed_at = changed_at
                for path in self._match_directories():
                    self._senders[path].worker.start()
                self._remove_drained()

    def _match_directories(self) -> list[Path]:
        """Return the directories with events, and make one sender for each."""
        paths = self.directories
        for path in self._senders.keys() - set(paths):
            sender = self._drained[path] = self._senders.pop(path)
            sender.worker.end_when_empty()
        for path in paths:
            if path not in self._senders:
                self._senders[path] = self._new_sender(path)
                logger.info("%s: sends its events to %s", path, self._server.api_url)
        return paths

    def _remove_drained(self) -> None:
        for path, sender in list(self._drained.items()):
            if not sender.worker.is_running:
                del self._drained[path]
                if path != self._root:
                    remove_if_drained(path)

    def deliver_in_this_thread(self, deadline: float) -> None:
        """Deliver in the calling thread: the senders have no threads of their own."""
        for path in self._match_directories():
            left = max(deadline - monotonic(), 0)
            self._senders[path].worker.deliver_in_this_thread(left)
        self._match_directories()
        self._remove_drained()

    def replace_stuck(self) -> None:
        """Depose each stuck sender; the next `update` starts another one."""
        for path, sender in list(self._senders.items()):
            if sender.is_stuck:
                sender.depose()
                del self._senders[path]

    def finish(self, deadline: float) -> bool:
        """Deliver until *deadline*, end, and return True if all senders have ended."""
        ended = [sender.worker.finish(deadline) for sender in self.senders]
        return all(ended)

    def stop(self) -> None:
        """End, and leave the waiting events in the directories."""
        for sender in self.senders:
            sender.worker.stop()
            sender.worker.forbid_start()
        self._senders.clear()


class SpoolSource(Source[SpoolBatch]):
    """The events of a directory, during the turns of this process as its sender.

    *began* and *ended* are called at the start and the end of each turn. Each turn
    reads the directory anew.
    """

    def __init__(
        self,
        directory: Path,
        policy: Policy,
        counts: Counts,
        *,
        max_events: int,
        began: Callable[[], None],
        ended: Callable[[], None],
    ) -> None:
        #: Seconds between two looks into the directory.
        self.interval: float = max(min(policy.flush_interval, _MAX_POLL), _MIN_POLL)
        self.poll: float | None = self.interval
        #: The files of dead letters and unreadable bytes.
        self.letters: DeadLetters = DeadLetters(directory, counts)
        self._directory = directory
        self._policy = policy
        self._max_events = max_events
        self._began = began
        self._ended = ended
        self._reader: SpoolReader | None = None
        self._election: Election | None = None
        self._is_waiting = False
        #: True if the directory may hold an answer: also one of an earlier sender.
        self._may_hold_answer = True
        #: True if the verdict on the server's deduplication was logged.
        self._verdict_is_logged = False

    @property
    def is_elected(self) -> bool:
        """True if this process is the sender."""
        return self._reader is not None

    @property
    def is_waiting(self) -> bool:
        """True if the worker's thread waits for the sender to end."""
        return self._is_waiting

    @contextlib.contextmanager
    def turn(self, *, wait: bool) -> Iterator[bool]:
        """Be the sender of the directory within this context, if it yields True.

        :raises OSError: if no election is possible.
        """
        with election(self._directory, wait=False) as won:
            if won:
                with self._reading(won):
                    yield True
        if not won and not wait:
            yield False
        elif not won:
            self._is_waiting = True
            try:
                with election(self._directory) as won:
                    self._is_waiting = False
                    if won:
                        with self._reading(won):
                            yield True
            finally:
                self._is_waiting = False

    @contextlib.contextmanager
    def _reading(self, won: Election) -> Iterator[None]:
        reader = SpoolReader(
            self._directory,
            self.letters,
            max_events=self._max_events,
            election=won,
        )
        if not self._verdict_is_logged:
            self._verdict_is_logged = True
            stored_answers.log_verdict(self._directory, self._policy.api_url)
        self._reader, self._election = reader, won
        try:
            self._began()
            yield
        finally:
            self._reader = self._election = None
            self._ended()
            reader.close()

    @property
    def is_ours(self) -> bool:
        """True if this process is still the sender: a cleaner may delete its lock."""
        return self._election is not None and self._election.is_intact

    def depose(self) -> None:
        """Give the election to another sender: this one is stuck."""
        if (held := self._election) is not None:
            held.depose()

    def touch(self) -> None:
        """Show the other processes that the sender is alive."""
        if (held := self._election) is not None:
            held.touch()

    @property
    def reader(self) -> SpoolReader:
        """The reader of this turn.

        :raises RuntimeError: between two turns.
        """
        if self._reader is None:
            raise RuntimeError("the spool is read while this process is its sender")
        return self._reader

    # -- For the worker

    def __len__(self) -> int:
        """Return the number of events that are read and not taken."""
        return len(self._reader) if self._reader is not None else 0

    def take(self, *, max_events: int, max_bytes: int) -> SpoolBatch:
        """Remove and return the oldest events, at most those of one batch."""
        return self.reader.take(max_events=max_events, max_bytes=max_bytes)

    def refresh(self, *, everything: bool) -> None:
        """Look for new segments, new lines and dead owners."""
        if self.is_ours:
            self.reader.refresh(everything=everything)

    def share_answer(self, answer: str | None, *, next_in: float) -> None:
        """Write OpenMeter's *answer* into the directory, None if it took the batch."""
        if not self.is_ours:
            return
        if answer is not None:
            self._may_hold_answer = True
            with contextlib.suppress(OSError):  # a full disk is logged elsewhere
                stored_answers.save_answer(self._directory, answer, next_in=next_in)
        elif self._may_hold_answer:
            self._may_hold_answer = False
            stored_answers.forget_answer(self._directory)

    @property
    def has_full_batch(self) -> bool:
        """True if the events that were read fill a batch."""
        return self.reader.has_full_batch

    @property
    def is_half_full(self) -> bool:
        """True if the segments take half of the allowed bytes or more."""
        used = self.reader.segment_count * SEGMENT_BYTES
        return 2 * used >= self._policy.max_spool_bytes

    @property
    def due_in(self) -> float | None:
        """The seconds until delayed events are due, None without delayed events."""
        return self.reader.due_in

    # -- For the sender

    def delay(self, batch: SpoolBatch, seconds: float) -> None:
        """Make `take` return *batch*, which was taken, again after some *seconds*."""
        self.reader.delay(batch, seconds)

    def done(self, batch: SpoolBatch) -> None:
        """Record that the events of *batch* are delivered, or dead letters."""
        self.reader.done(batch)

    def in_flight_since(self, batch: SpoolBatch) -> float | None:
        """Return the time of the first attempt that may have arrived, or None."""
        return self.reader.in_flight_since(batch)

    def record(self, batch: SpoolBatch, since: float) -> None:
        """Write to the progress file that *batch* is about to be sent."""
        self.reader.record(batch, since)

    def check_is_sender(self) -> None:
        """Raise an error unless this process is still the sender."""
        self.reader.check_is_sender()

    def withdraw(self, batch: SpoolBatch) -> None:
        """Write to the progress file that *batch* has certainly not arrived."""
        self.reader.withdraw(batch)
