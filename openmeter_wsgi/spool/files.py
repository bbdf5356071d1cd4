"""The files of a spool: its directory, segments and their names, and their whole lines.

A segment holds events as JSON lines. The name says when it was made (ms), whose it
is, its number there and in which form it is written; ``.sealed`` at the end says
that its owner writes into it no more.
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

#: Two of these are a process's minimum on the disk. More than the largest event.
SEGMENT_BYTES = 2 * 1024 * 1024

MAPPED, WRITTEN = "mapped", "written"
SEALED = ".sealed"
#: The mode of a segment that was delivered, a moment before it is deleted.
DELIVERED = 0o400
_CHUNK_BYTES = 256 * 1024
_NAME = re.compile(
    r"(\d{13,})-([0-9a-f]{24})-(\d{8,})\.(mapped|written)(\.sealed)?(\.new)?"
)


class SegmentName(NamedTuple):
    """The parts of the name of a segment."""

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


class NoFile(OSError):
    """A directory, a pipe or a device has the name of a file of the spool."""


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file of the spool; a symlink is none.

    :raises NoFile: if it is no file, which to open could take for ever.
    """
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NoFile(errno.EINVAL, "this is no file", str(path))
    return fd


#: No document of a spool is longer.
_MAX_DOCUMENT = 10_000
_D = TypeVar("_D")


def write_document(path: Path, document: object) -> None:
    """Write a small JSON document in place of an earlier one.

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
    """Return a small JSON document, None if there is none that can be read."""
    try:
        with open(open_file(path), "rb") as file:
            return msgspec.json.decode(file.read(_MAX_DOCUMENT), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


class _Event(msgspec.Struct, gc=False):
    """The fields that every event has."""

    id: str


_EVENTS = msgspec.json.Decoder(_Event)
#: The first byte of an unwritten place. Most segments are quiet, and only this byte of
#: them is read.
_NOTHING = (b"", b"\0")
_ZEROS = bytes(64 * 1024)


class Line(NamedTuple):
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


def read_live(fd: int, start: int, end: int | None = None) -> list[Line]:
    """Return the pieces of `live_text`."""
    return list(split_lines(live_text(fd, start, end), start))


def read_final(fd: int, start: int, end: int | None = None) -> list[Line]:
    """Return the pieces of `final_text`."""
    return list(split_lines(final_text(fd, start, end), start))


def split_lines(text: bytes, start: int) -> Iterator[Line]:
    """Split what was read at *start*. The last one may lack its newline."""
    at = 0
    while (newline := text.find(b"\n", at)) >= 0:
        yield Line(text[at:newline], start + at, start + newline + 1)
        at = newline + 1
    if at < len(text):
        yield Line(text[at:], start + at, start + len(text))


def whole_end(fd: int, start: int) -> int:
    """Return where the whole lines end that begin at *start*."""
    while whole := _whole(fd, start, None)[1]:
        start += whole
    return start


def used_end(fd: int) -> int:
    """Return where a segment holds nothing but zeros up to its end."""
    end = os.fstat(fd).st_size
    while end:
        start = max(end - _CHUNK_BYTES, 0)
        text = os.pread(fd, end - start, start).rstrip(b"\0")
        if text:
            return start + len(text)
        end = start
    return 0


def is_event(line: bytes) -> bool:
    """Return True if a whole line is the JSON of an event."""
    if b"\0" in line:
        return False
    try:
        event = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(event, dict) and isinstance(event.get("id"), str)


def are_events(text: bytes, count: int) -> bool:
    """Return True if *text* is so many whole lines that are one `is_event` each.

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
    """Return True if there are zeros only."""
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


FORMAT = "format"
#: The format of a directory of this version.
FORMAT_VERSION = "openmeter_wsgi spool 1"

#: A full disk shows when a file is allocated, and a mapped page stays what it is.
_MAPPABLE = {"ext2", "ext3", "ext4", "xfs", "tmpfs", "overlay"}
#: Locks or appends are not those of one machine there.
_REFUSED = ("nfs", "cifs", "smb", "fuse")
_MOUNTS = Path("/proc/self/mountinfo")


def prepare_directory(path: str, *, to_write: bool = True) -> Path:
    """Make the directory where there is none, and check it.

    One that is only looked into need not be *to_write*.

    :raises ConfigError: if it cannot hold a spool, or others could write into it.
    """
    directory = Path(os.path.abspath(path))  # not resolved: a symlink is refused
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        if problem := _problem(directory.lstat()):
            raise ConfigError([f"spool_dir: {path!r} {problem}"])
        if refused := _refused(file_system(directory)):
            raise ConfigError(
                [f"spool_dir: {path!r} is on {refused}, where locks fail"]
            )
        if to_write and not _is_writable(directory):
            raise ConfigError(
                [f"spool_dir: {path!r} cannot be written: no permission, or a disk "
                 "that is read-only"]
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
    """Return the type of the file system, None where that cannot be known."""
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
    """Return a mount point as it is called; blanks are octal in the list."""
    for character in " \t\n\\":
        field = field.replace(f"\\{ord(character):03o}", character)
    return field


def _refused(kind: str | None) -> str | None:
    return kind if kind and kind.startswith(_REFUSED) else None


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
        said = file.read(200).decode(errors="replace").strip()
    if said != FORMAT_VERSION:
        raise ConfigError(
            [f"spool_dir: expected {FORMAT_VERSION!r} in {str(path)!r}, got {said!r}"]
        )
