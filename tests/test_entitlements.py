import itertools
import json
import logging
import threading
import time

import flask
import pytest

from entitling import (
    NO,
    YES,
    Entitled,
    ask,
    metered,
    middleware,
    wait_for,
)
from openmeter_server import HANG, Answer, problem
from openmeter_wsgi import (
    ConfigError,
    Policy,
    check_entitlements,
    require_entitlements,
    set_user,
)
from openmeter_wsgi.entitlements.cache import AnswerCache, CachedAnswer, Lifetimes
from openmeter_wsgi.entitlements.client import Answer as EntitlementAnswer
from openmeter_wsgi.log import PREFIX
from openmeter_wsgi.request import REQUEST
from servers import TIMEOUT

PROBLEM = ("Content-Type", "application/problem+json")


def ok(environ, start_response):
    start_response("200 OK", [("X-App", "yes")])
    return [b"ok"]


#: The form of an id, which a request may name in place of a key.
ID = "01M8J9X1RNQGDXW4D8BHQ7G0CN"


@pytest.fixture
def make(openmeter, entitled, middlewares):
    def make(app=ok, **options):
        middlewares.append(middleware(openmeter, app, **options))
        return middlewares[-1]

    return make


def body(response):
    return json.loads(b"".join(response.body))


def header(response, name):
    return dict(response.headers).get(name)


# -- The answer


def test_a_customer_with_access_passes_and_is_billed(make, entitled, openmeter):
    entitled.values["acme"] = {"searches": YES}
    app = make()

    response = ask(app)
    app.close(40)

    assert response.status == "200 OK"
    assert response.body == [b"ok"]
    assert response.headers == [("X-App", "yes")]
    assert openmeter.subjects == ["acme"]
    assert app.stats().allowed == {"openmeter": 1}


@pytest.mark.parametrize(
    ("value", "status", "reason"),
    [
        (NO, "403 Forbidden", "no_access"),
        (metered(0), "429 Too Many Requests", "limit_reached"),
        (None, "403 Forbidden", "unknown_customer"),
    ],
)
def test_a_denial_says_why_and_never_reaches_the_application(
    make, entitled, openmeter, value, status, reason
):
    called = []
    if value is not None:
        entitled.values["acme"] = {"searches": value}
    app = make(lambda *arguments: called.append(arguments))

    response = ask(app)
    app.close(40)

    assert response.status == status
    assert PROBLEM in response.headers
    assert ("Cache-Control", "no-store") in response.headers
    assert body(response) == {
        "type": "about:blank",
        "title": status[4:],
        "status": int(status[:3]),
        "detail": body(response)["detail"],
        "reason": reason,
        "feature": "searches",
    }
    assert "'searches'" in body(response)["detail"]
    assert not called
    assert openmeter.ids == []
    assert app.stats().denied == {reason: 1}
    assert app.stats().not_metered == {"denied": 1}
    assert app.stats().settled == 1


def test_nobody_is_asked_for_a_request_without_subject(make, entitled):
    app = make()

    response = ask(app, subject=None)

    assert response.status == "401 Unauthorized"
    assert header(response, "WWW-Authenticate") == "Bearer"
    assert body(response)["reason"] == "no_subject"
    assert entitled.questions == 0


@pytest.mark.parametrize("status", [402, 403])
def test_the_status_of_a_spent_quota_can_be_chosen(make, entitled, status):
    entitled.values["acme"] = {"searches": metered(0)}

    response = ask(make(limit_status=status))

    assert response.status.startswith(str(status))
    assert body(response)["reason"] == "limit_reached"


def test_retry_after_is_the_end_of_the_usage_period(make, entitled):
    entitled.values["acme"] = {"searches": metered(0)}
    entitled.terms["acme", "searches"] = in_an_hour()

    response = ask(make())

    assert 3_500 <= int(header(response, "Retry-After")) <= 3_600


def test_a_head_request_is_denied_without_a_body(make, entitled):
    response = ask(make(), REQUEST_METHOD="HEAD")

    assert response.status == "403 Forbidden"
    assert response.body == []
    assert int(header(response, "Content-Length")) > 0


def test_options_is_not_checked_unless_it_is_named(make, entitled):
    assert ask(make(), REQUEST_METHOD="OPTIONS").status == "200 OK"
    assert entitled.questions == 0
    named = make(meter_options=True)
    assert ask(named, REQUEST_METHOD="OPTIONS").status == "403 Forbidden"


