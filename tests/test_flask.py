"""The Flask extension, with applications as people write them."""

import json
import logging

import flask
import flask_login
import pytest
from flask.views import MethodView

from entitling import NO, YES, Entitled
from entitling import metered as metered_entitlement
from openmeter_wsgi import (
    ConfigError,
    OpenMeterMiddleware,
    Policy,
    add_meters,
    check_entitlements,
    meter,
    no_meter,
    require_entitlements,
    route,
    set_subject,
    set_user,
)
from openmeter_wsgi.flask import OpenMeter, subject_from

PROBLEM = "application/problem+json"


class User(flask_login.UserMixin):
    def __init__(self, name):
        self.id = name
        self.company = {"customer": f"{name}-inc"}


@pytest.fixture
def entitled(openmeter):
    return Entitled(openmeter)


@pytest.fixture
def make(openmeter):
    """Return a function that makes a metered application of one view."""
    made = []

    def make(view=lambda: "ok", *, config=(), **options):
        app = flask.Flask("shop")
        app.secret_key = "secret"
        app.config["OPENMETER_API_URL"] = openmeter.url
        app.config["OPENMETER_FLUSH_INTERVAL"] = 60
        app.config.update(config)
        options.setdefault("meters", {"api_requests": 1})
        OpenMeter(app, **options)
        app.add_url_rule(
            "/<name>", "view", lambda name: view(), methods=["GET", "POST"]
        )
        made.append(app)
        return app

    yield make
    for app in made:
        app.extensions["openmeter"].close(40)


def billed(app, openmeter):
    """Return subject and type of the billed events."""
    assert app.extensions["openmeter"].flush(20)
    return [(event["subject"], event["type"]) for event in openmeter.taken]


def with_login(app, *, loads=None):
    """Add Flask-Login: a token is the name of its user."""
    manager = flask_login.LoginManager(app)

    @manager.request_loader
    def load(request):
        if loads is not None:
            loads.append(request.path)
        token = request.headers.get("Authorization")
        return User(token) if token else None

    return app


def get(app, path="/x", **headers):
    return app.test_client().get(path, headers=headers)


# -- Where options come from


def test_keywords_win_over_config_and_config_over_variables(make, monkeypatch):
    for name in ("BATCH_SIZE", "EVENT_SOURCE", "SUBJECT_PATH"):
        monkeypatch.setenv(f"OPENMETER_{name}", "7")

    app = make(
        config={"OPENMETER_EVENT_SOURCE": "config", "OPENMETER_SUBJECT_PATH": "n"},
        subject_path="keyword",
    )

    policy = app.extensions["openmeter"].policy
    said = (policy.batch_size, policy.event_source, policy.subject_path)
    assert said == (7, "config", "keyword")


def test_a_policy_takes_the_place_of_config_and_variables(openmeter, monkeypatch):
    monkeypatch.setenv("OPENMETER_BATCH_SIZE", "7")
    app = with_login(flask.Flask("shop"))
    app.config["OPENMETER_API_URL"] = "http://nowhere"
    policy = Policy(api_url=openmeter.url, meters={"searches": 2}, flush_interval=60)

    OpenMeter(app, policy, event_source="shop")
    app.add_url_rule("/x", "view", lambda: "ok")
    get(app, Authorization="acme")

    assert billed(app, openmeter) == [("acme", "searches")]
    told = app.extensions["openmeter"].policy
    assert (told.event_source, told.batch_size) == ("shop", policy.batch_size)
    app.extensions["openmeter"].close(40)


ZUPLO = {
    "policies": [
        {
            "name": "metering",
            "policyType": "openmeter-inbound",
            "handler": {
                "export": "OpenMeterInboundPolicy",
                "module": "$import(@zuplo/runtime)",
                "options": {
                    "apiUrl": "$env(OPENMETER)",
                    "meter": {"type": "search", "data": {"total": 1}},
                    "requiredEntitlements": ["searches"],
                },
            },
        }
    ]
}


