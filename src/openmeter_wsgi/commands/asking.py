"""Asking OpenMeter's v1 what it has: events that arrived, meters that count them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import requests

from openmeter_wsgi.version import VERSION

if TYPE_CHECKING:
    from openmeter_wsgi.policy import Policy

#: More ids than this that contain another one are not looked at.
_LIMIT = 100
#: OpenMeter gives no longer pages of meters.
_PAGE = 1_000

Document = dict[str, Any]


class NoAnswer(Exception):
    """OpenMeter did not say what it was asked."""


class Listing:
    """OpenMeter's lists, under the key and address of a policy."""

    def __init__(self, policy: Policy) -> None:
        self._url = f"{policy.api_url}/api/v1/"
        self._timeout = policy.request_timeout
        self._key = policy.key
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
            reason = f"{self._url}events: {type(error).__name__}: {error}"
            raise NoAnswer(reason) from error

    def meters(self) -> list[Document]:
        """Return all meters.

        :raises NoAnswer: if the answer is none.
        """
        meters: list[Document] = []
        page = 1
        while True:
            found = self._list("meters", page=page, pageSize=_PAGE)
            meters += found
            if len(found) < _PAGE:
                return meters
            page += 1

    def date(self) -> str | None:
        """Return when the server says it is, whatever else it answers.

        :raises NoAnswer: if it does not answer at all.
        """
        return self._get("events", {"limit": 1}).headers.get("Date")

    def _list(self, what: str, **parameters: str | int) -> list[Document]:
        answer = self._get(what, parameters)
        if answer.status_code != requests.codes.ok:
            raise NoAnswer(f"{self._url}{what} answered {answer.status_code}")
        try:
            listed = answer.json()
        except ValueError as error:
            reason = f"{self._url}{what}: {type(error).__name__}: {error}"
            raise NoAnswer(reason) from error
        if not isinstance(listed, list) or not all(map(_is_document, listed)):
            raise NoAnswer(f"{self._url}{what} answered with no list of documents")
        return listed

    def _get(self, what: str, parameters: dict[str, str | int]) -> requests.Response:
        try:
            return self._session.get(
                self._url + what,
                params=parameters,
                auth=self._authorize,
                timeout=self._timeout,
                allow_redirects=False,
            )
        except (OSError, ValueError) as error:
            reason = f"{self._url}{what}: {type(error).__name__}: {error}"
            raise NoAnswer(reason) from error

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
