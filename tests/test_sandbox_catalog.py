import pytest

from openmeter_wsgi.sandbox import Sandbox
from test_sandbox_support import Api

CUSTOMERS = "/api/v1/customers"
FEATURES = "/api/v1/features"
SUBJECTS = "/api/v1/subjects"


@pytest.fixture
def api():
    with Sandbox() as sandbox, Api(sandbox.url) as api:
        yield api


def test_a_customer_is_found_by_id_and_key(api):
    customer = api.post(CUSTOMERS, json={"name": "Acme", "key": "acme/1 ü"}).json()

    assert api.get(f"{CUSTOMERS}/{customer['id']}").json() == customer
    listed = api.get(CUSTOMERS, params={"key": "ACME"}).json()
    assert listed == {
        "totalCount": 1, "page": 1, "pageSize": 100, "items": [customer],
    }  # fmt: skip
    assert api.get(CUSTOMERS, params={"name": "other"}).json()["items"] == []


def test_customers_are_listed_by_parts_of_their_subject_keys(api):
    made = {}
    for key, subjects in (
        ("acme", []), ("one", ["acme"]), ("two", ["ACME"]), ("three", ["x", "acme2"]),
        ("other", ["nothing"]),
    ):  # fmt: skip
        customer = {"name": key, "key": key}
        if subjects:
            customer["usageAttribution"] = {"subjectKeys": subjects}
        made[key] = api.post(CUSTOMERS, json=customer).json()

    def listed(**parameters):
        found = api.get(CUSTOMERS, params=parameters).json()
        return found["totalCount"], [one["key"] for one in found["items"]]

    # A customer's own key is no subject key, although its events count.
    assert listed(subject="Acme") == (3, ["one", "two", "three"])
    assert listed(subject="acme", pageSize=2) == (3, ["one", "two"])
    assert listed(subject="acme", pageSize=2, page=2) == (3, ["three"])
    assert listed(subject="acme3") == (0, [])
    assert listed(subject="") == (5, list(made))


def test_a_customer_has_a_key_or_subjects_of_its_own(api):
    assert api.post(CUSTOMERS, json={"name": "A"}).status_code == 400
    subjects = {"usageAttribution": {"subjectKeys": ["s"]}}
    assert api.post(CUSTOMERS, json={"name": "A"} | subjects).status_code == 201
    assert api.post(CUSTOMERS, json={"name": "B"} | subjects).status_code == 409
    assert api.post(CUSTOMERS, json={"name": "C", "key": "s"}).status_code == 409


def test_an_unknown_customer_is_answered_in_openmeters_words(api):
    answer = api.get(f"{CUSTOMERS}/nobody")

    assert answer.status_code == 404
    assert answer.json()["detail"] == (
        "not found error: customer with id or key nobody not found in default namespace"
    )


def test_features_are_listed_bare_or_in_pages(api):
    api.meter("calls", "COUNT", groupBy={"route": "$.route"})
    feature = {"key": "api", "name": "API", "meterSlug": "calls"}
    created = api.post(
        FEATURES, json=feature | {"meterGroupByFilters": {"route": "/"}}
    ).json()

    assert api.get(FEATURES).json() == [created]
    assert api.get(FEATURES, params={"page": 1}).json()["items"] == [created]
    assert api.get(FEATURES, params={"meterSlug": "other"}).json() == []
    assert api.get(f"{FEATURES}/api").json() == created
    assert api.delete(f"{FEATURES}/api").status_code == 204


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"key": "Not-A-Key"}, 400),
        ({"meterSlug": "nothing"}, 404),
        ({"meterSlug": "average"}, 400),
        ({"meterGroupByFilters": {"x": "1"}, "meterSlug": "calls"}, 400),
    ],
)
def test_senseless_features_are_refused(api, changes, status):
    api.meter("calls", "COUNT")
    api.meter("average", "AVG", "$.n")

    answer = api.post(FEATURES, json={"key": "api", "name": "API"} | changes)

    assert answer.status_code == status


def test_subjects_are_created_and_changed_by_the_same_request(api):
    (first,) = api.post(SUBJECTS, json=[{"key": "a"}]).json()
    (second,) = api.post(SUBJECTS, json=[{"key": "a", "displayName": "A"}]).json()

    assert second["id"] == first["id"]
    assert api.get(SUBJECTS).json() == [second]
    assert api.get(f"{SUBJECTS}/a").json()["displayName"] == "A"
    assert api.delete(f"{SUBJECTS}/a").status_code == 204
    assert api.post(SUBJECTS, json={"key": "a"}).status_code == 400
