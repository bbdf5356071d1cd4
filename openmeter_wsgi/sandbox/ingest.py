"""Ingest of events, with OpenMeter's order of checks and all its peculiarities.

First the validator judges the whole request, then Go's CloudEvents SDK reads each
event, then one event after the other becomes a message for Kafka.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote

from flask import Blueprint, Response, request

from openmeter_wsgi.sandbox.context import context, delay
from openmeter_wsgi.sandbox.store import Event, Outcome, rejected_events
from openmeter_wsgi.sandbox.validation import (
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

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.context import Context
    from openmeter_wsgi.sandbox.validation import Document

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
    # Anything but null: OpenAPI 3.0 allows null only where a schema says nullable.
    data={"type": "object", "nullable": True, "additionalProperties": {}},
    datacontenttype=TEXT | {"nullable": True, "enum": [EITHER]},
    dataschema=text(nullable=True),
)
#: v3 knows the same attributes and no others, and fills in the version.
EVENT_V3: Schema = EVENT | {
    "additionalProperties": False,
    "required": ["id", "source", "type", "subject"],
}
ATTRIBUTES = frozenset((*EVENT["properties"], "data_base64"))
INT32 = range(-(2**31), 2**31)
#: The latest time that ClickHouse's DateTime holds, in the year 2106.
LATEST = 2**32 - 1
#: The largest message of Kafka by default; librdkafka counts 36 bytes of its own,
#: and OpenMeter's three headers have about 110.
MESSAGE = 1_000_000
MESSAGE_OVERHEAD = 36 + 110
#: Bytes that a character can become in the message: ``<`` is ``\\\\u003c`` there.
_GROWTH = 7
#: Status codes that the request causes; others are simulated faults.
REFUSALS = range(400, 429)

routes: Final = Blueprint("ingest", __name__)


class InvalidEvent(ValueError):
    """An event that passes the schema but not the CloudEvents SDK.

    :param reason: the text that the page adds to OpenMeter's message.
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
    here = context()
    faults = here.faults.ingest
    here.tally.add(requests=1)
    try:
        faults.check()
        _ingest(here, faults.draw(), v3=v3)
    except Problem as problem:
        _explain(here, problem)
        raise
    finally:
        delay(faults)
    return Response(status=202 if v3 else 204)


def _explain(here: Context, problem: Problem) -> None:
    """Count a request that is answered with an error, and remember its events."""
    refused = problem.status in REFUSALS
    if refused:
        here.tally.refuse(problem.reason)
    else:
        here.tally.add(failed=1)
    outcome = Outcome.REFUSED if refused else Outcome.FAILED
    reason = f"answered {problem.status}: {problem.reason}"
    body = request.get_data()
    here.store.reject(rejected_events(body, outcome, reason, problem.position))


def _ingest(here: Context, fault: str | None, *, v3: bool) -> None:
    if fault == "before":
        raise Problem(500, reason="on purpose, before anything was stored")
    events = accept(now=int(here.store.clock()), v3=v3)
    # OpenMeter sends one event after the other to Kafka, until the first that it cannot
    # send; events before that one are stored, whatever it then answers.
    flaws = [(n, why) for n, event in enumerate(events) if (why := _unsendable(event))]
    whole, flaw = flaws[0] if flaws else (len(events), None)
    _meet_faults(here, events)
    if here.faults.ingest.settings.forget:
        reason = "answered 204 and forgotten, on purpose"
        body = request.get_data()
        here.store.reject(rejected_events(body, Outcome.DROPPED, reason))
        return
    added = here.store.add(events[:whole])
    here.tally.add(received=whole, **added)
    if flaw is not None:
        reason = f"{flaw}; the events before were taken"
        raise Problem(500, reason=reason, position=whole + 1)
    if fault == "after":
        raise Problem(500, reason="on purpose, after the events were taken")


def _meet_faults(here: Context, events: list[Event]) -> None:
    """Apply the faults for refused types and subjects, and for claimed ids."""
    settings = here.faults.ingest.settings
    for position, event in enumerate(events, 1):
        for name, given in (("type", event.type), ("subject", event.subject)):
            if given == getattr(settings, f"refused_{name}"):
                detail = f"the {name} {given!r} is refused, on purpose"
                raise Problem(400, detail, position=position)
    if settings.claim:
        here.store.claim(events)
        raise Problem(500, reason="on purpose, after the ids were remembered")


def accept(*, now: int, v3: bool) -> list[Event]:
    """Return the events of the request, or raise the problem OpenMeter answers with.

    :param now: the time of an event that has none, in Unix seconds.
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
        # Two schemas could match. OpenMeter gives no reason why neither does; the page
        # of the sandbox gives one.
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
        # For application/json OpenMeter throws the reason away, in version 3 always.
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
    """Return the event in *document*, which has passed the schema.

    :param now: its time where it names none, in Unix seconds.
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
    """Raise the SDK's errors; the values that it accepts are discarded later."""
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
    """Return the data as JSON, and whether it is none."""
    if "data_base64" in document:
        return _base64(document)
    if "data" not in document:
        return None, False
    return _json(document["data"]), False


def _base64(document: Document) -> tuple[str | None, bool]:
    names = list(document)
    encoded = document["data_base64"]
    # The SDK reads the attributes in the order of the document. Before it knows the
    # content type it keeps the text as it stands, with its quotation marks.
    known = "datacontenttype" in names[: names.index("data_base64")]
    if not known or "data" in document or not isinstance(encoded, str):
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
    # Go writes the keys of a map in order, and nothing between the parts.
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
    """Return JSON *text* with the characters escaped that Go escapes for browsers."""
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2}).{0,2}", re.DOTALL)
_VALID = re.compile(r"[A-Za-z0-9_.~!$&'()*+,;=:@/\[\]%-]*")
_SAFE = "$&+,/:;=@"


def reencode(reference: str) -> str:
    """Return the URI *reference* the way Go writes it after parsing it.

    CloudEvents sources pass through ``url.Parse`` in OpenMeter, which refuses names
    that look innocent (``127.0.0.1:8080``) and re-encodes others (``my api``).
    """
    if any(ch < " " or ch == "\x7f" for ch in reference):
        raise _invalid(reference, "net/url: invalid control character in URL")
    rest, hash_, fragment = reference.partition("#")
    scheme, rest = _split_scheme(reference, rest)
    path, mark, query = rest.partition("?")
    if scheme and not path.startswith("/"):
        # Go calls this opaque (urn:x:y) and keeps it as it is.
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
    if found := _SCHEME.match(rest):
        return found[1], rest[found.end() :]
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
    # Go leaves out an authority without a host, and the two slashes with it.
    return f"//{host}" if host or slash else "", slash + path


def _escape(reference: str, part: str) -> str:
    if bad := _ESCAPE.search(part):
        raise _invalid(reference, f'invalid URL escape "{bad[0]}"')
    if _VALID.fullmatch(part):
        return part
    return quote(unquote(part), safe=_SAFE)
