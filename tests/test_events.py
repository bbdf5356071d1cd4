import datetime
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from cloudevents.http import from_json
from hypothesis import given
from hypothesis import strategies as st

from billing import bill, environ
from openmeter_server import OpenMeterServer
from openmeter_wsgi import Policy, timestamps
from openmeter_wsgi.events import RequestIds, encode_events
from openmeter_wsgi.process import Process
from openmeter_wsgi.request import new_record
from openmeter_wsgi.usage import Meter, read_usage
from openmeter_wsgi.wire import MAX_EXACT_INTEGER

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
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
    """Return what makes the events of a subject's usual request."""
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

    assert json.loads(event)["data"] == as_sent(data)


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
        text = timestamps.timestamp()
        after = time.time()

        moment = datetime.datetime.fromisoformat(text).timestamp()
        assert before - 0.0101 <= moment <= after
        assert len(text) == len("2026-01-02T03:04:05.06Z")


def test_a_clock_that_is_set_back_is_believed() -> None:
    moments = iter([1_000_000_000.999, 1_000_000_000.5, 999_999_999.0])
    before = timestamps.go_by(lambda: next(moments))
    try:
        texts = [timestamps.timestamp() for _ in range(3)]
    finally:
        timestamps.go_by(before)

    assert texts == [
        "2001-09-09T01:46:40.99Z",
        "2001-09-09T01:46:40.50Z",
        "2001-09-09T01:46:39.00Z",
    ]
