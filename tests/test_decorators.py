"""Views that say of themselves how they are metered: Flask's, Django's, others'."""

from __future__ import annotations

import contextlib
import functools
import io
from typing import TYPE_CHECKING, Any

import flask
import pytest
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse, StreamingHttpResponse
from django.test.utils import override_settings
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View

from billing import serve, usage
from openmeter_wsgi import (
    ConfigError,
    OpenMeterMiddleware,
    add_meters,
    bytes_received,
    bytes_sent,
    computed,
    duration,
    llm_usage,
    meter,
    no_meter,
    route,
    set_route,
)
from openmeter_wsgi.decorators import MAX_OPTION_SETS
from openmeter_wsgi.flask import OpenMeter as FlaskExtension
from openmeter_wsgi.request import billing_of
from openmeter_wsgi.testing import OpenMeter
from servers import Consumer, make_environ

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_server import OpenMeterServer
    from openmeter_wsgi import Stats

Environ = dict[str, Any]
EVENT = (
    'data: {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}'
    "\n\n"
)

if not settings.configured:
    settings.configure(SECRET_KEY="tests")


def with_user(view: Any) -> Any:
    """Pass a mapping as first argument, as decorators for authentication do."""

    @functools.wraps(view)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return view({"sub": "acme"}, *args, **kwargs)

    return wrapped


# -- Flask


of_flask = flask.Flask(__name__)


@of_flask.get("/plain")
def flask_plain() -> str:
    return "plain"


@of_flask.get("/priced/<int:number>")
@meter(meters={"credits": 5})
def flask_priced(number: int) -> str:
    return "priced"


@of_flask.get("/free")
@no_meter
def flask_free() -> str:
    return "free"


@of_flask.get("/user")
@with_user
@meter(meters={"users": 1})
def flask_user(user: dict[str, str]) -> str:
    return "user"


@of_flask.get("/free-user")
@with_user
@no_meter
def flask_free_user(user: dict[str, str]) -> str:
    return "user"


@of_flask.get("/measured/<name>")
@meter(meter={"type": "view", "data": {"bytes": bytes_sent(), "route": route()}})
def flask_measured(name: str) -> Iterator[str]:
    return iter(["12", "345"])


@of_flask.get("/model")
@meter(meters={"tokens": llm_usage("total_tokens")})
def flask_model() -> flask.Response:
    return flask.Response(iter([EVENT]), mimetype="text/event-stream")


@of_flask.get("/slow")
@meter(meters={"seconds": duration()})
def flask_slow() -> str:
    return str(sum(range(300_000)))


@of_flask.get("/created")
@meter(meter_on_status_codes="201")
def flask_created() -> str:
    return "not created"


@of_flask.get("/awaited")
@meter(meters={"credits": 7})
async def flask_awaited() -> str:
    return "awaited"


@of_flask.get("/free-awaited")
@no_meter
async def flask_free_awaited() -> str:
    return "free"


@of_flask.get("/streamed")
def flask_streamed() -> flask.Response:
    def stream() -> Iterator[str]:
        for _ in range(3):
            yield "page"
            add_meters(flask.request, {"pages": 1})
            if "broken" in flask.request.args:
                raise ValueError("the database went away")

    return flask.Response(flask.stream_with_context(stream()))


# -- Django


@meter(meters={"credits": 7})
async def awaited(request: Any) -> HttpResponse:
    return HttpResponse("awaited")


class FreeAwaited(View):
    async def get(self, request: Any) -> HttpResponse:
        return HttpResponse("free")


class Priced(View):
    @method_decorator(meter(meters={"credits": 5}))
    def get(self, request: Any, number: int) -> HttpResponse:
        return HttpResponse("priced")


def plain(request: Any) -> HttpResponse:
    return HttpResponse("plain")


@no_meter
def free(request: Any) -> HttpResponse:
    return HttpResponse("free")


@with_user
@meter(meters={"users": 1})
def user(user: Any, request: Any) -> HttpResponse:
    return HttpResponse("user")


@with_user
@no_meter
def free_user(user: Any, request: Any) -> HttpResponse:
    return HttpResponse("user")


@meter(meter={"type": "view", "data": {"bytes": bytes_sent(), "route": route()}})
def measured(request: Any, name: str) -> StreamingHttpResponse:
    set_route(request, "/measured/<name>")
    return StreamingHttpResponse(iter(["12", "345"]))


@meter(meters={"tokens": llm_usage("total_tokens")})
def model(request: Any) -> StreamingHttpResponse:
    return StreamingHttpResponse(iter([EVENT]), content_type="text/event-stream")


