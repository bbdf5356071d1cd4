"""What sends of one process that shares a spool: of all of them one delivers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from openmeter_wsgi.delivery.sender import Sender
from openmeter_wsgi.delivery.worker import Source, Worker
from openmeter_wsgi.lock import Election, election
from openmeter_wsgi.spool import last_answer, server_deduplication
from openmeter_wsgi.spool.batches import SpoolBatch
from openmeter_wsgi.spool.dead_letters import DeadLetters
from openmeter_wsgi.spool.files import SEGMENT_BYTES
from openmeter_wsgi.spool.progress import RecordingClient
from openmeter_wsgi.spool.reader import SpoolReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from openmeter_wsgi.delivery.client import OpenMeterClient
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.stats import Counts
    from openmeter_wsgi.threads import ExitHook

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
        self.source = SpoolSource(
            directory,
            policy,
            counts,
            max_events=policy.batch_size,
            began=self._begin_turn,
            ended=lambda: ended(self),
        )
        self.sender = Sender(
            RecordingClient(client, self.source, resend_window=policy.resend_window),
            counts,
            self.source.done,
            bury=self.source.letters.bury,
            waiting=waiting,
            delay=self.source.delay,
            clock_ahead=lambda: client.clock_ahead,
            accepted=accepted,
        )
        self.worker = Worker(
            self.source, self.sender, policy, exit_hook=exit_hook, idle=client.close
        )

    def _begin_turn(self) -> None:
        self.sender.reset()
        self._began()

    @property
    def is_stuck(self) -> bool:
        """Whether an attempt does not end, though it has a deadline."""
        lasts = self.sender.attempt_lasts
        return lasts > _STUCK_AFTER * self._policy.request_timeout

    def depose(self) -> None:
        """Take its place away. What it was doing may go on, and writes nothing."""
        self.worker.stop()
        self.source.depose()


class SpoolSource(Source[SpoolBatch]):
    """What a directory holds, while it is this process's turn to deliver it.

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
        self.interval = max(min(policy.flush_interval, _MAX_POLL), _MIN_POLL)
        self.poll = self.interval
        #: Where to bury what is not sent again.
        self.letters = DeadLetters(directory, counts)
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
        """Whether this process is the sender."""
        return self._reader is not None

    @property
    def is_waiting(self) -> bool:
        """Whether the worker's thread sleeps until another process ends."""
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
            server_deduplication.say(self._directory, self._policy.api_url)
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
        """Whether this process is still the sender: a cleaner may delete its lock."""
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
        """Return how many events are read and not taken."""
        return len(self._reader) if self._reader is not None else 0

    def take(self, *, max_events: int, max_bytes: int) -> SpoolBatch:
        """Return the oldest events, as many as one batch may hold."""
        return self.reader.take(max_events=max_events, max_bytes=max_bytes)

    def look(self, *, last: bool) -> None:
        """Look for new segments, lines and deaths; with *last* for every one."""
        if self.is_ours:
            self.reader.refresh(last=last)

    def tell(self, answer: str | None, *, next_in: float) -> None:
        """Tell others why events wait: the *answer*, None if events were taken."""
        if not self.is_ours:
            return
        if answer is not None:
            self._has_told = True
            with contextlib.suppress(OSError):  # of a full disk the log tells
                last_answer.save(self._directory, answer, next_in=next_in)
        elif self._has_told:
            self._has_told = False
            last_answer.forget(self._directory)

    @property
    def is_full(self) -> bool:
        """Whether a batch can be filled with what was read."""
        return self.reader.is_full

    @property
    def is_pressed(self) -> bool:
        """Whether the segments take half of the room or more."""
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
        """Return when the first attempt was that may have arrived, None if none."""
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
