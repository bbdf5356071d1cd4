"""The page's list of received events, and the trace of one event."""

import base64
import json

import pytest

from openmeter_wsgi.sandbox import Sandbox, store
from test_sandbox_page import HOSTILE, OLD
from test_sandbox_support import Api, event


def listed(api, **parameters):
    answer = api.get("/sandbox/api/arrivals", params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def arrivals(api, **parameters):
    return listed(api, **parameters)["arrivals"]


def ids(api, **parameters):
    return [arrival["id"] for arrival in arrivals(api, **parameters)]


def trace(api, id_, *, newest=False):
    found = [a["seq"] for a in arrivals(api) if a["id"] == id_]
    answer = api.get(f"/sandbox/api/arrivals/{found[0 if newest else -1]}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def outcomes(told):
    return [arrival["outcome"] for arrival in told["arrivals"]]


def test_what_arrives_is_listed_with_what_became_of_it(api):
    api.ingest([event(1), event(1), event(2, time="1970-01-01T00:00:00Z")])

    found = listed(api)

    assert found["matches"] == 3
    assert {(a["id"], a["outcome"]) for a in found["arrivals"]} == {
        ("event-1", "stored"), ("event-1", "duplicate"), ("event-2", "dropped"),
    }  # fmt: skip
    newest = found["arrivals"][0]["seq"]
    assert ids(api, after=newest) == []
    api.ingest(event(3))
    assert ids(api, after=newest) == ["event-3"]


@pytest.mark.parametrize(
    "kind", ["application/cloudevents-batch+json", "application/json"]
)
@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ({"subject": ""}, "minimum string length is 1"),
        ({"specversion": "7"}, "specversion: unknown value: 7"),
    ],
    ids=str,
)
def test_a_refused_batch_names_the_event_that_is_to_blame(api, kind, flaw, reason):
    batch = [event(1), event(2, **flaw), event(3)]

    assert api.ingest(batch, kind).status_code == 400

    found = {arrival["id"]: arrival for arrival in arrivals(api, outcome="refused")}
    assert {(a["position"], a["batch"]) for a in found.values()} == {
        (1, 3), (2, 3), (3, 3),
    }  # fmt: skip
    assert found["event-2"]["reason"].startswith("answered 400: ")
    assert reason in found["event-2"]["reason"]
    for other in ("event-1", "event-3"):
        told = found[other]["reason"]
        assert told.startswith("refused together with event 2 of its batch: ")
        assert reason in told


@pytest.mark.parametrize(
    ("body", "data"),
    [
        (b"nonsense", "nonsense"),
        (b"\xff", "\ufffd"),
        (b"[]", None),
        (b"[" * 100_000, "[" * store.MAX_DATA),
        (b'"\\ud800"', "?"),
        (b"[null, 1]", None),
    ],
    ids=["text", "bytes", "empty", "deep", "surrogate", "no events"],
)
def test_bodies_that_hold_no_events_are_listed_as_they_are(api, body, data):
    assert api.ingest(body, "application/json").status_code == 400

    oldest = arrivals(api)[-1]

    assert (oldest["outcome"], oldest["id"]) == ("refused", None)
    whole = api.get(f"/sandbox/api/arrivals/{oldest['seq']}").json()
    assert whole["event"]["data"] == data
    assert whole["meters"] == []


def test_attributes_of_what_is_refused_are_shown_whatever_they_are(api):
    api.ingest(event(1, id=7, subject=["a"], time="yesterday", data="x" * 20_000))

    (arrival,) = arrivals(api)

    shown = (arrival["id"], arrival["subject"], arrival["time"])
    assert shown == ("7", '["a"]', "yesterday")
    assert len(arrival["data"]) == 300


def test_events_before_one_that_is_no_json_are_stored_and_the_rest_is_explained(api):
    encoded = base64.b64encode(b"{").decode()
    kind = {"datacontenttype": "application/json", "data_base64": encoded}
    broken = event(2, data=..., **kind)

    assert api.ingest([event(1), broken, event(3)]).status_code == 500

    assert outcomes(trace(api, "event-1")) == ["stored", "failed"]
    assert "no JSON" in trace(api, "event-2")["event"]["reason"]
    assert "event 2 of its batch" in trace(api, "event-3")["event"]["reason"]


