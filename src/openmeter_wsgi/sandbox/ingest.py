"""Taking events in, with OpenMeter's order of checks and all its peculiarities."""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from flask import Blueprint, Response, request
from werkzeug.http import parse_options_header

from openmeter_wsgi.sandbox.context import context
from openmeter_wsgi.sandbox.faults import Fault
from openmeter_wsgi.sandbox.protocol import (
    PREFIX,
    Flaw,
    Problem,
    Schema,
    check,
    number,
    parse,
    parse_time,
    require,
    well_formed,
)
from openmeter_wsgi.sandbox.store import Event, Outcome, rejected_events

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.context import Context, Tally
    from openmeter_wsgi.sandbox.store import Store

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2}).{0,2}", re.DOTALL)
_VALID = re.compile(r"[A-Za-z0-9_.~!$&'()*+,;=:@/\[\]%-]*")
_SAFE = "$&+,/:;=@"


class InvalidURI(ValueError):
    """A text that Go does not take for a URI reference."""


def reencode(reference: str) -> str:
    """Return *reference* the way Go writes it after parsing it."""
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


def _invalid(reference: str, reason: str) -> InvalidURI:
    return InvalidURI(f'parse "{reference}": {reason}')


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
    return f"//{host}", slash + path


def _escape(reference: str, part: str) -> str:
    if bad := _ESCAPE.search(part):
        raise _invalid(reference, f'invalid URL escape "{bad[0]}"')
    if _VALID.fullmatch(part):
        return part
    return quote(unquote(part), safe=_SAFE)


ATTRIBUTES = frozenset(
    (
        "id", "source", "specversion", "type", "subject", "time",
        "data", "data_base64", "datacontenttype", "dataschema",
    )
)  # fmt: skip
INT32 = range(-(2**31), 2**31)


class InvalidEvent(ValueError):
    """An event that passes the schema but not the CloudEvents SDK."""


def decode(document: dict[str, Any], now: int) -> Event:
    """Return the event in *document*, which has passed the schema.

    :param now: its time where it names none, in Unix seconds.
    """
    version = document["specversion"]
    if version not in ("1.0", "0.3"):
        raise InvalidEvent(f"specversion: unknown value: {version}")
    try:
        source = reencode(well_formed(document["source"]))
    except InvalidURI as error:
        raise InvalidEvent(f"cannot parse uri ref: {error}") from None
    for name in document.keys() - ATTRIBUTES:
        _check_extension(name, document[name])
    data, broken = _data(document)
    return Event(
        id=well_formed(document["id"]),
        source=source,
        type=well_formed(document["type"]),
        subject=well_formed(document["subject"]),
        time=_seconds(document.get("time"), now),
        data=data,
        broken=broken,
    )


def _check_extension(name: str, value: Any) -> None:
    """Refuse what the SDK refuses; what it takes is thrown away one step later."""
    if not re.fullmatch("[A-Za-z0-9]+", name):
        raise InvalidEvent(
            f"bad key, CloudEvents attribute names MUST consist of lower-case letters "
            f"('a' to 'z'), upper-case letters ('A' to 'Z') or digits "
            f"('0' to '9') from the ASCII character set: {name}"
        )
    if isinstance(value, dict | list):
        raise InvalidEvent(f"invalid CloudEvents value for extension {name}")
    if isinstance(value, int | float) and int(value) not in INT32:
        raise InvalidEvent(f"cannot convert {value} to int32: out of range")


def _seconds(moment: str | None, now: int) -> int:
    if moment is None:
        return now
    try:
        return parse_time(moment)
    except ValueError:
        reason = f'cannot convert "{moment}" to time.Time: not in RFC3339 format'
        raise InvalidEvent(reason) from None


def _data(document: dict[str, Any]) -> tuple[str | None, bool]:
    if encoded := document.get("data_base64"):
        return _base64(encoded)
    if document.get("data") is None:
        return None, False
    # Go writes the keys of a map in order.
    text = json.dumps(document["data"], sort_keys=True, ensure_ascii=False)
    return well_formed(text), False


def _base64(encoded: object) -> tuple[str | None, bool]:
    try:
        content = base64.b64decode(str(encoded), validate=True)
    except binascii.Error as error:
        raise InvalidEvent(f"illegal base64 data: {error}") from None
    try:
        document = json.loads(content, parse_int=number, parse_float=number)
    except (ValueError, RecursionError, Problem):
        return None, True
    return well_formed(json.dumps(document, sort_keys=True, ensure_ascii=False)), False


SINGLE = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"
EITHER = "application/json"
_TEXT: Schema = {"type": "string", "minLength": 1}
#: Anything but null: OpenAPI 3.0 allows null only where a schema says nullable.
_ANY: Schema = {}
EVENT: Schema = {
    "type": "object",
    "required": ["id", "source", "specversion", "type", "subject"],
    "properties": {
        "id": _TEXT,
        "source": _TEXT,
        "specversion": _TEXT,
        "type": _TEXT,
        "subject": _TEXT,
        "time": {"type": "string", "nullable": True, "format": "date-time"},
        "data": {"type": "object", "nullable": True, "additionalProperties": _ANY},
        "datacontenttype": {"type": "string", "nullable": True, "enum": [EITHER]},
        "dataschema": _TEXT | {"nullable": True},
    },
}
#: v3 knows the same attributes and no others.
EVENT_V3: Schema = EVENT | {"additionalProperties": False}
#: Answers that say something of the request; the others are faults on purpose.
REFUSALS = range(400, 429)

