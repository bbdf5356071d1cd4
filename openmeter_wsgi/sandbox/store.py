"""The store of the sandbox: one SQLite file, several threads."""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
import tempfile
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openmeter_wsgi.sandbox.usage import install
from openmeter_wsgi.sandbox.validation import Problem, rfc3339

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from openmeter_wsgi.sandbox.validation import Document


@dataclass(frozen=True, slots=True)
class Event:
    """An event as OpenMeter's Kafka message holds it: nothing else survives."""

    id: str
    source: str
    type: str
    subject: str
    #: Seconds since 1970; OpenMeter meters at this resolution.
    time: int
    #: JSON text, or None where there was no data.
    data: str | None
    #: The data is no JSON, which OpenMeter finds out too late to say so: 500.
    broken: bool = False

    @property
    def lost(self) -> str | None:
        """The reason why OpenMeter takes it and then drops it; None if it does not."""
        if self.time <= 0:
            return f"its time is 1970 or earlier: {_LOST}"
        return None if self.source else f"its source is no URI with a name: {_LOST}"

    @property
    def key(self) -> str:
        """The key of OpenMeter's deduplication: ``a-b`` + ``c`` is ``a`` + ``b-c``."""
        return f"default-{self.source}-{self.id}"


def subjects_of(customer: Document) -> list[str]:
    """Return the event subjects that *customer* pays for: its key, and those named."""
    key = customer.get("key")
    return [*([key] if key else ()), *subject_keys(customer)]


def subject_keys(customer: Document) -> list[str]:
    """Return the event subjects that *customer* names beside its key."""
    return list((customer.get("usageAttribution") or {}).get("subjectKeys", ()))


REJECTED_TABLES = """
CREATE TABLE IF NOT EXISTS rejected (
    -- One row of numbers with the events that were stored: the order of arrival.
    seq INTEGER PRIMARY KEY,
    outcome TEXT NOT NULL,
    reason TEXT NOT NULL,
    position INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    id TEXT,
    source TEXT,
    type TEXT,
    subject TEXT,
    -- Whole seconds, or whatever an event that was refused had there.
    time,
    data TEXT,
    ingested_at REAL NOT NULL
);
"""
#: The newest that are kept, and those of one request.
KEPT = 20_000
KEPT_OF_REQUEST = 1_000
#: Characters of an attribute, and of the data, of an event that fits no schema.
MAX_TEXT = 300
MAX_DATA = 10_000
_ATTRIBUTES = ("id", "source", "type", "subject", "time")


class Outcome(StrEnum):
    """The outcome of an event that arrived and was not stored."""

    DUPLICATE = "duplicate"
    #: From 1970 or earlier.
    DROPPED = "dropped"
    REFUSED = "refused"
    #: On purpose, or by data that OpenMeter answers with 500.
    FAILED = "failed"


class Rejected(NamedTuple):
    """One event that was not stored, in the order of the table's columns."""

    outcome: Outcome
    reason: str
    #: Its place in the request, from 1, and how many events came with it.
    position: int
    batch: int
    id: str | None = None
    source: str | None = None
    type: str | None = None
    subject: str | None = None
    time: int | str | None = None
    data: str | None = None


def insert_rejected(
    connection: sqlite3.Connection, rows: Iterable[Rejected], first: int, now: float
) -> None:
    """Write *rows* down under the numbers from *first*, and forget the oldest."""
    connection.executemany(
        "INSERT INTO rejected VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(seq, *row, now) for seq, row in enumerate(rows, first)],
    )
    connection.execute(
        "DELETE FROM rejected WHERE seq <= (SELECT seq FROM rejected"
        " ORDER BY seq DESC LIMIT 1 OFFSET ?)",
        (KEPT,),
    )


def rejected_events(
    body: bytes, outcome: Outcome, reason: str, culprit: int | None = None
) -> list[Rejected]:
    """Return the events of a request that was answered with an error.

    :param culprit: the place of the event that the *reason* is about, from 1.
    """
    items = _items(body)
    shared = f"refused together with event {culprit} of its batch: {reason}"
    return [
        Rejected(
            outcome,
            reason if culprit in (None, position) else shared,
            position,
            len(items),
            **_texts(item),
        )
        for position, item in _kept(items, culprit)
    ]


