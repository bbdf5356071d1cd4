"""Who of the lessees lives. A store calls one thread at a time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from openmeter_wsgi.lock import LOCK, SegmentLock, is_alive, remove_lock

if TYPE_CHECKING:
    from pathlib import Path


class HostPresence:
    """The lessees of a host: one lives as long as its process holds its lock."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._owners: dict[tuple[int, str], SegmentLock] = {}

    def enter(self, token: str) -> None:
        """Take the lock of a lessee of this process, if it has it not yet.

        :raises OSError: if the directory cannot take it.
        """
        key = (os.getpid(), token)
        if key not in self._owners:
            self._owners[key] = SegmentLock.register(self._directory, token)

    def leave(self, token: str) -> None:
        """Give the lock up."""
        owner = self._owners.pop((os.getpid(), token), None)
        if owner is not None:
            owner.leave(nothing_left=True)

    def is_alive(self, token: str) -> bool:
        """Say whether a lessee lives, and if not, that is for ever."""
        return is_alive(self._directory, token)

    def bury(self, token: str) -> None:
        """Delete the lock file of a dead one."""
        remove_lock(self._directory / (token + LOCK))


class ProcessPresence:
    """The lessees of one process: one lives until it leaves."""

    def __init__(self) -> None:
        self._tokens: set[str] = set()

    def enter(self, token: str) -> None:
        """Remember the lessee."""
        self._tokens.add(token)

    def leave(self, token: str) -> None:
        """Forget it."""
        self._tokens.discard(token)

    def is_alive(self, token: str) -> bool:
        """Say whether it has not left."""
        return token in self._tokens

    def bury(self, token: str) -> None:
        """Do nothing: there is nothing left of it."""
