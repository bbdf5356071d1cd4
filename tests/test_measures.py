"""Every measure, whichever way the response ends, from the policy to the event."""

from __future__ import annotations

import io
import json
import re
import tracemalloc
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bottle
import flask
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.wsgi import get_input_stream

from bodies import LLM_NAMES, in_steps, llm_body, llm_expected, media_type_of
from openmeter_wsgi import (
    ConfigError,
    OpenMeterMiddleware,
    Policy,
    bytes_received,
    bytes_sent,
    computed,
    duration,
    llm_usage,
    method,
    multi_status,
    records,
    request_header,
    response_header,
    response_json,
    route,
    set_meters,
    set_route,
    status,
)
from openmeter_wsgi.bodies.base import Unknown
from openmeter_wsgi.bodies.llm_shapes import FIELDS, PLACES, PROVIDERS
from openmeter_wsgi.log import PREFIX
from openmeter_wsgi.measures import Measure, as_number, read_measure
from servers import Consumer, make_environ

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_server import OpenMeterServer

Environ = dict[str, Any]

PLAIN = [b"aaaa", b"bb", b"c"]
JSON = [b'{"n"', b': 5, "list": [1, 2],', b' "text": "t"}']
LINES = [b'{"a": 1}\n', b'{"a": 2}\n', b'{"a": 3}\n']
PARTS = [b'[{"status": 200},', b' {"status": 404},', b' {"status": 201}]']
USAGE = '{"prompt_tokens": 1, "completion_tokens": %d, "total_tokens": %d}'
EVENTS = [
    f'data: {{"model": "m", "usage": {USAGE % (n, n + 1)}}}\n\n'.encode()
    for n in (2, 6, 8)
]
OF_THE_LAST = {
    "provider": "openai", "model": "m",
    "input_tokens": 1, "output_tokens": 8, "total_tokens": 9,
}  # fmt: skip
OF_THE_FIRST = {**OF_THE_LAST, "output_tokens": 2, "total_tokens": 3}
#: To its end as a list, as a generator; cut by the client and broken by the
#: application after the first chunk; of HEAD. None: it has no value, so no event.
ENDS = ("list", "generator", "cut", "broken", "HEAD")
MEASURES: dict[str, tuple[Measure, list[bytes], list[Any]]] = {
    "bytes_sent": (bytes_sent(), PLAIN, [7, 7, 4, 4, 0]),
    "bytes_received": (bytes_received(), PLAIN, [5, 5, 5, 5, 5]),
    "status": (status(), PLAIN, [200] * 5),
    "method": (method(), PLAIN, ["GET"] * 4 + ["HEAD"]),
    "route": (route(), PLAIN, ["/users/<id>"] * 5),
    "request_header": (request_header("X-Size"), PLAIN, ["12"] * 5),
    "response_header": (response_header("x-tokens"), PLAIN, ["34"] * 5),
    "response_json": (response_json("$.n"), JSON, [5, 5, None, None, None]),
    "response_json of several": (
        response_json("$.list[*]"), JSON, [3, 3, None, None, None],
    ),
    "records": (records(), LINES, [3, 3, 1, 1, 0]),
    "llm_usage": (
        llm_usage(), EVENTS,
        [OF_THE_LAST, OF_THE_LAST, OF_THE_FIRST, OF_THE_FIRST, None],
    ),
    "llm_usage of a field": (llm_usage("total_tokens"), EVENTS, [9, 9, 3, 3, None]),
    "multi_status": (multi_status(), PARTS, [2, 2, 1, 1, None]),
    "multi_status, failed": (multi_status("failed"), PARTS, [1, 1, 0, 0, None]),
    "computed": (computed(lambda e: e.bytes_sent * 2), PLAIN, [14, 14, 8, 8, 0]),
    "computed of the body": (
        computed(lambda e: e.json["n"] + 1, "json"), JSON, [6, 6, None, None, None],
    ),
    "computed of the outcome": (
        computed(lambda e: e.outcome), PLAIN,
        ["completed", "completed", "aborted", "failed", "completed"],
    ),
}  # fmt: skip
CASES = [(name, end) for name in MEASURES for end in ENDS]


def answering(
    chunks: list[bytes], end: str = "generator", content_type: str = "text/plain"
) -> WSGIApplication:
    """Return an application that answers with *chunks*, which end so."""

    def stream() -> Iterator[bytes]:
        for chunk in chunks:
            yield chunk
            if end == "broken":
                raise ValueError("the database went away")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        set_route(environ, "/users/<id>")
        headers = [("Content-Type", content_type), ("X-Tokens", "34")]
        start_response("200 OK", headers)
        return list(chunks) if end in {"list", "HEAD"} else stream()

    return app


