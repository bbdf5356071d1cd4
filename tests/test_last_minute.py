"""The last minute of a usage period, in which OpenMeter answers for the next one."""

import time

import pytest

from entitling import ask, metered, middleware, wait_for
from openmeter_wsgi.entitlements.client import Terms
from test_entitlements import body, header, ok

pytestmark = pytest.mark.usefixtures("patient_ledger")

FEATURE = "api_requests"


@pytest.fixture
def make(openmeter, entitled, middlewares):
    def make(**options):
        usual = {"required_entitlements": [FEATURE], "entitlement_meters": [FEATURE],
                 "meters": {FEATURE: 1}, "question_rate": 1_000}  # fmt: skip
        middlewares.append(middleware(openmeter, ok, **{**usual, **options}))
        return middlewares[-1]

    return make


def period(seconds):
    """Return the terms of a period that ends in *seconds*."""
    now = time.time()
    times = [time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
             for at in (now + seconds - 3_600, now + seconds)]  # fmt: skip
    return {"currentUsagePeriod": {"from": times[0], "to": times[1]}}


def known(app):
    return app.process().entitlements.cached_answer("acme", FEATURE)


def ask_again(app, entitled):
    """Make the middleware ask OpenMeter again, and wait for the answer."""
    asked_at = known(app).asked_at
    app.process().entitlements.refresh("acme", FEATURE, since=time.monotonic())
    wait_for(lambda: known(app).asked_at > asked_at)


def with_terms(make, entitled, **options):
    """An application that knows when the period ends."""
    app = make(**options)
    ask(app)
    wait_for(lambda: known(app).terms)
    return app


def test_a_fall_of_usage_is_not_believed_and_the_count_goes_on(make, entitled):
    entitled.values["acme"] = {FEATURE: metered(5)}
    entitled.terms["acme", FEATURE] = period(30)
    app = with_terms(make, entitled)

    entitled.values["acme"] = {FEATURE: metered(100)}  # used: 0
    ask_again(app, entitled)

    assert [ask(app).status[:3] for _ in range(8)] == ["200"] * 4 + ["429"] * 4


def test_a_spent_quota_stays_spent(make, entitled):
    entitled.values["acme"] = {FEATURE: metered(0)}
    entitled.terms["acme", FEATURE] = period(30)
    app = with_terms(make, entitled, deny_ttl=0.01)

    entitled.values["acme"] = {FEATURE: metered(100)}
    ask_again(app, entitled)

    response = ask(app)
    assert body(response)["reason"] == "limit_reached"
    assert int(header(response, "Retry-After")) <= 30
    asked = entitled.questions
    for _ in range(20):
        assert ask(app).status.startswith("429")
    assert entitled.questions == asked  # what is held is not asked for again and again


def test_usage_that_does_not_fall_is_believed(make, entitled):
    entitled.values["acme"] = {FEATURE: metered(5, granted=100)}
    entitled.terms["acme", FEATURE] = period(30)
    app = with_terms(make, entitled)

    entitled.values["acme"] = {FEATURE: metered(50, granted=150)}
    ask_again(app, entitled)

    assert known(app).answer.balance == 50


def test_a_denial_without_a_balance_is_believed(make, entitled):
    entitled.values["acme"] = {FEATURE: metered(5)}
    entitled.terms["acme", FEATURE] = period(30)
    app = with_terms(make, entitled)

    entitled.values["acme"] = {}
    ask_again(app, entitled)

    assert body(ask(app))["reason"] == "no_access"


@pytest.mark.parametrize("left", [3, 0])
def test_a_new_count_begins_at_the_end(make, entitled, left):
    entitled.values["acme"] = {FEATURE: metered(left)}
    entitled.terms["acme", FEATURE] = period(3)
    app = with_terms(make, entitled, deny_ttl=0.05)
    entitled.values["acme"] = {FEATURE: metered(100)}
    for _ in range(5):  # of which none is delivered
        ask(app)

    served = 0

    def is_used_up():
        nonlocal served
        served += ask(app).status == "200 OK"
        return served >= 100

    entitled.terms["acme", FEATURE] = period(3_600)
    wait_for(is_used_up)

    assert [ask(app).status[:3] for _ in range(20)] == ["429"] * 20


@pytest.mark.parametrize(
    ("now", "is_ending"),
    [(900, False), (938.9, False), (939, True), (1_000, True), (1_001, False)],
)
def test_the_last_minute_has_a_second_at_both_ends(now, is_ending):
    assert Terms(period_end=1_000.0).is_ending(now) is is_ending
    assert not Terms().is_ending(now)


def test_an_answer_ends_with_its_period(make, entitled):
    entitled.values["acme"] = {FEATURE: metered(50)}
    entitled.terms["acme", FEATURE] = period(20)
    app = with_terms(make, entitled, allow_ttl=3_600)

    assert known(app).fresh_until - known(app).asked_at <= 22
