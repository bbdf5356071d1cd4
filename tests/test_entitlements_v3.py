"""The middleware before an OpenMeter that is asked by version 3 of its API."""

import json

import pytest

from entitling import ask, middleware, wait_for
from openmeter_server import CLOSE, PAGE, RESET, Answer, problem
from openmeter_wsgi.entitlements.cache import Lifetimes
from openmeter_wsgi.entitlements.client_v3 import ClientV3
from openmeter_wsgi.entitlements.customers import CustomerCache, answers_about
from openmeter_wsgi.entitlements.questions import Question
from openmeter_wsgi.options import ApiKey
from openmeter_wsgi.request import REQUEST
from recorded import RECORDINGS as V1
from recorded import RecordedOpenMeter, document
from recorded_v3 import (
    BASE,
    CUSTOMERS,
    NO_ID,
    RECORDINGS,
    RecordedV3,
    access,
    access_path,
    customer,
    customers_path,
    with_brackets,
)

MODES = ["open", "stale", "closed"]
OK, FORBIDDEN, TOO_MANY = "200 OK", "403 Forbidden", "429 Too Many Requests"
UNAVAILABLE = "503 Service Unavailable"
BY_FAIL_MODE = [("open", OK), ("stale", OK), ("closed", UNAVAILABLE)]
NO_KEY = ApiKey.from_options(None, None)
SUBJECT_KEY = "usage_attribution_subject_key"


@pytest.fixture
def recorded(openmeter):
    return RecordedV3(openmeter)


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
        usual = {
            "subject": lambda environ: who, "deny_ttl": 60, "api_flavor": "v3",
            "required_entitlements": features,
        }  # fmt: skip
        made.append(middleware(openmeter, app, **usual | options))
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


# -- Each case by both versions

#: By its name: customer, features, status and reason.
CASES_V3 = {
    "boolean": ("h-bool", ["h_flag"], OK, None),
    "static": ("h-static", ["h_conf"], OK, None),
    "metered": ("h-rich", ["h_calls"], OK, None),
    "soft_over": ("h-soft", ["h_calls"], OK, None),
    "used_up": ("h-used", ["h_calls"], TOO_MANY, "limit_reached"),
    "no_entitlement": ("h-none", ["h_flag"], FORBIDDEN, "no_access"),
    "without_subjects": ("h-nosub", ["h_flag"], FORBIDDEN, "no_access"),
    "other_feature": ("h-bool", ["h_calls"], FORBIDDEN, "no_access"),
    "unknown_feature": ("h-bool", ["h_nope"], FORBIDDEN, "no_access"),
    "unknown_customer": ("h-nobody", ["h_flag"], FORBIDDEN, "unknown_customer"),
    "by_id": (CUSTOMERS["h-bool"]["id"], ["h_flag"], OK, None),
    "unknown_id": (NO_ID, ["h_flag"], FORBIDDEN, "unknown_customer"),
    "by_subject_key": ("h-bool-sub", ["h_flag"], OK, None),
    "used_up_by_subject_key": ("h-used-sub", ["h_calls"], TOO_MANY, "limit_reached"),
    "part_of_a_subject_key": ("h-bool-su", ["h_flag"], FORBIDDEN, "unknown_customer"),
    "subject_key_in_capitals": ("H-BOOL-SUB", ["h_flag"], FORBIDDEN,
                                "unknown_customer"),
    "too_long": ("x" * 257, ["h_flag"], FORBIDDEN, "unknown_customer"),
    "nul": ("h-bool\0", ["h_flag"], FORBIDDEN, "unknown_customer"),
    "one_of_two_used_up": ("h-used", ["h_flag", "h_calls"], TOO_MANY, "limit_reached"),
    "one_of_two_missing": ("h-bool", ["h_flag", "h_conf"], FORBIDDEN, "no_access"),
    "one_missing_one_used_up": ("h-used", ["h_calls", "h_conf"], FORBIDDEN,
                                "no_access"),
}  # fmt: skip
#: The same of version 1, by the recorded answers that it takes.
CASES_V1 = {
    "boolean": (["value2.bool"], "g-acme", ["g_f_bool"], OK, None),
    "static": (["value2.static"], "g-acme", ["g_f_static"], OK, None),
    "metered": (["value2.metered_3"], "g-acme", ["g_f_req"], OK, None),
    "soft_over": (["value2.soft_over"], "g-acme", ["g_f_tot"], OK, None),
    "used_up": (["value2.metered_7_of_5"], "g-acme", ["g_f_req"], TOO_MANY,
                "limit_reached"),
    "no_entitlement": (["value2.no_entitlement"], None, None, FORBIDDEN, "no_access"),
    "unknown_feature": (["value2.unknown_feature"], None, None, FORBIDDEN, "no_access"),
    "unknown_customer": ([], "h-nobody", ["h_flag"], FORBIDDEN, "unknown_customer"),
    "by_id": (["value2.customer_id"], None, None, OK, None),
    "too_long": ([], "x" * 257, ["h_flag"], FORBIDDEN, "unknown_customer"),
    "nul": ([], "h-bool\0", ["h_flag"], FORBIDDEN, "unknown_customer"),
    "one_of_two_used_up": (["access.acme_over"], "g-acme", ["g_f_bool", "g_f_req"],
                           TOO_MANY, "limit_reached"),
    "one_of_two_missing": (["access.acme"], "g-acme", ["g_f_bool", "g_f_eu"],
                           FORBIDDEN, "no_access"),
    "one_missing_one_used_up": (["access.acme_over"], "g-acme", ["g_f_req", "g_f_none"],
                                FORBIDDEN, "no_access"),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES_V3)
