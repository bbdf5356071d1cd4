"""The middleware before the recorded answers of a real OpenMeter."""

import json

import pytest

from entitling import ask, middleware, wait_for
from openmeter_server import CLOSE, PAGE, RESET, Answer, problem
from openmeter_wsgi import ConfigError, Policy
from openmeter_wsgi.request import REQUEST
from recorded import (
    RECORDINGS,
    RecordedOpenMeter,
    customer,
    document,
    unknown_customer,
)

LIST = "/api/v1/customers?"
MODES = ["open", "stale", "closed"]
OK, FORBIDDEN, TOO_MANY = "200 OK", "403 Forbidden", "429 Too Many Requests"
UNAVAILABLE = "503 Service Unavailable"

#: What the caller gets for each recorded value, by the name of the case. Cases whose
#: answer is 400 for the feature's key are further down: no policy can ask for them.
VALUES = {
    "metered_0": OK,
    "soft_0": OK,
    "bool": OK,
    "static": OK,
    "no_entitlement": FORBIDDEN,
    "unknown_feature": FORBIDDEN,
    "unknown_customer": FORBIDDEN,
    "customer_id": OK,
    "by_subject_key": FORBIDDEN,  # of no customer in the list
    "odd_customer": FORBIDDEN,
    "customer_257": FORBIDDEN,
    "no_issue": TOO_MANY,
    "grants": OK,
    "metered_3": OK,
    "soft_over": OK,
    "multi_exact": TOO_MANY,
    "multi_grants": OK,
    "solo_no_issue": TOO_MANY,
    "metered_7_of_5": TOO_MANY,
    "after_grant": OK,
    "after_reset": OK,
    "deleted_ent": FORBIDDEN,
    "archived_feature": OK,
    "deleted_customer": FORBIDDEN,
    "deleted_customer_by_key": FORBIDDEN,
    "slash_customer": OK,
    "unicode_customer": OK,
    "nul_customer": FORBIDDEN,
    "issue_old_form": OK,
    "issue_zero": TOO_MANY,
    "soft_no_grants": OK,
    "burn": TOO_MANY,
    "burn_reset": TOO_MANY,
    "again": TOO_MANY,
    "entitlement_id": OK,
    "feature_id": FORBIDDEN,
    "unknown_ulid": FORBIDDEN,
}
#: Customer, features, status and reason, by the recorded answer of ``/access``.
ACCESS = [
    ("access.acme", "g-acme", ("g_f_bool", "g_f_req"), OK, None),
    ("access.acme", "g-acme", ("g_f_static", "g_f_tot"), OK, None),
    ("access.acme", "g-acme", ("g_f_bool", "g_f_eu"), FORBIDDEN, "no_access"),
    ("access.acme_over", "g-acme", ("g_f_bool", "g_f_req"), TOO_MANY, "limit_reached"),
    ("access.acme_over", "g-acme", ("g_f_tot", "g_f_static"), OK, None),
    ("access.acme_over", "g-acme", ("g_f_req", "g_f_none"), FORBIDDEN, "no_access"),
    ("access.solo", "g-solo", ("g_f_req", "g_f_bool"), FORBIDDEN, "no_access"),
    ("access.nokey", "01M8J9X1GKTQQB78HEEJ9VQ9RQ", ("g_f_req", "g_f_bool"), FORBIDDEN,
     "no_access"),
    ("access.unknown", "g-none", ("g_f_req", "g_f_bool"), FORBIDDEN,
     "unknown_customer"),
    ("access.slash", "g-sl/ash", ("g_f_tot", "g_f_bool"), FORBIDDEN, "no_access"),
    ("access.unicode", "g-Zoë 🚀", ("g_f_tot", "g_f_bool"), FORBIDDEN, "no_access"),
]  # fmt: skip


@pytest.fixture
def recorded(openmeter):
    return RecordedOpenMeter(openmeter)


@pytest.fixture
def called():
    return []


