"""Entitlements over HTTP: their creation, and the answers to questions."""

from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import pytest

from openmeter_wsgi.sandbox import Sandbox
from test_sandbox_support import Api, event

MONTH = {"usagePeriod": {"interval": "MONTH"}}
PATHS = {
    "E1": "/api/v1/subjects/{}/entitlements/{}/value",
    "E2": "/api/v1/customers/{}/entitlements/{}/value",
    "E3": "/api/v2/customers/{}/entitlements/{}/value",
    "E4": "/api/v1/customers/{}/access",
}
UNKNOWN_ID = "01G65Z755AFWAKHE12NY0CQ9FH"


class Catalog:
    """A customer with a feature of each kind, made through the API."""

    def __init__(self, api: Api) -> None:
        self.api = api
        api.meter("calls", "COUNT")
        self.customer = self.make("customers", {"name": "Acme", "key": "acme"})
        api.post("/api/v1/subjects", json=[{"key": "acme"}, {"key": "nobodys"}])
        self.make("features", {"key": "calls", "name": "Calls", "meterSlug": "calls"})
        self.make("features", {"key": "sso", "name": "SSO"})
        self.make("features", {"key": "plan", "name": "Plan"})
        self.make("features", {"key": "unused", "name": "Unused"})
        self.metered = self.entitle("metered", "calls", issueAfterReset=10, **MONTH)
        self.boolean = self.entitle("boolean", "sso")
        self.static = self.entitle("static", "plan", config='{"seats": 3}')

    def make(self, kind, document):
        answer = self.api.post(f"/api/v1/{kind}", json=document)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def entitle(self, kind, feature, **more):
        answer = self.post("acme", {"type": kind, "featureKey": feature} | more)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def post(self, customer, document):
        return self.api.post(
            f"/api/v2/customers/{customer}/entitlements", json=document
        )

    def delete_customer(self):
        for feature in ("calls", "sso", "plan"):
            self.api.delete(f"/api/v2/customers/acme/entitlements/{feature}")
        assert self.api.delete("/api/v1/customers/acme").status_code == 204

    def ask(self, question, customer="acme", feature="calls", **parameters):
        return self.api.get(
            PATHS[question].format(customer, feature), params=parameters
        )


@pytest.fixture
def catalog(api):
    return Catalog(api)


@pytest.mark.parametrize(
    ("feature", "statuses", "access"),
    [
        ("calls", (200, 200, 200), True),
        ("sso", (200, 200, 200), True),
        ("plan", (200, 200, 200), True),
        ("unused", (404, 200, 200), False),
        ("misspelt", (404, 200, 200), False),
        ("Not-A-Key", (404, 400, 400), None),
        ("a" * 65, (404, 400, 400), None),
        (UNKNOWN_ID, (404, 400, 200), False),
    ],
)
def test_a_feature_is_answered_as_in_openmeter(catalog, feature, statuses, access):
    answers = [catalog.ask(q, feature=feature) for q in ("E1", "E2", "E3")]

    assert tuple(answer.status_code for answer in answers) == statuses
    for answer in answers:
        if answer.status_code == 200:
            v2 = answer is answers[2]
            denial = {} if v2 else {"hasAccess": False}
            assert answer.json().get("hasAccess", False) is access
            assert access or answer.json() == denial
        else:
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert answer.json()["status"] == answer.status_code


def test_the_access_of_a_customer_has_only_the_features_it_is_entitled_to(catalog):
    access = catalog.ask("E4").json()["entitlements"]

    assert set(access) == {"calls", "sso", "plan"}
    assert access["sso"] == {"hasAccess": True}
    assert access["plan"] == {"hasAccess": True, "config": '{"seats": 3}'}
    assert "grantBalances" in access["calls"]


def test_a_customer_without_entitlements_has_an_empty_access(catalog):
    catalog.make("customers", {"name": "New", "key": "new"})

    assert catalog.ask("E4", "new").json() == {"entitlements": {}}


@pytest.mark.parametrize(
    ("question", "detail"),
    [
        ("E1", "subject not found"),
        ("E2", "customer with id or key nobody not found in default namespace"),
        ("E3", "customer with id or key nobody not found in default namespace"),
        ("E4", "customer with id or key nobody not found in default namespace"),
    ],
)
def test_an_unknown_customer_is_404(catalog, question, detail):
    answer = catalog.ask(question, "nobody")

    assert answer.status_code == 404
    assert detail in answer.json()["detail"]


