"""A store in SQLite: a file for all processes of a host, or memory for one.

The file is a cache. It is never synced: what a loss of power takes, the next answers
bring back. One that cannot be read is set aside, and a new one made.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from openmeter_wsgi.ledger import tables
from openmeter_wsgi.ledger.database import Database
from openmeter_wsgi.ledger.presence import HostPresence, ProcessPresence

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from openmeter_wsgi.ledger.terms import Lease, Lessee, Request

NAME = "ledger.sqlite"
#: Seconds between two looks for what nobody uses any more.
_PRUNE_INTERVAL = 60.0


class SqliteStore:
    """The ledger of a host in *directory*, or of one process without.

    *clock* is for questions alone.
    """

    returns = 0

    def __init__(
        self, directory: Path | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._directory = directory
        self._database = Database(directory and directory / NAME)
        self._clock = clock
        self._present: HostPresence | ProcessPresence = (
            HostPresence(directory) if directory else ProcessPresence()
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
        return self._database.within(lambda db: tables.name(db, "origin"))

    def exchange(
        self, lessee: Lessee, requests: Sequence[Request], now: float
    ) -> list[Lease]:
        """Hand in what was spent and take new leases: one transaction."""

        def work(db: sqlite3.Connection) -> list[Lease]:
            self._present.enter(lessee.token)
            tables.enter(db, lessee)
            return [
                tables.exchange(db, lessee, request, now, self._database.name)
                for request in requests
            ]

        return self._database.within(work)

    def publish(self, lessee: Lessee, until: float, now: float) -> None:
        """Write a watermark of the lessee's origin."""
        self._database.within(lambda db: tables.publish(db, lessee, until, now))

    def look(self, lessee: Lessee, now: float) -> bool:  # noqa: ARG002 - see Store
        """Bury the dead, and say whether there were any."""
        self._database.check_place()
        known = self._database.within(tables.lessees, write=False)
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

        self._database.within(work)
        self._pruned_at = now
        return bool(dead)

    def leave(self, lessee: Lessee, now: float) -> None:
        """Give up what the lessee has; a lease it still holds counts as spent."""
        try:
            if self._database.is_open:
                self._database.within(lambda db: tables.bury(db, lessee, now))
        finally:
            self._present.leave(lessee.token)

    def take_question(self, rate: float, *, reserve: float = 0.0) -> float:
        """Take a token of the bucket."""
        now = self._clock()
        return self._database.within(
            lambda db: tables.take_question(db, rate, reserve, now)
        )

    def close(self) -> None:
        """Close the connection."""
        self._database.close()