@pytest.fixture
def make(openmeter, called):
    """A function that makes a new middleware with one subject for all requests."""
    made = []

    def app(environ, start_response):
        called.append(environ[REQUEST].decision)
        start_response("200 OK", [])
        return [b"ok"]

    def make(who, /, *features, **options):
        usual = {"subject": lambda environ: who, "deny_ttl": 60}
        options = {"required_entitlements": features, **usual, **options}
        made.append(middleware(openmeter, app, **options))
        return made[-1]

    yield make
    openmeter.heal()
    for each in made:
        each.close(40)


def check(response, called, status, reason=None):
    """Check the response; the application must be called only with access."""
    assert response.status == status
    assert len(called) == (status == OK)
    headers = dict(response.headers)
    assert ("Retry-After" in headers) == (status in {TOO_MANY, UNAVAILABLE})
    if status != OK:
        assert int(headers.get("Retry-After", "1")) >= 1
        said = json.loads(b"".join(response.body))["reason"]
        assert reason is None or said == reason


# -- Each recorded answer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "status"), VALUES.items())
def test_each_recorded_value_is_decided_as_openmeter_means_it(
    make, called, recorded, name, status, mode
):
    recording = RECORDINGS[f"value2.{name}"]
    recorded.play(recording.name)
    recorded.play("ent.get_feature")
    app = make(recording.customer, recording.feature, fail_mode=mode)

    check(ask(app), called, status)
    check(ask(app), called[:-1], status)  # the answer that is known now


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "who", "features", "status", "reason"), ACCESS)
def test_each_recorded_access_is_decided_as_openmeter_means_it(
    make, called, recorded, name, who, features, status, reason, mode
):
    recorded.play(name)
    recorded.play("ent.get_feature")

    check(ask(make(who, *features, fail_mode=mode)), called, status, reason)


def test_every_recorded_answer_has_a_case():
    decided = {*VALUES} | {name.partition(".")[2] for name, *_ in ACCESS}
    others = {
        "hyphen_feature", "upper_feature", "feature_65", "feature_space",  # below
        "mu",  # below: the 500 of /access
        "bad_time", "time_past", "time_future",  # a time is never asked for
    }  # fmt: skip
    names = {
        name.partition(".")[2]
        for name in RECORDINGS
        if name.startswith(("value2.", "access."))
    }

    assert names == decided | others


@pytest.mark.parametrize("mode", MODES)
def test_a_deleted_customer_is_unknown_with_several_features(
    make, called, recorded, mode
):
    deleted = RECORDINGS["value2.deleted_customer"]
    path = f"/api/v1/customers/{deleted.customer}/access"
    recorded.answers[path] = deleted.answer()
    app = make(deleted.customer, "g_f_req", "g_f_bool", fail_mode=mode)

    check(ask(app), called, FORBIDDEN, "unknown_customer")


def test_retry_after_is_the_end_of_the_recorded_period(make, called, recorded):
    recorded.play("value2.metered_7_of_5")
    recorded.play("ent.get_feature")

    check(ask(make("g-acme", "g_f_req")), called, TOO_MANY, "limit_reached")

    assert recorded.asked[-1] == RECORDINGS["ent.get_feature"].path


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("features", "status"),
    [
        (("g_f_eu", "g_f_per"), OK),
        (("g_f_eu", "g_f_tot"), TOO_MANY),
        (("g_f_none", "g_f_per"), FORBIDDEN),
    ],
)
def test_where_access_fails_each_feature_is_asked_for_by_itself(
    make, called, recorded, features, status, mode
):
    """A single entitlement of a customer can make all of ``/access`` a 500."""
    for name in ("issue_old_form", "issue_zero", "soft_no_grants"):
        recorded.play(f"value2.{name}")
    recorded.play("access.mu")
    none = "/api/v2/customers/g-mu/entitlements/g_f_none/value"
    recorded.answers[none] = RECORDINGS["value2.unknown_feature"].answer()
    app = make("g-mu", *features, fail_mode=mode)

    check(ask(app), called, status)

    assert not app.process().entitlements._lookup.breaker.is_open


@pytest.mark.parametrize(
    ("mode", "status"), [("open", OK), ("stale", OK), ("closed", UNAVAILABLE)]
)
def test_where_a_feature_fails_by_itself_too_the_fail_mode_decides(
    make, called, recorded, mode, status
):
    recorded.play("access.mu")
    recorded.play("value2.issue_old_form")
    broken = "/api/v2/customers/g-mu/entitlements/g_f_mu4/value"
    recorded.answers[broken] = RECORDINGS["access.mu"].answer()
    app = make("g-mu", "g_f_eu", "g_f_mu4", fail_mode=mode)

    check(ask(app), called, status)


