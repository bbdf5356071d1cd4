"""One request and its response, when it has ended: what a measure can look at."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from openmeter_wsgi.bodies.reader import Unknown
from openmeter_wsgi.environ import method_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from openmeter_wsgi.bodies.llm_shapes import LLMUsage, Provider
    from openmeter_wsgi.bodies.multi_status import MultiStatus
    from openmeter_wsgi.bodies.reader import BodyReader

#: What is read only where a measure asks for it, because it costs something a chunk.
Body: TypeAlias = Literal[
    "json", "llm", "records", "multi_status", "llm:openai", "llm:anthropic",
    "llm:gemini", "llm:cohere", "llm:ollama", "llm:bedrock",
]  # fmt: skip
#: From Content-Type and Content-Encoding of a response to what reads its body.
NewReader: TypeAlias = "Callable[[str | None, str | None], BodyReader[Any]]"

_NOT_READ = Unknown("not_read")


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
    """What is known of a request whose response has ended.

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
        self.environ = environ
        #: The status code that the client got.
        self.status = status
        #: ``completed``, ``failed`` or ``aborted``.
        self.outcome = outcome
        #: The template of the address, such as ``/users/<id>``, where it is known.
        self.route = route
        #: The headers of the response, as the application gave them.
        self.response_headers = response_headers
        #: Of the body, as it left the application; None where the kernel sent it.
        self.bytes_sent = bytes_sent
        #: Of the request's body; None where nothing says how long it was.
        self.bytes_received = bytes_received
        self._started_at = started_at
        self._bodies = bodies
        self._results: dict[str, Any] = {}
        #: What is to be known of the values that were asked for: ``ambiguous_usage``.
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
        """How many parts of a response to many succeeded."""
        parts: MultiStatus | Unknown = self.body("multi_status")
        return parts

    @property
    def records(self) -> int | Unknown:
        """How many records a body of JSON lines has."""
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
