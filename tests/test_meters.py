import datetime
import decimal
import enum
import fractions
import logging
import math
import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing import bill, environ, handled, metered_environ, serve, usage
from openmeter_server import OpenMeterServer
from openmeter_wsgi import (
    MeterValueError,
    OpenMeterMiddleware,
    Policy,
    add_meters,
    get_meters,
    set_idempotency_key,
    set_meters,
)
from openmeter_wsgi.events import read_usage
from openmeter_wsgi.request import HandlerUsage

DOCUMENT = {"type": "llm", "data": {"model": "gpt-4", "tokens": 150}}


def total(n: Any) -> dict[str, Any]:
    return {"total": n}


def test_a_set_number_replaces_the_static_one(openmeter: OpenMeterServer) -> None:
    events = bill(
        openmeter, lambda r: set_meters(r, {"a": 50}), meters={"a": 1, "b": 2}
    )

    assert usage(events) == [("b", total(2)), ("a", total(50))]


def test_an_added_number_comes_on_top_of_the_static_one(
    openmeter: OpenMeterServer,
) -> None:
    assert usage(
        bill(openmeter, lambda r: add_meters(r, {"a": 50}), meters={"a": 1})
    ) == [("a", total(51))]


def test_set_then_add_sums_what_was_set_and_added(openmeter: OpenMeterServer) -> None:
    def handler(request: Any) -> None:
        add_meters(request, {"a": 1_000, "gone": 1})
        set_meters(request, {"a": 50})
        add_meters(request, {"a": 5})

    assert usage(bill(openmeter, handler, meters={"a": 1})) == [("a", total(55))]


def test_a_set_document_replaces_static_meters_of_its_type(
    openmeter: OpenMeterServer,
) -> None:
    events = bill(
        openmeter,
        lambda r: set_meters(r, [DOCUMENT, {"other": 3}]),
        meter={"type": "llm", "data": {"static": True}},
        meters={"llm": 1, "b": 2},
    )

    assert usage(events) == [
        ("b", total(2)),
        ("other", total(3)),
        ("llm", DOCUMENT["data"]),
    ]


def test_documents_and_numbers_of_one_type_are_events_of_their_own(
    openmeter: OpenMeterServer,
) -> None:
    def handler(request: Any) -> None:
        add_meters(request, DOCUMENT)
        add_meters(request, {"llm": 5})
        add_meters(request, DOCUMENT)

    events = bill(openmeter, handler, meter=DOCUMENT)

    assert [data for _, data in usage(events)] == [total(5), *3 * [DOCUMENT["data"]]]
    request_id = events[0]["id"].removesuffix(":llm")
    assert [event["id"] for event in events] == [
        f"{request_id}:llm{suffix}" for suffix in ("", ":2", ":3", ":4")
    ]


def test_zero_sends_nothing_and_a_set_zero_waives_the_static_meter(
    openmeter: OpenMeterServer,
) -> None:
    assert bill(openmeter, lambda r: set_meters(r, {"a": 0}), meters={"a": 1}) == []


def test_a_mapping_whose_type_is_a_number_is_a_meter_named_type(
    openmeter: OpenMeterServer,
) -> None:
    assert usage(bill(openmeter, lambda r: set_meters(r, {"type": 3}))) == [
        ("type", total(3))
    ]


def test_get_meters_returns_what_set_meters_takes() -> None:
    request = metered_environ()
    add_meters(request, {"a": 1, "b": 0.5})
    add_meters(request, [DOCUMENT, {"type": "x", "data": {}, "subject": "else"}])
    add_meters(request, {"a": 2})

    stated = get_meters(request)

    assert stated == [
        DOCUMENT,
        {"type": "x", "data": {}, "subject": "else"},
        {"a": 3, "b": 0.5},
    ]
    set_meters(request, stated)
    assert get_meters(request) == stated


def test_flat_and_measured_parts_of_one_type_are_kept_apart() -> None:
    static = read_usage({"a": 1, "b": 1})
    stated = HandlerUsage()
    stated.set(read_usage([{"a": 10}, DOCUMENT]), flat=True)
    stated.add(read_usage({"a": 5}))

    assert stated.merged(static, with_flat=True).numbers == {"b": 1, "a": 15}
    # Of a response that broke off, the policy counts only measured values, if any.
    measured = read_usage({"c": 7})
    assert stated.merged(measured, with_flat=False).numbers == {"a": 5, "c": 7}
    assert stated.merged(measured, with_flat=False).documents == ()


def test_data_is_as_it_was_when_it_was_stated(openmeter: OpenMeterServer) -> None:
    def handler(request: Any) -> None:
        data: dict[str, Any] = {"n": 1}
        set_meters(request, {"type": "a", "data": data})
        data["n"] = math.nan

    assert usage(bill(openmeter, handler)) == [("a", {"n": 1})]


