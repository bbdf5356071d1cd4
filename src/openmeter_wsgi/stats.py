"""Counts: nothing that is not billed goes unsaid."""

from __future__ import annotations

from collections import defaultdict

import msgspec


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of one process since its start.

    ``settled`` = requests that became events + the sum of ``not_metered``;
    ``events`` = ``delivered`` + ``waiting`` + ``dead_lettered`` + what was dropped
    after it had become an event (``queue_full``, ``dry_run``,
    ``spool_full``, ``spool_error``, ``too_large``).

    With a spool ``delivered``, ``waiting`` and so ``events`` are of the directory: what
    this process delivered for all, and what any process has still in it.
    """

    #: Requests whose response has ended.
    settled: int
    #: Events made of them.
    events: int
    #: Events that OpenMeter took.
    delivered: int
    #: Events in the queue, those being sent included. Of a large spool an estimate.
    waiting: int
    #: Requests that became no event, by reason …
    not_metered: dict[str, int]
    #: Events and meters lost, by reason.
    dropped: dict[str, int]
    #: Events that OpenMeter refuses for good.
    dead_lettered: int
    #: Attempts that may have arrived although no answer said so.
    ambiguous: int
    #: Attempts after the first one of a batch.
    retries: int
    #: … and the same by policy (``default``, or the rule of a route), then by reason.
    not_metered_by_policy: dict[str, dict[str, int]] = {}
    #: Events that the spool could not take and that waited in memory instead.
    unspooled: int = 0
    #: Decisions about entitlements: allowed, by where the answer came from …
    allowed: dict[str, int] = {}
    #: … denied, by reason …
    denied: dict[str, int] = {}
    #: … and let through all the same, by the reason that there was.
    let_through: dict[str, int] = {}


class Counts:
    """The running counts behind :class:`Stats`.

    Request threads and the sender add to them without a lock: `x.n += 1` calls
    nothing, and CPython 3.10 and later hand over the GIL only at calls and at
    jumps backwards.
    """

    __slots__ = (
        "allowed", "ambiguous", "dead_lettered", "delivered", "denied", "dropped",
        "let_through", "retries", "settled", "unspooled",
    )  # fmt: skip

    def __init__(self) -> None:
        self.settled = 0
        self.delivered = 0
        self.dead_lettered = 0
        self.ambiguous = 0
        self.retries = 0
        self.unspooled = 0
        self.dropped: defaultdict[str, int] = defaultdict(int)
        self.allowed: defaultdict[str, int] = defaultdict(int)
        self.denied: defaultdict[str, int] = defaultdict(int)
        self.let_through: defaultdict[str, int] = defaultdict(int)
