"""No request waits for the network, for the disk, or for a lock held over either."""

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from werkzeug.test import Client

from apps import listed
from openmeter_wsgi import OpenMeterMiddleware
from spooling import PATIENCE

#: Requests of each thread, and number of threads.
REQUESTS, THREADS = 1_500, 4
#: More than a segment holds, so that requests also seal one and make the next.
SPOOLED = {"spool_dir": "spool", "max_spool_bytes": 2**26}
CALLS = [
    (os, "fsync"),
    (os, "fdatasync"),
    (socket.socket, "connect"),
    (socket.socket, "sendall"),
    (socket.socket, "recv_into"),
    (socket, "getaddrinfo"),
]


class Probe:
    """Stands before calls that may take long: holds our threads in them, and counts."""

    def __init__(self):
        self.by_requests = []
        self.held = threading.Event()
        self.released = threading.Event()

    def before(self, call, name):
        def probed(*args, **kwargs):
            thread = threading.current_thread().name
            if thread.startswith("request"):
                self.by_requests.append(name)
            elif thread.startswith("openmeter_wsgi"):
                self.held.set()
                assert self.released.wait(PATIENCE)
            return call(*args, **kwargs)

        return probed


@pytest.fixture
def probe(monkeypatch):
    made = Probe()
    for owner, name in CALLS:
        probed = made.before(getattr(owner, name), name)
        monkeypatch.setattr(owner, name, probed, raising=False)
    yield made
    made.released.set()


@pytest.mark.parametrize("options", [{}, SPOOLED], ids=["memory", "spool"])
def test_requests_end_while_delivery_is_held_in_a_slow_call(
    openmeter, probe, tmp_path, monkeypatch, options
):
    monkeypatch.chdir(tmp_path)
    middleware = OpenMeterMiddleware(
        listed, meters={"r": 1}, subject=lambda environ: "acme" * 40,
        api_url=openmeter.url, flush_interval=0.02, batch_size=10, **options,
    )  # fmt: skip
    client = Client(middleware)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="request") as pool:

        def serve(count):
            serving = [
                pool.submit(lambda: [client.get("/").close() for _ in range(count)])
                for _ in range(THREADS)
            ]
            for each in serving:
                each.result(PATIENCE)

        serve(10)
        assert probe.held.wait(
            PATIENCE
        )  # a thread of ours is in such a call, and stays
        serve(REQUESTS)

        assert probe.by_requests == []
        probe.released.set()

    assert middleware.flush(PATIENCE)
    assert middleware.stats().delivered == THREADS * (10 + REQUESTS)
    middleware.close(PATIENCE)
