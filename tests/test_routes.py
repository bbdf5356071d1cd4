"""Choice of the policy of a request, by its method and path."""

from __future__ import annotations

import gc
import json
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule

from billing import serve, usage
from openmeter_wsgi import ConfigError, OpenMeterMiddleware, Policy, bytes_sent
from openmeter_wsgi.request import REQUEST
from openmeter_wsgi.routes import RouteRule, Routes
from servers import Consumer, make_environ

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import FrameType
    from wsgiref.types import StartResponse

    from openmeter_server import OpenMeterServer

Environ = dict[str, Any]


def answer(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"ok"]


def found(rules: Iterable[str], method: str, path: str) -> str | None:
    """Return the rule of a request. *path* is as a client sends it."""
    routes = Routes([(RouteRule(rule), rule) for rule in rules], None)
    sent = unquote_to_bytes(path).decode("latin-1")
    return routes.find({"REQUEST_METHOD": method, "PATH_INFO": sent})


def billed(
    openmeter: OpenMeterServer, *requests: str, **options: Any
) -> list[tuple[str, Any]]:
    """Return the usage of *requests* (``GET /v1/search``)."""
    middleware = OpenMeterMiddleware(
        answer, api_url=openmeter.url, flush_interval=60, **options
    )
    for request in requests:
        method, path = request.split()
        serve(middleware, make_environ(method, PATH_INFO=path))
    middleware.close(40)
    return usage(openmeter.taken)


# -- Which rule


RULES = [
    "/v1/search", "POST /v1/search", "GET /v1/<name>", "/v1/<name>", "/v1/<int:id>",
    "/v1/bulk/<path:rest>", "PUT,PATCH /v1/bulk/<path:rest>", "/v1/bulk/first",
    "/v1/<name>/parts/<part>", "/café/<drink>", "/", "DELETE /v1/gone",
    "HEAD /v1/heads", "/v1/heads", "/both", "/both/",
]  # fmt: skip


ROUTES: Routes[str | None] = Routes([(RouteRule(rule), rule) for rule in RULES], None)


@pytest.mark.parametrize(
    ("request_line", "rule"),
    [
        ("GET /v1/search", "/v1/search"),
        ("POST /v1/search", "POST /v1/search"),
        ("GET /v1/other", "GET /v1/<name>"),
        ("HEAD /v1/other", "GET /v1/<name>"),
        ("POST /v1/other", "/v1/<name>"),
        ("POST /v1/17", "/v1/<int:id>"),
        ("GET /v1/bulk/a/b/c", "/v1/bulk/<path:rest>"),
        ("PATCH /v1/bulk/a/b/c", "PUT,PATCH /v1/bulk/<path:rest>"),
        ("PUT /v1/bulk/first", "/v1/bulk/first"),
        ("GET /v1/a/parts/b", "/v1/<name>/parts/<part>"),
        ("GET /café/crème", "/café/<drink>"),
        ("GET /", "/"),
        ("DELETE /v1/gone", "DELETE /v1/gone"),
        ("POST /v1/gone", "/v1/<name>"),
        ("HEAD /v1/heads", "HEAD /v1/heads"),
        ("GET /v1/heads", "/v1/heads"),
        ("PROPFIND /v1/search", "/v1/search"),
        ("GET /both", "/both"),
        ("GET /both/", "/both/"),
        ("GET /v1/search/", "/v1/search"),
        ("GET /v1/a/parts/b/", "/v1/<name>/parts/<part>"),
        ("GET /v2/search", None),
        ("GET /v1/a/b", None),
        ("GET /V1/search", None),
        ("GET //v1/search", "/v1/search"),
        # Some framework serves these by the same view.
        ("GET /v1//search", "/v1/search"),
        ("GET /v1/./search", "/v1/search"),
        ("GET /v1/x/../search", "/v1/search"),
        ("POST /v1/search%0A", "POST /v1/search"),
        ("GET v1/search", "/v1/search"),
        ("GET /v1/sea%FFrch", "/v1/search"),
        ("POST /v1/%FF17", "/v1/<int:id>"),
        ("GET /v1/17%0A", "/v1/<int:id>"),
        ("GET /v1/bulk//a", "/v1/bulk/<path:rest>"),
        ("GET /v1/bulk/a%0Ab", "/v1/bulk/<path:rest>"),
        ("GET /v1/bulk/%0Aa%0A", "/v1/bulk/<path:rest>"),
        ("GET /v1/a%0Ab/parts/b%0A", "/v1/<name>/parts/<part>"),
        ("GET /v2/../..", "/"),
    ],
)
def test_the_most_specific_rule_governs(request_line: str, rule: str | None) -> None:
    method, path = request_line.split()

    assert found(RULES, method, path) == rule
    assert found(reversed(RULES), method, path) == rule