def test_each_case_is_decided_over_v3(make, called, recorded, name, mode):
    who, features, status, reason = CASES_V3[name]
    app = make(who, *features, fail_mode=mode)

    check(ask(app), called, status, reason)
    check(ask(app), called[:-1], status, reason)  # the answer that is known now


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES_V1)
def test_each_case_is_decided_alike_over_v1(make, called, openmeter, name, mode):
    names, who, features, status, reason = CASES_V1[name]
    assert CASES_V3[name][2:] == (status, reason)
    RecordedOpenMeter(openmeter, *names, "ent.get_feature")
    who = who or V1[names[0]].customer
    features = features or [V1[names[0]].feature]
    app = make(who, *features, fail_mode=mode, api_flavor="v1")

    check(ask(app), called, status, reason)


def test_every_recorded_access_list_has_a_case():
    asked = {CUSTOMERS[who]["id"] for who, *_ in CASES_V3.values() if who in CUSTOMERS}
    asked |= {NO_ID, "h-rich", CUSTOMERS["h-cred"]["id"]}  # a key; as h-none

    assert {
        recording.path for name, recording in RECORDINGS.items()
        if name.startswith("access.list.")
    } <= {access_path(id_) for id_ in asked}  # fmt: skip


# -- Which customer is asked for


def test_a_customer_is_looked_up_by_its_key_and_then_asked_for(make, called, recorded):
    check(ask(make("h-bool", "h_flag")), called, OK)

    assert recorded.asked == [
        customers_path("key", "h-bool"),
        access_path(CUSTOMERS["h-bool"]["id"]),
    ]


def test_a_subject_is_looked_up_after_no_customer_has_it_for_a_key(
    make, called, recorded
):
    check(ask(make("h-bool-sub", "h_flag")), called, OK)

    assert recorded.asked == [
        customers_path("key", "h-bool-sub"),
        customers_path(SUBJECT_KEY, "h-bool-sub"),
        access_path(CUSTOMERS["h-bool"]["id"]),
    ]


def test_the_key_of_a_customer_goes_before_the_subject_key_of_another(
    make, called, recorded
):
    """OpenMeter lets a customer have another one's key for a subject key."""
    recorded.customers.insert(0, customer("other", "h-bool"))
    recorded.answers[access_path("01M8J9X1FN5V7R64DFBZPF9Y4T")] = access()

    check(ask(make("h-bool", "h_flag")), called, OK)


@pytest.mark.parametrize("key", ["a/b", "Zoë 🚀", "a;b?c#d %", "...", "a&filter[x]=1"])
@pytest.mark.parametrize("as_subject", [False, True])
def test_odd_keys_are_looked_up_whole(make, called, recorded, key, as_subject):
    recorded.customers = [customer("acme", key) if as_subject else customer(key)]
    path = access_path("01M8J9X1FN5V7R64DFBZPF9Y4T")
    recorded.answers[path] = access(h_flag=True)

    check(ask(make(key, "h_flag")), called, OK)


@pytest.mark.parametrize("key", ["x/../h-bool", "..", "h-bool/", "", "\ud800"])
def test_a_key_that_no_customer_can_have_is_not_asked_for(make, called, recorded, key):
    app = make("who", "h_flag", customer=lambda subject: key)

    check(ask(app), called, FORBIDDEN, "unknown_customer")

    assert recorded.asked == []


def test_a_filter_that_is_not_heeded_finds_nobody(make, called, recorded):
    """A server or a proxy without the filter would list all customers."""
    everybody = RECORDINGS["customer.list"].answer()
    for by in ("key", SUBJECT_KEY):
        recorded.answers[customers_path(by, "stranger")] = everybody

    check(ask(make("stranger", "h_flag")), called, FORBIDDEN, "unknown_customer")


