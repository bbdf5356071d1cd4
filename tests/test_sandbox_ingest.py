import contextlib
import gzip
import json
import os
import socket
import time
from datetime import UTC, datetime, timedelta, timezone
from urllib.parse import urlsplit

import pytest
from cloudevents.conversion import to_structured
from cloudevents.http import CloudEvent

from openmeter_wsgi.sandbox import Sandbox
from openmeter_wsgi.sandbox.request_validation import DATE_TIME
from spooling import PATIENCE
from test_sandbox_support import BATCH, EITHER, SINGLE, Api, event

V1 = "/api/v1/events"
V3 = "/api/v3/openmeter/events"
KONNECT = "/v3/openmeter/events"


def test_an_event_is_answered_with_204_and_nothing(api):
    answer = api.ingest(event())

    assert (answer.status_code, answer.content) == (204, b"")
    assert "Content-Type" not in answer.headers


@pytest.mark.parametrize("path", [V3, KONNECT])
def test_v3_answers_with_202_and_nothing(api, path):
    answer = api.ingest([event()], path=path)

    assert (answer.status_code, answer.content) == (202, b"")
    assert len(api.events()) == 1


def test_there_is_no_v2_ingest(api):
    answer = api.ingest(event(), path="/api/v2/events")

    assert answer.status_code == 405
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"data": None}, id="data null"),
        pytest.param({"data": ...}, id="data missing"),
        pytest.param({"data": {}}, id="data empty"),
        pytest.param({"data": {"a": {"b": None}}}, id="data with null inside"),
        pytest.param({"data": {"a": [None]}}, id="data with null in a list"),
        pytest.param({"data": {"value": "NaN"}}, id="not a number, as text"),
        pytest.param({"data": {"value": "Inf"}}, id="infinite, as text"),
        pytest.param({"type": "nobody counts this"}, id="unknown type"),
        pytest.param({"datacontenttype": "application/json"}, id="datacontenttype"),
        pytest.param({"datacontenttype": None}, id="datacontenttype null"),
        pytest.param({"dataschema": "http://example.com/schema"}, id="dataschema"),
        pytest.param({"dataschema": None}, id="dataschema null"),
        pytest.param({"time": None}, id="time null"),
        pytest.param({"time": "1969-12-31T23:59:59Z"}, id="time before 1970"),
        pytest.param({"time": "0000-01-01T00:00:00Z"}, id="time of year 0"),
        pytest.param({"time": "2999-12-31T23:59:59.9+05:30"}, id="time far off"),
        pytest.param({"specversion": "0.3"}, id="specversion 0.3"),
        pytest.param({"source": "my api"}, id="source with a space"),
        pytest.param({"source": "urn:service:1"}, id="source urn"),
        pytest.param({"source": "http://[::1]:80/x?y#z"}, id="source url"),
        pytest.param({"id": "x" * 10_000}, id="long id"),
        pytest.param({"subject": "Jürgen 🦊 \x00"}, id="subject of any characters"),
        pytest.param({"subscription": "abc"}, id="extension text"),
        pytest.param({"ratio": 1.9}, id="extension float, truncated"),
        pytest.param({"flag": True}, id="extension bool"),
        pytest.param({"nothing": None}, id="extension null"),
    ],
)
def test_v1_accepts(api, changes):
    assert api.ingest(event(**changes)).status_code == 204


