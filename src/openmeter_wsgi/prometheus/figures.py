"""What is told of a middleware: each figure, its name and its labels."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from openmeter_wsgi.stats import Stats

#: Figures by the values of their labels.
Figures: TypeAlias = "Mapping[tuple[str, ...], float]"


class Figure(NamedTuple):
    """One figure, or one for each combination of labels."""

    name: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[Stats], Figures]


def _by_reason(name: str) -> Callable[[Stats], Figures]:
    return lambda stats: {(reason,): n for reason, n in getattr(stats, name).items()}


def _one(name: str) -> Callable[[Stats], Figures]:
    return lambda stats: {(): getattr(stats, name)}


def _not_metered(stats: Stats) -> Figures:
    return {
        (policy, reason): n
        for policy, reasons in stats.not_metered_by_policy.items()
        for reason, n in reasons.items()
    }


def _decisions(stats: Stats) -> Figures:
    results = {
        "allowed": stats.allowed,
        "denied": stats.denied_by_source,
        "let_through": stats.let_through_by_source,
    }
    return {(result, source): n for result, sources in results.items()
            for source, n in sources.items()}  # fmt: skip


def _denials(stats: Stats) -> Figures:
    results = {"denied": stats.denied, "let_through": stats.let_through}
    return {(result, reason): n for result, reasons in results.items()
            for reason, n in reasons.items()}  # fmt: skip


def age(stats: Stats) -> Figures:
    """Return for how many seconds the oldest event waits, 0 if none does."""
    return {(): max(time.time() - stats.oldest_at, 0.0) if stats.oldest_at else 0.0}


COUNTERS = (
    Figure("requests_settled", "Requests whose response has ended.", (),
            _one("settled")),
    Figure("requests_metered", "Requests that became events.", (), _one("metered")),
    Figure("requests_not_metered", "Requests that became no event.",
            ("policy", "reason"), _not_metered),
    Figure("requests_remarked", "Requests billed by a body that says several things.",
            ("remark",), _by_reason("remarks")),
    Figure("events", "Events made of requests.", (), _one("events")),
    Figure("events_delivered", "Events that OpenMeter took.", (), _one("delivered")),
    Figure("events_dropped", "Events and meters that were lost.", ("reason",),
            _by_reason("dropped")),
    Figure("events_dead_lettered", "Events that OpenMeter refuses for good.", (),
            _one("dead_lettered")),
    Figure("events_unspooled", "Events that the spool could not take.", (),
            _one("unspooled")),
    Figure("delivery_retries", "Attempts after the first one of a batch.", (),
            _one("retries")),
    Figure("delivery_ambiguous", "Attempts without an answer that may have arrived.",
            (), _one("ambiguous")),
    Figure("entitlement_decisions", "Decisions by where the answer came from.",
            ("result", "source"), _decisions),
    Figure("entitlement_denials", "Features denied, or let through all the same.",
            ("result", "reason"), _denials),
)  # fmt: skip
GAUGES = (
    Figure("queue_events", "Events that wait for delivery.", (), _one("waiting")),
    Figure("queue_bytes", "The size of what waits.", (), _one("waiting_bytes")),
    Figure("queue_oldest_age_seconds", "The age of the oldest event that waits.", (),
            age),
)  # fmt: skip
HISTOGRAMS = {
    "delivery_seconds": "How old the oldest event of a batch was on its delivery.",
    "attempt_seconds": "How long OpenMeter took for an attempt.",
}
