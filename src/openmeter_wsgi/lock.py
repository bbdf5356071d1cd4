"""Locks that end with their process, however it ends.

POSIX locks (`lockf`): a forked child does not inherit them, so it cannot keep its
dead parent's segments from being adopted, as with `flock` it would. Their price:
closing *any* descriptor of a locked file drops the lock of the whole process. So
no process ever opens a lock file again that it holds. Process ids say nothing:
containers share volumes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import threading
import time
from typing import TYPE_CHECKING, Self

from openmeter_wsgi.threads import threads_are_greenlets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK = ".lock"
ELECTION = "sender.lock"
#: Follows the name of a file that is being made.
UNFINISHED = ".new"
_OWNER = re.compile(r"([0-9a-f]{24})\.lock(\.new)?")
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

#: Seconds between two tries where the kernel does not let us wait.
_RETRY_INTERVAL = 1.0

#: The owners that live in a process, by its id: their files are never opened.
_held: set[tuple[int, str]] = set()
#: Per process and directory: within a process a POSIX lock keeps nobody out.
_elections: dict[tuple[int, int, int], threading.Lock] = {}


class SegmentLock:
    """The identity of one journal, alive as long as its process keeps it."""

    def __init__(self, directory: Path, token: str, fd: int) -> None:
        self.token = token
        self._path = directory / (token + LOCK)
        self._fd = fd

    @classmethod
    def register(cls, directory: Path, token: str | None = None) -> Self:
        """Make a new owner; *token*, if given, must be one of `new_token`.

        The file appears under its name only when it is locked: nobody can take it
        for that of a dead one.

        :raises OSError: if the directory cannot take it.
        """
        given = token
        while True:
            token = given or new_token()
            path = directory / (token + LOCK)
            unfinished = path.with_name(path.name + UNFINISHED)
            _held.add((os.getpid(), token))
            fd = os.open(unfinished, _NEW_FILE, 0o600)
            if _locked(fd, unfinished):
                unfinished.rename(path)
                return cls(directory, token, fd)
            os.close(fd)  # somebody was tidying up at this very moment

    def leave(self, *, nothing_left: bool = False) -> None:
        """Give up what is owned; its segments can be adopted from now on."""
        if nothing_left:
            self._path.unlink(missing_ok=True)
        os.close(self._fd)
        _held.discard((os.getpid(), self.token))


def new_token() -> str:
    """Return a name that no other owner has, on any host."""
    return secrets.token_hex(12)


def owner_of_lock(name: str) -> str | None:
    """Return whose lock the file *name* is, None if it is none."""
    match = _OWNER.fullmatch(name)
    return match and match[1]


def is_alive(directory: Path, token: str) -> bool:
    """Say whether an owner lives, and if not, that is for ever."""
    if (os.getpid(), token) in _held:
        return True
    with _try_lock(directory / (token + LOCK)) as was_free:
        return not was_free


def remove_lock(path: Path) -> None:
    """Delete the lock file of a dead owner, finished or not."""
    token = owner_of_lock(path.name)
    if (os.getpid(), token) in _held:
        return
    with _try_lock(path) as was_free:
        if was_free:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def election(directory: Path, *, wait: bool = True) -> Iterator[bool]:
    """Be the one sender of *directory*, as soon as there is no other.

    Waiting costs nothing: the kernel wakes the next one when the holder dies.
    Without *wait* it yields False where there is another.

    :raises OSError: if the lock file cannot be opened.
    """
    status = directory.stat()
    key = (os.getpid(), status.st_dev, status.st_ino)
    within = _elections.setdefault(key, threading.Lock())
    if not within.acquire(blocking=wait):
        yield False
        return
    try:
        with _election_lock(directory / ELECTION, wait=wait) as won:
            yield won
    finally:
        within.release()


@contextlib.contextmanager
def _election_lock(path: Path, *, wait: bool) -> Iterator[bool]:
    fd = -1
    try:
        while True:
            fd = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            won = _locked(fd, path, wait=wait)
            if won or not wait:
                break
            os.close(fd)  # it was deleted meanwhile; another one has its place
        yield won
    finally:
        if fd >= 0:
            os.close(fd)


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Lock the file if nobody holds it; a file that is not there is free."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        yield _locked(fd, path)
    finally:
        os.close(fd)


def _locked(fd: int, path: Path, *, wait: bool = False) -> bool:
    """Lock what *fd* is, and say if it is ours and still the file at *path*."""
    try:
        while wait and not _waited(fd):
            time.sleep(_RETRY_INTERVAL)
        if not wait:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), path.stat())
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False


def _waited(fd: int) -> bool:
    """Wait for the lock; False if that is impossible and it must be tried again.

    The kernel counts all threads of a process as one: where two processes are each
    the sender of one directory and wait for that of the other, it sees a deadlock.
    Under gevent the thread is a greenlet, and waiting would stop all of its process.
    """
    patient = fcntl.LOCK_EX | (fcntl.LOCK_NB if threads_are_greenlets() else 0)
    try:
        fcntl.lockf(fd, patient)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno != errno.EDEADLK:
            raise
        return False
    return True
