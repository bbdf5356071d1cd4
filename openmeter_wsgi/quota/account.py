"""The account of one balance in one process: its lease, reservations and usage.

A request *reserves* an amount when it begins, and *settles* it when it has ended. Both
change only the lease of this process, under a lock and without I/O. Each leased unit
is first *free*, then *in flight* (reserved), then *usage* (settled). If too little is
free, `Account.reserve` exchanges the lease in the store, in the thread of the request.
In the background the ledger hands in usage and returns idle leases in such exchanges.

Usage is summed by the second, because the visibility mark is a moment: usage of the
seconds before it is deleted, usage of later seconds is still counted.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from openmeter_wsgi import log
from openmeter_wsgi.quota.store import (
    KnownBalance,
    LeaseReply,
    LeaseRequest,
    PendingExchange,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

logger: Final = log.get_logger(__name__)


#: Maximum number of seconds whose usage is kept apart.
_MAX_SECONDS = 600


class UsageBySecond:
    """The settled usage of one account in this process. The lease's lock guards it."""

    __slots__ = ("_handed_in", "_past", "amount", "second")

    def __init__(self) -> None:
        #: The current second, and its usage that is not handed in yet.
        self.second: int = 0
        self.amount: float = 0.0
        #: Usage of other seconds that is not handed in yet.
        self._past: dict[int, float] = {}
        #: Usage that was handed in: a new store needs it again.
        self._handed_in: dict[int, float] = {}

    def __bool__(self) -> bool:
        """Return True if there is usage to hand in."""
        return bool(self.amount or self._past)

    def add(self, second: int, amount: float) -> None:
        """Add usage of another second than the current one."""
        if second > self.second:
            before, self.amount = self.amount, 0.0
            if before:
                self._past[self.second] = self._past.get(self.second, 0.0) + before
            self.second = second
            self.amount += amount
        else:  # the thread was slow, or the clock was set back
            self._past[second] = self._past.get(second, 0.0) + amount

    def take(self) -> dict[int, float]:
        """Remove and return the usage to hand in."""
        taken, self._past = self._past, {}
        amount, self.amount = self.amount, 0.0
        if amount:
            taken[self.second] = taken.get(self.second, 0.0) + amount
        _merge(self._handed_in, taken)
        return taken

    def put_back(self, spent: Mapping[int, float]) -> None:
        """Undo `take`."""
        _merge(self._past, spent)
        _merge(self._handed_in, {second: -amount for second, amount in spent.items()})

    def recent(self, *, but: Mapping[int, float]) -> dict[int, float]:
        """Return the handed-in usage that may be in no answer yet, less *but*."""
        rest = {s: amount - but.get(s, 0.0) for s, amount in self._handed_in.items()}
        return {second: amount for second, amount in rest.items() if amount > 0}

    def forget_before(self, moment: float) -> None:
        """Forget the handed-in usage of the seconds before *moment*."""
        self._handed_in = {
            second: amount
            for second, amount in self._handed_in.items()
            if second + 1 > moment
        }


def _merge(into: dict[int, float], amounts: Mapping[int, float]) -> None:
    for second, amount in amounts.items():
        into[second] = into.get(second, 0.0) + amount
    while len(into) > _MAX_SECONDS:
        first, second, *_ = sorted(into)
        into[second] += into.pop(first)  # a later second is counted longer: safe


