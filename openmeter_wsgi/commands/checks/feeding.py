"""What the policies send, beside the meters on the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.asking import Document
    from openmeter_wsgi.commands.checks.findings import Situation


class Sample(NamedTuple):
    """An event that a policy states."""

    type: str
    #: With 1 for what is known only at the end; None where nothing is known of it.
    data: Any


def samples(situation: Situation) -> list[Sample]:
    """Return what the policies state, each once."""
    found = list(_samples(situation))
    return [one for n, one in enumerate(found) if one not in found[:n]]


def _samples(situation: Situation) -> Iterator[Sample]:
    for _, policy in situation.policies():
        for meter in policy.static_meters:
            yield Sample(meter.type, msgspec.json.decode(meter.data))
        for measured in policy.measured:
            yield Sample(measured.type, measured.example(policy.value_property))


def types_stated(situation: Situation) -> set[str]:
    """Return every event type that a policy names, whoever says how much of it."""
    counted = situation.policy.entitlement_meters.values()
    return {
        *(sample.type for sample in samples(situation)),
        *(meter.type for meter in counted),
    }


def event_type(meter: Document) -> str | None:
    """Return the type of events that a meter on the server counts."""
    said = meter.get("eventType")
    return said if isinstance(said, str) else None
