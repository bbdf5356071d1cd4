import contextlib
import email.utils
import json
import logging
import socket
import ssl
import time

import pytest
import trustme

from openmeter_server import (
    CLOSE,
    HANG,
    PAGE,
    PATIENCE,
    RESET,
    TAKEN_BUT_RESET,
    Answer,
    OpenMeterServer,
    problem,
    redirect,
)
from openmeter_wsgi.delivery.client import OpenMeterClient
from openmeter_wsgi.errors import DeliveryError, Misconfigured, Rejected, Unavailable
from openmeter_wsgi.options import ApiKey
from openmeter_wsgi.version import VERSION

NO_KEY = ApiKey.from_options(None, None)


def event(number=1):
    return json.dumps(
        {
            "specversion": "1.0",
            "type": "api_requests",
            "source": "tests",
            "id": f"id-{number}",
            "subject": "alice",
            "data": {"total": 1},
        }
    ).encode()


@pytest.fixture
def connect(openmeter):
    """Makes clients of the fake server, or of another one."""
    made = []

    def connect(url=None, *, key=NO_KEY, flavor="v1", timeout=30.0):
        client = OpenMeterClient(
            url=url or openmeter.url, flavor=flavor, key=key, timeout=timeout
        )
        made.append(client)
        return client

    yield connect
    for client in made:
        client.close()


@pytest.fixture
def ca(tmp_path):
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    return ca


@pytest.fixture
def secure_openmeter(ca):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    with OpenMeterServer(tls=context) as server:
        yield server


def failure(client, *events):
    with pytest.raises(DeliveryError) as caught:
        client.ingest(events or [event()])
    return caught.value


# -- The request


def test_one_event_is_sent_as_the_bare_object(openmeter, connect):
    connect().ingest([event()])

    (request,) = openmeter.requests
    assert request.method == "POST"
    assert request.body == event()
    assert request.headers.get_all("Content-Type") == ["application/cloudevents+json"]


def test_no_cookie_is_kept(openmeter, connect):
    openmeter.script += [Answer(204, b"", {"Set-Cookie": "node=7"})]
    client = connect()
    for number in range(2):
        client.ingest([event(number)])

    assert [r.headers.get("Cookie") for r in openmeter.requests] == [None, None]


def test_nothing_of_a_request_is_left_in_the_next_one(openmeter, connect):
    client = connect()
    client.ingest([event(1), event(2), event(3)])
    client.ingest([event(4)])
    client.ingest([event(5), event(6)])

    assert [request.ids for request in openmeter.requests] == [
        ["id-1", "id-2", "id-3"], ["id-4"], ["id-5", "id-6"],
    ]  # fmt: skip
    lengths = [len(request.body) for request in openmeter.requests]
    assert [int(r.headers["Content-Length"]) for r in openmeter.requests] == lengths


def test_several_events_are_sent_as_an_array(openmeter, connect):
    connect().ingest([event(1), event(2), event(3)])

    (request,) = openmeter.requests
    assert request.ids == ["id-1", "id-2", "id-3"]
    assert request.headers.get_all("Content-Type") == [
        "application/cloudevents-batch+json"
    ]
    assert request.headers["Content-Length"] == str(len(request.body))
    assert request.headers["Content-Encoding"] is None


@pytest.mark.parametrize(
    ("flavor", "path"),
    [
        ("v1", "/api/v1/events"),
        ("v3", "/api/v3/openmeter/events"),
    ],
)
def test_the_path_is_that_of_the_version(openmeter, connect, flavor, path):
    connect(flavor=flavor).ingest([event()])

    assert [request.target for request in openmeter.requests] == [path]
    assert openmeter.ids == ["id-1"]


