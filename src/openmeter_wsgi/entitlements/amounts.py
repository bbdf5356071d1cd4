"""How much of a feature events use, as OpenMeter will count it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from openmeter_wsgi.options.entitlement_values import CountedMeter
    from openmeter_wsgi.usage import Meter


def amount_of(
    meters: Iterable[Meter], counted: CountedMeter, value_property: str
) -> float:
    """Return what *meters* use of the feature that counts *counted*."""
    name = counted.property or value_property
    return math.fsum(
        _number(meter, name) for meter in meters if meter.type == counted.type
    )


def _number(meter: Meter, name: str) -> float:
    """Return the number in the data of an event, 1 where it has none of that name.

    Text counts as the number that it says, as it does in OpenMeter; what says none
    is left out there, too.
    """
    value = msgspec.json.decode(meter.data).get(name, 1)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0
