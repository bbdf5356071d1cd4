"""The lists of version 3, by the recorded answers of a real OpenMeter."""

import json
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmeter_server import Answer
from openmeter_wsgi.cli.api_client import NoAnswer, UsageQuery
from openmeter_wsgi.cli.api_client_v3 import ListingV3, _chunks
from openmeter_wsgi.options import ApiKey
from recorded import document
from recorded_v3 import BASE, RECORDINGS, with_brackets

NO_KEY = ApiKey.from_options(None, None)
RANGE = {"since": "2026-11-28T22:00:00Z", "until": "2026-11-29T00:39:00Z"}


@pytest.fixture
def listing(openmeter):
    with ListingV3(openmeter.url, NO_KEY, 40) as listing:
        yield listing


# -- Usage

QUERIES = {
    "query.range": UsageQuery(**RANGE),
    "query.gran.PT1H": UsageQuery(**RANGE, window="HOUR"),
    "query.tz": UsageQuery(**RANGE, window="DAY", zone="Europe/Budapest"),
    "query.by.subject": UsageQuery(**RANGE, group_by=("subject",)),
    "query.by.region": UsageQuery(group_by=("region", "plan")),
    "query.empty": UsageQuery(),
    "query.f.subject.in": UsageQuery(subjects=("h-used-sub", "h-soft-sub")),
    "query.f.region.in": UsageQuery(filters=(("region", "eu"), ("region", "us"))),
}


@pytest.mark.parametrize("name", QUERIES)
def test_each_query_is_put_and_read_as_openmeter_means_it(openmeter, listing, name):
    sent = RECORDINGS[name].sent or {}
    key = RECORDINGS["meter.list.key"]
    posted = []

    def answer(request):
        if request.method == "GET":
            assert with_brackets(request.target) == key.path
            return key.answer()
        assert request.target == RECORDINGS[name].path
        posted.append(json.loads(request.body))
        return RECORDINGS[name].answer()

    openmeter.rule = answer

    rows = listing.usage("h_sum", QUERIES[name])

    (asked,) = posted
    zone = asked.pop("time_zone", None)
    assert zone == sent.get("time_zone", "UTC" if "granularity" in sent else None)
    assert asked == {name: value for name, value in sent.items() if name != "time_zone"}
    for row, listed in zip(rows, RECORDINGS[name].body["data"], strict=True):
        others = {k: v for k, v in listed["dimensions"].items() if k != "subject"}
        assert row == {
            "windowStart": listed["from"],
            "windowEnd": listed["to"],
            "subject": listed["dimensions"].get("subject"),
            "groupBy": others,
            "value": int(listed["value"]),
        }


@pytest.mark.parametrize(
    ("text", "number"),
    [("32", 32), ("12.10", 12.1), ("0", 0), ("1e3", 1000), ("-2", -2),
     ("123456789012345678901234567890", 123456789012345678901234567890)],
)  # fmt: skip
def test_a_value_is_a_number_as_in_version_1(openmeter, listing, text, number):
    row = {"from": "a", "to": "b", "value": text, "dimensions": {}}
    openmeter.rule = lambda request: document({"data": [row]})

    (told,) = listing.usage("01M8JBJ0TJ6VVGGBHKAR029SNS", UsageQuery())

    assert (told["value"], type(told["value"])) == (number, type(number))


@pytest.mark.parametrize(
    "row",
    [{}, {"from": "a", "to": "b", "value": "many"}, {"from": "a", "to": "b"},
     {"from": "a", "to": "b", "value": "NaN"}, {"from": "a", "to": "b", "value": None},
     {"from": "a", "to": "b", "value": "1", "dimensions": 3}],
)  # fmt: skip
def test_a_row_that_is_none_is_no_answer(openmeter, listing, row):
    openmeter.rule = lambda request: document({"data": [row]})

    with pytest.raises(NoAnswer, match="query: "):
        listing.usage("01M8JBJ0TJ6VVGGBHKAR029SNS", UsageQuery())


