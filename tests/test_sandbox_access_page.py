"""The page's table of entitlements, and its buttons."""

from html.parser import HTMLParser

import pytest

from test_sandbox_page import HOSTILE
from test_sandbox_support import Api, event


@pytest.fixture
def api(sandbox):
    with Api(sandbox.url) as api:
        api.meter("calls", "COUNT")
        yield api


def access(api):
    return api.overview()["access"]


def row(api):
    (row,) = access(api)["rows"]
    return row


def post(api, action, **document):
    return api.post(f"/sandbox/api/{action}", json={"customer": "acme"} | document)


def test_the_page_grants_resets_and_revokes(api):
    empty = access(api)
    granted = post(api, "grant", feature="calls", amount=5, soft=False, period="DAY")
    api.ingest([event(n, subject="acme") for n in range(6)])
    used = row(api)
    reset = post(api, "reset", feature="calls").status_code, row(api)
    revoked = post(api, "revoke", feature="calls").status_code, access(api)["rows"]

    assert (empty["rows"], empty["customers"], empty["features"]) == ([], [], ["calls"])
    assert granted.status_code == 201
    assert used["periodEnd"] == granted.json()["currentUsagePeriod"]["to"]
    shown = ("customer", "feature", "kind", "soft", "hasAccess", "balance", "overage")
    assert [used[name] for name in shown] == [
        "acme", "calls", "metered", False, False, 0, 1,
    ]  # fmt: skip
    assert (reset[0], reset[1]["balance"], reset[1]["usage"]) == (204, 5, 0)
    assert revoked == (204, [])
    assert access(api)["customers"] == ["acme"]


def test_access_without_a_meter_is_shown_without_a_balance(sandbox, api):
    sandbox.grant("acme", "plan", config={"seats": 3})

    shown = row(api)

    assert (shown["hasAccess"], shown["config"]) == (True, '{"seats": 3}')
    assert (shown["kind"], shown["periodEnd"]) == ("static", None)
    assert "balance" not in shown


def test_a_row_says_how_often_it_was_asked_for_but_looking_is_no_question(sandbox, api):
    id_ = sandbox.grant("acme", "calls", 5)["customerId"]
    for path in (
        "/api/v1/customers/acme/entitlements/calls/value",
        f"/api/v2/customers/{id_}/entitlements/calls/value",
        "/api/v1/customers/acme/access",
        "/api/v1/customers/acme/entitlements/other/value",
    ):
        api.get(path)

    assert row(api)["asked"] == 3
    assert access(api)["questions"] == 4


def test_a_row_whose_meter_is_gone_says_so_and_the_page_goes_on(sandbox, api):
    sandbox.grant("acme", "calls", 5)
    for path in ("features/calls", "meters/calls"):
        assert api.delete(f"/api/v1/{path}").status_code == 204

    shown = row(api)

    assert shown["hasAccess"] is False
    assert shown["error"] == "meter calls was deleted"


@pytest.mark.parametrize(
    ("action", "document", "detail"),
    [
        ("grant", {"feature": "nothing", "amount": 1}, "create the meter first"),
        ("grant", {"feature": "Not-A-Key"}, "/feature"),
        ("grant", {"feature": "calls", "amount": -1}, "at least 0"),
        ("grant", {"feature": "calls", "amount": 1, "period": "SOON"}, "SOON"),
        ("grant", {"feature": "calls", "customer": ""}, "/customer"),
        ("grant", {"feature": "calls", "config": {}}, '"config" is unsupported'),
        ("revoke", {"feature": "calls"}, "acme not found"),
        ("reset", {}, '"feature" is missing'),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_in_words_to_show(api, action, document, detail):
    answer = post(api, action, **document)

    assert 400 <= answer.status_code < 500
    assert detail in answer.json()["detail"]
    assert access(api)["rows"] == []


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_customers_stay_texts(api, hostile):
    assert post(api, "grant", customer=hostile, feature="calls").status_code == 201

    shown = row(api)

    assert (shown["customer"], shown["name"]) == (hostile, hostile)


def test_the_table_is_bounded_and_says_what_it_leaves_out(sandbox, api):
    for number in range(103):
        sandbox.grant(f"customer-{number}", "sso")

    shown = access(api)

    assert (len(shown["rows"]), shown["moreRows"]) == (100, 3)
    assert shown["rows"][-1]["customer"] == "customer-102"


def test_the_page_sets_when_usage_becomes_visible(sandbox, api):
    sandbox.grant("acme", "calls", 5)
    api.put("/sandbox/api/visibility", json={"visibleAfter": 60})
    api.ingest(event(subject="acme"))

    assert api.overview()["visibleAfter"] == 60
    assert row(api)["usage"] == 0
    for senseless in ({}, {"visibleAfter": -1}, {"visibleAfter": "1"}, []):
        answer = api.put("/sandbox/api/visibility", json=senseless)
        assert answer.status_code == 400
    assert sandbox.store.visible_after == 60


class Outline(HTMLParser):
    """Parser of the controls of a page and of their labels."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.unnamed: list[str] = []
        self.ids: set[str] = set()
        self.references: set[str] = set()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if "id" in attributes:
            self.ids.add(attributes["id"])
        for name in ("aria-labelledby", "list", "for"):
            if name in attributes:
                self.references.add(attributes[name])
        if tag in ("input", "select") and "label" not in self.open:
            self.unnamed.append(attributes.get("name", tag))
        if tag in ("label", "fieldset", "form"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("label", "fieldset", "form"):
            assert self.open.pop() == tag


def test_every_control_of_the_page_has_a_label(api):
    outline = Outline()
    outline.feed(api.get("/").text)

    assert outline.unnamed == []
    assert outline.references <= outline.ids
