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
import stat
import struct
import sys
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
#: The marks of the keys in the files of these owners.
_marks: dict[tuple[int, str], str] = {}
#: A mark is not longer.
_MARK_BYTES = 100
#: The fields of C's ``struct flock`` in their order, and which are type and pid.
_FLOCK, _TYPE, _PID = ("hhqqi4x", 0, 4) if sys.platform == "linux" else ("qqihh", 3, 2)
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

    @property
    def is_intact(self) -> bool:
        """True if its file is still what others try to lock."""
        return _is_file_at(self._fd, self._path)

    def touch(self) -> None:
        """Say to a cleaner that the file is in use."""
        with contextlib.suppress(OSError):
            os.utime(self._path)  # opened and closed, the lock would be gone

    def write_mark(self, mark: str) -> None:
        """Write into the file which key this process uses: never the key itself."""
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, mark.ljust(_MARK_BYTES).encode(), 0)
            _marks[(os.getpid(), self.token)] = mark

    def leave(self, *, nothing_left: bool = False) -> None:
        """Give up what is owned; its segments can be adopted from now on."""
        if nothing_left:
            self._path.unlink(missing_ok=True)
        os.close(self._fd)
        _held.discard((os.getpid(), self.token))
        _marks.pop((os.getpid(), self.token), None)


def new_token() -> str:
    """Return a name that no other owner has, on any host."""
    return secrets.token_hex(12)


def owner_of_lock(name: str) -> str | None:
    """Return the owner of the lock file *name*, None if it is no lock file."""
    match = _OWNER.fullmatch(name)
    return match and match[1]


def is_there(directory: Path, token: str) -> bool:
    """Return True if an owner has a lock file: a cleaner may have deleted it."""
    return (os.getpid(), token) in _held or (directory / (token + LOCK)).exists()


def is_alive(directory: Path, token: str) -> bool:
    """Return True if an owner lives, and if not, that is for ever.

    Without its lock file it is taken for dead: see `is_there`.
    """
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


def holder(path: Path) -> int | None:
    """Return the id of the process that holds the lock of *path*, None if none does.

    It is 0 or less where that process is in another container.
    """
    if _is_own(path):
        return os.getpid()  # to open and close the file would drop the lock
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    fields = [0] * 5
    fields[_TYPE] = fcntl.F_WRLCK
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        answer = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack(_FLOCK, *fields))
    finally:
        os.close(fd)
    found = struct.unpack(_FLOCK, answer)
    return None if found[_TYPE] == fcntl.F_UNLCK else found[_PID]


def _is_own(path: Path) -> bool:
    """Return True if this process holds the lock of *path*, or waits for it."""
    if path.name == ELECTION:
        try:
            status = path.parent.stat()
        except OSError:
            return False
        within = _elections.get((os.getpid(), status.st_dev, status.st_ino))
        return within is not None and within.locked()
    return (os.getpid(), owner_of_lock(path.name)) in _held


def has_live_owner(directory: Path) -> bool:
    """Return True if a live process owns segments in a directory."""
    for entry in os.listdir(directory):
        if owner_of_lock(entry) and holder(directory / entry) is not None:
            return True
    return False


def is_in_use(directory: Path) -> bool:
    """Return True if a live process owns segments in a directory, or delivers it."""
    try:
        return holder(directory / ELECTION) is not None or has_live_owner(directory)
    except OSError:
        return False


def key_mark(directory: Path, token: str, *, since: float) -> str:
    """Return the mark of a live owner's key, an empty one if that is not known.

    One that was last written before the moment *since* counts as not known.
    """
    path = directory / (token + LOCK)
    try:
        if path.stat().st_mtime < since:
            return ""
        if (os.getpid(), token) in _held:
            return _marks.get((os.getpid(), token), "")
        with path.open("rb") as file:
            mark = file.read(_MARK_BYTES).decode(errors="replace").strip()
        return mark if mark and holder(path) is not None else ""
    except OSError:
        return ""


class Election:
    """The lock of the one sender of a directory, held by this process.

    It can be given up by another thread, where the one that sends is stuck. What the
    sender writes is written under `guard`, and not once it is deposed.
    """

    def __init__(self, path: Path, fd: int, within: threading.Lock) -> None:
        self.guard: threading.Lock = threading.Lock()
        self._path = path
        self._fd = fd
        self._within = within
        self._is_held = True

    @property
    def is_held(self) -> bool:
        """True if this process is still the sender: neither deposed nor at its end."""
        return self._is_held

    @property
    def is_intact(self) -> bool:
        """True if it is held, and its file is still what others try to lock."""
        with self.guard:
            return self._is_held and _is_file_at(self._fd, self._path)

    def touch(self) -> None:
        """Say to the others, and to a cleaner, that the sender lives."""
        with contextlib.suppress(OSError):
            os.utime(self._path)  # opened and closed, the lock would be gone

    def depose(self) -> None:
        """Give the lock up. Any thread; may be repeated."""
        with self.guard:
            if self._is_held:
                self._is_held = False
                os.close(self._fd)
                self._within.release()


@contextlib.contextmanager
def election(directory: Path, *, wait: bool = True) -> Iterator[Election | None]:
    """Be the one sender of *directory*, as soon as there is no other.

    Waiting costs nothing: the kernel wakes the next one when the holder dies.
    Without *wait* it yields None where there is another.

    :raises OSError: if the lock file cannot be opened.
    """
    status = directory.stat()
    key = (os.getpid(), status.st_dev, status.st_ino)
    within = _elections.setdefault(key, threading.Lock())
    if not within.acquire(blocking=wait):
        yield None
        return
    try:
        won = _elected(directory / ELECTION, within, wait=wait)
    except BaseException:
        within.release()
        raise
    if won is None:
        within.release()
        yield None
        return
    try:
        yield won
    finally:
        won.depose()


def _elected(path: Path, within: threading.Lock, *, wait: bool) -> Election | None:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if _locked(fd, path, wait=wait):
                return Election(path, fd, within)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # not won, or deleted meanwhile: another one has its place
        if not wait:
            return None


def sender_seen_at(directory: Path) -> float | None:
    """Return when the sender of *directory* last said that it lives (wall clock).

    None if there never was one, as far as can be seen.
    """
    try:
        return (directory / ELECTION).stat().st_mtime
    except OSError:
        return None


def _is_file_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


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
