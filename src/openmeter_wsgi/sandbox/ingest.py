"""Taking events in, with OpenMeter's order of checks and all its peculiarities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response, request
from werkzeug.http import parse_options_header

from openmeter_wsgi.sandbox import documents
from openmeter_wsgi.sandbox.cloudevent import Event, InvalidEvent, decode
from openmeter_wsgi.sandbox.faults import Fault
from openmeter_wsgi.sandbox.parts import parts
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.schema import Flaw, Schema, check
from openmeter_wsgi.sandbox.turned_away import Outcome, of_request

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.parts import Parts
    from openmeter_wsgi.sandbox.store import Store
    from openmeter_wsgi.sandbox.tally import Tally

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
    here = parts()
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


def _explain(here: Parts, problem: Problem) -> None:
    """Count a request that is answered with an error, and remember what it held."""
    refused = problem.status in REFUSALS
    if refused:
        here.tally.refuse(problem.reason)
    else:
        here.tally.add(failed=1)
    outcome = Outcome.REFUSED if refused else Outcome.FAILED
    reason = f"answered {problem.status}: {problem.reason}"
    body = request.get_data()
    here.store.turn_away(of_request(body, outcome, reason, problem.position))


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
    documents.require(body)
    kind = (
        parse_options_header(content_type)[0] if ";" in content_type else content_type
    )
    if kind not in (SINGLE, BATCH, EITHER):
        reason = f'header Content-Type has unexpected value "{content_type}"'
        raise Problem(400, documents.PREFIX + reason)
    document = documents.parse(body)
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
    detail = f"{documents.PREFIX}doesn't match schema{name}: {flaw}"
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
