"""Requests with entitlements, and an OpenMeter that computes its answers."""

import pytest
import requests

from entitling import ask, close_all, sandbox_with_meter
from openmeter_wsgi import OpenMeterMiddleware
from test_entitlements import body, ok, wait_for

pytestmark = pytest.mark.usefixtures("patient_ledger")

FEATURE = "api_requests"


@pytest.fixture
def sandbox():
    with sandbox_with_meter(FEATURE) as sandbox:
        yield sandbox


@pytest.fixture
def make(sandbox):
    made = []

    def make(**options):
        usual = {
            "meters": {FEATURE: 1},
            "required_entitlements": [FEATURE],
            "entitlement_timeout": 30,
            "shutdown_timeout": 0,
        }
        made.append(OpenMeterMiddleware(ok, api_url=sandbox.url, **usual | options))
        return made[-1]

    yield make
    close_all(made)


def test_customers_are_asked_for_that_are_there_and_that_are_not(sandbox, make):
    sandbox.grant("acme", FEATURE, 10)
    app = make()

    assert ask(app).status == "200 OK"
    assert body(ask(app, "nobody"))["reason"] == "unknown_customer"
    assert sandbox.asked(kind="value_v2") == 2


@pytest.mark.parametrize("key", ["acme", "Zoë 🚀"])
def test_a_subject_of_a_customer_uses_the_quota_of_its_customer(sandbox, make, key):
    customers = f"{sandbox.url}/api/v1/customers"
    for name, subjects in ((key, ["s-1", "s-2"]), ("other", ["S-1", "s-11"])):
        made = {"name": name, "key": name,
                "usageAttribution": {"subjectKeys": subjects}}  # fmt: skip
        requests.post(customers, json=made, timeout=40).raise_for_status()
    sandbox.grant(key, FEATURE, 2)
    app = make(fail_mode="closed", entitlement_meters=[FEATURE])

    assert ask(app, "s-1").status == "200 OK"
    assert ask(app, "s-2").status == "200 OK"
    for subject in ("s-1", "s-2"):
        assert body(ask(app, subject))["reason"] == "limit_reached"
    assert body(ask(app, "s-11"))["reason"] == "no_access"
    assert body(ask(app, "s-1111"))["reason"] == "unknown_customer"


def test_a_name_that_climbs_is_nobody_elses(sandbox, make):
    for name in ("x", "acme"):
        sandbox.grant(name, FEATURE, 10)
    app = make(fail_mode="closed", subject="header:X-Subject")

    climbing = f"../../../v2/customers/x/entitlements/{FEATURE}/value?"
    for name in ("../../x", "../x", climbing, "x/", "./x", "..", "x%2f..%2fx"):
        response = ask(app, None, HTTP_X_SUBJECT=name)
        assert response.status[:3] in {"403", "503"}, name

    assert sandbox.asked(customer="x") == 0
    assert ask(app, None, HTTP_X_SUBJECT="acme").status == "200 OK"


QUICK = {
    "entitlement_meters": [FEATURE], "visibility_lag": 0, "flush_interval": 0.01,
    "allow_ttl": 0.1, "deny_ttl": 0.1,
}  # fmt: skip


def use_up(app, sandbox, amount):
    """Serve until the quota is used, and check that no more is served."""
    served = 0

    def is_used_up():
        nonlocal served
        response = ask(app)
        served += response.status == "200 OK"
        return served >= amount

    wait_for(is_used_up)
    wait_for(lambda: sandbox.value("acme", FEATURE)["balance"] == 0)
    for _ in range(20):
        assert ask(app).status.startswith("429")
    assert served == amount


@pytest.mark.parametrize("change", ["grant", "reset", "soft", "replaced"])
def test_what_changes_on_the_server_shows_with_the_next_answer(sandbox, make, change):
    sandbox.grant("acme", FEATURE, 4)
    app = make(**QUICK)
    use_up(app, sandbox, 4)

    if change == "grant":
        sandbox.grant("acme", FEATURE, 3)
        use_up(app, sandbox, 3)
    elif change == "reset":
        sandbox.reset("acme", FEATURE)
        use_up(app, sandbox, 4)
    elif change == "soft":
        sandbox.revoke("acme", FEATURE)
        sandbox.grant("acme", FEATURE, 2, soft=True)
        wait_for(lambda: all(ask(app).status == "200 OK" for _ in range(20)))
    else:
        sandbox.revoke("acme", FEATURE)
        wait_for(lambda: ask(app).status.startswith("403"))
        assert body(ask(app))["reason"] == "no_access"