def test_a_subject_that_is_no_entity_is_404_even_if_a_customer_has_it(catalog):
    catalog.make("customers", {"name": "B", "key": "without_entity"})

    assert catalog.ask("E2", "without_entity").status_code == 200
    answer = catalog.ask("E1", "without_entity")
    assert answer.status_code == 404
    assert "subject not found" in answer.json()["detail"]


def test_a_subject_without_a_customer_is_404(catalog):
    answer = catalog.ask("E1", "nobodys")

    assert answer.status_code == 404
    assert "customer with subject key nobodys not found" in answer.json()["detail"]


@pytest.mark.parametrize("question", ["E2", "E3", "E4"])
def test_a_deleted_customer_is_412_by_id_and_404_by_key(catalog, question):
    catalog.delete_customer()

    assert catalog.ask(question, catalog.customer["id"]).status_code == 412
    assert catalog.ask(question, "acme").status_code == 404


def test_the_subject_of_a_deleted_customer_is_412_until_another_one_has_it(catalog):
    catalog.delete_customer()
    assert catalog.ask("E1").status_code == 412

    catalog.make("customers", {"name": "Acme again", "key": "acme"})

    answer = catalog.ask("E1")
    assert answer.status_code == 404
    assert "entitlement not found" in answer.json()["detail"]


def test_a_deleted_customer_can_still_be_read_by_id(catalog):
    catalog.delete_customer()

    path = "/api/v1/customers"
    found = catalog.api.get(f"{path}/{catalog.customer['id']}").json()
    assert found.pop("deletedAt") >= found["createdAt"]
    assert found == catalog.customer
    assert catalog.api.get(f"{path}/acme").status_code == 404


def test_the_key_of_a_deleted_customer_can_be_used_again(catalog):
    catalog.delete_customer()

    catalog.make("customers", {"name": "Acme again", "key": "acme"})

    assert catalog.ask("E4").json() == {"entitlements": {}}
    listed = catalog.api.get("/api/v1/customers").json()["items"]
    assert [customer["name"] for customer in listed] == ["Acme again"]


def test_a_customer_with_entitlements_cannot_be_deleted(catalog):
    answer = catalog.api.delete("/api/v1/customers/acme")

    assert answer.status_code == 409
    assert "still has active entitlements" in answer.json()["detail"]


def test_deleting_a_deleted_customer_is_412_by_id_and_404_by_key(catalog):
    catalog.delete_customer()

    for who, status in ((catalog.customer["id"], 412), ("acme", 404)):
        assert catalog.api.delete(f"/api/v1/customers/{who}").status_code == status
        assert catalog.post(
            who, {"type": "boolean", "featureKey": "sso"}
        ).status_code == (status)


def test_customers_are_found_by_id_and_key_but_not_by_their_subjects(catalog):
    subjects = {"usageAttribution": {"subjectKeys": ["worker-1"]}}
    made = catalog.make("customers", {"name": "B", "key": "b"} | subjects)
    catalog.api.post("/api/v1/subjects", json=[{"key": "worker-1"}])
    entitlement = {"type": "boolean", "featureKey": "sso"}
    assert catalog.post("b", entitlement).status_code == 201

    for question in ("E2", "E3"):
        for who in ("b", made["id"]):
            assert catalog.ask(question, who, "sso").json() == {"hasAccess": True}
        assert catalog.ask(question, "worker-1", "sso").status_code == 404
    assert catalog.ask("E1", "worker-1", "sso").json() == {"hasAccess": True}


def test_only_the_newest_value_has_the_balance_of_each_grant(catalog):
    values = {question: catalog.ask(question).json() for question in ("E1", "E2", "E3")}

    plain = {
        "hasAccess": True, "balance": 10, "usage": 0, "overage": 0,
        "totalAvailableGrantAmount": 10,
    }  # fmt: skip
    assert values["E1"] == values["E2"] == plain
    balances = values["E3"].pop("grantBalances")
    assert (values["E3"], list(balances.values())) == (plain, [10])


def test_an_entitlement_can_be_named_by_its_id(catalog):
    id_ = catalog.metered["id"]

    assert catalog.ask("E3", feature=id_).json()["balance"] == 10
    assert catalog.ask("E1", feature=id_).json()["balance"] == 10
    path = "/api/v2/customers/acme/entitlements"
    assert catalog.api.get(f"{path}/{id_}").json() == catalog.metered
    catalog.make("customers", {"name": "B", "key": "b"})
    assert catalog.ask("E3", "b", id_).json() == {}