def test_a_response_of_ones_own_replaces_the_denial(make, entitled):
    def own(environ, decision):
        reason = decision.denied[0].reason
        return flask.Response(f"go away: {reason}", status=418)

    response = ask(make(denied_response=own))

    assert response.status.startswith("418")
    assert b"".join(response.body) == b"go away: unknown_customer"


def test_a_response_of_ones_own_that_fails_is_replaced(make, entitled, caplog):
    def own(environ, decision):
        raise RuntimeError("a mistake")

    assert ask(make(denied_response=own)).status == "403 Forbidden"
    assert "denied_response" in caplog.text


def test_the_log_says_once_who_was_denied_what(make, entitled, caplog):
    caplog.set_level(logging.INFO, "openmeter_wsgi")
    entitled.values["acme"] = {"searches": metered(-7)}
    app = make()

    for _ in range(5):
        ask(app)

    messages = [r.getMessage().removeprefix(PREFIX) for r in caplog.records]
    lines = [message for message in messages if "denied" in message]
    assert lines == [
        "subject 'acme', feature 'searches': limit_reached, denied "
        "(balance 0, usage 107, overage 7)"
    ]


def test_the_log_leaves_out_figures_that_are_not_known(make, entitled, caplog):
    caplog.set_level(logging.INFO, "openmeter_wsgi")
    entitled.values["acme"] = {"searches": NO}

    ask(make())

    messages = [r.getMessage().removeprefix(PREFIX) for r in caplog.records]
    lines = [message for message in messages if "denied" in message]
    assert lines == ["subject 'acme', feature 'searches': no_access, denied"]


def test_the_handler_sees_the_decision(make, entitled):
    entitled.values["acme"] = {"searches": metered(40)}
    seen = []

    def app(environ, start_response):
        seen.append(environ[REQUEST].decision)
        return ok(environ, start_response)

    ask(make(app))

    (decision,) = seen
    assert decision.allowed
    assert decision.denied == ()
    assert decision.source == "openmeter"
    assert 0 <= decision.age < 5
    assert (decision.quota.limit, decision.quota.remaining) == (100, 40)


def test_nothing_is_enforced_until_it_is_switched_on(make, entitled, openmeter, caplog):
    app = make(enforce=False)

    response = ask(app)
    app.close(40)

    assert response.status == "200 OK"
    assert app.stats().let_through == {"unknown_customer": 1}
    assert openmeter.subjects == ["acme"]
    assert "let through" in caplog.text


def test_usage_headers_tell_what_is_left(make, entitled):
    entitled.values["acme"] = {"searches": metered(40)}

    response = ask(make(usage_headers=True))

    assert header(response, "RateLimit-Limit") == "100"
    assert header(response, "RateLimit-Remaining") == "40"
    assert header(response, "X-App") == "yes"


def in_an_hour():
    moment = time.gmtime(time.time() + 3_600)
    to = time.strftime("%Y-%m-%dT%H:%M:%SZ", moment)
    return {"currentUsagePeriod": {"to": to}}


@pytest.mark.parametrize("where", ["everywhere", "on one route"])
def test_usage_headers_tell_when_the_quota_is_granted_anew(make, entitled, where):
    entitled.values["acme"] = {"searches": metered(40)}
    entitled.terms["acme", "searches"] = in_an_hour()
    on = {"usage_headers": True}
    app = make(**on) if where == "everywhere" else make(routes={"/": on})

    wait_for(lambda: header(ask(app), "RateLimit-Reset"))

    assert 3_500 <= int(header(ask(app), "RateLimit-Reset")) <= 3_600
    assert entitled.asked_terms["acme", "searches"] == 1


def test_the_next_period_is_asked_for_when_one_is_over(make, entitled):
    entitled.values["acme"] = {"searches": metered(40)}
    over = "2026-01-01T00:00:00Z"
    entitled.terms["acme", "searches"] = {"currentUsagePeriod": {"to": over}}
    app = make(usage_headers=True, allow_ttl=0.05)
    wait_for(lambda: header(ask(app), "RateLimit-Reset") == "0")

    entitled.terms["acme", "searches"] = in_an_hour()

    wait_for(lambda: int(header(ask(app), "RateLimit-Reset")) > 3_500)


def test_nobody_asks_for_a_period_that_nobody_is_told(make, entitled):
    entitled.values["acme"] = {"searches": metered(40)}
    app = make(allow_ttl=0.05)

    wait_for(lambda: ask(app) and entitled.questions >= 5)

    assert not entitled.asked_terms