def test_kong_konnect_has_version_3_at_another_path(openmeter, connect, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", openmeter.url)
    openmeter.rule = lambda _: Answer(202)

    connect("http://eu.api.konghq.com", flavor="v3").ingest([event()])

    (request,) = openmeter.requests
    assert request.target == "http://eu.api.konghq.com/v3/openmeter/events"
    assert openmeter.ids == ["id-1"]


def test_a_path_in_the_url_comes_before_it(openmeter, connect):
    openmeter.rule = lambda _: Answer(204)

    connect(openmeter.url + "/gateway").ingest([event()])

    assert openmeter.requests[0].target == "/gateway/api/v1/events"


def test_the_user_agent_is_name_and_version(openmeter, connect):
    connect().ingest([event()])

    assert openmeter.requests[0].headers["User-Agent"] == f"openmeter_wsgi/{VERSION}"


@pytest.mark.parametrize("status", [200, 201, 202, 204, 206, 226])
def test_one_connection_serves_for_many_batches(openmeter, connect, status):
    openmeter.rule = lambda _: Answer(status, takes=True)
    client = connect()

    for number in range(5):
        client.ingest([event(number)])

    assert len({request.connection for request in openmeter.requests}) == 1


def test_a_refusal_keeps_the_connection(openmeter, connect):
    openmeter.script += [problem(400, "no"), problem(503)]
    client = connect()

    failure(client)
    failure(client)
    client.ingest([event()])

    assert len({request.connection for request in openmeter.requests}) == 1


def test_a_connection_that_the_server_has_closed_meanwhile_is_not_used(
    openmeter, connect
):
    client = connect()
    client.ingest([event(1)])
    openmeter.down()
    openmeter.up()

    client.ingest([event(2)])

    assert openmeter.ids == ["id-1", "id-2"]


def test_a_closed_client_opens_a_new_connection(openmeter, connect):
    client = connect()
    client.ingest([event(1)])
    client.close()
    client.close()

    client.ingest([event(2)])

    assert openmeter.ids == ["id-1", "id-2"]


# -- The answer


@pytest.mark.parametrize("status", [200, 201, 202, 204, 206, 226])
def test_these_answers_are_a_delivery(openmeter, connect, status):
    openmeter.rule = lambda _: Answer(status, takes=True)

    connect().ingest([event()])

    assert openmeter.ids == ["id-1"]


@pytest.mark.parametrize(
    ("status", "kind", "ambiguous"),
    [
        (300, Misconfigured, False),
        (304, Misconfigured, False),
        (400, Rejected, False),
        (401, Misconfigured, False),
        (402, Misconfigured, False),
        (403, Misconfigured, False),
        (404, Misconfigured, False),
        (405, Misconfigured, False),
        (408, Unavailable, False),
        (409, Misconfigured, False),
        (412, Misconfigured, False),
        (413, Rejected, False),
        (415, Misconfigured, False),
        (422, Misconfigured, False),
        (429, Unavailable, False),
        (500, Unavailable, True),
        (502, Unavailable, True),
        (503, Unavailable, True),
        (504, Unavailable, True),
        (507, Unavailable, True),
    ],
)
def test_every_other_answer_says_what_to_do(
    openmeter, connect, status, kind, ambiguous
):
    openmeter.rule = lambda _: problem(status, "why")

    error = failure(connect())

    assert type(error) is kind
    assert (error.status, error.ambiguous) == (status, ambiguous)


@pytest.mark.parametrize(
    "answer",
    [
        PAGE,
        Answer(200, b"  \n<html></html>", {"Content-Type": "text/plain"}, takes=False),
        Answer(202, b"<HTML>", takes=False),
        Answer(200, b"", {"Content-Type": "text/html"}, takes=False),
        Answer(200, b"Sign in", {"Content-Type": "Text/HTML"}, takes=False),
    ],
)
def test_a_web_page_is_no_delivery(openmeter, connect, answer):
    openmeter.rule = lambda _: answer

    error = failure(connect())

    assert isinstance(error, Misconfigured)
    assert "web page" in error.reason


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(openmeter, connect, status):
    openmeter.rule = lambda _: redirect(status, openmeter.url + "/elsewhere")

    error = failure(connect())

    assert isinstance(error, Misconfigured)
    assert "/elsewhere" in error.reason
    assert len(openmeter.requests) == 1


def test_the_reason_is_the_detail_of_the_problem(openmeter, connect):
    openmeter.rule = lambda _: problem(400, "Error at “/3/data”:\n value")

    assert failure(connect()).reason == "Error at “/3/data”: value"


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (
            b"<!DOCTYPE html>\n<html><head>\n<title>404 Not\nFound</title>",
            "an HTML page titled '404 Not Found': is this OpenMeter?",
        ),
        (b"<html><body>Bad gateway</body></html>", "an HTML page: is this OpenMeter?"),
        (b"<title>no page", "<title>no page"),
    ],
)
def test_the_reason_of_a_web_page_is_its_title(openmeter, connect, page, reason):
    openmeter.rule = lambda _: Answer(404, page, takes=False)

    assert failure(connect()).reason == reason