def test_usage_of_the_key_and_of_all_subjects_counts(catalog):
    subjects = {"usageAttribution": {"subjectKeys": ["one", "two"]}}
    made = catalog.make("customers", {"name": "B", "key": "b"} | subjects)
    metered = {"type": "metered", "featureKey": "calls", "issueAfterReset": 10} | MONTH
    catalog.post("b", metered)
    names = ("b", "one", "two", "acme", "elsewhere", made["id"])

    catalog.api.ingest([event(n, subject=name) for n, name in enumerate(names)])

    assert catalog.ask("E2", "b").json()["usage"] == 3
    assert catalog.ask("E2").json()["usage"] == 1


def test_access_ends_where_the_balance_does_and_never_becomes_negative(catalog):
    catalog.api.ingest([event(n, subject="acme") for n in range(9)])
    last = catalog.ask("E2").json()
    catalog.api.ingest([event(n, subject="acme") for n in range(9, 13)])

    assert (last["hasAccess"], last["balance"]) == (True, 1)
    assert catalog.ask("E2").json() == {
        "hasAccess": False, "balance": 0, "usage": 13, "overage": 3,
        "totalAvailableGrantAmount": 10,
    }  # fmt: skip
    # Version 2, and all values of a customer, say so by leaving `hasAccess` out.
    spent = catalog.ask("E3").json()
    assert spent == catalog.ask("E4").json()["entitlements"]["calls"]
    assert list(spent.pop("grantBalances").values()) == [0]
    assert spent == {
        "balance": 0, "usage": 13, "overage": 3, "totalAvailableGrantAmount": 10,
    }  # fmt: skip


def test_a_soft_limit_gives_access_beyond_the_balance(catalog):
    catalog.api.delete("/api/v2/customers/acme/entitlements/calls")
    catalog.entitle("metered", "calls", isSoftLimit=True, issueAfterReset=1, **MONTH)
    catalog.api.ingest([event(n, subject="acme") for n in range(3)])

    value = catalog.ask("E2").json()

    assert (value["hasAccess"], value["balance"], value["overage"]) == (True, 0, 2)


def test_filters_of_the_feature_choose_the_events(api):
    api.meter("tokens", "SUM", "$.n", groupBy={"model": "$.model"})
    catalog = Catalog(api)
    filters = {"meterGroupByFilters": {"model": "big"}}
    feature = {"key": "big", "name": "Big", "meterSlug": "tokens"} | filters
    catalog.make("features", feature)
    catalog.entitle("metered", "big", issueAfterReset=100, **MONTH)

    api.ingest(
        [
            event(n, subject="acme", data={"n": n, "model": model})
            for n, model in enumerate(("small", "big", "big", "small"))
        ]
    )

    assert catalog.ask("E2", feature="big").json()["usage"] == 3


@pytest.mark.parametrize(
    ("aggregation", "path", "usage"),
    [("COUNT", None, 4), ("SUM", "$.n", 9), ("UNIQUE_COUNT", "$.n", 3),
     ("LATEST", "$.n", 3)],
)  # fmt: skip
def test_every_aggregation_of_features_has_a_balance(api, aggregation, path, usage):
    catalog = Catalog(api)
    api.meter("other", aggregation, path)
    catalog.make("features", {"key": "other", "name": "O", "meterSlug": "other"})
    catalog.entitle("metered", "other", issueAfterReset=10, **MONTH)

    for number, value in enumerate((1, 3, 2, 3)):
        api.ingest(event(number, subject="acme", data={"n": value}))
        catalog.ask("E2", feature="other")

    value = catalog.ask("E2", feature="other").json()
    assert (value["usage"], value["overage"]) == (usage, 0)


def test_an_entitlement_is_shown_with_its_period(catalog):
    shown = catalog.api.get("/api/v2/customers/acme/entitlements/calls").json()

    assert shown == catalog.metered
    assert shown["type"] == "metered"
    assert shown["isSoftLimit"] is False
    assert shown["customerKey"] == "acme"
    assert shown["customerId"] == catalog.customer["id"]
    assert shown["usagePeriod"]["intervalISO"] == "P1M"
    start, end = (
        datetime.fromisoformat(shown["currentUsagePeriod"][name])
        for name in ("from", "to")
    )
    assert shown["lastReset"] == shown["currentUsagePeriod"]["from"]
    assert start <= datetime.now(UTC) < end
    assert timedelta(28) <= end - start <= timedelta(31)
    assert not [name for name in shown if name.startswith("_")]


