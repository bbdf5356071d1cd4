"""The routes of the page: its files, its content as JSON, and its actions.

The page polls ``/sandbox/api/overview``: usage over time, event types that no meter
counts, entitlements and faults. It shows a meter as curves, one for each *group*: a
value of the *dimension* by which the user divides the usage, by default the subject.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flask import Blueprint, Response, jsonify, request, send_from_directory

from openmeter_wsgi.sandbox.context import current_context
from openmeter_wsgi.sandbox.entitlements import NO_ACCESS, wanted
from openmeter_wsgi.sandbox.request_validation import (
    FLAG,
    JSON,
    SLUG,
    Problem,
    body_of,
    check,
    integer,
    parse,
    parse_time,
    read,
    refuse,
    shape,
    text,
    tidy,
)
from openmeter_wsgi.sandbox.request_validation import TEXT as PLAIN
from openmeter_wsgi.sandbox.usage import (
    AGGREGATES,
    NUMBER,
    TEXT,
    JsonPath,
    Query,
    Row,
    usage,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

    from openmeter_wsgi.sandbox.context import Context
    from openmeter_wsgi.sandbox.request_validation import Document, Schema


#: Maximum number of curves in a plot: each has its own colour and pattern.
CURVES = 8
#: Maximum number of groups in the table of a plot.
GROUPS = 50


@dataclass(frozen=True, slots=True)
class View:
    """The user's choices for the plot of a meter."""

    #: The dimension by which the usage is grouped.
    by: str = "subject"
    #: Show only the usage of this subject; None shows all subjects.
    subject: str | None = None


def meter_over_time(grouped: _GroupedUsage, times: range) -> Document:
    """Return a meter with its usage in total, and in each column of *times*."""
    meter, view = grouped.meter, grouped.view
    groups = grouped.totals()
    whole = grouped.whole()
    shown = [group["group"] for group in groups[:CURVES]]
    return {
        "slug": meter["slug"],
        "name": meter["name"],
        "aggregation": meter["aggregation"],
        "eventType": meter["eventType"],
        "valueProperty": meter.get("valueProperty"),
        "dimensions": list(meter.get("groupBy", {})),
        "by": view.by,
        "subject": view.subject,
        "value": whole[0]["value"] if whole else None,
        "events": sum(group["events"] for group in groups),
        "unusable": sum(group["unusable"] for group in groups),
        "groups": grouped.with_recent(groups[:GROUPS], times),
        "moreGroups": max(0, len(groups) - GROUPS),
        "curves": grouped.curves(shown, times),
    }


class _GroupedUsage:
    """The queries of one meter, grouped by the dimension of *view*."""

    def __init__(
        self, connection: sqlite3.Connection, meter: Document, view: View, horizon: int
    ) -> None:
        if view.by not in ("subject", *meter.get("groupBy", {})):
            view = View(subject=view.subject)
        self.meter = meter
        self.view = view
        self._connection = connection
        self._horizon = horizon
        self._aggregation = meter["aggregation"]
        self._group = "subject"
        path, since = meter.get("valueProperty"), meter.get("eventFrom")
        self._parameters: Document = {
            "type": meter["eventType"],
            "since": parse_time(since) if since else 0,
            "value": JsonPath(path).sqlite if path else None,
            "horizon": horizon,
            "subject": view.subject,
        }
        if view.by != "subject":
            self._group = TEXT.format("dimension")
            self._parameters["dimension"] = JsonPath(meter["groupBy"][view.by]).sqlite
        self._where = (
            "type = :type AND time >= :since AND seq <= :horizon"
            " AND (:subject IS NULL OR subject = :subject)"
        )

    def whole(self) -> list[Row]:
        """Return the usage of all groups together."""
        subject = self.view.subject
        only = None if subject is None else (subject,)
        query = Query(subjects=only, horizon=self._horizon)
        return usage(self._connection, self.meter, query)

    def totals(self) -> list[Document]:
        """Return the usage of each group, the greatest first."""
        counted = "count(*)"
        if self._aggregation not in ("COUNT", "UNIQUE_COUNT"):
            counted = f"count({NUMBER})"
        rows = self._connection.execute(
            f"SELECT {self._group}, {AGGREGATES[self._aggregation]}, count(*),"  # noqa: S608
            f" count(*) - {counted} FROM events WHERE {self._where}"
            " GROUP BY 1 ORDER BY 2 DESC, 1",
            self._parameters,
        )
        return [
            {"group": group, "value": _finite(total), "events": events, "unusable": bad}
            for group, total, events, bad in rows
        ]

    def with_recent(self, groups: list[Document], times: range) -> list[Document]:
        """Return *groups* with their usage within *times*."""
        rows = self._connection.execute(
            f"SELECT {self._group}, {AGGREGATES[self._aggregation]} FROM events"  # noqa: S608
            f" WHERE {self._where} AND time >= :start AND time < :end GROUP BY 1",
            self._parameters | {"start": times.start, "end": times.stop},
        )
        recent = {group: _finite(value) for group, value in rows}
        return [group | {"recent": recent.get(group["group"])} for group in groups]

    def curves(self, groups: list[str], times: range) -> list[Document]:
        """Return the usage of each group in each column of the plot."""
        names = {f"g{n}": group for n, group in enumerate(groups)}
        rows = self._connection.execute(
            f"SELECT {self._group}, (time - :start) / {times.step},"  # noqa: S608
            f" {AGGREGATES[self._aggregation]} FROM events"
            f" WHERE {self._where} AND time >= :start AND time < :end"
            f" AND {self._group} IN ({', '.join(f':{name}' for name in names)})"
            " GROUP BY 1, 2",
            self._parameters | names | {"start": times.start, "end": times.stop},
        )
        values: dict[str, list[float | None]] = {g: [None] * len(times) for g in groups}
        for group, column, value in rows:
            values[group][column] = _finite(value)
        return [{"group": group, "values": values[group]} for group in groups]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else tidy(value)


