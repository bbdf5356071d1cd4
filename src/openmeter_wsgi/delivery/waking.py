"""Waking the thread that delivers, from wherever an event is put."""

from __future__ import annotations

import contextlib
import threading


class Signal:
    """Wakes one thread. Its `set` waits for nothing, so it may interrupt itself.

    The `set` of a threading.Event takes a lock: called by a finaliser in the middle
    of another `set`, it would wait for itself.
    """

    __slots__ = ("_unset",)

    def __init__(self) -> None:
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        """Let the thread that waits, or else the next that does, go on."""
        with contextlib.suppress(RuntimeError):  # it is set already
            self._unset.release()

    def clear(self) -> None:
        """Forget a `set` that nobody waited for."""
        self._unset.acquire(blocking=False)

    def wait(self, timeout: float | None) -> None:
        """Wait until it is set or the time is over, and clear it."""
        self._unset.acquire(timeout=-1 if timeout is None else timeout)
