"""The progress file: the delivered lines of a spool, and the batch in flight.

The file of it has two places of the same size, and each holds all of it as a line of
JSON, with a number and a checksum; the higher number is the newer. One is written over
while the other stays, so a write that a crash cuts short costs nothing but itself. The
room is made once: from then on bringing it on the disk is one block, and waits neither
for the file system's journal nor for what else is written.
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
#: Of so many batches in flight it is remembered how old they are.
_SEEN = 100
#: A page: no process that is killed leaves half of one.
_PLACE_BYTES = 4_096
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class InFlightBatch(msgspec.Struct):
    """Lines of one batch that was posted and not answered."""

    #: The wall clock's time before the first such attempt, in seconds.
    since: float
    #: The bytes of each segment, by its key.
    lines: dict[str, Ranges]


class Progress(msgspec.Struct):
    """The content of one place of the file."""

    #: The lines of each segment that are delivered or set aside, by its key.
    done: dict[str, Ranges] = {}
    in_flight: list[InFlightBatch] = msgspec.field(default_factory=list, name="doubts")
    #: Of how many writes this one is the last.
    number: int = 0


class _Line(msgspec.Struct):
    """The form in which it is written."""

    progress: msgspec.Raw
    checksum: int


def load_progress(directory: Path) -> Progress | None:
    """Return the content of the file, None if it cannot be read.

    :raises OSError: if there is one that cannot be opened.
    """
    try:
        text = (directory / PROGRESS_NAME).read_bytes()
    except FileNotFoundError:
        return Progress()
    return max(_valid(text), key=lambda found: found.number, default=None)


def recover(directory: Path) -> Progress:
    """Return the content of the file; an unreadable file gets another name.

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
    """Writes the progress of a directory. Belongs to its sender, for one turn."""

    def __init__(self, directory: Path, number: int) -> None:
        self._directory = directory
        self._number = number
        #: The file that this object has made, held open: each call to the system is
        #: another wait where an application computes.
        self._fd: int | None = None
        self._place_bytes = 0
        #: The place of the last write that is known to be on the disk.
        self._kept = 0

    def save(self, progress: Progress, *, lasting: bool) -> None:
        """Write it down; *lasting*: so that it survives a loss of power, too.

        Without that it survives the death of every process.

        :raises OSError: if there is no room, no permission.
        """
        progress.number = self._number = self._number + 1
        text = _encoded(progress)
        if len(text) >= self._place_bytes or not self._is_there:
            self._make(text)
            return
        # Never over what is known to be on the disk: this may be torn on its way.
        place = 1 - self._kept
        fd = self._fd
        assert fd is not None  # noqa: S101 - `_is_there` has seen it
        _write(fd, text.ljust(self._place_bytes - 1) + b"\n", place)
        if lasting and is_synced(fd):
            self._kept = place

    @property
    def _is_there(self) -> bool:
        """True if the file is still what others read: somebody may have deleted it."""
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
        """Replace the file by one in which *text* has room to grow."""
        size = _PLACE_BYTES
        while size < 2 * len(text):
            size *= 2
        path = self._directory / PROGRESS_NAME
        unfinished = path.with_name(PROGRESS_NAME + ".new")
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
        fd = os.open(unfinished, _NEW_FILE, 0o600)
        try:
            _write(fd, text.ljust(size - 1) + b"\n" + b"\n".rjust(size), 0)
            is_synced(fd)
            unfinished.rename(path)
            sync_directory(self._directory)
        except BaseException:
            os.close(fd)
            self.close()  # it may be another file's by now that has the name
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
        self.close()
        self._fd, self._place_bytes, self._kept = fd, size, 0


def is_synced(fd: int) -> bool:
    """Bring a file on the disk, and say whether the disk has done it.

    A disk that fails costs what a loss of power would: what was written is there for
    every process, and is counted as written.
    """
    try:
        os.fdatasync(fd)
    except OSError as error:
        logger.error(
            "%s: the disk has not kept what was written to the spool; until it does, a "
            "loss of power costs more than one flush_interval",
            error,
        )
        return False
    return True


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory on the disk.

    :raises OSError: if that is impossible.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _encoded(progress: Progress) -> bytes:
    raw = msgspec.json.encode(progress)
    return msgspec.json.encode(_Line(msgspec.Raw(raw), zlib.crc32(raw)))


