"""What is seen of a response as it passes, for measures to look at in the end."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.environ import METERS, ROUTE, method_of
from openmeter_wsgi.exchange import Exchange, reader_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, MutableMapping

    from openmeter_wsgi.bodies.reader import BodyReader

_WITHOUT_BODY = ("1", "204", "304")
_INPUT = "wsgi.input"
#: Methods whose requests have no body, but for oddities.
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


class Observation:
    """What one request's measures need. Belongs to the thread of the request."""

    __slots__ = (
        "_bodies", "_environ", "_headers", "_is_handed_over", "_received", "_route",
        "_started_at", "feeds", "taken",
    )  # fmt: skip

    def __init__(
        self,
        environ: dict[str, Any],
        bodies: Iterable[str],
        started_at: float | None = None,
    ) -> None:
        self._environ = environ
        self._started_at = started_at or time.perf_counter()
        self._bodies: dict[Any, BodyReader[Any] | None] = dict.fromkeys(bodies)
        self._headers: list[tuple[str, str]] = []
        self._route: str | None = None
        self._received = counted_input(environ, is_late=started_at is not None)
        self._is_handed_over = False
        #: Bytes that the server has taken; the settlement counts them.
        self.taken = 0
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


def counted_input(
    environ: MutableMapping[str, Any], *, is_late: bool
) -> _CountedInput | None:
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
    if (said := environ.get(ROUTE)) is not None:
        return str(said)
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
    cell = one.get(METERS)
    return cell is not None and cell is other.get(METERS)
