"""The Django edge, with views as people write them: see `django_site`."""

import asyncio
import contextlib
import json

import django
import pytest
from asgiref.testing import ApplicationCommunicator
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.test import Client, override_settings

from entitling import NO, YES, Entitled
from entitling import metered as metered_entitlement
from openmeter_server import problem as problem_of_server
from openmeter_wsgi import ConfigError, Policy, route
from openmeter_wsgi.django import get_wsgi_application
from openmeter_wsgi.django.settings import check_configuration
from openmeter_wsgi.django.view_middleware import template_of
from servers import Consumer, make_environ

VIEW_MIDDLEWARE = "openmeter_wsgi.django.ViewMiddleware"
TEMPLATES = [
    {"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}
]

if not settings.configured:
    settings.configure(SECRET_KEY="example", ROOT_URLCONF=())
django.setup()


@pytest.fixture
def entitled(openmeter):
    return Entitled(openmeter)


@pytest.fixture
def make(openmeter):
    """Return a function that makes the application; its keywords are settings."""
    with contextlib.ExitStack() as stack:

        def make(openmeter_settings=None, **options):
            said = {
                "MIDDLEWARE": ["django_site.Authenticate", VIEW_MIDDLEWARE],
                "ROOT_URLCONF": "django_site",
                "ALLOWED_HOSTS": ["*"],
                "DEBUG_PROPAGATE_EXCEPTIONS": False,
                "LOGGING_CONFIG": None,
                "INSTALLED_APPS": ["rest_framework"],
                "REST_FRAMEWORK": {"UNAUTHENTICATED_USER": None},
                "TEMPLATES": TEMPLATES,
                "STATIC_URL": "/static/",
                "OPENMETER": {
                    "api_url": openmeter.url,
                    "meters": {"api_requests": 1},
                    "flush_interval": 60,
                    **(openmeter_settings or {}),
                },
            }
            stack.enter_context(override_settings(**said))
            app = get_wsgi_application(**options)
            stack.callback(app.close, 10)
            return app

        yield make


def get(app, path="/plain", method="GET", **headers):
    """Serve a request of whom the headers name."""
    names = {f"HTTP_{k.upper().replace('-', '_')}": v for k, v in headers.items()}
    environ = make_environ(method, PATH_INFO=path, **names)
    del environ["REMOTE_USER"]
    return Consumer().serve(app, environ)


def by_user(name):
    return {"x-user": name}


def by_token(name):
    return {"x-token": name}


def billed(app, openmeter):
    """Return subject and type of the billed events."""
    assert app.flush(20)
    return [(event["subject"], event["type"]) for event in openmeter.taken]


def answer(response):
    """Return status, media type and document."""
    headers = dict(response.headers)
    body = json.loads(b"".join(response.body))
    return response.status[:3], headers["Content-Type"], body


# -- Subjects


def test_the_authenticated_user_is_the_subject(make, openmeter):
    app = make()

    response = get(app, **by_user("acme"))

    assert response.body == [b"ok"]
    assert billed(app, openmeter) == [("acme", "api_requests")]


def test_whoever_is_nobody_has_no_subject(make, openmeter):
    app = make()

    get(app)

    assert billed(app, openmeter) == []
    assert app.stats().not_metered == {"no_subject": 1}


def test_the_user_of_a_token_is_the_subject(make, openmeter):
    app = make()

    get(app, "/api/token", **by_token("acme"))

    assert sorted(billed(app, openmeter)) == [
        ("acme", "api_requests"),
        ("acme", "credits"),
    ]


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("request.user.company.customer", "acme-inc"),
        ("request.headers.X-Token", "acme"),
        ("header:X-Token", "acme"),
        (lambda environ: environ["HTTP_X_TOKEN"].upper(), "ACME"),
    ],
)
def test_the_settings_say_where_the_subject_is(make, openmeter, subject, expected):
    app = make({"subject": subject, "meters": None, "meter": {"type": "request"}})

    get(app, "/api/function", **by_user("acme"), **by_token("acme"))

    assert billed(app, openmeter) == [(expected, "request")]


def test_what_a_view_says_goes_before_its_user(make, openmeter):
    app = make()

    get(app, "/partner", **by_user("acme"))

    assert billed(app, openmeter) == [("globex", "api_requests")]


def test_a_class_based_view_says_how_it_is_metered(make, openmeter):
    app = make()

    get(app, "/report", **by_user("acme"))

    assert billed(app, openmeter) == [("acme-inc", "reports")]


