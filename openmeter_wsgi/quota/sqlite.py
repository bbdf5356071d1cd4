"""The store in SQLite: a file for the processes of a host, or memory for one process.

Forks: if a process forks while another thread is inside SQLite, the mutexes of the
library stay locked in the child for ever. And SQLite counts the locks on a file per
process: a child would take those of its parent for its own
(https://www.sqlite.org/howtocorrupt.html, 2.6). So hooks close the file before each
fork, and keep all threads out of SQLite during the fork. A fork made in C runs no
hooks; servers fork so only before the first request.

The file is a cache and is never synced: after a loss of power, OpenMeter's next answers
replace it. A file that cannot be read is renamed, and a new one is created.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import weakref
from typing import TYPE_CHECKING, Final, Protocol, TypeVar
from urllib.parse import quote

from openmeter_wsgi import log
from openmeter_wsgi.lock import LOCK, SegmentLock, is_alive, remove_lock
from openmeter_wsgi.quota import sqlite_tables
from openmeter_wsgi.quota.store import STORE_TIMEOUT, StoreAway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from openmeter_wsgi.quota.store import LeaseReply, LeaseRequest, Lessee

logger: Final = log.get_logger(__name__)


class ForkAware(Protocol):
    """An object whose methods are called before and after a fork."""

    def before_fork(self) -> bool:
        """Lock all threads out until `after_fork`; return True if that succeeds.

        It must not wait for long.
        """

    def after_fork(self) -> None:
        """Let all threads in again. Called in the parent and in the child."""


# A plain set, because one call copies it atomically; a WeakSet is iterated in steps.
_fork_listeners: set[weakref.ref[ForkAware]] = set()
#: The listeners that are locked during a fork, by the id of the thread that forks.
_locked_by_fork: dict[int, list[ForkAware]] = {}


def register_for_forks(listener: ForkAware) -> None:
    """Call the methods of *listener* at every fork, for as long as it lives."""
    _fork_listeners.add(weakref.ref(listener, _fork_listeners.discard))


def _before() -> None:
    living = [found for reference in tuple(_fork_listeners) if (found := reference())]
    _locked_by_fork[threading.get_ident()] = [
        listener for listener in living if listener.before_fork()
    ]


def _after() -> None:
    for listener in _locked_by_fork.pop(threading.get_ident(), ()):
        listener.after_fork()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)


class HostLiveness:
    """The lessees of a host. A lessee is alive while its process locks its file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._owners: dict[tuple[int, str], SegmentLock] = {}

    def enter(self, token: str) -> None:
        """Take the lock of a lessee of this process, unless it is taken.

        :raises OSError: if the lock file cannot be created.
        """
        key = (os.getpid(), token)
        if key not in self._owners:
            self._owners[key] = SegmentLock.register(self._directory, token)

    def leave(self, token: str) -> None:
        """Release the lock."""
        owner = self._owners.pop((os.getpid(), token), None)
        if owner is not None:
            owner.leave(nothing_left=True)

    def is_alive(self, token: str) -> bool:
        """Return True if a lessee is alive. A dead lessee never comes back."""
        return is_alive(self._directory, token)

    def remove_lessee(self, token: str) -> None:
        """Delete the lock file of a dead lessee."""
        remove_lock(self._directory / (token + LOCK))


class ProcessLiveness:
    """The lessees of one process. A lessee is alive until it leaves."""

    def __init__(self) -> None:
        self._tokens: set[str] = set()

    def enter(self, token: str) -> None:
        """Add the lessee."""
        self._tokens.add(token)

    def leave(self, token: str) -> None:
        """Remove the lessee."""
        self._tokens.discard(token)

    def is_alive(self, token: str) -> bool:
        """Return True if the lessee has not left."""
        return token in self._tokens

    def remove_lessee(self, token: str) -> None:
        """Do nothing: a lessee has no lock file here."""


_Result = TypeVar("_Result")


class _StoreBusy(StoreAway):
    """Another thread or process has locked the database."""


class _RetryLimit(threading.local):
    """The monotonic time until which this thread retries a locked database."""

    retry_until = 0.0


UNREADABLE = ".unreadable"
#: Seconds between two tries to open the file, or to begin a transaction.
_RETRY_PAUSE = 0.005
#: Maximum seconds for which a thread waits for the database in memory, which no other
#: store can replace. The thread that uses it may be slow: many compete for the CPU.
_MEMORY_TIMEOUT = 5.0
#: Maximum seconds for which a fork waits for a transaction to end.
_FORK_TIMEOUT = 1.0
#: Suffixes of the database file, its write-ahead log, and the index of that.
_PARTS = ("", "-wal", "-shm")
#: Errors of a file that is damaged, or is not our database: it is replaced.
_UNREADABLE_CODES = {
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
}
_BUSY_CODES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}

#: Connections of the parent, kept in the child because it must neither use nor close
#: them: those in memory, and those that were open at a fork made in C.
_inherited: list[object] = []


