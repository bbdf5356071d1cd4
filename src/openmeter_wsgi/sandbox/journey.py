"""What became of one event: when it came, how often, and which meters count it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.arrivals import STORED, Search, newest
from openmeter_wsgi.sandbox.cloudevent import parse_time
from openmeter_wsgi.sandbox.listing import subjects_of
from openmeter_wsgi.sandbox.metering import flaw_of
from openmeter_wsgi.sandbox.usage import Query, usage

if TYPE_CHECKING:
    import sqlite3

Document = dict[str, Any]

#: Arrivals of the same event that are told, the newest.
ARRIVALS = 100


def journey(
    connection: sqlite3.Connection,
    seq: int,
    *,
    meters: list[Document],
    customers: list[Document],
    horizon: int,
) -> Document | None:
    """Return the way of arrival number *seq*; None if nothing is known of it.

    :param horizon: the number of the last event that meters count by now.
    """
    one = Search()
    one.where("seq = :seq", seq=seq)
    found = newest(connection, one, meters, 1)
    if not found:
        return None
    (event,) = found
    is_stored = event["outcome"] == STORED
    return {
        "event": event,
        "customer": _customer(event["subject"], customers),
        "arrivals": _arrivals(connection, event, meters),
        "visible": seq <= horizon,
        "meters": [_verdict(connection, event, m) for m in meters] if is_stored else [],
    }


def _customer(subject: str | None, customers: list[Document]) -> str | None:
    for customer in customers:
        if subject in subjects_of(customer):
            return str(customer.get("key", customer["id"]))
    return None


def _arrivals(
    connection: sqlite3.Connection, event: Document, meters: list[Document]
) -> list[Document]:
    """Return when the same event came, the first time first.

    The same is what OpenMeter takes for the same: it joins source and id.
    """
    if event["id"] is None or event["source"] is None:
        return [event]
    same = Search()
    key = f"{event['source']}-{event['id']}"
    same.where("source || '-' || id = :key", key=key)
    return newest(connection, same, meters, ARRIVALS)[::-1]


def _verdict(
    connection: sqlite3.Connection, event: Document, meter: Document
) -> Document:
    """Return what *meter* makes of a stored event."""
    verdict = {
        "slug": meter["slug"],
        "name": meter["name"],
        "aggregation": meter["aggregation"],
        "valueProperty": meter.get("valueProperty"),
    }
    if why := _refusal(event, meter):
        return verdict | {"counted": False, "why": why}
    query = Query(only=event["seq"], group_by=tuple(meter.get("groupBy", ())))
    rows = usage(connection, meter, query)
    if not rows:
        return verdict | {"counted": False, "why": "it has no value for this meter"}
    return verdict | {
        "counted": True,
        "value": rows[0]["value"],
        "groupBy": rows[0]["groupBy"],
    }


def _refusal(event: Document, meter: Document) -> str | None:
    if event["type"] != meter["eventType"]:
        return f"counts events of type {meter['eventType']}"
    since = meter.get("eventFrom")
    if since and parse_time(event["time"]) < parse_time(since):
        return f"counts events from {since} on"
    return flaw_of(meter, event["data"])