def test_the_root_of_a_mounted_application_is_its_root() -> None:
    assert found(["/"], "GET", "") == "/"


_SEGMENTS = ["a", "b", "<x>", "<int:n>", "<path:rest>", "é"]


def _rule_of(parts: list[str]) -> str:
    """Return a rule whose variables have different names."""
    numbered = (part.replace(">", f"{n}>") for n, part in enumerate(parts))
    return "/" + "/".join(numbered)


#: No rule has more than two variables that are matched together.
_RULES = st.lists(
    st.lists(st.sampled_from(_SEGMENTS), max_size=4)
    .filter(lambda parts: parts.count("<path:rest>") < 3)
    .map(_rule_of),
    max_size=8,
    unique=True,
)


@settings(deadline=None)
@given(
    rules=_RULES,
    path=st.from_regex(r"(/(a|b|7|é)){0,5}/?", fullmatch=True),
)
def test_without_methods_it_is_werkzeugs_choice(rules: list[str], path: str) -> None:
    reference = Map(
        [Rule(rule, endpoint=rule) for rule in rules],
        strict_slashes=False, merge_slashes=False, redirect_defaults=False,
    ).bind("")  # fmt: skip
    try:
        expected = reference.match(path)[0]
    except HTTPException:
        expected = None
    if path in rules:
        expected = path  # werkzeug tries variables first where a slash ends the path

    assert found(rules, "GET", path) == expected


@settings(deadline=None)
@given(
    rules=_RULES,
    parts=st.lists(st.sampled_from(["a", "b", "7", "é"]), min_size=1, max_size=4),
    odd=st.lists(st.sampled_from(["/", "//", "/./", "/b/../", "/%FF"]), min_size=4),
    end=st.sampled_from(["", "%0A", "%FF"]),
)
def test_no_spelling_of_a_path_escapes_the_rule(
    rules: list[str], parts: list[str], odd: list[str], end: str
) -> None:
    path = "".join(slash + part for slash, part in zip(odd, parts, strict=False)) + end
    order = {rule: number for number, rule in enumerate(rules)}
    routes = Routes(
        [(RouteRule(rule), rule) for rule in rules],
        "",
        lambda rule: order.get(rule, -1),
    )

    def strictness(path: str) -> int:
        sent = unquote_to_bytes(path).decode("latin-1")
        return order.get(routes.find({"REQUEST_METHOD": "GET", "PATH_INFO": sent}), -1)

    assert strictness(path) >= strictness("/" + "/".join(parts))


@settings(deadline=None)
@given(
    method=st.text(st.characters(max_codepoint=255), max_size=8),
    path=st.text(max_size=40) | st.from_regex(r"/v1/\d{1,30}", fullmatch=True),
)
def test_no_request_raises(method: str, path: str) -> None:
    routes = ROUTES
    # A server hands over Latin-1 (PEP 3333); a test client may hand over anything.
    routes.find({"REQUEST_METHOD": method, "PATH_INFO": path})
    routes.find({"PATH_INFO": f"/v1/{'9' * 10_000}"})
    routes.find({})


# -- Bills


def test_a_route_inherits_what_it_does_not_name(openmeter: OpenMeterServer) -> None:
    routes = {
        "/v1/search": {"meters": {"searches": 2}},
        "POST /v1/analyze": {"meter": {"type": "analysis"}, "event_source": "lab"},
        "/healthz": None,
    }
    requests = ["GET /v1/search", "POST /v1/analyze", "GET /healthz", "GET /other"]

    events = billed(
        openmeter, *requests, routes=routes, meters={"requests": 1}, event_source="api"
    )

    assert events == [
        ("searches", {"total": 2}), ("analysis", {}), ("requests", {"total": 1}),
    ]  # fmt: skip
    assert [e["source"] for e in openmeter.taken] == ["api", "lab", "api"]


def test_none_for_every_other_request_meters_the_named_routes_alone(
    openmeter: OpenMeterServer,
) -> None:
    options = {"meters": {"requests": 1}, "routes": {"*": None, "/a": {}}}

    events = billed(openmeter, "GET /a", "GET /b", "POST /a", **options)

    assert events == [("requests", {"total": 1})] * 2