def test_a_policy_of_zuplos_asks_for_the_user_that_before_request_has_set(
    openmeter, entitled, monkeypatch, tmp_path
):
    monkeypatch.setenv("OPENMETER", openmeter.url)
    file = tmp_path / "policies.json"
    file.write_text(json.dumps(ZUPLO))
    app = flask.Flask("shop")
    OpenMeter(app, Policy.from_zuplo(file, flush_interval=60))
    app.add_url_rule("/x", "view", lambda: "ok")
    entitled.values = {"acme": {"searches": YES}, "globex": {"searches": NO}}

    @app.before_request
    def authenticate():
        if name := flask.request.headers.get("Authorization"):
            set_user(flask.request, {"sub": name})

    statuses = [get(app, Authorization=name).status_code for name in ("acme", "globex")]

    assert statuses == [200, 403]
    assert get(app).status_code == 401
    assert billed(app, openmeter) == [("acme", "search")]
    app.extensions["openmeter"].close(40)


def test_a_401_before_the_application_names_the_way_in_the_log(
    openmeter, entitled, caplog
):
    app = flask.Flask("shop")
    middleware = OpenMeterMiddleware(
        app.wsgi_app, api_url=openmeter.url, required_entitlements=["searches"]
    )
    app.wsgi_app = middleware
    app.before_request(lambda: set_user(flask.request, {"sub": "acme"}))

    assert get(app).status_code == 401

    (line,) = [r.getMessage() for r in caplog.records if "401" in r.getMessage()]
    assert "openmeter_wsgi.flask.OpenMeter" in line
    assert "set_user" in line
    middleware.close(40)


def test_text_in_the_config_is_read_as_that_of_a_variable(make):
    app = make(
        config={
            "OPENMETER_BATCH_SIZE": "3",
            "OPENMETER_ROUTES": '{"/free": null}',
            "OPENMETER_API_KEY": "",
        }
    )

    policy = app.extensions["openmeter"].policy
    assert (policy.batch_size, policy.routes) == (3, {"/free": None})
    assert policy.api_key is None


def test_every_problem_is_told_at_once(make):
    with pytest.raises(ConfigError) as raised:
        make(
            config={"OPENMETER_BATCH_SISE": 3, "OPENMETER_FLUSH_INTERVAL": -1},
            subject="user.id",
            routes={"/x": {"subject": "nobody"}},
        )

    said = raised.value.problems
    assert len(said) == 4
    assert said[0].startswith("subject: expected 'header:Name', a callable on the")
    assert said[0].endswith("'session.customer' or 'current_user.id', got 'user.id'")
    assert said[1].startswith("routes['/x']: subject: expected 'header:Name'")
    assert said[2] == "unknown option 'batch_sise' (did you mean 'batch_size'?)"
    assert said[3].startswith("flush_interval: expected")


def test_one_extension_meters_every_application_of_a_factory(openmeter):
    extension = OpenMeter(meters={"api_requests": 1})

    def create_app(name):
        app = flask.Flask(name)
        app.config.from_mapping(
            OPENMETER_API_URL=openmeter.url, OPENMETER_EVENT_SOURCE=name
        )
        extension.init_app(app)
        return app

    apps = [create_app("one"), create_app("two")]

    middlewares = [app.extensions["openmeter"] for app in apps]
    assert [m.policy.event_source for m in middlewares] == ["one", "two"]
    assert all(isinstance(m, OpenMeterMiddleware) for m in middlewares)


def test_an_application_is_not_metered_twice(make):
    app = make()

    with pytest.raises(ConfigError, match="app 'shop': is already metered"):
        OpenMeter().init_app(app)


# -- Subjects


def test_the_user_of_flask_login_is_the_subject(make, openmeter):
    app = with_login(make())

    get(app, Authorization="acme")

    assert billed(app, openmeter) == [("acme", "api_requests")]


def test_whoever_is_not_logged_in_has_no_subject(make):
    app = with_login(make())

    get(app)

    stats = app.extensions["openmeter"].stats()
    assert (stats.events, stats.not_metered) == (0, {"no_subject": 1})