def _write(fd: int, text: bytes, place: int) -> None:
    if os.pwrite(fd, text, place * len(text)) != len(text):
        raise OSError("no room for all of the progress")


def _valid(text: bytes) -> list[Progress]:
    found = []
    for line in text.split(b"\n"):
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            read = msgspec.json.decode(line, type=_Line)
            if zlib.crc32(read.progress) == read.checksum:
                found.append(msgspec.json.decode(read.progress, type=Progress))
    return found


class InFlight:
    """The lines that may have been sent, with the time of the first attempt."""

    def __init__(self) -> None:
        self._by_moment: dict[float, InFlightBatch] = {}

    @property
    def known(self) -> list[InFlightBatch]:
        """All of them."""
        return list(self._by_moment.values())

    def since(self, runs: Iterable[ByteRange]) -> float | None:
        """Return when the first of *runs* may have been sent, None if none was."""
        moments = (
            batch.since
            for run in runs
            for batch in self._by_moment.values()
            if number_ranges.overlap(batch.lines.get(run.key, []), run.start, run.end)
        )
        return min(moments, default=None)

    def add(self, runs: Iterable[ByteRange], since: float) -> None:
        """Note that *runs* are sent at that moment."""
        batch = self._by_moment.setdefault(since, InFlightBatch(since, {}))
        for run in runs:
            places = batch.lines.setdefault(run.key, [])
            number_ranges.add(places, run.start, run.end)

    def forget(self, runs: Iterable[ByteRange]) -> None:
        """Note that *runs* have arrived, or have not."""
        for run in runs:
            key = run.key
            for batch in self._by_moment.values():
                if places := batch.lines.pop(key, None):
                    left = number_ranges.subtract(places, run.start, run.end)
                    batch.lines.update({key: left} if left else {})
        self._by_moment = {k: v for k, v in self._by_moment.items() if v.lines}


class Recorder(Protocol):
    """Keeps the in-flight record of a spool."""

    def in_flight_since(self, batch: SpoolBatch) -> float | None:
        """Return the time of the first attempt that may have arrived, or None."""

    def record(self, batch: SpoolBatch, since: float) -> None:
        """Write down that *batch* is about to be sent."""

    def withdraw(self, batch: SpoolBatch) -> None:
        """Write down that *batch* has certainly not arrived."""

    def check(self) -> None:
        """Go on only as the sender.

        :raises Deposed: if another one has taken its place.
        """


class RecordingClient:
    """Writes down which batch is in flight before it sends it.

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
        #: The age of each batch in flight when it was first seen, and that moment: to
        #: set the clock must not expire a batch.
        self._seen: dict[float, tuple[float, float]] = {}

    def ingest(self, batch: SpoolBatch, /) -> None:
        """Send *batch* as the client does.

        :raises Expired: if it has been in flight for too long.
        """
        self._spool.check()
        now = self._clock()
        since = self._spool.in_flight_since(batch)
        if since is not None and (age := self._age(since, now)) > self._resend_window:
            raise Expired(
                f"expired: a batch got no answer {age:.0f} s ago; sent again "
                "it might be billed twice"
            )
        if since is None:
            self._spool.record(batch, now)
            self._age(now, now)
        try:
            self._client.ingest(batch)
        except DeliveryError as error:
            self._spool.check()
            if since is None and not error.ambiguous:
                self._spool.withdraw(batch)
            raise
        self._spool.check()

    def _age(self, since: float, now: float) -> float:
        """Return for how long a batch is in flight that is so *since* then."""
        monotonic = self._monotonic()
        if since not in self._seen:
            self._seen = dict(list(self._seen.items())[-_SEEN:])
            self._seen[since] = (now - since, monotonic)
        age, seen_at = self._seen[since]
        return age + monotonic - seen_at
