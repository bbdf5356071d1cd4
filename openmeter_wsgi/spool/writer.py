"""The write side of a spool: events go into the journal, or into memory on failure.

`SpoolWriter.put` appends an event to the current segment with one call. If that fails,
the slow path opens the journal, goes to the next segment, or passes the event to the
overflow, a delivery from memory.
"""

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


#: Seconds after which the modification time of a lock in use is renewed.
TOUCH_INTERVAL = 3_600.0
#: Seconds for which the last failure of the disk is reported. Later, a smaller event
#: may have found room.
_REPORT_TIME = 60.0


class _FailurePeriod(NamedTuple):
    """A period in which the disk took no event, with the number of these events."""

    since: float
    last: float
    events: int
    error: SpoolError


class SpoolWriter:
    """The writer of one process's events. The first event opens the journal.

    *request_segment* is called when the next segment must be prepared. If the disk
    takes no event, the delivery that *new_overflow* makes takes it, and it is counted.
    With ``delivery="ship"`` it can only be dropped. The *form* of the journal is the
    fastest safe one; tests choose it.
    """

    def __init__(
        self,
        directory: Path,
        policy: Policy,
        counts: Counts,
        *,
        new_overflow: Callable[[str], MemoryDelivery],
        request_segment: Callable[[], None],
        segment_bytes: int = SEGMENT_BYTES,
        form: str | None = None,
    ) -> None:
        self._directory = directory
        self._policy = policy
        self._counts = counts
        self._new_overflow = new_overflow
        self._request_segment = request_segment
        self._segment_bytes = segment_bytes
        self._form = form
        #: The journal under "journal", a dictionary because `setdefault` is atomic.
        #: A close replaces the dictionary.
        self._slot: dict[str, Journal] = {}
        #: The target of the fast path. `CLOSED` sends the next `put` on the slow path.
        self._journal: Journal | SegmentWriter = CLOSED
        #: The overflow under "queue", in a dictionary for the same reason.
        self._overflows: dict[str, MemoryDelivery] = {}
        #: The last error of opening the journal, repeated until `_retry_at`.
        self._open_error = SpoolError("not tried yet")
        self._retry_at = 0.0
        self._failures: _FailurePeriod | None = None
        #: Sealed segments that are not known to be delivered.
        self._kept = KeptSegments()
        #: Held by the thread that checks the files.
        self._check_lock = threading.Lock()
        #: The number of checks that found segments removed.
        self.losses: int = 0
        self._last_position: object = None
        self._touched_at = time.monotonic()

    def put(self, event: bytes) -> None:
        """Take *event*. Any thread; never raises, never waits for delivery."""
        try:
            self._journal.write(event + b"\n")
        except Exception:  # noqa: BLE001 - sealed, full, closed or failed
            self._put_slowly(event)

    def _put_slowly(self, event: bytes) -> None:
        try:
            self.check_files()
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
            if self._failures is not None:
                self._log_recovery()
        self._request_segment()

    def _append(self, line: bytes) -> None:
        while True:
            slot = self._slot
            try:
                self._open_journal(slot).append(line)
            except JournalClosed:
                if slot is self._slot:
                    self._slot = {}
            else:
                return

    def _open_journal(self, slot: dict[str, Journal]) -> Journal:
        journal = slot.get("journal")
        if journal is None:
            # No lock: of several journals made at once, the first one stays.
            made = self._new_journal()
            journal = slot.setdefault("journal", made)
            if journal is not made:
                made.close()
        if slot is self._slot:
            self._journal = journal
        return journal

    def _new_journal(self) -> Journal:
        if time.monotonic() < self._retry_at:
            raise self._open_error
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
        self._open_error, self._retry_at = failure, time.monotonic() + RETRY_DELAY
        raise failure

    def _put_into_memory(self, event: bytes, error: SpoolError) -> None:
        reason = "spool_full" if isinstance(error, SpoolFull) else "spool_error"
        if self._policy.delivery == "ship":
            self._counts.dropped[reason] += 1
            self._note_failure(error)
            logger.error(
                "%s: the spool takes no event; new events are lost and counted as %s "
                "until it does",
                error, reason,
            )  # fmt: skip
            return
        self._counts.unspooled += 1
        self._note_failure(error)
        logger.error(
            "%s: the spool takes no event; until it does, new events are sent from "
            "memory and are lost if this process dies",
            error,
        )
        overflow = self.overflow or self._overflows.setdefault(
            "queue", self._new_overflow(reason)
        )
        overflow.put(event)

    def _note_failure(self, error: SpoolError) -> None:
        now = time.monotonic()
        since, _, events, _ = self._failures or (now, now, 0, error)
        self._failures = _FailurePeriod(since, now, events + 1, error)

    def _log_recovery(self) -> None:
        failures, self._failures = self._failures, None
        if failures is not None:
            logger.warning(
                "%s: the spool takes events again after %.0f s, in which %d events "
                "were %s",
                self._directory, time.monotonic() - failures.since, failures.events,
                self._fate, extra=log.OVER,
            )  # fmt: skip

    @property
    def _fate(self) -> str:
        return "lost" if self._policy.delivery == "ship" else "put into memory"

    @property
    def problem(self) -> Problem | None:
        """The problem of a disk that took no event a moment ago, or None."""
        failures, now = self._failures, time.monotonic()
        if failures is None or now - failures.last > _REPORT_TIME:
            return None
        loses = self._policy.delivery == "ship"
        return Problem(
            "spool_dropping" if loses else "spool_failing",
            f"the spool has taken no event for {now - failures.since:.0f} s "
            f"({failures.error}); {failures.events} events were {self._fate}",
            loses=loses,
        )

    @property
    def owner(self) -> str | None:
        """The owner in the names of this process's segments, None without a journal."""
        journal = self._slot.get("journal")
        return journal.owner if journal else None

    @property
    def overflow(self) -> MemoryDelivery | None:
        """The delivery of events that the disk did not take, None if it took all."""
        return self._overflows.get("queue")

    def prepare(self) -> None:
        """Make the next segment.

        :raises SpoolError: if that is impossible now.
        """
        if journal := self._slot.get("journal"):
            with contextlib.suppress(JournalClosed):
                journal.prepare()
                if self._failures is not None:
                    self._log_recovery()

    # -- Files that are removed by others

    def check_files(self) -> None:
        """Check that the segments are in place; put back the events of removed ones.

        Any thread. Returns at once while another thread checks.
        """
        if self._check_lock.acquire(blocking=False):
            try:
                self._check_files()
            finally:
                self._check_lock.release()

    def check_files_within(self, timeout: float | None) -> bool:
        """Wait for the check of another thread, then check; False on timeout."""
        if not self._check_lock.acquire(timeout=-1 if timeout is None else timeout):
            return False
        try:
            self._check_files()
        finally:
            self._check_lock.release()
        return True

    def _check_files(self) -> None:
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
                "%s: the lock of this process was removed; all events are kept, and "
                "new events go into a new segment",
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
            "%s: %d segments of this process were removed or replaced from outside; "
            "%d events in them that are not known to be delivered are put back",
            self._directory, len(lost), len(lines),
        )  # fmt: skip
        for line in lines:
            self.put(line)

    def is_active(self) -> bool:
        """Return True if events came since the last call or are in sealed segments."""
        journal = self._slot.get("journal")
        before, self._last_position = self._last_position, journal and journal.position
        return before != self._last_position or len(self._kept) > 0

    def make_next_put_slow(self) -> None:
        """Make the next `put` check the files and wake the maintenance thread."""
        self._journal = CLOSED

    def touch(self) -> None:
        """Renew the time of the lock once an hour, so that no cleaner removes it."""
        journal, now = self._slot.get("journal"), time.monotonic()
        if journal is not None and now - self._touched_at > TOUCH_INTERVAL:
            self._touched_at = now
            journal.touch()

    def write_key_mark(self, mark: str) -> None:
        """Write the *mark* of the API key into the lock file of this process."""
        if (journal := self._slot.get("journal")) is not None:
            journal.write_key_mark(mark)

    def close(self, timeout: float = 0) -> bool:
        """Close the journal; return False if there was none.

        A later event opens another journal. Waits up to *timeout* seconds for a thread
        that checks the files.
        """
        self.check_files_within(timeout)
        slot, self._slot, self._journal = self._slot, {}, CLOSED
        journal = slot.get("journal")
        if journal is not None:
            journal.close()
        return journal is not None
