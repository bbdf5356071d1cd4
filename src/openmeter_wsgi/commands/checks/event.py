"""The marked event: what OpenMeter says of it in its list."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.commands.asking import NoAnswer
from openmeter_wsgi.commands.checks.findings import MARK, ok, unanswered, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.checks.findings import Finding, Situation

_NAME = "event"
#: An event is listed some seconds after it was taken; waited for is so long.
PATIENCE = 30.0
#: Seconds between two looks.
INTERVAL = 0.5


def look_at_event(situation: Situation) -> Iterator[Finding]:
    """Find the marked event in OpenMeter's list, and read what is wrong with it."""
    assert situation.sent is not None  # noqa: S101 - the table says so
    try:
        entries = listed(situation, situation.sent.id, PATIENCE)
    except NoAnswer as error:
        yield unanswered(_NAME, error, "list events")
        return
    if not entries:
        yield warning(
            _NAME,
            f"taken, and not listed within {PATIENCE:.0f} s",
            "see whether the server's sink worker runs, which stores what was taken",
        )
        return
    yield from _explain(entries[0])


def listed(situation: Situation, event_id: str, patience: float) -> list[Any]:
    """Return how an event is listed as soon as it is, [] if that takes too long.

    :raises NoAnswer: if the server lists nothing.
    """
    source = situation.policy.event_source
    deadline = time.monotonic() + patience
    while not (entries := situation.listing.entries(event_id, source)):
        if time.monotonic() > deadline:
            break
        situation.wait(INTERVAL, "Waiting for OpenMeter to list an event")
    return entries


def _explain(entry: dict[str, Any]) -> Iterator[Finding]:
    """Say what is wrong beyond what must be: nobody counts it, nobody pays for it."""
    said = str(entry.get("validationError") or "")
    others = [line for line in said.splitlines() if not _is_expected(line)]
    if not others:
        yield ok(_NAME, "it arrives; no meter counts it, as it should be")
        return
    yield warning(
        _NAME,
        f"OpenMeter says of it: {'; '.join(others)}",
        f"delete the meter that counts the event type {MARK}, or mend what it says",
    )


def _is_expected(line: str) -> bool:
    return "no meter found" in line or "customer" in line
