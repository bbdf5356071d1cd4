"""What is created by hand rather than by use: meters, customers, entitlements."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.windows import rfc3339

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.sandbox.store import Store

Document = dict[str, Any]

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def ulid() -> str:
    """Return a new id of the form that OpenMeter gives its resources."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


class Resources:
    """All resources of one kind, by id and by key.

    :param kind: what one of them is called in an error.
    :param key: the property of a document that is unique among its kind.
    """

    def __init__(self, store: Store, kind: str, *, key: str) -> None:
        self._store = store
        self._kind = kind
        self._key = key

    def create(self, document: Document) -> Document:
        """Store *document* with an id and times of its own, and return that."""
        now = rfc3339(self._store.clock())
        created = {"id": ulid(), "createdAt": now, "updatedAt": now, **document}
        try:
            self._insert(created)
        except sqlite3.IntegrityError:
            key = document.get(self._key)
            detail = f"{self._kind} with {self._key} {key} already exists"
            raise Problem(409, detail) from None
        return created

    def _insert(self, document: Document) -> None:
        with self._store.writing() as connection:
            connection.execute(
                "INSERT INTO resources VALUES (?, ?, ?, ?)",
                (
                    self._kind,
                    document["id"],
                    document.get(self._key),
                    json.dumps(document),
                ),
            )

    def change(self, id_: str, edit: Callable[[Document], None]) -> Document:
        """Let *edit* change the one with this id, while nobody else does.

        What *edit* raises is raised, and then nothing is changed.
        """
        with self._store.writing() as connection:
            (text,) = connection.execute(
                "SELECT document FROM resources WHERE kind = ? AND id = ?",
                (self._kind, id_),
            ).fetchone()
            document: Document = json.loads(text)
            edit(document)
            document["updatedAt"] = rfc3339(self._store.clock())
            connection.execute(
                "UPDATE resources SET document = ? WHERE kind = ? AND id = ?",
                (json.dumps(document), self._kind, id_),
            )
        return document

    def update(self, document: Document) -> Document:
        """Replace what has the id of *document*."""
        updated = {**document, "updatedAt": rfc3339(self._store.clock())}
        with self._store.writing() as connection:
            connection.execute(
                "UPDATE resources SET document = ? WHERE kind = ? AND id = ?",
                (json.dumps(updated), self._kind, document["id"]),
            )
        return updated

    def all(self) -> list[Document]:
        """Return all, oldest first."""
        with self._store.reading() as connection:
            return self.within(connection)

    def within(self, connection: sqlite3.Connection) -> list[Document]:
        """Return all, as *connection* sees them."""
        rows = connection.execute(
            "SELECT document FROM resources WHERE kind = ? ORDER BY rowid",
            (self._kind,),
        )
        return [json.loads(document) for (document,) in rows]

    def find(self, id_or_key: str) -> Document | None:
        """Return the one with this id or key."""
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
            raise Problem(404, f"{self._kind} with id or key {id_or_key} not found")
        return found

    def with_prefix(self, prefix: str) -> list[Document]:
        """Return those whose key begins with *prefix*, oldest first."""
        with self._store.reading() as connection:
            rows = connection.execute(
                "SELECT document FROM resources WHERE kind = ?"
                " AND key >= ? AND key < ? ORDER BY rowid",
                (self._kind, prefix, prefix + "\U0010ffff"),
            )
            return [json.loads(document) for (document,) in rows]

    def retire(self, id_: str) -> None:
        """Delete the one with this id, but remember that it was there."""
        deleted = {"deletedAt": rfc3339(self._store.clock())}
        with self._store.writing() as connection:
            connection.execute(
                "UPDATE resources SET kind = ?, key = NULL,"
                " document = json_patch(document, ?) WHERE kind = ? AND id = ?",
                (f"deleted {self._kind}", json.dumps(deleted), self._kind, id_),
            )

    def delete(self, id_or_key: str) -> None:
        """Remove the one with this id or key, or answer 404."""
        document = self.get(id_or_key)
        with self._store.writing() as connection:
            connection.execute(
                "DELETE FROM resources WHERE kind = ? AND id = ?",
                (self._kind, document["id"]),
            )