def test_nobody_is_looked_up_for_what_is_not_billed(make):
    read = []
    app = make({"subject": read.append})

    get(app, "/nowhere")

    assert read == []
    assert app.stats().not_metered == {"status": 1}


def test_a_request_without_subject_is_named_by_method_and_path(make, caplog):
    app = make()

    for mount in ("/a\nb\x1b", ""):
        environ = make_environ(SCRIPT_NAME=mount, PATH_INFO="/plain")
        del environ["REMOTE_USER"]
        Consumer().serve(app, environ)

    (line,) = [one for one in caplog.messages if "without subject" in one]
    assert "a request without subject is not billed: GET /a b /plain (see" in line


def test_a_path_that_leads_to_nothing_is_named_with_the_request(make, caplog):
    app = make({"subject": "request.user.organization.slug"})

    get(app, "/plain", **by_user("acme"))

    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "'request.user.organization.slug': a User has no 'organization'" in line
    assert line.endswith(
        "1 requests without subject are not billed; the last one: GET /plain"
    )


# -- Usage


def test_a_stream_is_billed_as_far_as_it_was_sent(make, openmeter):
    app = make({"on_abort": "measured"})

    environ = make_environ(PATH_INFO="/stream", HTTP_X_USER="acme")
    Consumer(stop_after=2).serve(app, environ)
    response = get(app, "/stream", **by_user("acme"))

    assert response.body == [b"page"] * 3
    assert app.flush(20)
    found = [(e["type"], e["data"]["total"]) for e in openmeter.taken]
    assert found == [("pages", 1), ("api_requests", 1), ("pages", 3)]


@pytest.mark.parametrize("path", ["/file", "/asynchronous"])
def test_files_and_asynchronous_views_are_billed(make, openmeter, path):
    app = make()

    response = get(app, path, **by_user("acme"))

    assert response.exhausted
    assert billed(app, openmeter) == [("acme", "api_requests")]


def test_a_view_that_raises_is_not_billed(make, openmeter):
    app = make()

    response = get(app, "/failing", **by_user("acme"))

    assert response.status.startswith("500")
    assert billed(app, openmeter) == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/plain", "/plain"),
        ("/things/red/", "/things/<slug:name>/"),
        ("/api/v1/products/7/", "/api/v1/products/<pk>/"),
        ("/legacy/1999/may/", "/legacy/<year>/<var>/"),
    ],
)
def test_the_route_is_a_template(make, openmeter, path, expected):
    app = make({"meters": None, "meter": {"type": "r", "data": {"route": route()}}})

    get(app, path, **by_user("acme"), **by_token("acme"))

    assert app.flush(20)
    assert [event["data"] for event in openmeter.taken] == [{"route": expected}]


def test_a_route_begins_with_the_mount_of_the_site(make, openmeter):
    app = make({"meters": None, "meter": {"type": "r", "data": {"route": route()}}})

    for mount in ("", "/v1", "/caf\xc3\xa9/"):
        environ = make_environ(SCRIPT_NAME=mount, PATH_INFO="/plain", HTTP_X_USER="a")
        Consumer().serve(app, environ)

    assert app.flush(20)
    routes = [event["data"]["route"] for event in openmeter.taken]
    assert routes == ["/plain", "/v1/plain", "/café/plain"]


def test_the_route_of_the_root_is_a_slash():
    assert template_of("") == "/"


def test_a_request_that_came_by_another_way_is_served_and_said(make, caplog):
    make()

    response = Client().get("/plain", headers={"X-User": "acme"})

    assert response.content == b"ok"
    (line,) = [one for one in caplog.messages if "not metered" in one]
    assert line.startswith("openmeter_wsgi: a request did not come through openmeter_")


# -- Entitlements


def test_entitlements_are_asked_for_after_authentication(make, entitled):
    entitled.values = {"acme": {"searches": YES}, "globex": {"searches": NO}}
    app = make({"required_entitlements": ["searches"]})

    allowed = get(app, **by_user("acme"))
    denied = get(app, **by_user("globex"))

    assert allowed.body == [b"ok"]
    status, media_type, problem = answer(denied)
    assert (status, media_type) == ("403", "application/problem+json")
    assert (problem["feature"], problem["reason"]) == ("searches", "no_access")
    assert app.stats().not_metered == {"denied": 1}