SCHEMA = "request body has an error: doesn't match schema #/components/schemas/Event: "


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"id": ...}, SCHEMA + 'Error at "/id": property "id" is missing'),
        ({"id": ""}, SCHEMA + 'Error at "/id": minimum string length is 1'),
        ({"id": 1}, SCHEMA + 'Error at "/id": value must be a string'),
        ({"id": None}, SCHEMA + 'Error at "/id": Value is not nullable'),
        ({"source": ...}, SCHEMA + 'Error at "/source": property "source" is missing'),
        ({"subject": ""}, SCHEMA + 'Error at "/subject": minimum string length is 1'),
        ({"type": ...}, SCHEMA + 'Error at "/type": property "type" is missing'),
        ({"data": "text"}, SCHEMA + 'Error at "/data": value must be an object'),
        ({"data": [1]}, SCHEMA + 'Error at "/data": value must be an object'),
        ({"data": 1}, SCHEMA + 'Error at "/data": value must be an object'),
        (
            {"data": {"n": 1, "region": None}},
            SCHEMA + 'Error at "/data/region": Value is not nullable',
        ),
        (
            {"datacontenttype": "application/xml"},
            SCHEMA + 'Error at "/datacontenttype": value is not one of the allowed '
            'values ["application/json"]',
        ),
        (
            {"datacontenttype": "application/json; charset=utf-8"},
            SCHEMA + 'Error at "/datacontenttype": value is not one of the allowed '
            'values ["application/json"]',
        ),
        (
            {"specversion": ...},
            SCHEMA + 'Error at "/specversion": property "specversion" is missing',
        ),
        (
            {"specversion": "2.0"},
            "invalid event: specversion: unknown value: 2.0\n",
        ),
        (
            {"source": "127.0.0.1:8080"},
            "invalid event: cannot parse uri ref: 127.0.0.1:8080",
        ),
        (
            {"source": "100%zz"},
            "invalid event: cannot parse uri ref: 100%zz",
        ),
        (
            {"time": "2026-01-01T00:00:00"},
            SCHEMA + 'Error at "/time": string doesn\'t match the format "date-time": '
            f'string doesn\'t match pattern "{DATE_TIME}"',
        ),
        (
            {"time": "2026-02-30T00:00:00Z"},
            'invalid event: cannot convert "2026-02-30T00:00:00Z" to time.Time: '
            "not in RFC3339 format",
        ),
    ],
    ids=str,
)
def test_v1_refuses_and_says_why(api, changes, detail):
    answer = api.ingest(event(**changes))

    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["detail"] == detail
    assert api.events() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"time": "yesterday"},
        {"time": "2026-01-01 00:00:00Z"},
        {"time": 1},
        {"time": ""},
        {"my_extension": "x"},
        {"my-extension": "x"},
        {"extension": {}},
        {"extension": []},
        {"extension": 2**31},
        {"data_base64": "not base64"},
        {"dataschema": ""},
        {"source": ":nothing"},
        {"source": "http://host:port/"},
        {"source": "a\nb"},
    ],
    ids=str,
)
def test_v1_refuses(api, changes):
    assert api.ingest(event(**changes)).status_code == 400
    assert api.overview()["counts"]["refused"] == 1


def test_schema_errors_have_no_instance_and_others_have_one(api):
    schema = api.ingest(event(id=...)).json()
    other = api.ingest(event(specversion="2.0")).json()

    assert schema == {
        "type": "about:blank",
        "title": "Bad Request",
        "status": 400,
        "detail": SCHEMA + 'Error at "/id": property "id" is missing',
    }
    assert other["instance"].startswith("urn:request:")


def test_v3_names_the_field_in_invalid_parameters(api):
    answer = api.ingest([event(1), event(2, subject="")], path=V3)

    problem = answer.json()
    assert problem.pop("instance").startswith("urn:request:")
    assert problem == {
        "type": "https://kongapi.info/konnect/bad-request",
        "title": "Bad Request",
        "status": 400,
        "detail": "Bad Request: 1.subject [min_length]: minimum string length is 1",
        "invalid_parameters": [
            {
                "field": "1.subject",
                "rule": "min_length",
                "reason": "minimum string length is 1",
                "source": "",
            }
        ],
    }


def test_a_null_at_the_top_of_the_data_refuses_the_whole_request(api):
    bad = event(2, data={"region": None})

    batch = api.ingest([event(1), bad], BATCH)
    either = api.ingest([event(1), bad], EITHER)
    v3 = api.ingest(bad, path=V3)

    assert [a.status_code for a in (batch, either, v3)] == [400] * 3
    assert 'Error at "/1/data/region": Value is not null' in batch.json()["detail"]
    reason = {"field": "data.region", "rule": "nullable",
              "reason": "Value is not nullable", "source": ""}  # fmt: skip
    assert v3.json()["invalid_parameters"] == [reason]
    assert api.events() == []


