"""The store of the sandbox: events and resources in one SQLite file.

An *arrival* is an event that arrived, stored or rejected. All arrivals have one
sequence of numbers (``seq``). A stored event becomes *visible* to meters, balances and
lists only after a delay, as in OpenMeter; `Store.horizon` is the last visible number.
"""

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

from openmeter_wsgi.sandbox.request_validation import Problem, rfc3339
from openmeter_wsgi.sandbox.usage import install

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from openmeter_wsgi.sandbox.request_validation import Document


@dataclass(frozen=True, slots=True)
class Event:
    """An event with the fields of OpenMeter's Kafka message, which has no others."""

    id: str
    source: str
    type: str
    subject: str
    #: Seconds since 1970; OpenMeter meters at this resolution.
    time: int
    #: JSON text, or None if the event has no data.
    data: str | None
    #: True if the data is no JSON. OpenMeter detects this late and answers 500.
    broken: bool = False

    @property
    def drop_reason(self) -> str | None:
        """The reason why OpenMeter accepts the event but drops it later, or None."""
        if self.time <= 0:
            return f"its time is 1970 or earlier: {_DROPPED}"
        return None if self.source else f"its source is no URI with a name: {_DROPPED}"

    @property
    def key(self) -> str:
        """OpenMeter's deduplication key; ``a-b``, ``c`` has that of ``a``, ``b-c``."""
        return f"default-{self.source}-{self.id}"


def subjects_of(customer: Document) -> list[str]:
    """Return the subjects that *customer* pays for: its key and its subject keys."""
    key = customer.get("key")
    return [*([key] if key else ()), *subject_keys(customer)]


def subject_keys(customer: Document) -> list[str]:
    """Return the subject keys of *customer*, without its own key."""
    return list((customer.get("usageAttribution") or {}).get("subjectKeys", ()))


REJECTED_TABLES = """
CREATE TABLE IF NOT EXISTS rejected (
    -- The order of arrival, in one sequence with the stored events.
    seq INTEGER PRIMARY KEY,
    outcome TEXT NOT NULL,
    reason TEXT NOT NULL,
    position INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    id TEXT,
    source TEXT,
    type TEXT,
    subject TEXT,
    -- Whole seconds, or for an invalid event any text.
    time,
    data TEXT,
    ingested_at REAL NOT NULL
);
"""
#: Maximum number of rejected events that are kept; the oldest are deleted.
KEPT = 20_000
#: Maximum number of rejected events that are kept of one request.
KEPT_OF_REQUEST = 1_000
#: Maximum number of characters of an attribute that are kept of an invalid event.
MAX_TEXT = 300
#: Maximum number of characters of the data that are kept of an invalid event.
MAX_DATA = 10_000
_ATTRIBUTES = ("id", "source", "type", "subject", "time")


class Outcome(StrEnum):
    """The outcome of an event that arrived and was not stored."""

    DUPLICATE = "duplicate"
    #: Accepted with a 204, but not stored, see `Event.drop_reason`.
    DROPPED = "dropped"
    #: The request was answered with 4xx.
    REFUSED = "refused"
    #: The request was answered with an error by a simulated fault, or with 500.
    FAILED = "failed"


class Rejected(NamedTuple):
    """An event that was not stored. The fields are the columns of the table."""

    outcome: Outcome
    reason: str
    #: The position of the event in the request, from 1.
    position: int
    #: The number of events in the request.
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
    """Insert *rows* with numbers from *first* on, and delete the oldest rows."""
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

    :param culprit: the position of the event that caused the error, from 1; None if
        the whole request caused it.
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
    """Return the attributes of *item* as texts. It may be any JSON value."""
    if not isinstance(item, dict):
        return {"data": None if item is None else _text(item, MAX_DATA)}
    texts = {n: _text(item[n], MAX_TEXT) for n in _ATTRIBUTES if n in item}
    if item.get("data") is not None:
        texts["data"] = _text(item["data"], MAX_DATA)
    return texts


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # SQLite cannot store single surrogates.
    return text[:limit].encode("utf-8", "replace").decode()