class ProcessLease:
    """The amount of one balance that this process has leased. Any thread.

    The lock is held for a few instructions, never during I/O. It is reentrant, because
    a finalizer may settle a reservation at any instruction. Each instruction changes
    one amount, so no change is lost.
    """

    __slots__ = (
        "_left_in_store", "acquire", "clock", "free", "in_flight", "is_scarce", "key",
        "lock", "on_unused", "release", "usage", "was_used",
    )  # fmt: skip

    def __init__(
        self,
        key: str,
        clock: Callable[[], float],
        on_unused: Callable[[str], object],
    ) -> None:
        self.key: str = key
        self.clock: Callable[[], float] = clock
        #: Called with the key when a request leaves part of a scarce lease unused.
        self.on_unused: Callable[[str], object] = on_unused
        #: True if the last grant sufficed for one request only: so little is left that
        #: an unused amount here may cause a refusal in another process.
        self.is_scarce: bool = False
        self.lock: threading.RLock = threading.RLock()
        #: For the fast path: a with statement would double its cost.
        self.acquire: Callable[..., bool] = self.lock.acquire
        self.release: Callable[[], None] = self.lock.release
        #: Leased and not reserved. Below zero if more was used than leased.
        self.free: float = 0.0
        #: Leased and reserved.
        self.in_flight: float = 0.0
        self.usage: UsageBySecond = UsageBySecond()
        #: Available in the store after the last exchange.
        self._left_in_store = 0.0
        #: True if a request took an amount since the flag was last cleared.
        self.was_used: bool = False

    def take(self, amount: float) -> bool:
        """Reserve *amount* if it is free; reserve 0 if any amount is free."""
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
        """Reserve *amount* although it is not free."""
        with self.lock:
            self.free -= amount
            self.in_flight += amount

    def left(self) -> float:
        """Return the approximate amount left, in this lease and in the store."""
        with self.lock:
            return max(self._left_in_store + self.free, 0.0)

    @property
    def is_empty(self) -> bool:
        """True if there is nothing leased and no usage to hand in."""
        return not (self.free or self.in_flight or self.usage)

    # -- One exchange with the store

    def give_back(self) -> tuple[float, float, dict[int, float]]:
        """Remove the free amount and the usage; return (free, in flight, usage)."""
        with self.lock:
            free, self.free = self.free, 0.0
            self._left_in_store += free
            return free, self.in_flight, self.usage.take()

    def add_granted(
        self, granted: float, *, reserved: float, left_in_store: float
    ) -> None:
        """Add the amount *granted*; *reserved* of it is in flight at once."""
        with self.lock:
            self.in_flight += reserved
            self.free += granted - reserved
            self._left_in_store = left_in_store

    def undo_give_back(self, free: float, spent: Mapping[int, float]) -> None:
        """Undo `give_back`."""
        with self.lock:
            self.free += free
            self._left_in_store -= free
            self.usage.put_back(spent)

    def recently_spent(self, *, but: Mapping[int, float]) -> dict[int, float]:
        """Return the handed-in usage that may be in no answer yet, less *but*."""
        with self.lock:
            return self.usage.recent(but=but)

    def forget_before(self, moment: float) -> None:
        """Forget the handed-in usage of the seconds before *moment*."""
        with self.lock:
            self.usage.forget_before(moment)


class NotReserved(NamedTuple):
    """The refusal of a reservation: too little of the balance is left."""

    #: True if enough would be left without reservations and leases, some of which may
    #: return within seconds. If False, only a new answer of OpenMeter can help.
    held_back: bool
    #: The amount that is left.
    available: float


class Reservation:
    """An amount reserved for one request."""

    __slots__ = ("_amount", "_lease")

    def __init__(self, lease: ProcessLease, amount: float) -> None:
        self._lease = lease
        self._amount: float | None = amount

    @property
    def key(self) -> str:
        """The key of the account."""
        return self._lease.key

    def settle(self, amount: float) -> None:
        """Replace the reserved amount with the used *amount*; later calls do nothing.

        Any thread, also in a finalizer; no I/O.
        """
        lease = self._lease
        now = lease.clock()
        lease.acquire()
        try:
            reserved, self._amount = self._amount, None
            if reserved is None:
                return
            lease.in_flight -= reserved
            lease.free += reserved - amount
            if amount:
                usage = lease.usage
                if 0.0 <= now - usage.second < 1.0:
                    usage.amount += amount
                else:
                    usage.add(int(now), amount)
            is_needed_elsewhere = lease.is_scarce and lease.free > 0
        finally:
            lease.release()
        if is_needed_elsewhere:
            lease.on_unused(lease.key)


#: Seconds without a reservation after which a lease is returned.
IDLE_TIMEOUT = 0.5
#: Maximum seconds after which usage is handed in.
HAND_IN_INTERVAL = 1.0
#: Seconds for which a refusal of the store is reused.
REFUSAL_TTL = 0.25
#: Maximum seconds for which a request waits for another exchange of its account.
_LOCK_TIMEOUT = 0.25