def test_entitlements_are_listed_in_pages_and_deleted(catalog):
    path = "/api/v2/customers/acme/entitlements"
    listed = catalog.api.get(path).json()

    assert listed["totalCount"] == 3
    assert listed["items"] == [catalog.metered, catalog.boolean, catalog.static]
    assert (
        catalog.api.get(path, params={"pageSize": 2}).json()["items"]
        == (listed["items"][:2])
    )
    assert catalog.api.delete(f"{path}/sso").status_code == 204
    assert catalog.api.delete(f"{path}/sso").status_code == 404
    assert catalog.api.get(f"{path}/sso").status_code == 404
    assert catalog.ask("E2", feature="sso").json() == {"hasAccess": False}
    assert catalog.ask("E1", feature="sso").status_code == 404
    assert catalog.api.get(path).json()["totalCount"] == 2


@pytest.mark.parametrize(
    ("document", "status"),
    [
        ({"featureKey": "sso"}, 400),
        ({"type": "magic", "featureKey": "sso"}, 400),
        ({"type": "boolean"}, 400),
        ({"type": "boolean", "featureKey": "nothing"}, 404),
        ({"type": "boolean", "featureKey": "sso"}, 409),
        ({"type": "static", "featureKey": "unused"}, 400),
        ({"type": "static", "featureKey": "unused", "config": "{"}, 400),
        ({"type": "static", "featureKey": "unused", "config": {}}, 400),
        ({"type": "metered", "featureKey": "unused"}, 400),
        ({"type": "metered", "featureKey": "unused"} | MONTH, 400),
    ],
    ids=str,
)
def test_senseless_entitlements_are_refused(catalog, document, status):
    answer = catalog.post("acme", document)

    assert answer.status_code == status
    assert answer.json()["status"] == status


@pytest.mark.parametrize(
    "changes",
    [
        {"usagePeriod": {"interval": "FORTNIGHT"}},
        {"usagePeriod": {"interval": "P"}},
        {"usagePeriod": {"interval": "PT10M"}},
        {"usagePeriod": {"interval": "P99999Y"}},
        {"usagePeriod": {"anchor": "2026-01-01T00:00:00Z"}},
        {"usagePeriod": {"interval": "DAY", "anchor": "soon"}},
        {"isSoftLimit": "yes"},
        {"issueAfterReset": -1},
        {"issueAfterReset": True},
        {"issueAfterResetPriority": 1},
        {"issueAfterReset": 1, "issueAfterResetPriority": 256},
        {"issueAfterReset": 1, "issueAfterResetPriority": 1.5},
        {"measureUsageFrom": "YESTERDAY"},
        {"measureUsageFrom": "2026-99-01T00:00:00Z"},
        {"grants": [{"amount": 1}]},
        {"grants": [{"amount": 0, "effectiveAt": "2100-01-01T00:00:00Z"}]},
    ],
    ids=str,
)
def test_senseless_metered_entitlements_are_refused_and_not_kept(catalog, changes):
    catalog.api.delete("/api/v2/customers/acme/entitlements/calls")

    answer = catalog.post(
        "acme", {"type": "metered", "featureKey": "calls"} | MONTH | changes
    )

    assert answer.status_code == 400
    assert catalog.ask("E2").json() == {"hasAccess": False}


def test_a_subject_can_be_entitled_too(catalog):
    path = "/api/v1/subjects/acme/entitlements"

    made = catalog.api.post(path, json={"type": "boolean", "featureKey": "unused"})

    assert made.status_code == 201
    assert made.json()["subjectKey"] == "acme"
    assert "customerId" not in made.json()
    assert catalog.ask("E2", feature="unused").json() == {"hasAccess": True}


def test_grants_are_added_listed_and_used_up_by_priority(catalog):
    path = "/api/v2/customers/acme/entitlements/calls/grants"
    now = datetime.now(UTC).isoformat()
    expiration = {"duration": "DAY", "count": 1}
    later = {"amount": 5, "effectiveAt": now, "priority": 9, "expiration": expiration}
    first = {"amount": 2, "effectiveAt": now, "priority": 1, "expiration": expiration}

    low, high = (catalog.api.post(path, json=grant) for grant in (later, first))
    catalog.api.ingest([event(n, subject="acme") for n in range(3)])

    assert (low.status_code, high.status_code) == (201, 201)
    assert high.json()["expiresAt"] > high.json()["effectiveAt"]
    listed = catalog.api.get(path).json()
    assert [grant["amount"] for grant in listed["items"]] == [10, 5, 2]
    value = catalog.ask("E3").json()
    assert (value["balance"], value["totalAvailableGrantAmount"]) == (14, 17)
    left = value["grantBalances"]
    assert (left[high.json()["id"]], left[low.json()["id"]]) == (0, 5)


