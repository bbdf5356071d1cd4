"""The fixture for tests of an application: its bill, and reasons for none."""

import datetime
import threading
from pathlib import Path

import flask
import pytest
from werkzeug.test import Client

from openmeter_server import PATIENCE, OpenMeterServer
from openmeter_wsgi import (
    OpenMeterMiddleware,
    add_meters,
    bytes_sent,
    check_entitlements,
    set_idempotency_key,
    set_meters,
    set_subject,
)
from openmeter_wsgi.testing import OpenMeter

pytest_plugins = ["pytester"]

EXAMPLE = Path(__file__).parents[1] / "examples" / "flask_app.py"

FLASK_APP = """
import flask
from openmeter_wsgi import OpenMeterMiddleware, set_meters

app = flask.Flask(__name__)
app.wsgi_app = OpenMeterMiddleware(
    app.wsgi_app, api_key="k", meters={"searches": 1}, subject="header:X-Customer"
)

@app.get("/search")
def search():
    return {"found": 1}

@app.get("/rows/<int:n>")
def rows(n):
    set_meters(flask.request, {"searches": 0, "rows": n})
    return {"rows": n}
"""


@pytest.fixture
def openmeter():
    """The fixture as the plugin has it; that of these tests has the same name."""
    with OpenMeter() as stand_in:
        yield stand_in


def application(**options):
    app = flask.Flask("example")

    @app.get("/")
    def index():
        return "a body"

    @app.get("/stream")
    def stream():
        return flask.Response(iter([b"a", b"bc", b"def"]))

    @app.get("/breaks")
    def breaks():
        def chunks():
            yield b"a"
            raise RuntimeError("in the middle")

        return flask.Response(chunks())

    options = {"meters": {"requests": 1}, "subject": lambda _: "acme", **options}
    app.wsgi_app = OpenMeterMiddleware(app.wsgi_app, **options)
    return app


# -- Collected events


def test_what_a_request_would_be_billed_is_there_without_closing_its_response(
    openmeter,
):
    response = application().test_client().get("/")

    (event,) = openmeter.events
    assert (event.type, event.subject, event.data) == ("requests", "acme", {"total": 1})
    assert response.data == b"a body"
    assert len(openmeter.events) == 1


def test_ids_and_times_are_the_same_in_every_run(openmeter):
    client = application().test_client()

    client.get("/")
    openmeter.now = datetime.datetime(2026, 5, 1, 12, 30, tzinfo=datetime.UTC)
    client.get("/")

    assert [(event.id, event.time.isoformat()) for event in openmeter.events] == [
        ("request-1:requests", "2026-01-01T00:00:00+00:00"),
        ("request-2:requests", "2026-05-01T12:30:00+00:00"),
    ]


def test_an_unread_stream_counts_as_read_to_its_end(openmeter):
    app = application(meters={"bytes": bytes_sent()}, on_abort="none")

    response = app.test_client().get("/stream")

    openmeter.assert_metered("bytes", total=6, times=1)
    assert response.data == b"abcdef"


def test_a_stream_that_nobody_keeps_counts_as_read_to_its_end(openmeter):
    app = application(meters={"bytes": bytes_sent()}, on_abort="none")

    app.test_client().get("/stream")

    openmeter.assert_metered("bytes", total=6, times=1)


def test_a_stream_that_the_test_closes_early_is_aborted(openmeter):
    response = application(on_abort="none").test_client().get("/stream")

    response.close()

    openmeter.assert_not_metered(reason="aborted")


def test_a_stream_that_breaks_is_failed_and_breaks_for_its_reader(openmeter):
    response = application().test_client().get("/breaks")

    openmeter.assert_not_metered(reason="failed")
    with pytest.raises(RuntimeError, match="in the middle"):
        _ = response.data


def test_an_endless_stream_ends_as_if_the_client_had_gone(openmeter):
    def endless(environ, start_response):
        start_response("200 OK", [])
        while True:
            yield b"x"

    app = OpenMeterMiddleware(
        endless, meters={"requests": 1}, subject=lambda _: "acme", on_abort="none"
    )
    response = app({"REQUEST_METHOD": "GET"}, lambda *_: lambda _: None)

    openmeter.assert_not_metered(reason="aborted")
    assert next(iter(response)) == b"x"


