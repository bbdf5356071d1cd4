"""Asking OpenMeter whether an event has arrived."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import requests

from openmeter_wsgi.version import VERSION

if TYPE_CHECKING:
    from openmeter_wsgi.policy import Policy

#: More ids than this that contain another one are not looked at.
_LIMIT = 100


class NoAnswer(Exception):
    """OpenMeter did not say whether an event has arrived."""


class Listing:
    """OpenMeter's list of events, under the key and address of a policy."""

    def __init__(self, policy: Policy) -> None:
        self._url = f"{policy.api_url}/api/v1/events"
        self._timeout = policy.request_timeout
        self._key = policy.key
        self._session = requests.Session()
        self._session.headers["User-Agent"] = f"openmeter_wsgi/{VERSION}"

    def has(self, event: dict[str, Any]) -> bool:
        """Say whether *event* is there, by its id and source.

        :raises NoAnswer: if the answer is none.
        """
        # The server looks for ids that contain this one.
        wanted = {"id": event["id"], "limit": str(_LIMIT)}
        try:
            answer = self._session.get(
                self._url,
                params=wanted,
                auth=self._authorize,
                timeout=self._timeout,
                allow_redirects=False,
            )
            if answer.status_code != requests.codes.ok:
                raise NoAnswer(f"{self._url} answered {answer.status_code}")
            return any(_is_same(found["event"], event) for found in answer.json())
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = f"{self._url}: {type(error).__name__}: {error}"
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


def _is_same(found: dict[str, Any], event: dict[str, Any]) -> bool:
    wanted = (event["id"], event.get("source"))
    return (found["id"], found["source"]) == wanted