def test_numbers_arrive_exact(openmeter: OpenMeterServer) -> None:
    class Level(enum.IntEnum):
        HIGH = 3

    data = {
        "limit": 2**53,
        "beyond": 2**53 + 1,
        "negative": -(2**53) - 1,
        "list": [2**64, {"deep": 10**30}],
        "price": decimal.Decimal("0.10"),
        "float": 1e300,
        "bool": True,
        "level": Level.HIGH,
        "day": datetime.date(2026, 1, 2),
        "uuid": uuid.UUID(int=1),
        "tuple": (1, 2),
    }
    numbers = {"big": 2**53, "credits": decimal.Decimal("1.1"), "sum": 2**53}

    def handler(request: Any) -> None:
        set_meters(request, [{"type": "doc", "data": data}, numbers])
        add_meters(request, {"big": 1, "credits": 0.1})

    billed = dict(usage(bill(openmeter, handler)))

    assert billed["big"] == total("9007199254740993")
    assert billed["sum"] == total(2**53)
    assert billed["credits"] == total("1.2")
    assert billed["doc"] == {
        **data,
        "beyond": "9007199254740993",
        "negative": "-9007199254740993",
        "list": ["18446744073709551616", {"deep": "1" + 30 * "0"}],
        "price": "0.10",
        "level": 3,
        "day": "2026-01-02",
        "uuid": "00000000-0000-0000-0000-000000000001",
        "tuple": [1, 2],
    }


RECURSIVE: dict[str, Any] = {}
RECURSIVE["self"] = RECURSIVE


@pytest.mark.parametrize(
    ("meters", "named"),
    [
        ({"a": -1}, "meter 'a': expected a number, finite and not negative, got -1"),
        ({"a": math.nan}, "got nan"),
        ({"a": math.inf}, "got inf"),
        ({"a": 10**400}, "finite"),
        ({"a": decimal.Decimal("sNaN")}, "finite"),
        ({"a": decimal.Decimal("-0.1")}, "not negative"),
        ({"a": True}, "got True"),
        ({"a": "5"}, "got '5'"),
        ({"a": None}, "got None"),
        ({"": 1}, "meter type: expected text that is not empty, got ''"),
        ({1: 1}, "meter type: expected text"),
        ({"a\ud800": 1}, "text that can be encoded"),
        ("a", "expected {'type': …"),
        (5, "got 5"),
        ([{"a": 1}, 5], "expected {'type': …"),
        ({"type": "a", "data": "x"}, "meter 'a': data: expected a JSON object"),
        (
            {"type": "a", "data": {"n": math.nan}},
            "meter 'a': data.n: expected a finite",
        ),
        ({"type": "a", "data": {"l": [0, math.inf]}}, "data.l[1]: expected a finite"),
        ({"type": "a", "data": {1: 2}}, "expected text as keys, got 1"),
        ({"type": "a", "data": {"o": object()}}, "data.o: expected a JSON value"),
        ({"type": "a", "data": {"s": "\ud800"}}, "meter 'a': data: "),
        ({"type": "a", "data": RECURSIVE}, "meter 'a': data: "),
        ({"type": "a", "data": {"s": "x" * 1_000_000}}, "at most 1000000 bytes"),
        ({"type": "a\0", "data": {}}, "meter type: expected text without NUL"),
        ({"a\0": 1}, "meter type: expected text without NUL"),
        ({"type": "a", "id": "\0"}, "meter 'a': id: expected text without NUL"),
        ({"type": "a", "subject": "b\0"}, "subject: expected text without NUL"),
        ({"type": "a", "source": "b\0"}, "source: expected a URI reference"),
        ({"a": 10**60}, "meter 'a': expected a number of at most 60 digits, got 61"),
        ({"a": decimal.Decimal("1E+60")}, "at most 60 digits, got 61"),
        ({"a": decimal.Decimal("1E-60")}, "at most 60 digits, got 61"),
        ({"a": decimal.Decimal("1E-99999999")}, "got 100000000 digits"),
        ([{"a": 10**59}, {"a": decimal.Decimal("0.1")}], "at most 60 digits, got 61"),
        ({"type": "a", "data": {"n": [10**60]}}, "data.n[0]: expected a number of at"),
        ({"type": "a", "data": {"n": decimal.Decimal("1E+60")}}, "data.n: expected a"),
        ({"type": "a", "value": 1}, "write the value into data"),
        ({"type": "a", "unit": 1}, "unknown key 'unit'"),
        ({"type": "a", "id": ""}, "meter 'a': id: expected text"),
        ({"type": "a", "subject": 5}, "meter 'a': subject: expected text"),
        ({"type": "a", "source": "a b"}, "meter 'a': source: expected a URI reference"),
        ({"type": "a", "time": "now"}, "meter 'a': time: expected RFC 3339"),
        ({"type": "a", "time": "2026-01-01T00:00:00"}, "with a time zone"),
        ({"type": "a", "time": "1969-01-01T00:00:00Z"}, "after 1970"),
        ({"type": "a", "time": 5}, "meter 'a': time: expected RFC 3339"),
    ],
)
def test_what_openmeter_would_refuse_or_ignore_is_refused_where_it_is_made(
    meters: Any, named: str
) -> None:
    request = metered_environ()
    set_meters(request, {"kept": 1})

    for helper in (set_meters, add_meters):
        with pytest.raises(MeterValueError) as refused:
            helper(request, meters)
        assert named in str(refused.value)

    assert get_meters(request) == [{"kept": 1}]


