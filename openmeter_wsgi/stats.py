"""Counts of requests, events and losses, and the health of a process.

`Counts` are the running counts, which request threads and the sender increment. `Stats`
is a snapshot of them. `Health` lists the current problems.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse

#: Reasons in `dropped` for which an event is lost. Other reasons concern meters.
LOSSES = ("queue_full", "dry_run", "spool_full", "spool_error", "too_large")
#: The upper bounds, in seconds, of the classes of a histogram of durations.
BOUNDS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
    1_800.0, 3_600.0,
)  # fmt: skip
#: Maximum number of single durations that are kept until `fetch_recent` returns them.
_RECENT = 10_000

ByReason: TypeAlias = dict[str, int]


class Durations(msgspec.Struct, frozen=True):
    """A histogram of durations."""

    #: Number of durations in each class of ``BOUNDS``, and of longer durations.
    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    #: Sum of all durations, in seconds.
    seconds: float = 0.0

    def __add__(self, other: Durations) -> Durations:
        return Durations(
            tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            self.seconds + other.seconds,
        )


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of one process since its start, or of several, added with ``+``.

    ``settled`` is the sum of ``metered`` and all of ``not_metered``: each request is
    counted once, in one of them. All other fields are counted independently, so this
    equation shows that no event is missing::

        events == delivered + waiting + dead_lettered + lost

    It holds for a process that delivers from memory. With a spool, ``delivered`` has
    the events that this process delivered for all processes, and ``waiting`` has all
    events in the directory. Then the equation holds for the sum of all processes, from
    an empty spool on. While the fields are read, a batch may move from one to another.
    """

    #: Requests whose response has ended.
    settled: int
    #: Requests that became events.
    metered: int
    #: Events made of these requests.
    events: int
    #: Events that OpenMeter accepted.
    delivered: int
    #: Events in the queue, including those being sent. An estimate for a large spool.
    waiting: int
    #: Requests that became no event, by reason.
    not_metered: ByReason
    #: Events and meters lost, by reason.
    dropped: ByReason
    #: Events that are not sent again: dead letters.
    dead_lettered: int
    #: Attempts that got no answer or a 5xx: their events may have arrived.
    ambiguous: int
    #: Attempts after the first attempt of a batch.
    retries: int
    #: Requests that became no event, by policy (``default``, or the rule of a route),
    #: then by reason.
    not_metered_by_policy: dict[str, ByReason] = {}
    #: Waiting events in the spool. The number is the same in all of its processes.
    waiting_in_spool: int = 0
    #: The bytes of the waiting events.
    waiting_bytes: int = 0
    #: The time of the oldest waiting event, in seconds since 1970: the time that you
    #: gave to it, or else the time of its request.
    oldest_at: float | None = None
    #: Events that the spool could not take and that waited in memory instead.
    unspooled: int = 0
    #: Decisions about entitlements that allowed a request, by source of the answer.
    allowed: ByReason = {}
    #: Features denied, by reason.
    denied: ByReason = {}
    #: Features let through despite a reason to deny, by that reason.
    let_through: ByReason = {}
    #: Decisions that denied a request, by source of the answer.
    denied_by_source: ByReason = {}
    #: Decisions that let a request through despite a reason, by source of the answer.
    let_through_by_source: ByReason = {}
    #: Requests billed by an ambiguous body, by remark: ``ambiguous_usage``,
    #: ``several_calls``.
    remarks: ByReason = {}
    #: The age of the oldest event of each batch when OpenMeter accepted it.
    delivery_seconds: Durations = Durations()
    #: The duration of each attempt, successful or not.
    attempt_seconds: Durations = Durations()

    @property
    def lost(self) -> int:
        """Events that were made and dropped, for the reasons in `LOSSES`."""
        return sum(self.dropped.get(reason, 0) for reason in LOSSES)

    @property
    def unaccounted(self) -> int:
        """Events that are in no other count: 0 unless a process crashed."""
        known = self.delivered + self.waiting + self.dead_lettered + self.lost
        return self.events - known

    def __add__(self, other: Stats) -> Stats:
        """Return the counts of two processes together."""
        added = {
            name: _added(getattr(self, name), getattr(other, name))
            for name in self.__struct_fields__
        }
        in_spool = max(self.waiting_in_spool, other.waiting_in_spool)
        added["waiting"] -= added["waiting_in_spool"] - in_spool
        added["waiting_in_spool"] = in_spool
        if self.oldest_at and other.oldest_at:
            added["oldest_at"] = min(self.oldest_at, other.oldest_at)
        return Stats(**added)


def _added(left: Any, right: Any) -> Any:
    if left is None or right is None:
        return right if left is None else left
    if not isinstance(left, dict):
        return left + right
    return {k: _added(left.get(k), right.get(k)) for k in {**left, **right}}


class RunningDurations:
    """The running counts behind `Durations`. Incremented like `Counts`."""

    __slots__ = ("_counts", "_recent", "_seconds")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0
        self._recent: deque[float] | None = None

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds += seconds
        if self._recent is not None:
            self._recent.append(seconds)

    def fetch_recent(self) -> list[float]:
        """Return the durations since the last call; the first call returns none."""
        recent, self._recent = self._recent, deque(maxlen=_RECENT)
        return list(recent or ())

    def snapshot(self) -> Durations:
        """Return the counts as they are now."""
        return Durations(tuple(self._counts), self._seconds)


