"""OpenMeter over HTTP: the only module that opens a socket."""

from __future__ import annotations

# getaddrinfo() imports this codec on its first call; an import in a thread at the
# moment of a fork leaves the child with a lock that nobody will release.
import encodings.idna  # noqa: F401
import re
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import msgspec
import requests
import urllib3
from requests.auth import AuthBase

from openmeter_wsgi.errors import DeliveryError, Held, Rejected, Unavailable
from openmeter_wsgi.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openmeter_wsgi.api_key import ApiKey

_PATHS = {
    "v1": "/api/v1/events",
    "v3": "/api/v3/openmeter/events",
    "konnect": "/v3/openmeter/events",
}
#: Exactly these: OpenMeter's v1 refuses them with a charset.
_ONE = "application/cloudevents+json"
_BATCH = "application/cloudevents-batch+json"

_ACCEPTED = {200, 202, 204}
_REFUSED = {400, 413}
_TRY_LATER = {408, 429}
#: Of an answer no more is read than what a log line can use.
_MAX_ANSWER_BYTES = 65_536
_MAX_REASON = 500
#: A wait longer than this is taken for a mistake of the server.
MAX_RETRY_AFTER = 3_600.0


class _Bearer(AuthBase):
    """The key, or none. Given always, or requests would look into a .netrc."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class OpenMeterClient:
    """Sends batches to one OpenMeter server.

    Belongs to one thread of one process. Verification of certificates, proxies
    and CA bundles are as requests does them. Redirects are never followed: a 301
    makes a GET of a POST, whose 200 would pass for a delivery.
    """

    def __init__(self, *, url: str, flavor: str, key: ApiKey, timeout: float) -> None:
        self._url = url + _PATHS[flavor]
        self._key = key
        self._timeout = timeout
        self._session: requests.Session | None = None

    def ingest(self, events: Sequence[bytes]) -> None:
        """Send encoded events in one request.

        :raises DeliveryError: saying what to do with them.
        """
        status, headers, body = self._post(events)
        if status == 401 and self._renew_key():
            status, headers, body = self._post(events)
        if error := _error(status, headers, self._without_key(body)):
            raise error

    def close(self) -> None:
        """Close the connections. The next request opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _post(
        self, events: Sequence[bytes]
    ) -> tuple[int, requests.structures.CaseInsensitiveDict[str], bytes]:
        body = events[0] if len(events) == 1 else b"[" + b",".join(events) + b"]"
        if self._session is None:
            self._session = requests.Session()
            self._session.headers["User-Agent"] = f"openmeter_wsgi/{VERSION}"
        try:
            response = self._session.post(
                self._url,
                data=body,
                headers={"Content-Type": _ONE if len(events) == 1 else _BATCH},
                auth=_Bearer(self._current_key()),
                timeout=self._timeout,
                allow_redirects=False,
                stream=True,
            )
        except OSError as error:
            raise _no_answer(error, self._url) from error
        return response.status_code, response.headers, _read(response)

    def _without_key(self, body: bytes) -> bytes:
        """Return an answer that can be logged, should the server repeat our key."""
        key = self._key.known
        return body.replace(key.encode(), b"[api_key]") if key else body

    def _current_key(self) -> str | None:
        try:
            return self._key.current()
        except ValueError as error:
            raise Held(str(error)) from error

    def _renew_key(self) -> bool:
        try:
            return self._key.renew()
        except ValueError as error:
            raise Held(str(error), status=401) from error


def _read(response: requests.Response) -> bytes:
    """Read the start of an answer; the status alone already says the most."""
    try:
        body: bytes = response.raw.read(_MAX_ANSWER_BYTES, decode_content=True)
    except (urllib3.exceptions.HTTPError, OSError):
        body = b""
        response.close()
    else:
        if len(body) == _MAX_ANSWER_BYTES:
            response.close()  # the rest stays unread, so the connection ends here
    return body


def _no_answer(error: OSError, url: str) -> DeliveryError:
    """Say what an attempt without an answer means, and if it may have arrived."""
    reason = f"{type(error).__name__}: {error}"
    if not isinstance(error, requests.RequestException) or isinstance(
        error, requests.exceptions.SSLError | ValueError
    ):
        # What is no RequestException is a CA bundle that is not there.
        return Held(f"cannot talk to {url}: {reason}")
    cause = error.args[0] if error.args else None
    cause = getattr(cause, "reason", cause)
    if isinstance(cause, urllib3.exceptions.ProxyError):
        # A connection lost after the request was sent is called one, too.
        cause = cause.original_error
    never_connected = isinstance(
        cause,
        urllib3.exceptions.NewConnectionError | urllib3.exceptions.ConnectTimeoutError,
    )
    # A tunnel that a proxy refuses is an OSError and none of its subclasses.
    return Unavailable(
        reason, ambiguous=not never_connected and type(cause) is not OSError
    )


def _error(
    status: int, headers: requests.structures.CaseInsensitiveDict[str], body: bytes
) -> DeliveryError | None:
    """Return what an answer means, None for a delivery."""
    content_type = headers.get("Content-Type", "").lower()
    is_page = "html" in content_type or body.lstrip()[:1] == b"<"
    if status in _ACCEPTED:
        if not is_page:
            return None
        return Held("a web page instead of an OpenMeter server", status=status)
    reason = _reason(body)
    if status in _REFUSED:
        return Rejected(reason, status=status)
    if status in _TRY_LATER or 500 <= status <= 599:
        return Unavailable(
            reason,
            status=status,
            retry_after=_retry_after(headers.get("Retry-After")),
            # OpenMeter stops at the first event that it cannot process: those
            # before it are taken. A 503 comes from a proxy that asked nobody.
            ambiguous=status >= 500 and status != 503,
        )
    if 300 <= status <= 399:
        reason = f"a redirect to {headers.get('Location')!r}, which is not followed"
    return Held(reason, status=status)


def _reason(body: bytes) -> str:
    """Return what the server said, from a problem document (RFC 9457) if it is one."""
    text = body.decode(errors="replace")
    try:
        problem = msgspec.json.decode(body)
    except msgspec.DecodeError:
        problem = None
    if isinstance(problem, dict):
        text = str(problem.get("detail") or problem.get("title") or text)
    # One line, whatever is in it: control characters could forge another.
    return re.sub(r"[\x00-\x1f\x7f-\x9f\s]+", " ", text).strip()[:_MAX_REASON]


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After asks for (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return min(float(value), MAX_RETRY_AFTER)
    try:
        moment = parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    return min(max(moment - time.time(), 0.0), MAX_RETRY_AFTER)
