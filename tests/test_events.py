import datetime
import enum
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from cloudevents.http import from_json
from hypothesis import given
from hypothesis import strategies as st

from billing import bill, environ, handled, serve
from openmeter_server import OpenMeterServer
from openmeter_wsgi import (
    MeterValueError,
    OpenMeterMiddleware,
    Policy,
    set_meters,
    values,
)
from openmeter_wsgi.events import (
    Meter,
    RequestIds,
    encode_events,
    read_usage,
    size_problem,
)
from openmeter_wsgi.process import Process
from openmeter_wsgi.request import new_record
from openmeter_wsgi.values import MAX_EXACT_INTEGER, MAX_GROWTH, message_bytes

TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1
)
_ONE = {"type": "a", "data": {}}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=10,
)


def written(value: Any) -> Any:
    """Return *value* as a policy has it: two dollar signs are text, one a measure."""
    if isinstance(value, dict):
        return {key: written(each) for key, each in value.items()}
    if isinstance(value, str) and value.startswith("$"):
        return f"${value}"
    return value


def usual_encoder(
    meters: tuple[Meter, ...], ids: RequestIds
) -> Callable[[str], list[dict[str, Any]]]:
    """Return a function that makes the events of a usual request of a subject."""
    policy = Policy(
        meter=[written(meter.document()) for meter in meters],
        event_source="api",
        subject=lambda environ: environ["who"],
        dry_run=True,
    )
    fast_path = Process(policy, ids=ids).billing.fast_path
    assert fast_path is not None

    def encode(subject: str) -> list[dict[str, Any]]:
        request = {"REQUEST_METHOD": "GET", "who": subject}
        record = new_record()
        record.status = "200 OK"
        made = fast_path.events(request, record)
        assert made is not None
        return [json.loads(each) for each in made]

    return encode


def meters_of(*documents: dict[str, Any]) -> tuple[Meter, ...]:
    return read_usage(list(documents)).documents


@pytest.mark.parametrize("events", [1, 2])
@given(kind=TEXT, subject=TEXT, data=st.dictionaries(TEXT, TEXT))
def test_static_and_stated_events_are_the_same_event(
    events: int, kind: str, subject: str, data: dict[str, str]
) -> None:
    meters = meters_of(*[{"type": kind, "data": data}] * events)

    usual = usual_encoder(meters, RequestIds("r"))(subject)
    stated = encode_events(meters, request_id="r-1", subject=subject, source="api")

    for n, (left, other) in enumerate(zip(usual, stated, strict=True)):
        right = json.loads(other)
        assert left.pop("time") <= right.pop("time")
        assert (
            left
            == right
            == {
                "specversion": "1.0",
                "id": f"r-1:{kind}" + (":2" if n else ""),
                "source": "api",
                "type": kind,
                "subject": subject,
                "data": data,
            }
        )


@given(data=st.dictionaries(TEXT, JSON))
def test_any_json_object_arrives_with_every_number_exact(data: dict[str, Any]) -> None:
    def as_sent(value: Any) -> Any:
        if isinstance(value, int) and abs(value) > MAX_EXACT_INTEGER:
            return str(value)
        if isinstance(value, dict):
            return {key: as_sent(inner) for key, inner in value.items()}
        return [as_sent(inner) for inner in value] if isinstance(value, list) else value

    [event] = encode_events(
        meters_of({"type": "a", "data": data}),
        request_id="r",
        subject="s",
        source="api",
    )

    there = {key: value for key, value in data.items() if value is not None}
    assert json.loads(event)["data"] == as_sent(there)


class Nothing(enum.Enum):
    NOTHING = None


def test_what_is_none_in_data_is_left_out_and_further_down_it_is_null(
    openmeter: OpenMeterServer,
) -> None:
    data = {"region": None, "enum": Nothing.NOTHING, "n": {"deep": None}, "l": [None]}
    document = {"type": "b", "data": data}

    events = bill(
        openmeter,
        lambda request: set_meters(request, document),
        meter={"type": "a", "data": data},
    )

    assert [event["data"] for event in events] == [
        {"n": {"deep": None}, "l": [None]}
    ] * 2


# -- The size of Kafka's message


def go_text(value: object) -> str:
    """Write JSON as Go's encoding/json does."""
    if isinstance(value, dict):
        return (
            "{" + ",".join(f"{go_text(k)}:{go_text(v)}" for k, v in value.items()) + "}"
        )
    if isinstance(value, list):
        return "[" + ",".join(map(go_text, value)) + "]"
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
        for character in "<>&\u2028\u2029":
            text = text.replace(character, f"\\u{ord(character):04x}")
        return text
    if isinstance(value, int | float) and not isinstance(value, bool):
        return go_number(float(value))
    return json.dumps(value)