def test_a_token_is_asked_for_by_the_permission(make, entitled):
    entitled.values = {"acme": {"searches": YES}, "globex": {"searches": NO}}
    app = make({"required_entitlements": ["searches"]})

    allowed = get(app, "/api/entitled", **by_token("acme"))
    denied = get(app, "/api/entitled", **by_token("globex"))
    nobody = get(app, "/api/entitled")

    assert allowed.status.startswith("200")
    assert answer(denied)[:2] == ("403", "application/problem+json")
    assert answer(nobody)[0] == "401"
    assert answer(nobody)[2].keys() == {"detail"}  # the framework's own answer


def test_a_view_without_the_permission_is_asked_for_before_it(make, entitled):
    entitled.values["acme"] = {"searches": YES}
    app = make({"required_entitlements": ["searches"]})

    response = get(app, "/api/token", **by_token("acme"))

    assert answer(response)[0] == "401"
    assert answer(response)[2]["reason"] == "no_subject"


def test_a_permission_asks_for_the_features_of_its_view(make, entitled):
    entitled.values["acme"] = {"exports": NO}
    app = make()

    response = get(app, "/api/export", **by_token("acme"))

    assert answer(response)[2]["feature"] == "exports"


def test_one_feature_of_a_view_may_be_written_as_text(make, entitled):
    entitled.values["acme"] = {"exports": YES}
    app = make()

    response = get(app, "/api/text", **by_token("acme"))

    assert response.status == "200 OK"
    assert set(entitled.asked) == {("acme", "exports")}


def test_a_permission_that_checks_nothing_is_told(make, entitled, caplog):
    app = make()

    for _ in range(2):
        assert get(app, "/api/entitled", **by_token("acme")).status == "200 OK"
    get(app, "/api/entitled", "OPTIONS", **by_token("acme"))

    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "view NeedsSearches: HasEntitlements checks nothing" in line
    assert "required_entitlements" in line


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/api/export", {}),
        ("/api/entitled", {"required_entitlements": ["searches"]}),
        ("/api/entitled", {"routes": {"/api/entitled": None}}),
        ("/api/v1/permitted/", {}),
    ],
)
def test_a_permission_that_checks_something_or_needs_not_is_not_told(
    make, entitled, caplog, path, options
):
    entitled.values["acme"] = {"exports": YES, "searches": YES}
    app = make(options)

    get(app, path, "POST" if "permitted" in path else "GET", **by_token("acme"))
    get(app, path, "OPTIONS", **by_token("acme"))

    assert "checks nothing" not in caplog.text


def test_a_permission_of_all_views_may_check_nothing(make, caplog):
    everywhere = ["openmeter_wsgi.django.rest_framework.HasEntitlements"]
    app = make()

    with override_settings(REST_FRAMEWORK={"DEFAULT_PERMISSION_CLASSES": everywhere}):
        get(app, "/api/entitled", **by_token("acme"))

    assert "checks nothing" not in caplog.text


def test_a_permission_may_be_named_where_the_view_is_routed(make, entitled):
    entitled.values["acme"] = {"searches": YES}
    app = make({"required_entitlements": ["searches"]})

    response = get(app, "/api/open", **by_token("acme"))

    assert response.status.startswith("200")


def test_the_browsable_api_asks_once(make, entitled):
    entitled.values["acme"] = {"searches": YES}
    app = make({"required_entitlements": ["searches"]})

    response = get(app, "/api/page", **by_token("acme"))

    assert b"".join(response.body) == b"a page with 2 forms"
    assert app.stats().allowed == {"openmeter": 1}


HTML, JSON = {"accept": "text/html"}, {"accept": "application/json"}


def test_a_form_that_the_browsable_api_asks_for_denies_nothing(
    make, openmeter, entitled, caplog
):
    entitled.values["acme"] = {"exports": NO}
    caplog.set_level("INFO", "openmeter_wsgi")
    app = make()

    page = get(app, "/api/v1/books/", **HTML, **by_token("acme"))

    assert page.status == "200 OK"
    assert b"a book" in b"".join(page.body)
    assert entitled.questions == 0
    assert app.stats().denied == {}
    assert "denied" not in caplog.text
    assert billed(app, openmeter) == [("acme", "api_requests")]


@pytest.mark.parametrize("accept", [HTML, JSON])
def test_an_action_that_is_denied_is_answered_by_a_problem(
    make, openmeter, entitled, accept
):
    entitled.values["acme"] = {"exports": NO}
    app = make()

    denied = get(app, "/api/v1/books/", "POST", **accept, **by_token("acme"))

    assert answer(denied)[:2] == ("403", "application/problem+json")
    assert app.stats().denied == {"no_access": 1}
    assert billed(app, openmeter) == []