def _kept(items: list[Any], culprit: int | None) -> Iterator[tuple[int, Any]]:
    for position, item in enumerate(items, 1):
        if position <= KEPT_OF_REQUEST or position == culprit:
            yield position, item


def _items(body: bytes) -> list[Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return [body.decode("utf-8", "replace")]
    if isinstance(document, list):
        return document or [None]
    return [document]


def _texts(item: Any) -> dict[str, Any]:
    """Return the attributes of something that may be no event at all, as texts."""
    if not isinstance(item, dict):
        return {"data": None if item is None else _text(item, MAX_DATA)}
    found = {n: _text(item[n], MAX_TEXT) for n in _ATTRIBUTES if n in item}
    if item.get("data") is not None:
        found["data"] = _text(item["data"], MAX_DATA)
    return found


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # Halves of surrogate pairs are no text that could be stored.
    return text[:limit].encode("utf-8", "replace").decode()


#: Of the tables below.
_VERSION = 2
TABLES = f"""
PRAGMA journal_mode = WAL;
-- A sandbox's events need not survive a power cut.
PRAGMA synchronous = OFF;
PRAGMA user_version = {_VERSION};
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    source TEXT NOT NULL,
    type TEXT NOT NULL,
    subject TEXT NOT NULL,
    time INTEGER NOT NULL,
    data TEXT,
    ingested_at REAL NOT NULL,
    -- When meters, balances and the list of events begin to know of it.
    stored_at REAL NOT NULL
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
    ifnull((SELECT max(seq) FROM rejected), 0))"""

#: Greater than the number of any event.
EVERYTHING = 2**63 - 1


_DUPLICATE = "an event with this source and id had arrived before"
_LOST = "OpenMeter answers 204 and drops it without a word"


def _rejected(
    event: Event, reason: str, position: int, batch: Sequence[Event]
) -> Rejected:
    return Rejected(
        Outcome.DUPLICATE if reason is _DUPLICATE else Outcome.DROPPED,
        reason,
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
        self._visible_after = visible_after
        self.clock = clock
        self._directory = None if path else tempfile.TemporaryDirectory("-openmeter")
        self._path = Path(path or Path(self._directory.name, "sandbox.sqlite"))  # type: ignore[union-attr]
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        self._writer = self._connect()
        try:
            self._create_tables()
        except BaseException:
            self.close()
            raise

    def _create_tables(self) -> None:
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if (
            version != _VERSION
            and self._writer.execute("SELECT 1 FROM sqlite_schema").fetchone()
        ):
            raise sqlite3.DatabaseError(
                "another version of the sandbox made it, or something else; "
                "delete it or name a new file"
            )
        self._writer.executescript(TABLES + REJECTED_TABLES)
        found = self._writer.execute("SELECT max(stored_at) FROM events").fetchone()
        #: The time at which the newest event was or will be visible.
        self._latest = found[0] or 0.0

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=10, isolation_level=None, check_same_thread=False
        )
        install(connection)
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

    def add(self, events: Sequence[Event]) -> dict[str, int]:
        """Store *events*, the first of each key only; return what became of them."""
        duplicates = 0
        rows: list[tuple[Any, ...]] = []
        away: list[Rejected] = []
        with self.writing() as connection:
            now = self.clock()
            # Events are stored in the order of arrival, whatever the lag.
            self._latest = stored = max(now + self._visible_after, self._latest)
            for position, event in enumerate(events, 1):
                if self._is_duplicate(connection, event.key):
                    duplicates += 1
                    if self.dedupe:
                        away.append(_rejected(event, _DUPLICATE, position, events))
                        continue
                if event.lost:
                    away.append(_rejected(event, event.lost, position, events))
                    continue
                rows.append(
                    (event.id, event.source, event.type, event.subject, event.time,
                     event.data, now, stored)
                )  # fmt: skip
            self._insert(connection, rows, away, now)
        dropped = sum(one.outcome is Outcome.DROPPED for one in away)
        return {"stored": len(rows), "duplicates": duplicates, "dropped": dropped}

    def claim(self, events: Sequence[Event]) -> None:
        """Remember the ids of *events* and nothing else."""
        with self.writing() as connection:
            for event in events:
                self._is_duplicate(connection, event.key)

    def reject(self, events: Sequence[Rejected]) -> None:
        """Remember *events* that were not stored, to say what became of them."""
        with self.writing() as connection:
            self._insert(connection, [], events, self.clock())

    @staticmethod
    def _insert(
        connection: sqlite3.Connection,
        rows: Sequence[tuple[Any, ...]],
        away: Sequence[Rejected],
        now: float,
    ) -> None:
        (newest,) = connection.execute(NEWEST).fetchone()
        connection.executemany(
            "INSERT INTO events (seq, id, source, type, subject, time, data,"
            " ingested_at, stored_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [(seq, *row) for seq, row in enumerate(rows, newest + 1)],
        )
        if away:
            insert_rejected(connection, away, newest + len(rows) + 1, now)

    @property
    def visible_after(self) -> float:
        """Seconds from an event's arrival until it is stored and counted.

        What is stored stays so; what still waits follows a change at once.
        """
        return self._visible_after

    @visible_after.setter
    def visible_after(self, seconds: float) -> None:
        with self.writing() as connection:
            now, self._visible_after = self.clock(), seconds
            connection.execute(
                "UPDATE events SET stored_at = max(?, ingested_at + ?)"
                " WHERE stored_at > ?",
                (now, seconds, now),
            )
            found = connection.execute("SELECT max(stored_at) FROM events").fetchone()
            self._latest = found[0] or 0.0

    def horizon(self, connection: sqlite3.Connection) -> int:
        """Return the number of the newest event that is visible by now.

        OpenMeter's sink writes events down some time after it was told that they
        are taken; until then neither a meter nor a balance nor a list knows of them.
        """
        now = self.clock()
        if now >= self._latest:
            return EVERYTHING
        row = connection.execute(
            "SELECT seq FROM events WHERE stored_at <= ? ORDER BY seq DESC LIMIT 1",
            (now,),
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


_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def ulid() -> str:
    """Return a new id of the form that OpenMeter gives its resources."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


#: OpenMeter's words for a resource that is not there, and for a key that is taken.
_UNKNOWN = {
    "meter": "not found error: meter not found: {}",
    "feature": "feature not found: {}",
    "subject": "not found error: subject not found"
    " [namespace=default subject.idOrKey={}]",
}
_TAKEN = {
    "meter": "conflict error: meter with the same slug already exists",
    "feature": "feature {id} with key {key} already exists",
}


class Resources:
    """All resources of one kind, by id and by key.

    :param kind: what one of them is called.
    :param key: the property of a document that is unique among its kind.
    """

    def __init__(self, store: Store, kind: str, *, key: str = "key") -> None:
        self._store = store
        self._kind = kind
        self._key = key

    def create(self, document: Document) -> Document:
        """Store *document* with an id and times of its own, and return that."""
        now = rfc3339(self._store.clock())
        created = {"id": ulid(), "createdAt": now, "updatedAt": now, **document}
        key = document.get(self._key)
        row = (self._kind, created["id"], key, json.dumps(created))
        try:
            with self._store.writing() as connection:
                connection.execute("INSERT INTO resources VALUES (?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            known = self.find(str(key)) or {}
            detail = _TAKEN.get(self._kind, "conflict error: {key} already exists")
            raise Problem(409, detail.format(id=known.get("id"), key=key)) from None
        return created

    def change(self, id_: str, edit: Callable[[Document], None]) -> Document:
        """Let *edit* change the one with this id, while nobody else does.

        What *edit* raises is raised, and then nothing is changed.
        """
        which = (self._kind, id_)
        with self._store.writing() as connection:
            (text,) = connection.execute(
                "SELECT document FROM resources WHERE kind = ? AND id = ?", which
            ).fetchone()
            document: Document = json.loads(text)
            edit(document)
            document["updatedAt"] = rfc3339(self._store.clock())
            connection.execute(
                "UPDATE resources SET document = ? WHERE kind = ? AND id = ?",
                (json.dumps(document), *which),
            )
        return document

    def update(self, document: Document) -> Document:
        """Replace the row with the id of *document*."""

        def replace(current: Document) -> None:
            current.clear()
            current.update(document)

        return self.change(document["id"], replace)

    def all(self) -> list[Document]:
        """Return all, oldest first."""
        with self._store.reading() as connection:
            return self.within(connection)

    def within(
        self, connection: sqlite3.Connection, prefix: str = ""
    ) -> list[Document]:
        """Return all whose key begins with *prefix*, as *connection* sees them."""
        rows = connection.execute(
            "SELECT document FROM resources WHERE kind = ?"
            " AND (? = '' OR (key >= ? AND key < ?)) ORDER BY rowid",
            (self._kind, prefix, prefix, prefix + "\U0010ffff"),
        )
        return [json.loads(document) for (document,) in rows]

    def find(self, id_or_key: str) -> Document | None:
        """Return the one with this id or key."""
        if "\0" in id_or_key:
            raise Problem(500, reason="PostgreSQL refuses a key with NUL")
        with self._store.reading() as connection:
            row = connection.execute(
                "SELECT document FROM resources"
                " WHERE kind = ? AND (id = ? OR key = ?) ORDER BY id = ? DESC",
                (self._kind, id_or_key, id_or_key, id_or_key),
            ).fetchone()
        return json.loads(row[0]) if row else None

    def get(self, id_or_key: str) -> Document:
        """Return the one with this id or key, or answer 404."""
        found = self.find(id_or_key)
        if found is None:
            raise Problem(404, _UNKNOWN[self._kind].format(id_or_key))
        return found

    def retire(self, id_: str) -> None:
        """Delete the one with this id, but remember that it was there."""
        deleted = {"deletedAt": rfc3339(self._store.clock())}
        with self._store.writing() as connection:
            connection.execute(
                "UPDATE resources SET kind = ?, key = NULL,"
                " document = json_patch(document, ?) WHERE kind = ? AND id = ?",
                (f"deleted {self._kind}", json.dumps(deleted), self._kind, id_),
            )


class Customers(Resources):
    """All customers; those that were deleted are remembered by their id."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, "customer")
        self._deleted = Resources(store, "deleted customer")

    def look_up(self, id_or_key: str) -> Document:
        """Return the one with this id, deleted or not, or this key; or answer 404."""
        found = self.find(id_or_key) or self._deleted.find(id_or_key)
        if found is None:
            detail = f"not found error: customer with id or key {id_or_key} not found"
            raise Problem(404, f"{detail} in default namespace")
        return found

    def get(self, id_or_key: str) -> Document:
        """Return the customer that `look_up` finds, or answer 412 if it is deleted."""
        found = self.look_up(id_or_key)
        if "deletedAt" in found:
            raise _gone(found)
        return found

    def of_subject(self, subject: str) -> Document:
        """Return the one that pays for *subject*, or answer 412 if deleted, or 404."""
        found = _payers(self, subject)
        if not found:
            if deleted := _payers(self._deleted, subject):
                raise _gone(deleted[-1])
            detail = f"not found error: customer with subject key {subject} not found"
            raise Problem(404, f"{detail} in default namespace")
        # A key wins against the subjects that another customer names.
        return min(found, key=lambda one: one.get("key") != subject)


def _payers(customers: Resources, subject: str) -> list[Document]:
    return [one for one in customers.all() if subject in subjects_of(one)]


def _gone(customer: Document) -> Problem:
    where = f"namespace=default customer.id={customer['id']}"
    return Problem(412, f"precondition failed error: customer is deleted [{where}]")