def test_a_trace_tells_every_arrival_and_every_meter(sandbox, api):
    api.meter("calls", "COUNT", groupBy={"region": "$.region", "plan": "$.plan"})
    api.meter("tokens", "SUM", "$.tokens")
    api.meter("words", "SUM", "$.words")
    api.meter("late", "COUNT", eventFrom="2199-01-01T00:00:00Z")
    api.meter("images", "COUNT", eventType="image")
    sandbox.grant("acme", "calls", 5)
    sandbox.faults.ingest.set(outage=True)
    one = event(1, subject="acme", data={"tokens": "7.5", "region": "eu"})
    assert api.ingest(one).status_code == 503
    sandbox.faults.clear()
    api.ingest(one)
    api.ingest([event(2), one])

    told = trace(api, "event-1")
    stored = api.get(f"/sandbox/api/arrivals/{told['arrivals'][1]['seq']}").json()

    assert outcomes(told) == ["failed", "stored", "duplicate"]
    assert told["arrivals"][2]["position"] == 2
    assert told["arrivals"][0]["reason"] == (
        "answered 503: the service is unavailable, on purpose"
    )
    assert (stored["customer"], stored["visible"]) == ("acme", True)
    verdicts = {meter["slug"]: meter for meter in stored["meters"]}
    assert (verdicts["calls"]["value"], verdicts["tokens"]["value"]) == (1, 7.5)
    assert verdicts["calls"]["groupBy"] == {"region": "eu", "plan": ""}
    assert {slug: verdicts[slug]["why"] for slug in ("words", "late", "images")} == {
        "words": 'invalid event: missing value property: "$.words"',
        "late": "counts events from 2199-01-01T00:00:00Z on",
        "images": "counts events of type image",
    }


@pytest.mark.parametrize(
    ("aggregation", "value"),
    [("MIN", 4), ("MAX", 4), ("AVG", 4), ("LATEST", 4), ("UNIQUE_COUNT", 1)],
)
def test_a_trace_tells_what_one_event_adds_to_any_kind_of_meter(
    api, aggregation, value
):
    api.meter("any", aggregation, "$.n")
    api.ingest([event(1, data={"n": 4}), event(2, data={"n": 9})])

    (verdict,) = trace(api, "event-1")["meters"]

    assert (verdict["counted"], verdict["value"]) == (True, value)


def test_a_trace_knows_events_by_what_openmeter_joins_to_a_key(api):
    api.ingest(event(id="b-c", source="a"))
    api.ingest(event(id="c", source="a-b"))

    assert outcomes(trace(api, "c")) == ["stored", "duplicate"]


def test_without_deduplication_every_arrival_is_stored():
    with Sandbox(dedupe=False) as sandbox, Api(sandbox.url) as api:
        api.ingest([event(1), event(1)])

        told = trace(api, "event-1")

    assert (outcomes(told), told["dedupe"]) == (["stored", "stored"], False)


def test_a_trace_says_that_usage_is_not_visible_yet():
    with Sandbox(visible_after=60) as sandbox, Api(sandbox.url) as api:
        api.meter("calls", "COUNT")
        api.ingest(event())

        assert trace(api, "event-1")["visible"] is False


def test_a_trace_of_nothing_is_not_found(api):
    for seq in (1, 2**70):
        answer = api.get(f"/sandbox/api/arrivals/{seq}")
        assert answer.status_code == 404
        assert "does not exist" in answer.json()["detail"]


