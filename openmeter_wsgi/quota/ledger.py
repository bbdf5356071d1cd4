"""The ledger: the accounts of one process, and the thread that maintains them.

`LocalQuota` is the interface to the rest of the package:

- Threads of requests call `reserve` before the application and `settle` after it.
- Threads that receive an answer of OpenMeter call `answered` with its balance.
- The thread ``openmeter_wsgi.ledger`` calls `Ledger.maintain` twice a second. That
  hands usage in, returns idle leases, removes dead lessees from the store and publishes
  the visibility mark there. Near the limit of a quota, leases are *scarce*: the thread
  is woken to return unused amounts at once, because other processes may need them.
"""

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
    from openmeter_wsgi.quota.store import (
        LeaseReply,
        LeaseRequest,
        PendingExchange,
        Store,
    )

logger: Final = log.get_logger(__name__)

#: Maximum number of accounts per transaction, because other processes wait for it.
_BATCH = 100
#: Maximum seconds between two publications of the visibility mark: a new store that
#: replaces a lost one has no mark.
_HEARTBEAT = 10.0
#: Maximum seconds for which closing waits for a locked store.
CLOSE_TIMEOUT = 1.0
#: Maximum number of accounts that wait for `return_scarce_leases`.
_MAX_SCARCE = 1_000


class Ledger:
    """The accounts of this process, with their exchanges with the store.

    Belongs to one process; a child of a fork needs another. *origin* names the
    processes that share one visibility mark, and *visible_until* returns the mark:
    OpenMeter's answers contain all usage that was settled there before that moment
    (wall clock, in seconds).
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
        #: Reentrant, because a finalizer may settle a reservation.
        self._lock = threading.RLock()
        self._accounts: OrderedDict[str, Account] = OrderedDict()
        self._token = new_token()
        #: None before the first exchange.
        self._lessee: Lessee | None = None
        #: The usage of this process in the store was settled before this moment.
        self._settled_until = 0.0
        #: The last mark published, and its time.
        self._published = 0.0
        self._published_at = 0.0
        #: The last known value of `Store.returns`.
        self._returns = 0
        #: Set when a scarce lease must be returned at once.
        self.wakeup: Wakeup = Wakeup()
        #: The keys of such leases. `maintain` returns those that the deque drops.
        self._scarce: deque[str] = deque(maxlen=_MAX_SCARCE)

    def account(self, key: str) -> Account:
        """Return the account of *key*: one customer's balance of one feature.

        Do not keep it longer than a request: the least recently used are dropped.
        """
        try:
            account = self._accounts[key]
            self._accounts.move_to_end(key)
        except KeyError:
            return self._new_account(key)
        return account

    def maintain(self) -> None:
        """Hand in usage, return idle leases, remove dead lessees, publish the mark.

        To be called about twice a second by a thread of the caller. Never raises.
        """
        if os.getpid() != self._pid or self._lessee is None:
            return
        try:
            now = self._clock()
            lessee = self._get_lessee()
            if self._store.check_lessees(lessee, now):
                # The leases of the dead became usage of this moment.
                self._settled_until = max(self._settled_until, now + 1)
            last_returns, self._returns = self._returns, self._store.returns
            with self._lock:
                accounts = list(self._accounts.values())
            if self._returns == last_returns:  # else a store is back: exchange all
                accounts = [each for each in accounts if each.is_exchange_due(now)]
            self._exchange_leases(accounts)
            self._drop_surplus()
            self._publish(lessee)
        except Exception:
            logger.exception("%s: its maintenance failed; usage is kept and handed in "
                             "at the next try", "ledger")  # fmt: skip

    def _note_unused(self, key: str) -> None:
        """Wake the thread to return a scarce lease. Also called in finalizers."""
        self._scarce.append(key)
        self.wakeup.set()

    def return_scarce_leases(self) -> None:
        """Return the unused amounts of scarce leases to the store. Never raises."""
        keys = {self._scarce.popleft() for _ in range(len(self._scarce))}
        try:
            accounts = [self._accounts[key] for key in keys if key in self._accounts]
            self._exchange_leases(accounts, giving_up=True)
        except Exception:
            logger.exception("%s: unused amounts could not be returned to the store; "
                             "the next try is soon", "ledger")  # fmt: skip

    def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Hand all usage in and leave the store; amounts in flight count as usage.

        Waits *timeout* seconds for a locked store, longer than a request: when a server
        stops, all its processes close their ledgers at once.
        """
        if os.getpid() != self._pid or self._lessee is None:
            return
        try:
            with self._store.waiting_up_to(timeout):
                self._exchange_leases(list(self._accounts.values()), giving_up=True)
                self._publish(self._lessee)
                self._store.leave(self._lessee, self._clock())
        except Exception:
            logger.exception("%s: its leases could not be returned; they count as "
                             "usage", "ledger")  # fmt: skip
        finally:
            self._lessee = None

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

    def _exchange_leases(
        self, accounts: list[Account], *, giving_up: bool = False
    ) -> None:
        """Exchange the leases of *accounts* in batches; skip accounts in use."""
        for start in range(0, len(accounts), _BATCH):
            begun = [
                (account, pending)
                for account in accounts[start : start + _BATCH]
                if (pending := account.try_begin_exchange(giving_up=giving_up))
            ]
            self._exchange_all(begun)

    def _exchange_all(self, begun: list[tuple[Account, PendingExchange]]) -> None:
        """Finish the exchanges *begun*, or undo them if the store fails."""
        unfinished = deque(begun)
        try:
            replies = self._exchange([pending.request for _, pending in begun])
            for reply in replies:
                account, pending = unfinished[0]
                account.finish_exchange(pending, reply)
                unfinished.popleft()
        finally:
            for account, pending in unfinished:
                account.undo_exchange(pending)
            for account, _ in begun:
                account.unlock()

    def _drop_surplus(self) -> None:
        """Drop the least recently used accounts beyond the maximum, if empty."""
        self._exchange_leases(self._surplus(), giving_up=True)
        with self._lock:
            for account in self._surplus():
                if account.is_empty:
                    del self._accounts[account.key]

    def _surplus(self) -> list[Account]:
        with self._lock:
            surplus = len(self._accounts) - self._max_accounts
            return list(islice(self._accounts.values(), max(surplus, 0)))

    def _publish(self, lessee: Lessee) -> None:
        """Publish the mark while usage of this process is later than the last mark."""
        due = not 0 <= self._clock() - self._published_at < _HEARTBEAT
        if self._settled_until <= self._published and not due:
            return
        until = self._visible_until()
        now = self._clock()  # read after the mark, which is valid from now on
        if until > self._published or due:
            self._published = self._store.publish(lessee, until, now)
            self._published_at = now

    def _get_lessee(self) -> Lessee:
        if self._lessee is None:
            origin = self._origin or self._store.origin or self._token
            self._lessee = Lessee(self._token, origin)
        return self._lessee

    def _exchange(self, requests: Sequence[LeaseRequest]) -> list[LeaseReply]:
        for request in requests:
            for second in request.spent:
                self._settled_until = max(self._settled_until, second + 1)
        return self._store.exchange(self._get_lessee(), requests, self._clock())


