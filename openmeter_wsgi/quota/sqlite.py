"""A store in SQLite: a file for the processes of a host, or memory for one.

A child that is made while another thread is within SQLite finds mutexes of its
library taken for ever. And SQLite keeps account of the locks on a file by process: a
child would take those of its parent for its own (https://www.sqlite.org/howtocorrupt.html,
2.6). A fork made in C runs no hook: whoever forks so does it before the first request,
as servers do.

The file is a cache. It is never synced: what a loss of power takes, the next answers
bring back. One that cannot be read is set aside, and a new one made.
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
from openmeter_wsgi.quota.store import PATIENCE, StoreAway

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from openmeter_wsgi.quota.store import Lease, Lessee, Request

logger: Final = log.get_logger(__name__)


class UsesSqlite(Protocol):
    """An object that is told of forks."""

    def before_fork(self) -> bool:
        """Keep everybody out until `after_fork`; say whether that was possible.

        It must not wait for long.
        """

    def after_fork(self) -> None:
        """Let others in again; called in parent and child."""


# A set that one call copies, where a WeakSet would be iterated step by step.
_users: set[weakref.ref[UsesSqlite]] = set()
#: The users that are kept out, by the thread that forks.
_paused: dict[int, list[UsesSqlite]] = {}


def tell_of_forks(user: UsesSqlite) -> None:
    """Tell *user* of every fork, for as long as it lives."""
    _users.add(weakref.ref(user, _users.discard))


def _before() -> None:
    users = [user for reference in tuple(_users) if (user := reference())]
    _paused[threading.get_ident()] = [user for user in users if user.before_fork()]


def _after() -> None:
    for user in _paused.pop(threading.get_ident(), ()):
        user.after_fork()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)


class HostLiveness:
    """The lessees of a host: one lives as long as its process holds its lock."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._owners: dict[tuple[int, str], SegmentLock] = {}

    def enter(self, token: str) -> None:
        """Take the lock of a lessee of this process, if it has it not yet.

        :raises OSError: if the directory cannot take it.
        """
        key = (os.getpid(), token)
        if key not in self._owners:
            self._owners[key] = SegmentLock.register(self._directory, token)

    def leave(self, token: str) -> None:
        """Give the lock up."""
        owner = self._owners.pop((os.getpid(), token), None)
        if owner is not None:
            owner.leave(nothing_left=True)

    def is_alive(self, token: str) -> bool:
        """Say whether a lessee lives, and if not, that is for ever."""
        return is_alive(self._directory, token)

    def bury(self, token: str) -> None:
        """Delete the lock file of a dead one."""
        remove_lock(self._directory / (token + LOCK))


class ProcessLiveness:
    """The lessees of one process: one lives until it leaves."""

    def __init__(self) -> None:
        self._tokens: set[str] = set()

    def enter(self, token: str) -> None:
        """Remember the lessee."""
        self._tokens.add(token)

    def leave(self, token: str) -> None:
        """Forget it."""
        self._tokens.discard(token)

    def is_alive(self, token: str) -> bool:
        """Say whether it has not left."""
        return token in self._tokens

    def bury(self, token: str) -> None:
        """Do nothing: there is nothing left of it."""


_Result = TypeVar("_Result")

UNREADABLE = ".unreadable"
#: Seconds between two tries to open it.
_OPENING_PAUSE = 0.005
#: So many seconds a fork waits for a transaction to end.
_FORK_PATIENCE = 1.0
#: Beside the file, and with it, are its log and what processes share of that.
_PARTS = ("", "-wal", "-shm")
#: The file is none of ours, damaged, or lacks our tables: a new one will do.
_UNREADABLE_CODES = {
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
}
_BUSY_CODES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}

#: A connection must neither be used nor closed by a child of its process: it stays.
#: Only one that was open in memory, or at a fork that was made in C, gets here.
_inherited: list[object] = []


