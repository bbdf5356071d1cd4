"""No spelling of a path, or of a method, lets a client choose its price."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import bottle
import falcon
import flask
import pytest
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.test.utils import override_settings
from django.urls import path
from pyramid.config import Configurator
from pyramid.response import Response

from entitling import NO, YES, Entitled
from entitling import middleware as asking
from openmeter_wsgi import (
    OpenMeterMiddleware,
    computed,
    meter,
    set_idempotency_key,
    set_route,
)
from servers import Consumer, make_environ

if TYPE_CHECKING:
    from collections.abc import Iterator
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_server import OpenMeterServer
    from openmeter_wsgi import Exchange

if not settings.configured:
    settings.configure(SECRET_KEY="tests")

#: Rules of every framework here: a path, a value of one part, and of several parts.
RULES = ("/v1/search", "/v1/users/<id>", "/v1/files/<path:name>")


def of_flask() -> WSGIApplication:
    app = flask.Flask(__name__)
    for rule in RULES:
        app.add_url_rule(rule, rule, lambda **_: "served", methods=["GET", "POST"])
    return app.wsgi_app


def of_bottle() -> WSGIApplication:
    app = bottle.Bottle()
    for rule in ("/v1/search", "/v1/users/<id>", "/v1/files/<name:path>"):
        app.route(rule, ["GET", "POST"], lambda **_: "served")
    served: WSGIApplication = app
    return served


def of_falcon() -> WSGIApplication:
    class Served:
        def on_get(self, req: Any, resp: falcon.Response, **_: str) -> None:
            resp.text = "served"

    app = falcon.App()
    for rule in ("/v1/search", "/v1/users/{id}", "/v1/files/{name:path}"):
        app.add_route(rule, Served())
    return app


def of_pyramid() -> WSGIApplication:
    with Configurator() as config:
        for rule in ("/v1/search", "/v1/users/{id}", "/v1/files/*name"):
            config.add_route(rule, rule)
            config.add_view(lambda _: Response("served"), route_name=rule)
        app: WSGIApplication = config.make_wsgi_app()
    return app


def of_traversal() -> WSGIApplication:
    """Return one of Pyramid's whose paths lead through a tree."""
    tree: dict[str, Any] = {"v1": {"search": {}, "users": {"7": {}}, "files": {}}}
    with Configurator(root_factory=lambda _: tree) as config:
        config.add_view(lambda _: Response("served"), context=dict)
        app: WSGIApplication = config.make_wsgi_app()
    return app


def of_django() -> WSGIApplication:
    site = sys.modules["odd_site"] = ModuleType("odd_site")
    site.urlpatterns = [  # type: ignore[attr-defined]
        path("v1/search", lambda _: HttpResponse("served")),
        path("v1/users/<id>", lambda _, **__: HttpResponse("served")),
        path("v1/files/<path:name>", lambda _, **__: HttpResponse("served")),
    ]
    app: WSGIApplication = get_wsgi_application()
    return app


APPS = {
    "flask": of_flask, "bottle": of_bottle, "falcon": of_falcon, "pyramid": of_pyramid,
    "traversal": of_traversal, "django": of_django,
}  # fmt: skip
#: The paths of `RULES` as a server hands them over, in more and less odd spellings.
SPELLINGS = [
    "/v1/search",
    "//v1/search",
    "///v1//search",
    "v1/search",
    "/v1//search",
    "/v1/./search",
    "/v1/x/../search",
    "/./v1/search",
    "/v1/sea\xffrch",
    "/\xffv1/search",
    "/v1/search\xff",
    "/v1/search\n",
    "/v1/search/",
    "/v1/users/7",
    "/v1/users/a\nb",
    "/v1/users/7\n",
    "/v1/users//7",
    "/v1/\xffusers/7",
    "/v1/users/\xff",
    "/v1/files/a",
    "/v1/files//a",
    "/v1/files/a//b",
    "/v1/files/\na",
    "/v1/files/a\nb",
    "/v1/files/a\n",
    "/v1/files/../files/a",
    "/v1/files/a/..",
    "/v1/files/\xff/a",
    "/v1/files/a/\xff",
    "//v1/files//a",
]


