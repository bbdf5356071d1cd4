"""A quota that holds between two answers."""

import threading

import pytest

from entitling import ask, metered, middleware
from openmeter_wsgi import add_meters, check_entitlements, set_meters, set_subject
from openmeter_wsgi.request import REQUEST
from test_entitlements import body, header, ok, wait_for

pytestmark = pytest.mark.usefixtures("patient_ledger")

TOKENS = {"required_entitlements": ["tokens"], "entitlement_meters": ["tokens"]}
REQUESTS = {
    "required_entitlements": ["api_requests"],
    "entitlement_meters": ["api_requests"],
}


@pytest.fixture
def make(openmeter, entitled, middlewares):
    def make(app=ok, **options):
        middlewares.append(middleware(openmeter, app, **{**REQUESTS, **options}))
        return middlewares[-1]

    return make


def served(app, requests, subject="acme"):
    statuses = [ask(app, subject).status for _ in range(requests)]
    return sum(status == "200 OK" for status in statuses)


def left(app, subject):
    """Return the remaining balance; OpenMeter is asked if the answer is too old."""
    environ = {"REMOTE_USER": subject}
    gate = app.process().billing.gate
    gate.check(environ, ["api_requests"], {"api_requests": 0})
    gate.settle_reservations(environ[REQUEST], (), None)
    return app.process().entitlements.countdown.remaining(subject, "api_requests")


def test_the_balance_of_one_answer_is_not_overshot(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(10)}
    app = make()

    assert served(app, 30) == 10

    response = ask(app)
    assert body(response)["reason"] == "limit_reached"
    assert app.stats().denied == {"limit_reached": 21}
    assert entitled.asked["acme", "api_requests"] == 1


def test_an_event_that_is_too_large_to_be_sent_takes_nothing_of_the_quota(
    make, entitled
):
    def large(environ, start_response):
        data = {"total": 1, "text": "x" * 999_440}
        add_meters(environ, {"type": "api_requests", "data": data})
        return ok(environ, start_response)

    subject = "s" * 60  # with it, the message is larger than OpenMeter takes
    entitled.values[subject] = {"api_requests": metered(2)}
    app = make(large, meters={"others": 1})

    assert served(app, 5, subject) == 5
    assert app.stats().dropped == {"message_too_large": 5}


def is_denied_now(entitlements):
    """Ask OpenMeter again, outside a request, and return True if it denies access."""
    entitlements.refresh("acme", "api_requests")
    return not entitlements.cached_answer("acme", "api_requests").answer.has_access


def test_an_answer_that_comes_between_decision_and_reservation_denies(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(5)}
    newer = []

    def reserve(environ):
        entitlements = app.process().entitlements
        if newer:
            entitled.values["acme"] = newer.pop()
            wait_for(lambda: is_denied_now(entitlements))
        return {"api_requests": 1}

    app = make(reserve=reserve, allow_ttl=3_600)
    assert ask(app).status == "200 OK"

    newer.append({"api_requests": metered(0)})

    assert body(ask(app))["reason"] == "limit_reached"
    assert app.stats().allowed == {"openmeter": 1}


def test_of_two_features_none_stays_set_apart_when_the_other_is_taken_away(
    make, entitled
):
    entitled.values["acme"] = {"tokens": metered(5), "api_requests": metered(5)}
    both = ["tokens", "api_requests"]
    taken_away = []

    def reserve(environ):
        entitlements = app.process().entitlements
        if not taken_away:
            taken_away.append(entitled.values["acme"].pop("api_requests"))
            wait_for(lambda: is_denied_now(entitlements))
        return {"tokens": 2, "api_requests": 1}

    app = make(
        required_entitlements=both, entitlement_meters=both, reserve=reserve,
        allow_ttl=3_600,
    )  # fmt: skip

    assert body(ask(app))["reason"] == "no_access"
    assert app.process().entitlements.countdown.remaining("acme", "tokens") == 5


def test_without_counting_down_it_is(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(10)}

    assert served(make(entitlement_meters=[]), 30) == 30


def test_what_is_in_flight_is_set_apart(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(1)}
    inside, leave = threading.Event(), threading.Event()

    def app(environ, start_response):
        inside.set()
        leave.wait(40)
        return ok(environ, start_response)

    app = make(app)
    first = threading.Thread(target=ask, args=(app,))
    first.start()
    inside.wait(40)

    response = ask(app)

    assert response.status.startswith("429")
    assert header(response, "Retry-After") == "1"
    leave.set()
    first.join(40)


def test_what_is_spent_is_worth_another_try_when_openmeter_knows_of_it(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(2)}
    app = make(visibility_lag=7, flush_interval=0.01)  # and a server without a list

    assert served(app, 2) == 2

    wait_for(lambda: header(ask(app), "Retry-After") == "7")


def test_what_is_not_billed_comes_back(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(1)}
    status = ["500 Internal Server Error"]

    def app(environ, start_response):
        start_response(status[0], [])
        return [b"!"]

    app = make(app)
    for _ in range(5):
        assert ask(app).status == status[0]

    status[0] = "200 OK"
    assert served(app, 5) == 1