class Database:
    """A database file in *directory*, or a database in memory if None. Any thread.

    The first use in a process opens it. *scope* is called then: it returns the name of
    the OpenMeter server and key, which becomes part of the file's name.
    """

    def __init__(
        self, directory: Path | None, scope: Callable[[], str] = lambda: ""
    ) -> None:
        self._directory = directory
        self._scope = scope
        self._path: Path | None = None
        self._limit = _RetryLimit()
        self._reset()
        register_for_forks(self)

    def __str__(self) -> str:
        """Return the location, for the log."""
        return str(self._path or self._directory or "the memory of each process")

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        #: The random name of the store in the open database.
        self.name: str = ""

    @property
    def is_open(self) -> bool:
        """True if this process has the database open."""
        return self._db is not None and os.getpid() == self._pid

    def close(self) -> None:
        """Close the database; a later use opens it again."""
        if os.getpid() == self._pid:
            with self._lock:
                self._disconnect()

    def __del__(self) -> None:
        # From Python 3.13 on, a connection that is not closed causes a warning.
        self.close()

    def before_fork(self) -> bool:
        """Close the file, and lock all threads out until `after_fork`."""
        if os.getpid() != self._pid or not self._lock.acquire(timeout=_FORK_TIMEOUT):
            return False
        if self._directory is not None:  # closing a database in memory would erase it
            self._disconnect()
        return True

    def after_fork(self) -> None:
        """Let all threads in again."""
        self._lock.release()

    @contextlib.contextmanager
    def waiting_up_to(self, seconds: float) -> Iterator[None]:
        """Let `run` retry in this thread while the database is locked."""
        self._limit.retry_until = time.monotonic() + seconds
        try:
            yield
        finally:
            self._limit.retry_until = 0.0

    def run(
        self, work: Callable[[sqlite3.Connection], _Result], *, write: bool = True
    ) -> _Result:
        """Return the result of *work* in a transaction.

        :raises StoreAway: if the database cannot be used now.
        """
        while True:
            try:
                return self._run_once(work, write=write)
            except _StoreBusy:
                if time.monotonic() >= self._limit.retry_until:
                    raise
            time.sleep(_RETRY_PAUSE)

    def _run_once(
        self, work: Callable[[sqlite3.Connection], _Result], *, write: bool
    ) -> _Result:
        if os.getpid() != self._pid:
            _inherited.append(self._db)
            self._reset()
        timeout = _MEMORY_TIMEOUT if self._directory is None else STORE_TIMEOUT
        if not self._lock.acquire(timeout=timeout):
            raise _StoreBusy(f"{self}: busy for more than {timeout} s")
        try:
            try:
                return self._transaction(work, write=write)
            except sqlite3.DatabaseError as error:
                if not self._set_aside_if_unreadable(error):
                    raise
            return self._transaction(work, write=write)
        except (sqlite3.Error, OSError) as error:
            if _code(error) in _BUSY_CODES:
                raise _StoreBusy(f"{self}: {error}") from error
            self._disconnect()
            raise StoreAway(f"{self}: {error}") from error
        finally:
            self._lock.release()

    def _transaction(
        self, work: Callable[[sqlite3.Connection], _Result], *, write: bool
    ) -> _Result:
        db = self._db or self._connected()
        db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        try:
            result = work(db)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return result

    def _connected(self) -> sqlite3.Connection:
        """Connect, with retries: SQLite's timeout does not apply to all steps of it."""
        deadline = time.monotonic() + STORE_TIMEOUT
        while True:
            try:
                return self._connect()
            except sqlite3.OperationalError as error:
                if _code(error) not in _BUSY_CODES or time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_PAUSE)

    def _connect(self) -> sqlite3.Connection:
        where = ":memory:"
        if self._directory is not None:
            self._path = self._directory / database_name(self._scope())
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            # O_EXCL: an existing file must not be opened and closed here, because that
            # would drop the locks of this process's other connections.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._path, flags, 0o600))
            self._inode = self._path.stat().st_ino
            where = f"file:{quote(str(self._path))}?mode=rw"
        db = sqlite3.connect(
            where,
            timeout=STORE_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
            uri=True,
        )
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        self._db = db
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        # No request waits for the disk, not even in a checkpoint.
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("BEGIN IMMEDIATE")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != sqlite_tables.SCHEMA_VERSION:
            sqlite_tables.create(db)  # fails if the file has tables of another version
        self.name = sqlite_tables.name(db, "store")
        db.execute("COMMIT")

    def _disconnect(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
        self._db = None

    def _set_aside_if_unreadable(self, error: sqlite3.DatabaseError) -> bool:
        """Rename a file that cannot be read; return True if a retry makes sense."""
        if self._path is None or _code(error) not in _UNREADABLE_CODES:
            return False
        self._disconnect()
        if self._is_in_place():  # else another process was faster
            logger.error(
                "%s: the file cannot be read (%s); it is renamed to *%s and a new one "
                "is created",
                self._path, error, UNREADABLE,
            )  # fmt: skip
            for part in _PARTS:
                old = self._path.with_name(self._path.name + part)
                with contextlib.suppress(FileNotFoundError):
                    old.replace(old.with_name(self._path.name + UNREADABLE + part))
        return True

    def disconnect_if_replaced(self) -> None:
        """Disconnect if another process has renamed or deleted the file."""
        if self._db is not None and not self._is_in_place():
            with self._lock:
                self._disconnect()

    def _is_in_place(self) -> bool:
        """Return True if the path still names the file of this connection."""
        if self._path is None:
            return True
        try:
            return self._path.stat().st_ino == self._inode
        except OSError:
            return False


def _code(error: Exception) -> int:
    """Return SQLite's primary result code, 255 for an error of another library."""
    return getattr(error, "sqlite_errorcode", -1) & 0xFF


#: Prefix and suffix of the file name; the scope is between them.
DATABASE_NAME = "ledger"
_SUFFIX = ".sqlite"
#: Seconds between two removals of unused rows.
_PRUNE_INTERVAL = 60.0


def database_name(scope: str) -> str:
    """Return the name of the database file of *scope*."""
    return f"{DATABASE_NAME}{scope and '-'}{scope}{_SUFFIX}"


class SqliteStore:
    """The store of a host in *directory*, or of one process if that is None.

    *scope* returns the name of the OpenMeter server and key; each has its own file.
    *clock* is used for `take_token` only.
    """

    returns = 0

    def __init__(
        self,
        directory: Path | None = None,
        clock: Callable[[], float] = time.time,
        *,
        scope: Callable[[], str] = lambda: "",
    ) -> None:
        self._directory = directory
        self._database = Database(directory, scope)
        self._clock = clock
        self._liveness: HostLiveness | ProcessLiveness = (
            HostLiveness(directory) if directory else ProcessLiveness()
        )
        self._pruned_at = 0.0

    def __str__(self) -> str:
        """Return the location, for the log."""
        return str(self._database)

    @property
    def origin(self) -> str | None:
        """The random name of the spool in this directory, None in memory."""
        if self._directory is None:
            return None
        return self._database.run(lambda db: sqlite_tables.name(db, "origin"))

    def exchange(
        self, lessee: Lessee, requests: Sequence[LeaseRequest], now: float
    ) -> list[LeaseReply]:
        """Hand in usage and get new leases, in one transaction."""

        def work(db: sqlite3.Connection) -> list[LeaseReply]:
            self._liveness.enter(lessee.token)
            sqlite_tables.enter(db, lessee)
            return [
                sqlite_tables.exchange(db, lessee, request, now, self._database.name)
                for request in requests
            ]

        return self._database.run(work)

    def publish(self, lessee: Lessee, until: float, now: float) -> float:
        """Store the visibility mark of the lessee's origin."""
        return self._database.run(
            lambda db: sqlite_tables.publish(db, lessee, until, now)
        )

    def check_lessees(self, lessee: Lessee, now: float) -> bool:  # noqa: ARG002 - see Store
        """Remove dead lessees, return True if any were removed; remove unused rows."""
        self._database.disconnect_if_replaced()
        lessees = self._database.run(sqlite_tables.lessees, write=False)
        dead = [each for each in lessees if not self._liveness.is_alive(each.token)]
        is_prune_due = not 0 <= now - self._pruned_at < _PRUNE_INTERVAL
        if not dead and not is_prune_due:
            return False

        def work(db: sqlite3.Connection) -> None:
            for each in dead:
                sqlite_tables.remove_lessee(db, each, now)
                self._liveness.remove_lessee(each.token)
            if is_prune_due:
                sqlite_tables.prune(db, now)

        self._database.run(work)
        self._pruned_at = now
        return bool(dead)

    def leave(self, lessee: Lessee, now: float) -> None:
        """Remove the lessee; the leases that it still holds count as usage."""
        try:
            if self._database.is_open:
                self._database.run(
                    lambda db: sqlite_tables.remove_lessee(db, lessee, now)
                )
        finally:
            self._liveness.leave(lessee.token)

    def take_token(self, rate: float, *, reserve: float = 0.0) -> float:
        """Take a token from the bucket."""
        now = self._clock()
        return self._database.run(
            lambda db: sqlite_tables.take_token(db, rate, reserve, now)
        )

    def share(self, key: str, document: bytes, asked_at: float) -> None:
        """Store a document for other processes; do nothing in memory."""
        if self._directory is not None:
            self._database.run(
                lambda db: sqlite_tables.share(db, key, document, asked_at)
            )

    def shared(self, keys: Sequence[str]) -> list[tuple[bytes, float] | None]:
        """Return the document and its time, or None, for each key."""
        if self._directory is None:
            return [None] * len(keys)
        return self._database.run(
            lambda db: sqlite_tables.shared(db, keys), write=False
        )

    def unshare(self, keys: Sequence[str]) -> None:
        """Remove the documents of *keys*."""
        if self._directory is not None:
            self._database.run(lambda db: sqlite_tables.unshare(db, keys))

    def waiting_up_to(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """Wait longer for the file, which other processes lock."""
        return self._database.waiting_up_to(seconds)

    def close(self) -> None:
        """Close the connection."""
        self._database.close()
