"""The protocol between a ledger and its store, and the arithmetic of a balance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: No request waits longer for a store, in seconds.
PATIENCE = 0.1
#: Sums of floats that should be equal differ by less, in relation to the balance.
ROUNDING = 1e-12
#: So short a wait is none: a clock's floats are not finer.
_MOMENT = 1e-6


class StoreAway(Exception):
    """The store cannot be used now. It never leaves this package."""


class Lessee(NamedTuple):
    """One ledger, as the stores know it: its leases live as long as it does."""

    token: str
    #: The owner of one mark: the spool of a host, or else this process alone.
    origin: str

    @property
    def is_alone(self) -> bool:
        """True if what this process has not delivered dies with it."""
        return self.origin == self.token


class KnownBalance(NamedTuple):
    """A balance that OpenMeter said. Times are wall clock, in seconds."""

    balance: float
    #: The balance covers the usage that was visible by then.
    asked_at: float
    #: When its usage period began: usage from before does not count against it.
    since: float = -math.inf


class Request(NamedTuple):
    """Usage that is handed in, and the lease that is asked for, of one key.

    Amounts *held* and *wanted* replace what the lessee had leased: all it had beyond
    them goes back by itself. *wanted* None: nothing, thank you.
    """

    key: str
    held: float
    wanted: float | None
    spent: Mapping[int, float] = {}
    answer: KnownBalance | None = None


class Lease(NamedTuple):
    """A lease, as the store grants it."""

    #: On top of what is held; None: not even the wanted amount is there.
    granted: float | None
    #: The balance before it, without usage and leases; infinite without any answer.
    available: float
    #: The same if every lease came back unused.
    room: float
    #: The name of the store: another one knows nothing of earlier usage.
    store: str


class Begun(NamedTuple):
    """An exchange that is under way."""

    request: Request
    #: The free amount that goes back with it.
    free: float


class Store(Protocol):
    """The place where the ledgers of a host, or of many, agree on what is left.

    Any thread. A store is opened by its first use in a process, and a child of a fork
    opens its own. Times are the caller's wall clock, in seconds.

    :raises StoreAway: what `open_store` returns never does.
    """

    @property
    def returns(self) -> int:
        """The number of times a store came back: it may know leases that are stale."""

    @property
    def origin(self) -> str | None:
        """The name of the spool beside this store, None if there is none."""

    def exchange(
        self, lessee: Lessee, requests: Sequence[Request], now: float
    ) -> list[Lease]:
        """Hand in what was spent and take new leases, all or nothing."""

    def publish(self, lessee: Lessee, until: float, now: float) -> float:
        """Note that all usage settled before *until* in its origin is visible.

        Returns the mark that is kept, which may be the one before.
        """

    def look(self, lessee: Lessee, now: float) -> bool:
        """Renew what must be, bury the dead, and say whether there were any."""

    def leave(self, lessee: Lessee, now: float) -> None:
        """Give up what the lessee has; a lease it still holds counts as spent."""

    def take_token(self, rate: float, *, reserve: float = 0.0) -> float:
        """Take leave to ask OpenMeter; return 0.0, or the seconds until there is one.

        There are *rate* a second and at most as many at once; this caller leaves
        *reserve* of them for others.
        """

    def share(self, key: str, document: bytes, asked_at: float) -> None:
        """Keep a *document* under *key*, unless a newer one is there."""

    def shared(self, keys: Sequence[str]) -> list[tuple[bytes, float] | None]:
        """Return the document of each key, and when it was asked for."""

    def unshare(self, keys: Sequence[str]) -> None:
        """Remove the documents of *keys*."""

    def close(self) -> None:
        """Let go of files and sockets; a later use opens them again."""


def grant(available: float, wanted: float | None, lessees: int) -> float | None:
    """Return how much is lent to one who wants so much, None if that is not there.

    The nearer the limit the smaller, in the end no more than is wanted: so nothing is
    locked up in a process while another one needs it.
    """
    if wanted is None:
        return 0.0
    if available <= 0 or available < wanted:
        return None
    if math.isinf(available):
        return wanted
    share = available / (4 * lessees + 4)
    if wanted > 0:
        share = share // wanted * wanted  # a rest too small for anybody helps nobody
    return min(max(share, wanted), available)


def left(balance: float, spent: float, leased: float, wanted: float | None) -> float:
    """Return what remains of a balance; what floats make of nothing is nothing."""
    rest = balance - spent - leased
    if math.isinf(rest):
        return rest
    for exact in (0.0, wanted or 0.0):
        if abs(rest - exact) <= ROUNDING * abs(balance):
            return exact
    return rest


def refilled(row: tuple[float, float] | None, rate: float, now: float) -> float:
    """Return how many questions may be asked; *row* says how many there were, when."""
    full = max(rate, 1.0)
    if row is None:
        return full
    tokens, at = row
    return min(tokens + max(now - at, 0.0) * rate, full)


def wait_for_question(tokens: float, rate: float, reserve: float) -> float:
    """Return the seconds until one of *tokens* may be taken, 0.0 if now."""
    reserve = max(min(reserve, max(rate, 1.0) - 1.0), 0.0)
    wait = (1.0 + reserve - tokens) / rate
    return wait if wait > _MOMENT else 0.0
