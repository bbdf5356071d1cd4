"""Counting down quotas between two answers, so that none is overshot."""

from __future__ import annotations

import atexit
import os
import threading
from typing import TYPE_CHECKING

from openmeter_wsgi import log

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from openmeter_wsgi.ledger import Ledger, Refusal, Reservation
    from openmeter_wsgi.options.entitlement_values import CountedMeter

logger = log.get_logger(__name__)

#: Seconds between two looks after what is leased and not used.
_TEND_INTERVAL = 0.5


class Countdown:
    """The quotas of all customers, as far as this process uses them.

    Any thread. Nothing is opened and no thread started before the first answer with a
    balance.
    """

    def __init__(
        self,
        ledger: Ledger,
        meters: Mapping[str, CountedMeter],
        *,
        tends: bool = True,
    ) -> None:
        #: By feature.
        self.meters = meters
        self._ledger = ledger
        #: Whether a thread looks after what is leased: in a short life none is needed.
        self._tends = tends
        self._tending: threading.Thread | None = None
        self._closed = threading.Event()
        self._pid = os.getpid()

    def answered(
        self, customer: str, feature: str, balance: float | None, asked_at: float
    ) -> None:
        """Take over the balance that OpenMeter said; *asked_at* is wall clock."""
        if balance is not None and feature in self.meters:
            self._ledger.account(_key(customer, feature)).answered(balance, asked_at)
            if self._tending is None and self._tends:
                self._start_tending()

    def reserve(
        self, customer: str, feature: str, amount: float
    ) -> Reservation | Refusal:
        """Set *amount* apart for a request that begins, or say why not."""
        return self._ledger.account(_key(customer, feature)).reserve(amount)

    def remaining(self, customer: str, feature: str) -> float:
        """Return about how much is left."""
        return self._ledger.account(_key(customer, feature)).available()

    def settle(
        self, reserved: Iterable[Reservation], used: dict[tuple[str, str], float]
    ) -> None:
        """Let reservations become what was *used*, by customer and feature.

        What was used without a reservation is counted, too.
        """
        left = {_key(*whose): amount for whose, amount in used.items()}
        for reservation in reserved:
            reservation.settle(left.pop(reservation.key, 0.0))
        for key, amount in left.items():
            if amount:
                self._ledger.account(key).spend(amount)

    def close(self) -> None:
        """Hand back what is leased. A later answer begins anew.

        In a child of a fork it does nothing: all of this is its parent's.
        """
        if os.getpid() != self._pid:
            return
        thread, self._tending = self._tending, None
        if thread is None:
            return
        self._closed.set()
        self._closed = threading.Event()
        atexit.unregister(self.close)
        self._ledger.close()

    def _start_tending(self) -> None:
        self._tending = thread = threading.Thread(
            target=self._tend,
            args=(self._closed,),
            name="openmeter_wsgi.ledger",
            daemon=True,
        )
        atexit.register(self.close)
        try:
            thread.start()
        except RuntimeError as error:
            logger.error(
                "%s: no thread can be started to hand back what is not used", error
            )

    def _tend(self, closed: threading.Event) -> None:
        while not closed.wait(_TEND_INTERVAL):
            self._ledger.tend()


def _key(customer: str, feature: str) -> str:
    return f"{customer}\0{feature}"
