"""The ledger: the accounts of one process, tended in the background."""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
from collections import OrderedDict, deque
from itertools import islice
from typing import TYPE_CHECKING, Final

from openmeter_wsgi import log
from openmeter_wsgi.lock import new_token
from openmeter_wsgi.quota.account import Account
from openmeter_wsgi.quota.store import Lessee
from openmeter_wsgi.threads import Wakeup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from openmeter_wsgi.options import CountedMeter
    from openmeter_wsgi.quota.account import NotReserved, Reservation
    from openmeter_wsgi.quota.store import Begun, Lease, Request, Store

logger: Final = log.get_logger(__name__)

#: So many accounts go into one transaction: others wait for it.
_BATCH = 100
#: A mark is published this often even if nothing waits for it: a store that was
#: lost knows none.
_HEARTBEAT = 10.0


#: Maximum number of accounts that are remembered to give back at once.
_MAX_UNUSED = 1_000


class Ledger:
    """The accounts of this process, as the store has them.

    It belongs to one process; a child of a fork makes another. *origin* is what has
    one mark, and *visible_until* returns it: all usage that was settled there before
    that moment (wall clock, in seconds) is in the answers of OpenMeter from now on.
    """

    def __init__(
        self,
        store: Store,
        *,
        visible_until: Callable[[], float],
        origin: str | None = None,
        clock: Callable[[], float] = time.time,
        max_accounts: int = 10_000,
    ) -> None:
        self._store = store
        self._origin = origin
        self._visible_until = visible_until
        self._clock = clock
        self._max_accounts = max_accounts
        self._pid = os.getpid()
        #: Can be taken again by a finaliser that settles.
        self._lock = threading.RLock()
        self._accounts: OrderedDict[str, Account] = OrderedDict()
        self._token = new_token()
        self._known: Lessee | None = None
        #: All that was spent here, and is in the store, was settled before this.
        self._settled_until = 0.0
        #: The mark last published.
        self._published = 0.0
        self._published_at = 0.0
        self._returns = 0
        #: Set when a lease is to be given back at once.
        self.wakeup: Wakeup = Wakeup()
        #: The keys of their accounts. What finds no room is given back by `tend`.
        self._unused: deque[str] = deque(maxlen=_MAX_UNUSED)

    def account(self, key: str) -> Account:
        """Return the account of *key*: one customer's balance of one feature.

        Ask for it anew with every request: what nobody used for long gives way.
        """
        try:
            account = self._accounts[key]
            self._accounts.move_to_end(key)
        except KeyError:
            return self._new_account(key)
        return account

    def tend(self) -> None:
        """Hand in what was spent, give back what lies idle, bury who has died.

        To be called about twice a second by a thread of the caller's. Never raises.
        """
        if os.getpid() != self._pid or self._known is None:
            return
        try:
            now = self._clock()
            lessee = self._lessee()
            if self._store.look(lessee, now):
                self._settled_until = max(self._settled_until, now + 1)
            returned, self._returns = self._returns, self._store.returns
            with self._lock:
                accounts = list(self._accounts.values())
            if self._returns == returned:  # else all have something to say
                accounts = [account for account in accounts if account.due(now)]
            self._settle(accounts)
            self._make_room()
            self._publish(lessee)
        except Exception:
            logger.exception("%s: could not be tended and is soon again", "ledger")

    def _note_unused(self, key: str) -> None:
        """Have an account give back what it holds. Finalisers call this, too."""
        self._unused.append(key)
        self.wakeup.set()

    def give_back_unused(self) -> None:
        """Give back what requests left of scarce leases. Never raises."""
        keys = {self._unused.popleft() for _ in range(len(self._unused))}
        try:
            accounts = [self._accounts[key] for key in keys if key in self._accounts]
            self._settle(accounts, giving_up=True)
        except Exception:
            logger.exception("%s: an unused lease is given back later", "ledger")

    def close(self) -> None:
        """Hand everything in; what is still in flight counts as spent."""
        if os.getpid() != self._pid or self._known is None:
            return
        try:
            self._settle(list(self._accounts.values()), giving_up=True)
            self._publish(self._known)
            self._store.leave(self._known, self._clock())
        except Exception:
            logger.exception("%s: could not be closed in order", "ledger")
        finally:
            self._known = None

    def _new_account(self, key: str) -> Account:
        account = Account(
            key,
            self._exchange,
            visible_until=lambda: self._published,
            clock=self._clock,
            on_unused=self._note_unused,
        )
        with self._lock:
            return self._accounts.setdefault(key, account)

    def _settle(self, accounts: list[Account], *, giving_up: bool = False) -> None:
        for start in range(0, len(accounts), _BATCH):
            begun = [
                (account, step)
                for account in accounts[start : start + _BATCH]
                if (step := account.try_begin(giving_up=giving_up))
            ]
            self._exchange_all(begun)

    def _exchange_all(self, begun: list[tuple[Account, Begun]]) -> None:
        open_ = deque(begun)
        try:
            leases = self._exchange([step.request for _, step in begun])
            for lease in leases:
                account, step = open_[0]
                account.finish(step, lease)
                open_.popleft()
        finally:
            for account, step in open_:
                account.fail(step)
            for account, _ in begun:
                account.end()

    def _make_room(self) -> None:
        """Forget the accounts that were used least recently and are at rest."""
        self._settle(self._surplus(), giving_up=True)
        with self._lock:
            for account in self._surplus():
                if account.is_at_rest:
                    del self._accounts[account.key]

    def _surplus(self) -> list[Account]:
        with self._lock:
            surplus = len(self._accounts) - self._max_accounts
            return list(islice(self._accounts.values(), max(surplus, 0)))

    def _publish(self, lessee: Lessee) -> None:
        """Publish the mark, as long as it has not passed what was spent here."""
        due = not 0 <= self._clock() - self._published_at < _HEARTBEAT
        if self._settled_until <= self._published and not due:
            return
        until = self._visible_until()
        now = self._clock()  # after it: by then it is true
        if until > self._published or due:
            self._published = self._store.publish(lessee, until, now)
            self._published_at = now

    def _lessee(self) -> Lessee:
        if self._known is None:
            origin = self._origin or self._store.origin or self._token
            self._known = Lessee(self._token, origin)
        return self._known

    def _exchange(self, requests: Sequence[Request]) -> list[Lease]:
        for request in requests:
            for second in request.spent:
                self._settled_until = max(self._settled_until, second + 1)
        return self._store.exchange(self._lessee(), requests, self._clock())