def test_a_sum_that_is_too_large_is_refused_and_changes_nothing() -> None:
    request = metered_environ()
    add_meters(request, {"a": 1e308, "b": 1})

    with pytest.raises(MeterValueError, match="too large"):
        add_meters(request, {"b": 1, "a": 1e308})

    assert get_meters(request) == [{"a": 1e308, "b": 1}]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (decimal.Decimal("1E+30"), "1" + "0" * 30),
        (decimal.Decimal("1.2E+29"), "12" + "0" * 28),
        (decimal.Decimal("1E-30"), "0." + "0" * 29 + "1"),
        (decimal.Decimal("1.230E+3"), "1230"),
        (decimal.Decimal("1.10"), "1.10"),
        (decimal.Decimal("123456789" * 4 + "123"), "123456789" * 4 + "123"),
        (decimal.Decimal("9" * 30 + "." + "9" * 30), "9" * 30 + "." + "9" * 30),
        (int("9" * 60), "9" * 60),
    ],
)
def test_numbers_travel_with_all_their_digits_and_no_exponent(
    openmeter: OpenMeterServer, number: decimal.Decimal | int, text: str
) -> None:
    def handler(request: Any) -> None:
        # Without care, adding a number to 0 would round it to the context's precision.
        add_meters(request, [{"n": number}, {"type": "doc", "data": {"value": number}}])

    billed = usage(bill(openmeter, handler))

    assert dict(billed) == {"doc": {"value": text}, "n": total(text)}


def test_the_arithmetic_of_the_application_is_not_ours(
    openmeter: OpenMeterServer,
) -> None:
    def handler(request: Any) -> None:
        context = decimal.Context(
            prec=3, traps=[decimal.Inexact, decimal.Rounded, decimal.FloatOperation]
        )
        with decimal.localcontext(context):
            add_meters(request, {"n": decimal.Decimal("1234.5"), "f": 0.1})
            add_meters(request, {"n": 1, "f": decimal.Decimal("0.2")})
        decimal.setcontext(context)

    before = decimal.getcontext()
    try:
        # Settled in the application's own thread, after it has returned.
        billed = usage(bill(openmeter, handler, meters={"n": 0.25, "f": 1e308}))
    finally:
        decimal.setcontext(before)

    # The sum of the other has too many digits: the larger one is sent alone.
    assert dict(billed) == {"n": total("1235.75"), "f": total(1e308)}


@given(st.lists(st.decimals(0, 10**15, places=20), min_size=1, max_size=5))
def test_a_sum_of_decimals_is_exact(numbers: list[decimal.Decimal]) -> None:
    request = metered_environ()
    for number in numbers:
        add_meters(request, {"n": number})

    [stated] = get_meters(request)

    assert fractions.Fraction(stated["n"]) == sum(map(fractions.Fraction, numbers))


def test_a_static_part_that_makes_the_sum_too_large_takes_no_other_meter_along(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    events = bill(
        openmeter,
        lambda r: add_meters(r, {"a": 1.5e308, "b": 1}),
        meters={"a": 1e308, "c": 1},
    )

    assert dict(usage(events)) == {"a": total(1.5e308), "b": total(1), "c": total(1)}
    assert "too large" in caplog.text


def test_a_meter_can_override_id_subject_source_and_time(
    openmeter: OpenMeterServer,
) -> None:
    overrides = {
        "id": 'mine "quoted"',
        "subject": "somebody-else",
        "source": "urn:else",
        "time": datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC),
    }

    events = bill(
        openmeter,
        lambda r: set_meters(r, [{"type": "a", **overrides}, {"type": "b"}]),
        event_source="ours",
    )

    assert events[0] == {
        "specversion": "1.0",
        "type": "a",
        "data": {},
        **overrides,
        "time": "2026-01-02T03:04:05.000006Z",
    }
    assert events[1]["subject"] == "acme"
    assert events[1]["source"] == "ours"


def test_a_meter_with_a_subject_of_its_own_needs_no_other(
    openmeter: OpenMeterServer,
) -> None:
    events = bill(
        openmeter,
        lambda r: set_meters(r, [{"type": "a", "subject": "own"}, {"b": 1}]),
        on_missing_subject="skip",
    )

    assert [(event["type"], event["subject"]) for event in events] == [("a", "own")]