def test_all_of_several_features_are_needed(make, entitled):
    entitled.values["acme"] = {"searches": YES, "exports": metered(0)}

    response = ask(make(required_entitlements=["searches", "exports"]))

    assert response.status.startswith("429")
    assert body(response)["feature"] == "exports"
    assert entitled.asked == {("acme", "access"): 1}


def test_of_several_reasons_that_is_told_which_would_stay(make, entitled):
    entitled.values["acme"] = {"searches": metered(0), "exports": NO}

    response = ask(make(required_entitlements=["searches", "exports"]))

    assert response.status == "403 Forbidden"
    assert body(response)["feature"] == "exports"


def test_of_several_spent_quotas_the_last_to_come_back_says_when(make, entitled):
    features = ["searches", "exports", "reports"]
    entitled.values["acme"] = dict.fromkeys(features, metered(0))
    entitled.terms["acme", "exports"] = in_an_hour()

    response = ask(make(required_entitlements=features))

    assert 3_500 <= int(header(response, "Retry-After")) <= 3_600
    assert body(response)["feature"] == "exports"


# -- Customers


@pytest.mark.parametrize(
    "customer", [{"acme": "customer-1"}, lambda subject: "customer-1"]
)
def test_a_subject_can_have_a_customer_of_another_key(make, entitled, customer):
    entitled.values["customer-1"] = {"searches": YES}
    app = make(customer=customer)

    assert ask(app).status == "200 OK"
    assert entitled.asked == {("customer-1", "searches"): 1}


def test_a_subject_without_customer_is_denied_without_a_question(make, entitled):
    response = ask(make(customer={}))

    assert body(response)["reason"] == "unknown_customer"
    assert entitled.questions == 0


def test_a_mapping_that_fails_is_no_denial(make, entitled, caplog):
    def customer(subject):
        raise LookupError("the database is away")

    assert ask(make(customer=customer)).status == "200 OK"
    assert ask(make(customer=customer, fail_mode="closed")).status.startswith("503")


@pytest.mark.parametrize(
    "entries",
    [
        {"HTTP_X_SUBJECT": "rich"},
        {"HTTP_REMOTE_USER": "rich"},
        {"QUERY_STRING": "subject=rich&customer=rich"},
        {"HTTP_X_CUSTOMER_ID": "rich", "HTTP_AUTHORIZATION": "Bearer rich"},
        {"HTTP_COOKIE": "subject=rich"},
    ],
)
def test_nothing_that_a_client_sends_names_the_customer(make, entitled, entries):
    entitled.values["rich"] = {"searches": YES}

    assert ask(make(), subject="poor", **entries).status == "403 Forbidden"
    assert ask(make(), subject=None, **entries).status == "401 Unauthorized"


def test_a_header_names_the_customer_where_the_policy_says_so(make, entitled):
    entitled.values["rich"] = {"searches": YES}
    app = make(subject="header:X-Subject")

    assert ask(app, subject=None, HTTP_X_SUBJECT="rich").status == "200 OK"


# -- In the handler


def flask_app(view):
    app = flask.Flask("application")
    app.add_url_rule("/", "view", view)
    return app.wsgi_app


def test_a_handler_asks_once_it_knows_the_subject(make, entitled, openmeter):
    entitled.values["acme"] = {"searches": YES}

    def view():
        set_user(flask.request, {"sub": "acme"})
        return str(check_entitlements(flask.request, "searches").allowed)

    app = make(flask_app(view), required_entitlements=[])
    response = ask(app, subject=None)

    assert b"".join(response.body) == b"True"


@pytest.mark.parametrize("codes", ["200-299", "200-599"])
def test_a_denial_in_the_handler_is_the_same_response_and_not_billed(
    make, entitled, openmeter, codes
):
    entitled.values["acme"] = {"searches": metered(0)}

    def view():
        require_entitlements(flask.request, "searches")
        raise AssertionError("not reached")

    app = make(flask_app(view), required_entitlements=[], meter_on_status_codes=codes)
    response = ask(app)
    same = ask(make())
    app.close(40)

    assert response.status.upper() == same.status.upper()
    assert b"".join(response.body) == b"".join(same.body)
    assert sorted(response.headers) == sorted(same.headers)
    assert openmeter.ids == []


def test_a_denial_in_the_handler_has_no_body_for_head(make, entitled):
    def view():
        require_entitlements(flask.request, "searches")

    app = make(flask_app(view), required_entitlements=[])
    response = ask(app, REQUEST_METHOD="HEAD")

    assert response.status.upper() == "403 FORBIDDEN"
    assert b"".join(response.body) == b""
    assert int(header(response, "Content-Length")) > 0


