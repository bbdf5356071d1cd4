from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from openmeter_wsgi.sandbox import Sandbox
from openmeter_wsgi.sandbox.usage import window_end, window_start
from test_sandbox_support import Api, event

HOUR = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


@pytest.fixture
def api():
    with Sandbox() as sandbox, Api(sandbox.url) as api:
        yield api


def at(**later) -> str:
    return (HOUR + timedelta(**later)).isoformat().replace("+00:00", "Z")


def test_a_created_meter_is_returned_listed_and_found_by_slug_and_id(api):
    meter = api.meter("tokens_total", "SUM", "$.tokens", groupBy={"model": "$.model"})

    assert meter["name"] == "tokens_total"
    assert len(meter["id"]) == 26
    assert api.get("/api/v1/meters").json() == [meter]
    assert api.get("/api/v1/meters/tokens_total").json() == meter
    assert api.get(f"/api/v1/meters/{meter['id']}").json() == meter


def test_a_deleted_meter_is_gone_and_its_slug_is_free(api):
    api.meter("calls", "COUNT")

    assert api.delete("/api/v1/meters/calls").status_code == 204
    assert api.get("/api/v1/meters/calls").status_code == 404
    assert api.delete("/api/v1/meters/calls").status_code == 404
    api.meter("calls", "COUNT")


def test_a_slug_that_exists_is_a_conflict(api):
    api.meter("calls", "COUNT")

    answer = api.post(
        "/api/v1/meters",
        json={"slug": "calls", "aggregation": "COUNT", "eventType": "other"},
    )

    assert answer.status_code == 409


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"slug": "Has-Hyphen"}, "regular expression"),
        ({"slug": "x" * 65}, "maximum string length is 64"),
        ({"aggregation": "MEDIAN"}, "not one of the allowed values"),
        ({"eventType": ""}, "minimum string length is 1"),
        ({"aggregation": "COUNT"}, "not allowed when the aggregation is count"),
        ({"valueProperty": "tokens"}, "invalid JSONPath"),
        ({"valueProperty": "$.[["}, "invalid JSONPath"),
        ({"groupBy": {"a-b": "$.x"}}, "a-b is invalid"),
        ({"groupBy": {"a": "x"}}, "invalid JSONPath for a group by"),
        ({"groupBy": {"a": "$.tokens"}}, "cannot be the same as value property"),
        ({"groupBy": {"a": '$.x"]'}}, "invalid JSONPath for a group by"),
        ({"eventFrom": "yesterday"}, "date-time"),
    ],
    ids=str,
)
def test_senseless_meters_are_refused(api, changes, reason):
    definition = {
        "slug": "tokens",
        "aggregation": "SUM",
        "eventType": "call",
        "valueProperty": "$.tokens",
    }

    answer = api.post("/api/v1/meters", json=definition | changes)

    assert answer.status_code == 400
    assert reason in answer.json()["detail"]


def test_only_count_needs_no_value_property(api):
    answer = api.post(
        "/api/v1/meters", json={"slug": "a", "aggregation": "SUM", "eventType": "call"}
    )

    assert answer.status_code == 400
    assert "is required when the aggregation is not count" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("aggregation", "value"),
    [
        ("SUM", 10),
        ("COUNT", 4),
        ("UNIQUE_COUNT", 3),
        ("AVG", 2.5),
        ("MIN", 1),
        ("MAX", 4),
        ("LATEST", 3.5),
    ],
)
def test_aggregation(api, aggregation, value):
    api.meter("m", aggregation, None if aggregation == "COUNT" else "$.n")
    amounts = [(4, 1), ("1.5", 3), (1, 2), (3.5, 9)]
    if aggregation == "UNIQUE_COUNT":
        amounts = [(1, 1), (1, 2), (2, 3), ("x", 4)]
    api.ingest(
        [
            event(n, data={"n": amount}, time=at(minutes=-minute))
            for minute, (amount, n) in zip((4, 3, 2, 1), amounts, strict=True)
        ]
    )

    assert api.value("m") == value


