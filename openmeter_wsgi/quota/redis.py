"""The store in Redis, for many hosts: Lua scripts and their client.

Each script is one transaction, with the rules of `sqlite_tables`. It gets five keys:

==============  =============================================================
``names``       hash: the store's name, and the token bucket
``lessees``     sorted set: lessees by the time at which they count as dead
``origins``     hash: the origin of each lessee
``watermarks``  hash: visibility marks of each origin, JSON [[at, until], ...]
``heard``       hash: the time of the last message from each origin
==============  =============================================================

The keys of accounts, usage, leases and documents begin with the same prefix. The prefix
is a hash tag, so a cluster keeps all keys on one node. It contains the scope, that is,
the OpenMeter server and API key. Numbers are passed as text with 17 digits, because
Lua's own conversion keeps only 14. All times are Redis's: each host adds the difference
between Redis's clock and its own to its times.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from openmeter_wsgi import log
from openmeter_wsgi.quota.sqlite_tables import (
    ACCOUNT_TTL,
    WATERMARK_INTERVAL,
    WATERMARK_TTL,
)
from openmeter_wsgi.quota.store import ROUNDING, STORE_TIMEOUT, LeaseReply, StoreAway

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from openmeter_wsgi.quota.store import KnownBalance, LeaseRequest, Lessee

logger: Final = log.get_logger(__name__)


_COMMON = """
local names, lessees, origins, watermarks, heard = unpack(KEYS)
local prefix = ARGV[1]
local now = tonumber(ARGV[2])
if not now then
  local time = redis.call("TIME")
  now = tonumber(time[1]) + tonumber(time[2]) / 1000000
end

local function text(number)
  if number == math.huge then return "inf" end
  if number == -math.huge then return "-inf" end
  return string.format("%.17g", number)
end

local function number(value, default)
  if not value then return default end
  if value == "inf" then return math.huge end
  if value == "-inf" then return -math.huge end
  return tonumber(value)
end

local function account_of(key) return prefix .. "account:" .. key end
local function spent_of(key) return prefix .. "spent:" .. key end
local function leases_of(key) return prefix .. "leases:" .. key end
local function keys_of(lessee) return prefix .. "lessee:" .. lessee end

local function add(hash, field, amount)
  local sum = number(redis.call("HGET", hash, field), 0) + amount
  redis.call("HSET", hash, field, text(sum))
end

local function keep(key, kept)
  for _, name in ipairs({account_of(key), spent_of(key), leases_of(key)}) do
    redis.call("EXPIRE", name, kept)
  end
end
"""

#: Arguments: prefix, now ("" for Redis's time), account TTL, lessee, origin, lessee
#: TTL, origin TTL, a new store name, rounding, and for each request the JSON of
#: {key, held, wanted or false, spent: [[second, amount]], answer or false: [balance,
#: asked_at, since]} with all numbers as text.
#: Returns for each request: granted ("" if refused), available, unspent, store name.
EXCHANGE = (
    _COMMON
    + """
local kept, lessee, origin = ARGV[3], ARGV[4], ARGV[5]
local silence, rounding = number(ARGV[7]), number(ARGV[9])
local alive_until = text(now + number(ARGV[6]))
redis.call("HSETNX", names, "store", ARGV[8])
if redis.call("ZADD", lessees, alive_until, lessee) == 1 and origin == lessee then
  redis.call("HDEL", watermarks, origin)  -- removed before: drop its infinite mark
end
redis.call("HSET", origins, lessee, origin)
redis.call("HSETNX", heard, origin, text(now))
local count = redis.call("ZCARD", lessees)
local store = redis.call("HGET", names, "store")

local function visible_until(whose, moment)
  local known = number(redis.call("HGET", heard, whose), 0)
  if now - known > silence then return math.huge end
  local until_ = -math.huge
  local marks = redis.call("HGET", watermarks, whose)
  for _, mark in ipairs(marks and cjson.decode(marks) or {}) do
    if number(mark[1]) <= moment then until_ = number(mark[2]) end
  end
  return until_
end