def test_a_response_of_ones_own_replaces_the_denial_in_the_handler(make, entitled):
    def own(environ, decision):
        return flask.Response(f"go away: {decision.denied[0].reason}", status=418)

    def view():
        require_entitlements(flask.request, "searches")

    app = make(flask_app(view), required_entitlements=[], denied_response=own)
    response = ask(app)

    assert response.status.startswith("418")
    assert b"".join(response.body) == b"go away: unknown_customer"


def test_a_handler_lets_through_what_is_not_enforced(make, entitled, openmeter):
    def view():
        return str(require_entitlements(flask.request, "searches").allowed)

    app = make(flask_app(view), required_entitlements=[], enforce=False)
    response = ask(app)
    app.close(40)

    assert b"".join(response.body) == b"False"
    assert app.stats().let_through == {"unknown_customer": 1}
    assert openmeter.subjects == ["acme"]


def test_without_features_a_handler_asks_for_those_of_the_policy(make, entitled):
    entitled.values["acme"] = {"searches": YES}

    def view():
        return str(require_entitlements(flask.request).allowed)

    assert ask(make(flask_app(view))).body == [b"True"]


def test_where_nothing_is_required_nothing_is_asked(make, openmeter):
    def view():
        return str(require_entitlements(flask.request).allowed)

    app = make(flask_app(view), required_entitlements=[])

    assert ask(app).body == [b"True"]
    assert app.stats().allowed == {}


def test_outside_a_metered_request_there_is_no_answer(caplog):
    decision = check_entitlements({}, "searches")

    assert decision.allowed
    assert decision.denied[0].reason == "unavailable"
    assert "outside a metered request" in caplog.text


# -- Cached answers


def test_an_answer_is_asked_for_once(make, entitled):
    entitled.values["acme"] = {"searches": YES}
    app = make()

    for _ in range(10):
        assert ask(app).status == "200 OK"

    assert entitled.questions == 1
    assert app.stats().allowed == {"openmeter": 1, "cache": 9}


def test_a_denial_holds_for_a_shorter_time(make, entitled, openmeter):
    entitled.values["acme"] = {"searches": NO}
    app = make(deny_ttl=1)
    assert ask(app).status == "403 Forbidden"
    entitled.values["acme"] = {"searches": YES}

    known = app.process().entitlements.cached_answer("acme", "searches")
    wait_for(lambda: time.monotonic() > known.fresh_until)

    assert ask(app).status == "200 OK"  # never once more on suspicion


def test_an_aged_allowance_is_renewed_behind_the_requests_back(
    make, entitled, openmeter
):
    entitled.values["acme"] = {"searches": YES}
    app = make(allow_ttl=3_600)
    ask(app)
    app.process().entitlements.cached_answer("acme", "searches").fresh_until = 0.0
    entitled.instead = HANG

    started = time.monotonic()
    assert ask(app).status == "200 OK"
    assert ask(app).status == "200 OK"

    assert time.monotonic() - started < 15  # half of what waiting would cost
    assert app.stats().allowed == {"openmeter": 1, "stale": 2}
    openmeter.wait_until(lambda: entitled.questions == 2)


def test_what_is_invalidated_is_asked_for_at_once(make, entitled):
    entitled.values["acme"] = {"searches": NO}
    app = make()
    ask(app)
    entitled.values["acme"] = {"searches": YES}
    assert ask(app).status == "403 Forbidden"

    app.invalidate("acme")

    assert ask(app).status == "200 OK"


def test_one_feature_can_be_invalidated_alone(make, entitled):
    entitled.values["acme"] = {"searches": YES, "exports": YES}
    app, other = make(), make(required_entitlements=["exports"])
    ask(app)
    app.invalidate("acme", "exports")
    ask(app)

    assert entitled.asked == {("acme", "searches"): 1}
    assert other is not app


def test_an_answer_under_way_is_not_kept_if_its_customer_is_invalidated(
    make, entitled, openmeter
):
    entitled.values["acme"] = {"searches": NO}
    app = make()

    def rule(request):
        answer = entitled(request)
        app.invalidate("acme")
        entitled.values["acme"] = {"searches": YES}
        return answer

    openmeter.rule = rule
    ask(app)
    openmeter.rule = entitled

    assert ask(app).status == "200 OK"
    assert entitled.questions == 2


def test_what_is_invalidated_is_forgotten_under_every_policy(make, entitled):
    entitled.values["of-route"] = {"searches": NO}
    own = {"customer": {"acme": "of-route"}}
    app = make(required_entitlements=["searches"], routes={"/search": own})
    ask(app, PATH_INFO="/search")
    entitled.values["of-route"] = {"searches": YES}

    app.invalidate("acme")

    assert ask(app, PATH_INFO="/search").status == "200 OK"