def go_number(value: float) -> str:
    if value and not 1e-6 <= abs(value) < 1e21:
        mantissa, _, exponent = f"{value!r}".partition("e")
        digits = (
            f"{abs(int(exponent)):02}" if int(exponent) > 0 else exponent.lstrip("-0")
        )
        sign = "+" if int(exponent) > 0 else "-"
        return f"{mantissa.removesuffix('.0')}e{sign}{digits}"
    text = without_exponent(value)
    return text.removesuffix(".0")


def without_exponent(value: float) -> str:
    mantissa, _, exponent = f"{value!r}".partition("e")
    if not exponent:
        return mantissa
    shift = int(exponent)
    sign = "-" if mantissa.startswith("-") else ""
    whole, _, part = mantissa.lstrip("-").partition(".")
    if shift > 0:
        return f"{sign}{whole}{part.ljust(shift, '0')}"
    return f"{sign}0.{'0' * (-shift - 1)}{whole}{'' if part == '0' else part}"


#: Bytes that `message_bytes` counts as a part of the frame.
FIELDS = '{"id":,"type":,"source":,"subject":,"data":""}'


def go_message(event: dict[str, Any]) -> int:
    """Return the size of a Kafka message with its key."""
    value = go_text(
        {
            **{name: event[name] for name in ("id", "type", "source", "subject")},
            "data": go_text(event["data"]),
        }
    )
    return len(value.encode()) + len((event["source"] + event["id"]).encode())


SHARP = st.text(
    st.sampled_from('<>&\u2028\u2029"\\\b\f\n\x01\x7f\xe9\U0001f600x1e5.0'), min_size=1
)
SHARP_JSON = st.recursive(
    st.none()
    | st.booleans()
    | SHARP
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([1e20, -1e20, 1e16, 1.5e17, 1e21, 1e-6, 1.5e-7, 1e-5, -0.0, 3.0]),
    lambda inner: st.lists(inner) | st.dictionaries(SHARP, inner),
    max_leaves=20,
)


@given(data=st.dictionaries(SHARP, SHARP_JSON), subject=SHARP, kind=SHARP)
def test_the_size_of_a_message_is_what_go_makes_of_the_event(
    data: dict[str, Any], subject: str, kind: str
) -> None:
    [event] = encode_events(
        meters_of({"type": kind, "data": data}),
        request_id="r",
        subject=subject,
        source="api",
    )

    size = message_bytes(event)

    # The rest is the frame, the time, and the names of the fields.
    assert size - go_message(json.loads(event)) == 512 - len(FIELDS)
    # So no event is large that is not looked at.
    assert size <= MAX_GROWTH * len(event) + 1_000


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("x" * 990_000, True),
        ("x" * 1_000_000, False),
        ("<" * 142_000, True),
        ("<" * 143_000, False),
        ("\u2028" * 143_000, False),
        ('"' * 249_000, True),
        ('"' * 250_000, False),
        ("\N{GRINNING FACE}" * 249_000, True),
        ("\N{GRINNING FACE}" * 250_000, False),
    ],
)
def test_data_that_kafka_would_not_take_is_refused_where_it_is_made(
    text: str, fits: bool
) -> None:
    document = {"type": "a", "data": {"text": text}}

    if fits:
        [event] = encode_events(
            meters_of(document), request_id="r", subject="s", source="api"
        )
        assert size_problem(event) is None
    else:
        with pytest.raises(
            MeterValueError, match="at most 1000000 bytes in the message"
        ):
            meters_of(document)