@pytest.mark.parametrize("mode", MODES)
def test_a_feature_that_fails_does_not_hide_that_another_is_denied(
    make, called, recorded, mode
):
    recorded.play("access.mu")
    recorded.play("value2.issue_zero")
    broken = "/api/v2/customers/g-mu/entitlements/g_f_mu4/value"
    recorded.answers[broken] = RECORDINGS["access.mu"].answer()
    app = make("g-mu", "g_f_mu4", "g_f_tot", fail_mode=mode)

    check(ask(app), called, TOO_MANY, "limit_reached")


# -- Answers that are none


WRONG_VALUES = [
    Answer(200, b"", {"Content-Type": "application/json"}, takes=False),
    Answer(200, b"no JSON", {"Content-Type": "application/json"}, takes=False),
    Answer(200, b'"\xff"', {"Content-Type": "application/json"}, takes=False),
    Answer(
        200,
        b'{"x":' + b"[" * 100_000,
        {"Content-Type": "application/json"},
        takes=False,
    ),
    PAGE,
    document([]),
    document("text"),
    document(None),
    document(True),
    document({"hasAccess": "yes"}),
    document({"hasAccess": None}),
    document({"hasAccess": 1}),
    document({"hasAccess": False, "balance": "none"}),
    document({"hasAccess": True, "config": {"seats": 5}}),
    Answer(204, takes=False),
    document({"hasAccess": True, "more": "x" * 2_000_000}),  # longer than is read
]
REFUSALS = [
    problem(400, 'parameter "customerIdOrKey" in path has an error'),
    problem(403, "forbidden"),
    problem(404),
    problem(409, "conflict"),
    problem(412),
    problem(500),
    problem(503),
    Answer(301, headers={"Location": "/elsewhere"}, takes=False),
]


def known_and_bad(recorded, answer):
    """Let OpenMeter know one customer well and answer so about another."""
    recorded.play("value2.bool")
    recorded.play("access.acme")
    for path in ("v2/customers/bad/entitlements/g_f_bool/value",
                 "v2/customers/bad/entitlements/g_f_static/value",
                 "v1/customers/bad/access"):  # fmt: skip
        recorded.answers[f"/api/{path}"] = answer


@pytest.mark.parametrize("features", [("g_f_bool",), ("g_f_bool", "g_f_static")])
@pytest.mark.parametrize("answer", [*WRONG_VALUES, *REFUSALS])
@pytest.mark.parametrize(
    ("mode", "status"), [("open", OK), ("stale", OK), ("closed", UNAVAILABLE)]
)
def test_what_is_said_wrongly_of_one_customer_stops_no_question_for_others(
    make, called, recorded, answer, features, mode, status
):
    known_and_bad(recorded, answer)
    who = ["bad"]
    app = make("", *features, fail_mode=mode, subject=lambda environ: who[0])

    check(ask(app), called, status)
    asked = len(recorded.asked)
    check(ask(app), called[:-1], status)  # for a while that is not asked again

    assert len(recorded.asked) == asked
    who[0] = "g-acme"
    called.clear()
    check(ask(app), called, OK)
    assert called[0].source == "openmeter"
    assert app.health().ok


@pytest.mark.parametrize("answer", [CLOSE, RESET])
def test_silence_about_one_customer_stops_no_question_for_others_for_long(
    make, called, recorded, answer
):
    known_and_bad(recorded, answer)
    who = ["bad"]
    app = make("", "g_f_bool", fail_mode="closed", subject=lambda environ: who[0])

    check(ask(app), called, UNAVAILABLE)
    wait_for(lambda: app.health().ok)
    check(ask(app), called, UNAVAILABLE)

    assert recorded.count(RecordedOpenMeter.value_path("bad", "g_f_bool")) == 1
    who[0] = "g-acme"
    check(ask(app), called, OK)


