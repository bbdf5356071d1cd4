"""One HTTP connection to OpenMeter: the only module that opens a socket."""

from __future__ import annotations

# getaddrinfo() imports this codec on its first call; an import in a thread at the
# moment of a fork leaves the child with a lock that nobody will release.
import encodings.idna  # noqa: F401
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import requests
import urllib3
from requests.auth import AuthBase

from openmeter_wsgi.errors import DeliveryError, Held, Unavailable
from openmeter_wsgi.reply import Reply
from openmeter_wsgi.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openmeter_wsgi.api_key import ApiKey

#: Of an answer no more is read than what a log line can use.
MAX_ANSWER_BYTES = 65_536


class _Bearer(AuthBase):
    """The key, or none. Given always, or requests would look into a .netrc."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Connection:
    """Requests to one server under one key.

    Belongs to one thread of one process. Verification of certificates, proxies
    and CA bundles are as requests does them. Redirects are never followed: a 301
    makes a GET of a POST, whose 200 would pass for a delivery.
    """

    def __init__(
        self, *, key: ApiKey, timeout: float, max_answer_bytes: int = MAX_ANSWER_BYTES
    ) -> None:
        self._key = key
        self._timeout = timeout
        self._max_answer_bytes = max_answer_bytes
        self._session: requests.Session | None = None
        #: What was last asked for, and the request that it made.
        self._asked: tuple[object, ...] = ()
        self._request = requests.PreparedRequest()

    def request(
        self,
        method: str,
        url: str,
        *,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request; after a 401 once more, if the key is another one now.

        :raises Unavailable: if there is no answer.
        :raises Held: if the configuration makes every attempt vain.
        """
        reply = self._attempt(method, url, data, headers)
        if reply.status == 401 and self._renew_key():
            reply = self._attempt(method, url, data, headers)
        return reply._replace(body=self._without_key(reply.body))

    def close(self) -> None:
        """Close the connections. The next request opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _attempt(
        self,
        method: str,
        url: str,
        data: bytes | None,
        headers: Mapping[str, str] | None,
    ) -> Reply:
        session = self._session = self._session or _new_session(url)
        try:
            request = self._prepared(session, method, url, headers)
            if data is not None:
                request.body = data
                request.headers["Content-Length"] = str(len(data))
            # Past the session, which would only look for redirects, hooks and cookies.
            response = session.get_adapter(url).send(
                request,
                stream=True,
                timeout=self._timeout,
                verify=True if session.verify is None else session.verify,
                proxies=session.proxies,
            )
        except OSError as error:
            self.close()  # what is wrong may be in the environment, and set right there
            raise _no_answer(error, url) from error
        request.body = None
        if response.cookies:
            session.cookies.update(response.cookies)
        body = _read(response, self._max_answer_bytes)
        return Reply(response.status_code, response.headers, body)

    def _prepared(
        self,
        session: requests.Session,
        method: str,
        url: str,
        headers: Mapping[str, str] | None,
    ) -> requests.PreparedRequest:
        """Return a request without its body; the last one, if it was the same.

        Preparing one takes as long as sending it.
        """
        key = self._current_key()
        asked = (method, url, headers, key)
        if asked != self._asked or session.cookies:
            request = requests.Request(method, url, headers=headers, auth=_Bearer(key))
            self._request = session.prepare_request(request)
            self._asked = asked
        return self._request

    def _without_key(self, body: bytes) -> bytes:
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


def _new_session(url: str) -> requests.Session:
    """Return a session that has looked at the environment.

    Left to itself it would read all of it again for every request, which takes as long
    as the rest of one.
    """
    session = requests.Session()
    session.headers["User-Agent"] = f"openmeter_wsgi/{VERSION}"
    found = session.merge_environment_settings(url, {}, True, None, None)
    session.proxies.update(found["proxies"])
    session.verify = found["verify"]
    session.trust_env = False
    return session


def _read(response: requests.Response, at_most: int) -> bytes:
    """Read the start of an answer; the status alone already says the most."""
    try:
        body: bytes = response.raw.read(at_most, decode_content=True)
    except (urllib3.exceptions.HTTPError, OSError):
        body = b""
        response.close()
    else:
        if len(body) == at_most:
            response.close()  # the rest stays unread, so the connection ends here
    return body


def _no_answer(error: OSError, url: str) -> DeliveryError:
    """Say what an attempt without an answer means, and if it may have arrived."""
    reason = _said(error)
    if not isinstance(error, requests.RequestException) or isinstance(
        error, requests.exceptions.SSLError | ValueError
    ):
        # What is no RequestException is a CA bundle that is not there.
        return Held(f"cannot talk to {url}: {reason}")
    cause = error.args[0] if error.args else None
    cause = getattr(cause, "reason", cause)
    where = urlsplit(url).netloc.rpartition("@")[2]
    if isinstance(cause, urllib3.exceptions.ProxyError):
        # A connection lost after the request was sent is called one, too.
        cause, where = cause.original_error, f"{where} through a proxy"
    never_connected = isinstance(
        cause,
        urllib3.exceptions.NewConnectionError | urllib3.exceptions.ConnectTimeoutError,
    )
    # A tunnel that a proxy refuses is an OSError and none of its subclasses.
    return Unavailable(
        f"{where}: {reason}",
        ambiguous=not never_connected and type(cause) is not OSError,
    )


def _said(error: BaseException) -> str:
    """Return what the operating system said, without what each layer put around it."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    said = getattr(error, "strerror", None) or str(error)
    return f"{said or type(error).__name__}"