def test_an_event_whose_subject_is_too_large_is_counted_and_not_sent(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    middleware = OpenMeterMiddleware(
        handled(lambda request: None),
        api_url=openmeter.url,
        flush_interval=60,
        subject="header:X-Customer",
        meters={"a": 1},
    )
    long = environ(HTTP_X_CUSTOMER="<" * 170_000)
    for request in (environ(HTTP_X_CUSTOMER="acme"), long, long):
        serve(middleware, dict(request))
    middleware.close(40)

    assert openmeter.subjects == ["acme"]
    assert middleware.stats().not_metered == {"message_too_large": 2}
    assert middleware.stats().unaccounted == 0
    assert "default: an event is not sent: expected at most 1000000" in caplog.text


def test_a_large_event_takes_no_other_of_its_request_along(
    openmeter: OpenMeterServer,
) -> None:
    middleware = OpenMeterMiddleware(
        handled(
            lambda request: set_meters(
                request, [{"type": "a"}, {"type": "b", "subject": "<" * 170_000}]
            )
        ),
        api_url=openmeter.url,
        on_missing_subject="acme",
    )
    serve(middleware, environ())
    middleware.close(40)

    assert [event["type"] for event in openmeter.taken] == ["a"]
    assert middleware.stats().dropped == {"message_too_large": 1}
    assert middleware.stats().unaccounted == 0


# -- Time


@pytest.mark.parametrize("ahead", [2, 3_600, 366 * 86_400])
def test_a_time_in_the_future_is_set_to_now(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture, ahead: int
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    later = now + datetime.timedelta(seconds=ahead + 60)
    before = now - datetime.timedelta(seconds=ahead)
    documents = [{"type": "a", "time": later}, {"type": "b", "time": before}]

    events = bill(openmeter, lambda request: set_meters(request, documents))

    made = {
        event["type"]: datetime.datetime.fromisoformat(event["time"])
        for event in events
    }
    assert abs(made["a"] - now) < datetime.timedelta(seconds=60)
    assert made["b"] == before
    assert "meter 'a': its time" in caplog.text


def test_an_event_is_a_cloudevent(openmeter: OpenMeterServer) -> None:
    [body] = bill(
        openmeter,
        meter={"type": "api-request", "data": {"count": 1}},
        on_missing_subject='Zoë "O\'Neil" \N{GRINNING FACE} \x1b[31m',
    )

    event = from_json(json.dumps(body))

    assert event["specversion"] == "1.0"
    assert event["subject"] == 'Zoë "O\'Neil" \N{GRINNING FACE} \x1b[31m'
    assert event.data == {"count": 1}
    assert event["id"].endswith(":api-request")
    when = datetime.datetime.fromisoformat(event["time"])
    assert abs(datetime.datetime.now(datetime.UTC) - when).total_seconds() < 30


def test_ids_of_requests_are_unique_among_threads_and_makers() -> None:
    makers = [RequestIds(), RequestIds()]
    encoders = [usual_encoder(meters_of(_ONE), maker) for maker in makers]
    ids: list[str] = []

    def make() -> None:
        for _ in range(2_500):
            ids.extend([maker.new() for maker in makers])
            events = [event for encode in encoders for event in encode("acme")]
            ids.extend([event["id"].removesuffix(":a") for event in events])

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(ids)) == len(ids) == 40_000


def test_a_request_id_of_the_client_is_never_used(openmeter: OpenMeterServer) -> None:
    [event] = bill(
        openmeter, meters={"a": 1}, request=environ(HTTP_X_REQUEST_ID="client-made")
    )

    assert "client-made" not in event["id"]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("abc-1", "abc-1:a"),
        ('a"b\\c', 'a"b\\c:a'),
        ("", None),
        ("ü", None),
        ("x" * 129, None),
    ],
)
def test_a_trusted_header_gives_the_id_where_it_is_usable(
    openmeter: OpenMeterServer, header: str, expected: str | None
) -> None:
    [event] = bill(
        openmeter,
        meters={"a": 1},
        request=environ(HTTP_X_REQUEST_ID=header),
        trusted_request_id_header="X-Request-ID",
        event_source="checkout",
    )

    if expected:
        assert event["id"] == expected
    else:
        assert header not in event["id"] or not header
        assert event["id"].endswith("-1:a")


def test_ids_of_requests_are_counted_up() -> None:
    ids = RequestIds("r")
    encode = usual_encoder(meters_of(_ONE), ids)

    made = [ids.new() for _ in range(2_500)]
    [event] = encode("acme")

    assert made == [f"r-{n}" for n in range(1, 2_501)]
    assert event["id"] == "r-2501:a"


def test_timestamps_are_the_clock_to_the_hundredth() -> None:
    for _ in range(1_000):
        before = time.time()
        text = values.timestamp()
        after = time.time()

        moment = datetime.datetime.fromisoformat(text).timestamp()
        assert before - 0.0101 <= moment <= after
        assert len(text) == len("2026-01-02T03:04:05.06Z")


def test_a_clock_that_is_set_back_is_believed() -> None:
    moments = iter([1_000_000_000.999, 1_000_000_000.5, 999_999_999.0])
    before = values.set_clock(lambda: next(moments))
    try:
        texts = [values.timestamp() for _ in range(3)]
    finally:
        values.set_clock(before)

    assert texts == [
        "2001-09-09T01:46:40.99Z",
        "2001-09-09T01:46:40.50Z",
        "2001-09-09T01:46:39.00Z",
    ]