local function cover(key, asked_at, since)
  local rest, untils = 0, {}
  local spent = redis.call("HGETALL", spent_of(key))
  for i = 1, #spent, 2 do
    local second, whose = string.match(spent[i], "^(-?%d+):(.*)$")
    untils[whose] = untils[whose] or visible_until(whose, asked_at)
    if tonumber(second) + 1 <= math.max(untils[whose], since) then
      redis.call("HDEL", spent_of(key), spent[i])
    else
      rest = rest + number(spent[i + 1])
    end
  end
  local leased = 0
  for _, amount in ipairs(redis.call("HVALS", leases_of(key))) do
    leased = leased + number(amount)
  end
  return rest, leased
end

local function left(balance, spent, leased, wanted)
  local rest = balance - spent - leased
  if rest == math.huge or rest == -math.huge then return rest end
  for _, exact in ipairs({0, wanted or 0}) do
    if math.abs(rest - exact) <= rounding * math.abs(balance) then return exact end
  end
  return rest
end

local function grant(available, wanted)
  if not wanted then return 0 end
  if available <= 0 or available < wanted then return false end
  if available == math.huge then return wanted end
  local share = available / (4 * count + 4)
  if wanted > 0 then share = math.floor(share / wanted) * wanted end
  return math.min(math.max(share, wanted), available)
end

local answers = {}
for i = 10, #ARGV do
  local request = cjson.decode(ARGV[i])
  local key = request.key
  local account = account_of(key)
  local known = redis.call("HMGET", account, "balance", "asked_at", "spent", "leased")
  local balance, asked_at = number(known[1], math.huge), number(known[2], -math.huge)
  local spent, leased = number(known[3], 0), number(known[4], 0)
  local held = number(request.held)
  local wanted = request.wanted and number(request.wanted)
  for _, bucket in ipairs(request.spent) do
    local amount = number(bucket[2])
    add(spent_of(key), bucket[1] .. ":" .. origin, amount)
    spent = spent + amount
  end
  local answer = request.answer
  if answer and (number(answer[2]) > asked_at or asked_at > now + 1) then
    balance, asked_at = number(answer[1]), number(answer[2])
    spent, leased = cover(key, asked_at, number(answer[3]))
  end
  leased = leased + held - number(redis.call("HGET", leases_of(key), lessee), 0)
  local available = left(balance, spent, leased, wanted)
  local granted = grant(available, wanted)
  local lease = held + (granted or 0)
  if lease ~= 0 then
    redis.call("HSET", leases_of(key), lessee, text(lease))
    redis.call("SADD", keys_of(lessee), key)
  else
    redis.call("HDEL", leases_of(key), lessee)
    redis.call("SREM", keys_of(lessee), key)
  end
  redis.call("EXPIRE", keys_of(lessee), kept)
  redis.call("HSET", account, "balance", text(balance), "asked_at", text(asked_at),
    "spent", text(spent), "leased", text(leased + (granted or 0)))
  keep(key, kept)
  answers[#answers + 1] = {
    granted and text(granted) or "", text(available),
    text(left(balance, spent, 0, wanted)), store,
  }
end
return answers
"""
)

#: Arguments: prefix, now, origin, until, mark TTL, minimum interval.
#: Returns the newest mark.
PUBLISH = (
    _COMMON
    + """
