"""What is said of a test that fails: what was expected, what was metered instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from openmeter_wsgi.testing.collecting import Collected, Event, Unmetered

#: Of many lines of one kind so many are shown.
_SHOWN = 20
_NO_REQUEST = (
    "no request came through an OpenMeterMiddleware: is the application wrapped, and "
    "does the test's client call it as WSGI does?"
)


def report(
    expected: str, collected: Collected, findings: Iterable[tuple[Event, str]]
) -> str:
    """Say what was *expected*, and of each event why it is not that."""
    lines = [expected]
    lines += _section("metered", [_metered(*finding) for finding in findings])
    lines += _section("not metered", [_unmetered(each) for each in collected.unmetered])
    lines += _section("lost", _lost(collected))
    lines += _section("never granted", _never_granted(collected))
    if len(lines) == 1:
        lines.append(f"  {_NO_REQUEST}")
    return "\n".join(lines)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    more = len(lines) - _SHOWN
    shown = [*lines[:_SHOWN], f"… and {more} more"] if more > 0 else lines
    return [f"{title}:", *(f"  {line}" for line in shown)]


def _metered(event: Event, why_not: str) -> str:
    text = f"{event.type} of {event.subject!r}: {shown(event.data)}"
    return f"{text}  <- {why_not}" if why_not else text


def _unmetered(each: Unmetered) -> str:
    text = f"{each.method} {each.path} ({each.status or 'no status'}): {each.reason}"
    return text if each.policy == "default" else f"{text} [{each.policy}]"


def _lost(collected: Collected) -> list[str]:
    return [f"{n} meters: {reason}" for reason, n in collected.dropped.items()]


def _never_granted(collected: Collected) -> list[str]:
    return [
        f"{feature!r} of {customer!r}: see openmeter.grant({feature!r})"
        for customer, feature in collected.grants.never_granted
    ]


def shown(data: Any) -> str:
    """Return *data* as the JSON that it is sent as."""
    return msgspec.json.encode(data).decode()
