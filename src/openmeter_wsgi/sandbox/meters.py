"""Meters: create, list, read, change, delete, query."""

from __future__ import annotations

import json
import math
import re
import zoneinfo
from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox.context import context
from openmeter_wsgi.sandbox.protocol import (
    KEY,
    Problem,
    Schema,
    moment,
    page,
    read,
    rfc3339,
)
from openmeter_wsgi.sandbox.store import subjects_of
from openmeter_wsgi.sandbox.usage import SIZES, JsonPath, Meter, Query, to_float, usage

AGGREGATIONS = ("SUM", "COUNT", "UNIQUE_COUNT", "AVG", "MIN", "MAX", "LATEST")
METER: Schema = {
    "type": "object",
    "required": ["slug", "aggregation", "eventType"],
    "properties": {
        "slug": {"type": "string", "minLength": 1, "maxLength": 64, "pattern": KEY},
        "name": {"type": "string", "minLength": 1, "maxLength": 256},
        "description": {"type": "string", "maxLength": 1024},
        "aggregation": {"type": "string", "enum": list(AGGREGATIONS)},
        "eventType": {"type": "string", "minLength": 1},
        "eventFrom": {"type": "string", "format": "date-time"},
        "valueProperty": {"type": "string", "minLength": 1},
        "groupBy": {"type": "object", "additionalProperties": {"type": "string"}},
        "metadata": {
            "type": "object",
            "nullable": True,
            "additionalProperties": {"type": "string"},
        },
    },
}


def check_meter(meter: dict[str, Any]) -> None:
    """Refuse a definition that fits the schema and still makes no sense."""
    try:
        _check_value_property(meter)
        for key, path in meter.get("groupBy", {}).items():
            _check_group_by(key, path, meter.get("valueProperty"))
    except ValueError as error:
        raise Problem(400, f"validation error: {error}") from None


def _check_value_property(meter: dict[str, Any]) -> None:
    path = meter.get("valueProperty")
    what = "meter value property"
    if meter["aggregation"] == "COUNT":
        if path is not None:
            raise ValueError(f"{what} is not allowed when the aggregation is count")
    elif path is None:
        raise ValueError(f"{what} is required when the aggregation is not count")
    elif not path.startswith("$"):
        raise ValueError(f"{what} must start with $")
    else:
        JsonPath(path)


def _check_group_by(key: str, path: str, value_property: str | None) -> None:
    if not path.startswith("$"):
        raise ValueError(f"meter group by value must start with $ for key {key}")
    if not re.fullmatch("[a-zA-Z_][0-9a-zA-Z_]*", key):
        raise ValueError(
            f"meter group by key {key} is invalid,"
            " only alphanumeric and underscore characters are allowed"
        )
    if path == value_property:
        raise ValueError(
            f"meter group by value {key} cannot be the same as value property"
        )
    JsonPath(path)


def flaw_of(meter: dict[str, Any], data: str | None) -> str | None:
    """Return why *meter* cannot use an event with *data*, in OpenMeter's words."""
    if meter["aggregation"] == "COUNT":
        return None
    if data is None:
        return "invalid event: null and missing value property"
    path = meter["valueProperty"]
    try:
        value = JsonPath(path).find(json.loads(data))
    except LookupError:
        return f'invalid event: missing value property: "{path}"'
    if value is None:
        return "invalid event: value cannot be null"
    if meter["aggregation"] == "UNIQUE_COUNT":
        return None
    return _flaw_of_number(value)


def _flaw_of_number(value: Any) -> str | None:
    if isinstance(value, bool | list | dict):
        name = {bool: "bool", list: "[]interface {}", dict: "map[string]interface {}"}
        return f"invalid event: unsupported value property type: {name[type(value)]}"
    try:
        number = to_float(str(value))
    except ValueError:
        return f"invalid event: value cannot be parsed as float64: {value}"
    if math.isnan(number):
        return "invalid event: value cannot be NaN"
    return "invalid event: value cannot be infinity" if math.isinf(number) else None


_TEXTS: Schema = {"type": "array", "items": {"type": "string"}}
_TIME: Schema = {"type": "string", "format": "date-time"}
REQUEST: Schema = {
    "type": "object",
    "properties": {
        "clientId": {"type": "string", "minLength": 1, "maxLength": 36},
        "from": _TIME,
        "to": _TIME,
        "windowSize": {"type": "string", "enum": list(SIZES)},
        "windowTimeZone": {"type": "string"},
        "subject": _TEXTS,
        "filterCustomerId": _TEXTS,
        "filterGroupBy": {"type": "object", "additionalProperties": _TEXTS},
        "groupBy": _TEXTS,
    },
}