def test_a_sequence_keeps_its_length(openmeter):
    def listed(environ, start_response):
        start_response("200 OK", [])
        return [b"a", b"b"]

    app = OpenMeterMiddleware(listed, meters={"requests": 1}, subject=lambda _: "acme")
    response = app({"REQUEST_METHOD": "GET"}, lambda *_: lambda _: None)

    assert openmeter.events
    assert len(response) == 2
    assert list(response) == [b"a", b"b"]


def test_a_middleware_made_before_is_taken_over_and_given_back():
    app = application(api_key="k")
    queue = app.wsgi_app.process().transport

    with OpenMeter() as openmeter:
        app.test_client().get("/")
        openmeter.assert_metered("requests", times=1)
    assert app.wsgi_app.process().transport is queue
    assert app.wsgi_app.stats().settled == 0


def test_a_middleware_made_meanwhile_delivers_afterwards():
    with OpenMeterServer() as server:
        with OpenMeter():
            app = application(api_key="k", api_url=server.url)
            app.test_client().get("/").close()

        app.test_client().get("/").close()
        app.wsgi_app.close(PATIENCE)

        assert app.wsgi_app.stats().settled == len(server.ids) == 1


def test_one_within_another_collects_alone():
    app = application(api_key="k")
    with OpenMeter() as outer:
        app.test_client().get("/")
        with OpenMeter() as inner:
            app.test_client().get("/")
            assert len(inner.events) == 1
        app.test_client().get("/")
        assert len(outer.events) == 2


def test_a_subclass_as_an_extension_makes_it_is_taken_over(openmeter):
    class Extended(OpenMeterMiddleware):
        pass

    app = flask.Flask("example")
    app.add_url_rule("/", view_func=lambda: "")
    app.wsgi_app = Extended(app.wsgi_app, meters={"a": 1}, subject=lambda _: "acme")

    app.test_client().get("/")

    openmeter.assert_metered("a", subject="acme")


def test_neither_threads_nor_files_nor_a_network_are_needed(openmeter, tmp_path):
    threads = set(threading.enumerate())
    app = application(
        spool_dir=str(tmp_path / "nowhere" / "spool"),
        redis_url="redis://127.0.0.1:1/",
        required_entitlements=["requests"],
        entitlement_meters=["requests"],
    )
    openmeter.grant("requests", balance=10)

    assert app.test_client().get("/").status_code == 200

    openmeter.assert_metered("requests", times=1)
    assert set(threading.enumerate()) == threads
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_seen_as_what_it_would_send(openmeter):
    application(dry_run=True).test_client().get("/")

    openmeter.assert_metered("requests", times=1)


def test_requests_of_other_threads_are_collected(openmeter):
    client = Client(application())

    def ask():
        client.get("/").close()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    openmeter.assert_metered("requests", total=8, times=8)


def test_the_counts_of_the_middleware_add_up(openmeter):
    app = application()
    app.test_client().get("/")
    app.test_client().get("/missing")

    openmeter.assert_metered("requests", times=1)
    stats = app.wsgi_app.stats()
    assert (stats.settled, stats.delivered, stats.unaccounted) == (2, 1, 0)


def test_what_is_audited_goes_to_the_audit_of_the_policy_too(openmeter):
    told = []
    app = application(
        audit=told.append,
        routes={"/missing": {"audit": told.append}, "/": {"meters": {"requests": 2}}},
    )

    app.test_client().get("/missing")
    app.test_client().get("/gone")

    openmeter.assert_not_metered(reason="status")
    assert [record["path"] for record in told] == ["/missing", "/gone"]


# -- Assertions


def failure(check):
    with pytest.raises(AssertionError) as caught:
        check()
    return str(caught.value)