def test_of_too_many_customers_the_one_used_least_recently_is_forgotten():
    answers = AnswerCache(2)

    def learn(customer):
        answer = CachedAnswer(
            "searches", EntitlementAnswer(has_access=True), None,
            asked_at=time.monotonic(), terms_at=0.0, lifetimes=Lifetimes(60, 5, 600),
        )  # fmt: skip
        answers.put(customer, "searches", answer)

    allowed = answers.fresh_decisions("searches")
    learn("a")
    learn("b")
    assert allowed("a")
    learn("c")

    assert allowed("a")
    assert allowed("c")
    assert allowed("b") is None


def test_many_requests_of_a_new_subject_ask_once(make, entitled, openmeter):
    entitled.values["acme"] = {"searches": YES}
    openmeter.script.append(HANG)
    app = make(entitlement_timeout=20)
    statuses = []
    threads = [
        threading.Thread(target=lambda: statuses.append(ask(app).status))
        for _ in range(200)
    ]

    for thread in threads:
        thread.start()
    openmeter.wait_for_requests(1)
    openmeter.script.clear()
    openmeter.heal()
    for thread in threads:
        thread.join(40)

    assert len(statuses) == 200
    # The one that hung was closed, not answered.
    assert sum("/acme/" in request.target for request in openmeter.requests) <= 2


# -- When OpenMeter is away


def wait_until_aged(app, *customers):
    """Wait until the cached answers about *customers* are too old."""
    known = app.process().entitlements.cached_answer
    wait_for(
        lambda: all(
            time.monotonic() > known(name, "searches").graceful_until
            for name in customers
        )
    )


AWAY = [HANG, problem(500), problem(401), problem(404), Answer(302), Answer(429)]


@pytest.mark.parametrize("away", AWAY, ids=lambda answer: str(answer.status))
@pytest.mark.parametrize(
    ("mode", "status"),
    [("open", "200 OK"), ("stale", "200 OK"), ("closed", "503 Service Unavailable")],
)
def test_with_nothing_known_the_fail_mode_decides(make, entitled, away, mode, status):
    entitled.instead = away
    app = make(fail_mode=mode, entitlement_timeout=0.2)

    response = ask(app)

    assert response.status == status
    if mode == "closed":
        assert body(response)["reason"] == "unavailable"
        assert int(header(response, "Retry-After")) >= 1
        assert app.stats().denied == {"unavailable": 1}
    else:
        assert app.stats().let_through == {"unavailable": 1}


def test_a_mistake_in_the_configuration_is_loud_and_no_denial(make, entitled, caplog):
    entitled.values["acme"] = {"searches": YES}
    entitled.instead = problem(400, "feature key does not match")

    assert ask(make()).status == "200 OK"

    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "feature key does not match" in errors[0].getMessage()


@pytest.mark.parametrize(("mode", "allowed"), [("open", True), ("closed", False)])
def test_an_id_that_openmeter_refuses_is_no_denial_among_features(
    make, entitled, caplog, mode, allowed
):
    entitled.values["acme"] = {"searches": YES}
    entitled.refused["acme", ID] = problem(400, "no such id")
    gate = make(fail_mode=mode).process().billing.gate

    decision = gate.check({"REMOTE_USER": "acme"}, ["searches", ID])

    assert decision.allowed is allowed
    (denial,) = decision.denied
    assert (denial.feature, denial.reason) == (ID, "unavailable")
    assert "no such id" in caplog.text


@pytest.mark.parametrize("mode", ["open", "closed", "stale"])
@pytest.mark.parametrize("feature", ["Api-Requests", "", "a" * 65, 7])
def test_nobody_has_a_feature_that_openmeter_cannot_have(
    make, entitled, caplog, mode, feature
):
    entitled.values["acme"] = {"searches": YES}
    gate = make(fail_mode=mode).process().billing.gate

    decision = gate.check({"REMOTE_USER": "acme"}, ["searches", feature])

    assert not decision.allowed
    (denial,) = decision.denied
    assert (denial.feature, denial.reason) == (feature, "no_access")
    assert entitled.questions == 0
    assert f"feature {feature!r}: every request that requires it is" in caplog.text


