"""The official client, unchanged, against the sandbox."""

from datetime import UTC, datetime, timedelta

import pytest
from corehttp.exceptions import (
    HttpResponseError,
    ResourceExistsError,
    ResourceNotFoundError,
)
from openmeter import Client
from openmeter.models import (
    EntitlementBooleanCreateInputs,
    EntitlementGrantCreateInputV2,
    EntitlementMeteredV2CreateInputs,
    EntitlementStaticCreateInputs,
    Event,
    MeterCreate,
    RecurringPeriodCreateInput,
    ResetEntitlementUsageInput,
)

from openmeter_wsgi.sandbox import Sandbox


@pytest.fixture
def client():
    with Sandbox() as sandbox, Client(sandbox.url, token="any") as client:
        yield client


def event(number: int, **changes) -> Event:
    attributes = {
        "id": str(number),
        "source": "sdk",
        "specversion": "1.0",
        "type": "prompt",
        "subject": "customer",
        "time": datetime.now(UTC),
        "data": {"tokens": 10 * number},
    }
    return Event(**attributes | changes)


def meter(**changes) -> MeterCreate:
    attributes = {
        "slug": "tokens",
        "aggregation": "SUM",
        "event_type": "prompt",
        "value_property": "$.tokens",
    }
    return MeterCreate(**attributes | changes)


def create_meter(client, **changes):
    """Create a meter: OpenMeter answers 200, the client expects 201 and raises."""
    with pytest.raises(HttpResponseError) as answered:
        client.meters.create(meter(**changes))
    assert answered.value.status_code == 200
    return client.meters.get("tokens")


def test_the_official_client_ingests_lists_and_queries(client):
    created = create_meter(client, group_by={"model": "$.model"})
    client.events.ingest_event(event(1))
    client.events.ingest_events([event(2), event(3)])
    client.events.ingest_events_json([event(4)])

    assert created.slug == "tokens"
    assert [listed.id for listed in client.meters.list()] == [created.id]
    assert client.meters.get("tokens").event_type == "prompt"
    assert {listed.event.id for listed in client.events.list()} == set("1234")
    since = datetime.now(UTC) - timedelta(hours=1)
    listed = client.events.list(subject="customer", from_parameter=since, limit=2)
    assert [type(one.ingested_at) for one in listed] == [datetime, datetime]
    (row,) = client.meters.query_json("tokens", subject=["customer"]).data
    assert (row.value, row.subject) == (100, "customer")


def test_the_official_client_turns_the_pages_of_v2(client):
    client.events.ingest_events([event(number) for number in range(1, 8)])

    assert len(list(client.events_v2.list(limit=3))) == 7


def test_the_official_client_queries_windows_by_post(client):
    create_meter(client)
    client.events.ingest_event(event(5))

    result = client.meters.query("tokens", {"windowSize": "HOUR"})

    assert [row.value for row in result.data] == [50]
    assert result.window_size == "HOUR"


def test_the_official_client_sees_refusals_as_its_own_errors(client):
    create_meter(client)

    with pytest.raises(ResourceExistsError):
        client.meters.create(meter())
    with pytest.raises(HttpResponseError) as refused:
        client.events.ingest_event(event(1, subject=""))
    assert refused.value.status_code == 400
    assert "/subject" in refused.value.model.detail


def test_the_official_client_manages_customers_features_and_subjects(client):
    create_meter(client)
    customer = client.customers.create({"name": "Acme", "key": "acme"})
    feature = client.features.create(
        {"key": "tokens", "name": "Tokens", "meterSlug": "tokens"}
    )
    client.subjects.upsert([{"key": "acme"}])

    assert client.customers.get("acme").id == customer.id
    assert client.customers.list()["items"][0]["key"] == "acme"
    assert client.features.get(feature.id).meter_slug == "tokens"
    assert client.subjects.get("acme").key == "acme"
    client.features.delete("tokens")
    client.meters.delete("tokens")
    assert client.meters.list() == []