def test_totals_are_exact_and_of_any_property(openmeter):
    app = flask.Flask("example")

    @app.get("/")
    def index():
        add_meters(flask.request, {"tokens": 2**60})
        add_meters(flask.request, {"type": "llm", "data": {"in": 1.1, "model": "m"}})
        add_meters(flask.request, {"type": "llm", "data": {"in": 2.2, "model": "m"}})
        return ""

    app.wsgi_app = OpenMeterMiddleware(app.wsgi_app, subject=lambda _: "acme")
    app.test_client().get("/")

    openmeter.assert_metered("tokens", total=2**60, data={"total": 2**60})
    found = openmeter.assert_metered("llm", total=3.3, of="in", data={"model": "m"})
    assert [event.id for event in found] == ["request-1:llm", "request-1:llm:2"]
    assert "use of='in' or 'model'" in failure(
        lambda: openmeter.assert_metered("llm", total=3)
    )


def test_a_failure_shows_what_was_metered_instead_and_what_was_not(openmeter):
    app = flask.Flask("example")

    @app.get("/<who>")
    def index(who):
        set_subject(flask.request, who)
        if who == "idle":
            set_meters(flask.request, {"searches": 0})
        return ""

    app.wsgi_app = OpenMeterMiddleware(app.wsgi_app, meters={"searches": 1})
    client = app.test_client()
    for path in ("/acme", "/beta", "/idle", "/no/where"):
        client.get(path).close()

    text = failure(
        lambda: openmeter.assert_metered(
            "searches", subject="acme", total=2, data={"region": "eu"}
        )
    )
    assert text.splitlines() == [
        "expected 'searches' to be metered, subject 'acme', with data "
        '{"region":"eu"}, total 2 in all, but none was',
        "metered:",
        "  searches of 'acme': {\"total\":1}  <- no 'region' in its data",
        "  searches of 'beta': {\"total\":1}  <- subject 'beta'",
        "not metered:",
        "  GET /idle (200 OK): no_usage",
        "  GET /no/where (404 NOT FOUND): status",
    ]


def test_a_failure_says_if_nothing_was_asked_at_all(openmeter):
    text = "no request came through an OpenMeterMiddleware"

    assert text in failure(lambda: openmeter.assert_metered("searches"))
    assert text in failure(openmeter.assert_not_metered)


def test_how_often_is_exact(openmeter):
    client = application().test_client()
    client.get("/")
    client.get("/")

    openmeter.assert_metered("requests")
    openmeter.assert_metered("requests", times=2)
    openmeter.assert_metered("nothing", times=0)
    assert "once, but 2 were" in failure(
        lambda: openmeter.assert_metered("requests", times=1)
    )


def test_what_was_not_metered_was_not_for_a_reason(openmeter):
    client = application().test_client()
    client.get("/missing")

    openmeter.assert_not_metered()
    openmeter.assert_not_metered("requests", subject="acme", reason="status")
    assert "that was not the reason" in failure(
        lambda: openmeter.assert_not_metered(reason="denied")
    )
    client.get("/")
    assert "but this was" in failure(openmeter.assert_not_metered)
    openmeter.assert_not_metered("other")
    openmeter.clear()
    client.get("/missing")
    openmeter.assert_not_metered()


def test_a_derived_id_shows_that_two_requests_are_one(openmeter):
    app = flask.Flask("example")

    @app.post("/")
    def pay():
        set_idempotency_key(flask.request, "order-7")
        return ""

    app.wsgi_app = OpenMeterMiddleware(
        app.wsgi_app, meters={"orders": 1}, subject=lambda _: "acme"
    )
    app.test_client().post("/")
    app.test_client().post("/")

    assert len({event.id for event in openmeter.events}) == 1


# -- Entitlements


def guarded(**options):
    return application(required_entitlements=["exports"], **options).test_client()


def test_nobody_has_access_to_what_was_not_granted(openmeter):
    assert guarded().get("/").status_code == 403

    openmeter.assert_not_metered(reason="denied")
    text = failure(lambda: openmeter.assert_metered("requests"))
    assert "'exports' of 'acme': see openmeter.grant('exports')" in text


