"""The choice of a store, and the fallback to the next one while it is away.

Without options each process has its own store in memory. ``spool_dir`` adds a SQLite
file for the processes of a host, ``redis_url`` adds Redis for several hosts. A store
that fails is *away*: the next one takes its place until a retry succeeds. Nothing is
copied between stores: each ledger hands its balances and recent usage to the next one.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from openmeter_wsgi import log
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.quota.store import StoreAway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from openmeter_wsgi.quota.store import LeaseReply, LeaseRequest, Lessee, Store

logger: Final = log.get_logger(__name__)


_Result = TypeVar("_Result")

#: Seconds after which the ledger's thread retries a store that failed.
STORE_RETRY_DELAY = 2.0
#: Additional seconds after which a request retries it, if no ledger has a thread.
_REQUEST_RETRY_DELAY = 10.0


class FallbackStore:
    """A store that uses the first of *stores* that works; the last one always does."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = stores
        #: The monotonic time of the next retry of each store; 0.0 if it works, -inf
        #: if the next call retries it.
        self._away_until = [0.0] * len(stores)
        self.returns: int = 0

    @property
    def origin(self) -> str | None:
        """The name of the spool, None if no store has one or it cannot be read."""
        for store in self._stores:
            with contextlib.suppress(StoreAway):
                if (origin := store.origin) is not None:
                    return origin
        return None

    def exchange(
        self, lessee: Lessee, requests: Sequence[LeaseRequest], now: float
    ) -> list[LeaseReply]:
        """See :class:`Store`."""
        if not requests:
            return []
        return self._call(lambda store: store.exchange(lessee, requests, now), lessee)

    def publish(self, lessee: Lessee, until: float, now: float) -> float:
        """See :class:`Store`."""
        return self._call(lambda store: store.publish(lessee, until, now), lessee)

    def check_lessees(self, lessee: Lessee, now: float) -> bool:
        """See :class:`Store`."""
        return self._call(
            lambda store: store.check_lessees(lessee, now), lessee, extra_delay=0.0
        )

    def take_token(self, rate: float, *, reserve: float = 0.0) -> float:
        """See :class:`Store`."""
        return self._call(lambda store: store.take_token(rate, reserve=reserve))

    def share(self, key: str, document: bytes, asked_at: float) -> None:
        """See :class:`Store`."""
        self._call(lambda store: store.share(key, document, asked_at))

    def shared(self, keys: Sequence[str]) -> list[tuple[bytes, float] | None]:
        """See :class:`Store`."""
        return self._call(lambda store: store.shared(keys))

    def unshare(self, keys: Sequence[str]) -> None:
        """See :class:`Store`."""
        self._call(lambda store: store.unshare(keys))

    def leave(self, lessee: Lessee, now: float) -> None:
        """Leave all stores."""
        for store in self._stores:
            with contextlib.suppress(StoreAway):
                store.leave(lessee, now)

    @contextlib.contextmanager
    def waiting_up_to(self, seconds: float) -> Iterator[None]:
        """See :class:`Store`."""
        self._away_until = [at and -math.inf for at in self._away_until]
        with contextlib.ExitStack() as stack:
            for store in self._stores:
                stack.enter_context(store.waiting_up_to(seconds))
            yield

    def close(self) -> None:
        """Close all stores."""
        for store in self._stores:
            store.close()

    def _call(
        self,
        call: Callable[[Store], _Result],
        lessee: Lessee | None = None,
        *,
        extra_delay: float = _REQUEST_RETRY_DELAY,
    ) -> _Result:
        """Return the result of *call* for the first store that works."""
        *others, last = self._stores
        for number, store in enumerate(others):
            away_until = self._away_until[number]
            if away_until and time.monotonic() < away_until + extra_delay:
                continue
            if away_until:  # this thread retries; others use the fallback meanwhile
                self._away_until[number] = time.monotonic() + STORE_RETRY_DELAY
            try:
                result = call(store)
            except Exception as error:  # noqa: BLE001 - a bug must deny no request
                self._away_until[number] = time.monotonic() + STORE_RETRY_DELAY
                self._log_failover(error, self._stores[number + 1])
                continue
            if away_until:
                self._switch_back(number, lessee)
            return result
        return call(last)

    def _log_failover(self, error: Exception, other: Store) -> None:
        logger.error(
            "%s: quotas are counted in another store (%s) until this one works again, "
            "and may be overshot",
            error, other,
            exc_info=None if isinstance(error, StoreAway) else error,
        )  # fmt: skip

    def _switch_back(self, number: int, lessee: Lessee | None) -> None:
        self._away_until[number] = 0.0
        self.returns += 1
        logger.warning("%s: quotas are counted here again", self._stores[number])
        if lessee is not None:  # else its leases would remain in the fallback
            for store in self._stores[number + 1 :]:
                with contextlib.suppress(StoreAway):
                    store.leave(lessee, time.time())


def open_store(
    spool_dir: str | os.PathLike[str] | None = None,
    redis_url: str | None = None,
    scope: Callable[[], str] = lambda: "",
) -> Store:
    """Return the store of many hosts (Redis), of this host, or of this process.

    While Redis is away, the store in *spool_dir* replaces it; while both are away, and
    without either, each process counts for itself. The returned store never raises
    StoreAway, and opens nothing before its first use. *scope* is called then: it
    returns the name of the OpenMeter server and key. Stores of different scopes share
    nothing.

    :raises ConfigError: if the URL of Redis is invalid or has an unusable option, or
        if its client is not installed.
    """
    # Imported here, so that the import of the package does not load SQLite.
    from openmeter_wsgi.quota.sqlite import SqliteStore

    stores: list[Store] = []
    if redis_url is not None:
        stores.append(_redis_store(redis_url, scope))
    if spool_dir is not None:
        stores.append(SqliteStore(Path(os.path.abspath(spool_dir)), scope=scope))
    return FallbackStore([*stores, SqliteStore()])


def _redis_store(url: str, scope: Callable[[], str]) -> Store:
    try:
        from openmeter_wsgi.quota.redis import RedisStore
    except ImportError as error:
        raise ConfigError(
            [f"redis_url: {error}; expected 'openmeter_wsgi[redis]' to be installed"]
        ) from error
    try:
        return RedisStore(url, scope=scope)
    except ValueError as error:
        raise ConfigError([f"redis_url: {error}"]) from error
