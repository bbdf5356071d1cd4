"""The watermark and the backlog of a directory, which every process can read.

The watermark is the time before which each event is done. Local quotas use it. The
backlog is the number, size and age of the events that are not done. Both follow from
the segments and the progress file.
"""

from __future__ import annotations

import contextlib
import operator
import os
import time
from typing import TYPE_CHECKING

from openmeter_wsgi.delivery import number_ranges
from openmeter_wsgi.delivery.number_ranges import Marks
from openmeter_wsgi.delivery.queue import Backlog
from openmeter_wsgi.lock import UNFINISHED
from openmeter_wsgi.spool import progress
from openmeter_wsgi.spool.files import (
    SegmentName,
    open_file,
    read_name,
    whole_end,
)
from openmeter_wsgi.values import moment_of

if TYPE_CHECKING:
    from pathlib import Path

    from openmeter_wsgi.delivery.number_ranges import Ranges

#: A file whose modification time is the watermark: one call writes or reads it.
WATERMARK_NAME = "delivered_until"
#: Seconds between two marks.
WATERMARK_INTERVAL = 0.25


class Watermark:
    """The watermark of a directory, which the process of its sender publishes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        #: Each mark has only the ends that differ from the mark before, which saves
        #: memory if many segments wait.
        self._marks: Marks[dict[str, int]] = Marks(join=operator.or_)
        #: All ends at the last mark.
        self._marked: dict[str, int] = {}
        self._due_at = 0.0

    def begin_mark(self) -> float | None:
        """Return the time of a mark to be made now, None if none is due."""
        if time.monotonic() < self._due_at:
            return None
        self._due_at = time.monotonic() + WATERMARK_INTERVAL
        return time.time()

    def publish(self, moment: float, ends: dict[str, int]) -> None:
        """Add a mark of *moment*, and write the newest reached mark as the watermark.

        *ends* has the end of the lines in each segment, by its key. It must have been
        read after *moment*.

        :raises OSError: if the directory does not take it.
        """
        self._mark(moment, ends)
        # Names before progress: a segment that is gone by now was done before.
        keys = {name.key for e in os.listdir(self._directory) if (name := read_name(e))}
        loaded = progress.load_progress(self._directory)
        done = loaded.done if loaded else {}
        until = self._marks.reached(lambda marked: _are_done(marked, keys, done))
        published = read(self._directory)
        # A watermark in the future: the clock was set back.
        if until and (until > published or published > moment):
            _write(self._directory, until)

    def _mark(self, moment: float, ends: dict[str, int]) -> None:
        marked = self._marked
        new = {key: end for key, end in ends.items() if marked.get(key) != end}
        if not new:
            self._marks.move_last(moment, {})
        elif self._marks.add(moment, new):
            self._marked = ends


def read(directory: Path) -> float:
    """Return the watermark of a directory, 0.0 without one."""
    try:
        return (directory / WATERMARK_NAME).stat().st_mtime
    except OSError:
        return 0.0


def _write(directory: Path, until: float) -> None:
    path = directory / WATERMARK_NAME
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, (until, until))
        return
    # Set the time before the name: the time of creation is not a watermark.
    unfinished = path.with_name(WATERMARK_NAME + UNFINISHED)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(unfinished, flags, 0o600))
    os.utime(unfinished, (until, until))
    unfinished.rename(path)


#: Number of bytes after which the number of further events is estimated.
_COUNTED_BYTES = 16 * 1024 * 1024
#: Bytes of a typical event.
_TYPICAL_EVENT = 250
#: Number of bytes counted by one C call, which blocks all other threads.
_BLOCK_BYTES = 64 * 1024
#: Maximum number of bytes of an event whose time is read.
_FIRST_LINE = 65_536
#: Seconds between two checks whether another process has delivered.
_CHECK_INTERVAL = 0.02


def ends(directory: Path, owner: str | None = None) -> dict[str, int]:
    """Return the end of the whole lines in each segment, of one owner or of all."""
    by_key: dict[str, int] = {}
    done = _done(directory)
    for name in _names(directory):
        if owner in {None, name.owner}:
            start = number_ranges.first_gap(done.get(name.key, []))
            if (fd := _open_segment(directory, name)) is not None:
                with open(fd, "rb", buffering=0):
                    by_key[name.key] = whole_end(fd, start)
    return {key: end for key, end in by_key.items() if end}


def all_done(directory: Path, ends: dict[str, int]) -> bool:
    """Return True if each segment is done up to its end in *ends*."""
    if not ends:
        return True
    # Names before progress: a segment that is gone by now was done before.
    keys = {name.key for name in _names(directory)}
    return _are_done(ends, keys, _done(directory))


def _are_done(ends: dict[str, int], keys: set[str], done: dict[str, Ranges]) -> bool:
    """Return True if each segment is deleted, or done up to its end in *ends*."""
    return all(
        key not in keys or number_ranges.first_gap(done.get(key, [])) >= end
        for key, end in ends.items()
    )


def wait_until_done(
    directory: Path, ends: dict[str, int], timeout: float | None
) -> bool:
    """Wait for `all_done`; return False on timeout."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while not all_done(directory, ends):
        if deadline is not None and time.monotonic() >= deadline:
            return False
        time.sleep(_CHECK_INTERVAL)
    return True


def backlog(directory: Path) -> Backlog:
    """Return the backlog of a directory; a large number of events is an estimate."""
    done = _done(directory)
    events = counted_bytes = other_bytes = 0
    times: list[float] = []
    for name in _names(directory):
        ranges = done.get(name.key, [])
        if (fd := _open_segment(directory, name)) is None:
            continue
        with open(fd, "rb", buffering=0):
            size = os.fstat(fd).st_size
            first = number_ranges.first_gap(ranges)
            times += _first_time(os.pread(fd, _FIRST_LINE, first))
            if counted_bytes > _COUNTED_BYTES:
                other_bytes += size - first
                continue
            start = 0
            for low, high in [*ranges, (size, size)]:
                for at in range(start, low, _BLOCK_BYTES):
                    # One byte more: the pattern may lie across the end of a block.
                    text = os.pread(fd, min(low - at, _BLOCK_BYTES + 1), at)
                    # Not b"\n": one form writes a newline before each line, too.
                    events += text.count(b"}\n")
                    counted_bytes += len(text[:_BLOCK_BYTES].rstrip(b"\0"))
                start = high
    bytes_per_event = counted_bytes / events if events else _TYPICAL_EVENT
    return Backlog(
        events + round(other_bytes / bytes_per_event),
        counted_bytes + other_bytes,
        min(times, default=None),
    )


def _first_time(text: bytes) -> list[float]:
    """Return the time of the first event in *text*, or an empty list."""
    line, newline, _ = text.lstrip(b"\n").partition(b"\n")
    moment = moment_of(line) if newline else None
    return [] if moment is None else [moment]


def _names(directory: Path) -> list[SegmentName]:
    try:
        entries = os.listdir(directory)
    except OSError:
        return []
    names = [name for entry in entries if (name := read_name(entry))]
    return sorted(name for name in names if not name.being_made)


def _done(directory: Path) -> dict[str, Ranges]:
    try:
        loaded = progress.load_progress(directory)
    except OSError:
        return {}
    return loaded.done if loaded else {}


def _open_segment(directory: Path, name: SegmentName) -> int | None:
    for path in (name, name._replace(sealed=True)):
        try:
            return open_file(directory / str(path))
        except OSError:  # sealed or deleted meanwhile
            continue
    return None