#: Maximum number of event types that are shown as not counted.
UNCOUNTED = 10
#: The type of the test events that ``openmeter-wsgi check`` sends.
PROBE = "openmeter_wsgi.check"


def uncounted(connection: sqlite3.Connection, meters: list[Document]) -> list[Document]:
    """Return the event types that no meter counts, each with its newest data."""
    counted = list({meter["eventType"] for meter in meters} | {PROBE})
    marks = ", ".join("?" * len(counted))
    rows = connection.execute(
        "SELECT type, count(*), count(DISTINCT subject), max(seq) FROM events"  # noqa: S608
        f" WHERE type NOT IN ({marks}) GROUP BY type ORDER BY 2 DESC LIMIT ?",
        (*counted, UNCOUNTED),
    ).fetchall()
    return [
        {
            "type": name,
            "events": events,
            "subjects": subjects,
            "data": _data(connection, newest),
        }
        for name, events, subjects, newest in rows
    ]


def _data(connection: sqlite3.Connection, seq: int) -> Document:
    row = connection.execute("SELECT data FROM events WHERE seq = ?", (seq,)).fetchone()
    return dict(json.loads(row[0])) if row and row[0] else {}


#: Number of columns of a plot, for each time span.
COLUMNS = 60


def dashboard(
    connection: sqlite3.Connection,
    context: Context,
    span: int,
    views: Mapping[str, View],
) -> Document:
    """Return the content of the page: the usage of the last *span* seconds, and in all.

    :param views: the user's choices for the meters, by slug.
    """
    meters = context.meters.within(connection)
    horizon = context.store.horizon(connection)
    now = int(context.store.clock())
    step = max(1, span // COLUMNS)
    # Columns begin at multiples of the step, so that events stay in their column.
    end = (now // step + 1) * step
    times = range(end - step * COLUMNS, end, step)
    stored, waiting, oldest = connection.execute(
        "SELECT count(*), sum(seq > ?), min(time) FROM events", (horizon,)
    ).fetchone()
    return {
        "times": list(times),
        "step": step,
        "stored": stored,
        "waiting": waiting or 0,
        "oldest": oldest,
        "meters": [
            meter_over_time(
                _GroupedUsage(
                    connection, meter, views.get(meter["slug"], View()), horizon
                ),
                times,
            )
            for meter in meters
        ],
        "uncounted": uncounted(connection, meters),
    }


#: Maximum number of entitlements in the table. Each refresh computes their balances.
ROWS = 100
#: Maximum number of customers, and of features, that are offered for a new grant.
NAMES = 200


def entitlement_table(context: Context) -> Document:
    """Return the rows of the table, and the customers and features for a new grant."""
    customers = {customer["id"]: customer for customer in context.customers.all()}
    entitlements = context.entitlements.all()
    checks = _check_counts(context)
    rows = [
        _row(context, customers[entitlement["customerId"]], entitlement, checks)
        for entitlement in entitlements[-ROWS:]
        if entitlement["customerId"] in customers
    ]
    meters = [meter["slug"] for meter in context.meters.all()]
    features = [feature["key"] for feature in context.features.all()]
    names = {c["key"] for c in customers.values() if "key" in c}
    return {
        "rows": rows,
        "moreRows": max(0, len(entitlements) - ROWS),
        "questions": sum(checks.values()),
        "customers": sorted(names)[:NAMES],
        "features": sorted({*meters, *features})[:NAMES],
    }


def _check_counts(context: Context) -> Counter[tuple[str, str | None]]:
    """Return the number of entitlement requests by customer and feature."""
    counts: Counter[tuple[str, str | None]] = Counter()
    for question, count in context.questions.counts().items():
        counts[question.customer, question.feature] += count
    return counts


def _row(
    context: Context,
    customer: Document,
    entitlement: Document,
    checks: Counter[tuple[str, str | None]],
) -> Document:
    feature = entitlement["featureKey"]
    names = {customer["id"], customer.get("key", customer["id"])}
    shown = context.entitlements.document(entitlement)
    return {
        "id": entitlement["id"],
        "customer": customer.get("key", customer["id"]),
        "name": customer["name"],
        "feature": feature,
        "kind": entitlement["type"],
        "soft": entitlement.get("isSoftLimit", False),
        "periodEnd": shown.get("currentUsagePeriod", {}).get("to"),
        "asked": sum(checks[name, part] for name in names for part in (feature, None)),
        **_value(context, customer, entitlement),
    }


def _value(context: Context, customer: Document, entitlement: Document) -> Document:
    try:
        value = context.access.value(customer, entitlement)
    except Problem as problem:
        return NO_ACCESS | {"error": problem.reason}
    return {name: part for name, part in value.items() if name != "grantBalances"}


PAGE = Path(__file__).with_name("page")
#: The minimum and the maximum time span of a plot, in seconds.
SPANS = (60, 7 * 24 * 3600)
#: The schema of the views by slug.
VIEWS: Schema = {
    "type": "object",
    "additionalProperties": shape("", by=PLAIN, subject=PLAIN | {"nullable": True})
    | {"additionalProperties": False},
}

routes: Final = Blueprint("dashboard", __name__)


@routes.get("/")
def _index() -> Response:
    return send_from_directory(PAGE, "index.html")


@routes.get("/sandbox/page/<path:name>")
def _file(name: str) -> Response:
    return send_from_directory(PAGE, name)


@routes.get("/sandbox/api/overview")
def _overview() -> Response:
    context = current_context()
    span = integer(request.args, "span", 900, *SPANS)
    with context.store.reading() as connection:
        shown = dashboard(connection, context, span, _views())
    return jsonify(
        {
            "dedupe": context.store.dedupe,
            "visibleAfter": context.store.visible_after,
            "faults": context.faults.document(),
            "counts": context.tally.counts(),
            "refusals": context.tally.refusals(),
            "access": entitlement_table(context),
        }
        | shown
    )


def _views() -> dict[str, View]:
    try:
        asked = json.loads(request.args.get("views", "{}"))
    except (ValueError, RecursionError):
        raise refuse("views", "value must be a JSON object") from None
    if flaw := check(VIEWS, asked):
        raise refuse("views", str(flaw))
    return {slug: View(**view) for slug, view in asked.items()}


_WHICH = shape("customer feature", customer=text(256), feature=text(256)) | {
    "additionalProperties": False,
}
_GRANT = _WHICH | {
    "properties": {
        "customer": text(256),
        "feature": SLUG,
        "amount": {"type": "number", "minimum": 0, "nullable": True},
        "soft": FLAG,
        "period": text(256),
    },
}
_VISIBILITY = shape(
    "visibleAfter", visibleAfter={"type": "number", "minimum": 0, "maximum": 3600}
)


def _read(schema: Schema) -> Document:
    return read(schema, "Sandbox")


@routes.put("/sandbox/api/faults")
def _set_faults() -> Response:
    faults = current_context().faults
    faults.update(parse(body_of(JSON)))
    return jsonify(faults.document())


@routes.put("/sandbox/api/visibility")
def _set_visibility() -> Response:
    store = current_context().store
    store.visible_after = _read(_VISIBILITY)["visibleAfter"]
    return jsonify({"visibleAfter": store.visible_after})


@routes.post("/sandbox/api/grant")
def _grant() -> tuple[Response, int]:
    asked = _read(_GRANT)
    which = asked.pop("customer"), asked.pop("feature")
    made = current_context().granting.grant(*which, wanted(**asked))
    return jsonify(current_context().entitlements.document(made)), 201


@routes.post("/sandbox/api/<any(revoke, reset):action>")
def _act(action: str) -> tuple[str, int]:
    getattr(current_context().granting, action)(**_read(_WHICH))
    return "", 204
