"""The SQL of the SQLite store: each function is one step of a transaction.

==============  =================================================================
``accounts``    last balance of OpenMeter, with sums of usage and leases, by key
``spent``       usage that the balance does not contain, by key, origin and second
``leases``      amount leased, by key and lessee
``lessees``     living ledgers, with their origins
``watermarks``  visibility marks (*until*) of each origin, and the time (*at*) from
                which they hold
``questions``   the token bucket for questions to OpenMeter
``answers``     entitlement answers that processes share
``names``       random names of this store and of its spool
==============  =================================================================
"""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING

from openmeter_wsgi.quota.store import (
    LeaseReply,
    Lessee,
    lease_amount,
    left,
    refilled_tokens,
    seconds_until_token,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping, Sequence

    from openmeter_wsgi.quota.store import KnownBalance, LeaseRequest

#: The version of a file with these tables.
SCHEMA_VERSION = 2
#: Seconds for which a mark is kept: an answer needs the mark of its own time.
WATERMARK_TTL = 600.0
#: Seconds without use after which an account is removed.
ACCOUNT_TTL = 3_600.0
#: Minimum seconds between two marks of one origin.
WATERMARK_INTERVAL = 0.2
#: The origin of all processes that share the spool beside this file.
_HOST = "host"

SCHEMA = (
    "CREATE TABLE names (what TEXT PRIMARY KEY, name TEXT)",
    "CREATE TABLE lessees (lessee TEXT PRIMARY KEY, origin TEXT)",
    "CREATE TABLE watermarks (origin TEXT, at REAL, until REAL,"
    " PRIMARY KEY (origin, at)) WITHOUT ROWID",
    # spent and leased are sums over the next two tables, so that only a new balance
    # needs to read those.
    "CREATE TABLE accounts (key TEXT PRIMARY KEY, balance REAL, asked_at REAL,"
    " spent REAL, leased REAL, used_at REAL)",
    "CREATE TABLE spent (key TEXT, origin TEXT, second INTEGER, amount REAL,"
    " PRIMARY KEY (key, origin, second)) WITHOUT ROWID",
    "CREATE TABLE leases (key TEXT, lessee TEXT, amount REAL,"
    " PRIMARY KEY (key, lessee)) WITHOUT ROWID",
    "CREATE INDEX leases_of ON leases (lessee)",
    "CREATE TABLE questions (id INTEGER PRIMARY KEY, tokens REAL, at REAL)",
    "CREATE TABLE answers (key TEXT PRIMARY KEY, document BLOB, asked_at REAL)",
)


def create(db: sqlite3.Connection) -> None:
    """Create the tables."""
    for statement in SCHEMA:
        db.execute(statement)
    for what in ("store", "origin"):
        db.execute("INSERT INTO names VALUES (?, ?)", (what, secrets.token_hex(12)))
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def name(db: sqlite3.Connection, what: str) -> str:
    """Return the random name of the ``"store"`` or of its ``"origin"``."""
    row = db.execute("SELECT name FROM names WHERE what = ?", (what,)).fetchone()
    return str(row[0])


def enter(db: sqlite3.Connection, lessee: Lessee) -> None:
    """Add the lessee, unless it is there."""
    row = (lessee.token, _origin(lessee))
    added = db.execute("INSERT OR IGNORE INTO lessees VALUES (?, ?)", row).rowcount
    if added and lessee.is_alone:  # it was removed before: drop its infinite mark
        db.execute("DELETE FROM watermarks WHERE origin = ?", (lessee.token,))


def lessees(db: sqlite3.Connection) -> list[Lessee]:
    """Return all lessees."""
    rows = db.execute("SELECT lessee, origin FROM lessees").fetchall()
    return [Lessee(token, origin) for token, origin in rows]


def exchange(
    db: sqlite3.Connection,
    lessee: Lessee,
    request: LeaseRequest,
    now: float,
    store: str,
) -> LeaseReply:
    """Hand in usage and get a new lease: see :meth:`Store.exchange`."""
    key = request.key
    row = db.execute(
        "SELECT balance, asked_at, spent, leased FROM accounts WHERE key = ?", (key,)
    ).fetchone()
    balance, asked_at, spent, leased = row or (math.inf, -math.inf, 0.0, 0.0)
    spent += _add_spent(db, key, _origin(lessee), request.spent)
    answer = request.answer
    # A time in the future means that the clock was set back since.
    if answer and (answer.asked_at > asked_at or asked_at > now + 1):
        balance, asked_at = answer.balance, answer.asked_at
        spent, leased = _delete_contained(db, key, answer)
    leased += request.held - _leased(db, key, lessee.token)
    (count,) = db.execute("SELECT COUNT(*) FROM lessees").fetchone()
    available = left(balance, spent, leased, request.wanted)
    granted = lease_amount(available, request.wanted, count)
    added = granted or 0.0
    _set_lease(db, key, lessee.token, request.held + added)
    db.execute(
        "INSERT OR REPLACE INTO accounts VALUES (?, ?, ?, ?, ?, ?)",
        (key, balance, asked_at, spent, leased + added, now),
    )
    unspent = left(balance, spent, 0.0, request.wanted)
    return LeaseReply(granted, available, unspent, store)


def publish(db: sqlite3.Connection, lessee: Lessee, until: float, now: float) -> float:
    """Store a mark: see :meth:`Store.publish`."""
    origin = _origin(lessee)
    # Times in the future mean that the clock was set back since.
    db.execute("DELETE FROM watermarks WHERE origin = ? AND at > ?", (origin, now + 1))
    newest = db.execute(
        "SELECT at, until FROM watermarks WHERE origin = ? ORDER BY at DESC LIMIT 1",
        (origin,),
    ).fetchone()
    if newest and (until <= newest[1] or now < newest[0] + WATERMARK_INTERVAL):
        return float(newest[1])
    row = (origin, now, until)
    db.execute("INSERT OR REPLACE INTO watermarks VALUES (?, ?, ?)", row)
    # The newest of the old marks is kept: it holds until the next one.
    db.execute(
        "DELETE FROM watermarks WHERE origin = ?1 AND at < (SELECT MAX(at)"
        " FROM watermarks WHERE origin = ?1 AND at < ?2)",
        (origin, now - WATERMARK_TTL),
    )
    return until


def remove_lessee(db: sqlite3.Connection, lessee: Lessee, now: float) -> None:
    """Remove a lessee; its leases become usage of now, as they may have been used."""
    rows = db.execute(
        "SELECT key, amount FROM leases WHERE lessee = ?", (lessee.token,)
    ).fetchall()
    for key, amount in rows:
        _add_spent(db, key, _origin(lessee), {math.floor(now): amount})
        db.execute(
            "UPDATE accounts SET spent = spent + ?1, leased = leased - ?1"
            " WHERE key = ?2",
            (amount, key),
        )
    db.execute("DELETE FROM leases WHERE lessee = ?", (lessee.token,))
    db.execute("DELETE FROM lessees WHERE lessee = ?", (lessee.token,))
    if lessee.is_alone:  # its undelivered usage is lost: stop waiting for it
        row = (lessee.origin, now, math.inf)
        db.execute("INSERT OR REPLACE INTO watermarks VALUES (?, ?, ?)", row)


def prune(db: sqlite3.Connection, now: float) -> None:
    """Remove unused accounts and answers, and marks of origins without usage."""
    old = "SELECT key FROM accounts WHERE used_at < ? AND leased <= 0"
    for table in ("spent", "leases", "accounts"):
        db.execute(
            f"DELETE FROM {table} WHERE key IN ({old})",  # noqa: S608 - constants
            (now - ACCOUNT_TTL,),
        )
    db.execute("DELETE FROM answers WHERE asked_at < ?", (now - ACCOUNT_TTL,))
    db.execute(
        "DELETE FROM watermarks WHERE origin NOT IN (SELECT origin FROM spent)"
        " AND origin NOT IN (SELECT origin FROM lessees)"
    )


def take_token(
    db: sqlite3.Connection, rate: float, reserve: float, now: float
) -> float:
    """Take a token: see :meth:`Store.take_token`."""
    row = db.execute("SELECT tokens, at FROM questions").fetchone()
    tokens = refilled_tokens(row, rate, now)
    wait = seconds_until_token(tokens, rate, reserve)
    if not wait:
        tokens -= 1
    db.execute("INSERT OR REPLACE INTO questions VALUES (1, ?, ?)", (tokens, now))
    return wait


def share(db: sqlite3.Connection, key: str, document: bytes, asked_at: float) -> None:
    """Store a document: see :meth:`Store.share`."""
    db.execute(
        "INSERT INTO answers VALUES (?, ?, ?) ON CONFLICT DO UPDATE"
        " SET document = excluded.document, asked_at = excluded.asked_at"
        " WHERE excluded.asked_at >= asked_at",
        (key, document, asked_at),
    )


def shared(
    db: sqlite3.Connection, keys: Sequence[str]
) -> list[tuple[bytes, float] | None]:
    """Return the documents of *keys*: see :meth:`Store.shared`."""
    query = "SELECT document, asked_at FROM answers WHERE key = ?"
    return [db.execute(query, (key,)).fetchone() for key in keys]


def unshare(db: sqlite3.Connection, keys: Sequence[str]) -> None:
    """Remove the documents of *keys*."""
    db.executemany("DELETE FROM answers WHERE key = ?", [(key,) for key in keys])


def _origin(lessee: Lessee) -> str:
    # Not the spool's name: a file that was replaced since has another one.
    return lessee.token if lessee.is_alone else _HOST


def _add_spent(
    db: sqlite3.Connection, key: str, origin: str, spent: Mapping[int, float]
) -> float:
    """Add usage by second, and return its sum."""
    db.executemany(
        "INSERT INTO spent VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
        " SET amount = amount + excluded.amount",
        [(key, origin, second, amount) for second, amount in spent.items()],
    )
    return sum(spent.values())


def _delete_contained(
    db: sqlite3.Connection, key: str, answer: KnownBalance
) -> tuple[float, float]:
    """Delete the usage that a balance contains; return the sums of the rest and leases.

    A balance contains the usage before the mark that held when the question was sent.
    Usage from before the balance's usage period is deleted, too.
    """
    db.execute(
        "DELETE FROM spent WHERE key = ? AND (second + 1 <= ? OR second + 1 <= ("
        "SELECT until FROM watermarks WHERE origin = spent.origin AND at <= ?"
        " ORDER BY at DESC LIMIT 1))",
        (key, answer.since, answer.asked_at),
    )
    sums = []
    for table in ("spent", "leases"):
        query = f"SELECT TOTAL(amount) FROM {table} WHERE key = ?"  # noqa: S608
        sums += db.execute(query, (key,)).fetchone()
    return sums[0], sums[1]


def _leased(db: sqlite3.Connection, key: str, lessee: str) -> float:
    row = db.execute(
        "SELECT amount FROM leases WHERE key = ? AND lessee = ?", (key, lessee)
    ).fetchone()
    return row[0] if row else 0.0


def _set_lease(db: sqlite3.Connection, key: str, lessee: str, amount: float) -> None:
    if amount:
        row = (key, lessee, amount)
        db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", row)
    else:
        db.execute("DELETE FROM leases WHERE key = ? AND lessee = ?", (key, lessee))