#: The version of the tables below.
_VERSION = 2
TABLES = f"""
PRAGMA journal_mode = WAL;
-- The events of a sandbox may be lost when the power fails.
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
    -- The time at which the event becomes visible.
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
#: SQL for the number of the last arrival, stored or rejected.
NEWEST = """SELECT max(ifnull((SELECT max(seq) FROM events), 0),
    ifnull((SELECT max(seq) FROM rejected), 0))"""

#: A number greater than that of any event.
EVERYTHING = 2**63 - 1


_DUPLICATE = "an event with this source and id had arrived before"
_DROPPED = "OpenMeter answers 204 and drops it without an error"


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
    """The events and resources of one sandbox. Thread-safe.

    A lock protects the connection for writing; each concurrent reader has another
    connection. With SQLite's write-ahead log they do not block each other.

    :param path: the SQLite file; None for a temporary file, which `close` removes.
    :param dedupe: True to drop an event whose source and id were seen before.
    :param visible_after: the seconds from an event's arrival until it is visible; may
        be changed at any time.
    :param clock: a function that returns the current time in Unix seconds.
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
        #: The connections of readers that are not in use.
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
                "the file was created by another version of the sandbox, or by another "
                "program; delete it or name a new file"
            )
        self._writer.executescript(TABLES + REJECTED_TABLES)
        row = self._writer.execute("SELECT max(stored_at) FROM events").fetchone()
        #: The time at which all events are visible.
        self._all_visible_at = row[0] or 0.0

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=10, isolation_level=None, check_same_thread=False
        )
        install(connection)
        return connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection that reads one consistent snapshot."""
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
        """Yield the connection that writes, in one transaction."""
        with self._lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                self._writer.rollback()
                raise
            self._writer.commit()

    def add(self, events: Sequence[Event]) -> dict[str, int]:
        """Store *events* unless they are duplicates or dropped; return the numbers."""
        duplicates = 0
        rows: list[tuple[Any, ...]] = []
        rejected: list[Rejected] = []
        with self.writing() as connection:
            now = self.clock()
            # Events become visible in the order of arrival, even if the delay changes.
            visible_at = max(now + self._visible_after, self._all_visible_at)
            self._all_visible_at = visible_at
            for position, event in enumerate(events, 1):
                if self._is_duplicate(connection, event.key):
                    duplicates += 1
                    if self.dedupe:
                        rejected.append(_rejected(event, _DUPLICATE, position, events))
                        continue
                if reason := event.drop_reason:
                    rejected.append(_rejected(event, reason, position, events))
                    continue
                rows.append(
                    (event.id, event.source, event.type, event.subject, event.time,
                     event.data, now, visible_at)
                )  # fmt: skip
            self._insert(connection, rows, rejected, now)
        dropped = sum(event.outcome is Outcome.DROPPED for event in rejected)
        return {"stored": len(rows), "duplicates": duplicates, "dropped": dropped}

    def claim(self, events: Sequence[Event]) -> None:
        """Store the ids of *events* for deduplication, but not the events."""
        with self.writing() as connection:
            for event in events:
                self._is_duplicate(connection, event.key)

    def reject(self, events: Sequence[Rejected]) -> None:
        """Store *events* as rejected."""
        with self.writing() as connection:
            self._insert(connection, [], events, self.clock())

    @staticmethod
    def _insert(
        connection: sqlite3.Connection,
        rows: Sequence[tuple[Any, ...]],
        rejected: Sequence[Rejected],
        now: float,
    ) -> None:
        (newest,) = connection.execute(NEWEST).fetchone()
        connection.executemany(
            "INSERT INTO events (seq, id, source, type, subject, time, data,"
            " ingested_at, stored_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [(seq, *row) for seq, row in enumerate(rows, newest + 1)],
        )
        if rejected:
            insert_rejected(connection, rejected, newest + len(rows) + 1, now)

    @property
    def visible_after(self) -> float:
        """The seconds from an event's arrival until it is visible.

        A change applies at once to events that are not visible yet.
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
            row = connection.execute("SELECT max(stored_at) FROM events").fetchone()
            self._all_visible_at = row[0] or 0.0

    def horizon(self, connection: sqlite3.Connection) -> int:
        """Return the number of the newest visible event, or `EVERYTHING`.

        OpenMeter's sink stores events some time after the response to the client. Until
        then no meter, balance or list includes them.
        """
        now = self.clock()
        if now >= self._all_visible_at:
            return EVERYTHING
        row = connection.execute(
            "SELECT seq FROM events WHERE stored_at <= ? ORDER BY seq DESC LIMIT 1",
            (now,),
        ).fetchone()
        return row[0] if row else 0

    @staticmethod
    def _is_duplicate(connection: sqlite3.Connection, key: str) -> bool:
        """Return True if *key* was seen before, and remember it."""
        cursor = connection.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,))
        return cursor.rowcount == 0

    def close(self) -> None:
        """Close all connections and remove a temporary file."""
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
    """Return a new id in the form of OpenMeter's ids."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


#: OpenMeter's messages for a missing resource.
_UNKNOWN = {
    "meter": "not found error: meter not found: {}",
    "feature": "feature not found: {}",
    "subject": "not found error: subject not found"
    " [namespace=default subject.idOrKey={}]",
}
#: OpenMeter's messages for a key that is in use.
_TAKEN = {
    "meter": "conflict error: meter with the same slug already exists",
    "feature": "feature {id} with key {key} already exists",
}


class Resources:
    """All resources of one kind, by id and by key.

    :param kind: the name of the kind, in the singular.
    :param key: the name of the property that is unique among resources of the kind.
    """

    def __init__(self, store: Store, kind: str, *, key: str = "key") -> None:
        self._store = store
        self._kind = kind
        self._key = key

    def create(self, document: Document) -> Document:
        """Store *document* with a new id and times, and return it."""
        now = rfc3339(self._store.clock())
        created = {"id": ulid(), "createdAt": now, "updatedAt": now, **document}
        key = document.get(self._key)
        row = (self._kind, created["id"], key, json.dumps(created))
        try:
            with self._store.writing() as connection:
                connection.execute("INSERT INTO resources VALUES (?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            existing = self.find(str(key)) or {}
            detail = _TAKEN.get(self._kind, "conflict error: {key} already exists")
            raise Problem(409, detail.format(id=existing.get("id"), key=key)) from None
        return created

    def change(self, id_: str, edit: Callable[[Document], None]) -> Document:
        """Change the resource with this id by *edit*, under a lock.

        If *edit* raises, nothing is changed and the error is raised.
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
        """Replace the resource that has the id of *document*."""

        def replace(current: Document) -> None:
            current.clear()
            current.update(document)

        return self.change(document["id"], replace)

    def all(self) -> list[Document]:
        """Return all resources, the oldest first."""
        with self._store.reading() as connection:
            return self.within(connection)

    def within(
        self, connection: sqlite3.Connection, prefix: str = ""
    ) -> list[Document]:
        """Return the resources whose key begins with *prefix*, read by *connection*."""
        rows = connection.execute(
            "SELECT document FROM resources WHERE kind = ?"
            " AND (? = '' OR (key >= ? AND key < ?)) ORDER BY rowid",
            (self._kind, prefix, prefix, prefix + "\U0010ffff"),
        )
        return [json.loads(document) for (document,) in rows]

    def find(self, id_or_key: str) -> Document | None:
        """Return the resource with this id or key, or None."""
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
        """Return the resource with this id or key, or answer 404."""
        found = self.find(id_or_key)
        if found is None:
            raise Problem(404, _UNKNOWN[self._kind].format(id_or_key))
        return found

    def retire(self, id_: str) -> None:
        """Move the resource with this id to the kind of deleted resources."""
        deleted = {"deletedAt": rfc3339(self._store.clock())}
        with self._store.writing() as connection:
            connection.execute(
                "UPDATE resources SET kind = ?, key = NULL,"
                " document = json_patch(document, ?) WHERE kind = ? AND id = ?",
                (f"deleted {self._kind}", json.dumps(deleted), self._kind, id_),
            )


