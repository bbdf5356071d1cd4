"""An attempt ends at its deadline, for every cause of the delay."""

import contextlib
import socket
import ssl
import threading

import pytest
import trustme

from openmeter_wsgi import deadline
from openmeter_wsgi.connection import Connection
from openmeter_wsgi.delivery.client import OpenMeterClient
from openmeter_wsgi.errors import Unavailable
from openmeter_wsgi.options import ApiKey
from spooling import event, threads, until

NO_KEY = ApiKey.from_options(None, None)
ACCEPTED = b"HTTP/1.1 202 Accepted\r\nContent-Length: 1000000\r\n\r\n"


class Dripping:
    """A server that sends *at_once*, and after that one byte at a time for ever."""

    def __init__(self, at_once=b"", *, tls=None, reads=True):
        self._at_once = at_once
        self._tls = tls
        self._reads = reads
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        while True:
            connection, _ = self._listener.accept()
            if self._ended.is_set():
                connection.close()
                return
            self.connections += 1
            self._threads.append(threading.Thread(target=self._drip, args=[connection]))
            self._threads[-1].start()

    def _drip(self, connection):
        with contextlib.ExitStack() as opened:
            opened.enter_context(contextlib.suppress(OSError))
            opened.enter_context(connection)
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
                opened.enter_context(connection)
            if self._reads:
                connection.recv(65_536)
            connection.sendall(self._at_once)
            while not self._ended.wait(0.02):
                connection.sendall(b"H")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._ended.set()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port)).close()
        for thread in self._threads:
            thread.join()
        self._listener.close()


@contextlib.contextmanager
def ingesting(url, *, timeout=0.5):
    client = OpenMeterClient(url=url, flavor="v1", key=NO_KEY, timeout=timeout)
    try:
        yield client
    finally:
        client.close()


@pytest.mark.parametrize(
    "at_once", [b"", b"HTTP/1.1 204 No Content\r\nX-Long: "], ids=["status", "header"]
)
def test_an_answer_that_comes_byte_by_byte_ends_at_the_deadline(at_once):
    with Dripping(at_once) as server, ingesting(f"http://127.0.0.1:{server.port}") as c:
        for n in range(2):
            with pytest.raises(Unavailable, match="no whole answer within") as caught:
                c.ingest([event(str(n))])
            assert caught.value.ambiguous
        assert server.connections == 2


def test_the_body_of_an_accepted_answer_is_not_waited_for():
    url = "http://127.0.0.1:{}"
    with (
        Dripping(ACCEPTED) as server,
        ingesting(url.format(server.port), timeout=600) as client,
    ):
        client.ingest([event("1")])
        client.ingest([event("2")])


def test_a_body_that_is_needed_ends_at_the_deadline():
    head = ACCEPTED.replace(b"202 Accepted", b"200 OK")
    with Dripping(head) as server:
        connection = Connection(key=NO_KEY, timeout=0.5)
        with pytest.raises(Unavailable, match="no whole answer within"):
            connection.request("GET", f"http://127.0.0.1:{server.port}/")
        connection.close()


def test_a_handshake_that_comes_byte_by_byte_ends_at_the_deadline():
    record = b"\x16\x03\x03\x3f\x00"
    with (
        Dripping(record) as server,
        ingesting(f"https://127.0.0.1:{server.port}") as client,
        pytest.raises(Unavailable),
    ):
        client.ingest([event("1")])


def test_an_answer_over_tls_that_comes_byte_by_byte_ends_at_the_deadline(
    monkeypatch, tmp_path
):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with (
        Dripping(tls=context) as server,
        ingesting(f"https://127.0.0.1:{server.port}", timeout=3) as client,
        pytest.raises(Unavailable, match="no whole answer within"),
    ):
        client.ingest([event("1")])


@pytest.fixture
def hanging_names(monkeypatch):
    """Lets every name resolution hang until the test ends."""
    released = threading.Event()
    resolve = socket.getaddrinfo

    def hang(host, *arguments, flags=0, **options):
        if host != "openmeter.example":
            return resolve(host, *arguments, flags=flags, **options)
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "it is a name")
        released.wait()
        return resolve("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    yield released
    released.set()


def test_a_name_resolution_that_hangs_releases_whoever_waits(hanging_names, openmeter):
    port = openmeter.url.rpartition(":")[2]
    with ingesting(f"http://openmeter.example:{port}", timeout=0.3) as client:
        for _ in range(deadline.MAX_STUCK):
            with pytest.raises(Unavailable) as caught:
                client.ingest([event("1")])
            assert not caught.value.ambiguous
        for _ in range(3):
            with pytest.raises(Unavailable, match="hang already"):
                client.ingest([event("1")])
        assert len(threads("openmeter_wsgi.resolve")) == deadline.MAX_STUCK

        hanging_names.set()
        until(lambda: not threads("openmeter_wsgi.resolve"))


def test_an_idle_connection_has_a_thread_that_sleeps_and_ends_with_it(openmeter):
    with ingesting(openmeter.url, timeout=0.2) as client:
        client.ingest([event("1")])
        (timer,) = threads("openmeter_wsgi.deadline")
        client.ingest([event("2")])
        assert threads("openmeter_wsgi.deadline") == [timer]
    until(lambda: not threads("openmeter_wsgi.deadline"))
    assert openmeter.ids == ["1", "2"]
