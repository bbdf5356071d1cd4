"""The sender of a process that shares a spool: one of all processes delivers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from openmeter_wsgi import log
from openmeter_wsgi.delivery.sender import Sender
from openmeter_wsgi.delivery.worker import Source, Worker
from openmeter_wsgi.lock import Election, election
from openmeter_wsgi.spool import server_answers
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

#: The sender looks at least this often for what others put.
_MAX_POLL = 1.0
_MIN_POLL = 0.02


#: An attempt that has not ended after so many request timeouts holds the sender.
_STUCK_AFTER = 3


class SpoolSender:
    """The worker of a spool, with its source and its sender.

    *began* and *ended* are called with each turn as the sender of the directory.
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
            keep_dead_letter=self.source.letters.bury,
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
        """True if an attempt does not end, though it has a deadline."""
        lasts = self.sender.attempt_lasts
        return lasts > _STUCK_AFTER * self._policy.request_timeout

    def depose(self) -> None:
        """Take its place away. What it was doing may go on, and writes nothing."""
        self.worker.stop()
        self.source.depose()


class InheritedSenders:
    """Deliver the directories that this server got from others, until they are empty.

    Each has a sender of its own, so all that is known of a directory is used as it is.
    Belongs to the process that delivers the server's own directory.
    """

    def __init__(
        self, root: Path, server: Server, new_sender: Callable[[Path], SpoolSender]
    ) -> None:
        self._root = root
        self._server = server
        self._new_sender = new_sender
        self._senders: dict[Path, SpoolSender] = {}
        #: Those that are empty, and may still be closing.
        self._drained: dict[Path, SpoolSender] = {}
        self._looked_at: int | None = None

    @property
    def directories(self) -> list[Path]:
        """The directories of which something is left to deliver."""
        return inherited_directories(self._root, self._server)

    @property
    def senders(self) -> list[SpoolSender]:
        """The senders that are at work."""
        return list(self._senders.values())

    def look(self) -> None:
        """Start a sender for each directory, and end those of the empty ones."""
        with contextlib.suppress(OSError):
            changed_at = self._root.stat().st_mtime_ns
            if self._senders or self._drained or changed_at != self._looked_at:
                self._looked_at = changed_at
                self._look()

    def _look(self) -> None:
        for path in self._find():
            self._senders[path].worker.start()
        self._clean()

    def _clean(self) -> None:
        for path, sender in list(self._drained.items()):
            if not sender.worker.is_running:
                del self._drained[path]
                if path != self._root:
                    remove_if_drained(path)

    def _find(self) -> list[Path]:
        found = self.directories
        for path in self._senders.keys() - set(found):
            sender = self._drained[path] = self._senders.pop(path)
            sender.worker.end_when_empty()
        for path in found:
            if path not in self._senders:
                self._senders[path] = self._new_sender(path)
                logger.info(
                    "%s: delivers to %s what it holds", path, self._server.api_url
                )
        return found

    def deliver_in_this_thread(self, timeout: float) -> None:
        """Deliver in the calling thread, where no other can be had."""
        for path in self._find():
            self._senders[path].worker.deliver_in_this_thread(timeout)
        self._find()
        self._clean()

    def replace_stuck(self) -> None:
        """Depose each sender that is stuck; the next look starts another one."""
        for path, sender in list(self._senders.items()):
            if sender.is_stuck:
                sender.depose()
                del self._senders[path]

    def finish(self, deadline: float) -> bool:
        """Deliver until *deadline* and end; say whether all have ended."""
        ended = [sender.worker.finish(deadline) for sender in self.senders]
        return all(ended)

    def stop(self) -> None:
        """End without delivering any more."""
        for sender in self.senders:
            sender.worker.stop()
            sender.worker.forbid_start()
        self._senders.clear()