@pytest.mark.parametrize("answer", [
    problem(500), problem(401), problem(404), problem(503), PAGE, document([]),
    Answer(301, headers={"Location": "/elsewhere"}, takes=False),
])  # fmt: skip
def test_what_is_said_wrongly_of_all_opens_the_breaker(
    make, recorded, openmeter, answer
):
    openmeter.rule = lambda request: answer
    app = make("acme", "searches", fail_mode="closed")

    assert ask(app).status == UNAVAILABLE

    assert [p.code for p in app.health().problems] == ["entitlements"]
    openmeter.heal()


def test_a_key_of_a_feature_that_is_refused_for_all_is_remembered_for_all(
    make, recorded, openmeter
):
    openmeter.rule = lambda request: recorded(request) and problem(400, "no such key")
    who = ["a"]
    app = make("", "searches", fail_mode="closed", subject=lambda environ: who[0])
    assert ask(app).status == UNAVAILABLE
    asked = len(recorded.asked)
    who[0] = "b"

    assert ask(app).status == UNAVAILABLE

    assert len(recorded.asked) == asked
    assert not app.process().entitlements._lookup.breaker.is_open


def test_an_entitlement_that_was_not_asked_for_may_be_wrong(make, called, recorded):
    values = {**RECORDINGS["access.acme"].body["entitlements"], "odd": [3]}
    path = RECORDINGS["access.acme"].path
    recorded.answers[path] = document({"entitlements": values})

    check(ask(make("g-acme", "g_f_bool", "g_f_req")), called, OK)


@pytest.mark.parametrize("mode", MODES)
def test_one_wrong_entitlement_does_not_hide_the_denial_of_another(
    make, called, recorded, mode
):
    values = {**RECORDINGS["access.acme_over"].body["entitlements"], "g_f_bool": [3]}
    path = RECORDINGS["access.acme_over"].path
    recorded.answers[path] = document({"entitlements": values})
    recorded.play("ent.get_feature")
    app = make("g-acme", "g_f_bool", "g_f_req", fail_mode=mode)

    check(ask(app), called, TOO_MANY, "limit_reached")


# -- Customers by their subjects


def subjects_of_multi(recorded):
    recorded.play("customer.list_subject")
    recorded.play("value2.multi_grants")
    recorded.play("value2.multi_exact")
    recorded.play_access("g-multi", "value2.multi_grants", "value2.multi_exact")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("features", "status"),
    [
        (("g_f_eu",), OK),
        (("g_f_req",), TOO_MANY),
        (("g_f_eu", "g_f_req"), TOO_MANY),
        (("g_f_eu", "g_f_none"), FORBIDDEN),
    ],
)
def test_a_subject_of_a_customer_gets_what_its_customer_has(
    make, called, recorded, features, status, mode
):
    subjects_of_multi(recorded)
    app = make("g-m-1", *features, fail_mode=mode)

    check(ask(app), called, status)


def test_the_customer_of_a_subject_is_looked_up_once(make, called, recorded):
    subjects_of_multi(recorded)
    app = make("g-m-1", "g_f_eu")
    ask(app)
    app.process().entitlements.cached_answer("g-m-1", "g_f_eu").fresh_until = 0.0
    app.process().entitlements.cached_answer("g-m-1", "g_f_eu").graceful_until = 0.0

    ask(app)

    assert called[1].source == "openmeter"
    assert recorded.count(LIST) == 1
    assert recorded.count("/api/v2/customers/g-m-1/") == 1
    assert recorded.count("/api/v2/customers/g-multi/") == 2


def test_a_lookup_holds_as_long_as_an_answer(make, called, recorded):
    subjects_of_multi(recorded)
    app = make("g-m-1", "g_f_eu", allow_ttl=1e-9, deny_ttl=1e-9)

    ask(app)
    ask(app)

    assert len(called) == 2
    assert recorded.count(LIST) == 2


def test_an_unknown_subject_is_looked_up_once(make, called, recorded):
    app = make("nobody", "g_f_bool")
    other = make("nobody", "g_f_eu")

    for _ in range(3):
        check(ask(app), called, FORBIDDEN, "unknown_customer")
    check(ask(other), called, FORBIDDEN, "unknown_customer")

    assert recorded.count(LIST) == 2


