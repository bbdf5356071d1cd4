"""HTTP connections to OpenMeter, and the errors that its answers mean.

`Connection.request` sends one request within a `Deadline` and returns a `Reply`. The
callers raise `delivery_error` for an unexpected reply. The rest of the module makes
requests and urllib3 keep the deadline in each step of a connection.
"""

from __future__ import annotations

# getaddrinfo() imports this codec on its first call. If a fork happens during that
# import, the child inherits a lock that is never released.
import encodings.idna  # noqa: F401
import re
import socket
import time
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

import msgspec
import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from requests.structures import CaseInsensitiveDict
from urllib3.util.connection import create_connection

from openmeter_wsgi.deadline import Deadline
from openmeter_wsgi.errors import MAX_REASON, DeliveryError, Misconfigured, Unavailable
from openmeter_wsgi.log import clean
from openmeter_wsgi.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openmeter_wsgi.options import ApiKey


_TRY_LATER = {408, 429}
_IS_HTML = re.compile(r"\s*<(!doctype +)?html", re.IGNORECASE)
_TITLE = re.compile(r"<title[^<>]*>([^<]*)</title", re.IGNORECASE)
#: Maximum number of seconds of a Retry-After. A longer one counts as a mistake.
MAX_RETRY_AFTER = 3_600.0


class Reply(NamedTuple):
    """An answer of the server."""

    status: int
    #: Case-insensitive.
    headers: Mapping[str, str]
    #: The start of the body. Our key in it is replaced.
    body: bytes

    @property
    def date(self) -> float | None:
        """The time of the answer by the server's clock, None without a Date header."""
        return _parse_date(self.headers.get("Date", ""))

    @property
    def is_page(self) -> bool:
        """True if the body is a web page, such as one of a proxy or a login."""
        content_type = self.headers.get("Content-Type", "").lower()
        return "html" in content_type or self.body.lstrip()[:1] == b"<"


def delivery_error(reply: Reply) -> Unavailable | Misconfigured:
    """Return the error that an unexpected answer means."""
    status, headers, body = reply
    if status < 300 and reply.is_page:
        return Misconfigured("a web page instead of an OpenMeter server", status=status)
    text = reason(body)
    if status in _TRY_LATER or 500 <= status <= 599:
        return Unavailable(
            text,
            status=status,
            retry_after=_retry_after(headers.get("Retry-After")),
            # OpenMeter stops at the first event that it cannot process and keeps the
            # events before it. A 5xx of a proxy may also come after the events arrived.
            ambiguous=status >= 500,
        )
    if 300 <= status <= 399:
        text = f"a redirect to {headers.get('Location')!r}, which is not followed"
    return Misconfigured(text, status=status)


def reason(body: bytes) -> str:
    """Return the reason in the body of an answer, such as a problem (RFC 9457)."""
    text = body.decode(errors="replace")
    try:
        problem = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        problem = None
    if isinstance(problem, dict):
        summary = problem.get("detail") or _validation(problem) or problem.get("title")
        text = str(summary or text)
    elif _IS_HTML.match(text):
        title = _TITLE.search(text)
        words = title[1].split() if title else []
        titled = f" titled {' '.join(words)!r}" if words else ""
        text = f"an HTML page{titled}: is this OpenMeter?"
    return clean(text, MAX_REASON)


def _validation(problem: dict[str, Any]) -> str:
    """Return the validation errors of single fields, which API v3 lists."""
    extensions = problem.get("extensions")
    errors = extensions.get("validationErrors") if isinstance(extensions, dict) else ()
    if not isinstance(errors, list):
        return ""
    return "; ".join(
        f"{error.get('message')} {error['value']!r}"
        if "value" in error
        else f"{error.get('message')}: {error.get('field')}"
        for error in errors
        if isinstance(error, dict)
    )


def _retry_after(value: str | None) -> float | None:
    """Return the seconds in a Retry-After header (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return min(float(value), MAX_RETRY_AFTER)
    if (moment := _parse_date(value)) is None:
        return None
    return min(max(moment - time.time(), 0.0), MAX_RETRY_AFTER)


@lru_cache(maxsize=2)  # many answers have the same date, with seconds
def _parse_date(date: str) -> float | None:
    """Return the time of an HTTP date in seconds since 1970, None if invalid."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None


#: Maximum number of bytes read of an answer: enough for a log line.
MAX_ANSWER_BYTES = 65_536
#: Maximum number of seconds to wait for the body of a 2xx answer that is not needed.
_BODY_TIMEOUT = 0.2


#: Errors that occur before any byte of the request was sent.
_UNCONNECTED = (
    urllib3.exceptions.NewConnectionError,
    urllib3.exceptions.ConnectTimeoutError,
)