def test_v3_knows_no_extension_attributes(api):
    answer = api.ingest(event(plan="gold"), path=V3)

    assert answer.status_code == 400
    assert 'property "plan" is unsupported' in answer.json()["detail"]


@pytest.mark.parametrize("kind", [SINGLE, EITHER])
def test_one_event_goes_as_an_object(api, kind):
    assert api.ingest(event(), kind).status_code == 204
    assert len(api.events()) == 1


@pytest.mark.parametrize("kind", [BATCH, EITHER])
def test_several_events_go_as_an_array(api, kind):
    assert api.ingest([event(1), event(2)], kind).status_code == 204
    assert len(api.events()) == 2


@pytest.mark.parametrize(
    ("body", "kind"), [([event()], SINGLE), (event(), BATCH), ("text", EITHER)]
)
def test_the_body_has_the_shape_that_the_content_type_says(api, body, kind):
    assert api.ingest(body, kind).status_code == 400


@pytest.mark.parametrize("kind", [SINGLE, BATCH, EITHER])
def test_v1_refuses_parameters_of_the_content_type(api, kind):
    body = [event()] if kind == BATCH else event()

    answer = api.ingest(body, f"{kind}; charset=utf-8")

    assert answer.status_code == 400
    expected = f"invalid content type: {kind}; charset=utf-8"
    assert answer.json()["detail"] == expected


def test_v3_takes_parameters_of_the_content_type(api):
    assert api.ingest(event(), f"{EITHER}; charset=utf-8", V3).status_code == 202


@pytest.mark.parametrize("kind", ["text/plain", "", "Application/JSON", "garbage;;"])
@pytest.mark.parametrize("path", [V1, V3])
def test_other_content_types_are_refused(api, kind, path):
    answer = api.post(
        path, data=json.dumps(event()), headers={"Content-Type": kind} if kind else {}
    )

    assert answer.status_code == 400
    detail = f'body has an error: header Content-Type has unexpected value "{kind}"'
    prefix = "Bad Request: : " if path == V3 else ""
    assert answer.json()["detail"] == f"{prefix}request {detail}"


def test_an_empty_array_is_accepted_as_a_batch_and_refused_as_json(api):
    batch = api.ingest([], BATCH)
    either = api.ingest([], EITHER)

    assert batch.status_code == 204
    assert either.status_code == 400
    assert either.json()["detail"] == "invalid event: no events found"


def test_plain_json_hides_what_is_wrong_from_the_client_not_from_the_page(api):
    schema = api.ingest([event(1), event(2, subject="")], EITHER).json()["detail"]
    decoding = api.ingest(event(source="127.0.0.1:80"), EITHER).json()["detail"]

    assert schema.endswith('doesn\'t match any schema from "anyOf"')
    assert decoding == "invalid event: no events found"
    reasons = [refusal["reason"] for refusal in api.overview()["refusals"]]
    found = 'Error at "/1/subject": minimum string length is 1'
    assert any(found in reason for reason in reasons)
    assert any("first path segment in URL" in reason for reason in reasons)


def test_one_bad_event_refuses_the_whole_batch_and_its_index_is_named(api):
    answer = api.ingest([event(1), event(2, subject=...), event(3)])

    assert answer.status_code == 400
    assert answer.json()["detail"] == (
        "request body has an error: doesn't match schema: "
        'Error at "/1/subject": property "subject" is missing'
    )
    assert api.events() == []


def test_data_that_is_no_json_fails_late_and_keeps_what_stood_before_it(api):
    broken = {"datacontenttype": EITHER, "data": ..., "data_base64": "/w=="}
    answer = api.ingest([event(1), event(2, **broken), event(3)])

    assert answer.status_code == 500
    assert "detail" not in answer.json()
    assert [listed["event"]["id"] for listed in api.events()] == ["event-1"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "value is required but missing"),
        (b"{", "failed to decode request body"),
        (b"[" * 100_000, "failed to decode request body"),
        (b'{"data": NaN}', "failed to decode request body"),
        (b'{"data": 1e999}', "failed to decode request body"),
        (gzip.compress(json.dumps(event()).encode()), "failed to decode request body"),
    ],
    ids=["empty", "torn", "deep", "NaN", "huge number", "gzip"],
)
def test_a_body_that_is_no_json_is_refused(api, body, reason):
    headers = {"Content-Type": SINGLE, "Content-Encoding": "gzip"}

    answer = api.post(V1, data=body, headers=headers)

    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(f"request body has an error: {reason}")


