"""What a process has leased of one balance, and what became of it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from openmeter_wsgi.ledger.spending import Spending

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Chunk:
    """The part of one balance that a process has leased. Any thread.

    The lock is held for a few instructions, never while a store is asked. It can be
    taken again by a finaliser that settles in the middle of them: each instruction
    changes one amount, so none is lost.
    """

    __slots__ = (
        "_beside", "acquire", "clock", "free", "in_flight", "key", "lock", "release",
        "spending", "was_used",
    )  # fmt: skip

    def __init__(self, key: str, clock: Callable[[], float]) -> None:
        self.key = key
        self.clock = clock
        self.lock = threading.RLock()
        #: On the fast path: a with statement costs as much as all of the rest.
        self.acquire, self.release = self.lock.acquire, self.lock.release
        #: Leased and not reserved. Below zero: spent beyond what was leased.
        self.free = 0.0
        #: Leased and reserved.
        self.in_flight = 0.0
        self.spending = Spending()
        #: Left in the store, beside what is leased here.
        self._beside = 0.0
        #: Whether something was taken since this was last cleared.
        self.was_used = False

    def take(self, amount: float) -> bool:
        """Set *amount* aside if it is free; 0 if anything at all is."""
        self.acquire()
        try:
            if suffices := self.free >= amount and self.free > 0:
                self.free -= amount
                self.in_flight += amount
                self.was_used = True
        finally:
            self.release()
        return suffices

    def overdraw(self, amount: float) -> None:
        """Set *amount* aside although it is not free."""
        with self.lock:
            self.free -= amount
            self.in_flight += amount

    def left(self) -> float:
        """Return about how much of the balance is left, here and in the store."""
        with self.lock:
            return max(self._beside + self.free, 0.0)

    @property
    def is_empty(self) -> bool:
        """Whether nothing would be missed if it were forgotten."""
        return not (self.free or self.in_flight or self.spending)

    # -- One exchange with the store

    def give_back(self) -> tuple[float, float, dict[int, float]]:
        """Give back what is free; return that, what is in flight and what was spent."""
        with self.lock:
            free, self.free = self.free, 0.0
            self._beside += free
            return free, self.in_flight, self.spending.take()

    def put_in(self, granted: float, *, taken: float, beside: float) -> None:
        """Put in what was *granted*, *taken* of it as being in flight already."""
        with self.lock:
            self.in_flight += taken
            self.free += granted - taken
            self._beside = beside

    def take_back(self, free: float, spent: Mapping[int, float]) -> None:
        """Undo `give_back`."""
        with self.lock:
            self.free += free
            self._beside -= free
            self.spending.put_back(spent)

    def recently_spent(self, *, but: Mapping[int, float]) -> dict[int, float]:
        """Return what was handed in and is perhaps in no answer, without *but*."""
        with self.lock:
            return self.spending.recent(but=but)

    def forget_before(self, moment: float) -> None:
        """Forget what was handed in of seconds that an answer has long covered."""
        with self.lock:
            self.spending.forget_before(moment)
