"""Files of dead letters and of unreadable bytes, for operators to inspect.

A dead letter is an event that is never sent again: OpenMeter refuses it for good, or it
is too old to be sent twice. Unreadable bytes are damaged lines of a segment.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import TYPE_CHECKING, Final

import msgspec

from openmeter_wsgi import log

if TYPE_CHECKING:
    from pathlib import Path

    from openmeter_wsgi.errors import DeliveryError
    from openmeter_wsgi.stats import Counts

logger: Final = log.get_logger(__name__)

DEAD_LETTERS = "dead-letters.jsonl"
UNREADABLE = "unreadable.jsonl"
#: Maximum number of bytes of each file.
MAX_BYTES = 64 * 1024 * 1024


class DeadLetters:
    """The dead letters and unreadable bytes of a directory. Belongs to its sender.

    A line without room in its file is counted and lost.
    """

    def __init__(
        self, directory: Path, counts: Counts, max_bytes: int = MAX_BYTES
    ) -> None:
        self._directory = directory
        self._counts = counts
        self._max_bytes = max_bytes

    def add_event(self, event: bytes, error: DeliveryError) -> None:
        """Append *event* with the reason why it is not sent again."""
        letter = {
            "event": _document(event),
            "reason": error.reason,
            "status": error.status,
            "time": _now(),
        }
        self._append(DEAD_LETTERS, letter)

    def add_unreadable(self, text: bytes, segment: str, offset: int) -> None:
        """Append bytes of a segment that are no event; runs of NULs become one NUL."""
        text = text.rstrip(b"\0")
        self._counts.dropped["unreadable"] += 1
        logger.error(
            "%s: %d bytes at offset %d are no event; they are kept in %s and not sent",
            segment, len(text), offset, UNREADABLE,
        )  # fmt: skip
        readable = re.sub(rb"\0+", b"\0", text).decode(errors="backslashreplace")
        self._append(
            UNREADABLE,
            {"segment": segment, "offset": offset, "text": readable, "time": _now()},
        )

    def _append(self, name: str, document: dict[str, object]) -> None:
        line = msgspec.json.encode(document) + b"\n"
        path = self._directory / name
        try:
            fd = _open(path)
            try:
                if os.fstat(fd).st_size + len(line) > self._max_bytes:
                    raise OSError(f"{name} has reached {self._max_bytes} bytes")
                if os.write(fd, line) != len(line):
                    raise OSError("no room for all of a line")
                with contextlib.suppress(OSError):  # the line is written anyway
                    os.fdatasync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            self._counts.dropped["dead_letters_full"] += 1
            logger.error("%s: %s; one line is lost", path, error)


def _open(path: Path) -> int:
    """Open or create a file; a symlink is refused."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def _document(event: bytes) -> object:
    try:
        return msgspec.json.decode(event)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return event.decode(errors="backslashreplace")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
