"""Who of the owners in a spool lives, asked now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from openmeter_wsgi.ownership import is_alive, owner_of_lock, remove_lock

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from openmeter_wsgi.delivery.segment import SegmentName

#: Seconds between two calls.
INTERVAL = 0.5


class RollCall:
    """Knows who has died, and tidies up after those who left nothing.

    Belongs to the elected sender: two that try each other's locks at a time would
    see the dead alive.
    """

    def __init__(self, directory: Path) -> None:
        self.dead: set[str] = set()
        self._directory = directory
        self._due_at = 0.0

    def due(self) -> None:
        """Have the next call made in any case."""
        self._due_at = 0.0

    def call(self, entries: Iterable[str], names: Iterable[SegmentName]) -> None:
        """Find out who has died; *entries* is all that is in the directory."""
        now = time.monotonic()
        if now < self._due_at:
            return
        self._due_at = now + INTERVAL
        owners = {name.owner for name in names}
        alive = {owner for owner in owners - self.dead if self._is_alive(owner)}
        self.dead = owners - alive
        for name in names:
            if name.unfinished and name.owner in self.dead:
                (self._directory / str(name)).unlink(missing_ok=True)
        for entry in entries:
            owner = owner_of_lock(entry)
            if owner is not None and owner not in owners:
                remove_lock(self._directory / entry)

    def _is_alive(self, owner: str) -> bool:
        return is_alive(self._directory, owner)