def test_what_raises_comes_back(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(1)}

    def app(environ, start_response):
        raise RuntimeError("a mistake of the application")

    app = make(app)

    for _ in range(5):
        assert isinstance(ask(app).raised, RuntimeError)


def test_the_amount_is_what_the_handler_stated(make, entitled):
    entitled.values["acme"] = {"tokens": metered(100)}

    def app(environ, start_response):
        set_meters(environ, {"tokens": 40})
        return ok(environ, start_response)

    app = make(app, **TOKENS)

    assert served(app, 10) == 3  # 40, 80, and the one that began with 20 left


def test_an_amount_can_be_set_apart_before_it_is_known(make, entitled):
    entitled.values["acme"] = {"tokens": metered(100)}

    def app(environ, start_response):
        add_meters(environ, {"tokens": 40})
        return ok(environ, start_response)

    app = make(app, **TOKENS, reserve={"tokens": 50})

    assert served(app, 10) == 2
    by_callable = make(app.app, **TOKENS, reserve=lambda environ: {"tokens": 50})
    assert served(by_callable, 10) == 2


def test_a_callable_that_fails_sets_nothing_apart(make, entitled, caplog):
    entitled.values["acme"] = {"tokens": metered(100)}

    app = make(**TOKENS, reserve=lambda environ: {"tokens": "many"})

    assert served(app, 3) == 3
    assert "reserve" in caplog.text


def test_the_property_that_counts_can_be_named(make, entitled):
    entitled.values["acme"] = {"tokens": metered(100)}

    def app(environ, start_response):
        data = {"model": "m", "used": "60"}
        add_meters(environ, {"type": "llm", "data": data})
        return ok(environ, start_response)

    app = make(
        app,
        required_entitlements=["tokens"],
        entitlement_meters={"tokens": {"type": "llm", "property": "used"}},
    )

    assert served(app, 10) == 2


def test_two_subjects_of_one_customer_share_its_balance(make, entitled):
    entitled.values["corp"] = {"api_requests": metered(10)}
    app = make(customer=lambda subject: "corp")

    assert served(app, 6, "alice") + served(app, 6, "bob") == 10


def test_usage_of_another_subject_is_taken_from_its_own_balance(make, entitled):
    entitled.values["alice"] = {"api_requests": metered(2)}
    entitled.values["bob"] = {"api_requests": metered(2)}

    def app(environ, start_response):
        set_subject(environ, "bob")
        return ok(environ, start_response)

    app = make(app)
    assert left(app, "bob") == 2  # known before alice's requests are billed to him

    assert served(app, 5, "alice") == 5
    assert ask(app, "bob").status.startswith("429")


def test_a_soft_limit_is_never_counted_down(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(3, soft=True)}
    entitled.terms["acme", "api_requests"] = {"isSoftLimit": True}
    app = make()
    ask(app)
    known = app.process().entitlements.cached_answer
    wait_for(lambda: known("acme", "api_requests").terms is not None)

    assert served(app, 20) == 20


def test_a_soft_limit_in_place_of_a_hard_one_shows_with_the_next_answer(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(900, granted=900)}
    entitled.terms["acme", "api_requests"] = {"isSoftLimit": False}
    app = make(allow_ttl=0.1)
    known = app.process().entitlements.cached_answer
    wait_for(lambda: ask(app) and known("acme", "api_requests").terms is not None)

    entitled.values["acme"] = {"api_requests": metered(800, granted=800, soft=True)}
    entitled.terms["acme", "api_requests"] = {"isSoftLimit": True}

    wait_for(lambda: ask(app) and known("acme", "api_requests").terms.soft_limit)


def test_access_without_balance_is_a_soft_limit(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(-5, soft=True)}

    assert served(make(), 20) == 20


def test_a_grant_shows_with_the_next_answer(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(5)}
    app = make(deny_ttl=0.1)
    assert served(app, 10) == 5

    entitled.values["acme"] = {"api_requests": metered(500, granted=505)}
    wait_for(lambda: ask(app).status == "200 OK")


def test_the_balance_of_a_new_answer_covers_what_was_delivered(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(10)}
    app = make(visibility_lag=0, deny_ttl=0.05, allow_ttl=0.05, flush_interval=0.01)
    assert served(app, 4) == 4

    entitled.values["acme"] = {"api_requests": metered(6)}
    asked = entitled.questions

    # Usage is kept by whole seconds: until one is over, it is taken off twice.
    wait_for(lambda: left(app, "acme") == 6 and entitled.questions > asked + 1)


def test_the_headers_count_down_too(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(10)}
    app = make(usage_headers=True)

    told = [int(header(ask(app), "RateLimit-Remaining")) for _ in range(10)]

    assert told == list(range(9, -1, -1))
    assert header(ask(app), "RateLimit-Remaining") == "0"


def test_zero_checks_without_counting(make, entitled):
    entitled.values["acme"] = {"tokens": metered(1)}
    app = make(**TOKENS)

    assert served(app, 10) == 10


