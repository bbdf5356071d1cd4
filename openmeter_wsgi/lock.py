"""File locks that end with their process, however it ends.

`SegmentLock` is the lock of an *owner* of segments: as long as it is held, the owner is
alive. `election` gives one process at a time the lock of the sender of a directory.

These are POSIX locks (`lockf`). A forked child does not inherit them, so it does not
keep the segments of its dead parent from being adopted, as it would with `flock`. But a
process that closes *any* descriptor of a locked file loses the lock: so no process
opens a lock file that it holds. Process ids cannot be used: containers share volumes.
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

#: Suffix of an owner's lock file.
LOCK = ".lock"
ELECTION = "sender.lock"
#: Suffix of a file that is being made.
UNFINISHED = ".new"
_OWNER = re.compile(r"([0-9a-f]{24})\.lock(\.new)?")
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

#: Seconds between two attempts to lock a file without waiting in the kernel.
_RETRY_INTERVAL = 1.0

#: Process id and token of the owners in this process. Their files are never opened.
_held: set[tuple[int, str]] = set()
#: The marks of the API keys in the lock files of these owners.
_marks: dict[tuple[int, str], str] = {}
#: Maximum number of bytes of a mark.
_MARK_BYTES = 100
#: The format of C's ``struct flock``, and the numbers of its fields type and pid.
_FLOCK, _TYPE, _PID = ("hhqqi4x", 0, 4) if sys.platform == "linux" else ("qqihh", 3, 2)
#: One lock per process and directory: a POSIX lock does not exclude the threads of the
#: same process.
_elections: dict[tuple[int, int, int], threading.Lock] = {}


class SegmentLock:
    """The lock file of an owner. The owner is alive as long as its process holds it."""

    def __init__(self, directory: Path, token: str, fd: int) -> None:
        self.token = token
        self._path = directory / (token + LOCK)
        self._fd = fd

    @classmethod
    def register(cls, directory: Path, token: str | None = None) -> Self:
        """Make a new owner; *token*, if given, must be one of `new_token`.

        The file gets its name once it is locked, so no process mistakes the owner for a
        dead one.

        :raises OSError: if the directory cannot take it.
        """
        given = token
        while True:
            token = given or new_token()
            path = directory / (token + LOCK)
            unfinished = path.with_name(path.name + UNFINISHED)
            _held.add((os.getpid(), token))
            fd = os.open(unfinished, _NEW_FILE, 0o600)
            if _lock_file(fd, unfinished):
                unfinished.rename(path)
                return cls(directory, token, fd)
            os.close(fd)  # a sender has just tried to remove the unfinished file

    @property
    def is_intact(self) -> bool:
        """True if the file still has its name, by which other processes find it."""
        return _is_file_at(self._fd, self._path)

    def touch(self) -> None:
        """Renew the time of the file, so that no cleaner removes it."""
        with contextlib.suppress(OSError):
            os.utime(self._path)  # without open and close, which would drop the lock

    def write_mark(self, mark: str) -> None:
        """Write the *mark* of the API key, never the key itself, into the file."""
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, mark.ljust(_MARK_BYTES).encode(), 0)
            _marks[(os.getpid(), self.token)] = mark

    def leave(self, *, nothing_left: bool = False) -> None:
        """Release the lock: the segments can be adopted from now on.

        With *nothing_left* the owner has no segments, and the file is deleted.
        """
        if nothing_left:
            self._path.unlink(missing_ok=True)
        os.close(self._fd)
        _held.discard((os.getpid(), self.token))
        _marks.pop((os.getpid(), self.token), None)


def new_token() -> str:
    """Return a token that no other owner has, on any host."""
    return secrets.token_hex(12)


def owner_of_lock(name: str) -> str | None:
    """Return the owner of the lock file *name*, None if it is no lock file."""
    match = _OWNER.fullmatch(name)
    return match and match[1]


def is_there(directory: Path, token: str) -> bool:
    """Return True if an owner's lock file exists: a cleaner may have deleted it."""
    return (os.getpid(), token) in _held or (directory / (token + LOCK)).exists()


def is_alive(directory: Path, token: str) -> bool:
    """Return True if an owner is alive; a dead owner never comes back.

    An owner without a lock file counts as dead: see `is_there`.
    """
    if (os.getpid(), token) in _held:
        return True
    with _try_lock(directory / (token + LOCK)) as was_free:
        return not was_free


