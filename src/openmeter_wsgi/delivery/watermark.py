"""Up to which moment all is delivered: what the ledger asks of a queue.

A mark is a moment, and how much had been put by then. Once all of that is delivered,
or set aside for good, everything that was put before that moment is. So no event
needs to be looked into, and none can mislead by a time of its own.
"""

from __future__ import annotations

import contextlib
import operator
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from openmeter_wsgi.delivery import progress, ranges
from openmeter_wsgi.delivery.segment import read_name
from openmeter_wsgi.ownership import UNFINISHED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: Its time of modification is the watermark: it is set, and read, in one call.
NAME = "delivered_until"
#: Seconds between two marks.
INTERVAL = 0.25
#: More marks than this are thinned out; the watermark then moves in larger steps.
_MAX_MARKS = 512

_Put = TypeVar("_Put")


class Marks(Generic[_Put]):
    """The marks that are not reached yet, the oldest first. One thread at a time.

    Each stands on the one before it: *join* makes one of two that follow each other.
    """

    def __init__(
        self, join: Callable[[_Put, _Put], _Put] = lambda _, newer: newer
    ) -> None:
        self._join = join
        self._marks: deque[tuple[float, _Put]] = deque()
        self._reached = 0.0
        #: Seconds between two of them at least: longer, the longer none is reached.
        self._spacing = 0.0

    def add(self, moment: float, put: _Put) -> bool:
        """Remember how much was *put* by *moment* (wall clock); say if it is."""
        marks = self._marks
        if marks and marks[-1][1] == put:
            marks.pop()  # nothing came since
        elif marks and 0 <= moment - marks[-1][0] < self._spacing:
            return False
        marks.append((moment, put))
        if len(marks) > _MAX_MARKS:
            self._thin_out()
        return True

    def renew(self, moment: float, nothing: _Put) -> None:
        """Remember that nothing was put since the last mark, or since all were."""
        put = self._marks.pop()[1] if self._marks else nothing
        self._marks.append((moment, put))

    def _thin_out(self) -> None:
        first, *others = self._marks
        pairs = zip(others[::2], others[1::2], strict=False)
        joined = [(b[0], self._join(a[1], b[1])) for a, b in pairs]
        self._marks = deque([first, *joined, *others[len(joined) * 2 :]])
        self._spacing = 2 * abs(self._marks[-1][0] - first[0]) / _MAX_MARKS

    def reached(self, is_done: Callable[[_Put], bool]) -> float:
        """Return the newest moment by which all that was put is done."""
        while self._marks and is_done(self._marks[0][1]):
            self._reached = self._marks.popleft()[0]
        if not self._marks:
            self._spacing = 0.0
        return self._reached


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
        self._due_at = time.monotonic() + INTERVAL
        return time.time()

    def publish(self, moment: float, ends: dict[str, int]) -> None:
        """Publish how far all is delivered.

        *ends* says where the lines of each segment end, by its key, and was found
        out after *moment*.

        :raises OSError: if the directory does not take it.
        """
        self._mark(moment, ends)
        # In this order: a segment is deleted after it is done.
        there = {
            name.key for e in os.listdir(self._directory) if (name := read_name(e))
        }
        loaded = progress.load(self._directory)
        done = loaded.done if loaded else {}

        def is_done(ends: dict[str, int]) -> bool:
            return all(
                key not in there or ranges.first_gap(done.get(key, [])) >= end
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
            self._marks.renew(moment, {})
        elif self._marks.add(moment, new):
            self._marked = ends


def read(directory: Path) -> float:
    """Return the watermark of a spool, 0.0 if there is none."""
    try:
        return (directory / NAME).stat().st_mtime
    except OSError:
        return 0.0


def _write(directory: Path, until: float) -> None:
    path = directory / NAME
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, (until, until))
        return
    # Under its name it never has the time at which it was made.
    unfinished = path.with_name(NAME + UNFINISHED)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(unfinished, flags, 0o600))
    os.utime(unfinished, (until, until))
    unfinished.rename(path)