class Customers(Resources):
    """All customers; deleted customers can still be found by their id."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, "customer")
        self._deleted = Resources(store, "deleted customer")

    def look_up(self, id_or_key: str) -> Document:
        """Return the customer with this key or id, even if deleted; or answer 404."""
        found = self.find(id_or_key) or self._deleted.find(id_or_key)
        if found is None:
            detail = f"not found error: customer with id or key {id_or_key} not found"
            raise Problem(404, f"{detail} in default namespace")
        return found

    def get(self, id_or_key: str) -> Document:
        """Return the customer that `look_up` finds, or answer 412 if it is deleted."""
        customer = self.look_up(id_or_key)
        if "deletedAt" in customer:
            raise _gone(customer)
        return customer

    def of_subject(self, subject: str) -> Document:
        """Return the payer of *subject*; answer 404, or 412 if it is deleted."""
        payers = _payers(self, subject)
        if not payers:
            if deleted := _payers(self._deleted, subject):
                raise _gone(deleted[-1])
            detail = f"not found error: customer with subject key {subject} not found"
            raise Problem(404, f"{detail} in default namespace")
        # The customer with this key is preferred to one with this subject key.
        return min(payers, key=lambda customer: customer.get("key") != subject)


def _payers(customers: Resources, subject: str) -> list[Document]:
    return [c for c in customers.all() if subject in subjects_of(c)]


def _gone(customer: Document) -> Problem:
    where = f"namespace=default customer.id={customer['id']}"
    return Problem(412, f"precondition failed error: customer is deleted [{where}]")
