"""An exchange: a request and its response after the end, as measures see them."""

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

#: Readers of bodies. One runs only if a measure names it, as it costs time per chunk.
Body: TypeAlias = Literal[
    "json", "llm", "records", "multi_status", "llm:openai", "llm:anthropic",
    "llm:gemini", "llm:cohere", "llm:ollama", "llm:bedrock",
]  # fmt: skip
#: From Content-Type and Content-Encoding of a response to what reads its body.
NewReader: TypeAlias = "Callable[[str | None, str | None], BodyReader[Any]]"

_NOT_READ = Unknown("not_read")
_WITHOUT_BODY = ("1", "204", "304")
_INPUT = "wsgi.input"
#: Methods whose requests have no body, but for oddities.
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


@functools.cache
def reader_of(kind: Body) -> NewReader:
    """Return what makes the readers of that *kind*.

    A measure calls it when it is made. So what reads bodies, much of the package, is
    imported only where it is asked for, and never while a request is served.
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
    """A request whose response has ended, with all that is known of both.

    Belongs to the thread that settles it. Measures and ``meter_when`` are given one.
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
        #: The status code that the client got.
        self.status: int = status
        #: ``completed``, ``failed`` or ``aborted``.
        self.outcome: str = outcome
        #: The template of the address, such as ``/users/<id>``, where it is known.
        self.route: str | None = route
        #: The headers of the response, as the application gave them.
        self.response_headers: list[tuple[str, str]] = response_headers
        #: Of the body, as it left the application; None where the kernel sent it.
        self.bytes_sent: int | None = bytes_sent
        #: Of the request's body; None where nothing says how long it was.
        self.bytes_received: int | None = bytes_received
        self._started_at = started_at
        self._bodies = bodies
        self._results: dict[str, Any] = {}
        #: Remarks on the values that were read, such as ``ambiguous_usage``.
        self.remarks: set[str] = set()

    @property
    def method(self) -> str:
        """The method of the request, in capitals."""
        return method_of(self.environ)

    @property
    def duration(self) -> float:
        """Seconds from the request's arrival until now."""
        return round(time.perf_counter() - self._started_at, 6)

    @property
    def json(self) -> Any:
        """The body, decoded.

        :raises ValueError: saying why it is not known.
        """
        found = self.body("json")
        if not isinstance(found, Unknown):
            return found.value
        how = "; name it: computed(function, 'json')" if found is _NOT_READ else ""
        raise ValueError(f"the body is not known as JSON: {found.reason}{how}")

    @property
    def llm(self) -> LLMUsage | Unknown:
        """The usage of a language model that the body reports."""
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
        """Return the usage of a language model, in the shape of *provider* if given."""
        usage: LLMUsage | Unknown = self.body(f"llm:{provider}" if provider else "llm")
        if not isinstance(usage, Unknown):
            self.remarks.update(usage.remarks)
        return usage

    def body(self, kind: str) -> Any:
        """Return the result of the reader of that kind, or why it is unknown."""
        if kind not in self._results:
            reader = self._bodies.get(kind)
            self._results[kind] = _NOT_READ if reader is None else reader.result()
        return self._results[kind]

    def request_header(self, name: str) -> str | None:
        """Return a header of the request, None where it has none."""
        key = name.upper().replace("-", "_")
        if key not in {"CONTENT_TYPE", "CONTENT_LENGTH"}:
            key = f"HTTP_{key}"
        value = self.environ.get(key)
        return None if value is None else str(value)

    def response_header(self, name: str) -> str | None:
        """Return a header of the response; several of one name as one list."""
        wanted = name.lower()
        values = [
            value for key, value in self.response_headers if key.lower() == wanted
        ]
        return ", ".join(values) if values else None