def test_chunked_bodies_are_read(api):
    body = json.dumps([event(number) for number in range(100)]).encode()
    chunks = (body[start : start + 999] for start in range(0, len(body), 999))

    answer = api.post(V1, data=chunks, headers={"Content-Type": BATCH})

    assert answer.status_code == 204
    assert len(api.events()) == 100


def test_broken_characters_are_replaced_as_go_does(api):
    body = json.dumps(event(subject="S", data={"x": "\ud83e"}))
    raw = body.encode().replace(b'"S"', b'"a\xffb\\ud83e"')

    assert api.ingest(raw, SINGLE).status_code == 204
    listed = api.events()[0]["event"]
    assert (listed["subject"], listed["data"]) == ("a\ufffdb\ufffd", {"x": "\ufffd"})


def test_integers_beyond_2_53_lose_their_last_digits(api):
    api.ingest(event(data={"big": 2**53 + 1, "text": str(2**53 + 1), "whole": 1.0}))

    data = api.events()[0]["event"]["data"]
    assert data == {"big": 2**53, "text": str(2**53 + 1), "whole": 1}


def test_a_missing_time_is_the_time_of_arrival(api):
    before = int(time.time())
    api.ingest(event())
    after = int(time.time())

    arrived = datetime.fromisoformat(api.events()[0]["event"]["time"]).timestamp()
    assert before <= arrived <= after


def test_times_are_kept_in_utc_and_whole_seconds(api):
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    zone = timezone(timedelta(hours=5, minutes=30))

    api.ingest(event(time=hour.astimezone(zone).isoformat().replace("00+", "00.999+")))

    assert api.events()[0]["event"]["time"] == f"{hour:%Y-%m-%dT%H}:00:00Z"


def test_events_of_1970_are_dropped_without_a_word(api):
    api.meter("calls", "COUNT")

    answer = api.ingest(event(time="1970-01-01T00:00:00Z"))

    assert answer.status_code == 204
    assert api.value("calls") is None
    assert api.overview()["counts"]["dropped"] == 1


def test_a_thousand_posts_of_one_event_are_one_event(api):
    api.meter("calls", "COUNT")

    for _ in range(100):
        assert api.ingest(event()).status_code == 204
        assert api.ingest([event()] * 9).status_code == 204

    assert api.value("calls") == 1
    counts = api.overview()["counts"]
    assert (counts["received"], counts["duplicates"]) == (1000, 999)


def test_the_first_of_two_events_with_one_id_wins(api):
    api.ingest(event(data={"value": 1}))
    api.ingest(event(data={"value": 2}, subject="other", type="other"))

    assert [listed["event"]["data"] for listed in api.events()] == [{"value": 1}]


def test_source_and_id_are_joined_with_a_hyphen_as_openmeter_does(api):
    api.ingest([event(source="a-b", id="c"), event(source="a", id="b-c")])
    api.ingest([event(source="my api", id="1"), event(source="my%20api", id="1")])

    assert len(api.events()) == 2


def test_without_deduplication_a_repetition_is_counted_again():
    with Sandbox(dedupe=False) as sandbox, Api(sandbox.url) as api:
        api.meter("calls", "COUNT")
        api.ingest([event(1), event(1)])
        api.ingest(event(1))

        assert api.value("calls") == 3
        assert api.overview()["counts"]["duplicates"] == 2


