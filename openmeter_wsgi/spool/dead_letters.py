"""Files of events that will never be delivered, for somebody to read."""

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
#: A file that has grown to this many bytes takes no more.
MAX_BYTES = 64 * 1024 * 1024


class DeadLetters:
    """Events that OpenMeter refuses for good, and bytes that are no events.

    Belongs to the sender of the directory. What finds no room is counted and lost.
    """

    def __init__(
        self, directory: Path, counts: Counts, max_bytes: int = MAX_BYTES
    ) -> None:
        self._directory = directory
        self._counts = counts
        self._max_bytes = max_bytes

    def bury(self, event: bytes, error: DeliveryError) -> None:
        """Keep *event* with the reason why it is not sent again."""
        kept = {
            "event": _document(event),
            "reason": error.reason,
            "status": error.status,
            "time": _now(),
        }
        self._append(DEAD_LETTERS, kept)

    def set_aside(self, text: bytes, segment: str, offset: int) -> None:
        """Keep bytes of a segment that are no event; runs of NULs become one."""
        text = text.rstrip(b"\0")
        self._counts.dropped["unreadable"] += 1
        logger.error(
            "%s: %d bytes at %d are no event; set aside in %s",
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
                with contextlib.suppress(OSError):  # it is written all the same
                    os.fdatasync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            self._counts.dropped["dead_letters_full"] += 1
            logger.error("%s: %s; one line is lost", path, error)


def _open(path: Path) -> int:
    """Open or make a file of our own; a symlink is none."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def _document(event: bytes) -> object:
    try:
        return msgspec.json.decode(event)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return event.decode(errors="backslashreplace")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
