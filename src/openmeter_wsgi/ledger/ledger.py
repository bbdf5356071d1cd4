"""The accounts of one process, and what is done for them in the background."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from itertools import islice
from typing import TYPE_CHECKING

from openmeter_wsgi import log
from openmeter_wsgi.ledger.account import Account
from openmeter_wsgi.ledger.terms import Lessee
from openmeter_wsgi.lock import new_token

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from openmeter_wsgi.ledger.terms import Begun, Lease, Request, Store

logger = log.get_logger(__name__)

#: So many accounts go into one transaction: others wait for it.
_BATCH = 100
#: A watermark is published this often even if nothing waits for it: a store that was
#: lost knows none.
_HEARTBEAT = 10.0


class Ledger:
    """What this process may spend, as the store has it.

    It belongs to one process; a child of a fork makes another. *origin* is what has
    one watermark, and *delivered_until* says it: all that was settled there before
    that moment (wall clock, in seconds) is delivered. Usage is in an answer of
    OpenMeter *visibility_lag* seconds after its delivery.
    """

    def __init__(
        self,
        store: Store,
        *,
        delivered_until: Callable[[], float],
        origin: str | None = None,
        visibility_lag: float = 5.0,
        clock: Callable[[], float] = time.time,
        max_accounts: int = 10_000,
    ) -> None:
        self._store = store
        self._origin = origin
        self._delivered_until = delivered_until
        self._visibility_lag = visibility_lag
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
        #: The watermark last published.
        self._published = 0.0
        self._published_at = 0.0
        self._returns = 0

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
            visibility_lag=self._visibility_lag,
            clock=self._clock,
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
        """Publish the watermark, as long as it has not passed what was spent here."""
        due = not 0 <= self._clock() - self._published_at < _HEARTBEAT
        if self._settled_until <= self._published and not due:
            return
        until = self._delivered_until()
        now = self._clock()  # after it: by then it is true
        if until > self._published or due:
            self._store.publish(lessee, until, now)
            self._published, self._published_at = until, now

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