def test_a_static_meter_can_name_its_subject(openmeter: OpenMeterServer) -> None:
    events = bill(
        openmeter,
        meter={"type": "a", "data": {"n": 1}, "subject": "house"},
        on_missing_subject="skip",
    )

    assert [(event["subject"], event["data"]) for event in events] == [
        ("house", {"n": 1})
    ]


@pytest.mark.parametrize("carrier", ["environ", "env"])
def test_the_helpers_find_the_environ_on_any_request(carrier: str) -> None:
    request = metered_environ()

    set_meters(SimpleNamespace(**{carrier: request}), {"a": 1})

    assert get_meters(request) == [{"a": 1}]


def test_outside_a_metered_request_the_helpers_say_so_once_and_do_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for request in (environ(), environ(), object(), None):
        set_meters(request, {"a": 1})
        add_meters(request, {"a": 1})
        assert get_meters(request) == []

    lines = [record for record in caplog.records if "outside" in record.message]
    assert len(lines) == 3


def test_a_bad_value_is_told_also_where_the_middleware_is_absent() -> None:
    with pytest.raises(MeterValueError):
        set_meters(environ(), {"a": -1})


def test_usage_after_the_settlement_is_counted_as_late(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    requests: list[Any] = []
    middleware = OpenMeterMiddleware(handled(requests.append), api_url=openmeter.url)
    serve(middleware, environ())

    add_meters(requests[0], {"a": 1})
    set_meters(requests[0], {"a": 1})
    assert get_meters(requests[0]) == []

    assert middleware.stats().dropped == {"late": 2}
    assert "after the response had ended" in caplog.text


def test_a_key_that_comes_too_late_is_no_lost_usage(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    requests: list[Any] = []
    middleware = OpenMeterMiddleware(handled(requests.append), api_url=openmeter.url)
    serve(middleware, environ())

    set_idempotency_key(requests[0], "order-1")

    assert middleware.stats().dropped == {}
    assert "set_idempotency_key: called after the response had ended" in caplog.text


def test_a_meter_without_a_subject_beside_one_with_a_subject_is_logged(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    def state(request: Any) -> None:
        add_meters(request, {"type": "a", "subject": "acme", "data": {"total": 1}})
        add_meters(request, {"b": 1})

    middleware = OpenMeterMiddleware(handled(state), api_url=openmeter.url)
    record = environ()
    record.pop("REMOTE_USER", None)
    serve(middleware, record)
    middleware.close(40)

    assert [event["type"] for event in openmeter.taken] == ["a"]
    assert middleware.stats().dropped == {"no_subject": 1}
    assert "meters without a subject are not billed: 'b'" in caplog.text


def test_dry_run_settles_counts_and_logs_but_sends_nothing(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "openmeter_wsgi"):
        middleware = OpenMeterMiddleware(
            handled(lambda r: None),
            Policy(
                api_url=openmeter.url,
                dry_run=True,
                meters={"a": 1},
                on_missing_subject="acme",
            ),
        )
        for _ in range(3):
            serve(middleware, environ())

    stats = middleware.stats()
    assert (stats.settled, stats.events, stats.dropped) == (3, 3, {"dry_run": 3})
    assert middleware.flush(40)
    assert openmeter.requests == []
    assert caplog.text.count('"type":"a"') == 3


NUMBERS = st.one_of(
    st.integers(0, 2**70),
    st.floats(0, 1e15),
    st.decimals(0, 10**12, allow_nan=False, places=4),
)


@given(
    static=st.dictionaries(st.sampled_from("ab"), NUMBERS),
    calls=st.lists(
        st.tuples(st.booleans(), st.dictionaries(st.sampled_from("abc"), NUMBERS))
    ),
)
def test_any_sequence_of_calls_bills_the_sum_by_the_rules(
    static: dict[str, Any], calls: list[tuple[bool, dict[str, Any]]]
) -> None:
    stated = HandlerUsage()
    expected = {name: [number] for name, number in static.items()}
    for is_set, numbers in calls:
        if is_set:
            stated.set(read_usage(numbers), flat=False)
            expected = {k: [v] for k, v in static.items() if k not in numbers}
            expected |= {k: [v] for k, v in numbers.items()}
        else:
            stated.add(read_usage(numbers))
            for name, number in numbers.items():
                expected.setdefault(name, []).append(number)

    billed = stated.merged(read_usage(static), with_flat=True).numbers

    assert billed.keys() == expected.keys()
    for name, parts in expected.items():
        assert float(billed[name]) == pytest.approx(float(sum(map(float, parts))))
        if all(isinstance(part, int) for part in parts):
            assert billed[name] == sum(parts)