class Account:
    """One balance in one process. Any thread."""

    __slots__ = (
        "_answer", "_clock", "_exchange", "_exchange_lock", "_handed_in_at",
        "_refusal", "_store_name", "_stored_key", "_used_at", "_visible_until",
        "_wanted", "key", "lease",
    )  # fmt: skip

    def __init__(
        self,
        key: str,
        exchange: Callable[[Sequence[LeaseRequest]], list[LeaseReply]],
        *,
        visible_until: Callable[[], float],
        clock: Callable[[], float],
        on_unused: Callable[[str], object] = str,
    ) -> None:
        self.key: str = key
        # A subject may contain lone surrogates, which no database accepts as text.
        self._stored_key = key.encode(errors="backslashreplace").decode()
        self.lease: ProcessLease = ProcessLease(key, clock, on_unused)
        self._clock = clock
        self._exchange = exchange
        self._visible_until = visible_until
        self._answer: KnownBalance | None = None
        #: Held during an exchange: the other threads use its result.
        self._exchange_lock = threading.Lock()
        #: The name of the store of the last exchange.
        self._store_name: str | None = None
        #: The last refusal: its time, the amount refused, and the result.
        self._refusal: tuple[float, float, NotReserved] | None = None
        self._used_at = 0.0
        self._handed_in_at = 0.0
        #: The last amount that a request wanted from the store.
        self._wanted = 0.0

    def reserve(self, amount: float) -> Reservation | NotReserved:
        """Reserve *amount*, or refuse. 0 is refused only if nothing is left.

        Without any answer of OpenMeter the amount is granted. Uses the store only if
        the lease is too small, and waits at most some tenths of a second.
        """
        lease = self.lease
        if lease.take(amount):
            return Reservation(lease, amount)
        return self._reserve_from_store(amount)

    def spend(self, amount: float) -> None:
        """Count usage that was not reserved."""
        Reservation(self.lease, 0.0).settle(amount)

    def answered(
        self, balance: float, asked_at: float, since: float = -math.inf
    ) -> None:
        """Take a balance that OpenMeter stated, and hand it in.

        *asked_at* is the time of the question, *since* the start of the usage period,
        both wall clock. An older balance than the last is ignored, here and in the
        store.
        """
        known = self._answer
        # A time in the future means that the clock was set back since.
        if known and asked_at <= known.asked_at <= self._clock() + 1:
            return
        self._answer = KnownBalance(balance, asked_at, since)
        # If the lock is not free in time, the next exchange hands the balance in.
        if self._exchange_lock.acquire(timeout=_LOCK_TIMEOUT):
            try:
                contained_until = min(asked_at, self._visible_until())
                self.lease.forget_before(max(contained_until, since))
                self._refusal = None
                self._renew(self._wanted if self._is_busy else None)
            finally:
                self._exchange_lock.release()

    def available(self) -> float:
        """Return the approximate amount left, without I/O."""
        return self.lease.left()

    # -- Reservations that need the store

    def _reserve_from_store(self, amount: float) -> Reservation | NotReserved:
        """Exchange the lease for one with *amount*, and reserve it."""
        if refusal := self._recent_refusal(amount):
            return refusal
        if not self._exchange_lock.acquire(timeout=_LOCK_TIMEOUT):
            # Another thread may have been refused meanwhile.
            return self._recent_refusal(amount) or self._overdraw(amount)
        try:
            if self.lease.take(amount):  # another thread got a new lease
                return Reservation(self.lease, amount)
            if refusal := self._recent_refusal(amount):
                return refusal
            self._wanted = amount
            self.lease.was_used = True
            reply = self._renew(amount, take=amount)
            if reply is None:
                return self._overdraw(amount)
            if reply.granted is None:
                return self._refuse(amount, reply)
            return Reservation(self.lease, amount)
        finally:
            self._exchange_lock.release()

    def _overdraw(self, amount: float) -> Reservation:
        """Reserve *amount* without a lease: a store that fails must deny no request."""
        self.lease.overdraw(amount)
        return Reservation(self.lease, amount)

    def _recent_refusal(self, amount: float) -> NotReserved | None:
        """Return the last refusal if it is recent and applies to *amount*."""
        if self._refusal is None:
            return None
        at, refused, refusal = self._refusal
        if amount >= refused and 0 <= self._clock() - at < REFUSAL_TTL:
            return refusal
        return None

    def _refuse(self, amount: float, reply: LeaseReply) -> NotReserved:
        """Remember and return the refusal of *amount*."""
        held_back = reply.unspent >= amount and reply.unspent > 0
        refusal = NotReserved(held_back, max(reply.available, 0.0))
        self._refusal = (self._clock(), amount, refusal)
        return refusal

    def _renew(self, wanted: float | None, *, take: float = 0.0) -> LeaseReply | None:
        """Exchange the lease for a new one; return None if the exchange fails.

        *take*: the part of the grant to reserve before other threads can take it.
        """
        pending = self.begin_exchange(wanted)
        try:
            (reply,) = self._exchange([pending.request])
            return self.finish_exchange(pending, reply, take=take)
        except Exception:
            logger.exception(
                "%s: an exchange with the store failed; requests are allowed, and "
                "their usage is handed in later",
                "ledger",
            )
            self.undo_exchange(pending)
            return None

    # -- The steps of an exchange, for the ledger, which makes many exchanges at once

    def begin_exchange(self, wanted: float | None) -> PendingExchange:
        """Remove the free amount and the usage from the lease, for a request."""
        free, held, spent = self.lease.give_back()
        request = LeaseRequest(self._stored_key, held, wanted, spent, self._answer)
        return PendingExchange(request, free)

    def finish_exchange(
        self, pending: PendingExchange, reply: LeaseReply, *, take: float = 0.0
    ) -> LeaseReply:
        """Add the amount granted to the lease; *take* of it is in flight at once."""
        request = pending.request
        if self._store_name is not None and self._store_name != reply.store:
            # A new or another store lacks the usage that the last one had: repeat it.
            recent = self.lease.recently_spent(but=request.spent)
            (reply,) = self._exchange([request._replace(spent=recent)])
        self._store_name = reply.store
        granted = reply.granted or 0.0
        self.lease.is_scarce = 0 < granted <= (request.wanted or 0.0)
        self.lease.add_granted(
            granted,
            reserved=0.0 if reply.granted is None else take,
            left_in_store=reply.available - granted,
        )
        if self.lease.is_scarce and self.lease.free > 0:
            self.lease.on_unused(self.key)  # no request waits for the amount
        self._handed_in_at = self._clock()
        return reply

    def undo_exchange(self, pending: PendingExchange) -> None:
        """Put the free amount and the usage back into the lease."""
        self.lease.undo_give_back(pending.free, pending.request.spent)

    # -- Maintenance, in the ledger's thread

    @property
    def _is_busy(self) -> bool:
        """True if requests have used the lease recently."""
        return self.lease.was_used or 0 <= self._clock() - self._used_at < IDLE_TIMEOUT

    def is_exchange_due(self, now: float) -> bool:
        """Return True if usage must be handed in, or an idle lease returned, now."""
        lease = self.lease
        if lease.was_used:
            lease.was_used = False
            self._used_at = now
        if lease.free and not 0 <= now - self._used_at < IDLE_TIMEOUT:
            return True
        if lease.free or lease.usage:
            return not 0 <= now - self._handed_in_at < HAND_IN_INTERVAL
        return False

    def try_begin_exchange(self, *, giving_up: bool = False) -> PendingExchange | None:
        """Lock the account and begin an exchange; return None if it is locked.

        The caller must call `unlock`. *giving_up*: return the lease for good.
        """
        if not self._exchange_lock.acquire(blocking=False):
            return None
        renew = self._is_busy and not giving_up
        return self.begin_exchange(self._wanted if renew else None)

    def unlock(self) -> None:
        """End the exchange that `try_begin_exchange` began."""
        self._exchange_lock.release()

    @property
    def is_empty(self) -> bool:
        """True if the account can be dropped without a loss."""
        return self.lease.is_empty