routes = Blueprint("ingest", __name__)


def _answer(*, v3: bool) -> Response:
    here = context()
    faults = here.faults.ingest
    here.tally.add(requests=1)
    try:
        faults.check()
        _ingest(here.store, here.tally, faults.draw(), v3=v3)
    except Problem as problem:
        _explain(here, problem)
        raise
    finally:
        faults.delay()
    # Without a content type, as an answer without content should be.
    response = Response(status=202 if v3 else 204)
    del response.headers["Content-Type"]
    return response


def _explain(here: Context, problem: Problem) -> None:
    """Count a request that is answered with an error, and remember what it held."""
    refused = problem.status in REFUSALS
    if refused:
        here.tally.refuse(problem.reason)
    else:
        here.tally.add(failed=1)
    outcome = Outcome.REFUSED if refused else Outcome.FAILED
    reason = f"answered {problem.status}: {problem.reason}"
    body = request.get_data()
    here.store.reject(rejected_events(body, outcome, reason, problem.position))


@routes.post("/api/v1/events")
def _ingest_v1() -> Response:
    return _answer(v3=False)


@routes.post("/api/v3/openmeter/events")
@routes.post("/v3/openmeter/events")
def _ingest_v3() -> Response:
    return _answer(v3=True)


def _ingest(store: Store, tally: Tally, fault: Fault | None, *, v3: bool) -> None:
    if fault is Fault.BEFORE:
        raise Problem(500, reason="on purpose, before anything was stored")
    content_type = request.headers.get("Content-Type", "")
    body = request.get_data()
    events = accept(body, content_type, now=int(store.clock()), v3=v3)
    # OpenMeter takes one event after the other until the first that it cannot
    # serialize; what stands before that is taken, whatever it then answers.
    whole = next((n for n, event in enumerate(events) if event.broken), len(events))
    added = store.add(events[:whole])
    tally.add(received=whole, **added._asdict())
    if whole < len(events):
        reason = "data_base64 holds no JSON; the events before were taken"
        raise Problem(500, reason=reason, position=whole + 1)
    if fault is Fault.AFTER:
        raise Problem(500, reason="on purpose, after the events were taken")


def accept(body: bytes, content_type: str, *, now: int, v3: bool) -> list[Event]:
    """Return the events in *body*, or raise the problem OpenMeter answers with.

    :param now: the time of an event that has none, in Unix seconds.
    """
    require(body)
    kind = (
        parse_options_header(content_type)[0] if ";" in content_type else content_type
    )
    if kind not in (SINGLE, BATCH, EITHER):
        reason = f'header Content-Type has unexpected value "{content_type}"'
        raise Problem(400, PREFIX + reason)
    document = parse(body)
    _check_schema(document, kind, EVENT_V3 if v3 else EVENT)
    if not v3 and kind != content_type:
        # The v1 handler compares the whole header, parameters included.
        raise Problem(400, f"invalid content type: {content_type}")
    return _decode(document, kind, now)


def _check_schema(document: Any, kind: str, event: Schema) -> None:
    several = isinstance(document, list) if kind == EITHER else kind == BATCH
    schema = {"type": "array", "items": event} if several else event
    flaw = check(schema, document)
    if flaw is None:
        return
    position = flaw.pointer.split("/")[1:2]
    if kind == EITHER:
        # Two schemas could match and OpenMeter does not say why neither does; the
        # page of the sandbox does.
        reason = str(flaw)
        flaw = Flaw("", "anyOf", 'doesn\'t match any schema from "anyOf"')
        name = " #/components/schemas/IngestEventsBody"
    else:
        reason = str(flaw)
        name = "" if several else " #/components/schemas/Event"
    detail = f"{PREFIX}doesn't match schema{name}: {flaw}"
    culprit = int(position[0]) + 1 if several and position else None
    raise Problem(400, detail, flaw=flaw, reason=reason, position=culprit)


def _decode(document: Any, kind: str, now: int) -> list[Event]:
    several = isinstance(document, list)
    events: list[Event] = []
    try:
        for item in document if several else [document]:
            events.append(decode(item, now))  # noqa: PERF401
    except InvalidEvent as error:
        # For application/json OpenMeter throws the reason away.
        detail = "no events found" if kind == EITHER else str(error)
        raise Problem(
            400,
            f"invalid event: {detail}",
            reason=f"invalid event: {error}",
            position=len(events) + 1 if several else None,
        ) from None
    if not events and kind == EITHER:
        raise Problem(400, "invalid event: no events found")
    return events
