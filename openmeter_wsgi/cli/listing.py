"""Lists from OpenMeter's API: events, meters and features; its errors as text."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import requests
import urllib3

from openmeter_wsgi.connection import reason
from openmeter_wsgi.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from openmeter_wsgi.options import ApiKey
    from openmeter_wsgi.policy import Policy


def error_text(error: BaseException) -> str:
    """Return what is at the bottom of *error*, else what it says itself."""
    chain = list(_chain(error))
    for said in map(_text_of, reversed(chain)):
        if said is not None:
            return said
    return str(error) or type(error).__name__


def is_untrusted(error: BaseException) -> bool:
    """Say whether the server spoke TLS, with a certificate that is not trusted."""
    return any(isinstance(each, ssl.SSLCertVerificationError) for each in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield *error* and what it came from, the outermost first, each once."""
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
    """Return what one link says, None where it only wraps another one."""
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
_MAX_PAGES = 100

Document = dict[str, Any]
Parameters = dict[str, str | int | list[str]]


class NoAnswer(Exception):
    """OpenMeter did not say what it was asked."""

    def __init__(self, said: str, status: int | None = None) -> None:
        super().__init__(said)
        #: The HTTP status, None where there was no answer or a wrong one.
        self.status = status


class Listing:
    """OpenMeter's lists, under the key and address of a policy.

    *url* and *key* are where and as whom entitlements are asked for, if that is not
    where events are sent to.
    """

    def __init__(
        self, policy: Policy, url: str | None = None, key: ApiKey | None = None
    ) -> None:
        self._url = f"{url or policy.api_url}/api/v1/"
        self._timeout = policy.request_timeout
        self._key = key or policy.key
        self._session = requests.Session()
        self._session.headers["User-Agent"] = f"openmeter_wsgi/{VERSION}"

    def has(self, event: Document) -> bool:
        """Say whether *event* is there, by its id and source.

        :raises NoAnswer: if the answer is none.
        """
        return bool(self.entries(event["id"], event.get("source")))

    def entries(self, event_id: str, source: str | None) -> list[Document]:
        """Return what is listed of an event: one entry for each time it was stored.

        :raises NoAnswer: if the answer is none.
        """
        # The server looks for ids that contain this one.
        listed = self._list("events", id=event_id, limit=_LIMIT)
        try:
            return [one for one in listed if _is_same(one["event"], event_id, source)]
        except (TypeError, KeyError) as error:
            said = f"{self._url}events: {type(error).__name__}: {error}"
            raise NoAnswer(said) from error

    def meters(self) -> list[Document]:
        """Return all meters.

        :raises NoAnswer: if the answer is none.
        """
        meters: list[Document] = []
        for page in range(1, _MAX_PAGES + 1):
            found = self._list("meters", page=page, pageSize=_PAGE)
            meters += found
            if len(found) < _PAGE:
                break
        return meters

    def features(self) -> list[Document]:
        """Return all features.

        :raises NoAnswer: if the answer is none.
        """
        features: list[Document] = []
        for _ in range(_MAX_PAGES):
            found = self._list("features", limit=_PAGE, offset=len(features))
            features += found
            if len(found) < _PAGE:
                break
        return features

    def usage(self, meter: str, query: Mapping[str, str | list[str]]) -> list[Document]:
        """Return the rows of a meter.

        :raises NoAnswer: if the answer is none.
        """
        path = f"meters/{quote(meter, safe='')}/query"
        answer = self._decoded(path, self._get(path, dict(query)))
        rows = answer.get("data") if isinstance(answer, dict) else None
        return self._documents(path, rows)

    def date(self) -> str | None:
        """Return when the server says it is, whatever else it answers.

        :raises NoAnswer: if it does not answer at all.
        """
        return self._get("events", {"limit": 1}).headers.get("Date")

    def _list(self, what: str, **parameters: str | int) -> list[Document]:
        answer = self._decoded(what, self._get(what, {**parameters}))
        return self._documents(what, answer)

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
            said = f"{self._url}{what}: {type(error).__name__}: {error}"
            raise NoAnswer(said) from error

    def _documents(self, what: str, listed: Sequence[Any] | None) -> list[Document]:
        if not isinstance(listed, list) or not all(map(_is_document, listed)):
            raise NoAnswer(f"{self._url}{what} answered with no list of documents")
        return listed

    def _get(self, what: str, parameters: Parameters) -> requests.Response:
        try:
            return self._session.get(
                self._url + what,
                params=parameters,
                auth=self._authorize,
                timeout=self._timeout,
                allow_redirects=False,
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


def _is_document(value: object) -> bool:
    return isinstance(value, dict)


def _is_same(found: Document, event_id: str, source: str | None) -> bool:
    return (found["id"], found["source"]) == (event_id, source)