@meter(meter_on_status_codes="201")
def created(request: Any) -> HttpResponse:
    return HttpResponse("not created")


def streamed(request: Any) -> StreamingHttpResponse:
    def stream() -> Iterator[str]:
        for _ in range(3):
            yield "page"
            add_meters(request, {"pages": 1})
            if "broken" in request.GET:
                raise ValueError("the database went away")

    return StreamingHttpResponse(stream())


class Urls:
    urlpatterns = (
        path("plain", plain), path("priced/<int:number>", Priced.as_view()),
        path("free", free), path("user", user), path("free-user", free_user),
        path("measured/<name>", measured), path("model", model),
        path("created", created), path("streamed", streamed),
        path("awaited", awaited), path("free-awaited", no_meter(FreeAwaited.as_view())),
    )  # fmt: skip


@pytest.fixture(params=["flask", "django"])
def app(request: pytest.FixtureRequest) -> Iterator[WSGIApplication]:
    if request.param == "flask":
        yield of_flask.wsgi_app
        return
    with override_settings(ROOT_URLCONF=Urls, ALLOWED_HOSTS=["*"], MIDDLEWARE=[]):
        yield get_wsgi_application()


def billed(
    openmeter: OpenMeterServer,
    app: WSGIApplication,
    *paths: str,
    stop_after: int | None = None,
    **options: Any,
) -> tuple[list[tuple[str, Any]], Stats]:
    """Request *paths* and return the usage and the statistics."""
    options = {"meters": {"requests": 1}, **options}
    middleware = OpenMeterMiddleware(
        app, api_url=openmeter.url, flush_interval=60, **options
    )
    for path_ in paths:
        name, _, query = path_.partition("?")
        environ = make_environ(PATH_INFO=name, QUERY_STRING=query)
        Consumer(stop_after=stop_after).serve(middleware, environ)
    stats = middleware.stats()
    middleware.close(10)
    return usage(openmeter.taken), stats


@pytest.mark.parametrize(
    ("path_", "events"),
    [
        ("/plain", [("requests", {"total": 1})]),
        ("/priced/7", [("credits", {"total": 5})]),
        ("/awaited", [("credits", {"total": 7})]),
        ("/free-awaited", []),
        ("/user", [("users", {"total": 1})]),
        (
            "/measured/x",
            [("view", {"bytes": 5, "route": "/measured/<name>"})],
        ),
        ("/model", [("tokens", {"total": 2})]),
        ("/free", []),
        ("/free-user", []),
        ("/created", []),
    ],
)
def test_a_view_says_how_it_is_metered(
    openmeter: OpenMeterServer, app: WSGIApplication, path_: str, events: list[Any]
) -> None:
    assert billed(openmeter, app, path_)[0] == events


def test_a_view_measures_what_its_route_does_not(
    openmeter: OpenMeterServer, app: WSGIApplication
) -> None:
    # The route looks at the length alone, the view at the body too.
    events, _ = billed(
        openmeter, app, "/model", "/plain", meters={"bytes": bytes_sent()}
    )

    assert events == [("tokens", {"total": 2}), ("bytes", {"total": 5})]


def test_a_view_is_counted_under_its_name(
    openmeter: OpenMeterServer, app: WSGIApplication
) -> None:
    _, stats = billed(openmeter, app, "/created", "/created", "/free")

    by_policy = dict(stats.not_metered_by_policy)
    assert by_policy.pop("default") == {"no_meter": 1}
    assert by_policy in (
        {"view flask_created": {"status": 2}},
        {"view created": {"status": 2}},
    )


def test_without_meters_of_the_middleware_only_decorated_views_are_billed(
    openmeter: OpenMeterServer, app: WSGIApplication
) -> None:
    events, stats = billed(openmeter, app, "/plain", "/priced/1", meters=None)

    assert events == [("credits", {"total": 5})]
    assert stats.not_metered == {"no_usage": 1}


def test_a_view_on_a_route_that_is_not_metered_says_so(
    openmeter: OpenMeterServer, app: WSGIApplication, caplog: pytest.LogCaptureFixture
) -> None:
    events, _ = billed(openmeter, app, "/priced/1", routes={"*": None})

    assert events == []
    assert "called outside a metered request, so it is not billed" in caplog.text


