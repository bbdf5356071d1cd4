import json
import time
from datetime import UTC, datetime, timedelta

import pytest

from openmeter_wsgi.sandbox import Sandbox
from test_sandbox_support import Api, event


def at(**later) -> str:
    moment = datetime.now(UTC) + timedelta(**later)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def as_moments(parameters):
    """Replace each timedelta by the time that much later than now."""
    return {
        name: at(seconds=value.total_seconds()) if isinstance(value, timedelta)
        else value for name, value in parameters.items()
    }  # fmt: skip


def ids(listed) -> list[str]:
    return [item["event"]["id"].removeprefix("event-") for item in listed]


def test_events_are_listed_as_they_survive(api):
    moment = at(minutes=-1)
    before = time.time() - 1  # of which only whole seconds are told
    api.ingest(event(source="my api", time=moment, plan="gold", dataschema="x"))

    (listed,) = api.events()

    assert listed["event"] == {
        "specversion": "1.0",
        "id": "event-1",
        "source": "my%20api",
        "type": "call",
        "subject": "customer",
        "time": moment,
        "datacontenttype": "application/json",
        "data": {"value": "100"},
    }
    arrived = datetime.fromisoformat(listed["ingestedAt"]).timestamp()
    assert before <= arrived <= time.time()


def test_the_newest_event_is_listed_first(api):
    api.ingest([event(n, time=at(minutes=-n)) for n in (3, 1, 2)])

    assert ids(api.events()) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ({"id": "event-1"}, ["1", "10"]),
        ({"subject": "a"}, ["1"]),
        ({"subject": "customer"}, ["2"]),
        ({"from": timedelta(minutes=-15)}, ["1", "2", "10"]),
        ({"from": timedelta(minutes=-15), "to": timedelta(minutes=-5)}, ["10"]),
        ({"limit": 1}, ["1"]),
        ({"ingestedAtFrom": timedelta(minutes=5)}, []),
        ({"ingestedAtTo": timedelta(minutes=5)}, ["1", "2", "10"]),
    ],
)
def test_events_are_filtered(api, parameters, found):
    api.ingest(
        [
            event(1, subject="a", time=at(minutes=-1)),
            event(2, time=at(minutes=-2)),
            event(10, subject="ab", time=at(minutes=-10)),
            event(99, time=at(days=-40)),
        ]
    )

    assert ids(api.events(**as_moments(parameters))) == found


@pytest.mark.parametrize(
    "parameters",
    [
        {"limit": 0},
        {"limit": 101},
        {"limit": "many"},
        {"from": "yesterday"},
        {"from": timedelta(days=-33)},
        {"from": timedelta(days=-1), "to": timedelta(days=-2)},
        {"customerId": "nobody"},
    ],
)
def test_senseless_listings_are_refused(api, parameters):
    answer = api.get("/api/v1/events", params=as_moments(parameters))

    assert answer.status_code in (400, 404)


def test_listed_events_say_what_is_wrong_with_them(api):
    api.meter("sum", "SUM", "$.n")
    api.meter("max", "MAX", "$.m")
    api.post("/api/v1/customers", json={"name": "A", "key": "a"})
    api.ingest(
        [
            event(1, subject="a", data={"n": 1, "m": 1}, time=at(minutes=-1)),
            event(2, subject="a", data={"m": "x"}, time=at(minutes=-2)),
            event(3, type="else", time=at(minutes=-3)),
        ]
    )

    fine, flawed, unknown = api.events()

    assert "validationError" not in fine
    assert fine["customerId"] == flawed["customerId"]
    assert flawed["validationError"] == (
        "invalid event: value cannot be parsed as float64: x\n"
        'invalid event: missing value property: "$.n"'
    )
    assert unknown["validationError"] == (
        "no meter found for event type: else\n"
        "no customer found for event subject: customer"
    )


def test_a_meter_that_is_created_later_counts_earlier_events(api):
    api.ingest(event())
    assert "no meter found" in api.events()[0]["validationError"]

    api.meter("calls", "COUNT")

    assert api.value("calls") == 1
    assert "no meter found" not in api.events()[0]["validationError"]


def test_pages_of_v2_hold_every_event_once(api):
    api.ingest([event(n, time=at(minutes=-n // 3)) for n in range(25)])
    seen, cursor = [], None

    while True:
        parameters = {"limit": 10} | ({"cursor": cursor} if cursor else {})
        body = api.get("/api/v2/events", params=parameters).json()
        seen += ids(body["items"])
        cursor = body.get("nextCursor")
        if cursor is None:
            break

    assert len(seen) == len(set(seen)) == 25


def test_v2_filters_by_attributes(api):
    api.ingest([event(n, subject=subject) for n, subject in enumerate("abc")])

    def found(condition):
        parameters = {"filter": json.dumps({"subject": condition})}
        return sorted(ids(api.get("/api/v2/events", params=parameters).json()["items"]))

    assert found({"$eq": "a"}) == ["0"]
    assert found({"$in": ["a", "c"]}) == ["0", "2"]
    assert found({"$ne": "a"}) == ["1", "2"]


@pytest.mark.parametrize(
    "parameters",
    [{"cursor": "!"}, {"filter": "["}, {"filter": "[]"},
     {"filter": '{"time": {"$eq": 1}}'}, {"filter": '{"subject": 1}'},
     {"filter": '{"subject": {"$in": 1}}'},
     {"filter": '{"subject": {"$eq": "a", "$ne": "b"}}'},
     {"filter": '{"subject": ' + '{"$or": [' * 100 + ']}' * 100 + '}'}],
    ids=str,
)  # fmt: skip
def test_senseless_pages_are_refused(api, parameters):
    assert api.get("/api/v2/events", params=parameters).status_code == 400


def test_a_database_keeps_everything_for_the_next_run(tmp_path):
    database = tmp_path / "usage.sqlite"
    for run in range(2):
        with Sandbox(database=database) as sandbox, Api(sandbox.url) as api:
            if run == 0:
                api.meter("calls", "COUNT")
            api.ingest([event(1), event(f"run-{run}")])
            value = api.value("calls")

    assert value == 3