class _Bearer(AuthBase):
    """The API key, or no key. Without an auth object requests would read a .netrc."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Connection:
    """An HTTP connection to one server with one API key.

    Belongs to one thread of one process. Proxies, CA bundles and the verification of
    certificates are those of requests. Redirects are never followed: a 301 turns a POST
    into a GET, whose 200 would look like a delivery.
    """

    def __init__(
        self,
        *,
        key: ApiKey,
        timeout: float,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
        needs_body: bool = True,
    ) -> None:
        self._key = key
        self._timeout = timeout
        self._max_answer_bytes = max_answer_bytes
        self._needs_body = needs_body
        self._deadline = Deadline()
        self._session: requests.Session | None = None
        #: The last prepared request and its arguments, for reuse.
        self._prepared_from: tuple[object, ...] = ()
        self._prepared = requests.PreparedRequest()

    def request(
        self,
        method: str,
        url: str,
        *,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request; after a 401 send it again if the key has changed.

        :raises Unavailable: if there is no answer.
        :raises Misconfigured: if no attempt can succeed with this configuration.
        """
        reply = self._attempt(method, url, data, headers)
        if reply.status == 401 and self._renew_key():
            reply = self._attempt(method, url, data, headers)
        if not reply.body and reply.status < 300:
            return reply  # no text of it is logged
        return reply._replace(
            body=self._without_key(reply.body),
            headers=CaseInsensitiveDict(
                {name: self._text_without_key(v) for name, v in reply.headers.items()}
            ),
        )

    def close(self) -> None:
        """Close the connections. The next request opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
        self._deadline.close()

    def __del__(self) -> None:
        self.close()

    def _attempt(
        self,
        method: str,
        url: str,
        data: bytes | None,
        headers: Mapping[str, str] | None,
    ) -> Reply:
        deadline = self._deadline
        session = self._session = self._session or _new_session(url, deadline)
        deadline.begin(self._timeout)
        try:
            request = self._prepare(session, method, url, headers)
            if data is not None:
                request.body = data
                request.headers["Content-Length"] = str(len(data))
            # Not through the session, which would handle redirects, hooks and cookies.
            response = session.get_adapter(url).send(
                request,
                stream=True,
                timeout=self._timeout,
                verify=True if session.verify is None else session.verify,
                proxies=session.proxies,
            )
            request.body = None
            if deadline.is_over:
                # The parser accepts headers that were cut off by the deadline.
                response.close()
                raise requests.ReadTimeout
            if response.status_code < 200:
                # The final answer follows, and must not answer the next request.
                response.close()
                raise Unavailable(
                    f"{response.status_code} in place of an answer", ambiguous=True
                )
            body = self._read(response)
        except (OSError, ValueError) as error:
            self.close()  # a new session reads the environment, which may be corrected
            if deadline.is_over:
                error = _timeout_error(error, self._timeout)
            raise self._no_answer(error, url) from error
        finally:
            deadline.end()
        return Reply(response.status_code, response.headers, body)

    def _read(self, response: requests.Response) -> bytes:
        """Read the start of an answer.

        :raises OSError: if a body that is needed does not come in time.
        """
        has_body = response.raw.length_remaining != 0
        if has_body and not self._needs_body and 200 <= response.status_code < 300:
            self._deadline.shorten(_BODY_TIMEOUT)
        limit = self._max_answer_bytes
        chunks: list[bytes] = []
        size = 0
        try:
            while size < limit and (chunk := response.raw.read1(limit - size)):
                chunks.append(chunk)
                size += len(chunk)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            response.close()
            if self._needs_body and self._deadline.is_over:
                raise requests.ReadTimeout(error) from error
        else:
            if size == limit:
                response.close()  # unread bytes: the connection cannot be used again
        return b"".join(chunks)

    def _no_answer(self, error: OSError | ValueError, url: str) -> DeliveryError:
        """Return the error of an attempt without an answer.

        It is ambiguous if the request may have arrived.
        """
        reason = self._text_without_key(_innermost_message(error))
        if isinstance(error, requests.exceptions.InvalidURL) or (
            isinstance(error, ValueError) and not isinstance(error, OSError)
        ):
            # OpenMeter's URL was parsed earlier, so the URL is the proxy's. It is not
            # logged: it may hold a password.
            return Misconfigured(
                "the URL of the proxy cannot be parsed (see http_proxy, ...)"
            )
        if not isinstance(error, requests.RequestException) or isinstance(
            error, requests.exceptions.SSLError | ValueError
        ):
            # requests raises a plain OSError if the CA bundle is missing.
            return Misconfigured(f"cannot talk to {url}: {reason}")
        cause = error.args[0] if error.args else None
        cause = getattr(cause, "reason", cause)
        where = urlsplit(url).netloc.rpartition("@")[2]
        if isinstance(cause, urllib3.exceptions.ProxyError):
            # urllib3 also raises it if the connection breaks after the request.
            cause, where = cause.original_error, f"{where} through a proxy"
        never_connected = isinstance(cause, _UNCONNECTED)
        # A refused tunnel raises exactly OSError, and then no byte was sent.
        return Unavailable(
            f"{where}: {reason}",
            ambiguous=not never_connected and type(cause) is not OSError,
        )

    def _prepare(
        self,
        session: requests.Session,
        method: str,
        url: str,
        headers: Mapping[str, str] | None,
    ) -> requests.PreparedRequest:
        """Return a request without its body, the last one if the arguments are equal.

        To prepare a request takes as long as to send it.
        """
        key = self._current_key()
        arguments = (method, url, headers, key)
        if arguments != self._prepared_from:
            request = requests.Request(method, url, headers=headers, auth=_Bearer(key))
            self._prepared = session.prepare_request(request)
            self._prepared_from = arguments
        return self._prepared

    def _without_key(self, body: bytes) -> bytes:
        key = self._key.known
        return body.replace(key.encode(), b"[api_key]") if key else body

    def _text_without_key(self, text: str) -> str:
        key = self._key.known
        for form in (key, quote(key, safe="")) if key else ():
            text = text.replace(form, "[api_key]")
        return text

    def _current_key(self) -> str | None:
        try:
            return self._key.current()
        except ValueError as error:
            raise Misconfigured(str(error)) from error

    def _renew_key(self) -> bool:
        try:
            return self._key.renew()
        except ValueError as error:
            raise Misconfigured(str(error), status=401) from error


class _Adapter(HTTPAdapter):
    """A transport adapter whose connections keep a deadline, also those to a proxy."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Make the pools of direct connections."""
        super().init_poolmanager(*arguments, **options)
        self._set_pool_classes(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """Return the pools of the connections to a proxy."""
        manager = super().proxy_manager_for(proxy, **options)
        if type(manager) is urllib3.ProxyManager:  # not a SOCKS proxy
            self._set_pool_classes(manager)
        return manager

    def _set_pool_classes(self, manager: Any) -> None:
        manager.pool_classes_by_scheme = {
            "http": partial(_HTTPPool, self._deadline),
            "https": partial(_HTTPSPool, self._deadline),
        }


class _HTTPPool(urllib3.HTTPConnectionPool):
    def __init__(self, deadline: Deadline, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ConnectionCls: Any = partial(_HTTPConnection, deadline)


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    def __init__(self, deadline: Deadline, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ConnectionCls: Any = partial(_HTTPSConnection, deadline)


class _HTTPConnection(urllib3.connection.HTTPConnection):
    def __init__(self, deadline: Deadline, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._deadline = deadline

    def _new_conn(self) -> socket.socket:
        connected = _connect(self, self._deadline)
        self._deadline.watch(connected)
        return connected


class _HTTPSConnection(urllib3.connection.HTTPSConnection):
    def __init__(self, deadline: Deadline, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._deadline = deadline

    def _new_conn(self) -> socket.socket:
        connected = _connect(self, self._deadline)
        # The TLS handshake replaces this object by another one of the same socket.
        self._deadline.watch(connected, copy=True)
        return connected

    def connect(self) -> None:
        """Connect, and do the TLS handshake."""
        super().connect()
        self._deadline.watch(self.sock)


def _connect(
    connection: urllib3.connection.HTTPConnection, deadline: Deadline
) -> socket.socket:
    """Open a connection as urllib3 does, but resolve the name within the deadline."""
    host, port = connection.host.strip("[]"), connection.port
    failure: OSError = OSError(f"the name {host} has no address")
    try:
        for address in deadline.addresses(host, port):
            try:
                return create_connection(
                    (address, port),
                    deadline.left,
                    source_address=connection.source_address,
                    socket_options=connection.socket_options,
                )
            except OSError as error:
                failure = error
    except socket.gaierror as error:
        raise urllib3.exceptions.NameResolutionError(host, connection, error) from error
    except OSError as error:
        failure = error
    if isinstance(failure, TimeoutError):
        raise urllib3.exceptions.ConnectTimeoutError(
            connection, f"connection to {host} timed out"
        ) from failure
    raise urllib3.exceptions.NewConnectionError(
        connection, f"no connection to {host}: {failure}"
    ) from failure


def _new_session(url: str, deadline: Deadline) -> requests.Session:
    """Return a session with the proxies and CA bundle of the environment.

    By default requests reads the environment again for each request, which takes as
    long as the rest of the request.
    """
    session = requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, _Adapter(deadline))
    session.headers["User-Agent"] = f"openmeter_wsgi/{VERSION}"
    settings = session.merge_environment_settings(url, {}, True, None, None)
    session.proxies.update(settings["proxies"])
    session.verify = settings["verify"]
    session.trust_env = False
    return session


def _timeout_error(error: OSError | ValueError, timeout: float) -> OSError | ValueError:
    """Return the error of an attempt that its deadline has ended."""
    never_connected = isinstance(error, requests.exceptions.ConnectTimeout) or (
        isinstance(getattr(error.args and error.args[0], "reason", None), _UNCONNECTED)
    )
    if never_connected:
        return error
    return requests.ReadTimeout(f"no whole answer within {timeout:g} s")


def _innermost_message(error: BaseException) -> str:
    """Return the message of the innermost error, often the operating system's."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
