"""The lists of version 3 of OpenMeter's API, told in the form of version 1."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from openmeter_wsgi.cli.api_client import MAX_PAGES, Listing, NoAnswer, is_same
from openmeter_wsgi.options import is_ulid, v3_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from openmeter_wsgi.cli.api_client import Document, Parameters, UsageQuery
    from openmeter_wsgi.options import ApiKey

#: OpenMeter gives no longer pages of events.
_PAGE = 100
#: A filter takes so many values at most, and so many bytes of them.
_MAX_VALUES, _MAX_BYTES = 50, 1_024
_GRANULARITY = {"MINUTE": "PT1M", "HOUR": "PT1H", "DAY": "P1D", "MONTH": "P1M"}


class ListingV3(Listing):
    """The lists of version 3, which finds things by filters on their keys."""

    def __init__(self, url: str, key: ApiKey, timeout: float) -> None:
        super().__init__(f"{v3_url(url)}/", key, timeout)
        #: The ids of meters by their keys.
        self._meter_ids: dict[str, str] = {}

    def entries(self, event_id: str, source: str | None) -> list[Document]:
        """Return the listed entries of an event: one for each time it was stored."""
        operator, value = "eq", event_id
        if _size(event_id) > _MAX_BYTES:
            # Of a longer id the server looks for the beginning.
            operator, value = "contains", _beginning(event_id)
        found = self._events({f"filter[id][{operator}]": value}, source)
        return [_entry(one) for one in found if is_same(one["event"], event_id, source)]

    def arrived(self, events: Sequence[Document]) -> Iterator[bool]:
        """Yield True for each of *events* that is stored; one request asks for many."""
        for chunk in _chunks(events):
            if len(chunk) == 1:
                yield from super().arrived(chunk)
                continue
            ids = ",".join(event["id"] for event in chunk)
            found = self._events({"filter[id][oeq]": ids}, chunk[0].get("source"))
            there = {(one["event"]["id"], one["event"]["source"]) for one in found}
            for event in chunk:
                yield (event["id"], event.get("source")) in there

    def meters(self) -> list[Document]:
        """Return all meters."""
        try:
            meters = [_meter(one) for one in self._all("meters")]
        except KeyError as error:
            raise self._wrong("meters", error) from error
        self._meter_ids |= {one["slug"]: one["id"] for one in meters}
        return meters

    def features(self) -> list[Document]:
        """Return all features."""
        keys = {one["id"]: one["slug"] for one in self.meters()}
        return [_feature(one, keys) for one in self._all("features")]

    def usage(self, meter: str, query: UsageQuery) -> list[Document]:
        """Return the rows of a meter."""
        path = f"meters/{quote(self._meter_id(meter), safe='')}/query"
        answer = self._request("POST", path, json=_body(query))
        try:
            return [_row(row) for row in self._data(path, answer)]
        except (KeyError, TypeError, ValueError, InvalidOperation) as error:
            raise self._wrong(path, error) from error

    def date(self) -> str | None:
        """Return the Date header of the server's answer."""
        return self._get("events", {"page[size]": 1}).headers.get("Date")

    def _meter_id(self, meter: str) -> str:
        if is_ulid(meter):
            return meter
        if meter not in self._meter_ids:
            found = self._data("meters", self._get("meters", {"filter[key]": meter}))
            ids = [str(one.get("id")) for one in found if one.get("key") == meter]
            if not ids:
                said = f"{self._url}meters lists no meter with the key {meter!r}"
                raise NoAnswer(said, 404)
            self._meter_ids[meter] = ids[0]
        return self._meter_ids[meter]

    def _events(self, parameters: Parameters, source: str | None) -> list[Document]:
        """Return all events that the filters let through, from every page."""
        if source is not None and _size(source) <= _MAX_BYTES:
            parameters = {**parameters, "filter[source][eq]": source}
        events: list[Document] = []
        after: Parameters = {}
        for _ in range(MAX_PAGES):
            asked = {**parameters, "page[size]": _PAGE, **after}
            answer = self._get("events", asked)
            events += self._data("events", answer)
            if not (cursor := _page_of(answer.json()).get("next")):
                break
            after = {"page[after]": cursor}
        try:
            _ = [(one["event"]["id"], one["event"]["source"]) for one in events]
        except (TypeError, KeyError) as error:
            raise self._wrong("events", error) from error
        return events

    def _all(self, what: str) -> list[Document]:
        """Return the entries of all pages of a list."""
        found: list[Document] = []
        for number in range(1, MAX_PAGES + 1):
            answer = self._get(what, {"page[size]": _PAGE, "page[number]": number})
            listed = self._data(what, answer)
            found += listed
            if not listed or len(found) >= _page_of(answer.json()).get("total", 0):
                break
        return found

    def _data(self, what: str, answer: Any) -> list[Document]:
        document = self._decoded(what, answer)
        listed = document.get("data") if isinstance(document, dict) else None
        return self._documents(what, listed)


