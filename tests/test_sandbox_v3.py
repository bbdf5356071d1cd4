"""Version 3 in the sandbox, beside the recorded answers of a real OpenMeter."""

import pytest

from openmeter_wsgi.sandbox import Sandbox
from recorded_v3 import BASE, RECORDINGS
from test_sandbox_support import Api, event

#: Members whose values each server makes up.
OWN = {"id", "created_at", "updated_at", "ingested_at", "stored_at", "instance",
       "customer", "first", "last", "next", "time"}  # fmt: skip


@pytest.fixture(scope="module")
def api():
    """A sandbox with the customers, meters and features of the recording."""
    with Sandbox() as sandbox, Api(sandbox.url) as api:
        for made in RECORDINGS["customer.list"].body["data"]:
            subjects = made.get("usage_attribution", {}).get("subject_keys", [])
            customer = {"name": made["name"], "key": made["key"]}
            if subjects:
                customer["usageAttribution"] = {"subjectKeys": subjects}
            api.post("/api/v1/customers", json=customer).raise_for_status()
        groups = {"region": "$.region", "plan": "$.plan"}
        api.meter("h_sum", "SUM", "$.n", eventType="h_req", groupBy=groups)
        api.meter("h_count", "COUNT", eventType="h_req", groupBy=groups)
        features = {"h_calls": {"meterSlug": "h_sum"}, "h_flag": {}}
        for key, feature in features.items():
            whole = {"key": key, "name": key, **feature}
            api.post("/api/v1/features", json=whole).raise_for_status()
        yield api


def without_own(value):
    if isinstance(value, dict):
        return {k: without_own(v) for k, v in value.items() if k not in OWN}
    if isinstance(value, list):
        return [without_own(one) for one in value]
    return value


@pytest.mark.parametrize("name", [
    "customer.list.key", "customer.list.subject", "customer.list.subject.partial",
    "customer.list.subject.unknown", "meter.list.key", "meter.list.key.oeq",
    "feature.list.key",
])  # fmt: skip
def test_a_filter_lists_what_the_recording_lists(api, name):
    recording = RECORDINGS[name]

    answer = api.get(recording.path)

    assert answer.status_code == recording.status
    assert without_own(answer.json()) == without_own(recording.body)


@pytest.mark.parametrize("name", [
    "events.page.101", "events.id.oeq.100", "query.by-key", "access.list.key",
    "access.list.unknown",
])  # fmt: skip
def test_what_is_refused_gets_the_recorded_status(api, name):
    recording = RECORDINGS[name]

    answer = api.request(recording.method, recording.path, json=recording.sent)

    assert answer.status_code == recording.status
    if name == "events.id.oeq.100":
        assert answer.json()["detail"] == recording.body["detail"]


def meter_id(api, key="h_sum"):
    (found,) = api.get(f"{BASE}/meters", params={"filter[key]": key}).json()["data"]
    return found["id"]


def test_a_meter_is_queried_as_the_recording_was(api):
    api.ingest([
        event(n, type="h_req", subject="h-used-sub", time=f"2026-11-29T00:3{n}:10Z",
              data={"n": n, "region": "eu"})
        for n in (1, 2)
    ])  # fmt: skip
    query = f"{BASE}/meters/{meter_id(api)}/query"

    whole = api.post(query, json=RECORDINGS["query.range"].sent).json()
    cut = api.post(query, json={"granularity": "PT1M", "group_by_dimensions":
                                ["region", "subject"]}).json()  # fmt: skip
    of_nobody = api.post(query, json=RECORDINGS["query.nothing"].sent).json()
    unknown = api.post(query, json=RECORDINGS["query.by.unknown"].sent)

    recorded = RECORDINGS["query.range"].body
    recorded["data"][0]["value"] = "3"
    assert whole == recorded
    assert cut["data"] == [
        {"from": f"2026-11-29T00:3{n}:00Z", "to": f"2026-11-29T00:3{n + 1}:00Z",
         "value": f"{n}", "dimensions": {"region": "eu", "subject": "h-used-sub"}}
        for n in (1, 2)
    ]  # fmt: skip
    assert of_nobody == RECORDINGS["query.nothing"].body
    assert unknown.status_code == 400
    (error,) = unknown.json()["extensions"]["validationErrors"]
    (said,) = RECORDINGS["query.by.unknown"].body["extensions"]["validationErrors"]
    assert (error["code"], error["value"]) == (said["code"], said["value"])


def test_events_are_listed_in_pages_newest_first(api):
    sent = [event(f"page-{n}", source="pages", type="h_req") for n in range(5)]
    api.ingest(sent)
    found, after = [], {}

    for _ in range(3):
        page = api.get(
            f"{BASE}/events",
            params={"filter[source]": "pages", "page[size]": 2, **after},
        ).json()
        found += [one["event"]["id"] for one in page["data"]]
        after = {"page[after]": page["meta"]["page"]["next"]}

    assert sorted(found) == [one["id"] for one in sent]
    assert after == {"page[after]": None}


def test_an_event_that_a_meter_cannot_use_says_why(api):
    api.ingest([event("flawed", type="h_req", data={}), event("other", type="h_x")])

    def errors(id_):
        listed = api.get(f"{BASE}/events", params={"filter[id]": f"event-{id_}"}).json()
        return [one["message"] for one in listed["data"][0]["validation_errors"]]

    assert 'invalid event: missing value property: "$.n"' in errors("flawed")
    assert "no meter found for event type: h_x" in errors("other")


@pytest.mark.parametrize("path", ["/events?filter[time]=x", "/meters?filter[slug]=a",
                                  "/customers?filter[key][neq]=a"])  # fmt: skip
def test_a_filter_that_is_not_offered_is_never_ignored(api, path):
    assert api.get(BASE + path).status_code == 501