def test_whoever_is_not_logged_in_is_not_billed_under_the_name_of_a_guest(make):
    class Guest(flask_login.AnonymousUserMixin):
        id = "guest"

    app = with_login(make(subject="current_user.id"))
    app.login_manager.anonymous_user = Guest

    get(app)

    assert app.extensions["openmeter"].stats().not_metered == {"no_subject": 1}


@pytest.mark.parametrize(
    ("subject", "expected"),
    [("current_user.company.customer", "acme-inc"), ("current_user", "acme")],
)
def test_a_path_through_the_user_names_the_subject(make, openmeter, subject, expected):
    app = with_login(make(subject=subject))

    get(app, Authorization="acme")

    assert billed(app, openmeter) == [(expected, "api_requests")]


def test_claims_in_g_name_the_subject_although_views_set_them(make, openmeter):
    def view():
        flask.g.jwt = {"sub": "acme", "scope": "read"}  # as a decorator would
        return "ok"

    app = make(view, subject="g.jwt.sub")

    get(app)

    assert billed(app, openmeter) == [("acme", "api_requests")]


def test_the_session_names_the_subject(make, openmeter):
    app = make(subject="session.customer")
    client = app.test_client()
    with client.session_transaction() as session:
        session["customer"] = "acme"

    client.get("/x")

    assert billed(app, openmeter) == [("acme", "api_requests")]


def test_a_callable_may_use_what_a_view_may(make, openmeter):
    app = make(subject=lambda environ: flask.request.args["customer"])

    get(app, "/x?customer=acme")

    assert billed(app, openmeter) == [("acme", "api_requests")]


def test_a_header_names_the_subject_as_everywhere(make, openmeter):
    app = make(subject="header:X-Customer")

    get(app, **{"X-Customer": "acme"})

    assert billed(app, openmeter) == [("acme", "api_requests")]


def test_a_route_has_a_subject_of_its_own(make, openmeter):
    def view():
        flask.g.customer, flask.g.partner = "acme", "globex"
        return "ok"

    app = make(
        view, subject="g.customer", routes={"/partner": {"subject": "g.partner"}}
    )

    for path in ("/x", "/partner"):
        get(app, path)

    assert [subject for subject, _ in billed(app, openmeter)] == ["acme", "globex"]


def test_a_view_has_a_subject_of_its_own(make, openmeter):
    @meter(subject=subject_from("g.partner"))
    def view():
        flask.g.customer, flask.g.partner = "acme", "globex"
        return "ok"

    app = make(view, subject="g.customer")

    get(app)

    assert billed(app, openmeter) == [("globex", "api_requests")]


@pytest.mark.parametrize("say", [set_subject, lambda r, s: set_user(r, {"sub": s})])
def test_what_a_handler_says_goes_before_the_login(make, openmeter, say):
    def view():
        say(flask.request, "globex")
        return "ok"

    app = with_login(make(view))

    get(app, Authorization="acme")

    assert billed(app, openmeter) == [("globex", "api_requests")]


def test_nobody_is_looked_up_for_what_is_not_billed(make, openmeter):
    loads = []
    app = with_login(make(lambda: ("no", 404)), loads=loads)

    get(app, Authorization="acme")

    assert billed(app, openmeter) == []
    assert loads == []


def test_nobody_is_looked_up_for_a_view_that_is_not_metered(make, openmeter):
    loads = []
    app = with_login(make(no_meter(lambda: "free")), loads=loads)

    get(app, Authorization="acme")

    assert billed(app, openmeter) == []
    assert loads == []


def test_without_flask_login_a_session_is_not_touched(make):
    response = get(make())

    assert "Vary" not in response.headers


def test_reading_the_session_for_the_bill_changes_no_header(make, openmeter):
    app = make(subject="session.customer")

    assert "Vary" not in get(app).headers


def test_a_login_that_fails_costs_the_event_and_not_the_response(make, caplog):
    app = make()

    @flask_login.LoginManager(app).request_loader
    def load(request):
        raise RuntimeError("the database went away")

    with caplog.at_level(logging.ERROR, "openmeter_wsgi"):
        response = get(app)

    assert response.text == "ok"
    assert "the database went away" in caplog.text
    assert app.extensions["openmeter"].stats().not_metered == {"no_subject": 1}