@pytest.mark.parametrize(
    ("data", "flaw"),
    [
        (None, "null and missing value property"),
        ({}, 'missing value property: "$.a.b"'),
        ({"a": 1}, 'missing value property: "$.a.b"'),
        ({"a": {"b": None}}, "value cannot be null"),
        ({"a": {"b": True}}, "unsupported value property type: bool"),
        ({"a": {"b": {}}}, "unsupported value property type: map[string]interface {}"),
        ({"a": {"b": [1]}}, "unsupported value property type: []interface {}"),
        ({"a": {"b": "x"}}, "value cannot be parsed as float64: x"),
        ({"a": {"b": "0x10"}}, "value cannot be parsed as float64: 0x10"),
        ({"a": {"b": " 1"}}, "value cannot be parsed as float64:  1"),
        ({"a": {"b": ""}}, "value cannot be parsed as float64: "),
        ({"a": {"b": "NaN"}}, "value cannot be NaN"),
        ({"a": {"b": "-Inf"}}, "value cannot be infinity"),
    ],
    ids=str,
)
def test_events_without_a_usable_number_are_stored_and_not_counted(api, data, flaw):
    api.meter("m", "SUM", "$.a.b")

    api.ingest([event(1, data={"a": {"b": "7.5e1"}}), event(2, data=data)])

    assert api.value("m") == 75
    second, first = (listed["validationError"] for listed in api.events())
    assert "invalid event" not in first
    assert second.splitlines()[0] == f"invalid event: {flaw}"
    assert api.overview()["meters"][0]["unusable"] == 1


def test_a_meter_without_any_usable_number_has_no_rows(api):
    api.meter("m", "SUM", "$.n")
    api.ingest(event(data={"n": "x"}))

    assert api.rows("m") == []


def test_unique_count_counts_the_missing_once_and_null_never(api):
    api.meter("m", "UNIQUE_COUNT", "$.n.x")
    found = ["a", "a", 1, "1", None]
    values = [*({"n": {"x": value}} for value in found), {}, {}]

    api.ingest([event(n, data=data) for n, data in enumerate(values)])

    assert api.value("m") == 3


def test_rows_are_grouped_by_what_is_asked_for(api):
    groups = {"model": "$.model", "first": "$.tags[0]", "odd": "$['a b']"}
    api.meter("m", "SUM", "$.n", groupBy=groups)
    api.ingest(
        [
            event(1, subject="a", data={"n": 1, "model": "x", "tags": ["t"]}),
            event(2, subject="b", data={"n": 2, "model": "x", "a b": True}),
            event(3, subject="a", data={"n": 4}),
        ]
    )

    def totals(**query):
        rows = api.rows("m", **query)
        return {
            (row["subject"], *row["groupBy"].values()): row["value"] for row in rows
        }

    assert totals() == {(None,): 7}
    assert totals(groupBy="subject") == {("a",): 5, ("b",): 2}
    assert totals(groupBy="model") == {(None, "x"): 3, (None, ""): 4}
    assert totals(groupBy=["subject", "first"]) == {
        ("a", "t"): 1, ("a", ""): 4, ("b", ""): 2,
    }  # fmt: skip
    assert totals(groupBy="odd") == {(None, "true"): 2, (None, ""): 5}


def test_naming_a_subject_also_groups_by_it(api):
    api.meter("m", "COUNT")
    api.ingest([event(n, subject=subject) for n, subject in enumerate("aabc")])

    rows = api.rows("m", subject=["a", "b"])

    assert {row["subject"]: row["value"] for row in rows} == {"a": 2, "b": 1}


def test_rows_can_be_filtered_by_a_group(api):
    api.meter("m", "COUNT", groupBy={"model": "$.model"})
    api.ingest([event(n, data={"model": model}) for n, model in enumerate("xxy")])

    posted = api.post(
        "/api/v1/meters/m/query", json={"filterGroupBy": {"model": ["x", "z"]}}
    )

    assert api.value("m", **{"filterGroupBy[model]": "y"}) == 1
    assert posted.json()["data"][0]["value"] == 2


def test_rows_can_be_filtered_by_customer(api):
    api.meter("m", "COUNT")
    customer = api.post(
        "/api/v1/customers",
        json={"name": "A", "key": "a", "usageAttribution": {"subjectKeys": ["b"]}},
    ).json()
    api.ingest([event(n, subject=subject) for n, subject in enumerate("aabc")])

    assert api.value("m", filterCustomerId=customer["id"]) == 3


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ({"groupBy": "nothing"}, "validation error: invalid group by: nothing"),
        ({"filterGroupBy[x]": "1"}, "validation error: invalid group by filter: x"),
        (
            {"windowSize": "WEEK"},
            'parameter "windowSize" in query has an error: value is not one of the '
            'allowed values ["MINUTE","HOUR","DAY","MONTH"]',
        ),
        (
            {"windowTimeZone": "Mars/Base"},
            "validation error: invalid time zone: unknown time zone Mars/Base",
        ),
        (
            {"windowTimeZone": "../../etc/passwd"},
            "validation error: invalid time zone: unknown time zone ../../etc/passwd",
        ),
        (
            {"from": "2026-01-02T00:00:00Z", "to": "2026-01-01T00:00:00Z"},
            "validation error: from must be before to",
        ),
        (
            {"from": "yesterday"},
            "invalid param format from: Invalid format for parameter from: error "
            "parsing 'yesterday' as RFC3339 or 2006-01-02 time: parsing time "
            '"yesterday" as "2006-01-02": cannot parse "yesterday" as "2006"',
        ),
    ],
    ids=str,
)
def test_senseless_queries_are_refused(api, query, detail):
    api.meter("m", "COUNT")

    answer = api.get("/api/v1/meters/m/query", params=query)

    assert (answer.status_code, answer.json()["detail"]) == (400, detail)


