"""Listing events, with what OpenMeter finds wrong with them afterwards."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.metering import flaw_of
from openmeter_wsgi.sandbox.windows import rfc3339

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

Document = dict[str, Any]

_COLUMNS = "seq, id, source, type, subject, time, data, ingested_at"


@dataclass(slots=True)
class Filter:
    """Which events are listed: an SQL condition grown term by term."""

    terms: list[str] = field(default_factory=lambda: ["1"])
    values: list[Any] = field(default_factory=list)

    def where(self, term: str, *values: Any) -> None:
        """Require *term*, which has a question mark for each of *values*."""
        self.terms.append(term)
        self.values.extend(values)

    def where_in(self, column: str, values: Iterable[str]) -> None:
        """Require *column* to be one of *values*."""
        wanted = list(values)
        self.where(f"{column} IN ({', '.join('?' * len(wanted))})", *wanted)


def select(
    connection: sqlite3.Connection, chosen: Filter, limit: int, order: str = "time"
) -> list[tuple[Any, ...]]:
    """Return the newest events by *order*, as rows of the table."""
    return connection.execute(
        f"SELECT {_COLUMNS} FROM events WHERE {' AND '.join(chosen.terms)}"  # noqa: S608
        f" ORDER BY {order} DESC, seq DESC LIMIT ?",
        (*chosen.values, limit),
    ).fetchall()


class Judge:
    """Says of an event what OpenMeter's list of events says of it."""

    def __init__(self, meters: list[Document], customers: list[Document]) -> None:
        self._meters: dict[str, list[Document]] = {}
        for meter in meters:
            self._meters.setdefault(meter["eventType"], []).append(meter)
        self._customers: dict[str, str] = {}
        for customer in customers:
            for subject in subjects_of(customer):
                self._customers.setdefault(subject, customer["id"])

    def flaws(self, event_type: str, data: str | None) -> list[str]:
        """Return why meters do not count an event."""
        meters = self._meters.get(event_type)
        if not meters:
            return [f"no meter found for event type: {event_type}"]
        return [flaw for meter in meters if (flaw := flaw_of(meter, data))]

    def document(self, row: tuple[Any, ...]) -> Document:
        """Return a row of `select` as the API lists it."""
        _, id_, source, event_type, subject, moment, data, ingested_at = row
        event: Document = {
            "specversion": "1.0",
            "id": id_,
            "source": source,
            "type": event_type,
            "subject": subject,
            "time": rfc3339(moment),
        }
        if data is not None:
            event |= {"datacontenttype": "application/json", "data": json.loads(data)}
        arrived = rfc3339(ingested_at)
        listed = {"event": event, "ingestedAt": arrived, "storedAt": arrived}
        flaws = self.flaws(event_type, data)
        if customer := self._customers.get(subject):
            listed["customerId"] = customer
        else:
            flaws.append(f"no customer found for event subject: {subject}")
        return listed | {"validationError": "\n".join(flaws)} if flaws else listed


def subjects_of(customer: Document) -> list[str]:
    """Return the event subjects that *customer* pays for: its key, and those named."""
    key = customer.get("key")
    return [*([key] if key else ()), *subject_keys(customer)]


def subject_keys(customer: Document) -> list[str]:
    """Return the event subjects that *customer* names beside its key."""
    return list((customer.get("usageAttribution") or {}).get("subjectKeys", ()))