def test_every_other_request_has_options_of_its_own(openmeter: OpenMeterServer) -> None:
    routes = {"*": {"meters": {"other": 2}}, "/a/<b>": {}}

    events = billed(
        openmeter, "GET /a/x", "GET /b", "POST /a",
        meters={"requests": 1}, routes=routes,
    )  # fmt: skip

    assert events == [("requests", {"total": 1})] + [("other", {"total": 2})] * 2


def test_a_route_may_measure_where_others_do_not(openmeter: OpenMeterServer) -> None:
    routes = {"/bytes": {"meters": {"bytes": bytes_sent()}}}

    events = billed(
        openmeter, "GET /bytes", "GET /other", meters={"requests": 1}, routes=routes
    )

    assert events == [("bytes", {"total": 2}), ("requests", {"total": 1})]


def test_a_route_has_status_codes_of_its_own(openmeter: OpenMeterServer) -> None:
    routes = {"/a": {"meter_on_status_codes": "201"}}

    assert billed(openmeter, "GET /a", meters={"r": 1}, routes=routes) == []


def test_options_is_metered_where_it_is_named(openmeter: OpenMeterServer) -> None:
    options = {"meters": {"r": 1}, "routes": {"OPTIONS /a": {}, "/b": {}}}

    events = billed(openmeter, "OPTIONS /a", "OPTIONS /b", "OPTIONS /c", **options)

    assert events == [("r", {"total": 1})]


def test_a_route_that_is_not_metered_leaves_nothing_behind() -> None:
    seen: list[Environ] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(dict(environ))
        body = answer(environ, start_response)
        seen.append({"body": body})
        return body

    middleware = OpenMeterMiddleware(
        app, dry_run=True, meters={"r": 1}, routes={"/healthz": None}
    )
    environ = make_environ(PATH_INFO="/healthz")
    response = middleware(dict(environ), Consumer().start_response)

    assert seen == [environ, {"body": response}]
    assert response is seen[1]["body"]
    assert REQUEST not in environ
    assert middleware.stats().settled == 0


def test_what_is_not_metered_is_counted_by_the_rule_of_its_route() -> None:
    middleware = OpenMeterMiddleware(
        answer, dry_run=True, meters={"r": 1}, meter_on_status_codes="201",
        routes={"POST /v1/users/<id>": {}, "/v1/search": {}},
    )  # fmt: skip
    for method, path in [("POST", "/v1/users/7"), ("GET", "/v1/search"), ("GET", "/")]:
        serve(middleware, make_environ(method, PATH_INFO=path))

    stats = middleware.stats()
    assert stats.not_metered_by_policy == {
        "default": {"status": 1},
        "POST /v1/users/<id>": {"status": 1},
        "/v1/search": {"status": 1},
    }
    assert stats.not_metered == {"status": 3}


# -- As it is written


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_a_file_says_the_same(
    openmeter: OpenMeterServer, tmp_path: Path, ending: str
) -> None:
    file = tmp_path / f"policy.{ending}"
    if ending == "json":
        routes = {"POST /v1/users/<id>": {"meters": {"users": 3}}, "/healthz": None}
        file.write_text(json.dumps({"meters": {"r": 1}, "routes": routes}))
    else:
        file.write_text(
            'meters = { r = 1 }\n[routes]\n"/healthz" = false\n'
            '[routes."POST /v1/users/<id>".meters]\nusers = 3\n'
        )
    policy = Policy.from_file(file, api_url=openmeter.url)
    middleware = OpenMeterMiddleware(answer, policy)
    for method, path in [("POST", "/v1/users/7"), ("GET", "/healthz"), ("GET", "/")]:
        serve(middleware, make_environ(method, PATH_INFO=path))
    middleware.close(40)

    assert usage(openmeter.taken) == [("users", {"total": 3}), ("r", {"total": 1})]