def test_an_id_that_customer_names_needs_no_lookup(make, called, recorded):
    id_ = CUSTOMERS["h-bool"]["id"]

    check(ask(make("who", "h_flag", customer={"who": id_})), called, OK)

    assert recorded.asked == [access_path(id_)]


def test_the_id_of_a_customer_outlives_its_answers(make, called, recorded):
    app = make("h-bool-sub", "h_flag", allow_ttl=1e-9)
    check(ask(app), called, OK)
    recorded.asked.clear()

    check(ask(app), called[1:], OK)

    assert recorded.asked == [access_path(CUSTOMERS["h-bool"]["id"])]


def test_an_unknown_subject_is_looked_up_once(make, called, recorded):
    own = {"required_entitlements": ["h_conf"]}
    app = make("h-nobody", "h_flag", routes={"/other": own})

    for path in ("/", "/other", "/"):
        check(ask(app, PATH_INFO=path), called, FORBIDDEN, "unknown_customer")

    assert recorded.count(f"{BASE}/customers?") == 2


def test_several_features_cost_one_question(make, called, recorded):
    app = make("h-used", "h_flag", "h_calls", "h_conf", "h_nope")

    check(ask(app), called, FORBIDDEN, "no_access")

    assert recorded.count(access_path(CUSTOMERS["h-used"]["id"])) == 1


def test_a_customer_that_is_gone_is_looked_up_again(make, called, recorded):
    app = make("h-bool-sub", "h_flag", allow_ttl=1e-9, max_stale=1e-9)
    check(ask(app), called, OK)
    gone = CUSTOMERS["h-bool"]
    del recorded.answers[access_path(gone["id"])]
    recorded.customers[:] = [customer("new", "h-bool-sub")]
    path = access_path("01M8J9X1FN5V7R64DFBZPF9Y4T")
    recorded.answers[path] = access(h_flag=False)

    check(ask(app), called[1:], FORBIDDEN, "no_access")


@pytest.mark.parametrize("who", ["h-bool-sub", "h-bool", CUSTOMERS["h-bool"]["id"]])
def test_what_is_invalidated_is_looked_up_again(make, called, recorded, who):
    app = make("h-bool-sub", "h_flag")
    ask(app)
    recorded.asked.clear()

    app.invalidate(who)
    ask(app)

    assert called[1].source == "openmeter"
    assert len(recorded.asked) == 3


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_each_request_takes_a_token(openmeter, recorded, tokens):
    """The question has its own already, for the first of its requests."""
    left = [True] * tokens
    client = ClientV3(url=openmeter.url, key=NO_KEY, timeout=40)
    found = CustomerCache(Lifetimes(60, 5, 600))

    answers = answers_about(
        client,
        Question("h-bool-sub", ("h_flag",)),
        found,
        lambda: bool(left and left.pop()),
    )

    client.close()
    assert len(recorded.asked) == tokens + 1
    assert [*answers] == (["h_flag"] if tokens == 2 else [])
    assert left == []


def test_a_question_without_tokens_is_left_to_the_fail_mode(make, called, recorded):
    app = make("h-bool-sub", "h_flag", question_rate=0.01, fail_mode="closed")

    check(ask(app), called, UNAVAILABLE)

    assert len(recorded.asked) == 1


# -- Answers that are none

WRONG = [
    Answer(200, b"", {"Content-Type": "application/json"}, takes=False),
    Answer(200, b"no JSON", {"Content-Type": "application/json"}, takes=False),
    Answer(200, b'{"data":' + b"[" * 100_000, takes=False),
    PAGE, document([]), document({}), document({"data": 3}), document({"data": [3]}),
    document({"data": [{}]}), problem(500), problem(503), problem(403, "no role"),
    problem(404), RECORDINGS["entitlement.value"].answer(), CLOSE, RESET,
]  # fmt: skip