def test_a_meter_that_is_not_there_is_named(openmeter, listing):
    openmeter.rule = lambda request: document({"data": []})

    with pytest.raises(NoAnswer, match="lists no meter with the key 'h_none'"):
        listing.usage("h_none", UsageQuery())


def test_an_unknown_dimension_is_told_as_openmeter_says_it(openmeter, listing):
    """This error has no detail, only the messages of the validations."""
    openmeter.rule = lambda request: RECORDINGS["query.by.unknown"].answer()

    with pytest.raises(NoAnswer, match=r"400: invalid group by dimension.*'nope'"):
        listing.usage("01M8JBJ0TJ6VVGGBHKAR029SNS", UsageQuery(group_by=("nope",)))


# -- Meters and features


def test_meters_are_told_as_version_1_tells_them(openmeter, listing):
    openmeter.rule = lambda request: RECORDINGS["meter.list"].answer()

    meters = {meter["slug"]: meter for meter in listing.meters()}

    assert len(meters) == len(RECORDINGS["meter.list"].body["data"])
    assert meters["h_sum"] == {
        "id": "01M8JBJ0TJ6VVGGBHKAR029SNS",
        "slug": "h_sum",
        "eventType": "h_req",
        "aggregation": "SUM",
        "valueProperty": "$.n",
        "groupBy": {"plan": "$.plan", "region": "$.region"},
    }
    assert meters["h_uniq"]["aggregation"] == "UNIQUE_COUNT"
    assert meters["h_count"]["valueProperty"] is None


def test_features_name_the_meters_that_measure_them(openmeter, listing):
    def answer(request):
        features = request.target.startswith(f"{BASE}/features")
        return RECORDINGS["feature.list.meter" if features else "meter.list"].answer()

    openmeter.rule = answer

    features = {one["key"]: one["meterSlug"] for one in listing.features()}

    assert features == {"h_calls": "h_sum", "h_eu": "h_sum"}


def test_all_pages_of_a_list_are_read(openmeter, listing):
    everything = [{"id": f"id-{n}", "key": f"m_{n}"} for n in range(250)]

    def answer(request):
        query = parse_qs(urlsplit(request.target).query)
        number, size = (int(query[f"page[{name}]"][0]) for name in ("number", "size"))
        data = everything[(number - 1) * size : number * size]
        page = {"number": number, "size": size, "total": 250}
        return document({"data": data, "meta": {"page": page}})

    openmeter.rule = answer

    assert [meter["slug"] for meter in listing.meters()] == [
        f"m_{n}" for n in range(250)
    ]


# -- Events


def test_an_event_is_found_by_its_id_and_source(openmeter, listing):
    one = RECORDINGS["events.one"]
    openmeter.rule = lambda request: one.answer()

    (entry,) = listing.entries("h-one", "h-src")

    assert entry == {"event": one.body["data"][0]["event"], "validationError": ""}
    query = parse_qs(urlsplit(openmeter.requests[0].target).query)
    assert query["filter[id][eq]"] == ["h-one"]
    assert query["filter[source][eq]"] == ["h-src"]
    assert listing.entries("h-one", "another") == []
    assert listing.entries("another", "h-src") == []


def test_what_is_wrong_with_an_event_is_told_line_by_line(openmeter, listing):
    body = {"data": RECORDINGS["events.page2"].body["data"]}
    openmeter.rule = lambda request: document(body)

    (entry,) = listing.entries("h-e45", "h-src")

    lines = entry["validationError"].splitlines()
    assert lines[0] == 'invalid event: missing value property: "$.n"'
    assert len(lines) > 1


