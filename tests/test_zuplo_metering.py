"""The usage that each documented Zuplo configuration meters."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from billing import usage
from entitling import NO, YES, Entitled
from openmeter_wsgi import (
    ConfigError,
    OpenMeterMiddleware,
    Policy,
    add_meters,
    get_meters,
    set_meters,
    set_user,
)
from servers import Consumer, make_environ

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_server import OpenMeterServer

Environ = dict[str, Any]
FIXTURES = Path(__file__).parent / "fixtures" / "zuplo"
USER = {
    "sub": "acme",
    "data": {"tenantId": "tenant-7", "openmeter": {"subjectId": "subject-9"}},
}
SEARCH = ("search", {"index": "places"})
#: By fixture: whom it bills, and what.
BILLED: dict[str, tuple[str, list[tuple[str, Any]]]] = {
    "openmeter": ("acme", [("map-tile", {"tiles": 1})]),
    "openmeter-one-meter": ("acme", [("search", {"index": "places", "plan": "gold"})]),
    "openmeter-several-meters": ("acme", [SEARCH, ("traffic", {"bytes": 512})]),
    "openmeter-entitlements": ("acme", [SEARCH]),
    "openmeter-status-codes": ("acme", [("search", {})]),
    "openmeter-without-meter": ("tenant-7", []),
    "gateway.policies": ("subject-9", [("request", {"value": 1})]),
    "monetization": ("acme", [("searches", {"total": 1})]),
    "monetization-entitlements": ("acme", [("searches", {"total": 1})]),
    "monetization-without-handler": ("acme", [("api", {"total": 1})]),
    "monetization-first-version": (
        "acme", [("searches", {"total": 2}), ("credits", {"total": 5})],
    ),
    "monetization-handler-alone": (
        "acme", [("searches", {"total": 1}), ("credits", {"total": 5})],
    ),
    "group.policies": ("acme", [("searches", {"total": 1})]),
}  # fmt: skip
#: Those that ask beforehand, and for what.
REQUIRED = {
    "openmeter": ["map_tile"],
    "openmeter-entitlements": ["search", "gold_plan"],
    "openmeter-without-meter": ["tiles", "search", "sso"],
    "gateway.policies": ["requests"],
    "monetization-entitlements": ["own_maps"],
}


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMETER_API_KEY", "om_secret")
    monkeypatch.setenv("OPENMETER_SOURCE", "maps")


def answering(
    status: str = "200 OK", handler: Callable[[Environ], object] = lambda environ: None
) -> WSGIApplication:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        handler(environ)
        start_response(status, [])
        return [b"ok"]

    return app


def as_user(app: WSGIApplication) -> WSGIApplication:
    """Authenticate, as something in front of the metered application does."""

    def authenticated(environ: Environ, start_response: StartResponse) -> Any:
        set_user(environ, USER)
        environ.pop("REMOTE_USER", None)
        return app(environ, start_response)

    return authenticated


def served(
    url: str,
    policies: Path,
    *requests: str,
    app: WSGIApplication | None = None,
    **options: Any,
) -> list[str]:
    """Serve *requests* under the configuration; return their statuses."""
    policy = Policy.from_zuplo(policies, api_url=url, flush_interval=60, **options)
    middleware = OpenMeterMiddleware(app or answering(), policy)
    statuses = []
    for request in requests or ("GET /",):
        method, path = request.split()
        consumer = Consumer().serve(
            as_user(middleware), make_environ(method, PATH_INFO=path)
        )
        statuses.append(str(consumer.status)[:3])
    middleware.close(10)
    return statuses


def fixture_in(monkeypatch: pytest.MonkeyPatch, name: str, url: str) -> Path:
    # Two fixtures name a server; the option api_url outdoes it, the variable must be.
    monkeypatch.setenv("OPENMETER_URL", url)
    return FIXTURES / f"{name}.json"


# -- As it is written


@pytest.mark.parametrize("name", BILLED)
def test_a_documented_configuration_meters_as_it_says(
    openmeter: OpenMeterServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    subject, expected = BILLED[name]
    Entitled(openmeter).values = {subject: dict.fromkeys(REQUIRED.get(name, []), YES)}

    statuses = served(openmeter.url, fixture_in(monkeypatch, name, openmeter.url))

    assert statuses == ["200"]
    assert usage(openmeter.taken) == expected
    assert {event["subject"] for event in openmeter.taken} <= {subject}


@pytest.mark.parametrize("name", REQUIRED)
def test_who_lacks_one_entitlement_is_refused_and_not_billed(
    openmeter: OpenMeterServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    *others, last = REQUIRED[name]
    values = {**dict.fromkeys(others, YES), last: NO}
    Entitled(openmeter).values = {BILLED[name][0]: values}

    statuses = served(openmeter.url, fixture_in(monkeypatch, name, openmeter.url))

    assert statuses == ["403"]
    assert openmeter.taken == []


@pytest.mark.parametrize(
    ("codes", "billed"),
    [
        ("200-299,304", ["200", "304"]),
        ("200", ["200"]),
        ("200-399", ["200", "301", "304"]),
        ("200, 201, 300-304", ["200", "301", "304"]),
        ([200, 404], ["200", "404"]),
        (None, ["200"]),
    ],
)
def test_custom_status_codes_are_metered_alone(
    openmeter: OpenMeterServer, tmp_path: Path, codes: Any, billed: list[str]
) -> None:
    document = json.loads((FIXTURES / "openmeter-status-codes.json").read_text())
    document["options"]["meterOnStatusCodes"] = codes
    if codes is None:
        del document["options"]["meterOnStatusCodes"]
    file = tmp_path / "policies.json"
    file.write_text(json.dumps(document))

    for status in ("200 OK", "301 Moved", "304 Not Modified", "404 Not Found"):
        before = len(openmeter.taken)
        served(openmeter.url, file, app=answering(status))
        assert (len(openmeter.taken) > before) == (status[:3] in billed)


def test_a_policy_for_each_route_meters_its_route(openmeter: OpenMeterServer) -> None:
    served(
        openmeter.url,
        FIXTURES / "monetization-three.json",
        "POST /v1/search", "POST /v1/summarize", "POST /v1/export",
        "GET /v1/search", "POST /v1/other",
        routes=FIXTURES / "monetization-three.routes.oas.json",
    )  # fmt: skip

    assert usage(openmeter.taken) == [
        ("searches", {"total": 1}),
        ("searches", {"total": 1}), ("tokens", {"total": 1}),
        ("credits", {"total": 10}),
    ]  # fmt: skip


def test_a_gateway_meters_the_routes_that_name_its_policy(
    openmeter: OpenMeterServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Entitled(openmeter).values = {"subject-9": {"requests": YES}}

    served(
        openmeter.url,
        fixture_in(monkeypatch, "gateway.policies", openmeter.url),
        "GET /maps", "POST /maps", "PUT /maps/7", "DELETE /maps/7", "PUT /maps/public",
        routes=FIXTURES / "gateway.routes.oas.json",
    )  # fmt: skip

    assert usage(openmeter.taken) == [("request", {"value": 1})] * 2
    assert {event["source"] for event in openmeter.taken} == {"maps"}
    assert "Zuplo's configuration: GET /maps: inbound[1]: no policy is" in caplog.text


# -- In code


@pytest.mark.parametrize(
    ("handler", "total"),
    [
        (lambda environ: None, 1),
        (lambda environ: set_meters(environ, {"api": 50}), 50),
        (lambda environ: add_meters(environ, {"api": 50}), 51),
        (
            lambda environ: (
                add_meters(environ, {"api": 500}),
                add_meters(environ, {"api": 300}),
            ),
            801,
        ),
        (
            lambda environ: (
                set_meters(environ, {"api": 50}),
                add_meters(environ, {"api": 5}),
            ),
            55,
        ),
    ],
    ids=["nothing", "set", "add", "add twice", "set and add"],
)
def test_set_and_add_come_to_the_documented_sums(
    openmeter: OpenMeterServer, handler: Callable[[Environ], object], total: int
) -> None:
    app = answering(handler=handler)

    served(openmeter.url, FIXTURES / "monetization-without-handler.json", app=app)

    assert usage(openmeter.taken) == [("api", {"total": total})]


def test_run_time_meters_of_other_names_come_beside(openmeter: OpenMeterServer) -> None:
    found: list[Any] = []

    def handler(environ: Environ) -> None:
        set_meters(environ, {"input": 1000, "output": 250})
        found.extend(get_meters(environ))

    served(
        openmeter.url,
        FIXTURES / "monetization-without-handler.json",
        app=answering(handler=handler),
    )

    assert found == [{"input": 1000, "output": 250}]
    assert sorted(usage(openmeter.taken)) == [
        ("api", {"total": 1}),
        ("input", {"total": 1000}),
        ("output", {"total": 250}),
    ]


def test_documents_set_in_code_may_override_id_and_subject(
    openmeter: OpenMeterServer,
) -> None:
    documents = [
        {"type": "search", "data": {"endpoint": "/a"}},
        {"type": "llm", "id": "own-id", "subject": "user-4", "data": {"tokens": 1500}},
    ]

    served(
        openmeter.url,
        FIXTURES / "openmeter-one-meter.json",
        app=answering(handler=lambda environ: set_meters(environ, documents)),
    )

    assert usage(openmeter.taken) == [
        ("search", {"endpoint": "/a"}),
        ("llm", {"tokens": 1500}),
    ]
    assert [event["subject"] for event in openmeter.taken] == ["acme", "user-4"]
    assert openmeter.taken[1]["id"] == "own-id"


# -- Log lines


def test_what_has_no_meaning_is_warned_of_with_its_place(
    openmeter: OpenMeterServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"meters": {"api": 1}, "authHeader": "X-Key", "authScheme": "Key"}
    file = tmp_path / "policies.json"
    file.write_text(json.dumps({"type": "monetization-inbound", "options": options}))

    served(openmeter.url, file)

    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("options.authHeader: the application authenticates" in t for t in told)
    assert any("options.authScheme: the application authenticates" in t for t in told)


def test_what_is_unknown_is_refused_with_its_place(tmp_path: Path) -> None:
    policies = [
        {"name": "a", "type": "openmeter-inbound", "options": {"metre": {}}},
        {"name": "b", "type": "monetization-inbound", "options": {"meters": {"x": -1}}},
    ]
    file = tmp_path / "policies.json"
    file.write_text(json.dumps({"policies": policies}))

    with pytest.raises(ConfigError) as refused:
        Policy.from_zuplo(file)

    assert refused.value.problems == (
        "policies[0].options.metre: unknown option (did you mean 'meter'?)",
        "policies[1].options.meters: meter 'x': expected a number, finite and not "
        "negative, got -1",
    )


def test_options_outdo_the_files(openmeter: OpenMeterServer) -> None:
    served(openmeter.url, FIXTURES / "monetization.json", event_source="mine")

    assert [event["source"] for event in openmeter.taken] == ["mine"]


def test_text_that_begins_with_a_dollar_sign_stays_text(
    openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    meter = {
        "type": "a",
        "data": {"price": "$5", "list": ["$response.bytes", {"b": "$"}]},
    }
    file = tmp_path / "policies.json"
    file.write_text(
        json.dumps({"type": "openmeter-inbound", "options": {"meter": meter}})
    )

    served(openmeter.url, file)

    assert usage(openmeter.taken) == [("a", meter["data"])]