def test_the_form_is_shown_after_the_action_was_allowed(make, entitled):
    entitled.values["acme"] = {"exports": YES}
    app = make()

    page = get(app, "/api/v1/books/", "POST", **HTML, **by_token("acme"))

    assert page.status.startswith("201")
    assert app.stats().allowed == {"openmeter": 1}


def test_the_methods_that_options_tells_of_are_not_asked_for(make, entitled):
    entitled.values["acme"] = {"exports": NO}
    app = make()

    told = get(app, "/api/v1/books/", "OPTIONS", **JSON, **by_token("acme"))

    assert told.status == "200 OK"
    assert b'"actions":{"POST"' in b"".join(told.body)
    assert entitled.questions == 0


def test_a_schema_that_names_a_view_asks_for_nothing(make, entitled):
    entitled.values["acme"] = {"exports": NO}
    app = make()

    told = get(app, "/api/schema", **by_token("acme"))

    assert told.body == [b"true"]
    assert entitled.questions == 0


@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "/api/v1/books/7/"), ("GET", "/api/facade")]
)
def test_a_view_may_ask_for_the_permission_of_another_method_or_view(
    make, entitled, method, path
):
    entitled.values["acme"] = {"exports": NO}
    app = make()

    denied = get(app, path, method, **JSON, **by_token("acme"))

    assert answer(denied)[:2] == ("403", "application/problem+json")


@pytest.mark.parametrize(
    ("method", "path", "challenge"),
    [
        ("GET", "/api/export", "Token"),
        ("POST", "/api/v1/decorated/", "Token"),
        ("GET", "/api/function/exports", "Token"),
        ("GET", "/api/choosing", "Token method=GET"),
        ("POST", "/api/choosing", "Bearer"),  # the view cannot tell
        ("GET", "/api/sessions", "Bearer"),  # sessions have no challenge
        ("GET", "/deciding", "Bearer"),
    ],
)
def test_who_has_no_subject_is_challenged_as_by_the_rest_framework(
    make, openmeter, method, path, challenge
):
    app = make({"subject": lambda environ: None})

    response = get(app, path, method, **by_user("acme"), **by_token("acme"))

    status, media_type, problem = answer(response)
    assert (status, media_type) == ("401", "application/problem+json")
    assert problem["reason"] == "no_subject"
    assert dict(response.headers)["WWW-Authenticate"] == challenge


def test_a_view_that_is_asked_for_before_it_authenticates_has_its_challenge(make):
    app = make({"required_entitlements": ["searches"]})

    response = get(app, "/api/token", **by_token("acme"))

    assert dict(response.headers)["WWW-Authenticate"] == "Token"


def test_an_answer_of_the_applications_own_keeps_its_challenge(make):
    def denied_response(environ, decision):
        def app(environ, start_response):
            start_response("401 Unauthorized", [("WWW-Authenticate", "Shop")])
            return [b"log in"]

        return app

    app = make({"denied_response": denied_response, "subject": lambda environ: None})

    response = get(app, "/api/export", **by_token("acme"))

    assert dict(response.headers)["WWW-Authenticate"] == "Shop"


def test_a_view_decides_by_itself(make, entitled):
    entitled.values = {"acme": {"searches": YES}, "globex": {"searches": NO}}
    app = make()

    allowed = get(app, "/deciding", **by_user("acme"))
    denied = get(app, "/deciding", **by_user("globex"))

    assert allowed.body == [b"all of it"]
    assert answer(denied)[:2] == ("403", "application/problem+json")
    assert app.stats().not_metered == {"denied": 1}


@pytest.mark.parametrize(("path", "status"), [("/free", "200"), ("/nowhere", "404")])
def test_nothing_is_asked_for_what_is_not_metered(make, entitled, path, status):
    app = make({"required_entitlements": ["searches"]})

    response = get(app, path, **by_user("acme"))

    assert response.status.startswith(status)
    assert entitled.questions == 0