def request_that(end: str) -> Environ:
    return make_environ(
        "HEAD" if end == "HEAD" else "GET", CONTENT_LENGTH="5", HTTP_X_SIZE="12",
        **{"wsgi.input": io.BytesIO(b"hello")},
    )  # fmt: skip


def consumer_that(end: str) -> Consumer:
    return Consumer(stop_after=2 if end == "cut" else None)


def billed(
    openmeter: OpenMeterServer,
    app: WSGIApplication,
    *,
    environ: Environ | None = None,
    consumer: Consumer | None = None,
    **options: Any,
) -> tuple[list[Any], dict[str, int]]:
    """Serve one request; return the data of its events, and the unmetered counts."""
    middleware = OpenMeterMiddleware(
        app, api_url=openmeter.url, flush_interval=60, **options
    )
    (consumer or Consumer()).serve(middleware, environ or make_environ())
    not_metered = middleware.stats().not_metered
    middleware.close(40)
    return [event["data"] for event in openmeter.taken], not_metered


# -- Each measure, each end


@pytest.mark.parametrize(("name", "end"), CASES)
def test_a_measure_is_what_was_delivered(
    openmeter: OpenMeterServer, name: str, end: str
) -> None:
    measure, chunks, expected = MEASURES[name]
    value = expected[ENDS.index(end)]

    data, not_metered = billed(
        openmeter,
        answering(chunks, end),
        environ=request_that(end),
        consumer=consumer_that(end),
        meter={"type": "t", "data": {"value": measure}},
        on_failure="all",
    )

    assert data == ([] if value is None else [{"value": value}])
    assert sum(not_metered.values()) == (value is None)


@pytest.mark.parametrize(("name", "end"), CASES)
def test_the_response_is_the_bare_applications(name: str, end: str) -> None:
    measure, chunks, _ = MEASURES[name]
    app = answering(chunks, end)
    meter = {"type": "t", "data": {"value": measure}}
    metered = OpenMeterMiddleware(app, dry_run=True, meter=meter)

    def seen(served: WSGIApplication) -> list[object]:
        consumer = consumer_that(end).serve(served, request_that(end))
        return [
            consumer.status, consumer.headers, consumer.body, consumer.length,
            consumer.exhausted, repr(consumer.raised),
        ]  # fmt: skip

    assert seen(metered) == seen(app)


def test_a_duration_lasts_from_the_request_to_its_end(
    openmeter: OpenMeterServer,
) -> None:
    data, _ = billed(
        openmeter,
        answering(PLAIN),
        meter={"type": "t", "data": {"seconds": duration()}},
    )

    assert 0 < data[0]["seconds"] < 60


def test_a_number_by_type_can_be_a_measure(openmeter: OpenMeterServer) -> None:
    data, _ = billed(openmeter, answering(PLAIN), meters={"bytes": bytes_sent()})

    assert data == [{"total": 7}]


def test_a_stream_that_is_cut_by_a_server_that_keeps_its_iterator_is_billed(
    openmeter: OpenMeterServer,
) -> None:
    # As uWSGI does: it closes the response first and drops the iterator after that.
    middleware = OpenMeterMiddleware(
        answering(PLAIN), api_url=openmeter.url, meters={"bytes": bytes_sent()}
    )
    response: Any = middleware(make_environ(), lambda *_: lambda data: None)
    iterator = iter(response)
    taken = [next(iterator), next(iterator)]
    response.close()
    middleware.close(40)

    assert taken == PLAIN[:2]
    assert [event["data"] for event in openmeter.taken] == [{"total": 4}]


def test_what_was_written_and_what_was_returned_is_one_body(
    openmeter: OpenMeterServer,
) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])(LINES[0])
        return LINES[1:]

    data, _ = billed(openmeter, app, meters={"a": bytes_sent(), "b": records()})

    assert data == [{"total": 27}, {"total": 3}]


def test_by_default_a_broken_stream_bills_quantities_and_no_kinds(
    openmeter: OpenMeterServer,
) -> None:
    data, _ = billed(
        openmeter,
        answering(PLAIN, "broken"),
        meter=[
            {"type": "kind", "data": {"method": method(), "status": status()}},
            {"type": "quantity", "data": {"bytes": bytes_sent(), "of": method()}},
        ],
        meters={"flat": 1},
    )

    assert data == [{"bytes": 4, "of": "GET"}]


