"""The progress file: the done lines of a spool, and the batches in flight.

A batch is *in flight* from the moment before its request until the answer. If the
sender dies in between, the next sender knows that the batch may have arrived.

The file has two slots of the same size. Each holds the whole progress as one line of
JSON with a number and a checksum, and the higher number is newer. A write replaces one
slot and keeps the other, so a crash in the middle loses that write only. The file never
grows: a sync writes one block, and waits neither for the journal of the file system nor
for other files.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.delivery import number_ranges
from openmeter_wsgi.delivery.number_ranges import Ranges  # noqa: TC001 - of a Struct
from openmeter_wsgi.errors import DeliveryError, Expired

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from openmeter_wsgi.delivery.sender import Client
    from openmeter_wsgi.spool.batches import ByteRange, SpoolBatch

logger: Final = log.get_logger(__name__)

PROGRESS_NAME = "progress.jsonl"
#: Maximum number of batches in flight whose age is remembered.
_MAX_AGES = 100
#: Minimum number of bytes of a slot: a page, which a killed process writes whole.
_SLOT_BYTES = 4_096
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class InFlightBatch(msgspec.Struct):
    """The lines of one batch that was sent and not answered."""

    #: The time (wall clock, seconds) before the first such attempt.
    since: float
    #: The byte ranges of each segment, by its key.
    lines: dict[str, Ranges]


class Progress(msgspec.Struct):
    """The content of one slot of the file."""

    #: The ranges of each segment that are delivered, dead letters or set aside.
    done: dict[str, Ranges] = {}
    in_flight: list[InFlightBatch] = msgspec.field(default_factory=list, name="doubts")
    #: The number of this write.
    number: int = 0


class _Line(msgspec.Struct):
    """The line of a slot."""

    progress: msgspec.Raw
    checksum: int


def load_progress(directory: Path) -> Progress | None:
    """Return the progress in the file, None if no slot is valid.

    :raises OSError: if the file exists and cannot be opened.
    """
    try:
        text = (directory / PROGRESS_NAME).read_bytes()
    except FileNotFoundError:
        return Progress()
    return max(_valid_slots(text), key=lambda slot: slot.number, default=None)


def recover(directory: Path) -> Progress:
    """Return the progress in the file; an invalid file is renamed.

    :raises OSError: as `load_progress` does.
    """
    loaded = load_progress(directory)
    if loaded is None:
        path = directory / PROGRESS_NAME
        logger.error(
            "%s: cannot be read; all events in the spool are sent again",
            path,
        )
        path.rename(path.with_name(f"{PROGRESS_NAME}.{time.time_ns()}.unreadable"))
    return loaded or Progress()


class ProgressFile:
    """The progress file of a directory, for writing. Belongs to its sender's turn."""

    def __init__(self, directory: Path, number: int) -> None:
        self._directory = directory
        self._number = number
        #: The file that this object has made. It stays open: each system call lets
        #: busy threads of the application go first.
        self._fd: int | None = None
        self._slot_bytes = 0
        #: The slot of the last write that was synced.
        self._synced_slot = 0

    def save(self, progress: Progress, *, lasting: bool) -> None:
        """Write *progress*; if *lasting*, so that it survives a loss of power.

        Otherwise it survives the death of every process.

        :raises OSError: if there is no room or no permission.
        """
        progress.number = self._number = self._number + 1
        text = _encode(progress)
        if len(text) >= self._slot_bytes or not self._is_in_place:
            self._make(text)
            return
        # Keep the slot that is on the disk: a loss of power may tear this write.
        slot = 1 - self._synced_slot
        fd = self._fd
        assert fd is not None  # noqa: S101 - `_is_in_place` has checked it
        _write(fd, text.ljust(self._slot_bytes - 1) + b"\n", slot)
        if lasting and try_sync(fd):
            self._synced_slot = slot

    @property
    def _is_in_place(self) -> bool:
        """True if the file still has its name: a cleaner may have deleted it."""
        if self._fd is None:
            return False
        try:
            status = (self._directory / PROGRESS_NAME).stat(follow_symlinks=False)
            return os.path.samestat(os.fstat(self._fd), status)
        except OSError:
            return False

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    __del__ = close

    def _make(self, text: bytes) -> None:
        """Replace the file by one whose slots leave *text* room to grow."""
        size = _SLOT_BYTES
        while size < 2 * len(text):
            size *= 2
        path = self._directory / PROGRESS_NAME
        unfinished = path.with_name(PROGRESS_NAME + ".new")
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
        fd = os.open(unfinished, _NEW_FILE, 0o600)
        try:
            _write(fd, text.ljust(size - 1) + b"\n" + b"\n".rjust(size), 0)
            try_sync(fd)
            unfinished.rename(path)
            sync_directory(self._directory)
        except BaseException:
            os.close(fd)
            self.close()  # the new file may already have the name
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
        self.close()
        self._fd, self._slot_bytes, self._synced_slot = fd, size, 0