def test_a_handler_reserves_what_only_it_knows(make, entitled):
    entitled.values["acme"] = {"tokens": metered(100)}

    def app(environ, start_response):
        decision = check_entitlements(environ, "tokens", reserve={"tokens": 60})
        if decision.allowed:
            add_meters(environ, {"tokens": 30})
        return ok(environ, start_response)

    app = make(app, **{**TOKENS, "required_entitlements": []})
    for _ in range(5):
        ask(app)

    # 30, 60 left 40, which is less than 60.
    assert app.stats().allowed["openmeter"] + app.stats().allowed.get("cache", 0) == 2
    assert app.stats().denied == {"limit_reached": 3}


def test_several_processes_share_a_balance_through_the_spool(make, entitled, tmp_path):
    entitled.values["acme"] = {"api_requests": metered(10)}
    one = make(spool_dir=str(tmp_path / "spool"), flush_interval=0.05)
    other = make(spool_dir=str(tmp_path / "spool"), flush_interval=0.05)

    total = sum(served(app, 1) for _ in range(20) for app in (one, other))

    assert total == 10


@pytest.mark.parametrize("options", [{}, {"spool_dir": "spool"}])
@pytest.mark.parametrize("several", [True, False])
def test_several_processes_that_count_alone_are_warned_of_once(
    make, entitled, tmp_path, caplog, several, options
):
    entitled.values["acme"] = {"api_requests": metered(10)}
    app = make(**{name: str(tmp_path / value) for name, value in options.items()})

    for _ in range(3):
        ask(app, **{"wsgi.multiprocess": several})

    said = [r for r in caplog.records if "without a shared store" in r.getMessage()]
    assert len(said) == (several and not options)
    if said:
        assert said[0].levelname == "WARNING"
        assert "'api_requests'" in said[0].getMessage()


def test_who_counts_nothing_down_is_not_warned(make, entitled, caplog):
    entitled.values["acme"] = {"api_requests": metered(10)}

    ask(make(entitlement_meters=[]), **{"wsgi.multiprocess": True})

    assert "without a shared store" not in caplog.text


def test_two_keys_or_servers_on_one_spool_have_accounts_of_their_own(
    make, entitled, openmeter, tmp_path
):
    entitled.values["acme"] = {"api_requests": metered(10)}
    shared = {"spool_dir": str(tmp_path / "spool"), "flush_interval": 60}
    by_another_name = openmeter.url.replace("127.0.0.1", "localhost")
    apps = [
        make(**shared, api_key="live"),
        make(**shared, api_key="staging"),
        make(**shared, api_key="live", entitlements_url=by_another_name),
    ]

    assert [served(app, 20) for app in apps] == [10, 10, 10]


def test_a_mapping_that_fails_at_the_end_costs_no_bill(
    make, entitled, openmeter, caplog
):
    entitled.values["corp"] = {"api_requests": metered(10)}
    customers = ["corp"]
    app = make(customer=lambda subject: customers.pop())

    assert served(app, 1) == 1
    accounts = {*app.process().entitlements.countdown._ledger._accounts}
    app.close(40)

    assert openmeter.subjects == ["acme"]
    assert "customer: raised" in caplog.text
    # A customer with the key "acme" would be another one.
    assert accounts == {"corp\0api_requests"}


def test_meters_of_several_subjects_are_taken_from_their_own_balances(make, entitled):
    entitled.values["alice"] = {"api_requests": metered(10)}
    entitled.values["bob"] = {"api_requests": metered(10)}
    meters = [{"type": "api_requests", "data": {"total": 2}, "subject": "bob"}]
    app = make(meters=None, meter=meters)
    assert [left(app, name) for name in ("alice", "bob")] == [10, 10]

    assert served(app, 3, "alice") == 3

    assert [left(app, name) for name in ("alice", "bob")] == [10, 4]


def test_what_is_reserved_by_name_replaces_what_the_meters_say(make, entitled):
    entitled.values["acme"] = {"api_requests": metered(10)}

    app = make(reserve={"api_requests": 4})

    # 10, 9, …, 4 are enough to begin with; 3 are not.
    assert served(app, 20) == 7


def test_a_request_that_lacks_one_quota_takes_nothing_of_another(make, entitled):
    entitled.values["acme"] = {"tokens": metered(10), "exports": metered(1)}
    both = ["tokens", "exports"]
    app = make(
        meters=dict.fromkeys(both, 1),
        required_entitlements=both,
        entitlement_meters=both,
    )

    assert served(app, 5) == 1

    assert app.process().entitlements.countdown.remaining("acme", "tokens") == 9


def test_what_a_handler_reserves_anew_replaces_what_it_had(make, entitled):
    entitled.values["acme"] = {"tokens": metered(100)}

    def app(environ, start_response):
        for amount in (90, 5):
            amounts = {"tokens": amount}
            assert check_entitlements(environ, "tokens", reserve=amounts).allowed
        add_meters(environ, {"tokens": 5})
        return ok(environ, start_response)

    app = make(app, **TOKENS)
    assert ask(app).status == "200 OK"

    assert app.process().entitlements.countdown.remaining("acme", "tokens") == 95
