"""HTTP client of OpenMeter's lists: events, meters, features and usage.

`Listing` is the interface; `ListingV1` and `ListingV3` implement it for the versions of
the API, with documents in the form of version 1. `error_text` explains an error.
"""

from __future__ import annotations

import socket
import ssl
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import quote

import requests
import urllib3

from openmeter_wsgi.connection import reason
from openmeter_wsgi.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from openmeter_wsgi.options import ApiKey


def error_text(error: BaseException) -> str:
    """Return the text of the innermost cause of *error*, or else its own."""
    chain = list(_chain(error))
    for text in map(_text_of_cause, reversed(chain)):
        if text is not None:
            return text
    return str(error) or type(error).__name__


def is_untrusted(error: BaseException) -> bool:
    """Return True if the certificate of the server is not trusted."""
    return any(
        isinstance(cause, ssl.SSLCertVerificationError) for cause in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield *error* and its causes, the outermost first, without duplicates."""
    waiting = [error]
    seen: set[int] = set()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        inner = (*cause.args, getattr(cause, "reason", None), cause.__cause__)
        waiting += [value for value in inner if isinstance(value, BaseException)]


def _text_of_cause(error: BaseException) -> str | None:
    """Return the text of a cause, None if it only wraps another cause."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"no TLS connection ({error.reason or error})"
    if isinstance(error, socket.gaierror):
        return "no such host is known"
    if isinstance(
        error, TimeoutError | urllib3.exceptions.TimeoutError | requests.Timeout
    ):
        return "no answer in time"
    if isinstance(error, ConnectionError) and not error.strerror:
        return "the connection was closed without an answer"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return None


#: Maximum number of events that one search for an id returns.
_MAX_FOUND = 100
#: Maximum number of documents per page in OpenMeter.
_PAGE_SIZE = 1_000
#: Maximum number of pages read, for a server that repeats a page for ever.
MAX_PAGES = 100

Document = dict[str, Any]
Parameters = dict[str, str | int | list[str]]


class NoAnswer(Exception):
    """OpenMeter did not answer, or its answer is an error or cannot be parsed."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        #: The HTTP status of an error, otherwise None.
        self.status = status


class UsageQuery(NamedTuple):
    """A query of a meter's usage. Times are RFC 3339."""

    since: str | None = None
    until: str | None = None
    #: Period of a row: MINUTE, HOUR, DAY or MONTH; None for a total.
    window: str | None = None
    #: Time zone of days and months.
    zone: str = "UTC"
    subjects: tuple[str, ...] = ()
    group_by: tuple[str, ...] = ()
    #: Pairs of a dimension and its value.
    filters: tuple[tuple[str, str], ...] = ()


class Listing(ABC):
    """A client of OpenMeter's lists; documents have the form of version 1.

    Every method raises `NoAnswer` if a request fails.
    """

    def __init__(self, url: str, key: ApiKey, timeout: float) -> None:
        self._url = url
        self._timeout = timeout
        self._key = key
        self._session = requests.Session()
        self._session.headers["User-Agent"] = f"openmeter_wsgi/{VERSION}"
        self._session.headers["Accept"] = "application/json"

    @abstractmethod
    def entries(self, event_id: str, source: str | None) -> list[Document]:
        """Return the entries of an event: one for each time it was stored."""

    def arrived(self, events: Sequence[Document]) -> Iterator[bool]:
        """Yield for each of *events* True if it is stored, by its id and source."""
        for event in events:
            yield bool(self.entries(event["id"], event.get("source")))

    @abstractmethod
    def meters(self) -> list[Document]:
        """Return all meters."""

    @abstractmethod
    def features(self) -> list[Document]:
        """Return all features."""

    @abstractmethod
    def usage(self, meter: str, query: UsageQuery) -> list[Document]:
        """Return the usage of a meter, as rows."""

    @abstractmethod
    def date(self) -> str | None:
        """Return the Date header of an answer, also of an error."""

    def _decoded(self, path: str, answer: requests.Response) -> Any:
        """Return the JSON of a successful answer."""
        if answer.status_code != requests.codes.ok:
            text = reason(answer.content)
            raise NoAnswer(
                f"{self._url}{path} answered {answer.status_code}"
                f"{': ' if text else ''}{text}",
                answer.status_code,
            )
        try:
            return answer.json()
        except ValueError as error:
            raise self._unreadable(path, error) from error

    def _documents(self, path: str, listed: Sequence[Any] | None) -> list[Document]:
        """Return *listed* if it is a list of JSON objects."""
        if not isinstance(listed, list) or not all(map(_is_document, listed)):
            raise NoAnswer(f"{self._url}{path} answered with no list of documents")
        return listed

    def _unreadable(self, path: str, error: Exception) -> NoAnswer:
        return NoAnswer(f"{self._url}{path}: {type(error).__name__}: {error}")

    def _get(self, path: str, parameters: Parameters) -> requests.Response:
        return self._request("GET", path, params=parameters)

    def _request(self, method: str, path: str, **content: Any) -> requests.Response:
        try:
            return self._session.request(
                method,
                self._url + path,
                auth=self._authorize,
                timeout=self._timeout,
                allow_redirects=False,
                **content,
            )
        except (OSError, ValueError) as error:
            raise NoAnswer(f"{self._url}{path}: {error_text(error)}") from error

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # An auth function even without a key, or requests would read a .netrc.
        if (key := self._key.current()) is not None:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()


class ListingV1(Listing):
    """The lists of version 1."""

    def __init__(self, url: str, key: ApiKey, timeout: float) -> None:
        super().__init__(f"{url}/api/v1/", key, timeout)

    def entries(self, event_id: str, source: str | None) -> list[Document]:
        """Return the entries of an event: one for each time it was stored."""
        # The server also finds ids that only contain this one.
        listed = self._list("events", id=event_id, limit=_MAX_FOUND)
        try:
            return [
                entry for entry in listed if is_same(entry["event"], event_id, source)
            ]
        except (TypeError, KeyError) as error:
            raise self._unreadable("events", error) from error

    def meters(self) -> list[Document]:
        """Return all meters."""
        meters: list[Document] = []
        for page in range(1, MAX_PAGES + 1):
            listed = self._list("meters", page=page, pageSize=_PAGE_SIZE)
            meters += listed
            if len(listed) < _PAGE_SIZE:
                break
        return meters

    def features(self) -> list[Document]:
        """Return all features."""
        features: list[Document] = []
        for _ in range(MAX_PAGES):
            listed = self._list("features", limit=_PAGE_SIZE, offset=len(features))
            features += listed
            if len(listed) < _PAGE_SIZE:
                break
        return features

    def usage(self, meter: str, query: UsageQuery) -> list[Document]:
        """Return the usage of a meter, as rows."""
        path = f"meters/{quote(meter, safe='')}/query"
        answer = self._decoded(path, self._get(path, _parameters(query)))
        rows = answer.get("data") if isinstance(answer, dict) else None
        return self._documents(path, rows)

    def date(self) -> str | None:
        """Return the Date header of an answer, also of an error."""
        return self._get("events", {"limit": 1}).headers.get("Date")

    def _list(self, path: str, **parameters: str | int) -> list[Document]:
        answer = self._decoded(path, self._get(path, {**parameters}))
        return self._documents(path, answer)


def _parameters(query: UsageQuery) -> Parameters:
    parameters: Parameters = {}
    if query.since:
        parameters["from"] = query.since
    if query.until:
        parameters["to"] = query.until
    if query.window:
        parameters |= {"windowSize": query.window, "windowTimeZone": query.zone}
    if query.subjects:
        parameters["subject"] = list(query.subjects)
    if query.group_by:
        parameters["groupBy"] = list(query.group_by)
    for dimension, value in query.filters:
        values = parameters.setdefault(f"filterGroupBy[{dimension}]", [])
        assert isinstance(values, list)  # noqa: S101 - for the checker of types
        values.append(value)
    return parameters


def _is_document(value: object) -> bool:
    return isinstance(value, dict)


def is_same(event: Document, event_id: str, source: str | None) -> bool:
    """Return True if *event* has this id and source."""
    return (event["id"], event["source"]) == (event_id, source)