@pytest.mark.parametrize(
    ("query", "stop_after", "pages"), [("", None, 3), ("?broken", None, 1), ("", 2, 1)]
)
def test_usage_stated_in_a_stream_counts_until_it_ends(
    openmeter: OpenMeterServer,
    app: WSGIApplication,
    query: str,
    stop_after: int | None,
    pages: int,
) -> None:
    events, _ = billed(openmeter, app, f"/streamed{query}", stop_after=stop_after)

    flat = [] if query else [("requests", {"total": 1})]
    assert events == [*flat, ("pages", {"total": pages})]


def test_a_duration_lasts_from_the_call_of_the_view(openmeter: OpenMeterServer) -> None:
    events, _ = billed(openmeter, of_flask.wsgi_app, "/slow")

    # The time of the view counts, and not only the time after it.
    assert events[0][1]["total"] > 0.0005


# -- Any other


@meter(meters={"bytes": bytes_sent()})
def generated(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"12"
    yield b"345"


def test_a_generator_that_starts_late_is_measured(openmeter: OpenMeterServer) -> None:
    assert billed(openmeter, generated, "/")[0] == [("bytes", {"total": 5})]


def test_a_view_that_is_called_in_the_middle_of_a_stream_is_measured(
    openmeter: OpenMeterServer,
) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        yield b""
        yield from generated(environ, start_response)

    events, _ = billed(openmeter, app, "/")

    assert events == [("bytes", {"total": 5})]


def test_options_that_are_gone_are_not_taken_for_others() -> None:
    # A view may be made anew for each request, and its options where old ones were.
    billing = OpenMeterMiddleware(generated, dry_run=True).process().billing

    for source in map(str, range(50)):
        options = {"event_source": source}
        assert billing.variant("view", options).policy.event_source == source
        del options


@pytest.mark.parametrize("read_before", [False, True])
def test_a_view_counts_a_body_that_states_no_length(
    openmeter: OpenMeterServer, read_before: bool
) -> None:
    app = flask.Flask(__name__)

    @app.post("/upload")
    @meter(meters={"bytes": bytes_received()})
    def upload() -> str:
        return str(len(flask.request.get_data()))

    @app.before_request
    def look() -> None:
        if read_before:
            flask.request.get_data()

    middleware = OpenMeterMiddleware(
        app.wsgi_app, api_url=openmeter.url, flush_interval=60
    )
    body = {"wsgi.input": io.BytesIO(b"hello"), "wsgi.input_terminated": True}

    answer = serve(middleware, make_environ("POST", PATH_INFO="/upload", **body))

    middleware.close(40)
    assert answer == b"5"
    # Bytes that were read before the view was called are not counted.
    expected = [] if read_before else [("bytes", {"total": 5})]
    assert usage(openmeter.taken) == expected
    assert middleware.stats().not_metered == (
        {"no_value_none": 1} if read_before else {}
    )


def anew(**made: Any) -> list[dict[str, Any]]:
    """Return the same options twice, made of objects of their own each time."""

    def subject(environ: Environ) -> str:
        return str(made)

    return [
        {
            "meters": {"bytes": bytes_sent(), "pages": computed(lambda _: made["n"])},
            "meter": [{"type": "t", "data": {"route": route(), "deep": [1, {"a": 2}]}}],
            "meter_on_status_codes": [200, 201],
            "subject": subject if made["n"] else lambda environ: "acme",
        }
        for _ in range(2)
    ]


def governing(
    middleware: OpenMeterMiddleware, options: dict[str, Any], view: Any
) -> object:
    """Return the billing of a request whose view is decorated during the request."""
    governs: list[object] = []

    def served(environ: Environ) -> None:
        governs.append(billing_of(environ))

    def app(environ: Environ, start_response: StartResponse) -> list[bytes]:
        served.__qualname__ = view
        meter(**options)(served)(environ)
        start_response("200 OK", [])
        return []

    middleware.app = app
    serve(middleware, make_environ())
    return governs[0]


def test_a_decorator_that_is_applied_anew_for_each_request_makes_one_policy() -> None:
    middleware = OpenMeterMiddleware(generated, dry_run=True)
    for n in (0, 1):
        first, second = anew(n=n)
        others = [
            {**first, "meters": {"pages": computed(lambda _: 7)}},
            {**first, "meters": {"pages": 1}},
            {**first, "meters": {"pages": 1.0}},
            {**first, "subject": None},
            {**first, "meter": {"type": "t", "data": {"route": route().default("/")}}},
        ]

        one = governing(middleware, first, "view")

        assert governing(middleware, second, "view") is one
        made = [governing(middleware, options, "view") for options in others]
        made.append(governing(middleware, first, "other_view"))
        assert len({id(each) for each in [one, *made]}) == len(made) + 1


def test_what_a_function_has_of_its_own_makes_other_options() -> None:
    middleware = OpenMeterMiddleware(generated, dry_run=True)

    governs = [governing(middleware, anew(n=n)[0], "view") for n in (1, 2, 1)]

    assert governs[0] is governs[2] is not governs[1]


def test_options_that_differ_with_each_request_are_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    middleware = OpenMeterMiddleware(generated, dry_run=True)

    for _ in range(MAX_OPTION_SETS + 1):
        options = {"meter_when": object().__eq__}
        governing(middleware, options, "telling_view")

    (said,) = [r for r in caplog.records if "telling_view" in r.getMessage()]
    assert said.levelname == "WARNING"
    assert "again and again with different options" in said.getMessage()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"meter_s": 1}, "unknown option 'meter_s' (did you mean 'meters'?)"),
        ({"meters": {"a": -1}}, "meters: meter 'a': expected a number"),
        ({"api_url": "x"}, "api_url: belongs to the middleware as a whole"),
    ],
)
def test_a_wrong_option_is_told_where_the_view_stands(
    options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        meter(**options)

    assert problem in str(refused.value)


def plain(environ: Environ, start_response: StartResponse) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"plain"]


