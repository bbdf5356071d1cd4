"""A predicate on the finished exchange decides, besides the status."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from billing import usage
from openmeter_wsgi import (
    ConfigError,
    Exchange,
    OpenMeterMiddleware,
    Policy,
    add_meters,
    computed,
    multi_status,
    response_json,
)
from servers import Consumer, make_environ

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_server import OpenMeterServer

Environ = dict[str, Any]

WEBDAV = b"""<?xml version="1.0"?><multistatus xmlns="DAV:">
<response><href>/a</href><status>HTTP/1.1 200 OK</status></response>
<response><href>/b</href><status>HTTP/1.1 423 Locked</status></response>
<response><href>/c</href><propstat><prop/><status>HTTP/1.1 200 OK</status></propstat>
<propstat><prop/><status>HTTP/1.1 404 Not Found</status></propstat></response>
</multistatus>"""


def answering(body: bytes, status: str = "200 OK", *headers: Any) -> WSGIApplication:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, list(headers))
        return iter([body[:5], body[5:]])

    return app


def billed(
    openmeter: OpenMeterServer, app: WSGIApplication, **options: Any
) -> tuple[list[tuple[str, Any]], dict[str, int]]:
    """Serve one request and return its usage and the counts of unmetered requests."""
    options = {"meters": {"calls": 1}, **options}
    middleware = OpenMeterMiddleware(
        app, api_url=openmeter.url, flush_interval=60, **options
    )
    Consumer().serve(middleware, make_environ())
    not_metered = middleware.stats().not_metered
    middleware.close(40)
    return usage(openmeter.taken), not_metered


def without_errors(exchange: Exchange) -> bool:
    return "errors" not in exchange.json


@pytest.mark.parametrize(
    ("body", "is_billed"),
    [
        (b'{"data": {"a": 1}}', True),
        (b'{"data": null, "errors": [{"message": "no"}]}', False),
        (b"<html>", False),
        (b'{"data": {"a": ', False),
        (b"", False),
    ],
)
def test_errors_in_the_body_of_a_200_are_not_billed(
    openmeter: OpenMeterServer, body: bytes, is_billed: bool
) -> None:
    events, not_metered = billed(
        openmeter, answering(body), meter_when=computed(without_errors, "json")
    )

    assert events == ([("calls", {"total": 1})] if is_billed else [])
    assert not_metered == ({} if is_billed else {"meter_when": 1})


def test_a_default_decides_where_the_body_does_not_say(
    openmeter: OpenMeterServer,
) -> None:
    when = computed(without_errors, "json").default(True)

    assert billed(openmeter, answering(b"<html>"), meter_when=when)[1] == {}


@pytest.mark.parametrize(
    ("when", "is_billed"),
    [
        (lambda exchange: exchange.method == "GET", True),
        (lambda exchange: exchange.response_header("X-Cache") != "hit", False),
        (lambda exchange: exchange.outcome == "completed", True),
        (lambda exchange: exchange.bytes_sent > 1_000, False),
        (lambda exchange: exchange.environ["no such key"], False),
        (lambda exchange: None, False),
        (response_json("$.usage.tokens"), True),
        (response_json("$.usage.none"), False),
        ("$response.json.usage.tokens", True),
        ("$response.json.usage.zero", False),
    ],
    ids=[
        "method", "header", "outcome", "bytes", "raises", "none", "number", "no number",
        "text", "text of zero",
    ],
)  # fmt: skip
def test_a_callable_a_measure_or_its_text_decides(
    openmeter: OpenMeterServer, when: Any, is_billed: bool
) -> None:
    app = answering(
        b'{"usage": {"tokens": 5, "zero": 0}}', "200 OK", ("x-cache", "hit")
    )
    events, not_metered = billed(openmeter, app, meter_when=when)

    assert bool(events) is is_billed
    assert not_metered == ({} if is_billed else {"meter_when": 1})


@pytest.mark.parametrize(
    ("body", "succeeded", "failed"),
    [
        (WEBDAV, 2, 1),
        (b'[{"status": 200}, {"status": "201 Created"}, {"status": 409}]', 2, 1),
        (b'{"responses": [{"id": 1, "statusCode": 204}, {"statusCode": 500}]}', 1, 1),
        (b'{"items": [{"index": {"status": 201}}, {"delete": {"status": 404}}]}', 1, 1),
    ],
)
def test_of_a_207_the_parts_that_succeeded_are_billed(
    openmeter: OpenMeterServer, body: bytes, succeeded: int, failed: int
) -> None:
    events, _ = billed(
        openmeter,
        answering(body, "207 Multi-Status"),
        meters={"done": multi_status(), "failed": multi_status("failed")},
    )

    assert events == [("done", {"total": succeeded}), ("failed", {"total": failed})]


@pytest.mark.parametrize(("code", "is_billed"), [(200, True), (409, False)])
def test_a_207_in_which_nothing_succeeded_is_not_billed(
    openmeter: OpenMeterServer, code: int, is_billed: bool
) -> None:
    body = json.dumps([{"status": code}, {"status": 500}]).encode()

    events, _ = billed(
        openmeter, answering(body, "207 Multi-Status"), meter_when=multi_status()
    )

    assert bool(events) is is_billed


def test_it_holds_for_what_the_handler_states_too(openmeter: OpenMeterServer) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        add_meters(environ, {"tokens": 5})
        return answering(b"{}")(environ, start_response)

    assert billed(openmeter, app, meter_when=lambda exchange: False) == (
        [],
        {"meter_when": 1},
    )


def test_the_bytes_and_their_laziness_stay_the_applications() -> None:
    made: list[int] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        return (b'{"a": 1}'[n : n + 1] for n in range(8) if not made.append(n))

    middleware = OpenMeterMiddleware(
        app, dry_run=True, meter_when=computed(without_errors, "json")
    )
    response = iter(middleware(make_environ(), Consumer().start_response))

    assert (next(response), made) == (b"{", [0])
    assert (b"".join(response), made[-1]) == (b'"a": 1}', 7)


@pytest.mark.parametrize("value", [1, "always", ["$response.bytes"]])
def test_what_is_no_predicate_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="meter_when: expected a callable on the"):
        Policy(dry_run=True, meter_when=value)


def test_a_route_may_have_its_own(openmeter: OpenMeterServer) -> None:
    never: Callable[[Exchange], bool] = lambda exchange: False  # noqa: E731
    routes = {"/": {"meter_when": never}}

    assert billed(openmeter, answering(b""), routes=routes)[1] == {"meter_when": 1}