def test_a_revoked_access_ends_while_a_quota_is_counted_down(sandbox, make):
    sandbox.grant("acme", FEATURE, 1_000_000)
    app = make(**QUICK)
    assert ask(app).status == "200 OK"

    sandbox.revoke("acme", FEATURE)

    wait_for(lambda: ask(app).status.startswith("403"))


# -- Both versions


#: By the name of the case: the subject, the features, the status and the reason.
CASES = {
    "boolean": ("acme", ["flag"], "200 OK", None),
    "static": ("acme", ["conf"], "200 OK", None),
    "metered": ("acme", [FEATURE], "200 OK", None),
    "used_up": ("spent", [FEATURE], "429 Too Many Requests", "limit_reached"),
    "soft_over": ("soft", [FEATURE], "200 OK", None),
    "no_entitlement": ("spent", ["conf"], "403 Forbidden", "no_access"),
    "unknown_feature": ("acme", ["nothing"], "403 Forbidden", "no_access"),
    "unknown_customer": ("nobody", ["flag"], "403 Forbidden", "unknown_customer"),
    "by_subject_key": ("a-subject", ["flag"], "200 OK", None),
    "subject_in_capitals": ("A-SUBJECT", ["flag"], "403 Forbidden", "unknown_customer"),
    "odd_key": ("Zoë / 🚀", ["flag"], "200 OK", None),
    "all_of_three": ("acme", ["flag", "conf", FEATURE], "200 OK", None),
    "one_used_up": ("spent", ["flag", FEATURE], "429 Too Many Requests",
                    "limit_reached"),
    "one_missing": ("spent", ["conf", FEATURE], "403 Forbidden", "no_access"),
}  # fmt: skip


@pytest.fixture
def filled(sandbox):
    """A sandbox with customers of every kind."""
    with requests.Session() as session:
        customers = f"{sandbox.url}/api/v1/customers"
        subjects = {"subjectKeys": ["a-subject"]}
        for made in ({"key": "other", "usageAttribution": subjects}, {"key": "acme"},
                     {"key": "spent"}, {"key": "soft"},
                     {"key": "Zoë / 🚀"}):  # fmt: skip
            answer = session.post(customers, json={"name": "a", **made}, timeout=40)
            answer.raise_for_status()
    for customer in ("acme", "spent", "other", "Zoë / 🚀"):
        sandbox.grant(customer, "flag")
    sandbox.grant("acme", "conf", config={"seats": 5})
    sandbox.grant("acme", FEATURE, 10)
    sandbox.grant("spent", FEATURE, 0)
    sandbox.grant("soft", FEATURE, 0, soft=True)
    return sandbox


@pytest.mark.parametrize("mode", ["open", "stale", "closed"])
@pytest.mark.parametrize("flavor", ["v1", "v3"])
def test_each_case_gets_its_status_over_v1_and_v3(filled, make, flavor, mode):
    got = {}
    for name, (who, features, *_) in CASES.items():
        app = make(
            subject=lambda environ, who=who: who, required_entitlements=features,
            api_flavor=flavor, fail_mode=mode, meters=None,
        )  # fmt: skip
        response = ask(app)
        allowed = response.status == "200 OK"
        got[name] = (response.status, None if allowed else body(response)["reason"])

    assert got == {name: tuple(case[2:]) for name, case in CASES.items()}


@pytest.mark.parametrize("flavor", ["v1", "v3"])
def test_a_customer_that_was_deleted_is_unknown(filled, make, flavor):
    app = make(required_entitlements=["plain"], api_flavor=flavor, deny_ttl=1e-9)
    customers = f"{filled.url}/api/v1/customers"
    made = requests.post(
        customers, json={"name": "a", "key": "plain"}, timeout=40
    )  # fmt: skip
    assert body(ask(app, "plain"))["reason"] == "no_access"

    requests.delete(f"{customers}/{made.json()['id']}", timeout=40).raise_for_status()

    assert body(ask(app, "plain"))["reason"] == "unknown_customer"


@pytest.mark.parametrize("flavor", ["v1", "v3"])
def test_usage_that_uses_a_quota_up_denies_over_v1_and_v3(sandbox, make, flavor):
    sandbox.grant("acme", FEATURE, 2)
    app = make(api_flavor=flavor)
    statuses = []

    for _ in range(3):
        statuses.append(ask(app).status[:3])
        assert app.flush(40)
        app.invalidate("acme")

    assert statuses == ["200", "200", "429"]
