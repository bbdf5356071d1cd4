"""Which stores there are, and which stands in for which."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.ledger.falling_back import FallingBack

if TYPE_CHECKING:
    from openmeter_wsgi.ledger.terms import Store


def open_store(
    spool_dir: str | os.PathLike[str] | None = None, redis_url: str | None = None
) -> Store:
    """Return the store of many hosts (Redis), of this one, or of this process.

    With Redis and a spool the store in *spool_dir* stands in while Redis is away;
    in the place of both, and without either, each process counts for itself. What is
    returned never raises StoreAway, and touches nothing before its first use.

    :raises ConfigError: if Redis cannot be used: no URL of one, no client installed.
    """
    # Here, so that the import of the package does not load SQLite.
    from openmeter_wsgi.ledger.sqlite import SqliteStore

    stores: list[Store] = []
    if redis_url is not None:
        stores.append(_redis_store(redis_url))
    if spool_dir is not None:
        stores.append(SqliteStore(Path(os.path.abspath(spool_dir))))
    return FallingBack([*stores, SqliteStore()])


def _redis_store(url: str) -> Store:
    try:
        from openmeter_wsgi.ledger.redis_store import RedisStore
    except ImportError as error:
        raise ConfigError(
            [f"redis_url: {error}; expected 'openmeter_wsgi[redis]' to be installed"]
        ) from error
    try:
        return RedisStore(url)
    except ValueError as error:
        raise ConfigError([f"redis_url: {error}"]) from error