#: Seconds between two calls of `Ledger.maintain`.
_MAINTENANCE_INTERVAL = 0.5


class LocalQuota:
    """The local quotas of all customers of this process. Any thread.

    Opens nothing and starts no thread before the first answer with a balance.
    """

    def __init__(
        self,
        ledger: Ledger,
        meters: Mapping[str, CountedMeter],
        *,
        with_thread: bool = True,
    ) -> None:
        #: The meters that are counted down, by feature.
        self.meters = meters
        self._ledger = ledger
        #: True if a thread maintains the ledger. Tests do without.
        self._with_thread = with_thread
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        #: Wall clock. Answers to earlier questions do not start the thread again.
        self._closed_at = -math.inf
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def answered(
        self,
        customer: str,
        feature: str,
        balance: float | None,
        asked_at: float,
        since: float = -math.inf,
    ) -> None:
        """Take a balance that OpenMeter stated, and hand it to the store.

        *asked_at* is the time of the question, *since* the start of the usage period,
        both wall clock.
        """
        if balance is None or feature not in self.meters:
            return
        with self._lock:
            if asked_at <= self._closed_at:
                return
            account = self._ledger.account(_key(customer, feature))
            account.answered(balance, asked_at, since)
            if self._thread is None and self._with_thread:
                self._start_maintenance()

    def reserve(
        self, customer: str, feature: str, amount: float
    ) -> Reservation | NotReserved:
        """Reserve *amount* for a request, or refuse."""
        return self._ledger.account(_key(customer, feature)).reserve(amount)

    def remaining(self, customer: str, feature: str) -> float:
        """Return the approximate amount left."""
        return self._ledger.account(_key(customer, feature)).available()

    def settle(
        self, reserved: Iterable[Reservation], used: dict[tuple[str, str], float]
    ) -> None:
        """Replace the reservations with the amounts *used*, by customer and feature.

        Amounts without a reservation are counted, too.
        """
        unsettled = {_key(*pair): amount for pair, amount in used.items()}
        for reservation in reserved:
            reservation.settle(unsettled.pop(reservation.key, 0.0))
        for key, amount in unsettled.items():
            if amount:
                self._ledger.account(key).spend(amount)

    def close(self, timeout: float | None = None) -> None:
        """Return all leases. The answer to a later question starts again.

        Waits at most *timeout* seconds, and no longer than `CLOSE_TIMEOUT`, for its
        thread and for a locked store. Does nothing in a child of a fork: the leases are
        its parent's.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            thread, self._thread = self._thread, None
            self._closed_at = time.time()
            if thread is None:
                return
            self._closed.set()
            self._ledger.wakeup.set()
            self._closed = threading.Event()
        atexit.unregister(self.close)
        limit = CLOSE_TIMEOUT if timeout is None else min(timeout, CLOSE_TIMEOUT)
        deadline = time.monotonic() + limit
        if thread.is_alive():  # it may hold the locks of some accounts
            thread.join(limit)
        self._ledger.close(max(deadline - time.monotonic(), 0.0))

    def _start_maintenance(self) -> None:
        self._thread = thread = threading.Thread(
            target=self._maintain,
            args=(self._closed,),
            name="openmeter_wsgi.ledger",
            daemon=True,
        )
        atexit.register(self.close)
        try:
            thread.start()
        except RuntimeError as error:
            logger.error(
                "%s: no thread can be started to maintain the local quotas; unused "
                "amounts are not returned to other processes",
                error,
            )

    def _maintain(self, closed: threading.Event) -> None:
        """Maintain the ledger until *closed* is set. The body of the thread."""
        ledger = self._ledger
        next_round = time.monotonic() + _MAINTENANCE_INTERVAL
        while not closed.is_set():
            ledger.wakeup.wait(max(next_round - time.monotonic(), 0.0))
            ledger.return_scarce_leases()
            if time.monotonic() >= next_round and not closed.is_set():
                ledger.maintain()
                next_round = time.monotonic() + _MAINTENANCE_INTERVAL


def _key(customer: str, feature: str) -> str:
    return f"{customer}\0{feature}"
