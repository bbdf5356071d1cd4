"""How far a spool is delivered, and which batch is in doubt: one file.

It is replaced as a whole, by a rename, before a batch is posted and after the
answer. So what a batch took from many segments is done all at once or not at all.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from openmeter_wsgi import log

if TYPE_CHECKING:
    from pathlib import Path

logger = log.get_logger(__name__)

NAME = "progress.json"
#: From where to where, in bytes; sorted, apart.
Ranges: TypeAlias = list[tuple[int, int]]


class Doubt(msgspec.Struct):
    """Lines of one batch that was posted and not answered."""

    #: The wall clock's time before the first such attempt, in seconds.
    since: float
    #: The bytes of each segment, by its key.
    lines: dict[str, Ranges]


class Progress(msgspec.Struct):
    """What the file holds."""

    #: What is delivered or set aside of each segment, by its key.
    done: dict[str, Ranges] = {}
    doubts: list[Doubt] = []


def load(directory: Path) -> Progress | None:
    """Return what the file says, None if it cannot be read.

    :raises OSError: if there is one that cannot be opened.
    """
    try:
        text = (directory / NAME).read_bytes()
    except FileNotFoundError:
        return Progress()
    try:
        return msgspec.json.decode(text, type=Progress)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def recover(directory: Path) -> Progress:
    """Return what the file says; what cannot be read is put under another name.

    :raises OSError: as `load` does.
    """
    loaded = load(directory)
    if loaded is None:
        path = directory / NAME
        logger.error("%s: cannot be read; what is in the spool is sent again", path)
        path.rename(path.with_name(f"{NAME}.{time.time_ns()}.unreadable"))
    return loaded or Progress()


def save(directory: Path, progress: Progress) -> None:
    """Replace the file.

    :raises OSError: if there is no room, no permission.
    """
    path = directory / NAME
    unfinished = path.with_name(NAME + ".new")
    with contextlib.suppress(FileNotFoundError):
        unfinished.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(unfinished, flags, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(msgspec.json.encode(progress))
            file.flush()
            os.fsync(fd)
        unfinished.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def add(ranges: Ranges, start: int, end: int) -> None:
    """Add a range to sorted ones, joining those that touch."""
    at = len(ranges)
    while at and ranges[at - 1][1] >= start:
        at -= 1
    after = at
    while after < len(ranges) and ranges[after][0] <= end:
        start = min(start, ranges[after][0])
        end = max(end, ranges[after][1])
        after += 1
    ranges[at:after] = [(start, end)]


def first_gap(ranges: Ranges) -> int:
    """Return up to where all is done, from the beginning."""
    return ranges[0][1] if ranges and ranges[0][0] == 0 else 0


def subtract(ranges: Ranges, start: int, end: int) -> Ranges:
    """Return *ranges* without what is from *start* to *end*."""
    left: Ranges = []
    for low, high in ranges:
        if low < start:
            left.append((low, min(high, start)))
        if high > end:
            left.append((max(low, end), high))
    return [(low, high) for low, high in left if low < high]
