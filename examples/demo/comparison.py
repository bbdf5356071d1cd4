"""Compares the expected usage with the billed usage."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from examples.demo.expectation import Account, Expectation

#: Maximum number of reported differences of one kind.
MOST = 10


@dataclass(frozen=True)
class Billed:
    """The usage, events and counts of the server, and the counts of the workers."""

    usage: Counter[Account]
    #: In the form of the server's list.
    events: Sequence[dict[str, Any]]
    #: The sandbox's counts of received requests and events.
    counts: dict[str, int]
    #: The middleware's counts, one set per worker; None while the workers run.
    workers: Sequence[dict[str, Any]] | None = None

    def total(self, name: str) -> int:
        """Return a count of all workers together."""
        return sum(worker[name] for worker in self.workers or ())

    def reasons(self, name: str) -> Counter[str]:
        """Return counts by reason of all workers together."""
        together: Counter[str] = Counter()
        for worker in self.workers or ():
            together.update(worker[name])
        return together


def differences(expected: Expectation, billed: Billed) -> list[str]:
    """Return a sentence for each difference."""
    return [
        *_some(expected.surprises),
        *_some(list(_accounts(expected, billed))),
        *_some(list(_events(expected, billed))),
        *(() if billed.workers is None else _workers(expected, billed)),
    ]


def _some(sentences: list[str]) -> list[str]:
    left = len(sentences) - MOST
    return sentences[:MOST] + ([f"… and {left} more like this"] if left > 0 else [])


def _accounts(expected: Expectation, billed: Billed) -> Iterator[str]:
    for account in sorted(expected.usage.keys() | billed.usage.keys()):
        due, found = expected.usage[account], billed.usage[account]
        if due != found:
            name = " ".join(filter(None, account))
            yield f"usage of {name}: expected {due:,}, billed {found:,}"


def _events(expected: Expectation, billed: Billed) -> Iterator[str]:
    due, found = expected.events, len(billed.events)
    if due != found:
        what = (
            f"{due - found:,} missing" if found < due else f"{found - due:,} too many"
        )
        yield f"events: expected {due:,}, found {found:,}: {what}"
    seen = Counter(
        (one["event"]["source"], one["event"]["id"]) for one in billed.events
    )
    for (_, event_id), times in seen.items():
        if times > 1:
            yield f"event {event_id}: stored {times} times"
    for one in billed.events:
        if flaw := one.get("validationError"):
            yield f"event {one['event']['id']}: {flaw}"


def _workers(expected: Expectation, billed: Billed) -> Iterator[str]:
    sent = expected.sent.total()
    not_metered = sum(billed.reasons("not_metered").values())
    for what, due, found in (
        ("requests settled", sent, billed.total("settled")),
        ("requests not metered", sent - expected.metered.total(), not_metered),
        ("events delivered", expected.events, billed.total("delivered")),
        ("events left waiting", 0, billed.total("waiting")),
        ("events refused for good", 0, billed.total("dead_lettered")),
        ("events dropped", 0, sum(billed.reasons("dropped").values())),
    ):
        if due != found:
            yield f"{what}, by the workers' count: expected {due:,}, got {found:,}"
