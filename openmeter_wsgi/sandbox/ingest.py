"""The ingest of events, with the checks of OpenMeter in OpenMeter's order.

OpenMeter checks a request in three steps, each with errors of its own:

1. A validator checks the whole request against the OpenAPI schema (`_check_schema`).
2. Go's CloudEvents SDK decodes each event (`decode`).
3. Each event becomes a message for Kafka (`_unsendable`).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote

from flask import Blueprint, Response, request

from openmeter_wsgi.sandbox.context import current_context, delay
from openmeter_wsgi.sandbox.request_validation import (
    PREFIX,
    TEXT,
    TIME,
    Flaw,
    Problem,
    Schema,
    body_of,
    check,
    invalid,
    number,
    parse,
    parse_time,
    shape,
    text,
    well_formed,
)
from openmeter_wsgi.sandbox.store import Event, Outcome, rejected_events

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.context import Context
    from openmeter_wsgi.sandbox.request_validation import Document

SINGLE = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"
EITHER = "application/json"
EVENT = shape(
    "id source specversion type subject",
    id=text(),
    source=text(),
    specversion=text(),
    type=text(),
    subject=text(),
    time=TIME | {"nullable": True},
    # Members of the data may not be null: OpenAPI 3.0 requires `nullable` for null.
    data={"type": "object", "nullable": True, "additionalProperties": {}},
    datacontenttype=TEXT | {"nullable": True, "enum": [EITHER]},
    dataschema=text(nullable=True),
)
#: v3 accepts the same attributes and no others. The version is optional.
EVENT_V3: Schema = EVENT | {
    "additionalProperties": False,
    "required": ["id", "source", "type", "subject"],
}
ATTRIBUTES = frozenset((*EVENT["properties"], "data_base64"))
INT32 = range(-(2**31), 2**31)
#: The latest time of ClickHouse's DateTime, in the year 2106.
LATEST = 2**32 - 1
#: Maximum size of a message of Kafka, by default.
MESSAGE = 1_000_000
#: Bytes that count in addition: librdkafka's 36, and about 110 of OpenMeter's headers.
MESSAGE_OVERHEAD = 36 + 110
#: Maximum number of bytes of a character in the message: ``<`` becomes ``\\\\u003c``.
_GROWTH = 7
#: Status codes of invalid requests; other errors are simulated faults.
REFUSALS = range(400, 429)

routes: Final = Blueprint("ingest", __name__)


class InvalidEvent(ValueError):
    """An event that fits the schema but is refused by the CloudEvents SDK.

    :param reason: a text that the page shows in addition to OpenMeter's message.
    """

    def __init__(self, detail: str, reason: str | None = None) -> None:
        super().__init__(detail)
        self.reason: str = f"{detail}: {reason}" if reason else detail


@routes.post("/api/v1/events")
def _ingest_v1() -> Response:
    return _answer(v3=False)


@routes.post("/api/v3/openmeter/events")
@routes.post("/v3/openmeter/events")
def _ingest_v3() -> Response:
    return _answer(v3=True)


def _answer(*, v3: bool) -> Response:
    context = current_context()
    faults = context.faults.ingest
    context.tally.add(requests=1)
    try:
        faults.check()
        _ingest(context, faults.draw(), v3=v3)
    except Problem as problem:
        _record(context, problem)
        raise
    finally:
        delay(faults)
    return Response(status=202 if v3 else 204)


def _record(context: Context, problem: Problem) -> None:
    """Count a request that is answered with an error, and store its events."""
    is_refused = problem.status in REFUSALS
    if is_refused:
        context.tally.refuse(problem.reason)
    else:
        context.tally.add(failed=1)
    outcome = Outcome.REFUSED if is_refused else Outcome.FAILED
    reason = f"answered {problem.status}: {problem.reason}"
    body = request.get_data()
    context.store.reject(rejected_events(body, outcome, reason, problem.position))


def _ingest(context: Context, fault: str | None, *, v3: bool) -> None:
    if fault == "before":
        raise Problem(500, reason="on purpose, before anything was stored")
    events = accept(now=int(context.store.clock()), v3=v3)
    # OpenMeter sends one event after the other to Kafka, until the first event that it
    # cannot send. It stores the events before that one, although it answers 500.
    flaws = [(n, why) for n, event in enumerate(events) if (why := _unsendable(event))]
    sendable, flaw = flaws[0] if flaws else (len(events), None)
    _apply_faults(context, events)
    if context.faults.ingest.settings.forget:
        reason = "answered 204 and forgotten, on purpose"
        body = request.get_data()
        context.store.reject(rejected_events(body, Outcome.DROPPED, reason))
        return
    added = context.store.add(events[:sendable])
    context.tally.add(received=sendable, **added)
    if flaw is not None:
        reason = f"{flaw}; the events before it were stored"
        raise Problem(500, reason=reason, position=sendable + 1)
    if fault == "after":
        raise Problem(500, reason="on purpose, after the events were stored")


def _apply_faults(context: Context, events: list[Event]) -> None:
    """Apply the faults ``refused_type``, ``refused_subject`` and ``claim``."""
    settings = context.faults.ingest.settings
    for position, event in enumerate(events, 1):
        for name, given in (("type", event.type), ("subject", event.subject)):
            if given == getattr(settings, f"refused_{name}"):
                detail = f"the {name} {given!r} is refused, on purpose"
                raise Problem(400, detail, position=position)
    if settings.claim:
        context.store.claim(events)
        raise Problem(500, reason="on purpose, after the ids were remembered")


def accept(*, now: int, v3: bool) -> list[Event]:
    """Return the events of the request, or raise the problem that OpenMeter answers.

    :param now: the time of an event without a time, in Unix seconds.
    """
    body = body_of(SINGLE, BATCH, EITHER)
    content_type = request.headers["Content-Type"].strip()
    kind = content_type.partition(";")[0].strip()
    document = parse(body)
    _check_schema(document, kind, EVENT_V3 if v3 else EVENT)
    if not v3 and kind != content_type:
        # The v1 handler compares the whole header, parameters included.
        raise Problem(400, f"invalid content type: {content_type}")
    items = document if isinstance(document, list) else [document]
    if v3 and kind != EITHER and any("specversion" not in item for item in items):
        reason = f'rewriting failed: unsupported content type "{kind}"'
        raise invalid(f"{PREFIX}{reason}")
    return _decode(items, kind, now, several=items is document)


def _check_schema(document: Any, kind: str, event: Schema) -> None:
    several = isinstance(document, list) if kind == EITHER else kind == BATCH
    schema = {"type": "array", "items": event} if several else event
    flaw = check(schema, document)
    if flaw is None:
        return
    position = flaw.pointer.split("/")[1:2]
    reason = str(flaw)
    if kind == EITHER:
        # An event or a list may match. If neither does, OpenMeter gives no reason; the
        # page of the sandbox shows one.
        flaw = Flaw("", "anyOf", 'doesn\'t match any schema from "anyOf"')
        name = " #/components/schemas/IngestEventsBody"
    else:
        name = "" if several else " #/components/schemas/Event"
    problem = invalid(f"{PREFIX}doesn't match schema{name}: {flaw}", flaw)
    problem.reason = reason
    problem.position = int(position[0]) + 1 if several and position else None
    raise problem


def _decode(
    items: list[Document], kind: str, now: int, *, several: bool
) -> list[Event]:
    events: list[Event] = []
    try:
        for item in items:
            events.append(decode(item, now))  # noqa: PERF401
    except InvalidEvent as error:
        # OpenMeter omits the reason for application/json, and always in version 3.
        detail = "no events found" if kind == EITHER else str(error)
        raise Problem(
            400,
            f"invalid event: {detail}",
            terse=True,
            reason=f"invalid event: {error.reason}",
            position=len(events) + 1 if several else None,
        ) from None
    if not events and kind == EITHER:
        raise Problem(400, "invalid event: no events found", terse=True)
    return events


def decode(document: Document, now: int) -> Event:
    """Return the event in *document*, which fits the schema.

    :param now: the time of an event without a time, in Unix seconds.
    """
    version = document.get("specversion", "1.0")
    if version not in ("1.0", "0.3"):
        raise InvalidEvent(f"specversion: unknown value: {version}\n")
    source = reencode(document["source"])
    for name in document.keys() - ATTRIBUTES:
        _check_extension(name, document[name])
    data, broken = _data(document)
    return Event(
        id=document["id"],
        source=source,
        type=document["type"],
        subject=document["subject"],
        time=min(_seconds(document.get("time"), now), LATEST),
        data=data,
        broken=broken,
    )


def _check_extension(name: str, value: Any) -> None:
    """Raise the SDK's error if an extension is invalid; a valid one is ignored."""
    if not re.fullmatch("[A-Za-z0-9]+", name):
        raise InvalidEvent(
            "bad key, CloudEvents attribute names MUST consist of lower-case letters "
            "('a' to 'z'), upper-case letters ('A' to 'Z') or digits "
            "('0' to '9') from the ASCII character set",
            name,
        )
    if isinstance(value, dict | list):
        kind = (
            "map[string]interface {}" if isinstance(value, dict) else "[]interface {}"
        )
        text = json.dumps(value, separators=(",", ":"))
        text = f"{{{text[1:-1]}}}" if isinstance(value, list) else text
        raise InvalidEvent(f"invalid CloudEvents value: {kind}{text}", name)
    if isinstance(value, int | float) and int(value) not in INT32:
        digits = re.sub(r"\.?0+e", "e", f"{value:.16e}")
        raise InvalidEvent(f"cannot convert {digits} to int32: out of range", name)


