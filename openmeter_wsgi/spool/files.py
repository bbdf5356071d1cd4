"""The files of a spool: the directory, the names of segments, and their lines.

A segment holds events as JSON lines. Its name consists of the time at which it was made
(ms), the owner, its number and its form: *mapped*, with zeros after the last line, or
*written*. The suffix ``.sealed`` means that the owner no longer writes into it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.lock import UNFINISHED

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Number of bytes of a segment: more than the largest event. A process has two or more.
SEGMENT_BYTES = 2 * 1024 * 1024

MAPPED, WRITTEN = "mapped", "written"
SEALED = ".sealed"
#: The file mode of a delivered segment, set just before it is deleted.
DELIVERED = 0o400
#: Number of bytes read by one call.
_CHUNK_BYTES = 256 * 1024
_NAME = re.compile(
    r"(\d{13,})-([0-9a-f]{24})-(\d{8,})\.(mapped|written)(\.sealed)?(\.new)?"
)


class SegmentName(NamedTuple):
    """The parts of the name of a segment."""

    #: Milliseconds since 1970.
    made: int
    owner: str
    number: int
    form: str
    sealed: bool = False
    #: True while the owner makes the file. It holds no event yet.
    being_made: bool = False

    @property
    def key(self) -> str:
        """The part of the name that never changes."""
        return f"{self.made:013}-{self.owner}-{self.number:08}.{self.form}"

    def __str__(self) -> str:
        """Return the name of the file."""
        sealed, new = SEALED * self.sealed, UNFINISHED * self.being_made
        return f"{self.key}{sealed}{new}"


def read_name(name: str) -> SegmentName | None:
    """Return the parts of a file name, None if it is not the name of a segment."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    made, owner, number, form, sealed, new = match.groups()
    return SegmentName(int(made), owner, int(number), form, bool(sealed), bool(new))


class NotAFile(OSError):
    """A directory, a pipe or a device that has the name of a file of the spool."""


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file of the spool without blocking; a symlink is refused.

    :raises NotAFile: if it is not a regular file.
    """
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotAFile(errno.EINVAL, "not a regular file", str(path))
    return fd


#: Maximum number of bytes of a document.
_MAX_DOCUMENT = 10_000
_D = TypeVar("_D")


def write_document(path: Path, document: object) -> None:
    """Write a small JSON document; it replaces an earlier one.

    :raises OSError: if the directory cannot take it.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    with contextlib.suppress(FileNotFoundError):
        unfinished.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(unfinished, flags, 0o600), "wb") as file:
        file.write(msgspec.json.encode(document) + b"\n")
    unfinished.rename(path)