def test_words_are_searched_in_id_type_subject_source_and_data(api):
    api.ingest(
        [
            event(1, subject="Acme", data={"path": "/50%_off"}),
            event(2, type="image", source="svc", data={"path": "/50_x", "u": "ü"}),
            event(3, subject="", id="bad"),
        ]
    )
    assert ids(api) == ["bad", "event-2", "event-1"]
    api.ingest([event(4, subject="acme"), event(5, type="image", source="svc")])

    assert ids(api, search="acme event-1") == ["event-1"]
    assert ids(api, search="ACME", outcome="stored") == ["event-4"]
    assert ids(api, search="svc", outcome="stored") == ["event-5"]
    assert ids(api, search="50%_") == ["event-1"]
    assert ids(api, search="ü") == ["event-2"]
    assert ids(api, search="\\") == []
    assert ids(api, type="image", outcome="refused") == ["event-2"]
    assert ids(api, subject="acme") == ["event-4"]


def test_what_no_meter_counts_can_be_listed(api):
    api.meter("sum", "SUM", "$.n")
    api.meter("names", "UNIQUE_COUNT", "$.name.full", eventType="name")
    api.meter("since", "COUNT", eventType="since", eventFrom="2025-01-01T00:00:00Z")
    api.ingest(
        [
            event("counted", data={"n": "1"}),
            event("no number", data={"n": "x"}),
            event("name", type="name", data={"name": {"full": "x"}}),
            event("null", type="name", data={"name": {"full": None}}),
            event("old", type="since", time=OLD),
            event("new", type="since"),
            event("unknown", type="unknown"),
            event("no data", data=...),
        ]
    )

    assert ids(api, outcome="uncounted") == [
        "event-no data", "event-unknown", "event-old", "event-null", "event-no number",
    ]  # fmt: skip


def test_the_list_says_what_is_wrong_and_which_names_there_are(api):
    api.meter("sum", "SUM", "$.n")
    api.ingest([event(1, data={}), event(2, type="image", subject="other")])

    found = listed(api)

    assert [arrival["flaws"] for arrival in found["arrivals"]] == [
        ["no meter found for event type: image"],
        ['invalid event: missing value property: "$.n"'],
    ]
    assert (found["types"], found["meters"]) == (["call", "image"], ["sum"])
    assert found["subjects"] == ["customer", "other"]


@pytest.mark.parametrize(
    "parameters",
    [{"outcome": "lost"}, {"after": "-1"}, {"limit": 0}, {"limit": 1001}],
    ids=str,
)
def test_senseless_searches_are_refused(api, parameters):
    answer = api.get("/sandbox/api/arrivals", params=parameters)

    assert answer.status_code == 400


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_texts_are_listed_as_texts(api, hostile):
    api.ingest(
        event(subject=hostile, type=hostile, id=hostile, data={hostile: hostile})
    )
    api.ingest(event(specversion=hostile, id=hostile))

    refused, stored = arrivals(api, search=hostile.split()[0])

    assert (stored["id"], stored["subject"], stored["type"]) == (hostile,) * 3
    assert json.loads(stored["data"]) == {hostile: hostile}
    assert hostile in refused["reason"]


def test_what_is_kept_of_events_that_were_not_stored_is_bounded(api, monkeypatch):
    monkeypatch.setattr(store, "KEPT", 5)
    monkeypatch.setattr(store, "KEPT_OF_REQUEST", 3)
    for number in range(4):
        api.ingest([event(number, id=f"{number}.{n}") for n in range(4)]
                   + [event(id=f"{number}.bad", subject="")])  # fmt: skip

    assert ids(api) == ["3.bad", "3.2", "3.1", "3.0", "2.bad"]


def test_arrivals_of_earlier_runs_stay_in_a_database(tmp_path):
    path = tmp_path / "sandbox.sqlite"
    with Sandbox(database=path) as sandbox, Api(sandbox.url) as api:
        api.ingest([event(1), event(1)])
    with Sandbox(database=path) as sandbox, Api(sandbox.url) as api:
        api.ingest([event(1), event(2)])

        assert outcomes(trace(api, "event-1")) == ["stored", "duplicate", "duplicate"]
        assert sorted(a["seq"] for a in arrivals(api)) == [1, 2, 3, 4]
