"""The way into a spool: into the journal, and where that fails into memory."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from openmeter_wsgi import log
from openmeter_wsgi.delivery.number_ranges import overlap
from openmeter_wsgi.errors import ConfigError, SpoolError, SpoolFull
from openmeter_wsgi.spool.files import SEGMENT_BYTES, journal_form
from openmeter_wsgi.spool.journal import (
    CLOSED,
    RETRY_DELAY,
    Journal,
    JournalClosed,
    KeptSegments,
    RecordTooLarge,
)
from openmeter_wsgi.spool.progress import Progress, load_progress
from openmeter_wsgi.spool.server_directories import (
    prepare_server_directory,
    server_of_policy,
)
from openmeter_wsgi.stats import Problem

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from openmeter_wsgi.delivery.queue import MemoryDelivery
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.spool.journal import SegmentFile, SegmentWriter
    from openmeter_wsgi.stats import Counts

logger: Final = log.get_logger(__name__)


#: Seconds between two times at which a lock is said to be in use.
TOUCH_INTERVAL = 3_600.0
#: A failure of the disk that is older than so many seconds is no longer reported: a
#: smaller event may have found room since.
_MOMENT = 60.0


class _Failing(NamedTuple):
    """Since when and until when the disk took none of so many events, and why."""

    since: float
    last: float
    events: int
    error: SpoolError


class SpoolWriter:
    """Appends the events of one process to its journal, which the first one opens.

    *moved_on* is called when a segment was full, or none was there. Where the disk
    takes nothing, what *new_overflow* makes takes the event, and it is counted; a
    process that does not deliver can only drop it. The form of the journal is the
    fastest that is safe in the directory; tests choose it.
    """

    def __init__(
        self,
        directory: Path,
        policy: Policy,
        counts: Counts,
        *,
        new_overflow: Callable[[str], MemoryDelivery],
        moved_on: Callable[[], None],
        segment_bytes: int = SEGMENT_BYTES,
        form: str | None = None,
    ) -> None:
        self._directory = directory
        self._policy = policy
        self._counts = counts
        self._new_overflow = new_overflow
        self._moved_on = moved_on
        self._segment_bytes = segment_bytes
        self._form = form
        #: Holds the journal. Another one after a close.
        self._slot: dict[str, Journal] = {}
        self._journal: Journal | SegmentWriter = CLOSED
        self._overflows: dict[str, MemoryDelivery] = {}
        self._failure = SpoolError("not tried yet")
        self._retry_at = 0.0
        self._failing: _Failing | None = None
        #: Sealed segments that are not delivered.
        self._kept = KeptSegments()
        #: Held by the thread that looks at them and puts back what is gone.
        self._looking = threading.Lock()
        #: The number of looks that found segments gone.
        self.losses: int = 0
        self._position: object = None
        self._touched_at = time.monotonic()

    def put(self, event: bytes) -> None:
        """Take *event*. Any thread; never raises, never waits for delivery."""
        try:
            self._journal.write(event + b"\n")
        except Exception:  # noqa: BLE001 - sealed, full, closed: all go on here
            self._put_slowly(event)

    def _put_slowly(self, event: bytes) -> None:
        try:
            self.look()
            self._append(event + b"\n")
        except RecordTooLarge as error:
            self._counts.dropped["too_large"] += 1
            logger.error("%s: %s; it is dropped", "an event is too large", error)
        except SpoolError as error:
            self._put_into_memory(event, error)
        except Exception as error:
            logger.exception(
                "%s: the spool failed; the event is sent from memory", "put"
            )
            self._put_into_memory(event, SpoolError(str(error)))
        else:
            if self._failing is not None:
                self._recovered()
        self._moved_on()

    def _append(self, line: bytes) -> None:
        while True:
            slot = self._slot
            try:
                self._opened(slot).append(line)
            except JournalClosed:
                if slot is self._slot:
                    self._slot = {}
            else:
                return

    def _opened(self, slot: dict[str, Journal]) -> Journal:
        journal = slot.get("journal")
        if journal is None:
            # Atomic, as nobody may wait here: of several journals one stays.
            made = self._new_journal()
            journal = slot.setdefault("journal", made)
            if journal is not made:
                made.close()
        if slot is self._slot:
            self._journal = journal
        return journal

    def _new_journal(self) -> Journal:
        if time.monotonic() < self._retry_at:
            raise self._failure
        try:
            return Journal(
                prepare_server_directory(
                    self._directory.parent, server_of_policy(self._policy)
                ),
                form=self._form or journal_form(self._directory),
                max_bytes=self._policy.max_spool_bytes,
                segment_bytes=self._segment_bytes,
                kept=self._kept,
            )
        except ConfigError as error:
            failure = SpoolError(str(error))
        except SpoolError as error:
            failure = error
        self._failure, self._retry_at = failure, time.monotonic() + RETRY_DELAY
        raise failure

    def _put_into_memory(self, event: bytes, error: SpoolError) -> None:
        reason = "spool_full" if isinstance(error, SpoolFull) else "spool_error"
        if self._policy.delivery == "ship":
            self._counts.dropped[reason] += 1
            self._note(error)
            logger.error(
                "%s: the spool takes no event; new ones are lost and counted as %s "
                "until it does",
                error, reason,
            )  # fmt: skip
            return
        self._counts.unspooled += 1
        self._note(error)
        logger.error(
            "%s: the spool takes no event; until it does, new ones are sent from "
            "memory and are lost if this process dies",
            error,
        )
        overflow = self.overflow or self._overflows.setdefault(
            "queue", self._new_overflow(reason)
        )
        overflow.put(event)

    def _note(self, error: SpoolError) -> None:
        now = time.monotonic()
        since, _, events, _ = self._failing or (now, now, 0, error)
        self._failing = _Failing(since, now, events + 1, error)

    def _recovered(self) -> None:
        failing, self._failing = self._failing, None
        if failing is not None:
            logger.warning(
                "%s: the spool takes events again after %.0f s, in which %d were %s",
                self._directory, time.monotonic() - failing.since, failing.events,
                self._fate, extra=log.OVER,
            )  # fmt: skip

    @property
    def _fate(self) -> str:
        return "lost" if self._policy.delivery == "ship" else "left to memory"

    @property
    def problem(self) -> Problem | None:
        """Why the disk took no event a moment ago, None if it did."""
        failing, now = self._failing, time.monotonic()
        if failing is None or now - failing.last > _MOMENT:
            return None
        loses = self._policy.delivery == "ship"
        return Problem(
            "spool_dropping" if loses else "spool_failing",
            f"the spool takes no event since {now - failing.since:.0f} s "
            f"({failing.error}); {failing.events} were {self._fate}",
            loses=loses,
        )

    @property
    def owner(self) -> str | None:
        """The owner in the names of this process's segments, None if it has none."""
        journal = self._slot.get("journal")
        return journal.owner if journal else None

    @property
    def overflow(self) -> MemoryDelivery | None:
        """The queue of the events that the disk did not take, None if it took all."""
        return self._overflows.get("queue")

    def prepare(self) -> None:
        """Make the segment that will be needed next.

        :raises SpoolError: if that is impossible now.
        """
        if journal := self._slot.get("journal"):
            with contextlib.suppress(JournalClosed):
                journal.prepare()
                if self._failing is not None:
                    self._recovered()

    # -- What somebody else may do to the directory

    def look(self) -> None:
        """Check that the segments are still in place, and put back what is gone.

        Any thread. Returns at once while another thread does this.
        """
        if self._looking.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._looking.release()

    def look_within(self, timeout: float | None) -> bool:
        """Do the same, but wait for a thread that does it; False at the timeout."""
        if not self._looking.acquire(timeout=-1 if timeout is None else timeout):
            return False
        try:
            self._look()
        finally:
            self._looking.release()
        return True

    def _look(self) -> None:
        journal = self._slot.get("journal")
        intact = journal is None or journal.is_intact
        if journal is not None and not intact:
            self._slot, self._journal = {}, CLOSED
            journal.close()
        lost = self._kept.take_lost()
        if lost:
            self.losses += 1
            self._put_back(lost)
        elif not intact:
            logger.error(
                "%s: the lock of this process was removed; it goes on in a new segment",
                self._directory,
            )

    def _put_back(self, lost: list[SegmentFile]) -> None:
        try:
            progress = load_progress(self._directory) or Progress()
        except OSError:
            progress = Progress()
        lines = [
            line.text
            for file in lost
            for line in file.lines()
            if not overlap(progress.done.get(file.key, []), line.start, line.end)
        ]
        logger.error(
            "%s: %d segments of this process were removed or replaced by somebody "
            "else; %d events in them that are not known to be delivered are put back",
            self._directory, len(lost), len(lines),
        )  # fmt: skip
        for line in lines:
            self.put(line)

    def has_moved(self) -> bool:
        """Return True if lines came since the last call, or may have to be put back."""
        journal = self._slot.get("journal")
        before, self._position = self._position, journal and journal.position
        return before != self._position or len(self._kept) > 0

    def rest(self) -> None:
        """Have the next put look around, and wake the maintenance."""
        self._journal = CLOSED

    def touch(self) -> None:
        """Say to a cleaner, once an hour, that the lock is in use."""
        journal, now = self._slot.get("journal"), time.monotonic()
        if journal is not None and now - self._touched_at > TOUCH_INTERVAL:
            self._touched_at = now
            journal.touch()

    def write_key_mark(self, mark: str) -> None:
        """Write into the lock of this process which key it uses."""
        if (journal := self._slot.get("journal")) is not None:
            journal.write_key_mark(mark)

    def close(self, timeout: float = 0) -> bool:
        """Give up what this process owns, and say if that was anything.

        A later event opens another journal. Waits up to *timeout* seconds for a
        thread that puts back what is gone.
        """
        self.look_within(timeout)
        slot, self._slot, self._journal = self._slot, {}, CLOSED
        journal = slot.get("journal")
        if journal is not None:
            journal.close()
        return journal is not None