local origin, until_, kept, interval = ARGV[3], ARGV[4], number(ARGV[5]), ARGV[6]
redis.call("HSET", heard, origin, text(now))
local known = redis.call("HGET", watermarks, origin)
local marks, newest, base = {}, nil, nil
for _, mark in ipairs(known and cjson.decode(known) or {}) do
  local at = number(mark[1])
  if at < now - kept then
    base = mark  -- the newest of the old marks is kept: it holds until the next one
  elseif at <= now + 1 then
    if base then marks[#marks + 1] = base; base = nil end
    marks[#marks + 1] = mark
  end
end
if base then marks[#marks + 1] = base end
newest = marks[#marks]
if not newest or (number(until_) > number(newest[2])
    and now >= number(newest[1]) + number(interval)) then
  newest = {text(now), until_}
  marks[#marks + 1] = newest
end
redis.call("HSET", watermarks, origin, cjson.encode(marks))
return newest[2]
"""
)

#: Arguments: prefix, now, account TTL, lessee, lessee TTL, a lessee to remove or "".
#: Removes that lessee, or renews the caller's and removes all dead lessees.
#: Returns the number of lessees removed.
CHECK_LESSEES = (
    _COMMON
    + """
local kept, lessee, wanted = ARGV[3], ARGV[4], ARGV[6]
local alive_until = text(now + number(ARGV[5]))
local dead = {wanted}
if wanted == "" then
  if redis.call("HEXISTS", origins, lessee) == 1 then
    redis.call("ZADD", lessees, alive_until, lessee)
  end
  dead = redis.call("ZRANGEBYSCORE", lessees, "-inf", "(" .. text(now))
end
for _, who in ipairs(dead) do
  local origin = redis.call("HGET", origins, who) or who
  for _, key in ipairs(redis.call("SMEMBERS", keys_of(who))) do
    local amount = number(redis.call("HGET", leases_of(key), who), 0)
    add(spent_of(key), text(math.floor(now)) .. ":" .. origin, amount)
    if redis.call("EXISTS", account_of(key)) == 1 then
      add(account_of(key), "spent", amount)
      add(account_of(key), "leased", -amount)
    end
    redis.call("HDEL", leases_of(key), who)
    keep(key, kept)
  end
  redis.call("DEL", keys_of(who))
  redis.call("ZREM", lessees, who)
  redis.call("HDEL", origins, who)
  if origin == who then  -- its undelivered usage is lost: nothing waits for it
    redis.call("HSET", heard, origin, text(now))
    redis.call("HSET", watermarks, origin, cjson.encode({{text(now), "inf"}}))
  end
end
return #dead
"""
)

#: Arguments: prefix, now, origin TTL. Removes the origins that are gone.
PRUNE = (
    _COMMON
    + """
local known = redis.call("HGETALL", heard)
for i = 1, #known, 2 do
  if now - number(known[i + 1]) > 2 * number(ARGV[3]) then
    redis.call("HDEL", heard, known[i])
    redis.call("HDEL", watermarks, known[i])
  end
end
"""
)

#: Arguments: prefix, now, rate, reserve.
#: Returns the seconds until a token is there, 0 if one was taken.
TAKE_TOKEN = (
    _COMMON
    + """
local rate, reserve = number(ARGV[3]), number(ARGV[4])
local full = math.max(rate, 1)
local tokens = number(redis.call("HGET", names, "tokens"), full)
local at = number(redis.call("HGET", names, "at"), now)
tokens = math.min(tokens + math.max(now - at, 0) * rate, full)
reserve = math.max(math.min(reserve, full - 1), 0)
local wait = (1 + reserve - tokens) / rate
if wait <= 1e-6 then
  wait = 0
  tokens = tokens - 1
end
redis.call("HSET", names, "tokens", text(tokens), "at", text(now))
return text(wait)
"""
)

#: Seconds without a message after which a lessee counts as dead.
LESSEE_TTL = 30.0
#: Seconds without a message after which an origin is gone, with its spool: no process
#: can publish its mark any more, so all its usage counts as visible.
ORIGIN_TTL = 3_600.0
_KEYS = ("names", "lessees", "origins", "watermarks", "heard")
_PRUNE_INTERVAL = 600.0

#: The options that a URL may have, besides names that begin with ``ssl_``. Others fail
#: with the first request, or change settings that this module relies on.
_URL_OPTIONS = {
    "client_name", "db", "health_check_interval", "max_connections", "password",
    "protocol", "socket_keepalive", "username",
}  # fmt: skip
#: Offset of this host's clock, in seconds, above which a warning is logged.
_MAX_CLOCK_OFFSET = 1.0
#: Change of the measured offset, in seconds, below which the old offset stays in use,
#: so that usage and the mark after it are shifted by the same offset.
_OFFSET_TOLERANCE = 0.05
#: Seconds by which a mark is shifted back, so that it never contains too much usage.
_MARK_MARGIN = 0.2


def _checked(url: str) -> str:
    """Return *url* if it is valid. Errors omit the URL, which may hold a password.

    :raises ValueError: with the name of the unusable option.
    """
    parts = urlsplit(url)
    path = "" if parts.scheme == "unix" else parts.path.strip("/")
    if path and not path.isdecimal():
        raise ValueError(f"expected the number of a database, got {path!r}")
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if name not in _URL_OPTIONS and not name.startswith("ssl_"):
            raise ValueError(
                f"expected no option but {', '.join(sorted(_URL_OPTIONS))} and those "
                f"of ssl_, got {name!r}"
            )
    try:
        redis.ConnectionPool.from_url(url).make_connection()
    except (TypeError, ValueError, redis.RedisError) as error:
        raise ValueError(f"the URL cannot be used: {error}") from None
    return url


class RedisStore:
    """The store of all hosts that use one Redis, for one OpenMeter server and key.

    *scope* returns the name of that server and key. *clock* is this host's clock;
    *redis_clock* replaces Redis's clock in tests.
    """

    #: Redis has no spool; each host may have one.
    origin = None
    returns = 0

    def __init__(
        self,
        url: str,
        *,
        scope: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.time,
        redis_clock: Callable[[], float] | None = None,
    ) -> None:
        self._url = _checked(url)
        self._scope = scope
        self._clock = clock
        self._redis_clock = redis_clock
        self._prefix: str | None = None
        self._pruned_at = 0.0
        self._connect()

    def __str__(self) -> str:
        """Return the location without any password, for the log."""
        options = self._redis.connection_pool.connection_kwargs
        where = options.get("path") or options.get("host")
        return f"Redis at {where}:{options.get('port', '')}"

    def _connect(self) -> None:
        self._pid = os.getpid()
        #: Seconds to add to this host's time to get Redis's, None before the first
        #: measurement.
        self._clock_offset: float | None = None
        self._redis = redis.Redis.from_url(
            self._url,
            socket_timeout=STORE_TIMEOUT,
            socket_connect_timeout=STORE_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )
        self._scripts = {
            text: self._redis.register_script(text)
            for text in (EXCHANGE, PUBLISH, CHECK_LESSEES, PRUNE, TAKE_TOKEN)
        }

    def exchange(
        self,
        lessee: Lessee,
        requests: Sequence[LeaseRequest],
        now: float,  # noqa: ARG002 - the script uses Redis's time
    ) -> list[LeaseReply]:
        """Hand in usage and get new leases, in one script."""
        shift = self._shift()
        replies = self._run(
            EXCHANGE,
            int(ACCOUNT_TTL),
            *(lessee.token, lessee.origin, LESSEE_TTL, ORIGIN_TTL),
            *(secrets.token_hex(12), ROUNDING),
            *(_request_json(request, shift) for request in requests),
        )
        return [
            LeaseReply(
                float(granted) if granted else None, float(left), float(unspent), store
            )
            for granted, left, unspent, store in replies
        ]

    def publish(self, lessee: Lessee, until: float, now: float) -> float:  # noqa: ARG002
        """Store the visibility mark of the lessee's origin."""
        limits = WATERMARK_TTL, WATERMARK_INTERVAL
        shift = self._shift() - (_MARK_MARGIN if self._redis_clock is None else 0.0)
        stored = float(self._run(PUBLISH, lessee.origin, until + shift, *limits))
        return until if stored == until + shift else stored - shift

    def check_lessees(self, lessee: Lessee, now: float) -> bool:
        """Renew this lessee, remove dead ones, return True if any were removed."""
        self._measure_clock_offset()
        if not 0 <= now - self._pruned_at < _PRUNE_INTERVAL:
            self._run(PRUNE, ORIGIN_TTL)
            self._pruned_at = now
        return bool(self._remove_lessees(lessee, ""))

    def leave(self, lessee: Lessee, now: float) -> None:  # noqa: ARG002
        """Remove the lessee; the leases that it still holds count as usage."""
        self._remove_lessees(lessee, lessee.token)

    def take_token(self, rate: float, *, reserve: float = 0.0) -> float:
        """Take a token from the bucket."""
        return float(self._run(TAKE_TOKEN, rate, reserve))

    def share(self, key: str, document: bytes, asked_at: float) -> None:
        """Store a document after its time by Redis's clock."""
        text = f"{asked_at + self._shift()!r} {document.decode()}"
        ttl = int(ACCOUNT_TTL)
        self._call(lambda: self._redis.set(self._document_key(key), text, ex=ttl))

    def shared(self, keys: Sequence[str]) -> list[tuple[bytes, float] | None]:
        """Return the document and its time, or None, for each key."""
        names = [self._document_key(key) for key in keys]
        shift = self._shift()
        pairs: list[tuple[bytes, float] | None] = []
        for text in self._call(lambda: self._redis.mget(names)):
            asked_at, _, document = (text or "").partition(" ")
            pairs.append((document.encode(), float(asked_at) - shift) if text else None)
        return pairs

    def unshare(self, keys: Sequence[str]) -> None:
        """Remove the documents of *keys*."""
        names = [self._document_key(key) for key in keys]
        if names:
            self._call(lambda: self._redis.delete(*names))

    def _document_key(self, key: str) -> str:
        return f"{self._prefix_of_keys()}answer:{key}"

    def waiting_up_to(
        self,
        seconds: float,  # noqa: ARG002 - Redis is never locked
    ) -> contextlib.AbstractContextManager[None]:
        """Do nothing: Redis answers at once, or it is away."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Close all connections."""
        if os.getpid() == self._pid:
            self._redis.close()

    def _remove_lessees(self, lessee: Lessee, token: str) -> int:
        """Remove the lessee *token*, or all dead ones; return their number."""
        arguments = int(ACCOUNT_TTL), lessee.token, LESSEE_TTL, token
        return int(self._run(CHECK_LESSEES, *arguments))

    # -- Clocks

    def _shift(self) -> float:
        """Return the seconds to add to this host's time to get Redis's."""
        if self._clock_offset is None or os.getpid() != self._pid:
            self._measure_clock_offset()
        return self._clock_offset or 0.0

    def _measure_clock_offset(self) -> None:
        """Measure the seconds by which this host's clock is behind Redis's."""
        if self._redis_clock is not None:
            return
        before = self._clock()
        seconds, microseconds = self._call(lambda: self._redis.time())  # noqa: PLW0108 - another after a fork
        after = self._clock()
        new = seconds + microseconds / 1e6 - (before + after) / 2
        old = self._clock_offset
        if old is None or abs(new - old) > max(after - before, _OFFSET_TOLERANCE):
            self._clock_offset = new
        if abs(new) > _MAX_CLOCK_OFFSET:
            logger.warning(
                "%s: the clock of this host is %.0f s %s Redis's. Quotas use Redis's "
                "time, but events have this host's: let NTP set it",
                "clock", abs(new), "ahead of" if new < 0 else "behind",
            )  # fmt: skip

    # -- Calls

    def _run(self, script: str, *arguments: float | str) -> Any:
        now = "" if self._redis_clock is None else repr(self._redis_clock())
        return self._call(
            lambda: self._scripts[script](
                keys=[self._prefix_of_keys() + name for name in _KEYS],
                args=[self._prefix_of_keys(), now, *arguments],
            )
        )

    def _call(self, call: Callable[[], Any]) -> Any:
        """Return the result of a call to Redis.

        :raises StoreAway: if Redis fails or does not answer in time.
        """
        if os.getpid() != self._pid:
            self._connect()  # the sockets are the parent's
        try:
            return call()
        except (redis.RedisError, OSError) as error:
            raise StoreAway(f"{self}: {error}") from error

    def _prefix_of_keys(self) -> str:
        if self._prefix is None:
            self._prefix = f"{{openmeter_wsgi:{self._scope()}}}:"
        return self._prefix


def _request_json(request: LeaseRequest, shift: float) -> str:
    """Return a request as JSON, with exact numbers as text and shifted times.

    A shifted second overlaps two seconds of Redis and becomes the later one.
    """
    wanted, answer = request.wanted, request.answer
    return json.dumps(
        {
            "key": request.key,
            "held": repr(request.held),
            "wanted": wanted is not None and repr(wanted),
            "spent": [
                [str(math.ceil(second + shift)), repr(amount)]
                for second, amount in request.spent.items()
            ],
            "answer": answer is not None and _shifted(answer, shift),
        }
    )


def _shifted(answer: KnownBalance, shift: float) -> list[str]:
    times = (answer.asked_at, answer.since)
    return [repr(float(answer.balance)), *(repr(time + shift) for time in times)]