# -- The body of the request


@pytest.mark.parametrize("readinto", [True, False])
def test_a_body_of_unstated_length_is_counted_as_it_is_read(
    openmeter: OpenMeterServer, readinto: bool
) -> None:
    read = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        # werkzeug takes readinto where a stream has it.
        stream = get_input_stream(environ, max_content_length=10_000)
        read.append(stream.read())
        start_response("200 OK", [])
        return [b"ok"]

    body: Any = io.BytesIO(b"x" * 5_000) if readinto else _Body(b"x" * 5_000)
    environ = make_environ(
        "POST", HTTP_TRANSFER_ENCODING="chunked",
        **{"wsgi.input": body, "wsgi.input_terminated": True},
    )  # fmt: skip
    data, _ = billed(
        openmeter, app, environ=environ, meters={"received": bytes_received()}
    )

    assert read == [b"x" * 5_000]
    assert data == [{"total": 5_000}]


class _Body:
    """A request body with only the methods that PEP 3333 requires."""

    def __init__(self, content: bytes) -> None:
        body = io.BytesIO(content)
        self.read = body.read
        self.readline = body.readline
        self.readlines = body.readlines

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")


READS: dict[str, Callable[[Any], bytes]] = {
    "at once": lambda body: body.read(),
    "in parts": lambda body: body.read(3) + body.read(),
    "by lines": lambda body: body.readline() + body.readline(2) + body.read(),
    "all lines": lambda body: b"".join(body.readlines()),
    "iterated": b"".join,
}


@pytest.mark.parametrize("how", READS)
def test_however_a_body_is_read_it_is_counted(
    openmeter: OpenMeterServer, how: str
) -> None:
    seen = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(READS[how](environ["wsgi.input"]))
        start_response("200 OK", [])
        return [b"ok"]

    environ = make_environ(
        "POST", HTTP_TRANSFER_ENCODING="chunked", **{"wsgi.input": _Body(b"a\nbcd\ne")}
    )
    data, _ = billed(
        openmeter, app, environ=environ, meters={"received": bytes_received()}
    )

    assert seen == [b"a\nbcd\ne"]
    assert data == [{"total": 7}]


@pytest.mark.parametrize(
    "said",
    [
        {"SERVER_PROTOCOL": "HTTP/2", "wsgi.input_terminated": True},
        {"SERVER_PROTOCOL": "HTTP/2.0"},  # to an application that reads to the end
        {"wsgi.input_terminated": True},
        {"CONTENT_LENGTH": ""},
    ],
)
def test_a_body_without_length_is_what_the_application_read(
    openmeter: OpenMeterServer, said: dict[str, Any]
) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        environ["wsgi.input"].read(3)
        start_response("200 OK", [])
        return [b"ok"]

    environ = make_environ("POST", **{"wsgi.input": io.BytesIO(b"hello"), **said})
    data, _ = billed(
        openmeter, app, environ=environ, meters={"received": bytes_received()}
    )

    assert data == [{"total": 3}]


def test_a_body_of_stated_length_is_not_touched(openmeter: OpenMeterServer) -> None:
    body = io.BytesIO(b"hello")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        assert environ["wsgi.input"] is body
        start_response("200 OK", [])
        return [b"ok"]

    environ = make_environ("POST", CONTENT_LENGTH="5", **{"wsgi.input": body})
    data, _ = billed(
        openmeter, app, environ=environ, meters={"received": bytes_received()}
    )

    assert (data, body.tell()) == ([{"total": 5}], 0)


# -- The route


def test_the_route_of_flask_is_its_rule(openmeter: OpenMeterServer) -> None:
    app = flask.Flask(__name__)
    rule = "/users/<int:user>/books"
    app.add_url_rule(rule, view_func=lambda user: iter(["a", "b"]))

    data, _ = billed(
        openmeter,
        app.wsgi_app,
        environ=make_environ(PATH_INFO="/users/7/books"),
        meter={"type": "t", "data": {"route": route(), "bytes": bytes_sent()}},
    )

    assert data == [{"route": rule, "bytes": 2}]


def of_flask() -> Any:
    app = flask.Flask(__name__)
    app.add_url_rule("/users/<int:user>", view_func=lambda user: "x")
    return app