@pytest.mark.parametrize("answer", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize(("mode", "status"), BY_FAIL_MODE)
def test_without_an_access_list_the_fail_mode_decides(
    make, called, recorded, answer, mode, status
):
    recorded.answers[access_path(CUSTOMERS["h-bool"]["id"])] = answer
    app = make("h-bool", "h_flag", fail_mode=mode)

    check(ask(app), called, status)


@pytest.mark.parametrize("answer", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize(("mode", "status"), BY_FAIL_MODE)
@pytest.mark.parametrize("by", ["key", SUBJECT_KEY])
def test_without_a_list_of_customers_the_fail_mode_decides(
    make, called, recorded, answer, mode, status, by
):
    recorded.answers[customers_path(by, "h-bool-sub")] = answer
    app = make("h-bool-sub", "h_flag", fail_mode=mode)

    check(ask(app), called, status)


def test_an_entry_that_cannot_be_read_says_nothing_of_others(make, called, recorded):
    path = access_path(CUSTOMERS["h-bool"]["id"])
    recorded.answers[path] = access(h_flag=True, h_conf={"has_access": "perhaps"})

    check(ask(make("h-bool", "h_flag", fail_mode="closed")), called, OK)
    check(ask(make("h-bool", "h_conf", fail_mode="closed")), called[1:], UNAVAILABLE)


def test_access_that_is_left_out_is_a_denial(make, called, recorded):
    path = access_path(CUSTOMERS["h-bool"]["id"])
    recorded.answers[path] = access(h_flag={"type": "boolean"})

    check(ask(make("h-bool", "h_flag")), called, FORBIDDEN, "no_access")


@pytest.mark.parametrize("answer", [problem(500), problem(400, "no"), document([])])
def test_a_bad_answer_about_one_customer_leaves_the_others_alone(
    make, called, recorded, answer
):
    who = ["h-rich"]
    recorded.answers[access_path(CUSTOMERS["h-rich"]["id"])] = answer
    app = make("", "h_flag", subject=lambda environ: who[0], fail_mode="closed")
    check(ask(app), called, UNAVAILABLE)
    who[0] = "h-bool"

    check(ask(app), called, OK)

    assert not app.process().entitlements._lookup.breaker.is_open


def test_a_server_that_answers_nobody_is_not_asked_for_each(make, called, openmeter):
    asked = []
    openmeter.rule = lambda request: asked.append(request.target) or problem(500)
    who = ["h-bool"]
    app = make("", "h_flag", subject=lambda environ: who[0], fail_mode="closed")
    assert ask(app).status == UNAVAILABLE
    wait_for(lambda: app.process().entitlements._lookup.breaker.is_open)
    count = len(asked)
    who[0] = "h-rich"

    assert ask(app).status == UNAVAILABLE
    assert len(asked) <= count + 1


@pytest.mark.parametrize("part", ["customers?", "entitlement-access"])
def test_either_kind_of_question_that_fails_for_all_stops_them(
    make, called, recorded, openmeter, part
):
    """For a customer that does not exist, both requests are needed to know it."""
    openmeter.rule = lambda request: (
        problem(403, "no role") if part in request.target else recorded(request)
    )
    app = make("h-bool", "h_flag", fail_mode="closed")

    check(ask(app), called, UNAVAILABLE)

    wait_for(lambda: app.process().entitlements._lookup.breaker.is_open)


# -- The application


@pytest.mark.parametrize("mode", MODES)
def test_the_handler_gets_the_value_of_a_static_entitlement(
    make, called, recorded, mode
):
    app = make("h-static", "h_conf", fail_mode=mode)

    ask(app), ask(app)

    assert [decision.config for decision in called] == [{"limit": 7}] * 2
    assert [decision.source for decision in called] == ["openmeter", "cache"]
    assert called[0].configs == {"h_conf": {"limit": 7}}


def test_a_quota_that_is_used_up_gets_the_status_of_the_policy(make, called, recorded):
    app = make("h-used", "h_calls", limit_status=402)

    assert ask(app).status == "402 Payment Required"
    assert called == []


def test_events_and_questions_have_each_their_key(make, called, recorded, openmeter):
    app = make("h-bool", "h_flag", api_key="ingest", entitlements_api_key="ask")
    check(ask(app), called, OK)
    app.close(40)

    keys = {(r.method, r.headers["Authorization"]) for r in openmeter.requests}
    assert keys == {("GET", "Bearer ask"), ("POST", "Bearer ingest")}
    assert openmeter.subjects == ["h-bool"]


def test_kong_konnect_is_asked_at_its_own_path(make, called, openmeter, monkeypatch):
    """Through a proxy, so that nothing leaves this machine."""
    monkeypatch.setenv("HTTP_PROXY", openmeter.url)
    host = "http://eu.api.konghq.com"
    id_ = CUSTOMERS["h-bool"]["id"]
    answers = {
        f"{host}/v3/openmeter/customers?filter[key]=h-bool":
            document({"data": [CUSTOMERS["h-bool"]]}),
        f"{host}/v3/openmeter/customers/{id_}/entitlement-access": access(h_flag=True),
        f"{host}/v3/openmeter/events": Answer(202),
    }  # fmt: skip
    openmeter.rule = lambda request: answers.get(with_brackets(request.target))
    app = make("h-bool", "h_flag", api_url=host, api_key="kpat_x", fail_mode="closed")

    check(ask(app), called, OK)
    app.close(40)

    assert {with_brackets(r.target) for r in openmeter.requests} == {*answers}
    assert openmeter.subjects == ["h-bool"]


def test_nothing_is_asked_that_openmeter_calls_unstable(make, called, recorded):
    for who, features, *_ in CASES_V3.values():
        ask(make(who, *features))

    paths = {target.partition("?")[0].split("/")[4] for target in recorded.asked}
    assert paths == {"customers"}
