"""What a request gets that asks for an amount."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from openmeter_wsgi.ledger.chunk import Chunk


class Refusal(NamedTuple):
    """Not enough is left."""

    #: Only because of what is in flight or leased and may come back: within a second
    #: or two another try may go better. Else it takes a new answer.
    held_back: bool
    #: What is left all the same.
    available: float


class Reservation:
    """An amount set aside for one request."""

    __slots__ = ("_amount", "_chunk")

    def __init__(self, chunk: Chunk, amount: float) -> None:
        self._chunk = chunk
        self._amount: float | None = amount

    @property
    def key(self) -> str:
        """The key of the account that it is of."""
        return self._chunk.key

    def settle(self, amount: float) -> None:
        """Say what it came to, 0 if nothing. Once; later calls do nothing.

        Any thread, finalisers too; never asks the store.
        """
        chunk = self._chunk
        now = chunk.clock()
        chunk.acquire()
        try:
            reserved, self._amount = self._amount, None
            if reserved is None:
                return
            chunk.in_flight -= reserved
            chunk.free += reserved - amount
            if amount:
                spending = chunk.spending
                if 0.0 <= now - spending.second < 1.0:
                    spending.amount += amount
                else:
                    spending.add(int(now), amount)
        finally:
            chunk.release()