def test_the_reason_is_its_title_where_there_is_no_detail(openmeter, connect):
    openmeter.rule = lambda _: problem(500)

    assert failure(connect()).reason == "Internal Server Error"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"no healthy upstream\r\n", "no healthy upstream"),
        (b"", ""),
        (b"\xff\x00\x1b[31m[1]", "\ufffd [31m[1]"),
        (b"[1, 2]", "[1, 2]"),
        (b'{"detail": {"a": 1}}', "{'a': 1}"),
    ],
)
def test_the_reason_is_else_what_was_said_on_one_line(openmeter, connect, body, reason):
    openmeter.rule = lambda _: Answer(502, body)

    assert failure(connect()).reason == reason


@pytest.mark.parametrize("size", [65_535, 65_536, 1_000_000])
def test_of_a_long_answer_little_is_kept(openmeter, connect, size):
    openmeter.script.append(Answer(500, b"x" * size))
    client = connect()

    assert failure(client).reason == "x" * 500
    client.ingest([event()])
    assert openmeter.ids == ["id-1"]


def test_an_answer_that_breaks_off_counts_by_its_status(openmeter, connect):
    openmeter.script += [
        Answer(200, b"{", {"Content-Encoding": "gzip"}),
        Answer(400, b"{", {"Content-Encoding": "gzip"}),
    ]
    client = connect()

    client.ingest([event()])

    assert isinstance(failure(client), Rejected)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("3600", 3600.0),
        ("86400", 3600.0),
        ("9" * 400, 3600.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0),
        ("soon", None),
        ("", None),
        ("-5", None),
        ("1.5", None),
        ("0x10", None),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_read_or_ignored(openmeter, connect, status, value, seconds):
    openmeter.rule = lambda _: Answer(status, b"", {"Retry-After": value})

    assert failure(connect()).retry_after == seconds


def test_retry_after_may_be_a_date(openmeter, connect):
    date = email.utils.formatdate(time.time() + 120, usegmt=True)
    openmeter.rule = lambda _: Answer(503, b"", {"Retry-After": date})

    assert failure(connect()).retry_after == pytest.approx(119, abs=3)


# -- No answer


@pytest.mark.parametrize("answer", [CLOSE, RESET, TAKEN_BUT_RESET])
def test_a_broken_connection_leaves_it_open_what_arrived(openmeter, connect, answer):
    openmeter.script.append(answer)

    error = failure(connect())

    assert isinstance(error, Unavailable)
    assert (error.status, error.ambiguous) == (None, True)


def test_a_server_that_hangs_is_given_up_after_the_timeout(openmeter, connect):
    openmeter.script.append(HANG)
    began = time.monotonic()

    error = failure(connect(timeout=0.3))

    assert 0.3 <= time.monotonic() - began < PATIENCE / 2
    assert isinstance(error, Unavailable)
    assert (error.status, error.ambiguous) == (None, True)


def test_a_refused_connection_is_certain_not_to_have_arrived(openmeter, connect):
    openmeter.down()

    error = failure(connect())

    assert isinstance(error, Unavailable)
    assert (error.status, error.ambiguous) == (None, False)


def test_an_unknown_host_is_certain_not_to_have_arrived(connect):
    error = failure(connect("http://openmeter.invalid"))

    assert isinstance(error, Unavailable)
    assert not error.ambiguous


# -- The key


def test_a_server_that_repeats_the_key_does_not_bring_it_into_the_log(
    openmeter, connect
):
    openmeter.script.append(problem(403, "the key om_secret is revoked"))
    client = connect(key=ApiKey.from_options("om_secret", None))

    error = failure(client, event())

    assert error.reason == "the key [api_key] is revoked"


def test_without_a_key_no_authorization_is_sent(openmeter, connect):
    connect().ingest([event()])

    assert openmeter.requests[0].headers["Authorization"] is None


def test_the_key_is_sent_as_bearer_without_surrounding_white_space(openmeter, connect):
    connect(key=ApiKey.from_options(" om_secret\r\n", None)).ingest([event()])

    assert openmeter.requests[0].headers.get_all("Authorization") == [
        "Bearer om_secret"
    ]