def test_an_unknown_subject_is_looked_up_once_for_all_features(make, called, recorded):
    own = {"required_entitlements": ["g_f_eu"]}
    app = make("nobody", "g_f_bool", routes={"/other": own})

    check(ask(app), called, FORBIDDEN, "unknown_customer")
    check(ask(app, PATH_INFO="/other"), called, FORBIDDEN, "unknown_customer")

    assert recorded.count(LIST) == 1


def test_only_the_exact_subject_is_taken(make, called, recorded):
    recorded.page_size = 1  # so that there are pages
    recorded.customers = [
        customer("shouting", "ACME", id_="01M8J9X1FN5V7R64DFBZPF9Y41"),
        customer("second", "acme2", id_="01M8J9X1FN5V7R64DFBZPF9Y42"),
        customer("right", "other", "acme", id_="01M8J9X1FN5V7R64DFBZPF9Y43"),
    ]
    for wrong in ("shouting", "second"):
        path = f"/api/v2/customers/{wrong}/entitlements/g_f_bool/value"
        recorded.answers[path] = document({"hasAccess": True})
    path = "/api/v2/customers/right/entitlements/g_f_bool/value"
    recorded.answers[path] = document({})

    check(ask(make("acme", "g_f_bool")), called, FORBIDDEN, "no_access")

    assert recorded.count(LIST) == 3
    del recorded.customers[2]
    check(ask(make("acme", "g_f_bool")), called, FORBIDDEN, "unknown_customer")


def test_a_customer_without_a_key_is_asked_for_by_its_id(make, called, recorded):
    recorded.customers = [customer(None, "g-nokey", id_="01M8J9X1GKTQQB78HEEJ9VQ9RQ")]
    path = "/api/v2/customers/01M8J9X1GKTQQB78HEEJ9VQ9RQ/entitlements/g_f_bool/value"
    recorded.answers[path] = document({"hasAccess": True})

    check(ask(make("g-nokey", "g_f_bool")), called, OK)


def test_a_subject_that_becomes_a_key_is_asked_for_itself(make, called, recorded):
    subjects_of_multi(recorded)
    app = make("g-m-1", "g_f_eu", allow_ttl=1e-9, deny_ttl=1e-9)
    ask(app)
    own = RecordedOpenMeter.value_path("g-m-1", "g_f_eu")
    recorded.answers[own] = document({})
    called.clear()

    check(ask(app), called, FORBIDDEN, "no_access")

    assert recorded.count(LIST) == 1


def test_a_subject_whose_customer_is_gone_is_looked_up_again(make, called, recorded):
    subjects_of_multi(recorded)
    app = make("g-m-1", "g_f_eu")
    ask(app)
    known = app.process().entitlements.cached_answer("g-m-1", "g_f_eu")
    known.fresh_until = known.graceful_until = 0.0
    gone = RECORDINGS["value2.multi_grants"].path
    recorded.answers[gone] = unknown_customer("g-multi")
    recorded.customers[:] = [customer("new", "g-m-1")]
    path = RecordedOpenMeter.value_path("new", "g_f_eu")
    recorded.answers[path] = document({})
    called.clear()

    check(ask(app), called, FORBIDDEN, "no_access")


@pytest.mark.parametrize("who", ["g-m-1", "g-multi"])
def test_what_is_invalidated_is_looked_up_again(make, called, recorded, who):
    subjects_of_multi(recorded)
    app = make("g-m-1", "g_f_eu")
    ask(app)

    app.invalidate(who)
    ask(app)

    assert called[1].source == "openmeter"
    assert recorded.count(LIST) == 2


@pytest.mark.parametrize("answer", [
    problem(403, "forbidden"), problem(404), problem(500), document([]), PAGE,
    document({"items": [{"usageAttribution": {"subjectKeys": ["who"]}}]}),
    document({"items": 3, "totalCount": 1}),
])  # fmt: skip
@pytest.mark.parametrize(
    ("mode", "status"), [("open", OK), ("stale", OK), ("closed", UNAVAILABLE)]
)
def test_without_an_answer_to_the_lookup_the_fail_mode_decides(
    make, called, recorded, openmeter, answer, mode, status
):
    openmeter.rule = lambda request: (
        answer if request.target.startswith(LIST) else recorded(request)
    )
    app = make("who", "g_f_bool", fail_mode=mode)

    check(ask(app), called, status)

    assert not app.process().entitlements._lookup.breaker.is_open


