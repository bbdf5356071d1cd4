"""The append side of a spool: one live segment of one process."""

from __future__ import annotations

import errno
import itertools
import os
import time
from typing import TYPE_CHECKING

from openmeter_wsgi import log
from openmeter_wsgi.delivery.forms import Segment, make_segment
from openmeter_wsgi.delivery.segment import SEGMENT_BYTES, SegmentName, read_name
from openmeter_wsgi.errors import SpoolError, SpoolFull
from openmeter_wsgi.ownership import Owner

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = log.get_logger(__name__)

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: After a failure the disk is left alone for so many seconds.
RETRY_DELAY = 1.0
#: Closing waits so long for writers that are in the middle of a line.
_LEAVING_TIMEOUT = 5.0


class JournalClosed(Exception):
    """The journal was closed; another one takes the line."""


class RecordTooLarge(Exception):
    """No segment could hold the line."""


class _Closed:
    """The end of a chain of segments: whoever comes here has come too late."""

    quiet = True

    def __init__(self) -> None:
        self.links: dict[str, Segment] = {}

    def write(self, _: bytes) -> None:
        """Refuse a line."""
        raise JournalClosed

    def seal(self) -> None:
        """Refuse to go on."""
        raise JournalClosed

    def remove(self) -> None:
        """Refuse to go on."""
        raise JournalClosed


#: Stands for a journal that was not opened yet, too.
CLOSED: Segment = _Closed()


class Journal:
    """Appends the lines of one process to segments, one after the other.

    Any thread writes and none waits for another. Segments form a chain in which
    each link is set once: by `prepare`, beforehand, or else by a writer.

    :raises SpoolError: if the directory cannot take it now.
    """

    def __init__(
        self,
        directory: Path,
        *,
        form: str,
        max_bytes: int,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._directory = directory
        self._form = form
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._numbers = itertools.count(1)
        self._failure: SpoolError | None = None
        self._retry_at = 0.0
        try:
            self._owner = Owner.register(directory)
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._head: Segment = self._made()
        except SpoolError:
            self._owner.leave(nothing_left=True)
            raise
        #: Append one whole line. ValueError: `append` must do it.
        self.write: Callable[[bytes], object] = self._head.write

    @property
    def owner(self) -> str:
        """Whose name the segments bear."""
        return self._owner.token

    def append(self, line: bytes) -> None:
        """Append *line*, going to the next segment where that is needed.

        :raises RecordTooLarge: if no segment could hold it.
        :raises SpoolError: if there is no room, or no way to write.
        :raises JournalClosed: if it was closed.
        """
        if len(line) > self._segment_bytes:
            raise RecordTooLarge(
                f"an event of {len(line)} bytes, expected at most {self._segment_bytes}"
            )
        while True:
            segment = self._head
            try:
                segment.write(line)
            except ValueError:
                self._advance(segment)
            except OSError as error:
                segment.seal()
                raise self._failed(error) from error
            else:
                return

    @property
    def is_prepared(self) -> bool:
        """Whether the next segment is there."""
        return "next" in self._head.links

    def prepare(self) -> None:
        """Make the segment that will be needed next, if there is none yet.

        :raises SpoolError: if that is impossible now.
        """
        if not self.is_prepared:
            self._link(self._head)

    def close(self) -> None:
        """Seal, and give up what is owned: others may deliver and delete it."""
        segment = self._head
        segments = [segment]
        while (segment := segment.links.setdefault("next", CLOSED)) is not CLOSED:
            segments.append(segment)
        self._head, self.write = CLOSED, CLOSED.write
        for segment in segments:
            segment.seal()
        deadline = time.monotonic() + _LEAVING_TIMEOUT
        while not all(segment.quiet for segment in segments):
            # Not given up while somebody writes: it would be deleted under him.
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)
        self._owner.leave()

    def _advance(self, full: Segment) -> None:
        """Seal *full* and go on to what follows. Every writer may do so."""
        successor = full.links.get("next") or self._link(full)
        full.seal()
        if self._head is full:
            self._head = successor
            self.write = successor.write

    def _link(self, last: Segment) -> Segment:
        made = self._made()
        # Atomic: of several that come here together, one wins.
        winner = last.links.setdefault("next", made)
        if winner is not made:
            made.remove()
        return winner

    def _made(self) -> Segment:
        if self._failure is not None and time.monotonic() < self._retry_at:
            raise self._failure
        try:
            self._check_room()
            name = SegmentName(
                time.time_ns() // 1_000_000,
                self._owner.token,
                next(self._numbers),
                self._form,
            )
            segment = make_segment(self._directory, name, self._segment_bytes)
        except OSError as error:
            raise self._failed(error) from error
        self._failure = None
        return segment

    def _check_room(self) -> None:
        used = used_bytes(self._directory)
        if used + self._segment_bytes > self._max_bytes:
            raise OSError(
                errno.ENOSPC,
                f"max_spool_bytes is {self._max_bytes}, {used} are in use",
            )

    def _failed(self, error: OSError) -> SpoolError:
        self._retry_at = time.monotonic() + RETRY_DELAY
        kind = SpoolFull if error.errno in _NO_ROOM else SpoolError
        self._failure = kind(f"{self._directory}: {error}")
        return self._failure


def used_bytes(directory: Path) -> int:
    """Return the bytes that segments take, free room in live ones included."""
    used = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if read_name(entry.name):
                try:
                    used += entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:  # delivered and deleted meanwhile
                    continue
    return used
