"""An SQLite database that is a cache: used while it can be, made anew when it cannot.

It is never synced: what a loss of power takes, the next answers bring back.
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
from openmeter_wsgi.ledger.terms import PATIENCE, StoreAway

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = log.get_logger(__name__)

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
    """The tables in the file *path*, or in memory if that is None. Any thread.

    It is opened by its first use in a process.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._forget()
        tell_of_forks(self)

    def __str__(self) -> str:
        """Return where it is."""
        return str(self._path or "each process by itself")

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        #: The random name of what is in it now.
        self.name = ""

    @property
    def is_open(self) -> bool:
        """Whether this process has used it."""
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
        if self._path is not None:  # else closing it would be forgetting
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
        if self._path is not None:
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
        if version != tables.VERSION:
            tables.create(db)  # an error if there are others
        self.name = tables.name(db, "store")
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
