"""Why events wait: what the sender of a spool was answered last."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

import msgspec

from openmeter_wsgi.lock import UNFINISHED
from openmeter_wsgi.spool.files import open_file

if TYPE_CHECKING:
    from pathlib import Path

NAME = "last_answer.json"
_MAX_BYTES = 10_000


class LastAnswer(msgspec.Struct, frozen=True):
    """An attempt that failed. The times are in seconds since 1970."""

    answer: str
    time: float
    next_attempt: float


def save(directory: Path, answer: str, *, next_in: float) -> None:
    """Keep what was answered just now, in place of an earlier answer.

    :raises OSError: if the directory cannot take it.
    """
    now = time.time()
    unfinished = directory / (NAME + UNFINISHED)
    with contextlib.suppress(FileNotFoundError):
        unfinished.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(unfinished, flags, 0o600), "wb") as file:
        file.write(msgspec.json.encode(LastAnswer(answer, now, now + next_in)) + b"\n")
    unfinished.rename(directory / NAME)


def forget(directory: Path) -> None:
    """Forget it: an attempt has succeeded."""
    with contextlib.suppress(OSError):
        (directory / NAME).unlink()


def load(directory: Path) -> LastAnswer | None:
    """Return the last answer, None if the last attempt has succeeded."""
    try:
        with open(open_file(directory / NAME), "rb") as file:
            return msgspec.json.decode(file.read(_MAX_BYTES), type=LastAnswer)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
