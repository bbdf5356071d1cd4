"""Where the sandbox keeps everything: one SQLite file, several threads."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import tempfile
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openmeter_wsgi.sandbox.metering import to_float
from openmeter_wsgi.sandbox.windows import window_start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from openmeter_wsgi.sandbox.cloudevent import Event

TABLES = """
PRAGMA journal_mode = WAL;
-- A sandbox's events need not survive a power cut.
PRAGMA synchronous = OFF;
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    source TEXT NOT NULL,
    type TEXT NOT NULL,
    subject TEXT NOT NULL,
    time INTEGER NOT NULL,
    data TEXT,
    ingested_at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS events_by_meter ON events (type, subject, time);
CREATE INDEX IF NOT EXISTS events_by_arrival ON events (type, subject, seq);
CREATE INDEX IF NOT EXISTS events_by_time ON events (time, seq);
CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS resources (
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    key TEXT,
    document TEXT NOT NULL,
    UNIQUE (kind, id),
    UNIQUE (kind, key)
);
"""


#: Greater than the number of any event.
EVERYTHING = 2**63 - 1


class Added(NamedTuple):
    """What became of the events of one request."""

    #: Now counted by meters.
    stored: int
    #: Ids that had been there before.
    duplicates: int
    #: From 1970 or earlier: OpenMeter drops them without a word.
    dropped: int


class Latest:
    """SQL aggregate: the value of the newest event that has one."""

    def __init__(self) -> None:
        self._newest: tuple[int, int, float | None] = (-1, -1, None)

    def step(self, moment: int, seq: int, value: float | None) -> None:
        """Take one event."""
        if value is not None:
            self._newest = max(self._newest, (moment, seq, value))

    def finalize(self) -> float | None:
        """Return the newest value."""
        return self._newest[2]


@lru_cache(maxsize=4096)
def to_number(text: str) -> float | None:
    """Return *text* as ClickHouse's ``toFloat64OrNull`` does, infinities excluded."""
    try:
        value = to_float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class Store:
    """The events and resources of one sandbox.

    Any thread: writing takes turns under a lock, each reader has a connection of its
    own for as long as it reads, and SQLite's write-ahead log keeps the two apart.

    :param path: the file, or None for a temporary one that goes with the store.
    :param dedupe: whether an event with a known source and id is dropped.
    :param visible_after: seconds from an event's arrival until meters and balances
        count it; may be changed at any time.
    :param clock: returns now in Unix seconds.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        dedupe: bool = True,
        visible_after: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.dedupe = dedupe
        self.visible_after = visible_after
        self.clock = clock
        self.persistent = path is not None
        #: Grows with every change, so that a reader can tell whether to look again.
        self.version = 0
        self._directory = None if path else tempfile.TemporaryDirectory("-openmeter")
        self._path = Path(path or Path(self._directory.name, "sandbox.sqlite"))  # type: ignore[union-attr]
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        self._writer = self._connect()
        try:
            self._writer.executescript(TABLES)
        except BaseException:
            self.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=10, isolation_level=None, check_same_thread=False
        )
        connection.create_function("to_number", 1, to_number, deterministic=True)
        connection.create_function("window_start", 3, window_start, deterministic=True)
        connection.create_aggregate("latest", 3, Latest)  # type: ignore[arg-type]
        return connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection whose reads all see the same moment."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            connection.execute("BEGIN")
            yield connection
        finally:
            connection.rollback()
            self._idle.append(connection)
            if self._closed:
                self._close_idle()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection that may write; all of it happens, or nothing."""
        with self._lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                self._writer.rollback()
                raise
            self._writer.commit()
            self.version += 1

    def add(self, events: Sequence[Event]) -> Added:
        """Store *events*, the first of each key only."""
        duplicates = dropped = 0
        rows: list[tuple[Any, ...]] = []
        with self.writing() as connection:
            now = self.clock()
            for event in events:
                if self._is_duplicate(connection, event.key):
                    duplicates += 1
                    if self.dedupe:
                        continue
                if event.time <= 0:
                    dropped += 1
                    continue
                rows.append(
                    (event.id, event.source, event.type, event.subject, event.time,
                     event.data, now)
                )  # fmt: skip
            connection.executemany(
                "INSERT INTO events (id, source, type, subject, time, data,"
                " ingested_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
        return Added(len(rows), duplicates, dropped)

    def horizon(self, connection: sqlite3.Connection) -> int:
        """Return the number of the newest event that meters count by now.

        OpenMeter's sink writes events down some seconds after it was told that they
        are taken; until then neither a meter nor a balance knows of them.
        """
        if not self.visible_after:
            return EVERYTHING
        row = connection.execute(
            "SELECT seq FROM events WHERE ingested_at <= ? ORDER BY seq DESC LIMIT 1",
            (self.clock() - self.visible_after,),
        ).fetchone()
        return row[0] if row else 0

    @staticmethod
    def _is_duplicate(connection: sqlite3.Connection, key: str) -> bool:
        cursor = connection.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,))
        return cursor.rowcount == 0

    def close(self) -> None:
        """Close all connections; a temporary file is removed."""
        self._closed = True
        with self._lock:
            self._writer.close()
            self._close_idle()
            if self._directory is not None:
                self._directory.cleanup()

    def _close_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()
