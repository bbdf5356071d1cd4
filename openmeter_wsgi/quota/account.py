"""An account: one balance in one process, from requests to the store and back."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from openmeter_wsgi import log
from openmeter_wsgi.quota.store import Begun, KnownBalance, Lease, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

logger: Final = log.get_logger(__name__)


#: So many seconds are remembered one by one.
_MAX_SECONDS = 600


class UnsettledUsage:
    """The amounts of one account and process. Whoever calls holds its lock."""

    __slots__ = ("_handed_in", "_past", "amount", "second")

    def __init__(self) -> None:
        #: The running second, and what was spent in it and is not handed in.
        self.second: int = 0
        self.amount: float = 0.0
        #: The same of other seconds.
        self._past: dict[int, float] = {}
        #: The amounts that were handed in: another store needs them.
        self._handed_in: dict[int, float] = {}

    def __bool__(self) -> bool:
        """Say whether there is something to be handed in."""
        return bool(self.amount or self._past)

    def add(self, second: int, amount: float) -> None:
        """Add what was spent in a second other than the running one."""
        if second > self.second:
            before, self.amount = self.amount, 0.0
            if before:
                self._past[self.second] = self._past.get(self.second, 0.0) + before
            self.second = second
            self.amount += amount
        else:  # a thread that was slow, or a clock that was put back
            self._past[second] = self._past.get(second, 0.0) + amount

    def take(self) -> dict[int, float]:
        """Take out all that is to be handed in."""
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
        """Return what was handed in and is perhaps in no answer, without *but*."""
        rest = {s: amount - but.get(s, 0.0) for s, amount in self._handed_in.items()}
        return {second: amount for second, amount in rest.items() if amount > 0}

    def forget_before(self, moment: float) -> None:
        """Forget what was handed in of seconds that an answer has covered."""
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
        into[second] += into.pop(first)  # later: it is the safe side


class ProcessLease:
    """The part of one balance that a process has leased. Any thread.

    The lock is held for a few instructions, never while a store is asked. It can be
    taken again by a finaliser that settles in the middle of them: each instruction
    changes one amount, so none is lost.
    """

    __slots__ = (
        "_beside", "acquire", "clock", "free", "in_flight", "is_scarce", "key", "lock",
        "on_unused", "release", "spending", "was_used",
    )  # fmt: skip

    def __init__(
        self,
        key: str,
        clock: Callable[[], float],
        on_unused: Callable[[str], object],
    ) -> None:
        self.key: str = key
        self.clock: Callable[[], float] = clock
        #: Called with the key when a request leaves something of a scarce lease.
        self.on_unused: Callable[[str], object] = on_unused
        #: True if the last grant was for one request alone: so little is left that
        #: other processes may be refused because of what this one does not use.
        self.is_scarce: bool = False
        self.lock: threading.RLock = threading.RLock()
        #: On the fast path: a with statement costs as much as all of the rest.
        self.acquire: Callable[..., bool] = self.lock.acquire
        self.release: Callable[[], None] = self.lock.release
        #: Leased and not reserved. Below zero: spent beyond what was leased.
        self.free: float = 0.0
        #: Leased and reserved.
        self.in_flight: float = 0.0
        self.spending: UnsettledUsage = UnsettledUsage()
        #: Left in the store, beside what is leased here.
        self._beside = 0.0
        #: True if something was taken since this was last cleared.
        self.was_used: bool = False

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
        """True if nothing would be missed if it were forgotten."""
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
        """Forget what was handed in of seconds that an answer has covered."""
        with self.lock:
            self.spending.forget_before(moment)


class NotReserved(NamedTuple):
    """Not enough is left."""

    #: Only because of what is in flight or leased and may come back: within a second
    #: or two another try may go better. Else it takes a new answer.
    held_back: bool
    #: The amount that is left all the same.
    available: float


class Reservation:
    """An amount set aside for one request."""

    __slots__ = ("_amount", "_chunk")

    def __init__(self, chunk: ProcessLease, amount: float) -> None:
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
            is_missed = chunk.is_scarce and chunk.free > 0
        finally:
            chunk.release()
        if is_missed:
            chunk.on_unused(chunk.key)


#: A lease that lies idle for so many seconds goes back.
IDLE = 0.5
#: Usage is handed in after so many seconds at the latest.
HAND_IN = 1.0
#: "Nothing left" is believed for so many seconds.
REFUSAL = 0.25
#: No request waits longer for others that ask for the same account.
_PATIENCE = 0.25


class Account:
    """The part of one balance that one process may spend. Any thread."""

    __slots__ = (
        "_answer", "_asking", "_clock", "_exchange", "_handed_in_at", "_name",
        "_refusal", "_store", "_used_at", "_visible_until", "_wanted", "chunk", "key",
    )  # fmt: skip

    def __init__(
        self,
        key: str,
        exchange: Callable[[Sequence[Request]], list[Lease]],
        *,
        visible_until: Callable[[], float],
        clock: Callable[[], float],
        on_unused: Callable[[str], object] = str,
    ) -> None:
        self.key: str = key
        # A subject may hold what no database takes as text.
        self._name = key.encode(errors="backslashreplace").decode()
        self.chunk: ProcessLease = ProcessLease(key, clock, on_unused)
        self._clock = clock
        self._exchange = exchange
        self._visible_until = visible_until
        self._answer: KnownBalance | None = None
        #: One at a time asks the store; the others find what it brings.
        self._asking = threading.Lock()
        self._store: str | None = None
        self._refusal: tuple[float, float, NotReserved] | None = None
        self._used_at = 0.0
        self._handed_in_at = 0.0
        #: The amount last asked for: a chunk should be worth some of these.
        self._wanted = 0.0

    def reserve(self, amount: float) -> Reservation | NotReserved:
        """Set *amount* aside; 0 if anything at all must be left.

        Without any answer of OpenMeter it is granted. Waits for the store where the
        leased chunk does not suffice, some tenths of a second at the very most.
        """
        chunk = self.chunk
        return Reservation(chunk, amount) if chunk.take(amount) else self._ask(amount)

    def spend(self, amount: float) -> None:
        """Count usage that was settled and never reserved."""
        Reservation(self.chunk, 0.0).settle(amount)

    def answered(
        self, balance: float, asked_at: float, since: float = -math.inf
    ) -> None:
        """Take the balance that OpenMeter said, asked at *asked_at* (wall clock).

        The newest one counts, whichever process has it; an older one is ignored. Its
        usage period began at *since*.
        """
        known = self._answer
        # One from the future is of a clock that was put back since.
        if known and asked_at <= known.asked_at <= self._clock() + 1:
            return
        self._answer = KnownBalance(balance, asked_at, since)
        # Else the one who is asking now, or the next one, hands it in.
        if self._asking.acquire(timeout=_PATIENCE):
            try:
                covered = min(asked_at, self._visible_until())
                self.chunk.forget_before(max(covered, since))
                self._refusal = None
                self._renew(self._wanted if self._is_busy else None)
            finally:
                self._asking.release()

    def available(self) -> float:
        """Return about how much is left, without asking the store."""
        return self.chunk.left()

    # -- Asking the store

    def _ask(self, amount: float) -> Reservation | NotReserved:
        if refusal := self._remembered(amount):
            return refusal
        if not self._asking.acquire(timeout=_PATIENCE):
            # Among very many, others have been faster and know.
            return self._remembered(amount) or self._overdraw(amount)
        try:
            if self.chunk.take(amount):  # another one has asked
                return Reservation(self.chunk, amount)
            if refusal := self._remembered(amount):
                return refusal
            self._wanted = amount
            self.chunk.was_used = True
            lease = self._renew(amount, take=amount)
            if lease is None:
                return self._overdraw(amount)
            if lease.granted is None:
                return self._refuse(amount, lease)
            return Reservation(self.chunk, amount)
        finally:
            self._asking.release()

    def _overdraw(self, amount: float) -> Reservation:
        """Take what nobody granted.

        Where no store can say anything in time, nobody is refused for that.
        """
        self.chunk.overdraw(amount)
        return Reservation(self.chunk, amount)

    def _remembered(self, amount: float) -> NotReserved | None:
        known = self._refusal
        if known is None:
            return None
        at, refused, refusal = known
        if amount >= refused and 0 <= self._clock() - at < REFUSAL:
            return refusal
        return None

    def _refuse(self, amount: float, lease: Lease) -> NotReserved:
        held_back = lease.room >= amount and lease.room > 0
        refusal = NotReserved(held_back, max(lease.available, 0.0))
        self._refusal = (self._clock(), amount, refusal)
        return refusal

    def _renew(self, wanted: float | None, *, take: float = 0.0) -> Lease | None:
        """Exchange what there is for a new chunk; None if that was impossible.

        If it is granted, *take* of it is in flight before anybody else can have it.
        """
        begun = self.begin(wanted)
        try:
            (lease,) = self._exchange([begun.request])
            return self.finish(begun, lease, take=take)
        except Exception:
            logger.exception("%s: broke off, and nobody is refused for it", "ledger")
            self.fail(begun)
            return None

    # -- One exchange, in steps: the ledger makes many at once

    def begin(self, wanted: float | None) -> Begun:
        """Take out what is to be handed in, and the chunk that goes back with it."""
        free, held, spent = self.chunk.give_back()
        return Begun(Request(self._name, held, wanted, spent, self._answer), free)

    def finish(self, begun: Begun, lease: Lease, *, take: float = 0.0) -> Lease:
        """Put in what the store granted, *take* of it as being in flight."""
        request = begun.request
        if self._store is not None and self._store != lease.store:
            # Another store, or one that was lost: it is told what it should know.
            recent = self.chunk.recently_spent(but=request.spent)
            (lease,) = self._exchange([request._replace(spent=recent)])
        self._store = lease.store
        granted = lease.granted or 0.0
        self.chunk.is_scarce = 0 < granted <= (request.wanted or 0.0)
        taken = 0.0 if lease.granted is None else take
        self.chunk.put_in(granted, taken=taken, beside=lease.available - granted)
        if self.chunk.is_scarce and self.chunk.free > 0:
            self.chunk.on_unused(self.key)  # no request waits for it
        self._handed_in_at = self._clock()
        return lease

    def fail(self, begun: Begun) -> None:
        """Put back what could not be handed in."""
        self.chunk.take_back(begun.free, begun.request.spent)

    # -- Tending

    @property
    def _is_busy(self) -> bool:
        return self.chunk.was_used or 0 <= self._clock() - self._used_at < IDLE

    def due(self, now: float) -> bool:
        """Say whether there is something to hand in or to give back now."""
        chunk = self.chunk
        if chunk.was_used:
            chunk.was_used = False
            self._used_at = now
        if chunk.free and not 0 <= now - self._used_at < IDLE:
            return True
        if chunk.free or chunk.spending:
            return not 0 <= now - self._handed_in_at < HAND_IN
        return False

    def try_begin(self, *, giving_up: bool = False) -> Begun | None:
        """Begin an exchange, unless a request is about it just now.

        It is over with `end`.
        """
        if not self._asking.acquire(blocking=False):
            return None
        renew = self._is_busy and not giving_up
        return self.begin(self._wanted if renew else None)

    def end(self) -> None:
        """Let others ask."""
        self._asking.release()

    @property
    def is_at_rest(self) -> bool:
        """True if nothing would be missed if it were forgotten."""
        return self.chunk.is_empty
