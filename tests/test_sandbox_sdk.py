"""The official client, unchanged, against the sandbox."""

from datetime import UTC, datetime, timedelta

import pytest
from corehttp.exceptions import HttpResponseError, ResourceExistsError
from openmeter import Client
from openmeter.models import Event, MeterCreate

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


def test_the_official_client_ingests_lists_and_queries(client):
    created = client.meters.create(meter(group_by={"model": "$.model"}))
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
    client.meters.create(meter())
    client.events.ingest_event(event(5))

    result = client.meters.query("tokens", {"windowSize": "HOUR"})

    assert [row.value for row in result.data] == [50]
    assert result.window_size == "HOUR"


def test_the_official_client_sees_refusals_as_its_own_errors(client):
    client.meters.create(meter())

    with pytest.raises(ResourceExistsError):
        client.meters.create(meter())
    with pytest.raises(HttpResponseError) as refused:
        client.events.ingest_event(event(1, subject=""))
    assert refused.value.status_code == 400
    assert "/subject" in refused.value.model.detail


def test_the_official_client_manages_customers_features_and_subjects(client):
    client.meters.create(meter())
    customer = client.customers.create({"name": "Acme", "key": "acme"})
    feature = client.features.create(
        {"key": "tokens", "name": "Tokens", "meterSlug": "tokens"}
    )
    client.subjects.upsert([{"key": "acme"}])

    assert client.customers.get("acme").id == customer.id
    assert client.customers.list()["items"][0]["key"] == "acme"
    assert client.features.get(feature.id).meter_slug == "tokens"
    assert client.subjects.get("acme").key == "acme"
    client.meters.delete("tokens")
    assert client.meters.list() == []
