"""How much of a feature requests use, as OpenMeter will count it."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.options.entitlement_values import amounts as read_amounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence

    from openmeter_wsgi.options.entitlement_values import CountedMeter
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.usage import Meter

logger = log.get_logger(__name__)


class Amounts:
    """What the requests of one policy use of the features that are counted down.

    Any thread. What the policy's own meters say is worked out once: it is all that
    most requests use.
    """

    def __init__(
        self, policy: Policy, customer_of: Callable[[str], str | None]
    ) -> None:
        self._meters = policy.entitlement_meters
        self._value_property = policy.value_property
        self._customer_of = customer_of
        self._static = policy.static_meters
        self._used_by_static = self._of(self._static)
        self._static_is_of_subject = not any(meter.subject for meter in self._static)
        #: What says how much is set apart for a request, if it is not always the same.
        self._reserve = policy.reserve if callable(policy.reserve) else None
        #: What is set apart for a request, by feature.
        self.usual = {**self._used_by_static}
        if policy.reserve is not None and self._reserve is None:
            self.usual.update(policy.reserve)  # type: ignore[arg-type]

    @property
    def are_usual(self) -> bool:
        """Whether the same is set apart for all requests."""
        return self._reserve is None

    def to_reserve(self, environ: MutableMapping[str, Any]) -> Mapping[str, float]:
        """Return what is set apart for the request of *environ*, by feature."""
        if self._reserve is None:
            return self.usual
        try:
            return {**self.usual, **read_amounts(self._reserve(environ))}  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - the user's code, on our path
            logger.error("reserve: %r raised %r; nothing is set apart",
                         self._reserve, error)  # fmt: skip
            return self.usual

    def used(
        self, meters: Sequence[Meter], subject: str | None
    ) -> dict[tuple[str, str], float]:
        """Return what *meters* use, by customer and feature."""
        if subject and self._static_is_of_subject and meters == self._static:
            customer = self._customer(subject)
            return {
                (customer, feature): amount
                for feature, amount in self._used_by_static.items()
            }
        used: defaultdict[tuple[str, str], float] = defaultdict(float)
        for meter in meters:
            if who := meter.subject or subject:
                for feature, amount in self._of((meter,)).items():
                    used[self._customer(who), feature] += amount
        return used

    def _customer(self, subject: str) -> str:
        try:
            return self._customer_of(subject) or subject
        except Exception as error:  # noqa: BLE001 - the user's code, on our path
            # What is billed does not depend on it.
            logger.error("customer: raised %r; no quota is counted down for it", error)
            return subject

    def _of(self, meters: Iterable[Meter]) -> dict[str, float]:
        return {
            feature: amount
            for feature, counted in self._meters.items()
            if (amount := amount_of(meters, counted, self._value_property))
        }


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