def of_bottle() -> Any:
    app = bottle.Bottle()
    app.get("/users/<user:int>", callback=lambda user: "x")
    return app


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("make", "rule"), [
    (of_flask, "/users/<int:user>"), (of_bottle, "/users/<user:int>"),
])  # fmt: skip
def test_a_route_begins_with_the_mount_of_its_application(
    openmeter: OpenMeterServer, make: Callable[[], Any], rule: str, late: bool
) -> None:
    mounted = DispatcherMiddleware(make(), {"/v1": make(), "/v2/caf\xc3\xa9": make()})

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        # Something in between may copy the environ.
        return mounted(dict(environ) if late else environ, start_response)

    middleware = OpenMeterMiddleware(
        app, api_url=openmeter.url, flush_interval=60,
        meter={"type": "t", "data": {"route": route()}},
    )  # fmt: skip
    for path in ("/users/1", "/v1/users/1", "/v2/caf\xc3\xa9/users/1"):
        Consumer().serve(middleware, make_environ(PATH_INFO=path))
    Consumer().serve(middleware, make_environ(PATH_INFO="/users/1", SCRIPT_NAME="/x/"))
    middleware.close(40)

    routes = [event["data"]["route"] for event in openmeter.taken]
    assert routes == [mount + rule for mount in ("", "/v1", "/v2/café", "/x")]


def test_a_path_that_flask_does_not_know_has_no_route(
    openmeter: OpenMeterServer,
) -> None:
    data, not_metered = billed(
        openmeter,
        flask.Flask(__name__).wsgi_app,
        environ=make_environ(PATH_INFO="/users/7"),
        meter={"type": "t", "data": {"route": route()}},
        meter_on_status_codes="404",
    )

    assert (data, not_metered) == ([], {"no_value_none": 1})


# -- No value


def test_what_has_no_value_is_counted_by_its_reason_and_the_rest_is_billed(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    middleware = OpenMeterMiddleware(
        answering([b"<html>"]),
        api_url=openmeter.url,
        meters={"requests": 1, "tokens": llm_usage("total_tokens")},
    )
    for _ in range(3):
        Consumer().serve(middleware, make_environ())
    stats = middleware.stats()
    middleware.close(40)

    assert [event["type"] for event in openmeter.taken] == ["requests"] * 3
    assert stats.dropped == {"no_value_not_json": 3}
    assert stats.not_metered == {}
    warnings = [
        r.getMessage().removeprefix(PREFIX)
        for r in caplog.records
        if "no value" in r.msg
    ]
    assert warnings == [
        "GET /users/<id>, meter 'tokens': $llm.total_tokens has no value (not_json), "
        "so it is not billed; logged once, then counted as no_value_not_json"
    ]


@pytest.mark.parametrize(
    ("short", "path"),
    [("usage.total", ".usage.total"), ("[0].total", "[0].total"), ("a", ".a")],
)
def test_the_dollar_of_a_jsonpath_may_be_left_out(short: str, path: str) -> None:
    assert repr(response_json(short)) == f"$response.json{path}"
    assert repr(response_json(f"${path}")) == f"$response.json{path}"


def test_each_meter_of_a_route_is_warned_of(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    middleware = OpenMeterMiddleware(
        answering([b"<html>"]),
        api_url=openmeter.url,
        meters={"in": llm_usage("input_tokens"), "out": llm_usage("output_tokens")},
    )
    for _ in range(2):
        Consumer().serve(middleware, make_environ())
    middleware.close(40)

    warnings = [r.getMessage() for r in caplog.records if "no value" in r.msg]
    assert [re.findall(r"meter '(\w+)'", line) for line in warnings] == [
        ["in"], ["out"],
    ]  # fmt: skip


def test_each_route_is_warned_of_once_and_head_takes_no_warning_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        set_route(environ, environ["PATH_INFO"])
        start_response("200 OK", [])
        return [b"data: {}\n\n"]

    middleware = OpenMeterMiddleware(
        app, dry_run=True, meters={"tokens": llm_usage("total_tokens")}
    )
    for method_, path in [("HEAD", "/a"), ("GET", "/a"), ("GET", "/b"), ("GET", "/a")]:
        Consumer().serve(middleware, make_environ(method_, PATH_INFO=path))

    warned = [r.getMessage().removeprefix(PREFIX).split(",")[0] for r in caplog.records]
    assert warned == ["HEAD /a", "GET /a", "GET /b"]
    assert middleware.stats().not_metered == {"no_value_no_usage": 4}


def test_a_default_stands_for_a_missing_value(openmeter: OpenMeterServer) -> None:
    data, not_metered = billed(
        openmeter,
        answering(PLAIN),
        meter={
            "type": "t",
            "data": {
                "a": response_header("X-None").default(0),
                "b": "$llm.model ?? null",
            },
        },
    )

    assert (data, not_metered) == ([{"a": 0}], {})


def test_zero_is_a_value_and_no_event(openmeter: OpenMeterServer) -> None:
    data, not_metered = billed(
        openmeter, answering([b""]), meters={"bytes": bytes_sent()}
    )

    assert (data, not_metered) == ([], {"no_usage": 1})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("-1", "invalid"),
        ("many", "not_a_number"),
        ("nan", "not_a_number"),
        ("", "not_a_number"),
        # Python reads these as numbers, HTTP does not.
        ("1_000", "not_a_number"),
        ("\u0661\u0662", "not_a_number"),
        ("\xa012", "not_a_number"),
        ("12\x0b", "not_a_number"),
        ("+", "not_a_number"),
        ("1e" + "9" * 30, "not_a_number"),
        ("1e999999999999", "invalid"),
        ("9" * 6_000, "invalid"),
    ],
)
def test_a_header_that_is_no_amount_is_not_billed(
    openmeter: OpenMeterServer, text: str, reason: str
) -> None:
    data, not_metered = billed(
        openmeter,
        answering(PLAIN),
        environ=make_environ(HTTP_X_SIZE=text),
        meters={"size": request_header("X-Size")},
    )

    assert (data, not_metered) == ([], {f"no_value_{reason}": 1})


