"""No text of others brings a secret, or another line, into the log or into health()."""

import logging
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.test import Client

from apps import listed
from openmeter_server import Answer, problem
from openmeter_wsgi import ConfigError, OpenMeterMiddleware
from openmeter_wsgi.log import clean
from openmeter_wsgi.policy import Policy
from openmeter_wsgi.stats import HealthEndpoint
from spooling import until

FORGED = "\nERROR shutdown: 9 events are lost\x1b[2K\x85\u202e\u2028\u2066end"


@pytest.fixture
def serve(caplog):
    caplog.set_level(logging.DEBUG, "openmeter_wsgi")
    made = []

    def serve(url, **options):
        middleware = OpenMeterMiddleware(
            listed, meters={"r": 1}, subject=lambda environ: "acme", api_url=url,
            api_key="om_SECRET/key", flush_interval=0.02, **options,
        )  # fmt: skip
        made.append(middleware)
        Client(middleware).get("/").close()
        until(lambda: not middleware.health().ok)
        return Client(HealthEndpoint(middleware.health)).get("/").text

    yield serve
    for middleware in made:
        middleware.process().transport._worker.stop()  # no server takes what waits


def assert_clean(caplog, page):
    for record in caplog.records:
        assert record.getMessage().isprintable()
    assert "SECRET" not in page + caplog.text


@pytest.mark.parametrize(
    "proxy",
    [
        "http://user:PROXYSECRET#1@127.0.0.1:1",
        "http://user:PROXYSECRET@127.0.0.1:1",
        "http://user:PROXYSECRET/1@127.0.0.1:1",
        "http://user:PROXYSECRET@127.0.0.1:port",
        "user:PROXYSECRET@127.0.0.1:port",
        "http://[PROXYSECRET@127.0.0.1",
    ],
)
def test_the_password_of_a_proxy_is_not_told(serve, caplog, monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)

    page = serve("http://openmeter.example")

    assert "held" in page or "unavailable" in page
    assert_clean(caplog, page)


@pytest.mark.parametrize("key", ["om_SECRET/key", "om_SECRET%2Fkey"])
def test_the_key_is_not_told_where_a_server_repeats_it(serve, caplog, openmeter, key):
    location = f"/login?key={key}"
    openmeter.rule = lambda _: Answer(302, b"", {"Location": location})

    page = serve(openmeter.url)

    assert "login" in page
    assert_clean(caplog, page)


@pytest.mark.parametrize("status", [400, 401, 503])
def test_what_a_server_says_is_one_line(serve, caplog, openmeter, status):
    openmeter.rule = lambda _: problem(status, FORGED + " Bearer om_SECRET/key")

    page = serve(openmeter.url)

    assert_clean(caplog, page)


def test_what_stands_in_place_of_a_status_line_is_one_line(serve, caplog):
    def answer():
        connection, _ = listener.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(b"om_SECRET/key\x1b[2KERROR\x85\r\n" * 3)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        page = serve(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()

    assert_clean(caplog, page)


def test_a_path_of_a_client_is_one_line(caplog):
    caplog.set_level(logging.DEBUG, "openmeter_wsgi")

    def missing(environ, start_response):
        start_response("404 Not Found", [])
        return []

    middleware = OpenMeterMiddleware(
        missing,
        meters={"r": 1}, subject=lambda environ: "acme", dry_run=True,
    )  # fmt: skip
    environ = {"PATH_INFO": f"/x{FORGED}", "REQUEST_METHOD": "GET"}
    middleware(environ, lambda *_: lambda _: None).close()

    (record,) = [r for r in caplog.records if "not billed" in r.getMessage()]
    assert record.getMessage().isprintable()


@pytest.mark.parametrize(
    "url",
    ["ftp://user:SECRET@host", "http://user:SECRET@host/?x", "//user:SECRET@host"],
)
def test_a_refused_address_is_told_without_its_password(url):
    with pytest.raises(ConfigError) as caught:
        Policy(api_url=url)

    assert "SECRET" not in str(caught.value)


@given(st.text(), st.integers(1, 100))
def test_a_text_from_elsewhere_becomes_one_line_of_bounded_length(text, limit):
    cleaned = clean(text, limit)

    assert cleaned.isprintable()
    assert len(cleaned) <= limit