def test_a_granted_value_reaches_the_handler(openmeter):
    openmeter.grant("seats", config={"seats": [5]})
    openmeter.grant("exports")

    def app(environ, start_response):
        decision = check_entitlements(environ, "seats", "exports")
        start_response("200 OK", [])
        return [repr((decision.config, decision.configs)).encode()]

    client = Client(OpenMeterMiddleware(app, subject=lambda environ: "acme"))

    assert client.get("/").text == repr(({"seats": [5]}, {"seats": {"seats": [5]}}))


def test_a_grant_and_a_denial_hold_at_once(openmeter):
    client = guarded()

    openmeter.grant("exports")
    assert client.get("/").status_code == 200
    openmeter.deny("exports", subject="acme", reason="limit_reached")
    assert client.get("/").status_code == 429
    openmeter.grant("exports", subject="acme")
    assert client.get("/").status_code == 200
    openmeter.grant("exports", subject="acme", balance=0)
    assert client.get("/").status_code == 429
    openmeter.deny("exports", subject="acme", reason="unknown_customer")
    assert client.get("/").status_code == 403
    with pytest.raises(ValueError, match="got 'bad luck'"):
        openmeter.deny("exports", reason="bad luck")


def test_a_balance_counts_down_where_the_policy_does_that(openmeter):
    client = guarded(entitlement_meters={"exports": "requests"})
    openmeter.grant("exports", subject="acme", balance=2)

    statuses = [client.get("/").status_code for _ in range(4)]

    assert statuses == [200, 200, 429, 429]
    openmeter.assert_metered("requests", subject="acme", total=2)


@pytest.mark.parametrize(("fail_mode", "status"), [("open", 200), ("closed", 503)])
def test_in_an_outage_the_fail_mode_decides(openmeter, fail_mode, status):
    client = guarded(fail_mode=fail_mode)

    with openmeter.outage():
        assert client.get("/").status_code == status
    assert client.get("/").status_code == 403


def test_an_outage_lasts_and_known_answers_hold_in_it(openmeter):
    client = guarded(fail_mode="closed")
    openmeter.grant("exports")
    assert client.get("/").status_code == 200

    openmeter.outage()

    assert client.get("/").status_code == 200
    openmeter.assert_metered("requests", times=2)


# -- As a plugin of pytest


def test_the_fixture_is_there_by_itself(pytester):
    pytester.makepyfile(shop=FLASK_APP)
    pytester.makepyfile(
        """
        from shop import app

        def test_search(openmeter):
            app.test_client().get("/search", headers={"X-Customer": "acme"})
            openmeter.assert_metered("searches", subject="acme", total=1)

        def test_nothing_is_left_of_it(openmeter):
            app.test_client().get("/rows/7", headers={"X-Customer": "acme"})
            openmeter.assert_metered("rows", total=7)
            assert [event.id for event in openmeter.events] == ["request-1:rows"]

        def test_fails(openmeter):
            app.test_client().get("/search")
            openmeter.assert_metered("searches")
        """
    )

    result = pytester.runpytest_subprocess("-p", "no:randomly")

    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "E       AssertionError: expected 'searches' to be metered, but none was",
            "E       not metered:",
            "E         GET /search (200 OK): no_subject",
        ]
    )
    result.stdout.no_fnmatch_line("*testing/openmeter.py*")


@pytest.mark.load
def test_it_works_in_parallel(pytester):
    pytester.makepyfile(shop=FLASK_APP)
    pytester.makepyfile(
        """
        import pytest
        from shop import app

        @pytest.mark.parametrize("n", range(1, 21))
        def test_rows(openmeter, n):
            app.test_client().get(f"/rows/{n}", headers={"X-Customer": f"c{n}"})
            openmeter.assert_metered("rows", subject=f"c{n}", total=n, times=1)
            assert openmeter.events[0].id == "request-1:rows"
        """
    )

    result = pytester.runpytest_subprocess("-n", "2")

    result.assert_outcomes(passed=20)