#: Seconds between two looks after what is leased and not used.
_TEND_INTERVAL = 0.5


class LocalQuota:
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
        #: True if a thread tends the leases: in a short life none is needed.
        self._tends = tends
        self._tending: threading.Thread | None = None
        self._closed = threading.Event()
        #: Wall clock; an answer that was asked for before begins nothing anew.
        self._closed_at = -math.inf
        self._changing = threading.Lock()
        self._pid = os.getpid()

    def answered(
        self,
        customer: str,
        feature: str,
        balance: float | None,
        asked_at: float,
        since: float = -math.inf,
    ) -> None:
        """Take over the balance that OpenMeter said.

        *asked_at* is wall clock, and so is *since*, the begin of the usage period.
        """
        if balance is None or feature not in self.meters:
            return
        with self._changing:
            if asked_at <= self._closed_at:
                return
            account = self._ledger.account(_key(customer, feature))
            account.answered(balance, asked_at, since)
            if self._tending is None and self._tends:
                self._start_tending()

    def reserve(
        self, customer: str, feature: str, amount: float
    ) -> Reservation | NotReserved:
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
        """Hand back what is leased. The answer to a later question begins anew.

        In a child of a fork it does nothing: all of this is its parent's.
        """
        if os.getpid() != self._pid:
            return
        with self._changing:
            thread, self._tending = self._tending, None
            self._closed_at = time.time()
            if thread is None:
                return
            self._closed.set()
            self._ledger.wakeup.set()
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
        ledger = self._ledger
        next_round = time.monotonic() + _TEND_INTERVAL
        while not closed.is_set():
            ledger.wakeup.wait(max(next_round - time.monotonic(), 0.0))
            ledger.give_back_unused()
            if time.monotonic() >= next_round and not closed.is_set():
                ledger.tend()
                next_round = time.monotonic() + _TEND_INTERVAL


def _key(customer: str, feature: str) -> str:
    return f"{customer}\0{feature}"