routes = Blueprint("meters", __name__, url_prefix="/api/v1/meters")


@routes.post("")
def _create_meter() -> tuple[Response, int]:
    meter = read(request.get_data(), METER, "MeterCreate")
    check_meter(meter)
    return jsonify(context().meters.create({"name": meter["slug"]} | meter)), 201


@routes.get("")
def _list_meters() -> Response:
    number, size = page(request.args)
    return jsonify(context().meters.all()[(number - 1) * size : number * size])


@routes.get("/<meter>")
def _get_meter(meter: str) -> Response:
    return jsonify(context().meters.get(meter))


@routes.delete("/<meter>")
def _delete_meter(meter: str) -> tuple[str, int]:
    context().meters.delete(meter)
    return "", 204


@routes.route("/<meter>/query", methods=["GET", "POST"])
def _query_meter(meter: str) -> Response:
    asked = _asked()
    found = context().meters.get(meter)
    chosen = _query(found, asked)
    with context().store.reading() as connection:
        seen = context().store.horizon(connection)
        rows = usage(connection, found, replace(chosen, horizon=seen))
    return jsonify(_echo(asked) | {"data": rows})


def _echo(asked: dict[str, Any]) -> dict[str, Any]:
    echo = {
        name: rfc3339(at)
        for name in ("from", "to")
        if (at := moment(asked.get(name), name)) is not None
    }
    return echo | {k: asked[k] for k in ("windowSize",) if k in asked}


def _asked() -> dict[str, Any]:
    """Return the query, from the parameters or the body, in the form of the body."""
    if request.method == "POST":
        return read(request.get_data(), REQUEST, "MeterQueryRequest")
    asked: dict[str, Any] = {}
    for name, values in request.args.lists():
        if found := re.fullmatch(r"filterGroupBy\[(.+)\]", name):
            asked.setdefault("filterGroupBy", {})[found[1]] = values
        elif name in ("subject", "groupBy", "filterCustomerId"):
            asked[name] = values
        else:
            asked[name] = values[0]
    return asked


def _query(meter: Meter, asked: dict[str, Any]) -> Query:
    if "advancedMeterGroupByFilters" in asked:
        raise Problem(400, "the sandbox does not know advancedMeterGroupByFilters")
    start, end = (moment(asked.get(name), name) for name in ("from", "to"))
    if start is not None and end is not None and start >= end:
        raise Problem(400, "validation error: from must be before to")
    return Query(
        start=start,
        end=end,
        window=_window(asked.get("windowSize")),
        zone=_zone(asked.get("windowTimeZone", "UTC")),
        subjects=_subjects(asked),
        group_by=_group_by(meter, asked),
        filters=_filters(meter, asked.get("filterGroupBy", {})),
    )


def _window(size: str | None) -> str | None:
    if size is not None and size not in SIZES:
        raise Problem(400, f"validation error: invalid window size type: {size}")
    return size


def _zone(name: str) -> str:
    try:
        return zoneinfo.ZoneInfo(name).key
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        detail = f"validation error: invalid time zone: unknown time zone {name}"
        raise Problem(400, detail) from None


def _group_by(meter: Meter, asked: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(asked.get("groupBy", ())))
    for name in names:
        if name != "subject" and name not in meter.get("groupBy", {}):
            raise Problem(400, f"validation error: invalid group by: {name}")
    # Naming subjects also groups by them.
    if "subject" in asked and "subject" not in names:
        names.append("subject")
    return names


def _filters(meter: Meter, wanted: dict[str, list[str]]) -> dict[str, list[str]]:
    for name in wanted:
        if name not in meter.get("groupBy", {}):
            raise Problem(400, f"validation error: invalid group by filter: {name}")
    return wanted


def _subjects(asked: dict[str, Any]) -> list[str] | None:
    subjects: list[str] | None = asked.get("subject")
    if "filterCustomerId" not in asked:
        return subjects
    found = [
        context().customers.get(customer) for customer in asked["filterCustomerId"]
    ]
    theirs = [subject for one in found for subject in subjects_of(one)]
    return theirs if subjects is None else [s for s in subjects if s in theirs]
