"""The audit log: every request without an event is logged with its reason."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest

from openmeter_wsgi import (
    ConfigError,
    OpenMeterMiddleware,
    Policy,
    bytes_sent,
    no_meter,
    response_header,
    set_subject,
)
from openmeter_wsgi.sandbox import Sandbox
from servers import Consumer, make_environ

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from wsgiref.types import StartResponse, WSGIApplication

Environ = dict[str, Any]


def answering(status: str = "200 OK") -> WSGIApplication:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, [])
        return iter([b"one", b"two", b"three"])

    return app


def breaking(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
    start_response("200 OK", [])
    yield b"so far so good"
    raise ValueError("the database went away")


def never_starting(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    return iter(())


def with_a_bad_subject(
    environ: Environ, start_response: StartResponse
) -> Iterable[bytes]:
    set_subject(environ, "\ud800")
    return answering()(environ, start_response)


@no_meter
def unmetered(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    return answering()(environ, start_response)


def _raises(environ: Environ) -> bool:
    raise KeyError("plan")


#: By reason: the application, the options, changes of the environ.
REASONS: dict[str, tuple[WSGIApplication, dict[str, Any], Environ]] = {
    "status": (answering("404 Not Found"), {}, {}),
    "no_status": (never_starting, {}, {}),
    "options": (answering(), {}, {"REQUEST_METHOD": "OPTIONS"}),
    "no_usage": (answering(), {"meters": None}, {}),
    "no_subject": (answering(), {}, {"REMOTE_USER": ""}),
    "failed": (breaking, {}, {}),
    "aborted": (answering(), {"on_abort": "none"}, {}),
    "no_meter": (unmetered, {}, {}),
    "meter_when": (answering(), {"meter_when": _raises}, {}),
    "no_value_none": (answering(), {"meters": {"n": response_header("X-N")}}, {}),
}


def told(reason: str, **options: Any) -> OpenMeterMiddleware:
    app, own, environ = REASONS[reason]
    options = {"meters": {"requests": 1}, **own, **options}
    middleware = OpenMeterMiddleware(app, dry_run=True, **options)
    stop_after = 1 if reason == "aborted" else None
    request = {"PATH_INFO": "/v1/search", "SCRIPT_NAME": "/api", **environ}
    Consumer(stop_after=stop_after).serve(middleware, make_environ(**request))
    return middleware


@pytest.mark.parametrize("reason", REASONS)
def test_a_request_without_event_is_told_and_counted_by_its_reason(reason: str) -> None:
    records: list[dict[str, Any]] = []

    stats = told(reason, audit=records.append).stats()

    (record,) = records
    assert record.pop("time").endswith("Z")
    assert record == {
        "policy": "default",
        "reason": reason,
        "method": REASONS[reason][2].get("REQUEST_METHOD", "GET"),
        "path": "/api/v1/search",
        "status": {"status": "404 Not Found", "no_status": None}.get(reason, "200 OK"),
    }
    assert stats.not_metered == {reason: 1}
    assert stats.not_metered_by_policy == {"default": {reason: 1}}
    assert (stats.settled, stats.events) == (1, 0)


def test_a_denied_request_is_told() -> None:
    records: list[dict[str, Any]] = []
    with Sandbox() as sandbox:
        middleware = OpenMeterMiddleware(
            answering(), api_url=sandbox.url, meters={"requests": 1},
            required_entitlements=["searches"], audit=records.append,
        )  # fmt: skip
        consumer = Consumer().serve(middleware, make_environ())
        middleware.close(40)

    assert consumer.status is not None
    assert consumer.status.startswith("403")
    assert [(r["reason"], r["status"]) for r in records] == [("denied", None)]


def test_what_is_billed_is_not_told() -> None:
    records: list[dict[str, Any]] = []
    middleware = OpenMeterMiddleware(
        answering(), dry_run=True, meters={"bytes": bytes_sent()}, audit=records.append
    )
    Consumer().serve(middleware, make_environ())

    assert records == []
    assert middleware.stats().not_metered == {}


@pytest.mark.parametrize("reason", REASONS)
def test_at_level_debug_there_is_a_line(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "openmeter_wsgi.audit")
    told(reason)
    told(reason)  # nor is a repetition thinned

    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    assert len(lines) == 2
    assert lines[0].startswith("openmeter_wsgi: not billed: ")
    assert lines[0].endswith(f": {reason} [default]")
    assert "/api/v1/search" in lines[0]


def test_without_level_debug_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "openmeter_wsgi.audit")
    told("status")

    assert caplog.records == []


def test_the_policy_of_a_route_is_named_by_its_rule() -> None:
    records: list[dict[str, Any]] = []
    routes = {"POST /v1/<name>": {}}
    middleware = OpenMeterMiddleware(
        answering("404 Not Found"), dry_run=True, routes=routes, audit=records.append
    )
    for method in ("POST", "GET"):
        Consumer().serve(middleware, make_environ(method, PATH_INFO="/v1/a"))

    assert [r["policy"] for r in records] == ["POST /v1/<name>", "default"]


def test_a_file_grows_by_a_line_for_each(tmp_path: Path) -> None:
    """Collect the records with a handler of the logger, as the documentation shows."""
    logger = logging.getLogger("openmeter_wsgi.audit")
    handler = logging.FileHandler(tmp_path / "not-billed.log")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        for reason in ("status", "no_subject"):
            told(reason)
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)
        handler.close()

    lines = (tmp_path / "not-billed.log").read_text().splitlines()
    assert [line.split(": ")[-1] for line in lines] == [
        "status [default]", "no_subject [default]",
    ]  # fmt: skip


def _broken(record: dict[str, Any]) -> None:
    raise KeyError("no room")


def test_an_audit_that_fails_hurts_no_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    middleware = OpenMeterMiddleware(answering("404 "), dry_run=True, audit=_broken)
    consumer = Consumer().serve(middleware, make_environ())

    assert consumer.raised is None
    assert b"".join(consumer.body) == b"onetwothree"
    assert "the record is lost" in caplog.text


@pytest.mark.parametrize("value", [1, "not-billed.jsonl", ["a"]])
def test_what_takes_no_records_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"audit: expected a callable.* FileH"):
        Policy(dry_run=True, audit=value)
