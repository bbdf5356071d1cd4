"""The sandbox in Python: access given and taken in one step, and questions counted."""

import pytest

from test_sandbox_support import Api, event


@pytest.fixture
def api(sandbox):
    with Api(sandbox.url) as api:
        api.meter("calls", "COUNT")
        yield api


def ask(api, feature="calls", customer="acme"):
    path = f"/api/v1/customers/{customer}/entitlements/{feature}/value"
    return api.get(path).json()


def use(api, *numbers):
    api.ingest([event(number, subject="acme") for number in numbers])


def test_an_amount_creates_customer_feature_and_entitlement(sandbox, api):
    made = sandbox.grant("acme", "calls", 5)

    assert (made["type"], made["featureKey"], made["customerKey"]) == (
        "metered", "calls", "acme",
    )  # fmt: skip
    assert api.get("/api/v1/customers/acme").json()["name"] == "acme"
    assert api.get("/api/v1/features/calls").json()["meterSlug"] == "calls"
    assert ask(api)["balance"] == sandbox.value("acme", "calls")["balance"] == 5


def test_without_an_amount_access_is_boolean_and_with_a_config_static(sandbox, api):
    sandbox.grant("acme", "sso")
    sandbox.grant("acme", "plan", config={"seats": 3})

    assert ask(api, "sso") == {"hasAccess": True}
    assert ask(api, "plan") == {"hasAccess": True, "config": '{"seats": 3}'}


def test_usage_counts_that_arrives_after_the_grant_even_within_a_second(sandbox, api):
    use(api, 1, 2, 3)
    sandbox.grant("acme", "calls", 5)
    use(api, 4)

    assert (ask(api)["balance"], ask(api)["usage"]) == (4, 1)


def test_a_second_amount_is_added_and_another_kind_replaces(sandbox, api):
    sandbox.grant("acme", "calls", 5)
    use(api, 1)

    sandbox.grant("acme", "calls", 2)
    added = ask(api)
    sandbox.grant("acme", "calls", 3, soft=True)
    use(api, *range(2, 7))
    soft = ask(api)
    sandbox.grant("acme", "calls", 0)

    assert (added["balance"], added["usage"]) == (6, 1)
    assert (soft["hasAccess"], soft["balance"], soft["overage"]) == (True, 0, 2)
    assert (ask(api)["hasAccess"], ask(api)["usage"]) == (False, 0)


def test_granting_again_without_an_amount_changes_nothing(sandbox, api):
    for first in ({}, {"soft": True}):
        before = sandbox.grant("acme", "calls", **first)

        assert sandbox.grant("acme", "calls", **first)["id"] == before["id"]


def test_a_reset_takes_effect_at_once(sandbox, api):
    sandbox.grant("acme", "calls", 5)
    sandbox.reset("acme", "calls")
    use(api, 1, 2)
    sandbox.reset("acme", "calls")
    after = ask(api)
    use(api, 3)

    assert (after["balance"], after["usage"]) == (5, 0)
    assert (ask(api)["balance"], ask(api)["usage"]) == (4, 1)


def test_a_grant_after_a_reset_is_not_used_up_by_what_was_before(sandbox, api):
    sandbox.grant("acme", "calls", 1)
    use(api, 1, 2, 3)
    sandbox.reset("acme", "calls")

    sandbox.grant("acme", "calls", 5)

    assert ask(api)["balance"] == 6


def test_a_revoked_feature_is_no_longer_accessible(sandbox, api):
    sandbox.grant("acme", "calls", 5)

    sandbox.revoke("acme", "calls")

    assert ask(api) == {"hasAccess": False}
    sandbox.grant("acme", "calls", 7)
    assert ask(api)["balance"] == 7


def test_a_customer_is_deleted_with_all_entitlements(sandbox, api):
    id_ = sandbox.grant("acme", "calls", 5)["customerId"]

    sandbox.delete_customer("acme")

    path = "/api/v2/customers/{}/entitlements/calls/value"
    assert api.get(path.format(id_)).status_code == 412
    assert api.get(path.format("acme")).status_code == 404


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda s: s.grant("acme", "nothing", 1), "create the meter first"),
        (lambda s: s.grant("acme", "nothing", soft=True), "feature 'nothing': neither"),
        (
            lambda s: s.grant("acme", "calls", -1),
            "amount: expected a number of at least 0, got -1",
        ),
        (lambda s: s.grant("acme", "calls", float("nan")), "amount: .* got nan"),
        (lambda s: s.grant("acme", "calls", 1, period="SOON"), "SOON"),
        (lambda s: s.revoke("nobody", "calls"), "nobody not found"),
        (lambda s: s.revoke("known", "calls"), "entitlement not found calls"),
        (lambda s: s.reset("known", "sso"), "metered but got boolean"),
        (lambda s: s.value("no one", "sso"), "no one not found"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_says_why(sandbox, api, call, reason):
    sandbox.grant("known", "sso")

    with pytest.raises(ValueError, match=reason):
        call(sandbox)


def test_questions_are_counted_by_kind_customer_and_feature(sandbox, api):
    sandbox.grant("acme", "calls", 5)
    for feature in ("calls", "calls", "sso"):
        ask(api, feature)
    api.get("/api/v1/customers/acme/access")
    api.get("/api/v2/customers/acme/entitlements/calls/value")
    api.get("/api/v2/customers/acme/entitlements/calls")
    ask(api, "calls", "nobody")

    assert sandbox.questions == {
        ("value", "acme", "calls"): 2,
        ("value", "acme", "sso"): 1,
        ("access", "acme", None): 1,
        ("value_v2", "acme", "calls"): 1,
        ("entitlement", "acme", "calls"): 1,
        ("value", "nobody", "calls"): 1,
    }
    assert sandbox.asked() == 7
    assert sandbox.asked(customer="acme", feature="calls") == 4
    assert sandbox.asked(kind="value") == 4
    calls = {"customer": "acme", "feature": "calls", "kind": "value"}
    assert sandbox.wait_asked(2, timeout=40, **calls)
    assert not sandbox.wait_asked(5, kind="value", timeout=0)
    sandbox.forget_questions()
    assert sandbox.asked() == 0


def test_what_the_sandbox_itself_looks_up_is_no_question(sandbox, api):
    sandbox.grant("acme", "calls", 5)
    sandbox.faults.set(outage=True)

    assert sandbox.value("acme", "calls")["balance"] == 5
    assert sandbox.value("acme", "sso") == {"hasAccess": False}
    assert sandbox.asked() == 0