def _page_of(document: Document) -> Document:
    page = (document.get("meta") or {}).get("page")
    return page if isinstance(page, dict) else {}


def _chunks(events: Sequence[Document]) -> Iterator[list[Document]]:
    """Yield *events* in order, as many together as one filter takes."""
    chunk: list[Document] = []
    size = 0
    for event in events:
        one = _size(event["id"]) + len("%2C")
        fits = size + one <= _MAX_BYTES and len(chunk) < _MAX_VALUES
        if chunk and not (fits and _go_together(chunk[-1], event)):
            yield chunk
            chunk, size = [], 0
        chunk.append(event)
        size += one
    if chunk:
        yield chunk


def _go_together(one: Document, other: Document) -> bool:
    """Return True if a list of ids can hold both; a comma separates them there."""
    if "," in one["id"] or "," in other["id"]:
        return False
    return bool(one.get("source") == other.get("source"))


def _size(value: str) -> int:
    return len(quote(value, safe=""))


def _beginning(event_id: str) -> str:
    """Return as much of an id as a filter takes."""
    while _size(event_id) > _MAX_BYTES:
        event_id = event_id[: len(event_id) * 3 // 4]
    return event_id


def _entry(listed: Document) -> Document:
    errors = listed.get("validation_errors") or []
    said = [str(one.get("message")) for one in errors]
    return {"event": listed["event"], "validationError": "\n".join(said)}


def _meter(listed: Document) -> Document:
    return {
        "id": listed["id"],
        "slug": listed["key"],
        "eventType": listed.get("event_type"),
        "aggregation": str(listed.get("aggregation")).upper(),
        "valueProperty": listed.get("value_property"),
        "groupBy": listed.get("dimensions") or {},
    }


def _feature(listed: Document, meter_keys: dict[str, str]) -> Document:
    meter = listed.get("meter") or {}
    return {
        "id": listed.get("id"),
        "key": listed.get("key"),
        "meterSlug": meter_keys.get(str(meter.get("id"))),
    }


def _body(query: UsageQuery) -> Document:
    body: Document = {}
    if query.since:
        body["from"] = query.since
    if query.until:
        body["to"] = query.until
    if query.window:
        body |= {"granularity": _GRANULARITY[query.window], "time_zone": query.zone}
    if query.group_by:
        body["group_by_dimensions"] = list(query.group_by)
    wanted: dict[str, list[str]] = {}
    for dimension, value in (*(("subject", s) for s in query.subjects), *query.filters):
        wanted.setdefault(dimension, []).append(value)
    if wanted:
        dimensions = {name: {"in": values} for name, values in wanted.items()}
        body["filters"] = {"dimensions": dimensions}
    return body


def _row(listed: Document) -> Document:
    dimensions = {**(listed.get("dimensions") or {})}
    return {
        "windowStart": listed["from"],
        "windowEnd": listed["to"],
        "subject": dimensions.pop("subject", None),
        "groupBy": dimensions,
        "value": _number(listed["value"]),
    }


def _number(text: str) -> int | float:
    """Return the number that version 1 would tell in place of *text*."""
    number = Decimal(text)
    if not number.is_finite():
        raise ValueError(f"expected a number, got {text!r}")
    return int(number) if number == number.to_integral_value() else float(number)