def test_a_view_may_require_nothing(openmeter: OpenMeterServer) -> None:
    view = meter(required_entitlements=[])(plain)

    events, stats = billed(openmeter, view, "/")

    assert events == [("requests", {"total": 1})]
    assert stats.allowed == {}


def test_options_that_contradict_those_of_the_route_hurt_no_request(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    # Ids of a proxy need a source of events, which only the route's policy may have.
    view = meter(
        trusted_request_id_header="X-Request-Id", required_entitlements=["reports"]
    )(plain)

    events, stats = billed(openmeter, view, "/")

    assert events == [("requests", {"total": 1})]
    assert sum(stats.let_through.values()) == 1  # it was asked for all the same
    assert "event_source: expected the name" in caplog.text
    assert "its requests are billed as those of its route" in caplog.text


def test_a_key_that_is_being_exchanged_hurts_no_first_call_of_a_view(
    openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("om_key")
    view = meter(meters={"views": 1})(plain)
    middleware = OpenMeterMiddleware(
        view, api_url=openmeter.url, api_key_file=key, meters={"requests": 1}
    )

    key.unlink()
    assert serve(middleware, make_environ()) == b"plain"
    key.write_text("om_key")
    assert serve(middleware, make_environ()) == b"plain"
    middleware.close(10)

    kinds = [kind for kind, _ in usage(openmeter.taken)]
    assert kinds == ["requests", "views"]


# -- Decorators in the wrong place


def misplaced() -> flask.Flask:
    app = flask.Flask(__name__)
    blueprint = flask.Blueprint("more", __name__)

    @no_meter
    @app.get("/above")
    def above() -> str:
        return "above"

    @no_meter
    @with_user
    @blueprint.get("/above-another")
    def above_another() -> str:
        return "above"

    @app.get("/below")
    @no_meter
    def below() -> str:
        return "below"

    # One function under two addresses, of which one is free.
    app.add_url_rule("/paid", "paid", plain_view)
    app.add_url_rule("/unpaid", "unpaid", no_meter(plain_view))
    app.register_blueprint(blueprint)
    return app


def plain_view() -> str:
    return "plain"


def without_middleware(app: flask.Flask) -> Any:
    return OpenMeterMiddleware(app.wsgi_app, dry_run=True, meters={"r": 1})


def extended(app: flask.Flask) -> Any:
    FlaskExtension(app, dry_run=True, meters={"r": 1})
    return app.wsgi_app


@pytest.mark.parametrize("metered", [without_middleware, extended])
@pytest.mark.parametrize("in_test", [False, True])
def test_a_decorator_above_the_one_that_registers_a_view_is_told_once(
    caplog: pytest.LogCaptureFixture, metered: Any, in_test: bool
) -> None:
    middleware = metered(misplaced())
    with OpenMeter() if in_test else contextlib.nullcontext():
        for path_info in ("/above", "/below", "/paid", "/above"):
            serve(middleware, make_environ(PATH_INFO=path_info))

    said = [
        r.getMessage()
        for r in caplog.records
        if "above the decorator" in r.getMessage()
    ]
    assert len(said) == 2
    assert all("for /above" in each for each in said)