def remove_lock(path: Path) -> None:
    """Delete a lock file, finished or not, unless its owner is alive."""
    token = owner_of_lock(path.name)
    if (os.getpid(), token) in _held:
        return
    with _try_lock(path) as was_free:
        if was_free:
            path.unlink(missing_ok=True)


def holder(path: Path) -> int | None:
    """Return the id of the process that holds the lock of *path*, None if it is free.

    The id is 0 or less if the process is in another container.
    """
    if _is_own(path):
        return os.getpid()  # without open and close, which would drop the lock
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
    lock = struct.unpack(_FLOCK, answer)
    return None if lock[_TYPE] == fcntl.F_UNLCK else lock[_PID]


def _is_own(path: Path) -> bool:
    """Return True if this process holds the lock of *path*, or waits for it."""
    if path.name == ELECTION:
        try:
            status = path.parent.stat()
        except OSError:
            return False
        thread_lock = _elections.get((os.getpid(), status.st_dev, status.st_ino))
        return thread_lock is not None and thread_lock.locked()
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
    """Return the mark of a live owner's API key, an empty text if it is not known.

    A mark that was last written before the time *since* counts as not known.
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
    """The lock of the sender of a directory, held by this process.

    If the sending thread is stuck, another thread can *depose* it, that is, release the
    lock. The sender writes to the directory only under `guard` and while `is_held`.
    """

    def __init__(self, path: Path, fd: int, thread_lock: threading.Lock) -> None:
        self.guard: threading.Lock = threading.Lock()
        self._path = path
        self._fd = fd
        self._thread_lock = thread_lock
        self._is_held = True

    @property
    def is_held(self) -> bool:
        """True if the lock is not released."""
        return self._is_held

    @property
    def is_intact(self) -> bool:
        """True if the lock is held and its file still has its name."""
        with self.guard:
            return self._is_held and _is_file_at(self._fd, self._path)

    def touch(self) -> None:
        """Renew the time of the file: other processes see that the sender is alive."""
        with contextlib.suppress(OSError):
            os.utime(self._path)  # without open and close, which would drop the lock

    def depose(self) -> None:
        """Release the lock. Any thread; may be repeated."""
        with self.guard:
            if self._is_held:
                self._is_held = False
                os.close(self._fd)
                self._thread_lock.release()


@contextlib.contextmanager
def election(directory: Path, *, wait: bool = True) -> Iterator[Election | None]:
    """Hold the lock of the sender of *directory* within the context.

    With *wait* it blocks until the lock is free: the kernel wakes the next process when
    the holder dies. Without *wait* it yields None if there is another sender.

    :raises OSError: if the lock file cannot be opened.
    """
    status = directory.stat()
    key = (os.getpid(), status.st_dev, status.st_ino)
    thread_lock = _elections.setdefault(key, threading.Lock())
    if not thread_lock.acquire(blocking=wait):
        yield None
        return
    try:
        won = _elect(directory / ELECTION, thread_lock, wait=wait)
    except BaseException:
        thread_lock.release()
        raise
    if won is None:
        thread_lock.release()
        yield None
        return
    try:
        yield won
    finally:
        won.depose()


def _elect(path: Path, thread_lock: threading.Lock, *, wait: bool) -> Election | None:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if _lock_file(fd, path, wait=wait):
                return Election(path, fd, thread_lock)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # not locked, or the file was deleted meanwhile
        if not wait:
            return None


def sender_seen_at(directory: Path) -> float | None:
    """Return the time (wall clock) of the sender's last sign of life, or None."""
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
    """Lock a file and yield True, or False if it is held. A missing file is free."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        yield _lock_file(fd, path)
    finally:
        os.close(fd)


def _lock_file(fd: int, path: Path, *, wait: bool = False) -> bool:
    """Lock a file; return True if it is locked and still the file at *path*."""
    try:
        while wait and not _wait_for_lock(fd):
            time.sleep(_RETRY_INTERVAL)
        if not wait:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), path.stat())
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False


def _wait_for_lock(fd: int) -> bool:
    """Wait in the kernel for a lock; return False if the caller must try again.

    The kernel does not distinguish the threads of a process. It sees a deadlock if two
    processes are each the sender of one directory and wait for the directory of the
    other. Under gevent the thread is a greenlet, and waiting would block the process.
    """
    operation = fcntl.LOCK_EX | (fcntl.LOCK_NB if threads_are_greenlets() else 0)
    try:
        fcntl.lockf(fd, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno != errno.EDEADLK:
            raise
        return False
    return True