# -- Usage


def test_a_blueprint_is_metered_by_its_route(openmeter):
    blueprint = flask.Blueprint("api", __name__, url_prefix="/v1")

    @blueprint.get("/products/<int:number>")
    def product(number):
        add_meters(flask.request, {"credits": number})
        return "ok"

    app = flask.Flask("shop")
    OpenMeter(
        app,
        api_url=openmeter.url,
        meter={"type": "api-request", "data": {"route": route()}},
        on_missing_subject="acme",
    )
    app.register_blueprint(blueprint)

    get(app, "/v1/products/7")
    app.extensions["openmeter"].close(40)

    usage = {event["type"]: event["data"] for event in openmeter.taken}
    assert usage == {
        "credits": {"total": 7},
        "api-request": {"route": "/v1/products/<int:number>"},
    }


def test_decorated_views_say_how_they_are_metered(make, openmeter):
    app = make(meter(meters={"exports": 1})(lambda: "ok"), on_missing_subject="acme")
    app.add_url_rule("/health/live", "live", no_meter(lambda: "ok"))

    get(app)
    get(app, "/health/live")

    assert billed(app, openmeter) == [("acme", "exports")]
    assert app.extensions["openmeter"].stats().not_metered == {"no_meter": 1}


def test_a_view_that_raises_is_not_billed_and_still_raises(make, openmeter):
    def view():
        raise RuntimeError("the printer is on fire")

    app = make(view, on_missing_subject="acme")
    app.testing = True

    with pytest.raises(RuntimeError, match="printer"):
        get(app)
    app.testing = False
    assert get(app).status_code == 500

    assert billed(app, openmeter) == []


# -- In tests of the application


def test_a_response_that_a_test_keeps_is_settled(make):
    app = make(on_missing_subject="acme")

    response = app.test_client().get("/x")

    assert app.extensions["openmeter"].stats().settled == 1
    assert (response.text, response.status_code) == ("ok", 200)


@pytest.mark.parametrize("status", [204, 304])
def test_a_response_without_a_body_is_settled(make, status):
    app = make(lambda: ("", status), on_missing_subject="acme")

    response = app.test_client().get("/x")

    assert app.extensions["openmeter"].stats().settled == 1
    assert response.data == b""


def test_a_stream_is_left_to_the_test(make, openmeter):
    def view():
        def stream():
            for _ in range(3):
                yield b"page"
                add_meters(flask.request, {"pages": 1})

        return flask.Response(flask.stream_with_context(stream()))

    app = make(view, on_missing_subject="acme")

    with app.test_client().get("/x") as response:
        assert app.extensions["openmeter"].stats().settled == 0
        assert response.data == b"page" * 3

    assert billed(app, openmeter) == [("acme", "api_requests"), ("acme", "pages")]
    assert openmeter.taken[1]["data"] == {"total": 3}


def test_the_context_that_a_test_keeps_is_there(make):
    app = make(on_missing_subject="acme")

    with app.test_client() as client:
        client.get("/x?a=1")

        assert flask.request.args["a"] == "1"
    assert app.extensions["openmeter"].stats().settled == 1


def test_a_test_client_of_ones_own_keeps_what_it_can(openmeter):
    app = flask.Flask("shop")
    app.secret_key = "secret"
    flask_login.LoginManager(app).user_loader(User)
    app.test_client_class = flask_login.FlaskLoginClient
    app.add_url_rule("/", "view", lambda: flask_login.current_user.id)
    OpenMeter(app, api_url=openmeter.url, meters={"api_requests": 1})

    response = app.test_client(user=User("acme")).get("/")

    assert response.text == "acme"
    assert billed(app, openmeter) == [("acme", "api_requests")]
    app.extensions["openmeter"].close(40)


# -- Entitlements