@pytest.mark.parametrize(
    ("key", "sent"), [(None, None), ("om_secret", "Bearer om_secret")]
)
def test_a_netrc_replaces_nothing(openmeter, connect, monkeypatch, tmp_path, key, sent):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login mallory password wrong\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))

    connect(key=ApiKey.from_options(key, None)).ingest([event()])

    assert openmeter.requests[0].headers["Authorization"] == sent


def authorize(key):
    def rule(request):
        right = request.headers["Authorization"] == f"Bearer {key}"
        return None if right else problem(401, "bad key")

    return rule


def test_a_rotated_key_file_is_read_again_and_the_batch_accepted_at_once(
    openmeter, connect, tmp_path
):
    file = tmp_path / "key"
    file.write_text("old\n")
    client = connect(key=ApiKey.from_options(None, file))
    client.ingest([event(1)])
    file.write_text("new\n")
    openmeter.rule = authorize("new")

    client.ingest([event(2), event(3)])

    assert openmeter.ids == ["id-1", "id-2", "id-3"]
    assert [r.headers["Authorization"] for r in openmeter.requests] == [
        "Bearer old",
        "Bearer old",
        "Bearer new",
    ]


def test_the_same_key_is_not_tried_twice(openmeter, connect):
    openmeter.rule = authorize("new")

    error = failure(connect(key=ApiKey.from_options("old", None)))

    assert isinstance(error, Misconfigured)
    assert error.status == 401
    assert len(openmeter.requests) == 1


def test_another_key_that_is_wrong_too_is_held(openmeter, connect):
    keys = iter(["old", "older", "new"])
    openmeter.rule = authorize("new")
    client = connect(key=ApiKey.from_options(lambda: next(keys), None))

    assert failure(client).status == 401
    client.ingest([event()])

    assert openmeter.ids == ["id-1"]
    assert len(openmeter.requests) == 4


def test_nothing_is_sent_while_the_key_cannot_be_read(openmeter, connect):
    def read():
        raise ConnectionError("the vault is sealed")

    error = failure(connect(key=ApiKey.from_options(read, None)))

    assert isinstance(error, Misconfigured)
    assert "the vault is sealed" in error.reason
    assert openmeter.requests == []


def test_a_key_that_cannot_be_read_again_is_held_and_asked_for_anew(
    openmeter, connect, tmp_path
):
    file = tmp_path / "key"
    file.write_text("old")
    client = connect(key=ApiKey.from_options(None, file))
    file.unlink()
    openmeter.rule = authorize("new")

    error = failure(client)
    assert isinstance(error, Misconfigured)
    assert error.status == 401
    assert isinstance(failure(client), Misconfigured)
    assert len(openmeter.requests) == 1

    file.write_text("new")
    client.ingest([event()])
    assert openmeter.ids == ["id-1"]


@pytest.mark.parametrize(
    "answer", [problem(401, "no"), problem(403), RESET, PAGE, redirect(301, "/")]
)
def test_the_key_is_in_no_error_and_in_no_log(openmeter, connect, caplog, answer):
    caplog.set_level(logging.DEBUG)
    openmeter.rule = lambda _: answer

    error = failure(connect(key=ApiKey.from_options("om_secret", None)))

    assert openmeter.requests[0].headers["Authorization"] == "Bearer om_secret"
    assert "om_secret" not in f"{error!r} {error} {error.__cause__!r}"
    assert "om_secret" not in caplog.text


# -- Proxies and certificates


