"""A widened range of status codes does not go unseen."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from openmeter_wsgi import OpenMeterMiddleware, meter
from servers import Consumer, make_environ


def nothing(environ: Any, start_response: Any) -> list[bytes]:
    start_response("404 Not Found", [])
    return [b"no"]


@meter(meter_on_status_codes="200-404", meters={"views": 1})
def decorated(environ: Any, start_response: Any) -> list[bytes]:
    return nothing(environ, start_response)


def said(
    caplog: pytest.LogCaptureFixture, app: Any = nothing, **options: Any
) -> list[tuple[str, str]]:
    """Return level and text of the log lines at the start."""
    caplog.set_level(logging.INFO, "openmeter_wsgi")
    OpenMeterMiddleware(app, dry_run=True, **options)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


@pytest.mark.parametrize("codes", ["200-599", "2xx, 404", "500", [200, 404]])
def test_a_policy_that_bills_errors_is_named_at_the_start(
    caplog: pytest.LogCaptureFixture, codes: Any
) -> None:
    ((level, text),) = said(caplog, meter_on_status_codes=codes)

    assert level == "WARNING"
    assert text.startswith("openmeter_wsgi: policy 'default': meter_on_status_codes='")
    assert text.endswith("' bills error responses too")


@pytest.mark.parametrize("codes", ["200-299", "200-399", "1xx, 3xx"])
def test_a_policy_that_bills_none_is_not(
    caplog: pytest.LogCaptureFixture, codes: str
) -> None:
    assert said(caplog, meter_on_status_codes=codes) == []


def test_every_route_is_named_by_its_rule(caplog: pytest.LogCaptureFixture) -> None:
    routes = {
        "/a": {"meter_on_status_codes": "404"},
        "/b": {},
        "GET /c/<d>": {"meter_on_status_codes": "5xx"},
        "/e": None,
    }

    lines = said(caplog, routes=routes)

    assert [(level, text.split(":")[1]) for level, text in lines] == [
        ("WARNING", " policy '/a'"),
        ("WARNING", " policy 'GET /c/<d>'"),
    ]


def test_a_view_is_named_when_it_is_first_called(
    caplog: pytest.LogCaptureFixture,
) -> None:
    middleware = OpenMeterMiddleware(decorated, dry_run=True)
    for _ in range(2):
        Consumer().serve(middleware, make_environ())

    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [text.split(":")[1] for text in warnings] == [" policy 'view decorated'"]
    assert middleware.stats().events == 2
