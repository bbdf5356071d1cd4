"""The protocol between a ledger and its store, and the arithmetic of a balance.

A key names one customer's balance of one feature. For each key the store keeps the last
balance that OpenMeter stated, the usage that is not contained in it, and the leases. A
*lease* is an amount that one process may spend without asking the store. The process
is the *lessee*. In an *exchange* it hands in its usage, returns its unused amount, and
gets a new lease, if enough is left:

    available = balance - usage - leases of all lessees

When OpenMeter states a new balance, the store deletes the usage that it contains, as
the *visibility mark* tells (see `visibility_mark`). All processes with one mark are an
*origin*: those that share the spool of a host, or else a single process.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

#: Maximum seconds for which a request waits for a store.
STORE_TIMEOUT = 0.1
#: Maximum rounding error of a sum of floats, relative to the balance.
ROUNDING = 1e-12
#: Shorter waits count as 0: the resolution of a clock's floats.
_MIN_WAIT = 1e-6


class StoreAway(Exception):
    """The store cannot be used now. It never reaches an application."""


class Lessee(NamedTuple):
    """The identity of one ledger in the stores. Its leases end with its process."""

    token: str
    #: The random name of the host's spool, or *token* without a spool.
    origin: str

    @property
    def is_alone(self) -> bool:
        """True if the process has no spool: its undelivered usage dies with it."""
        return self.origin == self.token


class KnownBalance(NamedTuple):
    """A balance that OpenMeter stated. Times are wall clock, in seconds."""

    balance: float
    #: The time of the question: the balance contains the usage visible by then.
    asked_at: float
    #: The start of the usage period: older usage does not count against the balance.
    since: float = -math.inf


class LeaseRequest(NamedTuple):
    """One exchange for one key: the usage that is handed in and the lease wanted.

    The lessee's new lease is *held* plus the amount granted; the rest of its old lease
    returns to the balance.
    """

    key: str
    #: The amount reserved by requests in flight.
    held: float
    #: The minimum amount to grant on top, None to grant nothing.
    wanted: float | None
    #: Settled usage by second.
    spent: Mapping[int, float] = {}
    #: The last balance that OpenMeter stated to this process.
    answer: KnownBalance | None = None


class LeaseReply(NamedTuple):
    """The store's reply to one `LeaseRequest`."""

    #: The amount granted on top of *held*; None if less than *wanted* is available.
    granted: float | None
    #: The balance less usage and leases, before this grant; infinite without a balance.
    available: float
    #: The balance less usage alone: available if all leases returned unused.
    unspent: float
    #: The store's name. A store with another name lacks the earlier usage.
    store: str


class PendingExchange(NamedTuple):
    """An exchange that has begun and is not finished."""

    request: LeaseRequest
    #: The unused amount that is returned to the store.
    free: float


class Store(Protocol):
    """The balances and leases that the ledgers of one or more hosts share.

    Any thread. The first use in a process opens the store; a child of a fork opens it
    again. Times are the caller's wall clock, in seconds.

    :raises StoreAway: from each method, but not from the store of `open_store`.
    """

    @property
    def returns(self) -> int:
        """The number of times that a store was away and came back.

        After each return the leases in it may be outdated.
        """

    @property
    def origin(self) -> str | None:
        """The name of the spool beside this store, None if there is none."""

    def exchange(
        self, lessee: Lessee, requests: Sequence[LeaseRequest], now: float
    ) -> list[LeaseReply]:
        """Hand in usage and get new leases, all or nothing."""

    def publish(self, lessee: Lessee, until: float, now: float) -> float:
        """Store the visibility mark *until* of the lessee's origin.

        Returns the stored mark, which is an older one if the last is very recent.
        """

    def check_lessees(self, lessee: Lessee, now: float) -> bool:
        """Renew this lessee, remove dead lessees, and return True if any were removed.

        The leases of a dead lessee count as usage.
        """

    def leave(self, lessee: Lessee, now: float) -> None:
        """Remove the lessee; the leases that it still holds count as usage."""

    def take_token(self, rate: float, *, reserve: float = 0.0) -> float:
        """Take a token for a question to OpenMeter.

        Returns 0.0, or the seconds until a token is there. The bucket gets *rate*
        tokens a second and holds one second's worth; the call leaves *reserve* tokens
        in it.
        """

    def share(self, key: str, document: bytes, asked_at: float) -> None:
        """Store an answer's *document* under *key*, unless a newer one is stored."""

    def shared(self, keys: Sequence[str]) -> list[tuple[bytes, float] | None]:
        """Return the document and its time, or None, for each key."""

    def unshare(self, keys: Sequence[str]) -> None:
        """Remove the documents of *keys*."""

    def waiting_up_to(self, seconds: float) -> AbstractContextManager[None]:
        """Return a context in which this thread waits longer for a locked store.

        It waits *seconds* in total, not `STORE_TIMEOUT` per call. A store that is away
        is retried at once.
        """

    def close(self) -> None:
        """Close files and sockets; a later use opens them again."""


def lease_amount(available: float, wanted: float | None, lessees: int) -> float | None:
    """Return the amount to grant, or None if less than *wanted* is available.

    A lessee gets a small share of a large balance, and only *wanted* near the limit, so
    that no process holds an amount that another process needs.
    """
    if wanted is None:
        return 0.0
    if available <= 0 or available < wanted:
        return None
    if math.isinf(available):
        return wanted
    share = available / (4 * lessees + 4)
    if wanted > 0:
        share = share // wanted * wanted  # a smaller remainder could not be used
    return min(max(share, wanted), available)


def left(balance: float, spent: float, leased: float, wanted: float | None) -> float:
    """Return the remaining balance.

    A remainder that differs from 0 or *wanted* by a rounding error becomes exact.
    """
    rest = balance - spent - leased
    if math.isinf(rest):
        return rest
    for exact in (0.0, wanted or 0.0):
        if abs(rest - exact) <= ROUNDING * abs(balance):
            return exact
    return rest


def refilled_tokens(row: tuple[float, float] | None, rate: float, now: float) -> float:
    """Return the number of tokens now; *row* has their last number and its time."""
    full = max(rate, 1.0)
    if row is None:
        return full
    tokens, at = row
    return min(tokens + max(now - at, 0.0) * rate, full)


def seconds_until_token(tokens: float, rate: float, reserve: float) -> float:
    """Return the seconds until a token may be taken, 0.0 if one may be taken now."""
    reserve = max(min(reserve, max(rate, 1.0) - 1.0), 0.0)
    wait = (1.0 + reserve - tokens) / rate
    return wait if wait > _MIN_WAIT else 0.0