def test_a_lookup_ends_after_some_pages(make, called, recorded):
    recorded.page_size = 1
    recorded.customers = [customer(f"c{n}", f"x{n}") for n in range(1_000)]

    check(ask(make("x", "g_f_bool", fail_mode="closed")), called, UNAVAILABLE)

    assert recorded.count(LIST) <= 20


def test_a_lookup_counts_against_the_question_rate(make, called, recorded):
    subjects_of_multi(recorded)
    app = make("g-m-1", "g_f_eu", question_rate=0.01, fail_mode="closed")

    check(ask(app), called, UNAVAILABLE)

    assert recorded.count("/api/v2/") == 1
    assert recorded.count(LIST) == 0


def test_two_subjects_of_a_customer_count_its_quota_down_together(
    make, called, recorded
):
    subjects_of_multi(recorded)
    who = ["g-m-1"]
    app = make(
        "", "g_f_eu", subject=lambda environ: who[0], meters={"g_sum": 4},
        entitlement_meters={"g_f_eu": "g_sum"},
    )  # fmt: skip
    assert ask(app).status == OK  # 4 of 7
    who[0] = "g-m-2"

    assert ask(app).status == TOO_MANY


@pytest.mark.parametrize(
    "key",
    ["x/../g-acme", "..", ".", "./g-acme", "g-acme/", "/g-acme", "a//b", "a/./b",
     "x\\..\\g-acme", "a\0b", "", "x" * 257, "\ud800"],
)  # fmt: skip
def test_a_key_that_could_leave_its_place_is_no_customer(make, called, recorded, key):
    """A customer that chooses such a key must not get the entitlements of others."""
    recorded.play("value2.bool")
    app = make("who", "g_f_bool", customer=lambda subject: key)

    check(ask(app), called, FORBIDDEN, "unknown_customer")

    assert recorded.asked == []


@pytest.mark.parametrize("key", ["...", "a/b.c/..d", ".hidden", "a.b", "a;b?c#d %"])
def test_other_keys_are_asked_for_whole(make, called, recorded, key):
    path = RecordedOpenMeter.value_path(key, "g_f_bool")
    recorded.answers[path] = document({"hasAccess": True})

    check(ask(make("who", "g_f_bool", customer=lambda subject: key)), called, OK)


# -- Soft limits


def test_a_soft_limit_is_not_counted_down_from_the_first_request_on(
    make, called, recorded
):
    recorded.play("value2.soft_0")
    terms = {**RECORDINGS["ent.get_feature"].body, "isSoftLimit": True}
    path = "/api/v2/customers/g-acme/entitlements/g_f_tot"
    recorded.answers[path] = document(terms)
    app = make("g-acme", "g_f_tot", meters={"g_total": 10},
               entitlement_meters={"g_f_tot": "g_total"})  # fmt: skip

    for _ in range(3):
        assert ask(app).status == OK

    assert len(called) == 3


# -- Keys of features


@pytest.mark.parametrize(
    "name", ["hyphen_feature", "upper_feature", "feature_65", "feature_space"]
)
def test_a_key_that_openmeter_refuses_makes_no_policy(name):
    recording = RECORDINGS[f"value2.{name}"]
    assert recording.status == 400

    with pytest.raises(ConfigError) as caught:
        Policy(
            api_url="http://127.0.0.1:1",
            required_entitlements=[recording.feature],
        )

    assert repr(recording.feature) in str(caught.value)


# -- The value of a static entitlement


@pytest.mark.parametrize("mode", MODES)
def test_the_handler_gets_the_value_of_a_static_entitlement(
    make, called, recorded, mode
):
    recorded.play("value2.static")
    app = make("g-acme", "g_f_static", fail_mode=mode)

    ask(app), ask(app)

    assert [decision.config for decision in called] == [{"seats": 5}] * 2
    assert [decision.source for decision in called] == ["openmeter", "cache"]
    assert called[0].configs == {"g_f_static": {"seats": 5}}