class Database:
    """The tables in a file of *directory*, or in memory if that is None. Any thread.

    It is opened by its first use in a process. *scope* is called then: it names the
    OpenMeter server and key that the file is for.
    """

    def __init__(
        self, directory: Path | None, scope: Callable[[], str] = lambda: ""
    ) -> None:
        self._directory = directory
        self._scope = scope
        self._path: Path | None = None
        self._forget()
        tell_of_forks(self)

    def __str__(self) -> str:
        """Return where it is."""
        return str(self._path or self._directory or "each process by itself")

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        #: The random name of what is in it now.
        self.name: str = ""

    @property
    def is_open(self) -> bool:
        """True if this process has used it."""
        return self._db is not None and os.getpid() == self._pid

    def close(self) -> None:
        """Close it; a later use opens it again."""
        if os.getpid() == self._pid:
            with self._lock:
                self._disconnect()

    def __del__(self) -> None:
        # Python warns of a connection that is left to it to close (from 3.13 on).
        self.close()

    def before_fork(self) -> bool:
        """Close the file, and keep everybody out until `after_fork`."""
        if os.getpid() != self._pid or not self._lock.acquire(timeout=_FORK_PATIENCE):
            return False
        if self._directory is not None:  # else closing it would be forgetting
            self._disconnect()
        return True

    def after_fork(self) -> None:
        """Let others in again."""
        self._lock.release()

    def within(
        self, work: Callable[[sqlite3.Connection], _Result], *, write: bool = True
    ) -> _Result:
        """Do *work* in a transaction.

        :raises StoreAway: if it cannot be used now.
        """
        if os.getpid() != self._pid:
            _inherited.append(self._db)
            self._forget()
        if not self._lock.acquire(timeout=PATIENCE):
            raise StoreAway(f"{self}: busy for more than {PATIENCE} s")
        try:
            try:
                return self._transaction(work, write=write)
            except sqlite3.DatabaseError as error:
                if not self._set_aside(error):
                    raise
            return self._transaction(work, write=write)
        except (sqlite3.Error, OSError) as error:
            if _code(error) not in _BUSY_CODES:
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
        """Connect; where many do at a time SQLite does not let each wait by itself."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self._connect()
            except sqlite3.OperationalError as error:
                if _code(error) not in _BUSY_CODES or time.monotonic() > deadline:
                    raise
            time.sleep(_OPENING_PAUSE)

    def _connect(self) -> sqlite3.Connection:
        where = ":memory:"
        if self._directory is not None:
            self._path = self._directory / database_name(self._scope())
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            # One that is there is not opened: closing it would drop the locks that
            # another connection of this process has.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._path, flags, 0o600))
            self._inode = self._path.stat().st_ino
            where = f"file:{quote(str(self._path))}?mode=rw"
        db = sqlite3.connect(
            where,
            timeout=PATIENCE,
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
        # No request waits for the disk, nor does the one that makes a checkpoint.
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("BEGIN IMMEDIATE")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != sqlite_tables.SCHEMA_VERSION:
            sqlite_tables.create(db)  # an error if there are others
        self.name = sqlite_tables.name(db, "store")
        db.execute("COMMIT")

    def _disconnect(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
        self._db = None

    def _set_aside(self, error: sqlite3.DatabaseError) -> bool:
        """Say whether another try may go better: nothing unreadable is left."""
        if self._path is None or _code(error) not in _UNREADABLE_CODES:
            return False
        self._disconnect()
        if self._is_in_place():  # else another process was faster
            logger.error(
                "%s: cannot be used (%s), a new one is made", self._path, error
            )
            for part in _PARTS:
                old = self._path.with_name(self._path.name + part)
                with contextlib.suppress(FileNotFoundError):
                    old.replace(old.with_name(self._path.name + UNREADABLE + part))
        return True

    def check_place(self) -> None:
        """Leave a file that another process has set aside, or somebody deleted."""
        if self._db is not None and not self._is_in_place():
            with self._lock:
                self._disconnect()

    def _is_in_place(self) -> bool:
        if self._path is None:
            return True
        try:
            return self._path.stat().st_ino == self._inode
        except OSError:
            return False


def _code(error: Exception) -> int:
    """Return the primary result code of SQLite, -1 if it is none of its errors."""
    return getattr(error, "sqlite_errorcode", -1) & 0xFF


#: The beginning and the end of a file's name; between them is its scope.
DATABASE_NAME = "ledger"
_SUFFIX = ".sqlite"
#: Seconds between two looks for what nobody uses any more.
_PRUNE_INTERVAL = 60.0


def database_name(scope: str) -> str:
    """Return the name of the file for the server and key that *scope* names."""
    return f"{DATABASE_NAME}{scope and '-'}{scope}{_SUFFIX}"


class SqliteStore:
    """The ledger of a host in *directory*, or of one process without.

    *scope* names the OpenMeter server and key: each has a file of its own. *clock* is
    for questions alone.
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
        self._present: HostLiveness | ProcessLiveness = (
            HostLiveness(directory) if directory else ProcessLiveness()
        )
        self._pruned_at = 0.0

    def __str__(self) -> str:
        """Return where it is."""
        return str(self._database)

    @property
    def origin(self) -> str | None:
        """The name of the spool in this directory."""
        if self._directory is None:
            return None
        return self._database.within(lambda db: sqlite_tables.name(db, "origin"))

    def exchange(
        self, lessee: Lessee, requests: Sequence[Request], now: float
    ) -> list[Lease]:
        """Hand in what was spent and take new leases: one transaction."""

        def work(db: sqlite3.Connection) -> list[Lease]:
            self._present.enter(lessee.token)
            sqlite_tables.enter(db, lessee)
            return [
                sqlite_tables.exchange(db, lessee, request, now, self._database.name)
                for request in requests
            ]

        return self._database.within(work)

    def publish(self, lessee: Lessee, until: float, now: float) -> float:
        """Write a mark of the lessee's origin."""
        return self._database.within(
            lambda db: sqlite_tables.publish(db, lessee, until, now)
        )

    def look(self, lessee: Lessee, now: float) -> bool:  # noqa: ARG002 - see Store
        """Bury the dead, and say whether there were any."""
        self._database.check_place()
        known = self._database.within(sqlite_tables.lessees, write=False)
        dead = [one for one in known if not self._present.is_alive(one.token)]
        due = not 0 <= now - self._pruned_at < _PRUNE_INTERVAL
        if not dead and not due:
            return False

        def work(db: sqlite3.Connection) -> None:
            for one in dead:
                sqlite_tables.bury(db, one, now)
                self._present.bury(one.token)
            if due:
                sqlite_tables.prune(db, now)

        self._database.within(work)
        self._pruned_at = now
        return bool(dead)

    def leave(self, lessee: Lessee, now: float) -> None:
        """Give up what the lessee has; a lease it still holds counts as spent."""
        try:
            if self._database.is_open:
                self._database.within(lambda db: sqlite_tables.bury(db, lessee, now))
        finally:
            self._present.leave(lessee.token)

    def take_token(self, rate: float, *, reserve: float = 0.0) -> float:
        """Take a token of the bucket."""
        now = self._clock()
        return self._database.within(
            lambda db: sqlite_tables.take_token(db, rate, reserve, now)
        )

    def share(self, key: str, document: bytes, asked_at: float) -> None:
        """Keep a document for other processes; nothing where there are none."""
        if self._directory is not None:
            self._database.within(
                lambda db: sqlite_tables.share(db, key, document, asked_at)
            )

    def shared(self, keys: Sequence[str]) -> list[tuple[bytes, float] | None]:
        """Return the document of each key."""
        if self._directory is None:
            return [None] * len(keys)
        return self._database.within(
            lambda db: sqlite_tables.shared(db, keys), write=False
        )

    def unshare(self, keys: Sequence[str]) -> None:
        """Remove the documents of *keys*."""
        if self._directory is not None:
            self._database.within(lambda db: sqlite_tables.unshare(db, keys))

    def close(self) -> None:
        """Close the connection."""
        self._database.close()