def _seconds(moment: str | None, now: int) -> int:
    if moment is None:
        return now
    try:
        return parse_time(moment)
    except ValueError:
        reason = f'cannot convert "{moment}" to time.Time: not in RFC3339 format'
        raise InvalidEvent(reason) from None


def _data(document: Document) -> tuple[str | None, bool]:
    """Return the data as JSON text, and True if the data is not JSON."""
    if "data_base64" in document:
        return _base64(document)
    if "data" not in document:
        return None, False
    return _json(document["data"]), False


def _base64(document: Document) -> tuple[str | None, bool]:
    names = list(document)
    encoded = document["data_base64"]
    # The SDK reads the attributes in the order of the document. Before it has read the
    # content type, it takes the JSON text with its quotation marks, which is no base64.
    is_known = "datacontenttype" in names[: names.index("data_base64")]
    if not is_known or "data" in document or not isinstance(encoded, str):
        raise InvalidEvent("illegal base64 data at input byte 0")
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidEvent("illegal base64 data at input byte 0") from None
    try:
        data = json.loads(content, parse_int=number, parse_float=number)
    except (ValueError, RecursionError):
        return None, True
    return _json(data), False


def _json(value: Any) -> str:
    # Go writes the keys of a map in alphabetical order, and no white space.
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return well_formed(text)


