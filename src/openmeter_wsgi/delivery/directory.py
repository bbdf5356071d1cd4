"""The directory of a spool: whose it is, what is under it, if it can be trusted."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from pathlib import Path

from openmeter_wsgi.delivery.segment import MAPPED, WRITTEN, open_file
from openmeter_wsgi.errors import ConfigError

FORMAT = "format"
#: What a directory of this version says of itself.
VERSION = "openmeter_wsgi spool 1"

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


def journal_form(directory: Path, wanted: str) -> str:
    """Return the form in which to append there: ``"mapped"`` or ``"written"``."""
    if wanted != "auto":
        return MAPPED if wanted == "mmap" else WRITTEN
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
            file.write(VERSION + "\n")
        unfinished.rename(path)
        return
    with open(fd, "rb") as file:
        said = file.read(200).decode(errors="replace").strip()
    if said != VERSION:
        raise ConfigError(
            [f"spool_dir: expected {VERSION!r} in {str(path)!r}, got {said!r}"]
        )