@pytest.fixture(params=sorted(APPS))
def served(request: pytest.FixtureRequest) -> Iterator[WSGIApplication]:
    with override_settings(ROOT_URLCONF="odd_site", ALLOWED_HOSTS=["*"]):
        yield APPS[request.param]()


def answer(app: Any, path: str, method: str = "GET") -> str:
    """Return the status of the answer, "error" if the application raised."""
    consumer = Consumer()
    consumer.serve(app, make_environ(method, PATH_INFO=path, REMOTE_USER="acme"))
    return "error" if consumer.raised else consumer.status[:3]


def test_what_is_served_has_the_price_of_its_rule(served: WSGIApplication) -> None:
    # A rule's own status codes tell its requests from those of no rule.
    own = {"meter_on_status_codes": "100-199"}
    middleware = OpenMeterMiddleware(
        served, dry_run=True, meters={"credits": 1}, routes=dict.fromkeys(RULES, own)
    )

    for spelling in SPELLINGS:
        before = middleware.stats().metered
        answer(middleware, spelling)
        assert middleware.stats().metered == before, spelling


def test_nothing_is_served_without_the_question_of_its_rule(
    openmeter: OpenMeterServer, served: WSGIApplication
) -> None:
    Entitled(openmeter).values["acme"] = {"deep": NO}
    app = asking(
        openmeter, served, required_entitlements=[],
        routes={
            "*": None, **{rule: {"required_entitlements": ["deep"]} for rule in RULES}
        },
    )  # fmt: skip

    assert [one for one in SPELLINGS if answer(app, one) == "200"] == []


def test_the_spellings_are_such_that_frameworks_serve() -> None:
    with override_settings(ROOT_URLCONF="odd_site", ALLOWED_HOSTS=["*"]):
        apps = {name: make() for name, make in APPS.items()}
        served = {
            name: [one for one in SPELLINGS if answer(app, one) == "200"]
            for name, app in apps.items()
        }

    for name, paths in served.items():
        assert len(paths) > 5, name
    assert "/v1/sea\xffrch" in served["bottle"]
    assert "/v1/files/a\nb" in served["falcon"]
    assert "/v1/files//a" in served["django"]
    assert "/v1/search\n" in served["pyramid"]
    assert "/v1/x/../search" in served["traversal"]
    assert "//v1/search" in served["flask"]


# -- Methods, which most frameworks read in any case, and many servers hand on as sent


@pytest.mark.parametrize("framework", ["flask", "bottle", "django", "pyramid"])
def test_a_method_in_any_case_has_the_rule_of_the_method(
    openmeter: OpenMeterServer, framework: str
) -> None:
    Entitled(openmeter).values["acme"] = {"deep": NO}
    with override_settings(ROOT_URLCONF="odd_site", ALLOWED_HOSTS=["*"]):
        app = asking(
            openmeter, APPS[framework](), required_entitlements=[],
            routes={"POST /v1/search": {"required_entitlements": ["deep"]}, "*": None},
        )  # fmt: skip

        statuses = {m: answer(app, "/v1/search", m) for m in ("POST", "post", "pOsT")}

    assert set(statuses.values()) == {"403"}


def test_options_in_any_case_is_neither_billed_nor_asked_for(
    openmeter: OpenMeterServer,
) -> None:
    entitled = Entitled(openmeter)
    entitled.values["acme"] = {"searches": YES}
    flask_app = of_flask()
    app = asking(openmeter, flask_app)

    for method in ("options", "OPTIONS", "Options", "options"):
        assert answer(app, "/v1/search", method) == "200"

    assert entitled.questions == 0
    assert app.stats().not_metered == {"options": 4}
    app.close(40)