@pytest.mark.parametrize(
    ("routes", "problem"),
    [
        ({"v1": {}}, "expected a rule such as '/v1/search' or"),
        ({"FETCH /v1": {}}, "'FETCH /v1': expected methods such as GET, got FETCH"),
        ({"/<int:>": {}}, "'/<int:>': "),
        ({"/<a>/<a>": {}}, "'/<a>/<a>': "),
        ({"/<roman:a>": {}}, "'/<roman:a>': "),
        ({"/p/{id}": {}}, "'/p/{id}': no request matches it; write '/p/<id>'"),
        ({"GET /p/{id:int}": {}}, "no request matches it; write 'GET /p/<id>'"),
        ({"/p/{name:path}": {}}, "no request matches it; write '/p/<path:name>'"),
        ({"/p/{a}/{b}": {}}, "no request matches it; write '/p/<a>/<b>'"),
        ({"/p/:id": {}}, "'/p/:id': no request matches it; write '/p/<id>'"),
        ({"/p/<id:int>": {}}, "no request matches it; write '/p/<id>'"),
        ({"/p/<x:float>": {}}, "no request matches it; write '/p/<x>'"),
        ({"/p/{id:uuid}": {}}, "no request matches it; write '/p/<id>'"),
        ({"/p/<id:re:[0-9]+>": {}}, "no request matches it; write '/p/<id>'"),
        ({"/p/*": {}}, "no request matches it; write '/p/<path:rest>'"),
        ({"/caf%C3%A9": {}}, "no request matches it; write '/café'"),
        ({"/p?deep=1": {}}, "no request matches it; write '/p'"),
        ({"/p#top": {}}, "no request matches it; write '/p'"),
        (
            {"/a/<path:x>/b/<path:y>/c/<path:z>": {}},
            "expected at most two variables of any length that are matched together, "
            "got 3",
        ),
        ({"/<x>-<y>-<z>": {}}, "matched together, got 3"),
        ({"/<path:x>-<y>-<z>": {}}, "matched together, got 3"),
        ({"/<path:x>/<y>-<z>": {}}, "matched together, got 3"),
        ({"/a": 1}, "'/a': expected options or None, got 1"),
        ({"/a": {"meter_s": {}}}, "unknown option 'meter_s' (did you mean 'meters'?)"),
        ({"/a": {"spool_dir": "x"}}, "spool_dir: belongs to the middleware as a whole"),
        ({"/a": {"routes": {}}}, "routes: belongs to the middleware as a whole"),
        (
            {"/a": {"meters": {"r": -1}}},
            "routes['/a']: meters: meter 'r': expected a number, finite and not "
            "negative, got -1",
        ),
        (["/a"], "routes: expected options by rule, got ['/a']"),
    ],
)
def test_what_is_no_route_is_refused_with_its_rule(routes: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Policy(dry_run=True, routes=routes)

    assert problem in str(refused.value)


@pytest.mark.parametrize(
    "rule",
    [
        "/<a>/<b>/<c>/<d>", "/<a>-<b>/<c>-<d>", "/<path:a>/x/<path:b>",
        "/v1/users:batch", "/<path:a>/<b>/<c>",
        "/<string(maxlength=9):a>-<b>-<c>", "/<uuid:a>-<b>-<c>",
        "/<any('a/b',c):a>-<b>-<c>", "/<int(signed=True):id>",
    ],
)  # fmt: skip
def test_rules_that_can_be_matched_are_taken(rule: str) -> None:
    assert RouteRule(rule).path == rule


def test_all_problems_of_all_routes_are_told_at_once() -> None:
    routes = {"/a": {"meter_s": 1}, "/b": {"meters": 1}, "/c": {"api_key": "x"}}

    with pytest.raises(ConfigError) as refused:
        Policy(dry_run=True, routes=routes)

    assert [p.split(":")[0] for p in refused.value.problems] == [
        "routes['/a']", "routes['/b']", "routes['/c']",
    ]  # fmt: skip


# -- Cost


def calls(rules: Iterable[str], path: str) -> list[str]:
    """Return the Python and C functions that are called to find a path's route."""
    routes = Routes([(RouteRule(rule), rule) for rule in rules], None)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path}
    made: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            made.append(frame.f_code.co_qualname)
        elif event == "c_call":
            made.append(argument.__qualname__)

    routes.find(environ)  # werkzeug compiles patterns at their first use
    gc.disable()  # a collection calls Hypothesis, which would be noted
    sys.setprofile(note)
    try:
        found = routes.find(environ)
    finally:
        sys.setprofile(None)
        gc.enable()
    assert found is not None
    return made[:-1]  # the last one is setprofile itself


def test_among_100_routes_an_exact_one_is_looked_up_and_nothing_is_tried() -> None:
    rules = [f"/v1/{n}/<id>" for n in range(50)] + [f"/v1/{n}" for n in range(50)]

    looked_up = calls(rules, "/v1/37")

    assert looked_up == calls(["/v1/37"], "/v1/37")
    assert "dict.get" in looked_up
    assert not [name for name in looked_up if "match" in name]


@pytest.mark.parametrize(
    ("rule", "path"),
    [("/v1/thing{}/<id>", "/v1/thing0/5"), ("/v1/<id>/thing{}", "/v1/5/thing0")],
)
def test_among_200_routes_no_more_is_tried_than_with_one(rule: str, path: str) -> None:
    alone = calls([rule.format(0)], path)

    assert "Pattern.match" in alone
    assert calls([rule.format(n) for n in range(200)], path) == alone