def test_a_mistake_in_one_feature_leaves_the_others_alone(make, entitled):
    entitled.values["acme"] = {"exports": YES}
    app = make(required_entitlements=[])
    gate = app.process().billing.gate
    entitled.instead = problem(400)
    gate.check({"REMOTE_USER": "acme"}, ["searches"])
    entitled.instead = None

    decision = gate.check({"REMOTE_USER": "acme"}, ["exports"])

    assert decision.source == "openmeter"
    gate.check({"REMOTE_USER": "acme"}, ["searches"])
    assert entitled.asked["acme", "searches"] == 1


@pytest.mark.parametrize("status", [400, 403, 404, 500])
@pytest.mark.parametrize("name", ["a/b", "a%2fb", "a\\b", "a;b", "a-b"])
def test_a_name_that_is_refused_on_its_way_stops_no_question_for_others(
    make, entitled, name, status
):
    entitled.values["acme"] = {"searches": YES}
    entitled.refused[name] = problem(status)
    app = make(fail_mode="closed")

    for _ in range(3):
        assert ask(app, name).status.startswith("503")

    assert entitled.asked[name, "searches"] == 1
    assert ask(app, "acme").status == "200 OK"


def test_names_that_are_refused_do_not_keep_the_breaker_open(make, entitled):
    entitled.values["acme"] = {"searches": YES}
    entitled.instead = problem(500)
    app = make(fail_mode="closed")
    ask(app, "acme")
    entitled.instead = None
    names = [f"x/{n}" for n in range(1_000)]
    entitled.refused = dict.fromkeys(names, problem(404))
    asker = app.process().entitlements._lookup

    wait_for(lambda: ask(app, names.pop()) and not asker.breaker.is_open)

    assert ask(app, "acme").status == "200 OK"


def test_a_subject_with_too_many_similar_customers_is_no_outage_for_others(
    make, entitled, caplog
):
    entitled.values["acme"] = {"searches": YES}
    entitled.similar = 5_000
    app = make(fail_mode="closed")

    assert ask(app, "a").status.startswith("503")
    entitled.similar = 0

    assert "set the option customer=" in caplog.text
    # An outage ends all waiting, and its end is logged.
    assert "answers again" not in caplog.text
    assert ask(app, "acme").status == "200 OK"


def test_each_outage_of_entitlements_is_logged_at_its_begin_and_end(
    make, entitled, caplog
):
    app = make()
    breaker = app.process().entitlements._lookup.breaker
    names = [f"subject-{n}" for n in range(1_000)]

    for _ in range(2):
        entitled.instead = problem(503)
        wait_for(lambda: ask(app, names.pop()) and breaker.is_open)
        entitled.instead = None
        wait_for(lambda: ask(app, names.pop()) and not breaker.is_open)

    lines = [record.getMessage() for record in caplog.records]
    begin = [line for line in lines if "(status 503" in line]
    end = [line for line in lines if "OpenMeter answers again" in line]
    assert (len(begin), len(end)) == (2, 2)


def test_an_outage_costs_one_question_and_not_one_a_request(make, entitled):
    entitled.instead = HANG
    app = make(entitlement_timeout=0.5)
    ask(app)

    started = time.monotonic()
    for n in range(50):
        assert ask(app, f"subject-{n}").status == "200 OK"
    taken = time.monotonic() - started

    assert taken < 50 * 0.5 / 2
    assert entitled.questions <= 3 + 2 * taken  # one try in half a second at most


def test_a_known_answer_holds_through_an_outage(make, entitled):
    entitled.values["good"] = {"searches": YES}
    entitled.values["bad"] = {"searches": NO}
    app = make(allow_ttl=0.01, deny_ttl=0.01)
    ask(app, "good"), ask(app, "bad")
    entitled.instead = problem(500)
    wait_until_aged(app, "good", "bad")

    assert ask(app, "good").status == "200 OK"
    assert ask(app, "bad").status == "403 Forbidden"


@pytest.mark.parametrize(
    ("mode", "good", "bad"),
    [("open", 200, 200), ("closed", 503, 503), ("stale", 200, 403)],
)
def test_past_max_stale_the_fail_mode_decides(make, entitled, mode, good, bad):
    entitled.values["good"] = {"searches": YES}
    entitled.values["bad"] = {"searches": NO}
    app = make(allow_ttl=0.01, deny_ttl=0.01, max_stale=0, fail_mode=mode)
    ask(app, "good"), ask(app, "bad")
    entitled.instead = problem(500)
    wait_until_aged(app, "good", "bad")

    assert ask(app, "good").status.startswith(str(good))
    assert ask(app, "bad").status.startswith(str(bad))