class ResponseCapture:
    """Collects a response while it passes, so that measures can read it at the end.

    Belongs to the thread of the request.
    """

    __slots__ = (
        "_bodies", "_environ", "_headers", "_is_handed_over", "_received", "_route",
        "_started_at", "feeds", "taken",
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
        self._bodies: dict[Any, BodyReader[Any] | None] = dict.fromkeys(bodies)
        self._headers: list[tuple[str, str]] = []
        self._route: str | None = None
        self._received = _counted_input(environ, is_late=is_late)
        self._is_handed_over = False
        #: Bytes that the server has taken.
        self.taken: int = 0
        #: What takes each chunk.
        self.feeds: list[Any] = []

    def look_at(self, bodies: Iterable[str]) -> None:
        """Read the body in these ways too, if it has not begun."""
        self._bodies = dict.fromkeys([*self._bodies, *bodies])

    def begin(self, status: str, headers: list[tuple[str, str]]) -> None:
        """Take what start_response says, the last time that it is called."""
        self._headers = headers
        self._route = route_of(self._environ)
        content_type, encoding = _values(headers, "content-type", "content-encoding")
        is_read = not (
            method_of(self._environ) == "HEAD" or status.startswith(_WITHOUT_BODY)
        )
        for kind in self._bodies:
            self._bodies[kind] = reader_of(kind)(content_type, encoding)
        self.feeds = [r.feed for r in self._bodies.values() if r] if is_read else []

    def passed(self, chunk: bytes) -> None:
        """Take in one chunk that the server has taken."""
        self.taken += len(chunk)
        for feed in self.feeds:
            feed(chunk)

    def hand_over(self) -> None:
        """Note that the kernel sends the body, which nobody reads here."""
        self._is_handed_over = True
        self._bodies.clear()

    def exchange(self, status: str | None, outcome: str) -> Exchange:
        """Return the exchange, now that it has ended."""
        environ = self._environ
        sent: int | None = self.taken
        if self._is_handed_over:
            sent = _number(*_values(self._headers, "content-length"))
        if method_of(environ) == "HEAD" or (status or "").startswith(_WITHOUT_BODY):
            sent = 0  # whatever the application made, no server sends it
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
            bodies={kind: each for kind, each in self._bodies.items() if each},
        )


class _CountedInput:
    """A request's body of a length that nobody stated, counted as it is read."""

    def __init__(self, body: Any, *, is_late: bool) -> None:
        self._body = body
        self._is_late = is_late
        self.count = 0
        if hasattr(body, "readinto"):  # there only where it is there without this
            self.readinto = self._readinto

    def total(self, method: str) -> int | None:
        """Return the bytes that were read, None where they may have been before."""
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
    """Return what counts the body of a request, None where its length is stated.

    Without a Content-Length there is one under HTTP/2, or in chunks, and a server may
    say by ``wsgi.input_terminated`` that it ends by itself. *is_late*: the application
    may have read of it before.
    """
    if environ.get("CONTENT_LENGTH"):
        return None
    body = environ.get(_INPUT)
    if not isinstance(body, _CountedInput):
        body = environ[_INPUT] = _CountedInput(body, is_late=is_late)
    return body


def _number(length: str | None) -> int | None:
    # No length has more digits, and from some thousands on int() raises.
    if length and length.isascii() and length.isdecimal() and len(length) < 20:
        return int(length)
    return None


def _values(headers: list[tuple[str, str]], *names: str) -> list[str | None]:
    found = {name.lower(): value for name, value in headers}
    return [found.get(name) for name in names]


def route_of(environ: dict[str, Any]) -> str | None:
    """Return the template of the address, where a framework has said it.

    With the mount of the application in front: several may have the same templates.
    Flask's can be read only while its request is served, as in start_response.
    """
    request = environ.get(REQUEST)
    if request is not None and request.route is not None:
        return str(request.route)
    own = _environ_of_bottle(environ)
    if (bottle := own.get("bottle.route")) is not None:
        return mount_of(own) + str(bottle.rule)
    if (flask := sys.modules.get("flask")) is not None and flask.has_request_context():
        rule = flask.request.url_rule
        # Another application's request may be the one that is served around this.
        if rule is not None and _is_same(flask.request.environ, environ):
            return mount_of(flask.request.environ) + str(rule.rule)
    return None


def mount_of(environ: Mapping[str, Any]) -> str:
    """Return where an application is mounted, as text without a slash at its end."""
    mount = str(environ.get("SCRIPT_NAME", "")).rstrip("/")
    if mount.isascii():
        return mount
    return mount.encode("latin-1", "replace").decode(errors="replace")


def _environ_of_bottle(environ: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return Bottle's environ of this request: what is in between may copy it."""
    if "bottle.route" not in environ and "bottle" in sys.modules:
        with contextlib.suppress(RuntimeError):  # no request in this thread
            own: Mapping[str, Any] = sys.modules["bottle"].request.environ
            return own if _is_same(own, environ) else environ
    return environ


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Say whether two environs, which may be copies, are of one metered request."""
    request = one.get(REQUEST)
    return request is not None and request is other.get(REQUEST)
