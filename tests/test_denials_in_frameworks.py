"""`require_entitlements` in frameworks that know nothing of our exception."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bottle
import falcon
import pytest
from bottle import HTTPResponse
from pyramid.config import Configurator
from pyramid.response import Response

from entitling import NO, YES, Entitled
from entitling import middleware as asking
from openmeter_wsgi import EntitlementDenied, require_entitlements
from servers import Consumer, make_environ

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_server import OpenMeterServer

Environ = dict[str, Any]


def of_bottle() -> WSGIApplication:
    """Return one with the recipe: Bottle turns exceptions into 500."""
    app = bottle.Bottle()

    def refuse(view: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            try:
                return view(*args, **kwargs)
            except EntitlementDenied as denied:
                answer = denied.get_response(bottle.request.environ)
                return HTTPResponse(answer.data, answer.status, answer.headers)

        return called

    app.install(refuse)

    @app.get("/")
    def view() -> str:
        require_entitlements(bottle.request, "deep")
        return "served"

    served: WSGIApplication = app
    return served


def of_bottle_that_catches_nothing() -> WSGIApplication:
    app = bottle.Bottle()
    app.config["catchall"] = False

    @app.get("/")
    def view() -> str:
        require_entitlements(bottle.request, "deep")
        return "served"

    served: WSGIApplication = app
    return served


def of_falcon() -> WSGIApplication:
    """Return one with the recipe: Falcon turns exceptions into 500."""

    class View:
        def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
            require_entitlements(req, "deep")
            resp.text = "served"

    def refuse(req: Any, resp: Any, denied: EntitlementDenied, _: Any) -> None:
        answer = denied.get_response(req.env)
        resp.status, resp.data = answer.status, answer.data
        resp.set_headers(list(answer.headers))

    app = falcon.App()
    app.add_error_handler(EntitlementDenied, refuse)
    app.add_route("/", View())
    return app


def of_pyramid(*, with_view: bool = False) -> WSGIApplication:
    def view(request: Any) -> Response:
        require_entitlements(request, "deep")
        return Response("served")

    def refuse(denied: Any, request: Any) -> Response:
        return request.get_response(denied)

    with Configurator() as config:
        config.add_route("view", "/")
        config.add_view(view, route_name="view")
        if with_view:
            config.add_exception_view(refuse, context=EntitlementDenied)
        app: WSGIApplication = config.make_wsgi_app()
    return app


def bare(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    require_entitlements(environ, "deep")
    start_response("200 OK", [])
    return [b"served"]


def bare_after_start(
    environ: Environ, start_response: StartResponse
) -> Iterable[bytes]:
    start_response("200 OK", [("X-Own", "1")])
    require_entitlements(environ, "deep")
    return [b"served"]


def generated(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
    require_entitlements(environ, "deep")
    start_response("200 OK", [])
    yield b"served"


def generated_after_start(
    environ: Environ, start_response: StartResponse
) -> Iterator[bytes]:
    start_response("200 OK", [("X-Own", "1")])
    yield b""
    require_entitlements(environ, "deep")
    yield b"served"


APPS: dict[str, Callable[[], WSGIApplication]] = {
    "bottle": of_bottle,
    "bottle, catchall=False": of_bottle_that_catches_nothing,
    "falcon": of_falcon,
    "pyramid": of_pyramid,
    "pyramid, exception view": lambda: of_pyramid(with_view=True),
    "none": lambda: bare,
    "none, started": lambda: bare_after_start,
    "none, a generator": lambda: generated,
    "none, a generator, started": lambda: generated_after_start,
}


def own_words(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    """Answer as a seller may want it."""
    start_response("402 Payment Required", [("X-Shop", "1")])
    return [b"in our own words"]


@pytest.mark.parametrize("name", APPS)
@pytest.mark.parametrize("measured", [False, True])
def test_a_denied_request_is_answered_and_not_billed(
    openmeter: OpenMeterServer, name: str, measured: bool
) -> None:
    entitled = Entitled(openmeter)
    entitled.values = {"acme": {"deep": YES}, "globex": {"deep": NO}}
    options = {"meters": {"n": "$response.bytes"}} if measured else {}
    app = asking(openmeter, APPS[name](), required_entitlements=[], **options)

    served = Consumer().serve(app, make_environ(REMOTE_USER="acme"))
    denied = Consumer().serve(app, make_environ(REMOTE_USER="globex"))

    assert (served.status[:3], b"".join(served.body)) == ("200", b"served")
    assert denied.raised is denied.raised_by_close is None
    assert denied.status.startswith("403")
    headers = {key.lower(): value for key, value in denied.headers}
    assert headers["content-type"] == "application/problem+json"
    assert "x-own" not in headers
    assert b'"feature":"deep"' in b"".join(denied.body)
    assert app.stats().not_metered == {"denied": 1}
    assert app.stats().metered == 1
    app.close(40)


@pytest.mark.parametrize("name", APPS)
def test_a_denied_request_is_answered_in_the_sellers_words(
    openmeter: OpenMeterServer, name: str
) -> None:
    Entitled(openmeter).values["acme"] = {"deep": NO}
    app = asking(
        openmeter, APPS[name](), required_entitlements=[],
        denied_response=lambda *_: own_words,
    )  # fmt: skip

    denied = Consumer().serve(app, make_environ(REMOTE_USER="acme"))

    assert denied.status == "402 Payment Required"
    assert b"".join(denied.body) == b"in our own words"
    assert ("x-shop", "1") in [(key.lower(), value) for key, value in denied.headers]
    app.close(40)


def test_what_was_sent_before_a_denial_stands(openmeter: OpenMeterServer) -> None:
    Entitled(openmeter).values["acme"] = {"deep": NO}

    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"sent"
        require_entitlements(environ, "deep")

    middleware = asking(openmeter, app, required_entitlements=[])
    consumer = Consumer().serve(middleware, make_environ(REMOTE_USER="acme"))

    assert consumer.body == [b"sent"]
    assert isinstance(consumer.raised, EntitlementDenied)
    assert middleware.stats().not_metered == {"denied": 1}
    middleware.close(40)