@pytest.mark.parametrize(
    ("feature", "grant", "detail"),
    [
        ("calls", {"amount": 1}, "effectiveAt"),
        ("calls", {"amount": 0, "effectiveAt": "2100-01-01T00:00:00Z"}, "positive"),
        ("calls", {"amount": 1, "effectiveAt": "2020-01-01T00:00:00Z"}, "before the"),
        (
            "sso",
            {"amount": 1, "effectiveAt": "2100-01-01T00:00:00Z"},
            "but got boolean",
        ),
    ],
    ids=str,
)
def test_senseless_grants_are_refused(catalog, feature, grant, detail):
    path = f"/api/v2/customers/acme/entitlements/{feature}/grants"

    answer = catalog.api.post(path, json=grant)

    assert answer.status_code == 400
    assert detail in answer.json()["detail"]


@pytest.mark.parametrize(
    ("feature", "reset", "detail"),
    [
        ("calls", {"effectiveAt": "2100-01-01T00:00:00Z"}, "in the future"),
        (
            "calls",
            {"effectiveAt": "2020-01-01T00:00:00Z"},
            "must be after last reset at",
        ),
        ("sso", {}, "but got boolean"),
    ],
    ids=str,
)
def test_senseless_resets_are_refused(catalog, feature, reset, detail):
    path = f"/api/v2/customers/acme/entitlements/{feature}/reset"

    answer = catalog.api.post(path, json=reset)

    assert answer.status_code == 400
    assert detail in answer.json()["detail"]


def test_a_value_can_be_asked_of_another_time(catalog):
    catalog.api.ingest([event(n, subject="acme") for n in range(3)])
    tomorrow = (datetime.now(UTC) + timedelta(1)).isoformat()

    before = catalog.ask("E2", time="2020-01-01T00:00:00Z").json()

    assert before == {"hasAccess": False}
    assert catalog.ask("E2", time=tomorrow).json()["usage"] == 3
    assert catalog.ask("E2", time="soon").status_code == 400


def test_a_meter_that_was_deleted_is_500(catalog):
    in_use = catalog.api.delete("/api/v1/meters/calls")
    for path in ("features/calls", "meters/calls"):
        assert catalog.api.delete(f"/api/v1/{path}").status_code == 204

    assert in_use.status_code == 409
    answer = catalog.ask("E2")

    assert answer.status_code == 500
    assert "detail" not in answer.json()


def test_entitlements_outlive_the_sandbox_in_its_database(tmp_path):
    database = tmp_path / "usage.sqlite"
    with Sandbox(database=database) as sandbox, Api(sandbox.url) as api:
        before = Catalog(api)
        api.ingest(event(subject="acme"))

    with Sandbox(database=database) as sandbox, Api(sandbox.url) as api:
        path = "/api/v2/customers/acme/entitlements/calls"
        assert api.get(path).json() == before.metered
        assert api.get(f"{path}/value").json()["balance"] == 9


def test_a_value_over_thousands_of_events_does_not_add_them_up_anew():
    with Sandbox() as sandbox, Api(sandbox.url) as api:
        catalog = Catalog(api)
        api.meter("tokens", "SUM", "$.n")
        feature = {"key": "tokens", "name": "Tokens", "meterSlug": "tokens"}
        catalog.make("features", feature)
        catalog.entitle("metered", "tokens", issueAfterReset=10**6, **MONTH)
        events = [event(str(n), subject="acme", data={"n": 1}) for n in range(5_000)]
        api.ingest(events)
        summed_up = steps(sandbox, lambda: catalog.ask("E2", feature="tokens"))
        api.ingest(event("new", subject="acme", data={"n": 1}))

        brought_up = steps(sandbox, lambda: catalog.ask("E2", feature="tokens"))

        assert catalog.ask("E2", feature="tokens").json()["usage"] == 5_001
        assert 0 < brought_up < summed_up / 20


def steps(sandbox, act):
    """Return the steps of the database during *act*, in tens."""
    taken = []
    with ExitStack() as stack:
        for _ in range(3):  # more than one request reads with at once
            connection = stack.enter_context(sandbox.store.reading())
            connection.set_progress_handler(lambda: taken.append(1), 10)
    act()
    return len(taken)