@pytest.mark.parametrize("method", ["head", "HEAD", "Head"])
def test_head_in_any_case_has_no_body(openmeter: OpenMeterServer, method: str) -> None:
    Entitled(openmeter).values["acme"] = {"deep": NO}
    exchanges: list[tuple[str, int | None, str]] = []

    def look(exchange: Exchange) -> int:
        exchanges.append((exchange.method, exchange.bytes_sent, exchange.outcome))
        return 1

    def app(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
        start_response("200 OK", [])
        return [b"not for HEAD"] if environ["PATH_INFO"] == "/full" else []

    measured = OpenMeterMiddleware(app, dry_run=True, meters={"n": computed(look)})
    for path_info in ("/full", "/"):
        # A server that sends no body need not iterate one.
        measured(
            make_environ(method, PATH_INFO=path_info), Consumer().start_response
        ).close()  # type: ignore[attr-defined]

    assert exchanges == [("HEAD", 0, "completed")] * 2
    denied = Consumer().serve(
        asking(openmeter, app, required_entitlements=["deep"]), make_environ(method)
    )
    assert denied.body == []


def test_a_repetition_is_one_whatever_the_case_of_its_method(
    openmeter: OpenMeterServer,
) -> None:
    def app(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
        set_idempotency_key(environ, "order-1")
        start_response("200 OK", [])
        return []

    middleware = OpenMeterMiddleware(
        app, api_url=openmeter.url, flush_interval=60, meters={"orders": 1},
    )  # fmt: skip
    for method in ("POST", "post"):
        answer(middleware, "/orders", method)
    middleware.close(40)

    assert len({event["id"] for event in openmeter.taken}) == 1


# -- Values that a framework reads differently from a rule


def with_numbers() -> WSGIApplication:
    app = bottle.Bottle()
    for rule in ("/v1/numbers/<id:int>", "/v1/other", "/v1/<name>", "/v1/cheap/<id>"):
        app.get(rule, callback=lambda **_: "served")

    @app.get("/v1/decorated/<id:int>")
    @meter(meters={"credits": 7})
    def decorated(id: int) -> str:  # noqa: A002 - the variable of the route
        return "served"

    served: WSGIApplication = app
    return served


def of_falcon_with_routes() -> WSGIApplication:
    class Served:
        def on_get(self, req: Any, resp: falcon.Response, **_: str) -> None:
            set_route(req, req.uri_template)
            resp.text = "served"

    app = falcon.App()
    app.add_route("/v2/files/{name:path}", Served())
    app.add_route("/v1/numbers/{id:int}", Served())
    return app


PRICES = {
    "/v1/numbers/<int:id>": 50, "/v2/files/<path:name>": 40, "/v1/special": 2,
    "/v1/<name>": 20, "/v1/cheap/<int:id>": 0.5, "/v1/decorated/<int:id>": 30,
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "path_info", "credits_", "is_told"),
    [
        (with_numbers, "/v1/numbers/5", 50, False),
        (with_numbers, "/v1/numbers/-5", 50, True),
        (of_falcon_with_routes, "/v1/numbers/+5", 50, True),
        (of_falcon_with_routes, "/v1/numbers/1_0", 50, True),
        (of_falcon_with_routes, "/v2/files/", 40, True),
        (with_numbers, "/v1/special", 2, False),  # a rule for one of many values
        (with_numbers, "/v1/other", 20, False),
        (with_numbers, "/v1/cheap/x", 1, False),  # the default is stricter
        (with_numbers, "/v1/decorated/-5", 7, False),  # the view says it itself
    ],
)
def test_what_no_rule_matches_has_the_price_of_its_route(
    openmeter: OpenMeterServer,
    caplog: pytest.LogCaptureFixture,
    make: Any,
    path_info: str,
    credits_: float,
    is_told: bool,
) -> None:
    middleware = OpenMeterMiddleware(
        make(), api_url=openmeter.url, flush_interval=60, meters={"credits": 1},
        routes={rule: {"meters": {"credits": price}} for rule, price in PRICES.items()},
    )  # fmt: skip

    statuses = [answer(middleware, path_info) for _ in range(3)]

    middleware.close(40)
    assert statuses == ["200"] * 3
    assert [event["data"]["total"] for event in openmeter.taken] == [credits_] * 3
    assert ("its rule does not match" in caplog.text) is is_told
    assert middleware.stats().metered == 3
