"""Counts of requests, events and losses, by reason, and the health of a process."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse

#: Reasons for which an event is lost, and not a meter before it became one.
LOSSES = ("queue_full", "dry_run", "spool_full", "spool_error", "too_large")
#: The upper bounds, in seconds, of the classes in which durations are counted.
BOUNDS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
    1_800.0, 3_600.0,
)  # fmt: skip
#: Durations that are kept one by one until somebody fetches them.
_RECENT = 10_000

ByReason: TypeAlias = dict[str, int]


class Durations(msgspec.Struct, frozen=True):
    """A histogram of durations."""

    #: One class for each of ``BOUNDS``, and one for what is longer.
    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    #: Of all of them together, in seconds.
    seconds: float = 0.0

    def __add__(self, other: Durations) -> Durations:
        return Durations(
            tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            self.seconds + other.seconds,
        )


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of one process since its start, or of several, added with ``+``.

    ``settled`` is the sum of ``metered`` and all of ``not_metered``: each request is
    counted once, as one of them. Nothing else is derived, so this equation is a proof::

        events == delivered + waiting + dead_lettered + lost

    It holds for a process that delivers from memory. With a spool ``delivered`` is
    what this process delivered for all, and ``waiting`` is of the directory: the
    equation holds for all of its processes together, from an empty spool on.
    Between two looks a batch may be on its way from one figure to the other.
    """

    #: Requests whose response has ended.
    settled: int
    #: Requests that became events.
    metered: int
    #: Events made of them.
    events: int
    #: Events that OpenMeter took.
    delivered: int
    #: Events in the queue, those being sent included. Of a large spool an estimate.
    waiting: int
    #: Requests that became no event, by reason …
    not_metered: ByReason
    #: Events and meters lost, by reason.
    dropped: ByReason
    #: Events that OpenMeter refuses for good.
    dead_lettered: int
    #: Attempts that may have arrived although no answer said so.
    ambiguous: int
    #: Attempts after the first one of a batch.
    retries: int
    #: … and the same by policy (``default``, or the rule of a route), then by reason.
    not_metered_by_policy: dict[str, ByReason] = {}
    #: Of the events that wait, those in the spool: all of its processes see the same.
    waiting_in_spool: int = 0
    #: The size of what waits, in bytes, and the time of the oldest of it in seconds
    #: since 1970. An event to which you gave a time counts by that.
    waiting_bytes: int = 0
    oldest_at: float | None = None
    #: Events that the spool could not take and that waited in memory instead.
    unspooled: int = 0
    #: Decisions about entitlements: allowed, by where the answer came from …
    allowed: ByReason = {}
    #: … features denied, by reason …
    denied: ByReason = {}
    #: … and let through all the same, by the reason that there was.
    let_through: ByReason = {}
    #: Decisions that denied, by where the answer came from …
    denied_by_source: ByReason = {}
    #: … and those that let through all the same.
    let_through_by_source: ByReason = {}
    #: Requests billed by a body that says more than one thing, by remark:
    #: ``ambiguous_usage``, ``several_calls``.
    remarks: ByReason = {}
    #: The age of the oldest event of a batch when OpenMeter took it.
    delivery_seconds: Durations = Durations()
    #: The duration of an attempt, whatever OpenMeter answered.
    attempt_seconds: Durations = Durations()

    @property
    def lost(self) -> int:
        """Events that were made and dropped, for the reasons in `LOSSES`."""
        return sum(self.dropped.get(reason, 0) for reason in LOSSES)

    @property
    def unaccounted(self) -> int:
        """Events of which nothing is known any more: 0, but for a crash."""
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
    """The running counts behind `Durations`. Added to as `Counts` are."""

    __slots__ = ("_counts", "_recent", "_seconds")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0
        self._recent: deque[float] | None = None

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds += seconds
        if self._recent is not None:
            self._recent.append(seconds)

    def fetch_recent(self) -> list[float]:
        """Return each one since the last call, the first call excepted."""
        recent, self._recent = self._recent, deque(maxlen=_RECENT)
        return list(recent or ())

    def snapshot(self) -> Durations:
        """Return the counts as they are now."""
        return Durations(tuple(self._counts), self._seconds)


class Counts:
    """The running counts behind :class:`Stats`.

    Request threads and the sender add to them without a lock: `x.n += 1` calls
    nothing, and CPython 3.10 and later hand over the GIL only at calls and at
    jumps backwards. So what is added is never worked out in the same statement.
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
        #: Allowed by a known answer on the short way (see `passing`).
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
        """Return the counts as they are now, with what only others know."""
        by_reason: Counter[str] = sum(map(Counter, not_metered.values()), Counter())
        metered = self.metered
        # A dictionary is copied in one call: others go on adding to it.
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


#: Seconds that the oldest event may wait before that is a problem.
MAX_AGE = 300.0


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong."""

    #: ``held``: a wrong key or address. ``unavailable``: OpenMeter does not answer.
    #: ``refused``: it refuses everything. ``backlog``: the oldest event waits for too
    #: long. ``not_delivering``: events wait and no thread delivers them.
    #: ``queue_full``: new events are dropped. ``spool_failing``: the disk takes none;
    #: they wait in memory. ``spool_dropping``: the same, and they are dropped.
    #: ``two_keys``: two running processes send to one server with different keys.
    #: ``entitlements``: no answers about who may.
    code: str
    #: One line: what is lost or delayed, and what happens next.
    text: str
    #: Whether usage is being lost by it.
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
    """A WSGI application that tells the health of the process that serves it.

    Status 200 or 503 and a document. It is 503 while usage is being lost; an outage
    of OpenMeter delays usage and takes no server out of service. With
    ``fail_on="problem"`` any problem is 503.
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