@pytest.fixture
def acme(client):
    """A customer with one entitlement of each kind."""
    create_meter(client)
    client.customers.create({"name": "Acme", "key": "acme"})
    client.subjects.upsert([{"key": "acme"}])
    for key in ("sso", "plan"):
        client.features.create({"key": key, "name": key})
    client.features.create({"key": "tokens", "name": "T", "meterSlug": "tokens"})
    # The models do not fill in their type, although it can only be one.
    boolean = EntitlementBooleanCreateInputs(type="boolean", feature_key="sso")
    static = EntitlementStaticCreateInputs(
        type="static", feature_key="plan", config='{"seats": 3}'
    )
    metered = EntitlementMeteredV2CreateInputs(
        type="metered",
        feature_key="tokens",
        usage_period=RecurringPeriodCreateInput(interval="MONTH"),
        issue_after_reset=100,
        is_soft_limit=False,
    )
    for entitlement in (boolean, static, metered):
        client.customer_entitlements_v2.post("acme", entitlement)
    client.events.ingest_event(event(3, subject="acme"))
    return client


def test_the_official_client_asks_for_the_value_of_an_entitlement(acme):
    # Version 2 leaves a denial out, which the client reads as None.
    v1, v2 = acme.customer_entitlement, acme.customer_entitlement_v2
    for values, denied in ((v1, False), (v2, None)):
        value = values.get_customer_entitlement_value("acme", "tokens")
        assert (value.has_access, value.balance, value.usage) == (True, 70, 30)
        assert (value.overage, value.total_available_grant_amount) == (0, 100)
        static = values.get_customer_entitlement_value("acme", "plan")
        assert (static.has_access, static.config) == (True, '{"seats": 3}')
        nothing = values.get_customer_entitlement_value("acme", "misspelt")
        assert (nothing.has_access, nothing.balance) == (denied, None)
        with pytest.raises(ResourceNotFoundError):
            values.get_customer_entitlement_value("nobody", "tokens")

    newest = acme.customer_entitlement_v2.get_customer_entitlement_value(
        "acme", "tokens"
    )
    assert list(newest.grant_balances.values()) == [70]


def test_the_official_client_asks_for_all_access_of_a_customer(acme):
    access = acme.customer.get_customer_access("acme").entitlements

    assert set(access) == {"sso", "plan", "tokens"}
    assert access["sso"].has_access is True
    assert access["tokens"].balance == 70


def test_the_official_client_reads_lists_grants_resets_and_deletes(acme):
    entitlements, one = acme.customer_entitlements_v2, acme.customer_entitlement_v2
    found = entitlements.get("acme", "tokens")
    assert found["isSoftLimit"] is False
    assert entitlements.list("acme").total_count == 3

    made = one.create_customer_entitlement_grant(
        "acme",
        "tokens",
        EntitlementGrantCreateInputV2(amount=5, effective_at=datetime.now(UTC)),
    )
    granted = one.get_grants("acme", "tokens")

    assert [grant.amount for grant in granted.items_property] == [100, 5]
    assert made.entitlement_id == found["id"]
    with pytest.raises(HttpResponseError) as refused:
        one.reset_customer_entitlement(
            "acme",
            "tokens",
            ResetEntitlementUsageInput(effective_at=datetime(2020, 1, 1, tzinfo=UTC)),
        )
    assert refused.value.status_code == 400
    entitlements.delete("acme", "tokens")
    value = one.get_customer_entitlement_value("acme", "tokens")
    assert value.has_access is None


def test_the_official_client_sees_a_deleted_customer(acme):
    id_ = acme.customers.get("acme").id
    for feature in ("sso", "plan", "tokens"):
        acme.customer_entitlements_v2.delete("acme", feature)
    acme.customers.delete("acme")

    with pytest.raises(HttpResponseError) as refused:
        acme.customer_entitlement.get_customer_entitlement_value(id_, "tokens")
    assert refused.value.status_code == 412
    with pytest.raises(ResourceNotFoundError):
        acme.customer.get_customer_access("acme")