def test_a_path_that_the_sandbox_cannot_read_is_not_offered(api):
    definition = {"slug": "m", "aggregation": "SUM", "eventType": "call"}

    answer = api.post("/api/v1/meters", json=definition | {"valueProperty": "$..n"})

    assert answer.status_code == 501
    assert "cannot read the JSON path $..n" in answer.json()["detail"]


def test_a_meter_that_does_not_exist_cannot_be_queried(api):
    assert api.get("/api/v1/meters/nothing/query").status_code == 404


def test_from_is_inclusive_and_to_is_not(api):
    api.meter("m", "COUNT")
    api.ingest([event(n, time=at(minutes=n - 10)) for n in range(5)])

    result = api.get(
        "/api/v1/meters/m/query",
        params={"from": at(minutes=-9), "to": at(minutes=-7)},
    ).json()

    assert (result["from"], result["to"]) == (at(minutes=-9), at(minutes=-7))
    assert result["data"] == [
        {
            "value": 2,
            "windowStart": at(minutes=-9),
            "windowEnd": at(minutes=-7),
            "subject": None,
            "groupBy": {},
        }
    ]


def test_without_a_period_a_row_spans_the_minutes_that_hold_events(api):
    api.meter("m", "COUNT")
    api.ingest([event(1, time=at(minutes=-9)), event(2, time=at(minutes=-7.5))])

    (row,) = api.rows("m")

    assert (row["windowStart"], row["windowEnd"]) == (at(minutes=-9), at(minutes=-7))


def test_windows_without_events_have_no_row(api):
    api.meter("m", "COUNT")
    api.ingest([event(n, time=at(minutes=-m)) for n, m in enumerate((90, 5, 4.5, 1))])

    minutes = api.rows("m", windowSize="MINUTE")
    hours = api.rows("m", windowSize="HOUR")

    assert [row["value"] for row in minutes] == [1, 2, 1]
    assert [(row["windowStart"], row["value"]) for row in hours] == [
        (at(hours=-2), 1),
        (at(hours=-1), 3),
    ]


def test_event_from_hides_older_events(api):
    api.meter("m", "COUNT", eventFrom=at(minutes=-5))
    api.ingest([event(n, time=at(minutes=-n)) for n in range(1, 9)])

    assert api.value("m") == 5
    assert api.value("m", **{"from": at(minutes=-100)}) == 5
    assert api.overview()["meters"][0]["events"] == 5


@pytest.mark.parametrize(
    ("local", "size", "start", "end"),
    [
        ("2026-03-29T01:30", "HOUR", "2026-03-29T01:00", "2026-03-29T03:00"),
        ("2026-03-29T15:00", "DAY", "2026-03-29T00:00", "2026-03-30T00:00"),
        ("2026-10-25T15:00", "DAY", "2026-10-25T00:00", "2026-10-26T00:00"),
        ("2026-03-31T23:59", "MONTH", "2026-03-01T00:00", "2026-04-01T00:00"),
        ("2026-12-31T23:59", "MONTH", "2026-12-01T00:00", "2027-01-01T00:00"),
    ],
)
def test_windows_follow_the_clock_of_their_time_zone(local, size, start, end):
    zone = ZoneInfo("Europe/Berlin")
    moment, first, last = (
        int(datetime.fromisoformat(text).replace(tzinfo=zone).timestamp())
        for text in (local, start, end)
    )

    begun = window_start(moment, size, zone.key)

    assert (begun, window_end(begun, size, zone.key)) == (first, last)


def test_windows_of_zones_with_odd_offsets_are_whole_local_hours():
    moment = int(datetime(2026, 1, 1, 12, 10, tzinfo=UTC).timestamp())

    begun = window_start(moment, "HOUR", "Asia/Kathmandu")

    assert datetime.fromtimestamp(begun, ZoneInfo("Asia/Kathmandu")).minute == 0
    assert 0 <= moment - begun < 3600
