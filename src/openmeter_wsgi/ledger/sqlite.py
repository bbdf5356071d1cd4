"""A store in SQLite: a file for all processes of a host, or memory for one.

The file is a cache. It is never synced: what a loss of power takes, the next answers
bring back. One that cannot be read is set aside, and a new one made.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from openmeter_wsgi import log
from openmeter_wsgi.ledger import tables
from openmeter_wsgi.ledger.forking import tell_of_forks
from openmeter_wsgi.ledger.presence import HostPresence, ProcessPresence
from openmeter_wsgi.ledger.terms import PATIENCE, StoreAway

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from openmeter_wsgi.ledger.terms import Lease, Lessee, Request

logger = log.get_logger(__name__)

_Result = TypeVar("_Result")

NAME = "ledger.sqlite"
UNREADABLE = ".unreadable"
#: Seconds between two looks for what nobody uses any more.
_PRUNE_INTERVAL = 60.0
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


class SqliteStore:
    """The ledger of a host in *directory*, or of one process without.

    *clock* is for questions alone.
    """

    def __init__(
        self, directory: Path | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = directory and directory / NAME
        self._clock = clock
        self._present: HostPresence | ProcessPresence = (
            HostPresence(directory) if directory else ProcessPresence()
        )
        self._forget()
        tell_of_forks(self)

    def __str__(self) -> str:
        """Return where it is."""
        return str(self._path or "each process by itself")

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._name = ""
        self._inode = 0
        self._pruned_at = 0.0

    @property
    def origin(self) -> str | None:
        """The name of the spool in this directory."""
        if self._path is None:
            return None
        return self._within(lambda db: tables.name(db, "origin"))

    def exchange(
        self, lessee: Lessee, requests: Sequence[Request], now: float
    ) -> list[Lease]:
        """Hand in what was spent and take new leases: one transaction."""

        def work(db: sqlite3.Connection) -> list[Lease]:
            self._present.enter(lessee.token)
            tables.enter(db, lessee)
            return [
                tables.exchange(db, lessee, request, now, self._name)
                for request in requests
            ]

        return self._within(work)

    def publish(self, lessee: Lessee, until: float, now: float) -> None:
        """Write a watermark of the lessee's origin."""
        self._within(lambda db: tables.publish(db, lessee, until, now))

    def look(self, lessee: Lessee, now: float) -> bool:  # noqa: ARG002 - see Store
        """Bury the dead, and say whether there were any."""
        self._check_place()
        known = self._within(tables.lessees, write=False)
        dead = [one for one in known if not self._present.is_alive(one.token)]
        due = not 0 <= now - self._pruned_at < _PRUNE_INTERVAL
        if not dead and not due:
            return False

        def work(db: sqlite3.Connection) -> None:
            for one in dead:
                tables.bury(db, one, now)
                self._present.bury(one.token)
            if due:
                tables.prune(db, now)

        self._within(work)
        self._pruned_at = now
        return bool(dead)

    def leave(self, lessee: Lessee, now: float) -> None:
        """Give up what the lessee has; a lease it still holds counts as spent."""
        try:
            if self._db is not None:
                self._within(lambda db: tables.bury(db, lessee, now))
        finally:
            self._present.leave(lessee.token)

    def take_question(self, rate: float, *, reserve: float = 0.0) -> float:
        """Take a token of the bucket."""
        now = self._clock()
        return self._within(lambda db: tables.take_question(db, rate, reserve, now))

    def close(self) -> None:
        """Close the connection."""
        if os.getpid() == self._pid:
            with self._lock:
                self._disconnect()

    def before_fork(self) -> bool:
        """Close the file, and keep everybody out until `after_fork`."""
        if os.getpid() != self._pid or not self._lock.acquire(timeout=_FORK_PATIENCE):
            return False
        if self._path is not None:  # else closing it would be forgetting
            self._disconnect()
        return True

    def after_fork(self) -> None:
        """Let others in again."""
        self._lock.release()

    # -- The connection

    def _within(
        self, work: Callable[[sqlite3.Connection], _Result], *, write: bool = True
    ) -> _Result:
        """Do *work* in a transaction."""
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
        db = self._db or self._connect()
        db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        try:
            result = work(db)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return result

    def _connect(self) -> sqlite3.Connection:
        where = ":memory:"
        if self._path is not None:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            # One that is there is not opened: closing it would drop the locks that
            # another connection of this process has.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._path, flags, 0o600))
            self._inode = self._path.stat().st_ino
            where = f"file:{quote(str(self._path))}?mode=rw"
        self._db = db = sqlite3.connect(
            where, PATIENCE, isolation_level=None, check_same_thread=False, uri=True
        )
        # No request waits for the disk, nor does the one that makes a checkpoint.
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA journal_mode = WAL")
        self._prepare(db)
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN IMMEDIATE")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != tables.VERSION:
            tables.create(db)  # an error if there are others
        self._name = tables.name(db, "store")
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
                old = self._path.with_name(NAME + part)
                with contextlib.suppress(FileNotFoundError):
                    old.replace(old.with_name(NAME + UNREADABLE + part))
        return True

    def _check_place(self) -> None:
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