def test_that_openmeter_is_back_is_noticed_within_seconds(make, entitled):
    entitled.values["acme"] = {"searches": YES}
    entitled.instead = problem(500)
    app = make(fail_mode="closed")
    assert ask(app).status.startswith("503")

    entitled.instead = None

    wait_for(lambda: ask(app).status == "200 OK")


def test_a_429_keeps_what_is_known_and_opens_no_breaker(make, entitled):
    entitled.values["acme"] = {"searches": NO}
    app = make(deny_ttl=0.01, fail_mode="closed")
    ask(app)
    entitled.instead = Answer(429, headers={"Retry-After": "30"})
    wait_until_aged(app, "acme")

    for _ in range(10):
        assert ask(app).status == "403 Forbidden"

    assert entitled.questions == 2
    assert not app.process().entitlements._lookup.breaker.is_open


def test_made_up_names_occupy_few_threads_and_leave_questions_for_others(
    make, entitled, openmeter
):
    entitled.values["known"] = {"searches": YES}
    app = make(entitlement_timeout=20, fail_mode="closed")
    ask(app, "known")
    entitled.instead = HANG
    statuses = []
    waiting = [
        threading.Thread(
            target=lambda n=n: statuses.append(ask(app, f"new-{n}").status)
        )
        for n in range(12)
    ]
    for thread in waiting:
        thread.start()
    openmeter.wait_for_requests(1 + 8)

    started = time.monotonic()
    entitlements = app.process().entitlements
    entitlements.cached_answer("known", "searches").fresh_until = 0.0
    assert ask(app, "known").status == "200 OK"
    assert time.monotonic() - started < 10  # half of what waiting would cost
    openmeter.wait_until(lambda: entitled.asked["known", "searches"] == 2)
    assert entitled.questions == 1 + 8 + 1

    openmeter.heal()
    for thread in waiting:
        thread.join(40)


def test_new_names_leave_questions_to_customers_that_are_known(make, entitled):
    entitled.values["acme"] = {"searches": YES}
    app = make(question_rate=4, entitlement_timeout=0.05)
    wait_for(lambda: ask(app) and app.stats().allowed)
    app.process().entitlements.cached_answer("acme", "searches").fresh_until = 0.0

    for n in range(100):
        ask(app, f"new-{n}")
        if not entitled.asked[f"new-{n}", "searches"]:
            break  # all that new ones get is used up
    asked = entitled.asked["acme", "searches"]
    ask(app)

    wait_for(lambda: entitled.asked["acme", "searches"] > asked)


def test_questions_are_limited_per_second(make, entitled, caplog):
    app = make(question_rate=4, entitlement_timeout=0.1)
    names = (f"subject-{n}" for n in itertools.count())

    started = time.monotonic()
    wait_for(lambda: ask(app, next(names)) and "question_rate" in caplog.text)

    assert entitled.questions <= 4 + 4 * (time.monotonic() - started)


def test_what_else_is_asked_of_an_entitlement_is_a_question_too(make, entitled, caplog):
    entitled.values["acme"] = {"searches": metered(0)}
    app = make(question_rate=0.1, entitlement_timeout=5)

    assert ask(app).status.startswith("429")

    wait_for(lambda: "question_rate" in caplog.text)
    assert not entitled.asked_terms


# -- The configuration


@pytest.mark.parametrize(
    ("key", "proposed"),
    [
        ("api-request", "api_request"),
        ("Api Requests", "api_requests"),
        ("apiRequests", "api_requests"),
        ("GPT-4", "gpt_4"),
        ("_a__b_", "a_b"),
        ("f" * 65, "f" * 64),
        ("f" * 63 + "-x", "f" * 63),
        ("Zoë", "zo"),
    ],
)
def test_a_feature_that_openmeter_cannot_have_is_refused_with_a_proposal(key, proposed):
    with pytest.raises(ConfigError) as caught:
        Policy(
            api_url="http://127.0.0.1:1",
            required_entitlements=["fine", key],
            routes={"/x": {"required_entitlements": [key]}},
        )

    (said,) = caught.value.problems
    assert said.startswith("required_entitlements: OpenMeter takes no feature key")
    assert repr(key) in said
    assert f"write {proposed!r} here and in OpenMeter" in said


def test_a_feature_of_a_route_that_openmeter_cannot_have_is_refused():
    with pytest.raises(ConfigError, match=r"routes\['/x'\]: required_entitlements"):
        Policy(
            api_url="http://127.0.0.1:1",
            routes={"/x": {"required_entitlements": ["a-b"]}},
        )