def test_a_decorated_view_is_asked_for_its_own_features_alone(make, entitled):
    entitled.values["acme"] = {"exports": YES}
    app = make({"required_entitlements": ["searches"]})

    response = get(app, "/export", **by_user("acme"))

    assert response.body == [b"ok"]
    assert set(entitled.asked) == {("acme", "exports")}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/report"), ("POST", "/api/v1/decorated/"),
        ("POST", "/api/v1/permitted/"), ("GET", "/api/function/exports"),
    ],
)  # fmt: skip
def test_a_decorated_method_is_asked_for_its_own_features_alone(
    make, entitled, method, path
):
    entitled.values["acme"] = {"exports": YES}
    app = make({"required_entitlements": ["searches"]})

    response = get(app, path, method, **by_user("acme"), **by_token("acme"))

    assert response.status == "200 OK"
    assert set(entitled.asked) == {("acme", "exports")}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/report"), ("GET", "/api/v1/decorated/"),
        ("HEAD", "/api/v1/decorated/"), ("GET", "/api/v1/permitted/"),
        ("GET", "/api/function/free"),
    ],
)  # fmt: skip
def test_nothing_is_asked_for_a_method_that_is_not_metered(
    make, openmeter, entitled, method, path
):
    app = make({"required_entitlements": ["searches"]})

    response = get(app, path, method, **by_user("acme"), **by_token("acme"))

    assert response.status == "200 OK"
    assert entitled.questions == 0
    assert billed(app, openmeter) == []


@pytest.mark.parametrize("path", ["/report", "/api/v1/permitted/7/"])
def test_the_other_methods_of_a_class_are_asked_for_the_features_of_the_settings(
    make, entitled, path
):
    entitled.values["acme"] = {"searches": NO}
    app = make({"required_entitlements": ["searches"]})

    response = get(app, path, **by_user("acme"), **by_token("acme"))

    assert answer(response)[2]["feature"] == "searches"


@pytest.mark.parametrize("path", ["/api/misspelt", "/misspelt"])
@pytest.mark.parametrize("fail_mode", ["open", "closed"])
def test_nobody_has_a_feature_that_openmeter_cannot_have(
    make, openmeter, entitled, caplog, path, fail_mode
):
    entitled.values["acme"] = {"exports": YES}
    entitled.refused["acme", "Create-Books"] = problem_of_server(400, "invalid key")
    app = make({"fail_mode": fail_mode})

    response = get(app, path, **by_user("acme"), **by_token("acme"))

    status, media_type, problem = answer(response)
    assert (status, media_type) == ("403", "application/problem+json")
    assert (problem["feature"], problem["reason"]) == ("Create-Books", "no_access")
    assert billed(app, openmeter) == []
    assert entitled.questions == 0
    (line,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert "'Create-Books' (expected a-z and 0-9" in line.getMessage()
    assert "write 'create_books' here and in OpenMeter" in line.getMessage()


def test_the_application_answers_in_its_own_way(make, entitled):
    def denied_response(environ, decision):
        def app(environ, start_response):
            cookies = [("Set-Cookie", "a=1; Path=/"), ("Set-Cookie", "b=2")]
            start_response("402 Payment Required", [("X-Plan", "free"), *cookies])
            return [b"pay"]

        return app

    app = make({"required_entitlements": ["x"], "denied_response": denied_response})

    response = get(app, **by_user("acme"))

    assert (response.status, response.body) == ("402 Payment Required", [b"pay"])
    assert ("X-Plan", "free") in response.headers
    cookies = [v.strip() for name, v in response.headers if name == "Set-Cookie"]
    assert cookies == ["a=1; Path=/", "b=2"]


def test_the_quota_is_told(make, entitled):
    entitled.values["acme"] = {"searches": metered_entitlement(70)}
    app = make({"required_entitlements": ["searches"], "usage_headers": True})

    response = get(app, **by_user("acme"))

    assert ("RateLimit-Remaining", "70") in response.headers


# -- Configuration


def test_the_setting_may_be_a_policy(make, openmeter):
    policy = Policy(api_url=openmeter.url, meters={"searches": 2}, flush_interval=60)

    with override_settings(
        MIDDLEWARE=["django_site.Authenticate", VIEW_MIDDLEWARE],
        ROOT_URLCONF="django_site",
        ALLOWED_HOSTS=["*"],
        OPENMETER=policy,
    ):
        app = get_wsgi_application(event_source="shop")
        get(app, **by_user("acme"))

        assert billed(app, openmeter) == [("acme", "searches")]
        assert app.policy.event_source == "shop"
        app.close(10)


def test_options_win_over_settings_and_settings_over_variables(make, monkeypatch):
    for name in ("BATCH_SIZE", "EVENT_SOURCE", "SUBJECT_PATH"):
        monkeypatch.setenv(f"OPENMETER_{name}", "7")

    app = make({"event_source": "said", "subject_path": "n"}, subject_path="given")

    policy = app.policy
    said = (policy.batch_size, policy.event_source, policy.subject_path)
    assert said == (7, "said", "given")


def test_events_come_from_the_project_unless_it_says_more(make):
    assert make().policy.event_source == settings.ROOT_URLCONF.partition(".")[0]
    assert make({"event_source": "till"}).policy.event_source == "till"


def test_without_the_view_middleware_there_is_no_application(make):
    make()

    with override_settings(MIDDLEWARE=[]), pytest.raises(ConfigError) as raised:
        get_wsgi_application()

    assert "expected 'openmeter_wsgi.django.ViewMiddleware'" in str(raised.value)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"OPENMETER": {"api_key": "om_x"}}, []),
        (
            {"OPENMETER": ["meters"]},
            ["OPENMETER: expected options by name, or a Policy, got"],
        ),
        (
            {"OPENMETER": {"API_KEY": "om_x", "subject": "user.pk", "batch_size": 0}},
            [
                "subject: expected 'header:Name', a callable on the environ, or a path",
                "unknown option 'API_KEY' (did you mean 'api_key'?)",
                "batch_size: expected",
            ],
        ),
        (
            {"OPENMETER": {"api_key": "om_x"}, "MIDDLEWARE": []},
            ["MIDDLEWARE: expected 'openmeter_wsgi.django.ViewMiddleware' in it"],
        ),
    ],
)
def test_a_check_reports_every_problem(said, expected):
    with override_settings(**{"MIDDLEWARE": [VIEW_MIDDLEWARE], **said}):
        found = check_configuration()

    assert len(found) == len(expected)
    for message, text in zip(found, expected, strict=True):
        assert message.msg.startswith(text), message
        assert message.is_serious()
        assert message.hint


