"""The routes of meters: create, list, read, change, delete and query."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import zoneinfo
from dataclasses import replace
from typing import Any, Final
from urllib.parse import unquote

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox.context import current_context
from openmeter_wsgi.sandbox.request_validation import (
    KEY,
    METADATA,
    SLUG,
    TEXT,
    TEXTS,
    TIME,
    ULID,
    Document,
    Problem,
    Schema,
    list_of,
    moment,
    page,
    path_parameter,
    read,
    refuse,
    rfc3339,
    shape,
    text,
)
from openmeter_wsgi.sandbox.store import subjects_of
from openmeter_wsgi.sandbox.usage import (
    SIZES,
    JsonPath,
    Meter,
    Query,
    Row,
    to_float,
    usage,
)

AGGREGATIONS = ("SUM", "COUNT", "UNIQUE_COUNT", "AVG", "MIN", "MAX", "LATEST")
_NAMES: Schema = {
    "name": text(256),
    "description": TEXT | {"maxLength": 1024},
    "groupBy": TEXTS,
    "metadata": METADATA,
}
METER = shape(
    "slug aggregation eventType",
    slug=SLUG,
    aggregation=TEXT | {"enum": list(AGGREGATIONS)},
    eventType=text(),
    eventFrom=TIME,
    valueProperty=text(),
    **_NAMES,
)
CHANGE = shape("", **_NAMES)
_LIST = list_of(TEXT)
QUERY = shape(
    "",
    **{"from": TIME, "to": TIME},
    clientId=text(36),
    windowSize=TEXT | {"enum": list(SIZES)},
    windowTimeZone=TEXT,
    subject=_LIST,
    filterCustomerId=_LIST,
    filterGroupBy={"type": "object", "additionalProperties": _LIST},
    advancedMeterGroupByFilters={"type": "object"},
    groupBy=_LIST,
)

routes: Final = Blueprint("meters", __name__, url_prefix="/api/v1/meters")


@routes.post("")
def _create_meter() -> Response:
    meter = read(METER, "MeterCreate")
    check_meter(meter)
    empty = {"name": meter["slug"], "metadata": None, "annotations": None}
    return jsonify(current_context().meters.create(empty | meter))


@routes.get("")
def _list_meters() -> Response:
    number, size = page(request.args)
    return jsonify(current_context().meters.all()[(number - 1) * size : number * size])


@routes.get("/<meter>")
def _get_meter(meter: str) -> Response:
    return jsonify(_meter(meter))


@routes.put("/<meter>")
def _change_meter(meter: str) -> Response:
    changes = read(CHANGE, "MeterUpdate")
    found = _meter(meter)
    check_meter(found | changes)
    kept = {k: v for k, v in found.items() if k not in ("description", "groupBy")}
    return jsonify(current_context().meters.update(kept | {"metadata": None} | changes))


@routes.delete("/<meter>")
def _delete_meter(meter: str) -> tuple[str, int]:
    found = _meter(meter)
    if any(
        f.get("meterSlug") == found["slug"] for f in current_context().features.all()
    ):
        detail = "conflict error: meter has active features and cannot be deleted"
        raise Problem(409, detail)
    current_context().meters.retire(found["id"])
    return "", 204


@routes.get("/<meter>/subjects")
def _subjects_of_meter(meter: str) -> Response:
    query = Query(group_by=("subject",))
    rows = rows_of(_meter(meter) | {"aggregation": "COUNT"}, query)
    return jsonify(sorted(str(row["subject"]) for row in rows))


@routes.route("/<meter>/query", methods=["GET", "POST"])
def _query_meter(meter: str) -> Response:
    asked = _asked()
    found = _meter(meter)
    query = _query(found, asked)
    rows = rows_of(found, query)
    kinds = ["application/json", "text/csv"]
    if request.accept_mimetypes.best_match(kinds) == "text/csv":
        return _csv(rows, query)
    return jsonify(_echo(asked) | {"data": rows})


def _meter(id_or_slug: str) -> Meter:
    path_parameter("meterIdOrSlug", id_or_slug, f"{KEY}|{ULID}")
    return current_context().meters.get(id_or_slug)


def rows_of(meter: Meter, query: Query) -> list[Row]:
    """Return the usage of *meter* from the visible events."""
    store = current_context().store
    with store.reading() as connection:
        horizon = store.horizon(connection)
        return usage(connection, meter, replace(query, horizon=horizon))


def _csv(rows: list[Row], query: Query) -> Response:
    names = [name for name in query.group_by if name not in _RESERVED]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["window_start", "window_end", "subject", *names, "value"])
    for row in rows:
        groups = [row["groupBy"][name] for name in names]
        times = [row["windowStart"], row["windowEnd"]]
        writer.writerow([*times, row["subject"], *groups, f"{row['value']:f}"])
    response = Response(text.getvalue())
    response.headers["Content-Type"] = "text/csv"
    return response


def _echo(asked: Document) -> Document:
    echo = {
        name: rfc3339(at)
        for name in ("from", "to")
        if (at := moment(asked.get(name), name)) is not None
    }
    return echo | {k: asked[k] for k in ("windowSize",) if k in asked}


def _asked() -> Document:
    """Return the query in the form of the body, from the body or the parameters."""
    if request.method == "POST":
        return read(QUERY, "MeterQueryRequest")
    asked: Document = {}
    for name, values in request.args.lists():
        if match := re.fullmatch(r"filterGroupBy\[([^]]+)\](.*)", name):
            asked.setdefault("filterGroupBy", {})[match[1]] = values
            _check_filter(match[1], match[2], values)
        elif name in ("subject", "groupBy", "filterCustomerId"):
            if "" in values:
                raise refuse(name, "empty value is not allowed")
            asked[name] = values
        else:
            asked[name] = values[0]
    if asked.get("windowSize", "DAY") not in SIZES:
        sizes = json.dumps(SIZES, separators=(",", ":"))
        raise refuse("windowSize", f"value is not one of the allowed values {sizes}")
    return asked


def _check_filter(name: str, index: str, values: list[str]) -> None:
    """Answer 400 for a list of values: only a body can contain lists."""
    if index:
        given = re.findall(rf"{re.escape(name)}\]\[(.*?)\]=", unquote(request.url))
        texts = (request.args[f"filterGroupBy[{name}][{one}]"] for one in given)
        listed = " ".join(map(":".join, zip(given, texts, strict=True)))
        reason = f"value map[{listed}]"
        reason = f"path {name}: {reason}: path is not convertible to primitive"
        raise refuse("filterGroupBy", reason)
    if len(values) > 1:
        reason = f"path {name}: array items must be set with indexes"
        raise refuse("filterGroupBy", reason)


def _query(meter: Meter, asked: Document) -> Query:
    if "advancedMeterGroupByFilters" in asked:
        detail = "the sandbox does not offer advancedMeterGroupByFilters"
        raise Problem(501, f"{detail}; filterGroupBy takes lists of values")
    start, end = (moment(asked.get(name), name) for name in ("from", "to"))
    if start is not None and end is not None and start >= end:
        reason = (
            "from and to cannot be equal" if start == end else "from must be before to"
        )
        raise Problem(400, f"validation error: {reason}")
    customers = _customers(asked.get("filterCustomerId", ()))
    return Query(
        start=start,
        end=end,
        window=asked.get("windowSize"),
        zone=_zone(asked.get("windowTimeZone", "UTC")),
        subjects=asked.get("subject") or None,
        customers=customers,
        group_by=_group_by(meter, asked, by_customer=customers is not None),
        filters=_filters(meter, asked.get("filterGroupBy", {})),
    )


def _zone(name: str) -> str:
    try:
        return zoneinfo.ZoneInfo(name).key
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        detail = f"validation error: invalid time zone: unknown time zone {name}"
        raise Problem(400, detail) from None


#: Dimensions of all meters.
_RESERVED = ("subject", "customer_id")


def _group_by(meter: Meter, asked: Document, *, by_customer: bool) -> list[str]:
    names = list(dict.fromkeys(asked.get("groupBy", ())))
    if "customer_id" in names and not by_customer:
        detail = "customer filter is required with customer_id group by"
        raise Problem(400, f"validation error: {detail}")
    for name in names:
        if name not in _RESERVED and name not in meter.get("groupBy", {}):
            raise Problem(400, f"validation error: invalid group by: {name}")
    # A filter of subjects or customers also groups by them.
    implied = {"subject": "subject" in asked, "customer_id": by_customer}
    return names + [n for n, wanted in implied.items() if wanted and n not in names]


def _filters(meter: Meter, wanted: dict[str, list[str]]) -> dict[str, list[str]]:
    for name, values in wanted.items():
        if name not in meter.get("groupBy", {}):
            raise Problem(400, f"validation error: invalid group by filter: {name}")
        if "" in values:
            detail = "validation error: filter is invalid: format mismatch"
            raise Problem(400, f"validation error: {detail}")
    return {name: values for name, values in wanted.items() if values}


def _customers(ids: list[str]) -> dict[str, str] | None:
    """Return the *ids* by the subjects that the customers pay for; None without any."""
    if not ids:
        return None
    known = {customer["id"]: customer for customer in current_context().customers.all()}
    for id_ in ids:
        if id_ not in known:
            raise Problem(404, f"not found error: customer with id {id_} not found")
    return {subject: id_ for id_ in ids for subject in subjects_of(known[id_])}


def check_meter(meter: Meter) -> None:
    """Answer 400 if *meter* is invalid although it fits the schema."""
    path = meter.get("valueProperty")
    counts = meter["aggregation"] == "COUNT"
    if counts == (path is not None):
        verb, word = ("not allowed", "is") if counts else ("required", "is not")
        detail = f"meter value property is {verb} when the aggregation {word} count"
        raise Problem(400, f"validation error: invalid meter aggregation: {detail}")
    if path is not None:
        _check_path(path, "invalid JSONPath")
    for key, group in meter.get("groupBy", {}).items():
        _check_path(group, "invalid JSONPath for a group by")
        _check_group_by(key, group, path)


def _check_path(path: str, error: str) -> None:
    try:
        JsonPath(path)
    except ValueError as error_of_path:
        if path.startswith("$") and path.count("[") == path.count("]"):
            raise Problem(501, str(error_of_path)) from None
        raise Problem(400, f"validation error: {error}: %!w(<nil>)") from None


def _check_group_by(key: str, path: str, value_property: str | None) -> None:
    detail = None
    if not re.fullmatch("[a-zA-Z_][0-9a-zA-Z_]*", key):
        rule = "only alphanumeric and underscore characters are allowed"
        detail = f"meter group by key {key} is invalid, {rule}"
    elif path == value_property:
        detail = f"meter group by value {key} cannot be the same as value property"
    if detail:
        raise Problem(400, f"validation error: invalid meter group by: {detail}")


def flaw_of(meter: Meter, data: str | None) -> str | None:
    """Return OpenMeter's reason why *meter* cannot count *data*, or None."""
    if meter["aggregation"] == "COUNT":
        return None
    document = json.loads(data or "null")
    if document is None:
        return "invalid event: null and missing value property"
    path = meter["valueProperty"]
    try:
        value = JsonPath(path).find(document)
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
        number = _go_float(str(value))
    except ValueError:
        return f"invalid event: value cannot be parsed as float64: {value}"
    if math.isnan(number):
        return "invalid event: value cannot be NaN"
    return "invalid event: value cannot be infinity" if math.isinf(number) else None


def _go_float(text: str) -> float:
    """Convert *text* as Go's ``strconv.ParseFloat``, which accepts more than Python."""
    if re.fullmatch(r"[+-]?0[xX][0-9a-fA-F_.]+[pP][+-]?[0-9]+", text):
        return float.fromhex(text.replace("_", ""))
    return to_float(re.sub(r"(?<=[0-9])_(?=[0-9])", "", text))