@pytest.mark.parametrize("key", ["日本", "-", "___"])
def test_where_no_key_is_like_it_none_is_proposed(key):
    with pytest.raises(ConfigError) as caught:
        Policy(api_url="http://127.0.0.1:1", required_entitlements=[key])

    assert "write" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["a", "a1_2b", "f" * 64, "01M8J9X1RNQGDXW4D8BHQ7G0CN", "4"]
)
def test_keys_and_ids_that_openmeter_takes(key):
    policy = Policy(api_url="http://127.0.0.1:1", required_entitlements=[key])

    assert policy.required_entitlements == (key,)


@pytest.mark.parametrize(
    "counted", [["api-requests"], {"api-requests": "api-requests"}]
)
def test_a_feature_that_is_counted_down_has_a_key_of_openmeters(counted):
    with pytest.raises(ConfigError) as caught:
        Policy(api_url="http://127.0.0.1:1", entitlement_meters=counted)

    assert "write 'api_requests' here and in OpenMeter" in str(caught.value)
    has_mapping = "{'api_requests': 'api-requests'}" in str(caught.value)
    assert has_mapping is isinstance(counted, list)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"required_entitlements": "searches"}, "expected a list of feature keys"),
        ({"required_entitlements": [""]}, "expected text that is not empty"),
        ({"customer": "acme"}, "customer: expected a callable"),
        ({"entitlement_meters": {"tokens": 3}}, "'tokens': expected a meter type"),
        ({"reserve": {"tokens": -1}, "entitlement_meters": ["tokens"]}, "not negative"),
        ({"reserve": {"tokens": 1}}, "reserve: 'tokens' is not in entitlement_meters"),
        ({"fail_mode": "ajar"}, "expected one of 'open', 'closed', 'stale'"),
        ({"limit_status": 500}, "limit_status: expected one of 429, 402, 403"),
        ({"denied_response": "no"}, "denied_response: expected a callable"),
        ({"redis_url": "http://secret"}, "redis_url: expected a URL that begins with"),
        ({"api_flavor": "v3", "entitlement_meters": ["tokens"]},
         "entitlement_meters: expected none with api_flavor='v3', which returns "
         "no balance to count down, got ['tokens']"),
        ({"api_flavor": "v3", "usage_headers": True}, "usage_headers: expected False"),
        ({"api_flavor": "v3", "routes": {"/x": {"usage_headers": True}}},
         "routes['/x']: usage_headers: expected False"),
        ({"api_flavor": "v3", "required_entitlements": ["01M8J9X1EFX5AKBPTT7324QFHA"]},
         "'01M8J9X1EFX5AKBPTT7324QFHA' is an id, which version 3 of OpenMeter's"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(options, said):
    with pytest.raises(ConfigError) as caught:
        Policy(api_url="http://127.0.0.1:1", api_key="k", **options)

    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


def test_variables_name_features(monkeypatch):
    monkeypatch.setenv("OPENMETER_REQUIRED_ENTITLEMENTS", "searches, exports")
    monkeypatch.setenv("OPENMETER_ENTITLEMENT_METERS", '{"tokens": "llm"}')

    policy = Policy.from_env(api_url="http://127.0.0.1:1")

    assert policy.required_entitlements == ("searches", "exports")
    assert policy.entitlement_meters["tokens"].type == "llm"


def test_questions_can_have_a_key_and_an_address_of_their_own(
    make, openmeter, entitled
):
    entitled.values["acme"] = {"searches": YES}
    app = make(
        api_key="ingest", entitlements_api_key="ask", entitlements_url=openmeter.url
    )

    ask(app)
    app.close(40)

    keys = {r.method: r.headers["Authorization"] for r in openmeter.requests}
    assert keys == {"GET": "Bearer ask", "POST": "Bearer ingest"}


def test_an_answer_that_comes_after_the_close_begins_nothing_anew(openmeter):
    entitled = Entitled(openmeter)
    entitled.values["acme"] = {"searches": metered(5)}
    asked, release = threading.Event(), threading.Event()

    def late(request):
        asked.set()
        assert release.wait(TIMEOUT)
        return entitled(request)

    openmeter.rule = late
    app = middleware(
        openmeter,
        ok,
        entitlement_meters=["searches"],
        meters={"searches": 1},
        meter_on_status_codes="500",  # else its event would begin delivery anew
    )
    request = threading.Thread(target=ask, args=(app,))
    request.start()
    assert asked.wait(TIMEOUT)

    app.close(TIMEOUT)
    release.set()
    request.join()

    # The fixture of all tests waits until no thread of the package is left.
    assert app.stats().allowed["openmeter"] == 1