@pytest.mark.parametrize(
    ("named", "warnings"),
    [([], 1), (["openmeter_wsgi.django.rest_framework.HasEntitlements"], 0)],
)
def test_a_check_warns_of_views_that_authenticate_too_late(named, warnings):
    with override_settings(
        INSTALLED_APPS=["rest_framework"],
        MIDDLEWARE=[VIEW_MIDDLEWARE],
        OPENMETER={"api_key": "om_x", "required_entitlements": ["searches"]},
        REST_FRAMEWORK={"DEFAULT_PERMISSION_CLASSES": named},
    ):
        found = check_configuration()

    assert [message.id for message in found] == ["openmeter.W001"] * warnings


def test_a_missing_key_is_a_warning_of_the_check():
    with override_settings(MIDDLEWARE=[VIEW_MIDDLEWARE], OPENMETER={}):
        (message,) = check_configuration()

    assert message.id == "openmeter.W002"
    assert message.msg.startswith("api_key: expected a key, which https://openmeter")
    assert "own or the sandbox, set OPENMETER_API_URL" in message.msg
    assert not message.is_serious()


def test_a_missing_key_is_an_error_where_wsgi_is_loaded(make):
    with pytest.raises(ConfigError, match="api_key: expected a key, which"):
        make({"api_url": "https://openmeter.cloud"})


# -- ASGI, which this middleware is not made for


@pytest.mark.parametrize(
    ("wsgi", "expected"),
    [(None, ["openmeter.E003"]), ("site.wsgi.application", ["openmeter.W003"])],
)
def test_a_project_that_is_served_through_asgi_is_told_by_the_check(wsgi, expected):
    with override_settings(
        MIDDLEWARE=[VIEW_MIDDLEWARE],
        OPENMETER={"api_key": "om_x"},
        ASGI_APPLICATION="site.asgi.application",
        WSGI_APPLICATION=wsgi,
    ):
        found = check_configuration()

    assert [message.id for message in found] == expected
    assert "requests that site.asgi.application serves are not metered" in found[0].msg


def test_a_request_that_came_through_asgi_is_an_error_in_the_log(make, caplog):
    make()

    async def ask():
        asked = ApplicationCommunicator(
            get_asgi_application(),
            {"type": "http", "method": "GET", "path": "/plain", "headers": []},
        )
        await asked.send_input({"type": "http.request"})
        answer = await asked.receive_output(20)
        await asked.receive_output(20)  # its body
        await asked.wait(20)
        return answer

    answered = asyncio.run(ask())

    assert answered["status"] == 200
    # asyncio may log the name of Django's handler when the machine is slow.
    (record,) = [one for one in caplog.records if one.name.startswith("openmeter_wsgi")]
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("openmeter_wsgi: a request came through ASGI")
