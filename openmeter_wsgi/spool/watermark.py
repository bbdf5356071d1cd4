"""The watermark and the backlog of a spool, as every process sees them.

The watermark says up to which moment all is delivered: what a local quota asks. The
backlog is what is not delivered yet.
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

#: Its time of modification is the watermark: it is set, and read, in one call.
WATERMARK_NAME = "delivered_until"
#: Seconds between two marks.
WATERMARK_INTERVAL = 0.25


class Watermark:
    """The watermark of a spool, as its sender's process publishes it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        #: Of each mark what is new in it: all of it each time would be much where
        #: much waits.
        self._marks: Marks[dict[str, int]] = Marks(join=operator.or_)
        self._marked: dict[str, int] = {}
        self._due_at = 0.0

    def begin_look(self) -> float | None:
        """Return the moment of a mark to be made now, None if none is due."""
        if time.monotonic() < self._due_at:
            return None
        self._due_at = time.monotonic() + WATERMARK_INTERVAL
        return time.time()

    def publish(self, moment: float, ends: dict[str, int]) -> None:
        """Publish the moment up to which all is delivered.

        *ends* says where the lines of each segment end, by its key, and was found
        out after *moment*.

        :raises OSError: if the directory does not take it.
        """
        self._mark(moment, ends)
        # In this order: a segment is deleted after it is done.
        there = {
            name.key for e in os.listdir(self._directory) if (name := read_name(e))
        }
        loaded = progress.load_progress(self._directory)
        done = loaded.done if loaded else {}

        def is_done(ends: dict[str, int]) -> bool:
            return all(
                key not in there or number_ranges.first_gap(done.get(key, [])) >= end
                for key, end in ends.items()
            )

        until = self._marks.reached(is_done)
        known = read(self._directory)
        # It stands in the future where the clock was put back.
        if until and (until > known or known > moment):
            _write(self._directory, until)

    def _mark(self, moment: float, ends: dict[str, int]) -> None:
        known = self._marked
        new = {key: end for key, end in ends.items() if known.get(key) != end}
        if not new:
            self._marks.move_last(moment, {})
        elif self._marks.add(moment, new):
            self._marked = ends


def read(directory: Path) -> float:
    """Return the watermark of a spool, 0.0 if there is none."""
    try:
        return (directory / WATERMARK_NAME).stat().st_mtime
    except OSError:
        return 0.0


def _write(directory: Path, until: float) -> None:
    path = directory / WATERMARK_NAME
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, (until, until))
        return
    # Under its name it never has the time at which it was made.
    unfinished = path.with_name(WATERMARK_NAME + UNFINISHED)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(unfinished, flags, 0o600))
    os.utime(unfinished, (until, until))
    unfinished.rename(path)


#: So many bytes are counted exactly; of more, the number of events is estimated.
_COUNTED_BYTES = 16 * 1024 * 1024
_TYPICAL_EVENT = 250
#: So many bytes are counted by one call: each keeps all other threads waiting.
_BLOCK_BYTES = 64 * 1024
#: An event that is longer is not asked for its time.
_FIRST_LINE = 65_536
#: Seconds between two looks; nothing wakes one process when another delivers.
_INTERVAL = 0.02


def ends(directory: Path, owner: str | None = None) -> dict[str, int]:
    """Return the end of the whole lines in each segment, of one owner or of all."""
    found: dict[str, int] = {}
    done = _done(directory)
    for name in _names(directory):
        if owner in {None, name.owner}:
            start = number_ranges.first_gap(done.get(name.key, []))
            if (fd := _opened(directory, name)) is not None:
                with open(fd, "rb", buffering=0):
                    found[name.key] = whole_end(fd, start)
    return {key: end for key, end in found.items() if end}


def all_done(directory: Path, ends: dict[str, int]) -> bool:
    """Return True if all segments are delivered as far as *ends* says."""
    if not ends:
        return True
    # In this order: a segment is deleted after it is done.
    there = {name.key for name in _names(directory)}
    done = _done(directory)
    return all(
        key not in there or number_ranges.first_gap(done.get(key, [])) >= end
        for key, end in ends.items()
    )


def wait_until_done(
    directory: Path, ends: dict[str, int], timeout: float | None
) -> bool:
    """Wait for `all_done`, and say whether it came within *timeout*."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while not all_done(directory, ends):
        if deadline is not None and time.monotonic() >= deadline:
            return False
        time.sleep(_INTERVAL)
    return True


def backlog(directory: Path) -> Backlog:
    """Return the undelivered events; an estimate if there are many."""
    done = _done(directory)
    events = counted = rest = 0
    moments: list[float] = []
    for name in _names(directory):
        places = done.get(name.key, [])
        if (fd := _opened(directory, name)) is None:
            continue
        with open(fd, "rb", buffering=0):
            size = os.fstat(fd).st_size
            first = number_ranges.first_gap(places)
            moments += _moments(os.pread(fd, _FIRST_LINE, first))
            if counted > _COUNTED_BYTES:
                rest += size - first
                continue
            start = 0
            for low, high in [*places, (size, size)]:
                for at in range(start, low, _BLOCK_BYTES):
                    # With one byte more: what is counted may lie across the border.
                    text = os.pread(fd, min(low - at, _BLOCK_BYTES + 1), at)
                    # A form writes a newline before each line as well as after it.
                    events += text.count(b"}\n")
                    counted += len(text[:_BLOCK_BYTES].rstrip(b"\0"))
                start = high
    per_event = counted / events if events else _TYPICAL_EVENT
    return Backlog(
        events + round(rest / per_event), counted + rest, min(moments, default=None)
    )


def _moments(text: bytes) -> list[float]:
    """Return the time of the first event in *text*, if there is one."""
    line, newline, _ = text.lstrip(b"\n").partition(b"\n")
    moment = moment_of(line) if newline else None
    return [] if moment is None else [moment]


def _names(directory: Path) -> list[SegmentName]:
    try:
        entries = os.listdir(directory)
    except OSError:
        return []
    names = [name for entry in entries if (name := read_name(entry))]
    return sorted(name for name in names if not name.unfinished)


def _done(directory: Path) -> dict[str, Ranges]:
    try:
        loaded = progress.load_progress(directory)
    except OSError:
        return {}
    return loaded.done if loaded else {}


def _opened(directory: Path, name: SegmentName) -> int | None:
    for path in (name, name._replace(sealed=True)):
        try:
            return open_file(directory / str(path))
        except OSError:  # sealed or deleted meanwhile
            continue
    return None