def test_entitlements_are_asked_for_after_authentication(make, entitled):
    entitled.values = {"acme": {"searches": YES}, "globex": {"searches": NO}}
    called = []
    app = make(
        lambda: called.append(flask.g.jwt) or "ok",
        required_entitlements=["searches"],
        subject="g.jwt.sub",
    )

    @app.before_request
    def authenticate():
        flask.g.jwt = {"sub": flask.request.headers["Authorization"]}

    allowed = get(app, Authorization="acme")
    denied = get(app, Authorization="globex")

    assert allowed.text == "ok"
    assert called == [{"sub": "acme"}]
    assert (denied.status_code, denied.content_type) == (403, PROBLEM)
    assert json.loads(denied.data)["feature"] == "searches"
    assert app.extensions["openmeter"].stats().not_metered == {"denied": 1}


def test_a_route_requires_what_its_policy_says(make, entitled):
    app = make(
        on_missing_subject="acme",
        routes={"/reports": {"required_entitlements": ["reports"]}},
    )

    assert get(app, "/reports").status_code == 403
    assert get(app, "/x").status_code == 200


def test_whoever_is_nobody_is_answered_401(make, entitled):
    app = with_login(make(required_entitlements=["searches"]))

    response = get(app)

    assert (response.status_code, response.json["reason"]) == (401, "no_subject")
    assert entitled.questions == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/not/here", 404), ("PUT", "/x", 405), ("OPTIONS", "/x", 200)],
)
def test_nothing_is_asked_where_no_view_is_called(make, entitled, method, path, status):
    app = make(required_entitlements=["searches"], on_missing_subject="acme")

    response = app.test_client().open(path, method=method)

    assert response.status_code == status
    assert entitled.questions == 0


def test_views_decide_by_themselves(make, entitled):
    entitled.values["acme"] = {"searches": NO}

    def view():
        if not check_entitlements(flask.request, "searches").allowed:
            require_entitlements(flask.request, "searches")
        return "all of it"

    app = make(view, on_missing_subject="acme")

    response = get(app)

    assert (response.status_code, response.content_type) == (403, PROBLEM)


def test_an_unmetered_view_needs_no_entitlement(make, entitled):
    app = make(required_entitlements=["searches"], on_missing_subject="acme")
    app.add_url_rule("/health/live", "live", no_meter(lambda: "alive"))

    assert get(app, "/health/live").text == "alive"
    assert entitled.questions == 0


def test_a_view_with_features_of_its_own_is_asked_for_those_alone(make, entitled):
    entitled.values["acme"] = {"exports": YES}
    view = meter(required_entitlements=["exports"])(lambda: "ok")
    app = make(required_entitlements=["searches"], on_missing_subject="acme")
    app.add_url_rule("/v1/export", "export", view)

    assert get(app, "/v1/export").text == "ok"
    assert set(entitled.asked) == {("acme", "exports")}


class Exports(MethodView):
    @meter(required_entitlements=["exports"])
    def get(self):
        return "ok"

    @no_meter
    def delete(self):
        return "ok"

    def post(self):
        return "ok"


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("GET", {("acme", "exports")}), ("HEAD", {("acme", "exports")}),
        ("DELETE", set()), ("POST", {("acme", "searches")}),
    ],
)  # fmt: skip
def test_a_method_of_a_class_is_asked_for_its_own_features_alone(
    make, entitled, method, asked
):
    entitled.values["acme"] = {"exports": YES, "searches": YES}
    app = make(required_entitlements=["searches"], on_missing_subject="acme")
    app.add_url_rule("/v1/export", view_func=Exports.as_view("export"))

    assert app.test_client().open("/v1/export", method=method).status_code == 200
    assert set(entitled.asked) == asked


def test_the_application_answers_in_its_own_way(make, entitled):
    def denied_response(environ, decision):
        return flask.Response(f"no {decision.denied[0].feature}", 418)

    app = make(
        required_entitlements=["searches"],
        on_missing_subject="acme",
        denied_response=denied_response,
    )

    response = get(app)

    assert (response.status_code, response.text) == (418, "no searches")


def test_the_quota_is_told(make, entitled):
    entitled.values["acme"] = {"searches": metered_entitlement(70)}
    app = make(
        required_entitlements=["searches"],
        on_missing_subject="acme",
        usage_headers=True,
    )

    response = get(app)

    assert response.headers["RateLimit-Limit"] == "100"
    assert response.headers["RateLimit-Remaining"] == "70"