def test_a_proxy_of_the_environment_is_used(openmeter, connect, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", openmeter.url)
    openmeter.rule = lambda _: Answer(204)

    connect("http://openmeter.invalid:8888").ingest([event()])

    (request,) = openmeter.requests
    assert request.target == "http://openmeter.invalid:8888/api/v1/events"
    assert openmeter.ids == ["id-1"]


def test_no_proxy_is_honoured(openmeter, connect, monkeypatch):
    with OpenMeterServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

        connect().ingest([event()])

        assert proxy.requests == []
    assert openmeter.requests[0].target == "/api/v1/events"


def test_a_proxy_that_is_down_is_waited_for(openmeter, connect, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", openmeter.url)
    openmeter.down()

    error = failure(connect("http://openmeter.invalid"))

    assert isinstance(error, Unavailable)
    assert not error.ambiguous


def test_a_proxy_that_breaks_off_leaves_it_open_what_arrived(
    openmeter, connect, monkeypatch
):
    monkeypatch.setenv("HTTP_PROXY", openmeter.url)
    openmeter.script.append(RESET)

    error = failure(connect("http://openmeter.invalid"))

    assert isinstance(error, Unavailable)
    assert error.ambiguous


def test_a_tunnel_that_a_proxy_refuses_is_certain_not_to_have_arrived(
    openmeter, connect, monkeypatch
):
    monkeypatch.setenv("HTTPS_PROXY", openmeter.url)
    openmeter.rule = lambda _: Answer(403, b"not from here")

    error = failure(connect("https://openmeter.invalid"))

    assert openmeter.requests[0].method == "CONNECT"
    assert isinstance(error, Unavailable)
    assert "403" in error.reason
    assert not error.ambiguous


def test_the_reason_of_no_answer_is_what_the_system_said_and_where(openmeter, connect):
    openmeter.down()
    address = openmeter.url.removeprefix("http://")

    assert failure(connect()).reason == f"{address}: Connection refused"
    unknown = failure(connect("http://openmeter.invalid")).reason
    assert unknown.startswith("openmeter.invalid: ")
    assert "HTTPConnection" not in unknown


def test_a_server_that_cannot_be_connected_to_in_time_has_got_nothing(connect):
    # A socket that listens and whose backlog is full takes no further connection.
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen(0)
        address = busy.getsockname()
        with socket.create_connection(address):
            error = failure(connect("http://{}:{}".format(*address), timeout=0.3))

    assert isinstance(error, Unavailable)
    assert not error.ambiguous


def test_a_certificate_of_a_known_authority_is_accepted(
    secure_openmeter, connect, monkeypatch, tmp_path
):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))

    connect(secure_openmeter.url).ingest([event()])

    assert secure_openmeter.ids == ["id-1"]


def test_a_certificate_of_an_unknown_authority_is_held(
    secure_openmeter, connect, monkeypatch, tmp_path
):
    client = connect(secure_openmeter.url)

    error = failure(client)
    assert isinstance(error, Misconfigured)
    assert "certificate" in error.reason.lower()
    assert secure_openmeter.requests == []

    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    client.ingest([event()])
    assert secure_openmeter.ids == ["id-1"]


def test_a_certificate_for_another_host_is_held(
    secure_openmeter, connect, monkeypatch, tmp_path
):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))

    url = secure_openmeter.url.replace("127.0.0.1", "localhost")

    assert isinstance(failure(connect(url)), Misconfigured)


def test_a_ca_bundle_that_is_missing_is_held(
    secure_openmeter, connect, monkeypatch, tmp_path
):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))

    error = failure(connect(secure_openmeter.url))

    assert isinstance(error, Misconfigured)
    assert "missing.pem" in error.reason


@pytest.mark.parametrize("answer", [CLOSE, RESET])
def test_a_broken_secure_connection_leaves_it_open_what_arrived(
    secure_openmeter, connect, monkeypatch, tmp_path, answer
):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    secure_openmeter.script.append(answer)

    error = failure(connect(secure_openmeter.url))

    assert isinstance(error, Unavailable)
    assert error.ambiguous


# -- The server's clock


def test_the_clock_of_the_server_is_known_from_its_last_answer_with_a_date(
    openmeter, connect
):
    client = connect()
    answers = [
        (Answer(204), 0),
        (dated(-7_200), 7_200),
        (Answer(204), 7_200),
        (Answer(204, headers={"Date": "yesterday"}), 7_200),
        (dated(600, 503), -600),
        (dated(0, 400), 0),
    ]
    for number, (answer, ahead) in enumerate(answers):
        openmeter.script.append(answer)
        with contextlib.suppress(DeliveryError):
            client.ingest([event(number)])

        # The date has whole seconds, and a busy machine takes its time.
        assert abs(client.clock_ahead - ahead) < 30


def dated(ahead, status=204):
    return Answer(
        status,
        headers={"Date": email.utils.formatdate(time.time() + ahead, usegmt=True)},
    )


@pytest.mark.parametrize("status", [101, 102, 103])
def test_what_comes_in_place_of_an_answer_is_in_doubt_and_ends_the_connection(
    openmeter, connect, status
):
    client = connect()
    openmeter.script += [Answer(status), Answer(204), problem(400)]

    error = failure(client)
    assert type(error) is Unavailable
    assert error.ambiguous

    client.ingest([event(2)])
    assert type(failure(client)) is Rejected