class Counts:
    """The running counts behind :class:`Stats`.

    Request threads and the sender increment them without a lock: CPython 3.10 and later
    release the GIL only at calls and backward jumps, and `x.n += 1` has neither. So the
    added value must never be computed by a call in the same statement.
    """

    __slots__ = (
        "allowed", "ambiguous", "attempt_seconds", "dead_lettered", "delivered",
        "delivery_seconds", "denied", "denied_by_source", "dropped", "events",
        "let_through", "let_through_by_source", "metered", "passed", "remarks",
        "retries", "unspooled",
    )  # fmt: skip

    def __init__(self) -> None:
        self.metered: int = 0
        self.events: int = 0
        self.delivered: int = 0
        self.dead_lettered: int = 0
        self.ambiguous: int = 0
        self.retries: int = 0
        self.unspooled: int = 0
        #: Decisions that allowed a request by a cached answer, on the fast path.
        self.passed: int = 0
        self.dropped: defaultdict[str, int] = defaultdict(int)
        self.allowed: defaultdict[str, int] = defaultdict(int)
        self.denied: defaultdict[str, int] = defaultdict(int)
        self.let_through: defaultdict[str, int] = defaultdict(int)
        self.denied_by_source: defaultdict[str, int] = defaultdict(int)
        self.let_through_by_source: defaultdict[str, int] = defaultdict(int)
        self.remarks: defaultdict[str, int] = defaultdict(int)
        self.delivery_seconds: RunningDurations = RunningDurations()
        self.attempt_seconds: RunningDurations = RunningDurations()

    def stats(
        self,
        *,
        waiting: int,
        waiting_in_spool: int,
        waiting_bytes: int,
        oldest_at: float | None,
        not_metered: dict[str, ByReason],
    ) -> Stats:
        """Return the current counts, with the given counts of other objects."""
        by_reason: Counter[str] = sum(map(Counter, not_metered.values()), Counter())
        metered = self.metered
        # Copied in one call, as other threads go on adding to the dictionary.
        dropped = dict(self.dropped)
        return Stats(
            settled=metered + sum(by_reason.values()),
            metered=metered,
            events=self.events,
            delivered=self.delivered,
            waiting=waiting,
            waiting_in_spool=waiting_in_spool,
            waiting_bytes=waiting_bytes,
            oldest_at=oldest_at,
            not_metered=dict(by_reason),
            not_metered_by_policy={k: v for k, v in not_metered.items() if v},
            dropped={reason: n for reason, n in dropped.items() if n},
            dead_lettered=self.dead_lettered,
            ambiguous=self.ambiguous,
            retries=self.retries,
            unspooled=self.unspooled,
            allowed=self._allowed(),
            denied=dict(self.denied),
            let_through=dict(self.let_through),
            denied_by_source=dict(self.denied_by_source),
            let_through_by_source=dict(self.let_through_by_source),
            remarks=dict(self.remarks),
            delivery_seconds=self.delivery_seconds.snapshot(),
            attempt_seconds=self.attempt_seconds.snapshot(),
        )

    def _allowed(self) -> ByReason:
        allowed = dict(self.allowed)
        if self.passed:
            allowed["cache"] = allowed.get("cache", 0) + self.passed
        return allowed


#: Seconds after which a waiting event is a problem.
MAX_AGE = 300.0


class Problem(msgspec.Struct, frozen=True):
    """A current problem of a process."""

    #: ``held``: a wrong key or address. ``unavailable``: OpenMeter does not answer.
    #: ``refused``: OpenMeter refuses every event. ``backlog``: the oldest event waits
    #: too long. ``not_delivering``: events wait and no thread delivers them.
    #: ``queue_full``: new events are dropped. ``spool_failing``: the disk takes no
    #: event, and new events wait in memory. ``spool_dropping``: the disk takes no
    #: event, and new events are dropped because of ``delivery="ship"``. ``two_keys``:
    #: two running processes send to one server with different keys.
    #: ``entitlements``: there are no answers about entitlements.
    code: str
    #: One line: the events lost or delayed, and the next step.
    text: str
    #: True if the problem loses usage.
    loses: bool = False


class Health(msgspec.Struct, frozen=True):
    """The problems of one process."""

    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """True if there is no problem."""
        return not self.problems

    @property
    def loses(self) -> bool:
        """True if usage is being lost."""
        return any(problem.loses for problem in self.problems)


class HealthEndpoint:
    """A WSGI application that returns the health of its process as JSON.

    The status is 503 while usage is being lost, else 200. An outage of OpenMeter only
    delays usage, so it takes no server out of service. With ``fail_on="problem"`` the
    status is 503 for any problem.
    """

    def __init__(
        self,
        health: Callable[[], Health],
        *,
        fail_on: Literal["loss", "problem"] = "loss",
    ) -> None:
        if fail_on not in {"loss", "problem"}:
            raise ValueError(f"fail_on: expected 'loss' or 'problem', got {fail_on!r}")
        self._health = health
        self._fail_on = fail_on

    def __call__(
        self,
        environ: dict[str, Any],
        start_response: StartResponse,
    ) -> Iterable[bytes]:
        """Answer one request (PEP 3333)."""
        health = self._health()
        fails = health.loses if self._fail_on == "loss" else not health.ok
        body = msgspec.json.encode({"ok": health.ok, "problems": health.problems})
        status = "503 Service Unavailable" if fails else "200 OK"
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
        ]
        start_response(status, headers)
        return [] if environ.get("REQUEST_METHOD", "").upper() == "HEAD" else [body]
