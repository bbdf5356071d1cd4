"""The meters on the server, beside what the policy sends."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from openmeter_wsgi.commands.asking import NoAnswer
from openmeter_wsgi.commands.checks.findings import failure, ok, unknown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from openmeter_wsgi.commands.checks.findings import Finding, Situation
    from openmeter_wsgi.usage import Meter

    Document = dict[str, Any]

_PATH = re.compile(r"\$(?:\.[\w-]+|\['[^'\\]+'\]|\[\d+\])+")
_STEP = re.compile(r"\.([\w-]+)|\['([^'\\]+)'\]|\[(\d+)\]")
_NOWHERE = object()


def look_at_meters(situation: Situation) -> Iterator[Finding]:
    """Say of each static meter whether OpenMeter counts it."""
    try:
        there = situation.listing.meters()
    except NoAnswer as error:
        yield unknown("meters", str(error), "use a key that may list meters")
        return
    sent = situation.policy.static_meters
    if not sent:
        yield ok("meters", "the policy states none; what handlers state is not known")
    for meter in sent:
        counting = [one for one in there if one.get("eventType") == meter.type]
        yield from _look_at_one(meter, counting, there)
    yield from _others(there, {meter.type for meter in sent})


def _look_at_one(
    meter: Meter, counting: list[Document], there: list[Document]
) -> Iterator[Finding]:
    name = f"meter {meter.type!r}"
    if not counting:
        types = sorted({repr(one.get("eventType")) for one in there})
        yield failure(
            name,
            "no meter on the server counts events of this type: they are stored and "
            f"never billed; there are meters for {', '.join(types) or 'nothing'}",
            f"create a meter with eventType {meter.type!r}, or name the type here as "
            "it is called there",
        )
    for one in counting:
        yield _value(name, meter, one)


def _value(name: str, meter: Meter, counting: Document) -> Finding:
    slug, path = counting.get("slug"), counting.get("valueProperty")
    how = counting.get("aggregation")
    if how == "COUNT" or path is None:
        return ok(name, f"the meter {slug!r} counts its events")
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        return unknown(
            name, f"the meter {slug!r} reads {path!r}, which is not read here"
        )
    value = _find(msgspec.json.decode(meter.data), path)
    reads = f"the meter {slug!r} reads {path}"
    if value is _NOWHERE:
        return failure(
            name,
            f"{reads}, which is not in {meter.data.decode()}: it counts nothing",
            "send the property that the meter reads (value_property for numbers by "
            "type), or have the meter read what is sent",
        )
    if how != "UNIQUE_COUNT" and not _is_number(value):
        return failure(
            name,
            f"{reads}, where {value!r} is no number: it counts nothing",
            "send a number there, or have the meter read another property",
        )
    return ok(name, f"{reads}: {value!r}")


def _find(data: Any, path: str) -> Any:
    for named, quoted, index in _STEP.findall(path):
        try:
            data = data[int(index)] if index else data[named or quoted]
        except (LookupError, TypeError):
            return _NOWHERE
    return data


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _others(there: Iterable[Document], sent: set[str]) -> Iterator[Finding]:
    others = [one for one in there if one.get("eventType") not in sent]
    if others:
        named = ", ".join(
            f"{one.get('slug')!r} ({one.get('eventType')!r})" for one in others
        )
        yield ok("other meters", f"what handlers or other services must state: {named}")
