"""`@meter` and `@no_meter` on views of Bottle, Falcon and Pyramid."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import bottle
import falcon
import pytest
from pyramid.config import Configurator
from pyramid.response import Response

from billing import serve, usage
from openmeter_wsgi import OpenMeterMiddleware, meter, no_meter
from servers import make_environ

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

    from openmeter_server import OpenMeterServer

priced = meter(meters={"credits": 5})


def of_bottle() -> WSGIApplication:
    app = bottle.Bottle()

    @app.get("/priced/<number:int>")
    @priced
    def view(number: int) -> str:
        return f"priced {number}"

    @app.get("/free")
    @no_meter
    def free() -> str:
        return "free"

    @app.get("/plain")
    def plain() -> str:
        return "plain"

    served: WSGIApplication = app
    return served


def of_falcon() -> WSGIApplication:
    class Priced:
        @priced
        def on_get(self, req: Any, resp: falcon.Response, number: int) -> None:
            resp.text = f"priced {number}"

    class Free:
        @no_meter
        def on_get(self, req: Any, resp: falcon.Response) -> None:
            resp.text = "free"

    class Plain:
        def on_get(self, req: Any, resp: falcon.Response) -> None:
            resp.text = "plain"

    app = falcon.App()
    app.add_route("/priced/{number:int}", Priced())
    app.add_route("/free", Free())
    app.add_route("/plain", Plain())
    return app


@priced
def requested(request: Any) -> Response:
    return Response(f"priced {request.matchdict['number']}")


@priced
def in_context(context: Any, request: Any) -> Response:
    return Response(f"priced {request.matchdict['number']}")


class InClass:
    def __init__(self, request: Any) -> None:
        self.request = request

    @priced
    def show(self) -> Response:
        return Response(f"priced {self.request.matchdict['number']}")

    @no_meter
    def free(self) -> Response:
        return Response("free")


def of_pyramid(view: Any, **more: Any) -> WSGIApplication:
    with Configurator() as config:
        config.add_route("priced", "/priced/{number}")
        config.add_route("free", "/free")
        config.add_route("plain", "/plain")
        config.add_view(view, route_name="priced", **more)
        config.add_view(InClass, attr="free", route_name="free")
        config.add_view(lambda _: Response("plain"), route_name="plain")
        app: WSGIApplication = config.make_wsgi_app()
    return app


APPS = {
    "bottle": of_bottle,
    "falcon": of_falcon,
    "pyramid, request": lambda: of_pyramid(requested),
    "pyramid, context and request": lambda: of_pyramid(in_context),
    "pyramid, class": lambda: of_pyramid(InClass, attr="show"),
}


@pytest.mark.parametrize("framework", APPS)
def test_a_view_says_how_it_is_metered(
    openmeter: OpenMeterServer, framework: str, caplog: pytest.LogCaptureFixture
) -> None:
    middleware = OpenMeterMiddleware(
        APPS[framework](), api_url=openmeter.url, flush_interval=60, meters={"r": 1}
    )

    answers = [
        serve(middleware, make_environ(PATH_INFO=path))
        for path in ("/priced/7", "/free", "/plain", "/priced/8")
    ]

    middleware.close(40)
    assert answers == [b"priced 7", b"free", b"plain", b"priced 8"]
    billed = [each for each in usage(openmeter.taken) if each[0] == "credits"]
    assert billed == [("credits", {"total": 5})] * 2
    assert middleware.stats().not_metered == {"no_meter": 1}
    assert "outside a metered request" not in caplog.text


def test_what_is_called_after_a_request_of_bottle_is_outside_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    middleware = OpenMeterMiddleware(of_bottle(), dry_run=True, meters={"r": 1})
    serve(middleware, make_environ(PATH_INFO="/plain"))

    priced(lambda: None)()

    # Bottle leaves its last request in the thread.
    assert "outside a metered request" in caplog.text
    assert middleware.stats().dropped["dry_run"] == 1
    assert "late" not in middleware.stats().dropped


@pytest.mark.parametrize("decorate", [priced, no_meter])
def test_a_decorated_view_has_the_signature_of_the_view(decorate: Any) -> None:
    def view(context: int, request: str, *, deep: bool = False) -> None: ...

    decorated = decorate(view)

    assert inspect.getfullargspec(decorated) == inspect.getfullargspec(view)
    assert decorate(max) is not None  # has no readable signature
