"""The choice of a store, and a fallback while it is away."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from openmeter_wsgi import log
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.quota.store import StoreAway

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from openmeter_wsgi.quota.store import Lease, Lessee, Request, Store

logger: Final = log.get_logger(__name__)


_Result = TypeVar("_Result")

#: A store that failed is tried again after so many seconds, in the background.
STORE_RETRY_DELAY = 2.0
#: After so many more it is tried by a request: nobody works in the background.
_TENDED = 10.0


class FallbackStore:
    """Asks the first store that can be asked; the last one always can.

    A store that comes back finds out from the ledgers what it missed.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = stores
        #: Until when each is left alone, by the monotonic clock; 0.0: it is well.
        self._away_until = [0.0] * len(stores)
        self.returns: int = 0

    @property
    def origin(self) -> str | None:
        """The name of the spool, if a store is beside one and can be read."""
        for store in self._stores:
            with contextlib.suppress(StoreAway):
                if (origin := store.origin) is not None:
                    return origin
        return None

    def exchange(
        self, lessee: Lessee, requests: Sequence[Request], now: float
    ) -> list[Lease]:
        """See :class:`Store`."""
        if not requests:
            return []
        return self._ask(lambda store: store.exchange(lessee, requests, now), lessee)

    def publish(self, lessee: Lessee, until: float, now: float) -> float:
        """See :class:`Store`."""
        return self._ask(lambda store: store.publish(lessee, until, now), lessee)

    def look(self, lessee: Lessee, now: float) -> bool:
        """See :class:`Store`."""
        return self._ask(lambda store: store.look(lessee, now), lessee, late=0.0)

    def take_token(self, rate: float, *, reserve: float = 0.0) -> float:
        """See :class:`Store`."""
        return self._ask(lambda store: store.take_token(rate, reserve=reserve))

    def share(self, key: str, document: bytes, asked_at: float) -> None:
        """See :class:`Store`."""
        self._ask(lambda store: store.share(key, document, asked_at))

    def shared(self, keys: Sequence[str]) -> list[tuple[bytes, float] | None]:
        """See :class:`Store`."""
        return self._ask(lambda store: store.shared(keys))

    def unshare(self, keys: Sequence[str]) -> None:
        """See :class:`Store`."""
        self._ask(lambda store: store.unshare(keys))

    def leave(self, lessee: Lessee, now: float) -> None:
        """Leave all of them."""
        for store in self._stores:
            with contextlib.suppress(StoreAway):
                store.leave(lessee, now)

    def close(self) -> None:
        """Close all of them."""
        for store in self._stores:
            store.close()

    def _ask(
        self,
        call: Callable[[Store], _Result],
        lessee: Lessee | None = None,
        *,
        late: float = _TENDED,
    ) -> _Result:
        *others, last = self._stores
        for number, store in enumerate(others):
            away_until = self._away_until[number]
            if away_until and time.monotonic() < away_until + late:
                continue
            if away_until:  # one tries it, the others go on as before
                self._away_until[number] = time.monotonic() + STORE_RETRY_DELAY
            try:
                result = call(store)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is away
                self._away_until[number] = time.monotonic() + STORE_RETRY_DELAY
                self._say_away(error, self._stores[number + 1])
                continue
            if away_until:
                self._came_back(number, lessee)
            return result
        return call(last)

    def _say_away(self, error: Exception, other: Store) -> None:
        logger.error(
            "%s: quotas are counted by %s until that is mended, and may be overshot",
            error, other,
            exc_info=None if isinstance(error, StoreAway) else error,
        )  # fmt: skip

    def _came_back(self, number: int, lessee: Lessee | None) -> None:
        self._away_until[number] = 0.0
        self.returns += 1
        logger.warning("%s: quotas are counted here again", self._stores[number])
        if lessee is not None:  # or its leases would stay there, and be in the way
            for store in self._stores[number + 1 :]:
                with contextlib.suppress(StoreAway):
                    store.leave(lessee, time.time())


def open_store(
    spool_dir: str | os.PathLike[str] | None = None,
    redis_url: str | None = None,
    scope: Callable[[], str] = lambda: "",
) -> Store:
    """Return the store of many hosts (Redis), of this one, or of this process.

    With Redis and a spool the store in *spool_dir* stands in while Redis is away;
    in the place of both, and without either, each process counts for itself. The
    returned store never raises StoreAway, and touches nothing before its first use.
    *scope* is called then: it names the OpenMeter server and key, and two of different
    scopes share nothing.

    :raises ConfigError: if Redis cannot be used: no URL of one, an option in it that
        cannot work, no client installed.
    """
    # Here, so that the import of the package does not load SQLite.
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
