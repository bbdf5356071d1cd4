"""Exchanges: a request and its finished response, as measures read them.

`ResponseCapture` collects the response while it is sent; it exists only if a measure
needs it. When the response has ended, it makes the `Exchange` for the measures.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from openmeter_wsgi.bodies.base import Unknown
from openmeter_wsgi.request import REQUEST, method_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from openmeter_wsgi.bodies.base import BodyReader
    from openmeter_wsgi.bodies.llm_shapes import LLMUsage, Provider
    from openmeter_wsgi.bodies.multi_status import MultiStatus

#: The readers of bodies. A reader runs only if a measure needs it: it takes time for
#: each chunk.
Body: TypeAlias = Literal[
    "json", "llm", "records", "multi_status", "llm:openai", "llm:anthropic",
    "llm:gemini", "llm:cohere", "llm:ollama", "llm:bedrock",
]  # fmt: skip
#: Makes the reader of a body from the response's Content-Type and Content-Encoding.
NewReader: TypeAlias = "Callable[[str | None, str | None], BodyReader[Any]]"

_NOT_READ = Unknown("not_read")
#: The start of the status of responses without a body.
_WITHOUT_BODY = ("1", "204", "304")
_INPUT = "wsgi.input"
#: Methods whose requests normally have no body.
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


@functools.cache
def reader_of(kind: Body) -> NewReader:
    """Return the function that makes readers of that *kind*.

    Each measure calls this when it is made. So the modules of the readers, a large part
    of the package, are imported only if needed, and never while a request is served.
    """
    if kind == "json":
        from openmeter_wsgi.bodies.json import json_reader

        return json_reader
    if kind.startswith("llm"):
        from openmeter_wsgi.bodies.llm import llm_reader

        provider: Any = kind.removeprefix("llm").removeprefix(":") or None
        return functools.partial(llm_reader, provider=provider)
    if kind == "records":
        from openmeter_wsgi.bodies.stream import records_reader

        return records_reader
    from openmeter_wsgi.bodies.multi_status import multi_status_reader

    return multi_status_reader


class Exchange:
    """A request and its finished response, for measures and ``meter_when``.

    It is used only by the thread that settles the response.
    """

    __slots__ = (
        "_bodies",
        "_results",
        "_started_at",
        "bytes_received",
        "bytes_sent",
        "environ",
        "outcome",
        "remarks",
        "response_headers",
        "route",
        "status",
    )  # fmt: skip

    def __init__(
        self,
        environ: dict[str, Any],
        *,
        status: int,
        outcome: str,
        route: str | None,
        response_headers: list[tuple[str, str]],
        bytes_sent: int | None,
        bytes_received: int | None,
        started_at: float,
        bodies: Mapping[str, BodyReader[Any]],
    ) -> None:
        #: The environ of the request (PEP 3333).
        self.environ: dict[str, Any] = environ
        #: The status code of the response, or 0 if it has none.
        self.status: int = status
        #: ``completed``, ``failed`` or ``aborted``.
        self.outcome: str = outcome
        #: The template of the path, such as ``/users/<id>``, or None if it is unknown.
        self.route: str | None = route
        #: The headers of the response, as the application set them.
        self.response_headers: list[tuple[str, str]] = response_headers
        #: The number of bytes of the response's body that the server took. Of a file
        #: sent by the kernel it is the Content-Length, or None without this header.
        self.bytes_sent: int | None = bytes_sent
        #: The number of bytes of the request's body, or None if it is unknown.
        self.bytes_received: int | None = bytes_received
        self._started_at = started_at
        #: The readers of the body, by their kind.
        self._bodies = bodies
        #: Their results, as far as these were needed.
        self._results: dict[str, Any] = {}
        #: Remarks on the usage that was read, such as ``ambiguous_usage``.
        self.remarks: set[str] = set()

    @property
    def method(self) -> str:
        """The method of the request, in upper case."""
        return method_of(self.environ)

    @property
    def duration(self) -> float:
        """The seconds from the arrival of the request until now."""
        return round(time.perf_counter() - self._started_at, 6)

    @property
    def json(self) -> Any:
        """The decoded JSON body.

        :raises ValueError: with the reason, if there is none.
        """
        result = self.body("json")
        if not isinstance(result, Unknown):
            return result.value
        hint = "; write computed(function, 'json')" if result is _NOT_READ else ""
        raise ValueError(f"there is no JSON body: {result.reason}{hint}")

    @property
    def llm(self) -> LLMUsage | Unknown:
        """The usage of a language model, as reported in the body."""
        return self.llm_usage()

    @property
    def multi_status(self) -> MultiStatus | Unknown:
        """The numbers of parts of a multi-status response that succeeded and failed."""
        parts: MultiStatus | Unknown = self.body("multi_status")
        return parts

    @property
    def records(self) -> int | Unknown:
        """The number of records in a body of JSON lines."""
        count: int | Unknown = self.body("records")
        return count

    def llm_usage(self, provider: Provider | None = None) -> LLMUsage | Unknown:
        """Return the usage of a language model, reported in the shape of *provider*."""
        usage: LLMUsage | Unknown = self.body(f"llm:{provider}" if provider else "llm")
        if not isinstance(usage, Unknown):
            self.remarks.update(usage.remarks)
        return usage

    def body(self, kind: str) -> Any:
        """Return the result of the reader of that kind; it may be an `Unknown`."""
        if kind not in self._results:
            reader = self._bodies.get(kind)
            self._results[kind] = _NOT_READ if reader is None else reader.result()
        return self._results[kind]

    def request_header(self, name: str) -> str | None:
        """Return a header of the request, or None."""
        key = name.upper().replace("-", "_")
        if key not in {"CONTENT_TYPE", "CONTENT_LENGTH"}:
            key = f"HTTP_{key}"
        value = self.environ.get(key)
        return None if value is None else str(value)

    def response_header(self, name: str) -> str | None:
        """Return a header of the response, or None; several are joined by commas."""
        wanted = name.lower()
        values = [
            value for key, value in self.response_headers if key.lower() == wanted
        ]
        return ", ".join(values) if values else None


class ResponseCapture:
    """A collector of the data for an `Exchange` while the response is sent.

    It is used only by the thread of the request. The calls are `begin`, then
    `read_chunk` for each chunk, or `skip_body` instead, and `exchange` at the end.
    """

    __slots__ = (
        "_bodies", "_environ", "_headers", "_is_skipped", "_received", "_route",
        "_started_at", "bytes_taken", "feeds",
    )  # fmt: skip

    def __init__(
        self,
        environ: dict[str, Any],
        bodies: Iterable[str],
        *,
        is_late: bool = False,
    ) -> None:
        self._environ = environ
        self._started_at = time.perf_counter()
        #: The readers by their kind; None until `begin`.
        self._bodies: dict[Any, BodyReader[Any] | None] = dict.fromkeys(bodies)
        self._headers: list[tuple[str, str]] = []
        self._route: str | None = None
        #: Counts the request's body, if it has no Content-Length.
        self._received = _counted_input(environ, is_late=is_late)
        self._is_skipped = False
        #: The number of bytes that the server has taken.
        self.bytes_taken: int = 0
        #: The `feed` methods of the readers.
        self.feeds: list[Any] = []

    def add_readers(self, kinds: Iterable[str]) -> None:
        """Read the body by the readers of these kinds too. Call it before `begin`."""
        self._bodies = dict.fromkeys([*self._bodies, *kinds])

    def begin(self, status: str, headers: list[tuple[str, str]]) -> None:
        """Make the readers. Called by each start_response; the last call counts."""
        self._headers = headers
        self._route = route_of(self._environ)
        content_type, encoding = _values(headers, "content-type", "content-encoding")
        is_read = not (
            method_of(self._environ) == "HEAD" or status.startswith(_WITHOUT_BODY)
        )
        for kind in self._bodies:
            self._bodies[kind] = reader_of(kind)(content_type, encoding)
        self.feeds = [r.feed for r in self._bodies.values() if r] if is_read else []

    def read_chunk(self, chunk: bytes) -> None:
        """Feed a chunk that the server has taken to the readers."""
        self.bytes_taken += len(chunk)
        for feed in self.feeds:
            feed(chunk)

    def skip_body(self) -> None:
        """Read no chunk: the kernel sends the body, or it began before the capture."""
        self._is_skipped = True
        self._bodies.clear()

    def exchange(self, status: str | None, outcome: str) -> Exchange:
        """Return the exchange. The response must have ended."""
        environ = self._environ
        sent: int | None = self.bytes_taken
        if self._is_skipped:
            sent = _number(*_values(self._headers, "content-length"))
        if method_of(environ) == "HEAD" or (status or "").startswith(_WITHOUT_BODY):
            sent = 0  # no server sends a body here, even if the application made one
        return Exchange(
            environ,
            status=int(status[:3]) if status and status[:3].isdecimal() else 0,
            outcome=outcome,
            route=self._route or route_of(environ),
            response_headers=self._headers,
            bytes_sent=sent,
            bytes_received=(
                self._received.total(method_of(environ))
                if self._received
                else _number(str(environ.get("CONTENT_LENGTH", "")))
            ),
            started_at=self._started_at,
            bodies={kind: reader for kind, reader in self._bodies.items() if reader},
        )


class _CountedInput:
    """A wrapper of ``wsgi.input`` that counts the bytes that the application reads.

    It is used for a request without a Content-Length. *is_late* is True if the
    application may have read from the body before it was wrapped.
    """

    def __init__(self, body: Any, *, is_late: bool) -> None:
        self._body = body
        self._is_late = is_late
        self.count = 0
        if hasattr(body, "readinto"):  # offered only if the wrapped body has it
            self.readinto = self._readinto

    def total(self, method: str) -> int | None:
        """Return the number of bytes read; None if some may have been read before."""
        if self._is_late and not self.count and method not in _BODILESS:
            return None
        return self.count

    def _counted(self, read: bytes) -> bytes:
        self.count += len(read)
        return read

    def read(self, *size: int) -> bytes:
        return self._counted(self._body.read(*size))

    def readline(self, *size: int) -> bytes:
        return self._counted(self._body.readline(*size))

    def readlines(self, *hint: int) -> list[bytes]:
        return [self._counted(line) for line in self._body.readlines(*hint)]

    def _readinto(self, buffer: Any) -> int | None:
        size: int | None = self._body.readinto(buffer)
        self.count += size or 0
        return size

    def __iter__(self) -> Any:
        return map(self._counted, self._body)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


def _counted_input(environ: dict[str, Any], *, is_late: bool) -> _CountedInput | None:
    """Wrap ``wsgi.input`` in a counter; return None if there is a Content-Length.

    A request may have a body without this header under HTTP/2 or in chunks, which some
    servers pass on as ``wsgi.input_terminated``.
    """
    if environ.get("CONTENT_LENGTH"):
        return None
    body = environ.get(_INPUT)
    if not isinstance(body, _CountedInput):
        body = environ[_INPUT] = _CountedInput(body, is_late=is_late)
    return body


def _number(length: str | None) -> int | None:
    # No length has more digits, and int() raises for thousands of digits.
    if length and length.isascii() and length.isdecimal() and len(length) < 20:
        return int(length)
    return None


def _values(headers: list[tuple[str, str]], *names: str) -> list[str | None]:
    found = {name.lower(): value for name, value in headers}
    return [found.get(name) for name in names]


def route_of(environ: dict[str, Any]) -> str | None:
    """Return the template of the path, or None if no framework provides it.

    The template includes the mount of the application, as several mounted applications
    may have the same templates. Flask's template can be read only while Flask serves
    the request, for example in start_response.
    """
    request = environ.get(REQUEST)
    if request is not None and request.route is not None:
        return str(request.route)
    own = _environ_of_bottle(environ)
    if (bottle := own.get("bottle.route")) is not None:
        return mount_of(own) + str(bottle.rule)
    if (flask := sys.modules.get("flask")) is not None and flask.has_request_context():
        rule = flask.request.url_rule
        # The current Flask request may be that of an application around this one.
        if rule is not None and _is_same(flask.request.environ, environ):
            return mount_of(flask.request.environ) + str(rule.rule)
    return None


def mount_of(environ: Mapping[str, Any]) -> str:
    """Return the path of an application's mount, without a trailing slash."""
    mount = str(environ.get("SCRIPT_NAME", "")).rstrip("/")
    if mount.isascii():
        return mount
    return mount.encode("latin-1", "replace").decode(errors="replace")


def _environ_of_bottle(environ: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return Bottle's environ of this request; a middleware in between may copy it."""
    if "bottle.route" not in environ and "bottle" in sys.modules:
        with contextlib.suppress(RuntimeError):  # no request in this thread
            own: Mapping[str, Any] = sys.modules["bottle"].request.environ
            return own if _is_same(own, environ) else environ
    return environ


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return True if two environs, one perhaps a copy, are of the same request."""
    request = one.get(REQUEST)
    return request is not None and request is other.get(REQUEST)