class SpoolSource(Source[SpoolBatch]):
    """The events of a directory, while it is this process's turn to deliver them.

    *began* and *ended* are called with each turn. Everything known of the directory is
    read anew then.
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
        #: The files for events that are not sent again.
        self.letters: DeadLetters = DeadLetters(directory, counts)
        self._directory = directory
        self._policy = policy
        self._max_events = max_events
        self._began = began
        self._ended = ended
        self._reader: SpoolReader | None = None
        self._election: Election | None = None
        self._is_waiting = False
        #: Whether there may be an answer in the directory that is over.
        self._has_told = True
        #: Whether it was said what is known of the server's deduplication.
        self._said = False

    @property
    def is_elected(self) -> bool:
        """True if this process is the sender."""
        return self._reader is not None

    @property
    def is_waiting(self) -> bool:
        """True if the worker's thread sleeps until another process ends."""
        return self._is_waiting

    @contextlib.contextmanager
    def turn(self, *, wait: bool) -> Iterator[bool]:
        """Be the sender of the directory within this context, if it yields True.

        :raises OSError: if no election is possible.
        """
        with election(self._directory, wait=False) as won:
            if won:
                with self._elected(won):
                    yield True
        if not won and not wait:
            yield False
        elif not won:
            self._is_waiting = True
            try:
                with election(self._directory) as won:
                    self._is_waiting = False
                    if won:
                        with self._elected(won):
                            yield True
            finally:
                self._is_waiting = False

    @contextlib.contextmanager
    def _elected(self, won: Election) -> Iterator[None]:
        reader = SpoolReader(
            self._directory,
            self.letters,
            max_events=self._max_events,
            election=won,
        )
        if not self._said:
            self._said = True
            server_answers.log_verdict(self._directory, self._policy.api_url)
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
        """Let another sender take the place of this one, which is stuck."""
        if (held := self._election) is not None:
            held.depose()

    def touch(self) -> None:
        """Say to the other processes that the sender lives."""
        if (held := self._election) is not None:
            held.touch()

    @property
    def reader(self) -> SpoolReader:
        """The reader of this turn."""
        if self._reader is None:
            raise RuntimeError("the spool is read while this process is its sender")
        return self._reader

    # -- For the worker

    def __len__(self) -> int:
        """Return the number of events that are read and not taken."""
        return len(self._reader) if self._reader is not None else 0

    def take(self, *, max_events: int, max_bytes: int) -> SpoolBatch:
        """Return the oldest events, as many as one batch may hold."""
        return self.reader.take(max_events=max_events, max_bytes=max_bytes)

    def refresh(self, *, everything: bool) -> None:
        """Look for new segments, lines and deaths; with *last* for every one."""
        if self.is_ours:
            self.reader.refresh(everything=everything)

    def share_answer(self, answer: str | None, *, next_in: float) -> None:
        """Tell others why events wait: the *answer*, None if events were taken."""
        if not self.is_ours:
            return
        if answer is not None:
            self._has_told = True
            with contextlib.suppress(OSError):  # of a full disk the log tells
                server_answers.save_answer(self._directory, answer, next_in=next_in)
        elif self._has_told:
            self._has_told = False
            server_answers.forget_answer(self._directory)

    @property
    def has_full_batch(self) -> bool:
        """True if a batch can be filled with what was read."""
        return self.reader.has_full_batch

    @property
    def is_half_full(self) -> bool:
        """True if the segments take half of the room or more."""
        used = self.reader.segments * SEGMENT_BYTES
        return 2 * used >= self._policy.max_spool_bytes

    @property
    def due_in(self) -> float | None:
        """The seconds until delayed events are due, None if there are none."""
        return self.reader.due_in

    # -- For the sender

    def delay(self, batch: SpoolBatch, seconds: float) -> None:
        """Hand out *batch*, which was taken, once more after so many seconds."""
        self.reader.delay(batch, seconds)

    def done(self, batch: SpoolBatch) -> None:
        """Remember, for good, that *batch* is delivered or set aside."""
        self.reader.done(batch)

    def in_flight_since(self, batch: SpoolBatch) -> float | None:
        """Return the time of the first attempt that may have arrived, or None."""
        return self.reader.in_flight_since(batch)

    def record(self, batch: SpoolBatch, since: float) -> None:
        """Write down that *batch* is about to be sent."""
        self.reader.record(batch, since)

    def check(self) -> None:
        """Go on only as the sender."""
        self.reader.check()

    def withdraw(self, batch: SpoolBatch) -> None:
        """Write down that *batch* has certainly not arrived."""
        self.reader.withdraw(batch)
