"""Where the sandbox keeps everything: one SQLite file, several threads."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openmeter_wsgi.sandbox import sql_functions, turned_away
from openmeter_wsgi.sandbox.turned_away import Outcome, TurnedAway

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


#: The number of what arrived last, stored or not.
NEWEST = """SELECT max(ifnull((SELECT max(seq) FROM events), 0),
    ifnull((SELECT max(seq) FROM turned_away), 0))"""
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


_REASONS = {
    Outcome.DUPLICATE: "an event with this source and id had arrived before",
    Outcome.DROPPED: "its time is 1970 or earlier: OpenMeter drops it without a word",
}


def _away(
    event: Event, outcome: Outcome, position: int, batch: Sequence[Event]
) -> TurnedAway:
    return TurnedAway(
        outcome,
        _REASONS[outcome],
        position,
        len(batch),
        event.id,
        event.source,
        event.type,
        event.subject,
        event.time,
        event.data,
    )


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
            self._writer.executescript(TABLES + turned_away.TABLES)
        except BaseException:
            self.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=10, isolation_level=None, check_same_thread=False
        )
        sql_functions.install(connection)
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
        duplicates = 0
        rows: list[tuple[Any, ...]] = []
        away: list[TurnedAway] = []
        with self.writing() as connection:
            now = self.clock()
            for position, event in enumerate(events, 1):
                if self._is_duplicate(connection, event.key):
                    duplicates += 1
                    if self.dedupe:
                        away.append(_away(event, Outcome.DUPLICATE, position, events))
                        continue
                if event.time <= 0:
                    away.append(_away(event, Outcome.DROPPED, position, events))
                    continue
                rows.append(
                    (event.id, event.source, event.type, event.subject, event.time,
                     event.data, now)
                )  # fmt: skip
            self._insert(connection, rows, away, now)
        dropped = sum(one.outcome is Outcome.DROPPED for one in away)
        return Added(len(rows), duplicates, dropped)

    def turn_away(self, events: Sequence[TurnedAway]) -> None:
        """Remember *events* that were not stored, to say what became of them."""
        with self.writing() as connection:
            self._insert(connection, [], events, self.clock())

    @staticmethod
    def _insert(
        connection: sqlite3.Connection,
        rows: Sequence[tuple[Any, ...]],
        away: Sequence[TurnedAway],
        now: float,
    ) -> None:
        (newest,) = connection.execute(NEWEST).fetchone()
        connection.executemany(
            "INSERT INTO events (seq, id, source, type, subject, time, data,"
            " ingested_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [(seq, *row) for seq, row in enumerate(rows, newest + 1)],
        )
        if away:
            turned_away.insert(connection, away, newest + len(rows) + 1, now)

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
