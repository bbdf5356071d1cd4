"""Lists from OpenMeter's API: events, meters and features; its errors as text."""

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
    for said in map(_text_of, reversed(chain)):
        if said is not None:
            return said
    return str(error) or type(error).__name__


def is_untrusted(error: BaseException) -> bool:
    """True if the server spoke TLS with a certificate that is not trusted."""
    return any(isinstance(each, ssl.SSLCertVerificationError) for each in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield *error* and its causes, the outermost first, each once."""
    waiting = [error]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        inner = (*each.args, getattr(each, "reason", None), each.__cause__)
        waiting += [one for one in inner if isinstance(one, BaseException)]


def _text_of(error: BaseException) -> str | None:
    """Return the text of one cause, None if it only wraps another one."""
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


#: More ids than this that contain another one are not looked at.
_LIMIT = 100
#: OpenMeter gives no longer pages.
_PAGE = 1_000
#: Whoever has more says the same page again and again.
MAX_PAGES = 100

Document = dict[str, Any]
Parameters = dict[str, str | int | list[str]]


class NoAnswer(Exception):
    """OpenMeter gave no answer, or one that cannot be used."""

    def __init__(self, said: str, status: int | None = None) -> None:
        super().__init__(said)
        #: The HTTP status, None where there was no answer or a wrong one.
        self.status = status


class UsageQuery(NamedTuple):
    """A query of a meter's usage. Times are RFC 3339."""

    since: str | None = None
    until: str | None = None
    #: MINUTE, HOUR, DAY or MONTH: a row for each of these.
    window: str | None = None
    #: The time zone of days and months.
    zone: str = "UTC"
    subjects: tuple[str, ...] = ()
    group_by: tuple[str, ...] = ()
    #: Dimensions and values.
    filters: tuple[tuple[str, str], ...] = ()


class Listing(ABC):
    """OpenMeter's lists, under the key and address of a policy.

    What they hold is told in the form of version 1, whatever the version.
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
        """Return the listed entries of an event: one for each time it was stored.

        :raises NoAnswer: if the answer is none.
        """

    def arrived(self, events: Sequence[Document]) -> Iterator[bool]:
        """Yield True for each of *events* that is stored, by its id and source.

        :raises NoAnswer: if the answer is none.
        """
        for event in events:
            yield bool(self.entries(event["id"], event.get("source")))

    @abstractmethod
    def meters(self) -> list[Document]:
        """Return all meters.

        :raises NoAnswer: if the answer is none.
        """

    @abstractmethod
    def features(self) -> list[Document]:
        """Return all features.

        :raises NoAnswer: if the answer is none.
        """

    @abstractmethod
    def usage(self, meter: str, query: UsageQuery) -> list[Document]:
        """Return the rows of a meter.

        :raises NoAnswer: if the answer is none.
        """

    @abstractmethod
    def date(self) -> str | None:
        """Return the Date header of the server's answer.

        :raises NoAnswer: if it does not answer at all.
        """

    def _decoded(self, what: str, answer: requests.Response) -> Any:
        if answer.status_code != requests.codes.ok:
            said = reason(answer.content)
            raise NoAnswer(
                f"{self._url}{what} answered {answer.status_code}"
                f"{': ' if said else ''}{said}",
                answer.status_code,
            )
        try:
            return answer.json()
        except ValueError as error:
            raise self._wrong(what, error) from error

    def _documents(self, what: str, listed: Sequence[Any] | None) -> list[Document]:
        if not isinstance(listed, list) or not all(map(_is_document, listed)):
            raise NoAnswer(f"{self._url}{what} answered with no list of documents")
        return listed

    def _wrong(self, what: str, error: Exception) -> NoAnswer:
        return NoAnswer(f"{self._url}{what}: {type(error).__name__}: {error}")

    def _get(self, what: str, parameters: Parameters) -> requests.Response:
        return self._request("GET", what, params=parameters)

    def _request(self, method: str, what: str, **content: Any) -> requests.Response:
        try:
            return self._session.request(
                method,
                self._url + what,
                auth=self._authorize,
                timeout=self._timeout,
                allow_redirects=False,
                **content,
            )
        except (OSError, ValueError) as error:
            raise NoAnswer(f"{self._url}{what}: {error_text(error)}") from error

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # Set always, or requests would look into a .netrc.
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
        """Return the listed entries of an event: one for each time it was stored."""
        # The server looks for ids that contain this one.
        listed = self._list("events", id=event_id, limit=_LIMIT)
        try:
            return [one for one in listed if is_same(one["event"], event_id, source)]
        except (TypeError, KeyError) as error:
            raise self._wrong("events", error) from error

    def meters(self) -> list[Document]:
        """Return all meters."""
        meters: list[Document] = []
        for page in range(1, MAX_PAGES + 1):
            found = self._list("meters", page=page, pageSize=_PAGE)
            meters += found
            if len(found) < _PAGE:
                break
        return meters

    def features(self) -> list[Document]:
        """Return all features."""
        features: list[Document] = []
        for _ in range(MAX_PAGES):
            found = self._list("features", limit=_PAGE, offset=len(features))
            features += found
            if len(found) < _PAGE:
                break
        return features

    def usage(self, meter: str, query: UsageQuery) -> list[Document]:
        """Return the rows of a meter."""
        path = f"meters/{quote(meter, safe='')}/query"
        answer = self._decoded(path, self._get(path, _parameters(query)))
        rows = answer.get("data") if isinstance(answer, dict) else None
        return self._documents(path, rows)

    def date(self) -> str | None:
        """Return the Date header of the server's answer."""
        return self._get("events", {"limit": 1}).headers.get("Date")

    def _list(self, what: str, **parameters: str | int) -> list[Document]:
        answer = self._decoded(what, self._get(what, {**parameters}))
        return self._documents(what, answer)


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
        wanted = parameters.setdefault(f"filterGroupBy[{dimension}]", [])
        assert isinstance(wanted, list)  # noqa: S101 - for the checker of types
        wanted.append(value)
    return parameters


def _is_document(value: object) -> bool:
    return isinstance(value, dict)


def is_same(found: Document, event_id: str, source: str | None) -> bool:
    """Return True if *found* is the event with this id and source."""
    return (found["id"], found["source"]) == (event_id, source)