def test_the_pages_of_events_are_followed(openmeter, listing):
    pages = {None: ("events.page1", "cursor"), "cursor": ("events.page2", None)}

    def answer(request):
        after = parse_qs(urlsplit(request.target).query).get("page[after]", [None])[0]
        name, cursor = pages[after]
        body = RECORDINGS[name].body
        page = {**body["meta"]["page"], "next": cursor}
        return document({**body, "meta": {"page": page}})

    openmeter.rule = answer
    ids = [
        entry["event"]["id"]
        for name in ("events.page1", "events.page2")
        for entry in RECORDINGS[name].body["data"]
    ]

    events = [{"id": id_, "source": "h-src"} for id_ in [*ids, "missing"]]
    assert [*listing.arrived(events)] == [True] * len(ids) + [False]


class Stored:
    """The rule of a server that lists some events as version 3 does."""

    def __init__(self, *events):
        self.events = events
        self.asked = 0

    def __call__(self, request):
        self.asked += 1
        query = parse_qs(urlsplit(request.target).query)
        found = [event for event in self.events if self._matches(event, query)]
        listed = [{"event": event} for event in found]
        return document({"data": listed, "meta": {"page": {"next": None}}})

    def _matches(self, event, query):
        for name, (value,) in query.items():
            if name == "page[size]":
                assert 1 <= int(value) <= 100
                continue
            assert len(value.encode()) <= 1_024
            attribute, _, operator = name.removeprefix("filter[")[:-1].partition("][")
            if operator == "oeq":
                assert len(value.split(",")) <= 50
            there = event[attribute]
            if not {"eq": there == value, "oeq": there in value.split(","),
                    "contains": value.lower() in there.lower()}[operator]:  # fmt: skip
                return False
        return True


def test_many_events_are_looked_up_by_one_question(openmeter, listing):
    events = [{"id": f"r-{n:032}:api_requests", "source": "s"} for n in range(60)]
    stored = openmeter.rule = Stored(*events[::2])

    assert [*listing.arrived(events)] == [True, False] * 30

    assert stored.asked == 4  # of 1,024 bytes at most


ODD = [
    "a,b",
    "b",
    "a",
    "x" * 1_025,
    "x" * 1_025 + "y",
    "ä🚀" * 300,
    "%",
    "a b",
    "A",
    "&",
]


@pytest.mark.parametrize("present", range(len(ODD)))
def test_odd_ids_are_looked_up_exactly(openmeter, listing, present):
    openmeter.rule = Stored({"id": ODD[present], "source": "s"})
    events = [{"id": id_, "source": source} for id_ in ODD for source in ("s", "t")]

    arrived = [*listing.arrived(events)]

    assert [events[n] for n, there in enumerate(arrived) if there] == [
        {"id": ODD[present], "source": "s"}
    ]


@settings(max_examples=30)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "id": st.text(min_size=1, max_size=400),
                "source": st.sampled_from(["s", "t", None]),
            }
        )
    )
)
def test_what_is_asked_together_is_what_one_filter_takes(events):
    chunks = [*_chunks(events)]

    assert [event for chunk in chunks for event in chunk] == events
    for chunk in chunks:
        ids = ",".join(event["id"] for event in chunk)
        assert len({event["source"] for event in chunk}) == 1
        if len(chunk) > 1:
            assert len(chunk) <= 50
            assert len(quote(ids, safe="")) <= 1_024
            assert ids.count(",") == len(chunk) - 1


NO_LISTS = [
    {},
    [],
    {"data": 3},
    {"data": [3]},
    {"data": [{}]},
    {"data": [{"event": 3}]},
]


@pytest.mark.parametrize("body", NO_LISTS)
def test_a_list_of_events_that_is_none_is_no_answer(openmeter, listing, body):
    openmeter.rule = lambda request: document(body)

    with pytest.raises(NoAnswer):
        listing.entries("a", "s")


def test_the_servers_clock_is_read_from_any_answer(openmeter, listing):
    openmeter.rule = lambda request: Answer(403, b"", {"Date": "now"}, takes=False)

    assert listing.date() == "now"
    assert unquote(openmeter.requests[0].target) == f"{BASE}/events?page[size]=1"