def _unsendable(event: Event) -> str | None:
    """Return the reason why OpenMeter cannot send *event* to Kafka, or None."""
    if event.broken:
        return "data_base64 holds no JSON"
    names = ("id", "type", "source", "subject", "time", "data")
    message = {name: getattr(event, name) for name in names}
    if len(str(message)) * _GROWTH < MESSAGE:
        return None
    message["data"] = _escaped(event.data or "")
    size = len((_escaped(_json(message)) + event.key).encode()) + MESSAGE_OVERHEAD
    if size > MESSAGE:
        return f"its message for Kafka has {size} of at most {MESSAGE} bytes"
    return None


def _escaped(text: str) -> str:
    """Return JSON *text* with the characters escaped that Go escapes for HTML."""
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2}).{0,2}", re.DOTALL)
_VALID = re.compile(r"[A-Za-z0-9_.~!$&'()*+,;=:@/\[\]%-]*")
_SAFE = "$&+,/:;=@"


def reencode(reference: str) -> str:
    """Return the URI *reference* as Go writes it after parsing it.

    OpenMeter parses the source of an event with ``url.Parse``. This refuses some common
    names (``127.0.0.1:8080``) and encodes others (``my api``).
    """
    if any(ch < " " or ch == "\x7f" for ch in reference):
        raise _invalid(reference, "net/url: invalid control character in URL")
    rest, hash_, fragment = reference.partition("#")
    scheme, rest = _split_scheme(reference, rest)
    path, mark, query = rest.partition("?")
    if scheme and not path.startswith("/"):
        # Go keeps such a URI (urn:x:y) unchanged and calls it opaque.
        return f"{scheme}:{path}{mark}{query}{hash_}{_escape(reference, fragment)}"
    if not scheme and ":" in path.split("/", 1)[0]:
        raise _invalid(reference, "first path segment in URL cannot contain colon")
    authority, path = _split_authority(reference, path)
    head = f"{scheme.lower()}:" if scheme else ""
    head += f"{authority}{_escape(reference, path)}{mark}{query}"
    return f"{head}#{_escape(reference, fragment)}" if fragment else head


def _invalid(reference: str, reason: str) -> InvalidEvent:
    return InvalidEvent(f"cannot parse uri ref: {reference}", reason)


def _split_scheme(reference: str, rest: str) -> tuple[str, str]:
    if rest.startswith(":"):
        raise _invalid(reference, "missing protocol scheme")
    if match := _SCHEME.match(rest):
        return match[1], rest[match.end() :]
    return "", rest


def _split_authority(reference: str, path: str) -> tuple[str, str]:
    if not path.startswith("//") or path.startswith("///"):
        return "", path
    host, slash, path = path[2:].partition("/")
    port = re.search(r":([^\]:]*)$", host)
    if port and not re.fullmatch("[0-9]*", port[1], re.ASCII):
        raise _invalid(reference, f'invalid port ":{port[1]}" after host')
    if " " in host:
        raise _invalid(reference, 'invalid character " " in host name')
    if bad := _ESCAPE.search(host):
        raise _invalid(reference, f'invalid URL escape "{bad[0]}"')
    # Go omits an authority without a host, and its two slashes.
    return f"//{host}" if host or slash else "", slash + path


def _escape(reference: str, part: str) -> str:
    if bad := _ESCAPE.search(part):
        raise _invalid(reference, f'invalid URL escape "{bad[0]}"')
    if _VALID.fullmatch(part):
        return part
    return quote(unquote(part), safe=_SAFE)