def read_document(path: Path, kind: type[_D]) -> _D | None:
    """Return a small JSON document, None if it is missing or invalid."""
    try:
        with open(open_file(path), "rb") as file:
            return msgspec.json.decode(file.read(_MAX_DOCUMENT), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


class _Event(msgspec.Struct, gc=False):
    """The field that every event has."""

    id: str


_EVENTS = msgspec.json.Decoder(_Event)
#: The byte after the last line: none in a written segment, zero in a mapped one. Most
#: segments have no new lines, and only this byte is read.
_UNWRITTEN = (b"", b"\0")
_ZEROS = bytes(64 * 1024)


class Line(NamedTuple):
    """A line of a segment without its newline, and its range with the newline."""

    text: bytes
    start: int
    end: int


def read_live_text(fd: int, start: int, end: int | None = None) -> bytes:
    """Return the next whole lines of a segment that is being written.

    It stops at the first incomplete line, which another thread may be writing.
    """
    text, size = _read_live(fd, start, end)
    return text[:size]


def read_final_text(fd: int, start: int, end: int | None = None) -> bytes:
    """Return the next lines of a segment that no process writes any more.

    The lines may be damaged, and the last one may lack its newline. An empty text means
    the end.
    """
    if os.pread(fd, 1, start) in _UNWRITTEN and _is_all_zeros(fd, start, end):
        return b""
    text = _read_until(fd, start, end)
    return text[: text.rfind(b"\n") + 1] or text


def read_live(fd: int, start: int, end: int | None = None) -> list[Line]:
    """Return the lines of `read_live_text`."""
    return list(split_lines(read_live_text(fd, start, end), start))


def read_final(fd: int, start: int, end: int | None = None) -> list[Line]:
    """Return the lines of `read_final_text`."""
    return list(split_lines(read_final_text(fd, start, end), start))


def split_lines(text: bytes, start: int) -> Iterator[Line]:
    """Yield the lines of a text read at *start*. The last one may lack its newline."""
    at = 0
    while (newline := text.find(b"\n", at)) >= 0:
        yield Line(text[at:newline], start + at, start + newline + 1)
        at = newline + 1
    if at < len(text):
        yield Line(text[at:], start + at, start + len(text))


def whole_end(fd: int, start: int) -> int:
    """Return the end of the whole lines that begin at *start*."""
    while size := _read_live(fd, start, None)[1]:  # copies no lines
        start += size
    return start


def used_end(fd: int) -> int:
    """Return the offset after which a segment holds only zeros."""
    end = os.fstat(fd).st_size
    while end:
        start = max(end - _CHUNK_BYTES, 0)
        text = os.pread(fd, end - start, start).rstrip(b"\0")
        if text:
            return start + len(text)
        end = start
    return 0


def is_event(line: bytes) -> bool:
    """Return True if *line* is the JSON of an event."""
    if b"\0" in line:
        return False
    try:
        event = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(event, dict) and isinstance(event.get("id"), str)


def are_events(text: bytes, count: int) -> bool:
    """Return True if *text* has *count* lines, empty ones aside, and all are events.

    This quick check may also return False for valid events. Then check each line.
    """
    try:
        text.decode()  # msgspec does not decode the fields that are not in _Event
        events = _EVENTS.decode_lines(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return len(events) == count  # a different number: an event spans two lines


def _read_live(fd: int, start: int, end: int | None) -> tuple[bytes, int]:
    """Return the next text of a live segment, and the size of its whole lines."""
    if os.pread(fd, 1, start) in _UNWRITTEN:
        return b"", 0
    # A zero ends the text as well: the rest of a mapped file is zeros.
    text = _read_until(fd, start, end, until=(b"\n", b"\0"))
    zero = text.find(b"\0")
    return text, text.rfind(b"\n", 0, None if zero < 0 else zero) + 1


def _is_all_zeros(fd: int, start: int, end: int | None) -> bool:
    """Return True if the rest of a segment is zeros."""
    while text := os.pread(fd, len(_ZEROS), start):
        text = text if end is None else text[: end - start]
        if text != _ZEROS[: len(text)]:
            return False
        start += len(text)
        if start == end:
            break
    return True


def _read_until(
    fd: int, start: int, end: int | None, until: tuple[bytes, ...] = (b"\n",)
) -> bytes:
    """Return a text from *start* that contains one of *until*, unless *end* comes."""
    size = _CHUNK_BYTES
    while True:
        wanted = size if end is None else min(size, end - start)
        text = os.pread(fd, wanted, start)
        is_enough = any(character in text for character in until)
        if is_enough or len(text) < wanted or wanted < size:
            return text
        size *= 2


#: The name of a file with the format of the directory.
FORMAT = "format"
#: The format of a directory of this version.
FORMAT_VERSION = "openmeter_wsgi spool 1"

#: File systems where a write to a preallocated, mapped file cannot fail.
_MAPPABLE = {"ext2", "ext3", "ext4", "xfs", "tmpfs", "overlay"}
#: Network file systems: their locks and appends may fail between machines.
_REFUSED = ("nfs", "cifs", "smb", "fuse")
_MOUNTS = Path("/proc/self/mountinfo")


def prepare_directory(path: str, *, to_write: bool = True) -> Path:
    """Make the directory if it is missing, and check it.

    Without *to_write* it may be read-only.

    :raises ConfigError: if it cannot hold a spool, or other users can write into it.
    """
    directory = Path(os.path.abspath(path))  # not resolved: a symlink is refused
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        if problem := _problem(directory.lstat()):
            raise ConfigError([f"spool_dir: {path!r} {problem}"])
        kind = file_system(directory)
        if kind and kind.startswith(_REFUSED):
            raise ConfigError([f"spool_dir: {path!r} is on {kind}, where locks fail"])
        if to_write and not _is_writable(directory):
            raise ConfigError(
                [f"spool_dir: {path!r} cannot be written: no permission, or a "
                 "read-only disk"]
            )  # fmt: skip
        _check_format(directory)
    except OSError as error:
        raise ConfigError([f"spool_dir: {path!r}: {error.strerror}"]) from error
    return directory


def journal_form(directory: Path) -> str:
    """Return the fastest form of a journal that is safe in *directory*."""
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    safe = sys.platform == "linux" and gil and file_system(directory) in _MAPPABLE
    return MAPPED if safe else WRITTEN


def file_system(directory: Path) -> str | None:
    """Return the type of the file system, None if it is not known."""
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
        real = directory.resolve()
    except OSError:
        return None
    best: tuple[int, str | None] = (-1, None)
    for line in lines:
        fields, _, rest = line.partition(" - ")
        point = Path(_unescaped(fields.split()[4]))
        if real.is_relative_to(point) and len(point.parts) >= best[0]:
            best = (len(point.parts), rest.split()[0])  # the later mount is on top
    return best[1]


def _unescaped(field: str) -> str:
    """Return the name of a mount point, whose blanks are octal in the list."""
    for character in " \t\n\\":
        field = field.replace(f"\\{ord(character):03o}", character)
    return field


def _problem(status: os.stat_result) -> str | None:
    if not stat.S_ISDIR(status.st_mode):
        return "is no directory; a symlink is not followed"
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, expected {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.filemode(status.st_mode)
        return f"can be written by others ({mode}), expected mode 0700"
    return None


def _is_writable(directory: Path) -> bool:
    effective = os.access in os.supports_effective_ids
    return os.access(directory, os.W_OK | os.X_OK, effective_ids=effective)


def _check_format(directory: Path) -> None:
    path = directory / FORMAT
    try:
        fd = open_file(path)
    except FileNotFoundError:
        unfinished = directory / f"{FORMAT}.{secrets.token_hex(8)}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(unfinished, flags, 0o600), "w") as file:
            file.write(FORMAT_VERSION + "\n")
        unfinished.rename(path)
        return
    with open(fd, "rb") as file:
        version = file.read(200).decode(errors="replace").strip()
    if version != FORMAT_VERSION:
        raise ConfigError(
            [f"spool_dir: expected {FORMAT_VERSION!r} in {str(path)!r}, got "
             f"{version!r}"]
        )  # fmt: skip