def test_a_batch_of_a_thousand_from_a_month_ago_to_a_month_ahead_is_accepted(api):
    api.meter("calls", "COUNT")
    moments = [time.time() + days * 86_400 for days in (-30, 0, 30)]
    batch = [
        event(n, time=time.strftime("%Y-%m-%dT%XZ", time.gmtime(moments[n % 3])))
        for n in range(1000)
    ]

    assert api.ingest(batch).status_code == 204
    assert api.value("calls") == 1000


def test_what_the_cloudevents_package_writes_is_accepted(api):
    attributes = {"source": "test", "type": "call", "subject": "customer"}
    headers, body = to_structured(CloudEvent(attributes, {"value": 1}))

    answer = api.post(V1, data=body, headers=headers)

    assert answer.status_code == 204
    assert api.events()[0]["event"]["data"] == {"value": 1}


def test_every_request_can_be_made_to_fail(api):
    api.meter("calls", "COUNT")
    api.put("/sandbox/api/faults", json={"ingest": {"failRate": 1}})

    answers = {api.ingest(event(n)).status_code for n in range(40)}

    assert answers == {500}
    stored = api.value("calls")
    # Each is stored or not with the same chance: all or none is 1 in 2^39.
    assert 0 < stored < 40


def test_a_client_that_repeats_itself_until_204_is_counted_once_per_event(api):
    api.meter("calls", "COUNT")
    api.put("/sandbox/api/faults", json={"ingest": {"failRate": 0.5}})

    for number in range(50):
        while api.ingest(event(number)).status_code != 204:
            pass

    assert api.value("calls") == 50


def test_answers_to_ingest_can_be_late_and_others_are_not():
    with Sandbox(latency=0.5) as sandbox, Api(sandbox.url) as api:
        start = time.monotonic()
        api.ingest(event())

        assert time.monotonic() - start >= 0.5

    with Sandbox(latency=60) as sandbox, Api(sandbox.url) as api:
        assert api.overview()["counts"]  # a client waits no minute


def test_hundreds_of_requests_share_one_connection(api):
    for number in range(300):
        api.ingest(event(number))

    pools = api.get_adapter("http://").poolmanager.pools
    (only,) = pools.keys()
    assert pools[only].num_connections == 1


def test_an_answer_is_sent_without_waiting_for_an_acknowledgement(api):
    host = urlsplit(api.url).netloc
    with socket.create_connection(host.split(":"), timeout=PATIENCE) as client:
        client.sendall(
            f"GET /sandbox/api/overview HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        )
        assert client.recv(12) == b"HTTP/1.1 200"

        with other_end(client) as server:
            assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def other_end(client):
    """Return the socket in this process that *client* is connected to."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # it is closed by now, or no socket
            found = socket.fromfd(int(name), socket.AF_INET, socket.SOCK_STREAM)
            with contextlib.ExitStack() as stack:
                stack.callback(found.close)
                if found.getpeername() == client.getsockname():
                    stack.pop_all()
                    return found
    raise AssertionError("no socket of this process is connected to it")


def _talk(api, sent: bytes) -> bytes:
    address = urlsplit(api.url)
    received = b""
    with socket.create_connection((address.hostname, address.port), 10) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65_536):
            received += part
    return received


def test_requests_that_follow_at_once_on_one_connection_are_all_answered(api):
    body = json.dumps(event()).encode()
    head = f"POST {V1} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {SINGLE}\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    assert _talk(api, request * 3).count(b"HTTP/1.1 204") == 3


def test_a_client_that_expects_100_gets_it_once(api):
    body = json.dumps(event()).encode()
    head = f"POST {V1} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {SINGLE}\r\n"
    head += f"Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"

    answer = _talk(api, head.encode() + body)

    assert answer.count(b"HTTP/1.1 100") == 1
    assert answer.count(b"HTTP/1.1 204") == 1


@pytest.mark.parametrize(
    "headers", ["Content-Length: x", "Content-Length: 99", "Transfer-Encoding: chunked"]
)
def test_a_request_that_cannot_be_read_is_refused_and_the_connection_ends(api, headers):
    sent = f"POST {V1} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\nzz\r\n"

    answer = _talk(api, sent.encode())

    assert answer.startswith(b"HTTP/1.1 400")
    assert b"Connection: close" in answer
