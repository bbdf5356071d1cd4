"""The routes of meters: create, list, read, delete, query."""

from __future__ import annotations

import re
import zoneinfo
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox import documents
from openmeter_wsgi.sandbox.listing import subjects_of
from openmeter_wsgi.sandbox.metering import METER, check_meter
from openmeter_wsgi.sandbox.parameters import moment, page
from openmeter_wsgi.sandbox.parts import parts
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.usage import Meter, Query, usage
from openmeter_wsgi.sandbox.windows import SIZES, rfc3339

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.schema import Schema

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
    meter = documents.read(request.get_data(), METER, "MeterCreate")
    check_meter(meter)
    return jsonify(parts().meters.create({"name": meter["slug"]} | meter)), 201


@routes.get("")
def _list_meters() -> Response:
    number, size = page(request.args)
    return jsonify(parts().meters.all()[(number - 1) * size : number * size])


@routes.get("/<meter>")
def _get_meter(meter: str) -> Response:
    return jsonify(parts().meters.get(meter))


@routes.delete("/<meter>")
def _delete_meter(meter: str) -> tuple[str, int]:
    parts().meters.delete(meter)
    return "", 204


@routes.route("/<meter>/query", methods=["GET", "POST"])
def _query_meter(meter: str) -> Response:
    asked = _asked()
    found = parts().meters.get(meter)
    chosen = _query(found, asked)
    with parts().store.reading() as connection:
        seen = parts().store.horizon(connection)
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
        return documents.read(request.get_data(), REQUEST, "MeterQueryRequest")
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
    found = [parts().customers.get(customer) for customer in asked["filterCustomerId"]]
    theirs = [subject for one in found for subject in subjects_of(one)]
    return theirs if subjects is None else [s for s in subjects if s in theirs]
