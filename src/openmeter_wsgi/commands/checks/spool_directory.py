"""The directory of the spool."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from openmeter_wsgi.commands import old_events
from openmeter_wsgi.commands.checks.findings import failure, ok, unknown, warning
from openmeter_wsgi.commands.locks import holder
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.lock import ELECTION
from openmeter_wsgi.spool.files import file_system, prepare_directory
from openmeter_wsgi.spool.watermark import backlog

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.checks.findings import Finding, Situation

_NAME = "spool directory"
_ROOT = Path("/")
_MEMORY = ("tmpfs", "ramfs")
_REMEDY = (
    "set spool_dir to a directory of the application's own, mode 0700, on a local file "
    "system"
)


def look_at_spool(situation: Situation) -> Iterator[Finding]:
    """Say whether the spool can be where it shall be, and whether it stays there."""
    path = situation.policy.spool_dir
    if path is None:
        yield ok(_NAME, "none: usage waits in memory and a killed process loses it")
        return
    directory = Path(os.path.abspath(path))
    finding = _directory(directory)
    yield finding
    if finding.severity == "ok":
        situation.spool = directory
        yield from _look_for_sender(situation, directory)
        yield from _look_for_old_events(directory)
    existing = directory if directory.exists() else directory.parent
    if existing.exists():
        yield from _look_beneath(existing)


def _look_for_sender(situation: Situation, directory: Path) -> Iterator[Finding]:
    if situation.policy.delivery != "ship":
        return
    name = "sender of the spool"
    if holder(directory / ELECTION) is None:
        yield warning(
            name,
            "delivery='ship' leaves it to another process, and none is there: usage "
            "waits in the spool",
            f"run openmeter-wsgi ship --spool-dir {directory}",
        )
    else:
        yield ok(name, "there is one")


def _look_for_old_events(directory: Path) -> Iterator[Finding]:
    if problem := old_events.oldest(backlog(directory).oldest_at):
        yield warning("age of the spool", problem, old_events.REMEDY)


def _directory(directory: Path) -> Finding:
    if not os.path.lexists(directory):
        # Not made here: it would belong to whoever runs this.
        return _absent(directory)
    owner = directory.lstat().st_uid
    if owner != os.geteuid():
        return failure(
            _NAME,
            f"{directory} belongs to user {owner}, this runs as {os.geteuid()}",
            "run this and the application as one user, who owns the directory",
        )
    try:
        prepare_directory(str(directory))
        _try_to_write(directory)
    except ConfigError as error:
        return failure(_NAME, str(error).removeprefix("spool_dir: "), _REMEDY)
    except OSError as error:
        return failure(
            _NAME,
            f"{directory} takes no file: {error.strerror}",
            "let the application's user write there, and see that the disk has room",
        )
    return ok(_NAME, f"{directory} on {file_system(directory) or 'a file system'}")


def _absent(directory: Path) -> Finding:
    if directory.parent.is_dir():
        return unknown(
            _NAME,
            f"{directory} is not there yet; the application makes it at its start",
            "check again when the application has run",
        )
    return failure(
        _NAME,
        f"{directory} cannot be made, {directory.parent} is no directory",
        f"make {directory.parent}, writable for the application's user",
    )


def _try_to_write(directory: Path) -> None:
    path = directory / f"check.{secrets.token_hex(8)}.new"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, b"\n")
    finally:
        os.close(fd)
        path.unlink()


def _look_beneath(directory: Path) -> Iterator[Finding]:
    name, kind = "spool volume", file_system(directory)
    if is_on_layer(directory, _ROOT):
        yield warning(
            name,
            f"{directory} is in the container itself: the next deployment deletes it, "
            "with all that is not delivered",
            "mount a volume there that outlives the container",
        )
    elif kind in _MEMORY:
        yield warning(
            name,
            f"{directory} is in memory ({kind}) and gone when the machine restarts",
            "set spool_dir to a directory on a disk",
        )
    else:
        yield ok(name, f"{directory} is not on a container's own layer")


def is_on_layer(directory: Path, root: Path) -> bool:
    """Say whether *directory* is on the writable layer of a container.

    Of an overlay *root* it is, unless something is mounted in between.
    """
    same = directory.stat().st_dev == root.stat().st_dev
    return same and file_system(root) == "overlay"
