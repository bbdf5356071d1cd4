"""Segments, the files of a spool: their names, and how whole lines are read.

A segment holds events as JSON lines. The name says when it was made (ms), whose it
is, its number there and in which form it is written; ``.sealed`` at the end says
that its owner writes into it no more.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from openmeter_wsgi.ownership import UNFINISHED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Two of these are a process's minimum on the disk. More than the largest event.
SEGMENT_BYTES = 2 * 1024 * 1024

MAPPED, WRITTEN = "mapped", "written"
SEALED = ".sealed"
_CHUNK_BYTES = 256 * 1024
_NAME = re.compile(
    r"(\d{13,})-([0-9a-f]{24})-(\d{8,})\.(mapped|written)(\.sealed)?(\.new)?"
)


class SegmentName(NamedTuple):
    """What the name of a segment says."""

    made: int
    owner: str
    number: int
    form: str
    sealed: bool = False
    unfinished: bool = False

    @property
    def key(self) -> str:
        """The name as long as the segment lives, sealed or not."""
        return f"{self.made:013}-{self.owner}-{self.number:08}.{self.form}"

    def __str__(self) -> str:
        """Return the name of the file."""
        sealed, new = SEALED * self.sealed, UNFINISHED * self.unfinished
        return f"{self.key}{sealed}{new}"


def read_name(name: str) -> SegmentName | None:
    """Return what *name* says, None if it is no segment's."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    made, owner, number, form, sealed, new = match.groups()
    return SegmentName(int(made), owner, int(number), form, bool(sealed), bool(new))


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file of the spool; a symlink is none."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


class _Event(msgspec.Struct, gc=False):
    """What an event has at least."""

    id: str


_EVENTS = msgspec.json.Decoder(_Event)
#: What the first byte is where nothing was written. Most segments are quiet, and this
#: is all that is read of them.
_NOTHING = (b"", b"\0")
_ZEROS = bytes(64 * 1024)


class Piece(NamedTuple):
    """Bytes of a segment between two newlines, and where they are."""

    text: bytes
    start: int
    end: int


def live_text(fd: int, start: int, end: int | None = None) -> bytes:
    """Return the next whole lines of a segment that is being written.

    It stops at the first line that is not whole: the copy may be under way.
    """
    text, whole = _whole(fd, start, end)
    return text[:whole]


def final_text(fd: int, start: int, end: int | None = None) -> bytes:
    """Return the next lines of a segment that nobody writes any more.

    They may be anything. The last one may lack its newline. Nothing: that was all.
    """
    if os.pread(fd, 1, start) in _NOTHING and _is_empty(fd, start, end):
        return b""
    text = _read(fd, start, end)
    return text[: text.rfind(b"\n") + 1] or text


def read_live(fd: int, start: int, end: int | None = None) -> list[Piece]:
    """Return the pieces of `live_text`."""
    return list(pieces(live_text(fd, start, end), start))


def read_final(fd: int, start: int, end: int | None = None) -> list[Piece]:
    """Return the pieces of `final_text`."""
    return list(pieces(final_text(fd, start, end), start))


def pieces(text: bytes, start: int) -> Iterator[Piece]:
    """Split what was read at *start*. The last one may lack its newline."""
    at = 0
    while (newline := text.find(b"\n", at)) >= 0:
        yield Piece(text[at:newline], start + at, start + newline + 1)
        at = newline + 1
    if at < len(text):
        yield Piece(text[at:], start + at, start + len(text))


def whole_end(fd: int, start: int) -> int:
    """Return where the whole lines end that begin at *start*."""
    while whole := _whole(fd, start, None)[1]:
        start += whole
    return start


def is_event(line: bytes) -> bool:
    """Say whether a whole line is the JSON of an event."""
    if b"\0" in line:
        return False
    try:
        event = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(event, dict) and isinstance(event.get("id"), str)


def are_events(text: bytes, count: int) -> bool:
    """Say whether *text* is so many whole lines that are one `is_event` each.

    Between them may be empty ones. Where it says no, each has to be asked.
    """
    try:
        text.decode()  # what has no name in _Event is only passed over
        found = _EVENTS.decode_lines(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return len(found) == count  # so none is spread over two lines


def _whole(fd: int, start: int, end: int | None) -> tuple[bytes, int]:
    """Read on in a segment that is being written; say how much of it is whole lines."""
    if os.pread(fd, 1, start) in _NOTHING:
        return b"", 0
    # A hole ends what is read as well: the rest of a mapped file is nothing else.
    text = _read(fd, start, end, until=(b"\n", b"\0"))
    hole = text.find(b"\0")
    return text, text.rfind(b"\n", 0, None if hole < 0 else hole) + 1


def _is_empty(fd: int, start: int, end: int | None) -> bool:
    """Say whether there are zeros only."""
    while text := os.pread(fd, len(_ZEROS), start):
        text = text if end is None else text[: end - start]
        if text != _ZEROS[: len(text)]:
            return False
        start += len(text)
        if start == end:
            break
    return True


def _read(
    fd: int, start: int, end: int | None, until: tuple[bytes, ...] = (b"\n",)
) -> bytes:
    """Read on from *start* until one of *until* is in it, if there is one."""
    size = _CHUNK_BYTES
    while True:
        wanted = size if end is None else min(size, end - start)
        text = os.pread(fd, wanted, start)
        found = any(character in text for character in until)
        if found or len(text) < wanted or wanted < size:
            return text
        size *= 2
