"""Meters: what the handler of one request says that it used."""

from __future__ import annotations

import time
from typing import Any

from openmeter_wsgi import log
from openmeter_wsgi.environ import (
    BILLING,
    ENDED,
    MADE,
    METERS,
    STATED,
    billing_of,
    environ_of,
)
from openmeter_wsgi.errors import MeterValueError
from openmeter_wsgi.usage import Meter, Meters, Number, Usage, add_numbers, read_usage
from openmeter_wsgi.wire import text_problem

logger = log.get_logger(__name__)


#: A view that says nothing of itself.
_ROUTE = object()


class RunTimeMeters:
    """The usage that the handler of one request stated.

    Belongs to the thread that serves the request, so it takes no lock.
    """

    __slots__ = (
        "_documents",
        "_flat",
        "_measured",
        "_overridden",
        "denied",
        "governed_by",
        "governed_since",
        "idempotency_key",
    )  # fmt: skip

    def __init__(self) -> None:
        #: What makes a repetition of this request the same to OpenMeter.
        self.idempotency_key: str | None = None
        #: What governs the view, in place of what governs its route: a billing, or
        #: None where the view is not metered.
        self.governed_by: object | None = _ROUTE
        #: When that view was called.
        self.governed_since = 0.0
        #: Whether the request was denied, so that nothing of it is billed.
        self.denied = False
        self._overridden: set[str] = set()
        self._flat: dict[str, Number] = {}
        self._measured: dict[str, Number] = {}
        self._documents: list[tuple[Meter, bool]] = []

    @property
    def is_governed(self) -> bool:
        """Whether the view says how it is metered."""
        return self.governed_by is not _ROUTE

    def set(self, usage: Usage, *, flat: bool) -> None:
        """Let *usage* be all that was stated, in place of static meters too."""
        numbers = dict(usage.numbers)
        self._overridden = usage.types
        self._flat = numbers if flat else {}
        self._measured = {} if flat else numbers
        self._documents = [(meter, flat) for meter in usage.documents]

    def add(self, usage: Usage) -> None:
        """Let *usage* come on top. Nothing changes if a sum is not possible."""
        sums = {
            name: add_numbers(name, self._measured.get(name, 0), number)
            for name, number in usage.numbers.items()
        }
        self._measured.update(sums)
        self._documents += [(meter, False) for meter in usage.documents]

    def stated(self) -> list[dict[str, Any]]:
        """Return what was stated: the documents, then one mapping of numbers."""
        numbers = dict(self._flat)
        for name, number in self._measured.items():
            numbers[name] = add_numbers(name, numbers.get(name, 0), number)
        documents = [meter.document() for meter, _ in self._documents]
        return [*documents, numbers] if numbers else documents

    def merged(self, policys: Usage, *, with_flat: bool) -> Usage:
        """Return what the policy meters and this together.

        Without *with_flat* the amounts that this calls flat are left out.
        """
        hidden = self._overridden
        numbers = {k: v for k, v in policys.numbers.items() if k not in hidden}
        documents = [m for m in policys.documents if m.type not in hidden]
        if with_flat:
            numbers |= self._flat
        for name, number in self._measured.items():
            if name not in numbers:
                numbers[name] = number
                continue
            try:
                numbers[name] = add_numbers(name, numbers[name], number)
            except MeterValueError as error:
                # Each part is valid and was accepted: the larger one is billed.
                logger.error("%s; the larger one is sent alone", error)
                numbers[name] = max(numbers[name], number, key=float)
        documents += [m for m, flat in self._documents if with_flat or not flat]
        return Usage(numbers, tuple(documents))


def set_meters(request: object, meters: Meters, *, flat: bool = False) -> None:
    """Let *meters* be the run-time usage of this request.

    It replaces what was set or added before, and static meters of the same type.
    With *flat* the amounts count as fixed prices of the request rather than as
    measured usage (see ``on_failure`` and ``on_abort``).

    :raises MeterValueError: naming the bad value; nothing is changed then.
    """
    usage = read_usage(meters)
    if (stated := _run_time_meters(request, "set_meters")) is not None:
        stated.set(usage, flat=flat)


def add_meters(request: object, meters: Meters) -> None:
    """Add *meters* to the usage of this request.

    Numbers add up onto what was stated before and onto the static meter of the
    same type; documents become events of their own.

    :raises MeterValueError: naming the bad value; nothing is changed then.
    """
    usage = read_usage(meters)
    if (stated := _run_time_meters(request, "add_meters")) is not None:
        stated.add(usage)


def get_meters(request: object) -> list[dict[str, Any]]:
    """Return the run-time usage stated so far, in a form `set_meters` takes."""
    stated = _run_time_meters(request, "get_meters")
    return [] if stated is None else stated.stated()


def set_idempotency_key(request: object, key: str) -> None:
    """Let a repetition of this request be billed once: it has the same *key*.

    The ids of its events are derived from subject, method, path, key and type, so
    that OpenMeter drops those of the repetition; it must deduplicate. The application
    says what a repetition is: no header does this by itself. Only a completed response
    takes the place; an attempt that failed or was aborted is billed for itself.

    :raises ValueError: if *key* is no text.
    """
    if problem := text_problem(key):
        raise ValueError(f"idempotency key: {problem}")
    if (stated := _run_time_meters(request, "set_idempotency_key")) is not None:
        stated.idempotency_key = key
        billing = billing_of(environ_of(request))
        if billing is not None and not billing.policy.idempotency_keys:
            logger.warning(
                "%s: used, and the policy does not say idempotency_keys=True, so "
                "'openmeter-wsgi check' cannot tell if OpenMeter deduplicates",
                "set_idempotency_key",
            )


def govern(request: object, billing: object | None) -> None:
    """Let *billing* govern this request, None for not metered at all."""
    if (stated := _run_time_meters(request, "meter")) is not None:
        stated.governed_by = billing
        stated.governed_since = time.perf_counter()


def bill_nothing(request: object) -> None:
    """Bill nothing of this request: it was denied, whatever is answered."""
    if (stated := _run_time_meters(request, "require_entitlements")) is not None:
        stated.denied = True


def _run_time_meters(request: object, helper: str) -> RunTimeMeters | None:
    environ = environ_of(request)
    cell = None if environ is None else environ.get(METERS)
    if cell is None:
        logger.warning(
            "%s: called outside a metered request; nothing is counted", helper
        )
        return None
    stated: RunTimeMeters | None = cell[STATED]
    if stated is MADE or stated is ENDED:
        if helper != "get_meters":
            cell[BILLING].count_late(helper)
        return None
    if stated is None:
        stated = cell[STATED] = RunTimeMeters()
    return stated
