"""HTTP client of the lists in version 3 of OpenMeter's API.

Each document is converted to the form of version 1.
"""

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

#: Maximum number of documents per page in OpenMeter.
_PAGE_SIZE = 100
#: Maximum number of values in a filter, and of bytes of all values, URL-encoded.
_MAX_VALUES, _MAX_BYTES = 50, 1_024
#: ISO 8601 durations of the windows.
_GRANULARITY = {"MINUTE": "PT1M", "HOUR": "PT1H", "DAY": "P1D", "MONTH": "P1M"}


class ListingV3(Listing):
    """The lists of version 3."""

    def __init__(self, url: str, key: ApiKey, timeout: float) -> None:
        super().__init__(f"{v3_url(url)}/", key, timeout)
        #: The ids of meters by their keys.
        self._meter_ids: dict[str, str] = {}

    def entries(self, event_id: str, source: str | None) -> list[Document]:
        """Return the entries of an event: one for each time it was stored."""
        operator, value = "eq", event_id
        if _size(event_id) > _MAX_BYTES:
            # A filter cannot hold the id: search for its beginning.
            operator, value = "contains", _prefix(event_id)
        listed = self._events({f"filter[id][{operator}]": value}, source)
        return [
            _entry(document)
            for document in listed
            if is_same(document["event"], event_id, source)
        ]

    def arrived(self, events: Sequence[Document]) -> Iterator[bool]:
        """Yield for each of *events* True if it is stored; a request asks for many."""
        for chunk in _chunks(events):
            if len(chunk) == 1:
                yield from super().arrived(chunk)
                continue
            ids = ",".join(event["id"] for event in chunk)
            listed = self._events({"filter[id][oeq]": ids}, chunk[0].get("source"))
            stored = {(one["event"]["id"], one["event"]["source"]) for one in listed}
            for event in chunk:
                yield (event["id"], event.get("source")) in stored

    def meters(self) -> list[Document]:
        """Return all meters."""
        try:
            meters = [_meter(document) for document in self._all("meters")]
        except KeyError as error:
            raise self._unreadable("meters", error) from error
        self._meter_ids |= {meter["slug"]: meter["id"] for meter in meters}
        return meters

    def features(self) -> list[Document]:
        """Return all features."""
        keys = {meter["id"]: meter["slug"] for meter in self.meters()}
        return [_feature(document, keys) for document in self._all("features")]

    def usage(self, meter: str, query: UsageQuery) -> list[Document]:
        """Return the usage of a meter, as rows."""
        path = f"meters/{quote(self._meter_id(meter), safe='')}/query"
        answer = self._request("POST", path, json=_body(query))
        try:
            return [_row(row) for row in self._data(path, answer)]
        except (KeyError, TypeError, ValueError, InvalidOperation) as error:
            raise self._unreadable(path, error) from error

    def date(self) -> str | None:
        """Return the Date header of an answer, also of an error."""
        return self._get("events", {"page[size]": 1}).headers.get("Date")

    def _meter_id(self, meter: str) -> str:
        if is_ulid(meter):
            return meter
        if meter not in self._meter_ids:
            listed = self._data("meters", self._get("meters", {"filter[key]": meter}))
            ids = [str(one.get("id")) for one in listed if one.get("key") == meter]
            if not ids:
                raise NoAnswer(
                    f"{self._url}meters lists no meter with the key {meter!r}", 404
                )
            self._meter_ids[meter] = ids[0]
        return self._meter_ids[meter]

    def _events(self, parameters: Parameters, source: str | None) -> list[Document]:
        """Return the events of all pages that match the filters."""
        if source is not None and _size(source) <= _MAX_BYTES:
            parameters = {**parameters, "filter[source][eq]": source}
        events: list[Document] = []
        after: Parameters = {}
        for _ in range(MAX_PAGES):
            answer = self._get(
                "events", {**parameters, "page[size]": _PAGE_SIZE, **after}
            )
            events += self._data("events", answer)
            if not (cursor := _page_of(answer.json()).get("next")):
                break
            after = {"page[after]": cursor}
        try:
            _ = [(one["event"]["id"], one["event"]["source"]) for one in events]
        except (TypeError, KeyError) as error:
            raise self._unreadable("events", error) from error
        return events

    def _all(self, path: str) -> list[Document]:
        """Return the documents of all pages of a list."""
        documents: list[Document] = []
        for number in range(1, MAX_PAGES + 1):
            answer = self._get(path, {"page[size]": _PAGE_SIZE, "page[number]": number})
            page = self._data(path, answer)
            documents += page
            if not page or len(documents) >= _page_of(answer.json()).get("total", 0):
                break
        return documents

    def _data(self, path: str, answer: Any) -> list[Document]:
        document = self._decoded(path, answer)
        listed = document.get("data") if isinstance(document, dict) else None
        return self._documents(path, listed)


def _page_of(document: Document) -> Document:
    """Return the description of a page: its total and its next cursor."""
    page = (document.get("meta") or {}).get("page")
    return page if isinstance(page, dict) else {}


def _chunks(events: Sequence[Document]) -> Iterator[list[Document]]:
    """Yield *events* in order, in chunks that fit into one filter."""
    chunk: list[Document] = []
    size = 0
    for event in events:
        event_size = _size(event["id"]) + len("%2C")
        fits = size + event_size <= _MAX_BYTES and len(chunk) < _MAX_VALUES
        if chunk and not (fits and _share_a_filter(chunk[-1], event)):
            yield chunk
            chunk, size = [], 0
        chunk.append(event)
        size += event_size
    if chunk:
        yield chunk


def _share_a_filter(first: Document, second: Document) -> bool:
    """Return True if one filter, whose ids are separated by commas, can hold both."""
    if "," in first["id"] or "," in second["id"]:
        return False
    return bool(first.get("source") == second.get("source"))


def _size(value: str) -> int:
    """Return the size of *value* in a URL."""
    return len(quote(value, safe=""))


def _prefix(event_id: str) -> str:
    """Return a prefix of an id that a filter can hold."""
    while _size(event_id) > _MAX_BYTES:
        event_id = event_id[: len(event_id) * 3 // 4]
    return event_id


def _entry(listed: Document) -> Document:
    errors = listed.get("validation_errors") or []
    messages = [str(error.get("message")) for error in errors]
    return {"event": listed["event"], "validationError": "\n".join(messages)}


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
    filters: dict[str, list[str]] = {}
    for dimension, value in (*(("subject", s) for s in query.subjects), *query.filters):
        filters.setdefault(dimension, []).append(value)
    if filters:
        dimensions = {name: {"in": values} for name, values in filters.items()}
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
    """Parse a number, which is text in version 3."""
    number = Decimal(text)
    if not number.is_finite():
        raise ValueError(f"expected a number, got {text!r}")
    return int(number) if number == number.to_integral_value() else float(number)