def try_sync(fd: int) -> bool:
    """Sync a file to the disk; return False if the disk failed.

    After a failure all processes still read the new content, and it counts as written.
    Only a loss of power would lose it.
    """
    try:
        os.fdatasync(fd)
    except OSError as error:
        logger.error(
            "%s: the disk could not sync a file of the spool; all events are kept, but "
            "until it can, a loss of power loses more than one flush_interval",
            error,
        )
        return False
    return True


def sync_directory(directory: Path) -> None:
    """Sync the file names of a directory to the disk.

    :raises OSError: if that is impossible.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _encode(progress: Progress) -> bytes:
    raw = msgspec.json.encode(progress)
    return msgspec.json.encode(_Line(msgspec.Raw(raw), zlib.crc32(raw)))


def _write(fd: int, text: bytes, slot: int) -> None:
    if os.pwrite(fd, text, slot * len(text)) != len(text):
        raise OSError("no room for all of the progress")


def _valid_slots(text: bytes) -> list[Progress]:
    slots = []
    for line in text.split(b"\n"):
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            slot = msgspec.json.decode(line, type=_Line)
            if zlib.crc32(slot.progress) == slot.checksum:
                slots.append(msgspec.json.decode(slot.progress, type=Progress))
    return slots


class InFlight:
    """The lines that may have been sent, with the time of the first attempt."""

    def __init__(self) -> None:
        self._by_time: dict[float, InFlightBatch] = {}

    @property
    def batches(self) -> list[InFlightBatch]:
        """The batches in flight."""
        return list(self._by_time.values())

    def since(self, ranges: Iterable[ByteRange]) -> float | None:
        """Return the time of the first attempt with any of *ranges*, or None."""
        times = (
            batch.since
            for key, start, end in ranges
            for batch in self._by_time.values()
            if number_ranges.overlap(batch.lines.get(key, []), start, end)
        )
        return min(times, default=None)

    def add(self, ranges: Iterable[ByteRange], since: float) -> None:
        """Record that *ranges* are about to be sent, at the time *since*."""
        batch = self._by_time.setdefault(since, InFlightBatch(since, {}))
        for key, start, end in ranges:
            number_ranges.add(batch.lines.setdefault(key, []), start, end)

    def forget(self, ranges: Iterable[ByteRange]) -> None:
        """Record that *ranges* are not in flight any more."""
        for key, start, end in ranges:
            for batch in self._by_time.values():
                if lines := batch.lines.pop(key, None):
                    left = number_ranges.subtract(lines, start, end)
                    batch.lines.update({key: left} if left else {})
        self._by_time = {k: v for k, v in self._by_time.items() if v.lines}


class Recorder(Protocol):
    """The part of a spool that keeps the record of batches in flight."""

    def in_flight_since(self, batch: SpoolBatch) -> float | None:
        """Return the time of the first attempt that may have arrived, or None."""

    def record(self, batch: SpoolBatch, since: float) -> None:
        """Write to the progress file that *batch* is about to be sent."""

    def withdraw(self, batch: SpoolBatch) -> None:
        """Write to the progress file that *batch* has certainly not arrived."""

    def check_is_sender(self) -> None:
        """Raise an error unless this process is still the sender.

        :raises Deposed: if another sender may have taken its place.
        """


class RecordingClient:
    """A client that records each batch as in flight before it sends the batch.

    A batch whose first ambiguous attempt is longer ago than *resend_window* seconds
    is not sent again: OpenMeter may have forgotten its ids.
    """

    def __init__(
        self,
        client: Client[SpoolBatch],
        spool: Recorder,
        *,
        resend_window: float,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._spool = spool
        self._resend_window = resend_window
        self._clock = clock
        self._monotonic = monotonic
        #: The age of each batch in flight when it was first seen, and the time then
        #: (monotonic clock). So a change of the wall clock expires no batch.
        self._ages: dict[float, tuple[float, float]] = {}

    def ingest(self, batch: SpoolBatch, /) -> None:
        """Send *batch* with the client.

        :raises Expired: if *batch* has been in flight for too long.
        """
        self._spool.check_is_sender()
        now = self._clock()
        since = self._spool.in_flight_since(batch)
        if since is not None and (age := self._age(since, now)) > self._resend_window:
            raise Expired(
                f"expired: a batch got no answer or a 5xx {age:.0f} s ago; sent again "
                "it might be billed twice"
            )
        if since is None:
            self._spool.record(batch, now)
            self._age(now, now)
        try:
            self._client.ingest(batch)
        except DeliveryError as error:
            self._spool.check_is_sender()
            if since is None and not error.ambiguous:
                self._spool.withdraw(batch)
            raise
        self._spool.check_is_sender()

    def _age(self, since: float, now: float) -> float:
        """Return the seconds for which a batch has been in flight."""
        monotonic = self._monotonic()
        if since not in self._ages:
            self._ages = dict(list(self._ages.items())[-_MAX_AGES:])
            self._ages[since] = (now - since, monotonic)
        age, seen_at = self._ages[since]
        return age + monotonic - seen_at
