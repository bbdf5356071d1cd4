"""The routes of version 3: customers, features, meters, their usage, and events."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox.context import current_context
from openmeter_wsgi.sandbox.event_routes import (
    cursor_of,
    list_events,
    one_of,
    read_cursor,
)
from openmeter_wsgi.sandbox.meter_routes import rows_of
from openmeter_wsgi.sandbox.request_validation import (
    TEXT,
    TIME,
    ULID,
    Flaw,
    Problem,
    integer,
    invalid,
    list_of,
    matches,
    moment,
    read,
    shape,
)
from openmeter_wsgi.sandbox.store import subject_keys
from openmeter_wsgi.sandbox.usage import Query

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.sandbox.event_routes import Term
    from openmeter_wsgi.sandbox.request_validation import Document
    from openmeter_wsgi.sandbox.usage import Meter, Row

routes: Final = Blueprint("v3", __name__, url_prefix="/api/v3/openmeter")

#: Maximum number of values, and of bytes, in a filter.
MOST_VALUES, MOST_BYTES = 50, 1_024
_WINDOWS = {"PT1M": "MINUTE", "PT1H": "HOUR", "P1D": "DAY", "P1M": "MONTH"}
_QUERY = shape(
    "",
    **{"from": TIME, "to": TIME},
    granularity=TEXT | {"enum": list(_WINDOWS)},
    time_zone=TEXT,
    group_by_dimensions=list_of(TEXT),
    filters=shape(
        "",
        dimensions={
            "type": "object",
            "additionalProperties": shape("", eq=TEXT, **{"in": list_of(TEXT)}),
        },
    ),
)
#: The filter operators that the sandbox offers.
_OPERATORS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, wanted: text == wanted,
    "oeq": lambda text, wanted: text in wanted.split(","),
    "contains": lambda text, wanted: wanted.lower() in text.lower(),
}


@routes.get("/customers")
def _customers() -> Response:
    fields: dict[str, Callable[[Document], list[str]]] = {
        "key": lambda one: [one["key"]] if "key" in one else [],
        "usage_attribution_subject_key": subject_keys,
    }
    return _page(
        [_customer(c) for c in _chosen(current_context().customers.all(), fields)]
    )


@routes.get("/features")
def _features() -> Response:
    found = _chosen(current_context().features.all(), {"key": lambda one: [one["key"]]})
    ids = {meter["slug"]: meter["id"] for meter in current_context().meters.all()}
    return _page([_feature(feature, ids) for feature in found])


@routes.get("/meters")
def _meters() -> Response:
    found = _chosen(current_context().meters.all(), {"key": lambda one: [one["slug"]]})
    return _page(
        [_meter(one) for one in sorted(found, key=lambda one: str(one["slug"]))]
    )


@routes.post("/meters/<meter>/query")
def _query_meter(meter: str) -> Response:
    if not matches(ULID, meter):
        raise Problem(404)
    asked = read(_QUERY)
    found = current_context().meters.get(meter)
    rows = [_row(row) for row in rows_of(found, _query(found, asked))]
    return jsonify({"data": rows} | {k: asked[k] for k in ("from", "to") if k in asked})


@routes.get("/events")
def _events() -> Response:
    size = integer(request.args, "page[size]", 20, 1, 100)
    terms: list[Term] = [("1", [])]
    if cursor := request.args.get("page[after]"):
        terms.append(("(time, seq) < (?, ?)", list(read_cursor(cursor))))
    terms += [
        _term(name, operator, wanted)
        for name, operator, wanted in _filters("id", "source", "subject", "type")
    ]
    listed, last = list_events(terms, size)
    more = cursor_of(last) if last is not None and len(listed) == size else None
    page = {"next": more, "previous": None, "size": size}
    return jsonify({"data": [_event(one) for one in listed], "meta": {"page": page}})


def _filters(*names: str) -> list[tuple[str, str, str]]:
    """Return the filters of the request as tuples of name, operator and value."""
    found = []
    for parameter, value in request.args.items():
        parts = re.fullmatch(r"filter\[(\w+)\](?:\[(\w+)\])?", parameter)
        if parts is None or not value:
            continue
        name, operator = parts[1], parts[2] or "eq"
        if name not in names or operator not in _OPERATORS:
            raise Problem(501, f"the sandbox does not offer {parameter}")
        if len(value.encode()) > MOST_BYTES:
            reason = f"value too long (max {MOST_BYTES} bytes)"
            raise _refused(f'filter parameter "{parameter}": {reason}')
        if operator == "oeq" and value.count(",") >= MOST_VALUES:
            reason = f"too many comma-separated items (max {MOST_VALUES})"
            raise _refused(f"{parameter}: {reason}")
        found.append((name, operator, value))
    return found


def _refused(reason: str) -> Problem:
    return invalid(reason, Flaw("/filter", "format", reason))


def _chosen(
    items: list[Document], fields: dict[str, Callable[[Document], list[str]]]
) -> list[Document]:
    filters = _filters(*fields)
    return [
        item
        for item in items
        if all(
            any(_OPERATORS[operator](text, wanted) for text in fields[name](item))
            for name, operator, wanted in filters
        )
    ]


def _term(name: str, operator: str, wanted: str) -> Term:
    if operator == "contains":
        return f"instr(lower({name}), lower(?)) > 0", [wanted]
    return one_of(name, wanted.split(",") if operator == "oeq" else [wanted])


def _page(items: list[Document]) -> Response:
    number = integer(request.args, "page[number]", 1, 1, 10**9)
    size = integer(request.args, "page[size]", 20, 1, 10**9)
    page = {"size": size, "number": number, "total": len(items)}
    shown = items[(number - 1) * size : number * size]
    return jsonify({"data": shown, "meta": {"page": page}})


def _query(meter: Meter, asked: Document) -> Query:
    wanted = {
        name: condition.get("in", [condition["eq"]] if "eq" in condition else [])
        for name, condition in asked.get("filters", {}).get("dimensions", {}).items()
    }
    groups = list(dict.fromkeys(asked.get("group_by_dimensions", ())))
    _check_dimensions(meter, groups, "invalid_group_by", "group by dimension")
    _check_dimensions(meter, [*wanted], "invalid_dimension_filter", "dimension filter")
    subjects = wanted.pop("subject", None)
    if subjects is not None and "subject" not in groups:
        groups.append("subject")
    start, end = (moment(asked.get(name), name) for name in ("from", "to"))
    if start is not None and end is not None and start >= end:
        raise Problem(400, "validation error: from must be before to")
    return Query(
        start=start,
        end=end,
        window=_WINDOWS.get(asked.get("granularity", "")),
        zone=asked.get("time_zone", "UTC"),
        subjects=subjects,
        group_by=groups,
        filters=wanted,
    )


def _check_dimensions(meter: Meter, names: list[str], code: str, what: str) -> None:
    for name in names:
        if name != "subject" and name not in meter.get("groupBy", {}):
            error = {"code": code, "message": f"invalid {what}", "value": name,
                     "severity": "critical"}  # fmt: skip
            raise Problem(400, extensions={"validationErrors": [error]})


def _row(row: Row) -> Document:
    subject = {} if row["subject"] is None else {"subject": row["subject"]}
    return {
        "from": row["windowStart"],
        "to": row["windowEnd"],
        "value": f"{Decimal(json.dumps(row['value'])):f}",
        "dimensions": row["groupBy"] | subject,
    }


def _event(listed: Document) -> Document:
    shown: Document = {
        "event": listed["event"],
        "ingested_at": listed["ingestedAt"],
        "stored_at": listed["storedAt"],
    }
    if "customerId" in listed:
        shown["customer"] = {"id": listed["customerId"]}
    if flaws := listed.get("validationError"):
        shown["validation_errors"] = [
            {"code": "validation_error", "message": flaw} for flaw in flaws.split("\n")
        ]
    return shown


def _customer(customer: Document) -> Document:
    subjects = subject_keys(customer)
    attribution = {"subject_keys": subjects} if subjects else None
    return _common(customer) | _given(
        key=customer.get("key"), usage_attribution=attribution
    )


def _feature(feature: Document, meter_ids: dict[str, str]) -> Document:
    meter_id = meter_ids.get(feature.get("meterSlug", ""))
    meter = None if meter_id is None else {"id": meter_id}
    return _common(feature) | _given(key=feature["key"], meter=meter)


def _meter(meter: Meter) -> Document:
    return _common(meter) | _given(
        key=meter["slug"],
        description=meter.get("description"),
        aggregation=meter["aggregation"].lower(),
        event_type=meter["eventType"],
        value_property=meter.get("valueProperty"),
        dimensions=meter.get("groupBy"),
    )


def _common(document: Document) -> Document:
    return {
        "id": document["id"],
        "name": document["name"],
        "labels": document.get("metadata") or {},
        "created_at": document["createdAt"],
        "updated_at": document["updatedAt"],
    }


def _given(**fields: Any) -> Document:
    return {name: value for name, value in fields.items() if value is not None}
