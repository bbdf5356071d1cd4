"""The meters on the server, beside what the policies send."""

from __future__ import annotations

import datetime
import json
import re
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.commands.asking import NoAnswer, UsageQuery
from openmeter_wsgi.commands.checks.feeding import event_type, samples, types_stated
from openmeter_wsgi.commands.checks.findings import (
    failure,
    ok,
    unanswered,
    unknown,
    warning,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.asking import Document
    from openmeter_wsgi.commands.checks.feeding import Sample
    from openmeter_wsgi.commands.checks.findings import Finding, Situation

_PATH = re.compile(r"\$(?:\.[\w-]+|\['[^'\\]+'\]|\[\d+\])+")
_STEP = re.compile(r"\.([\w-]+)|\['([^'\\]+)'\]|\[(\d+)\]")
_NOWHERE = object()
#: Of a meter that no policy feeds is asked whether anybody has, for so many days.
DAYS = 7
#: More of them than this are not asked for.
_MAX_ASKED = 50


def look_at_meters(situation: Situation) -> Iterator[Finding]:
    """Say which meters of the policies OpenMeter counts, and which it has besides."""
    try:
        there = situation.listing.meters()
    except NoAnswer as error:
        yield unanswered("meters", error, "list meters")
        return
    sent = samples(situation)
    if not sent:
        yield ok("meters", "the policy states none; what handlers state is not known")
    for sample in sent:
        counting = [one for one in there if event_type(one) == sample.type]
        yield from _look_at_one(sample, counting, there)
    stated = types_stated(situation)
    yield from _unfed(
        situation, [one for one in there if event_type(one) not in stated]
    )


def _look_at_one(
    sample: Sample, counting: list[Document], there: list[Document]
) -> Iterator[Finding]:
    name = f"meter {sample.type!r}"
    if not counting:
        types = sorted({repr(event_type(one)) for one in there})
        yield failure(
            name,
            "no meter on the server counts events of this type: they are stored and "
            f"never billed; there are meters for {', '.join(types) or 'nothing'}",
            f"create a meter with eventType {sample.type!r}, or name the type here as "
            "it is called there",
        )
    for one in counting:
        yield _value(name, sample, one)


def _value(name: str, sample: Sample, counting: Document) -> Finding:
    slug, path = counting.get("slug"), counting.get("valueProperty")
    how = counting.get("aggregation")
    reads = f"the meter {slug!r} reads {path}"
    if how == "COUNT" or path is None:
        return ok(name, f"the meter {slug!r} counts its events")
    if sample.data is None:
        return unknown(name, f"{reads}; what is in the data is known only at the end")
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        return unknown(name, f"{reads}, which is not read here")
    value = _find(sample.data, path)
    if value is _NOWHERE:
        return failure(
            name,
            f"{reads}, which is not in {json.dumps(sample.data)}: it counts nothing",
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


def _unfed(situation: Situation, others: list[Document]) -> Iterator[Finding]:
    """Say of the meters that no policy feeds whether handlers or others feed them."""
    fed: list[Document] = []
    unfed: list[Document] = []
    try:
        for meter in others[:_MAX_ASKED]:
            (fed if _has_usage(situation, meter) else unfed).append(meter)
    except NoAnswer as error:
        yield unanswered("other meters", error, "query meters")
        return
    if unfed:
        yield warning(
            "meters without usage",
            f"no policy feeds {_named(unfed)}, and nothing else has for {DAYS} days: "
            "they bill nothing",
            "name the type in meters, or state it in a handler with set_meters; delete "
            "the meter if it is not needed",
        )
    if fed:
        yield ok("other meters", f"fed by handlers or other services: {_named(fed)}")


def _has_usage(situation: Situation, meter: Document) -> bool:
    today = datetime.datetime.now(datetime.UTC).replace(
        hour=0, minute=0, second=0, microsecond=0
    )
    since = (today - datetime.timedelta(days=DAYS)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return bool(
        situation.listing.usage(str(meter.get("slug")), UsageQuery(since=since))
    )


def _named(meters: list[Document]) -> str:
    return ", ".join(f"{one.get('slug')!r} ({event_type(one)!r})" for one in meters)