def test_an_application_factory_needs_no_key(pytester):
    pytester.makeconftest(
        """
        import pytest
        from openmeter_wsgi import OpenMeterMiddleware

        def answer(environ, start_response):
            start_response("200 OK", [])
            return [b""]

        @pytest.fixture
        def client(openmeter):
            from werkzeug.test import Client
            return Client(OpenMeterMiddleware(answer, meters={"a": 1}))
        """
    )
    pytester.makepyfile(
        """
        import os

        def test_it(client, openmeter):
            client.get("/", environ_overrides={"REMOTE_USER": "acme"})
            openmeter.assert_metered("a", subject="acme")

        def test_the_key_is_gone():
            assert "OPENMETER_API_KEY" not in os.environ
        """
    )

    pytester.runpytest_subprocess("-p", "no:randomly").assert_outcomes(passed=2)


def test_who_does_not_use_it_imports_nothing_of_it(pytester):
    pytester.makepyfile(
        """
        import sys

        def test_it(request):
            assert request.config.pluginmanager.hasplugin("openmeter")
            heavy = {"openmeter_wsgi.middleware", "requests", "msgspec", "werkzeug"}
            assert not heavy & sys.modules.keys()
        """
    )

    pytester.runpytest_subprocess("-p", "no:randomly").assert_outcomes(passed=1)


# -- Applications as they are


def test_the_flask_example_is_tested_with_it(pytester):
    pytester.makepyfile(flask_app=EXAMPLE.read_text())
    pytester.makeconftest("import os; os.environ['OPENMETER_API_KEY'] = 'test'")
    pytester.makepyfile(
        """
        import pytest
        from flask_app import app

        ACME = {"X-API-Key": "acme-key"}

        @pytest.fixture
        def client(openmeter):
            return app.test_client()

        def test_products(client, openmeter):
            client.get("/products", headers=ACME)
            openmeter.assert_metered("api-request", subject="acme", times=1)

        def test_chat(client, openmeter):
            question = {"model": "large", "prompt": "a b c", "max_tokens": 7}
            client.post("/chat", json=question, headers=ACME)
            tokens = {"total": 10, "of": "tokens", "times": 2}
            openmeter.assert_metered("tokens", **tokens, data={"model": "large"})
            openmeter.assert_metered("credits", subject="acme", total=5)

        def test_pages_that_nobody_reads(client, openmeter):
            client.get("/export?pages=4", headers=ACME)
            openmeter.assert_metered("credits", total=4)

        def test_pages_until_it_breaks(client, openmeter):
            response = client.get("/export?pages=4&break_after=2", headers=ACME)
            openmeter.assert_metered("credits", total=2)
            with pytest.raises(RuntimeError):
                response.data

        @pytest.mark.parametrize("path", ["/products/none", "/report"])
        def test_what_costs_nothing(client, openmeter, path):
            app.testing = False
            client.get(path, headers=ACME)
            openmeter.assert_not_metered(reason="status")

        def test_strangers(client, openmeter):
            client.get("/products")
            openmeter.assert_not_metered(reason="status")
        """
    )

    pytester.runpytest_subprocess("-n", "2").assert_outcomes(passed=7)


def test_a_django_application_is_tested_with_it(pytester):
    pytester.makepyfile(
        shop_site="""
        from django.conf import settings
        from django.http import HttpResponse
        from django.urls import path

        from openmeter_wsgi import OpenMeterMiddleware, add_meters, set_subject

        def export(request, rows):
            set_subject(request, "acme")
            add_meters(request, {"rows": rows})
            return HttpResponse("rows")

        urlpatterns = [path("export/<int:rows>", export)]
        settings.configure(
            ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="x"
        )
        from django.core.wsgi import get_wsgi_application

        application = OpenMeterMiddleware(
            get_wsgi_application(), api_key="k", meters={"requests": 1}
        )
        """
    )
    pytester.makepyfile(
        """
        from werkzeug.test import Client
        from shop_site import application

        def test_export(openmeter):
            response = Client(application).get("/export/30")
            openmeter.assert_metered("rows", subject="acme", total=30)
            openmeter.assert_metered("requests", subject="acme", times=1)
            assert response.text == "rows"

        def test_missing(openmeter):
            Client(application).get("/nowhere")
            openmeter.assert_not_metered(reason="status")
        """
    )

    pytester.runpytest_subprocess().assert_outcomes(passed=2)
