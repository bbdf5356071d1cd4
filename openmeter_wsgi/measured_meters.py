"""Meters of a policy that hold measures, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from openmeter_wsgi import log
from openmeter_wsgi.bodies.reader import Unknown
from openmeter_wsgi.errors import MeterValueError
from openmeter_wsgi.measure_texts import read_measure
from openmeter_wsgi.measures import Measure, as_number
from openmeter_wsgi.usage import Number, Usage, read_usage

if TYPE_CHECKING:
    from openmeter_wsgi.exchange import Exchange

logger = log.get_logger(__name__)

#: Stands for a measure where the rest of a document is checked.
_ANY_NUMBER = 1


class _NoValue(Exception):
    def __init__(self, measure: Measure, reason: str) -> None:
        self.measure = measure
        self.reason = reason
        super().__init__(reason)


class MeasuredMeter(NamedTuple):
    """A meter whose number, or whose data, is known only in the end."""

    type: str
    #: A document, or a measure alone for a number by type.
    content: Any
    measures: tuple[Measure, ...]

    @property
    def is_quantity(self) -> bool:
        """Whether it says how much, and not only of what kind."""
        return any(measure.is_quantity for measure in self.measures)

    def example(self, value_property: str) -> Any:
        """Return its data with 1 for each measure; None where all of it is one."""
        if isinstance(self.content, Measure):
            return {value_property: _ANY_NUMBER}
        data = self.content.get("data", {})
        return None if isinstance(data, Measure) else _replaced(data)


class Evaluated(NamedTuple):
    """What measured meters came to."""

    usage: Usage
    #: The measures that had no value, and why, by the type of their meter.
    missing: list[tuple[str, Measure, str]]


def split(meter: Any, meters: Any) -> tuple[Usage, tuple[MeasuredMeter, ...]]:
    """Part what a policy states into what is known now and what is measured.

    :raises ValueError: naming what is wrong. It may be called again with the same.
    """
    documents: list[Mapping[str, Any]] = []
    numbers: dict[str, Any] = {}
    measured: list[MeasuredMeter] = []
    given = [meter] if isinstance(meter, Mapping) else list(meter or ())
    for document in given:
        read = _with_measures(document)
        if found := tuple(_measures_in(read)):
            _check(read)
            measured.append(MeasuredMeter(read["type"], read, found))
        else:
            documents.append(read)
    for name, value in (meters or {}).items():
        number = read_measure(value) if isinstance(value, str) else value
        if isinstance(number, Measure):
            read_usage({name: _ANY_NUMBER})
            measured.append(MeasuredMeter(name, number, (number,)))
        else:
            numbers[name] = number
    plain = read_usage(documents).documents if documents else ()
    return Usage(read_usage(numbers).numbers if numbers else {}, plain), (*measured,)


def evaluate(meters: Iterable[MeasuredMeter], exchange: Exchange) -> Evaluated:
    """Return what *meters* come to at the end of *exchange*. Never raises."""
    numbers: dict[str, Number] = {}
    documents: list[Mapping[str, Any]] = []
    missing: list[tuple[str, Measure, str]] = []
    for meter in meters:
        try:
            value = _filled(meter.content, exchange)
            if isinstance(meter.content, Measure):
                numbers |= read_usage({meter.type: _number(meter, value)}).numbers
            else:
                read_usage(value)
                documents.append(value)
        except _NoValue as none:
            missing.append((meter.type, none.measure, none.reason))
        except MeterValueError as error:
            logger.error("meter %r: not sent: %s", meter.type, error)
            missing.append((meter.type, meter.measures[0], "invalid"))
    plain = read_usage(documents).documents if documents else ()
    return Evaluated(Usage(numbers, plain), missing)


def _number(meter: MeasuredMeter, value: object) -> Any:
    number = as_number(value)
    if isinstance(number, Unknown):
        raise _NoValue(meter.content, number.reason)
    return number


def _with_measures(value: Any) -> Any:
    """Return *value* with texts that name measures replaced by them."""
    if isinstance(value, str):
        return read_measure(value)
    if isinstance(value, Mapping):
        return {key: _with_measures(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_measures(each) for each in value]
    return value


def _measures_in(value: Any) -> Iterable[Measure]:
    if isinstance(value, Measure):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _measures_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from _measures_in(each)


def _check(document: Mapping[str, Any]) -> None:
    """Check all of a document but its measures."""
    data = document.get("data")
    stand_in = {"any": _ANY_NUMBER} if isinstance(data, Measure) else _replaced(data)
    rest = {key: value for key, value in document.items() if key != "data"}
    if found := next(iter(_measures_in(rest)), None):
        raise ValueError(f"expected measures in data alone, got {found!r} outside it")
    read_usage({**rest, "data": stand_in})


def _replaced(value: Any) -> Any:
    if isinstance(value, Measure):
        return _ANY_NUMBER
    if isinstance(value, Mapping):
        return {key: _replaced(each) for key, each in value.items()}
    return [_replaced(each) for each in value] if isinstance(value, list) else value


def _filled(value: Any, exchange: Exchange) -> Any:
    """Return *value* with every measure replaced by what it comes to."""
    if isinstance(value, Measure):
        found = value.value(exchange)
        if isinstance(found, Unknown):
            raise _NoValue(value, found.reason)
        return found
    if isinstance(value, Mapping):
        return {key: _filled(each, exchange) for key, each in value.items()}
    return (
        [_filled(each, exchange) for each in value]
        if isinstance(value, list)
        else value
    )