@pytest.mark.parametrize(
    ("text", "total"),
    [("12", 12), (" 12\t", 12), ("1.5", "1.5"), ("2e3", 2000), ("12.0", 12),
     ("+7", 7), (".5", "0.5"), ("5.", 5), (str(2**70), str(2**70))],
)  # fmt: skip
def test_a_header_that_is_an_amount_arrives_exact(
    openmeter: OpenMeterServer, text: str, total: object
) -> None:
    data, _ = billed(
        openmeter,
        answering(PLAIN),
        environ=make_environ(HTTP_X_SIZE=text),
        meters={"size": request_header("X-Size")},
    )

    assert data == [{"total": total}]


def test_what_a_callable_raises_costs_its_meter_alone(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(exchange: Any) -> int:
        raise KeyError("credits")

    data, _ = billed(
        openmeter, answering(PLAIN), meters={"requests": 1, "c": computed(broken)}
    )

    assert data == [{"total": 1}]
    assert "computed(broken): raised KeyError('credits')" in caplog.text


def test_a_callable_that_looks_at_a_body_nobody_reads_is_told_how(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    data, _ = billed(
        openmeter, answering(JSON), meters={"n": computed(lambda e: e.json["n"])}
    )

    assert data == []
    assert "write computed(function, 'json')" in caplog.text


# -- Language models


@pytest.mark.parametrize("name", LLM_NAMES)
def test_what_a_provider_reports_is_billed_of_a_stream(
    openmeter: OpenMeterServer, name: str
) -> None:
    expected = llm_expected(name)
    data, not_metered = billed(
        openmeter,
        answering(in_steps(llm_body(name), 37), content_type=media_type_of(name)),
        meter={"type": "llm", "data": llm_usage()},
    )

    if isinstance(expected, Unknown):
        assert (data, not_metered) == ([], {f"no_value_{expected.reason}": 1})
    else:
        known = {k: getattr(expected, k) for k in FIELDS}
        assert data == [{k: v for k, v in known.items() if v is not None}]


@pytest.mark.parametrize(
    "name", ["openai_responses_completed.sse", "anthropic_stream.sse"]
)
def test_a_stream_cut_at_any_byte_bills_what_it_last_reported(name: str) -> None:
    body = llm_body(name)
    seen: list[Any] = []
    middleware = OpenMeterMiddleware(
        lambda environ, start_response: _streamed(environ, start_response, body),
        dry_run=True,
        meters={"t": computed(lambda e: seen.append(e.llm), "llm")},
    )
    for at in range(len(body) + 1):
        Consumer(stop_after=2).serve(middleware, make_environ(cut=at))

    known = [0 if isinstance(u, Unknown) else u.output_tokens or 0 for u in seen]
    assert len(seen) == len(body) + 1
    assert known == sorted(known)
    assert seen[-1] == llm_expected(name)


def _streamed(
    environ: Environ, start_response: StartResponse, body: bytes
) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/event-stream")])
    return iter([body[: environ["cut"]], b"more"])


REPORT = {"prompt_tokens": 1_000, "completion_tokens": 500, "total_tokens": 1_500}


def test_several_reports_are_billed_as_the_largest_counted_and_logged(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps({"usage": REPORT, "eval_count": 1}).encode()
    middleware = OpenMeterMiddleware(
        answering([body]), api_url=openmeter.url, flush_interval=60,
        meters={
            "all": llm_usage("total_tokens"),
            "output": llm_usage("output_tokens"),
            "stated": llm_usage("total_tokens", provider="openai"),
            "ollama": llm_usage("output_tokens", provider="ollama"),
        },
    )  # fmt: skip
    for _ in range(3):
        Consumer().serve(middleware, make_environ())
    remarks = middleware.stats().remarks
    middleware.close(40)

    billed_by = {event["type"]: event["data"]["total"] for event in openmeter.taken}
    assert billed_by == {"all": 1_500, "output": 500, "stated": 1_500, "ollama": 1}
    assert remarks == {"ambiguous_usage": 3}
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert line.startswith(
        "openmeter_wsgi: GET /users/<id>: the body holds several reports"
    )
    assert "counted as ambiguous_usage" in line


def test_the_last_of_several_calls_is_billed_and_logged(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    middleware = OpenMeterMiddleware(
        answering([llm_body("openai_two_calls_stream.sse")]),
        api_url=openmeter.url, flush_interval=60,
        meters={"tokens": llm_usage("total_tokens")},
    )  # fmt: skip
    Consumer().serve(middleware, make_environ())
    remarks = middleware.stats().remarks
    middleware.close(40)

    assert [event["data"] for event in openmeter.taken] == [{"total": 27}]
    assert remarks == {"several_calls": 1}
    assert "the body holds several calls of a model; the last one" in caplog.text


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_stated_provider_is_read_alone(provider: Any) -> None:
    body = json.dumps(
        {
            "usageMetadata": {"promptTokenCount": 1, "totalTokenCount": 3},
            "meta": {"tokens": {"input_tokens": 2, "output_tokens": 2}},
            "eval_count": 5,
            "type": "message_start",
            "message": {"usage": {"input_tokens": 3, "output_tokens": 3}},
            "metadata": {"usage": {"totalTokens": 7}, "metrics": {}},
            "usage": {"total_tokens": 8},
        }
    ).encode()
    seen: list[Any] = []
    middleware = OpenMeterMiddleware(
        answering([body]),
        dry_run=True,
        meters={
            "t": computed(
                lambda e: seen.append(e.llm_usage(provider)), f"llm:{provider}"
            )
        },
    )
    Consumer().serve(middleware, make_environ())

    (usage,) = seen
    assert (usage.provider, usage.remarks) == (provider, ())
    assert middleware.stats().remarks == {}


def test_a_gateway_that_adds_a_total_is_read_as_the_stated_provider(
    openmeter: OpenMeterServer,
) -> None:
    usage = {"input_tokens": 20, "output_tokens": 6, "cache_read_input_tokens": 100}
    body = json.dumps({"type": "message", "usage": {**usage, "total_tokens": 26}})

    data, _ = billed(
        openmeter,
        answering([body.encode()]),
        meters={"t": llm_usage("total_tokens", provider="anthropic")},
    )

    assert data == [{"total": 126}]


def test_a_compressed_body_is_counted_as_that(openmeter: OpenMeterServer) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Encoding", "gzip")])
        return [b"\x1f\x8b"]

    data, not_metered = billed(openmeter, app, meter={"type": "l", "data": llm_usage()})

    assert (data, not_metered) == ([], {"no_value_compressed": 1})


def test_a_gigabyte_passes_without_being_held(openmeter: OpenMeterServer) -> None:
    filler = b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % (b"x" * 2**15)
    pieces = 2**30 // len(filler) + 2

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return (filler if n else EVENTS[2] for n in range(pieces))

    middleware = OpenMeterMiddleware(
        app, api_url=openmeter.url, flush_interval=60,
        meters={"tokens": llm_usage("total_tokens"), "bytes": bytes_sent()},
    )  # fmt: skip
    response: Any = middleware(make_environ(), lambda *_: lambda data: None)
    tracemalloc.start()
    try:
        size = sum(map(len, response))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    response.close()
    middleware.close(40)

    assert size > 2**30
    assert peak < 2_000_000
    assert [e["data"]["total"] for e in openmeter.taken] == [9, size]


# -- As text


TEXTS = {
    "$request.method": method(),
    "$request.route": route(),
    "$request.bytes": bytes_received(),
    "$request.header.X-Plan": request_header("X-Plan"),
    "$response.status": status(),
    "$response.bytes": bytes_sent(),
    "$response.duration": duration(),
    "$response.header.X-Tokens": response_header("X-Tokens"),
    "$response.json.usage.total_tokens": response_json("$.usage.total_tokens"),
    "$response.json[0].n": response_json("$[0].n"),
    "$response.json..tokens": response_json("$..tokens"),
    "$response.records": records(),
    "$response.succeeded": multi_status(),
    "$response.failed": multi_status("failed"),
    "$llm": llm_usage(),
    "$llm.model": llm_usage("model"),
    "$llm.cached_input_tokens": llm_usage("cached_input_tokens"),
    "$llm:openai": llm_usage(provider="openai"),
    "$llm:openai.total_tokens": llm_usage("total_tokens", provider="openai"),
    "$response.header.X-N ?? 0": response_header("X-N").default(0),
    '$llm.model ?? "unknown"': llm_usage("model").default("unknown"),
    "$response.json.list[?@.a > 1].n ?? null": response_json(
        "$.list[?@.a > 1].n"
    ).default(None),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_names_a_measure(text: str) -> None:
    made, expected = read_measure(text), TEXTS[text]

    assert isinstance(made, Measure)
    assert repr(made) == repr(expected)
    assert (made.bodies, made.is_quantity) == (expected.bodies, expected.is_quantity)


def test_the_page_on_measures_names_them_all() -> None:
    page = (Path(__file__).parents[1] / "docs" / "measures.md").read_text()
    rows = re.findall(r"^\| `[^|]*\| `(\$[^`]+)` \|", page, re.MULTILINE)
    made = [read_measure(text) for text in rows]

    assert [repr(measure) for measure in made] == rows
    assert {text for text in TEXTS if re.fullmatch(r"\$[a-z]+(\.[a-z]+)?", text)} <= {
        *rows, "$llm.model",
    }  # fmt: skip
    assert all(f"`{field}`" in page for field in FIELDS)


def test_the_page_on_measures_has_every_place_of_a_report() -> None:
    page = (Path(__file__).parents[1] / "docs" / "measures.md").read_text()
    rows = set(
        re.findall(r"^\| `(\w+)` \| `([^`]+)` \| ?([^|]*?) ?\|", page, re.MULTILINE)
    )
    kinds = {
        (provider, way): set(re.findall(r"`([^`]+)`", kind))
        for provider, way, kind in rows
    }

    assert kinds == {
        (place.provider, ".".join(place.report).replace(".*", "[]") or "eval_count"): {
            *place.kind, *filter(None, [place.beside]),
        }
        for place in PLACES
    }  # fmt: skip


def test_a_measure_says_how_it_is_written() -> None:
    assert {repr(read_measure(text)) for text in TEXTS if "??" not in text} == {
        text for text in TEXTS if "??" not in text
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("$response.size", "'$response.size' is no measure; expected one of $request."),
        ("$response.header.", "'$response.header.' is no measure"),
        ("$llm.tokens", "expected one of provider, model, input_tokens"),
        ("$llm:openai.tokens", "expected one of provider, model, input_tokens"),
        ("$llm:acme", "provider: expected one of 'openai', 'anthropic'"),
        ("$llm:acme.total_tokens", "'ollama', 'bedrock', got 'acme'"),
        ("$llm:", "'$llm:' is no measure"),
        ("$response.bytes ?? none", "expected JSON after '??'"),
        ("$response.json.[", "expected a JSONPath"),
        ("$", "'$' is no measure"),
    ],
)
def test_what_names_no_measure_is_refused_with_what_would(
    text: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        Policy(dry_run=True, meter={"type": "t", "data": {"n": text}})

    assert problem in str(refused.value)
    assert str(refused.value).startswith("meter: ")


def test_a_measure_outside_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected measures only in data, got "):
        Policy(dry_run=True, meter={"type": "t", "subject": "$request.header.X"})


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_a_file_says_the_same_as_objects(
    openmeter: OpenMeterServer, tmp_path: Any, ending: str
) -> None:
    meter = {
        "type": "data-transfer",
        "data": {
            "bytes": "$response.bytes", "route": "$request.route", "price": "$$5",
            "n": {"of": ["$response.status"]},
        },
    }  # fmt: skip
    said = {
        "meter": meter,
        "meters": {"calls": 2, "tokens": "$response.header.X-Tokens"},
    }
    file = tmp_path / f"policy.{ending}"
    if ending == "json":
        file.write_text(json.dumps(said))
    else:
        file.write_text(
            '[meter]\ntype = "data-transfer"\n[meter.data]\nbytes = "$response.bytes"\n'
            'route = "$request.route"\nprice = "$$5"\n'
            'n = { of = ["$response.status"] }\n'
            '[meters]\ncalls = 2\ntokens = "$response.header.X-Tokens"\n'
        )
    middleware = OpenMeterMiddleware(
        answering(PLAIN), Policy.from_file(file, api_url=openmeter.url)
    )
    Consumer().serve(middleware, make_environ())
    middleware.close(40)

    assert {event["type"]: event["data"] for event in openmeter.taken} == {
        "calls": {"total": 2},
        "tokens": {"total": 34},
        "data-transfer": {
            "bytes": 7, "route": "/users/<id>", "price": "$5", "n": {"of": [200]},
        },
    }  # fmt: skip


def test_what_a_handler_states_is_no_measure(openmeter: OpenMeterServer) -> None:
    # Run-time text may be a customer's: it is sent as it is.
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        set_meters(environ, {"type": "t", "data": {"text": "$response.bytes"}})
        start_response("200 OK", [])
        return [b"ok"]

    assert billed(openmeter, app, meters={"b": bytes_sent()})[0] == [
        {"total": 2}, {"text": "$response.bytes"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "arguments", "problem"),
    [
        (llm_usage, ("tokens",), "expected one of provider, model"),
        (partial(llm_usage, provider="acme"), (), "provider: expected one of 'openai'"),
        (multi_status, ("half",), "expected 'succeeded' or 'failed', got 'half'"),
        (computed, (len, "xml"), "expected one of 'json', 'llm'"),
        (response_json, ("$[",), "expected a JSONPath"),
    ],
)
def test_a_measure_of_nothing_is_refused_where_it_is_made(
    make: Callable[..., object], arguments: tuple[Any, ...], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        make(*arguments)


# -- Arbitrary requests


ALL = {
    "type": "all",
    "data": {name: m.default(None) for name, (m, _, _) in MEASURES.items()},
}
BILLS_ALL = Policy(
    dry_run=True,
    meter=ALL,
    meter_on_status_codes="100-599",
    meter_when=computed(lambda e: e.json is not None, "json").default(True),
)
_LATIN = st.text(st.characters(max_codepoint=255), max_size=40)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    chunks=st.lists(
        st.binary(max_size=60) | st.sampled_from([*JSON, *LINES, *PARTS, *EVENTS])
    ),
    headers=st.lists(
        st.tuples(
            st.sampled_from(["Content-Type", "content-encoding", "X-Tokens", "A"]),
            _LATIN | st.sampled_from(["text/event-stream", "application/xml", "gzip"]),
        )
    ),
    sent=st.dictionaries(
        st.sampled_from(["CONTENT_LENGTH", "HTTP_X_SIZE", "PATH_INFO"]), _LATIN
    ),
    status_line=st.sampled_from(["200 OK", "207 Multi-Status", "204 ", "999", "x"]),
    end=st.sampled_from(["list", "generator", "cut", "HEAD"]),
)
def test_no_bytes_reach_the_application_as_an_exception(
    chunks: list[bytes],
    headers: list[tuple[str, str]],
    sent: dict[str, str],
    status_line: str,
    end: str,
) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status_line, headers)
        return list(chunks) if end == "list" else iter(chunks)

    middleware = OpenMeterMiddleware(app, BILLS_ALL)
    environ = make_environ("HEAD" if end == "HEAD" else "GET", **sent)
    consumer = consumer_that(end).serve(middleware, environ)

    assert consumer.raised is consumer.raised_by_close is None
    assert consumer.body == (chunks[:2] if end == "cut" else chunks)
    stats = middleware.stats()
    assert stats.events + sum(stats.not_metered.values()) == stats.settled == 1
    assert "error" not in stats.not_metered


@settings(deadline=2_000)  # written out it took minutes
@given(
    text=st.text(max_size=50) | st.from_regex(r"-?\d{1,9}(\.\d+)?([eE][+-]?\d{1,9})?")
)
def test_no_text_makes_a_number_expensive(text: str) -> None:
    number = as_number(text)

    assert isinstance(number, Unknown | int | Decimal)
