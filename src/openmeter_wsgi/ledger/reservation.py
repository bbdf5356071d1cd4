"""What a request gets that asks for an amount."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from openmeter_wsgi.ledger.account import Account


class Refusal(NamedTuple):
    """Not enough is left."""

    #: Only because of what is in flight or leased and may come back: within a second
    #: or two another try may go better. Else it takes a new answer.
    held_back: bool
    #: What is left all the same.
    available: float


class Reservation:
    """An amount set aside for one request."""

    __slots__ = ("_account", "_amount")

    def __init__(self, account: Account, amount: float) -> None:
        self._account = account
        self._amount: float | None = amount

    @property
    def key(self) -> str:
        """The key of the account that it is of."""
        return self._account.key

    def settle(self, amount: float) -> None:
        """Say what it came to, 0 if nothing. Once; later calls do nothing.

        Any thread, finalisers too; never asks the store.
        """
        account = self._account
        now = account.clock()
        account.acquire()
        try:
            reserved, self._amount = self._amount, None
            if reserved is None:
                return
            account.in_flight -= reserved
            account.chunk += reserved - amount
            if amount:
                spending = account.spending
                if 0.0 <= now - spending.second < 1.0:
                    spending.amount += amount
                else:
                    spending.add(int(now), amount)
        finally:
            account.release()
