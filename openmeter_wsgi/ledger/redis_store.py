"""A store in Redis, for many hosts.

All its keys have one hash tag, so a cluster keeps them on one node. Times are those of
the hosts: their clocks must agree within the visibility lag.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from typing import TYPE_CHECKING, Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from openmeter_wsgi.ledger import redis_scripts
from openmeter_wsgi.ledger.tables import KEPT_ACCOUNTS, KEPT_WATERMARKS, WATERMARKS
from openmeter_wsgi.ledger.terms import PATIENCE, ROUNDING, Lease, StoreAway

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from openmeter_wsgi.ledger.terms import Lessee, Request

#: A lessee that was not heard of for so many seconds is dead.
LIFETIME = 30.0
#: An origin that was not heard of for so many is gone, and its spool with it: nobody
#: else would ever say that what was settled there is delivered.
SILENCE = 3_600.0
_PREFIX = "{openmeter_wsgi}:"
_KEYS = ("names", "lessees", "origins", "watermarks", "heard")
_PRUNE_INTERVAL = 600.0


class RedisStore:
    """The ledger of all hosts that use one Redis. *clock* is for questions alone."""

    #: Each host has its spool; there is none beside Redis.
    origin = None
    returns = 0

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        self._url = url
        self._clock = clock
        self._pruned_at = 0.0
        self._connect()

    def __str__(self) -> str:
        """Return where it is, without any password."""
        at = self._redis.connection_pool.connection_kwargs
        return f"Redis at {at.get('path') or at.get('host')}:{at.get('port', '')}"

    def _connect(self) -> None:
        self._pid = os.getpid()
        self._redis = redis.Redis.from_url(
            self._url,
            socket_timeout=PATIENCE,
            socket_connect_timeout=PATIENCE,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )
        self._scripts = {
            text: self._redis.register_script(text)
            for text in (
                redis_scripts.EXCHANGE,
                redis_scripts.PUBLISH,
                redis_scripts.LOOK,
                redis_scripts.PRUNE,
                redis_scripts.QUESTION,
            )
        }

    def exchange(
        self, lessee: Lessee, requests: Sequence[Request], now: float
    ) -> list[Lease]:
        """Hand in what was spent and take new leases: one script."""
        answers = self._run(
            redis_scripts.EXCHANGE,
            now,
            int(KEPT_ACCOUNTS),
            *(lessee.token, lessee.origin, now + LIFETIME, SILENCE),
            *(secrets.token_hex(12), ROUNDING),
            *map(_document, requests),
        )
        return [
            Lease(float(granted) if granted else None, float(left), float(room), store)
            for granted, left, room, store in answers
        ]

    def publish(self, lessee: Lessee, until: float, now: float) -> None:
        """Write a watermark of the lessee's origin."""
        limits = KEPT_WATERMARKS, WATERMARKS
        self._run(redis_scripts.PUBLISH, now, lessee.origin, until, *limits)

    def look(self, lessee: Lessee, now: float) -> bool:
        """Renew the lease, bury the dead, and say whether there were any."""
        if not 0 <= now - self._pruned_at < _PRUNE_INTERVAL:
            self._run(redis_scripts.PRUNE, now, SILENCE)
            self._pruned_at = now
        return bool(self._bury(lessee, now, ""))

    def leave(self, lessee: Lessee, now: float) -> None:
        """Give up what the lessee has; a lease it still holds counts as spent."""
        self._bury(lessee, now, lessee.token)

    def take_question(self, rate: float, *, reserve: float = 0.0) -> float:
        """Take a token of the bucket."""
        return float(self._run(redis_scripts.QUESTION, self._clock(), rate, reserve))

    def close(self) -> None:
        """Close all connections."""
        if os.getpid() == self._pid:
            self._redis.close()

    def _bury(self, lessee: Lessee, now: float, whom: str) -> int:
        return int(
            self._run(
                redis_scripts.LOOK,
                now,
                int(KEPT_ACCOUNTS),
                *(lessee.token, now + LIFETIME, whom),
            )
        )

    def _run(self, script: str, now: float, *arguments: float | str) -> Any:
        if os.getpid() != self._pid:
            self._connect()  # the sockets are the parent's
        try:
            return self._scripts[script](
                keys=[_PREFIX + name for name in _KEYS],
                args=[_PREFIX, repr(now), *arguments],
            )
        except (redis.RedisError, OSError) as error:
            raise StoreAway(f"{self}: {error}") from error


def _document(request: Request) -> str:
    """Return a request as JSON, its numbers as text that loses nothing."""
    wanted, answer = request.wanted, request.answer
    return json.dumps(
        {
            "key": request.key,
            "held": repr(request.held),
            "wanted": wanted is not None and repr(wanted),
            "spent": [[str(s), repr(amount)] for s, amount in request.spent.items()],
            "answer": answer is not None and [repr(float(part)) for part in answer],
        }
    )
