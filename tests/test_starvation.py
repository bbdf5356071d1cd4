"""uWSGI without threads: its detection, and the delivery of a spool there."""

import logging
import sys
import threading
import time
import types

import pytest

from openmeter_wsgi import lock
from openmeter_wsgi.threads import threads_starve
from spooling import event, server_dir, spool_queue, threads


@pytest.fixture
def uwsgi(monkeypatch):
    """Return a function that makes this process look like a uWSGI's."""

    def make(version=(2, 0, 21, 0, b"debian"), **options):
        module = types.ModuleType("uwsgi")
        module.version_info = version
        module.opt = {name.replace("_", "-"): v for name, v in options.items()}
        monkeypatch.setitem(sys.modules, "uwsgi", module)

    return make


@pytest.mark.parametrize(
    ("version", "options", "starve"),
    [
        ((2, 0, 21, 0, b"debian"), {"master": True}, True),
        ((2, 0, 26, 0, b""), {}, True),
        ((2, 0, 21, 0, b""), {"enable_threads": b"false"}, True),
        ((2, 0, 21, 0, b""), {"enable_threads": True}, False),
        ((2, 0, 21, 0, b""), {"enable_threads": b"true"}, False),
        ((2, 0, 21, 0, b""), {"threads": b"2"}, False),
        ((2, 0, 27, 0, b""), {}, False),
        ((2, 1, 0, 0, b""), {}, False),
    ],
)
def test_an_old_uwsgi_starves_threads_unless_it_is_told(
    uwsgi, version, options, starve
):
    uwsgi(version, **options)
    assert threads_starve() is starve


def test_under_any_other_server_threads_run(monkeypatch):
    assert not threads_starve()
    # A module of that name which no server has made.
    monkeypatch.setitem(sys.modules, "uwsgi", types.ModuleType("uwsgi"))
    assert not threads_starve()


def test_a_process_without_threads_delivers_at_flush_and_close(
    uwsgi, openmeter, tmp_path, caplog
):
    uwsgi()
    spool = tmp_path / "spool"
    queue = spool_queue(spool, openmeter.url)
    queue.start()
    queue.put(event("1"))

    assert threads("openmeter_wsgi") == []
    with lock.election(server_dir(spool), wait=False) as won:
        assert won  # another process could send
    assert openmeter.requests == []

    assert queue.flush(40)
    assert openmeter.ids == ["1"]
    queue.put(event("2"))
    queue.close(40)
    assert openmeter.ids == ["1", "2"]
    queue.put(event("3"))
    queue.start()
    queue.close_at_exit()
    assert openmeter.ids == ["1", "2", "3"]

    said = [r for r in caplog.records if "leaves threads no time" in r.getMessage()]
    assert [record.levelno for record in said] == [logging.WARNING]
    assert "enable-threads" in said[0].getMessage()


def test_at_its_exit_it_waits_for_its_turn(uwsgi, openmeter, tmp_path):
    uwsgi()
    queue = spool_queue(tmp_path / "spool", openmeter.url)
    queue.put(event("1"))
    closing = threading.Thread(target=queue.close, args=(20,))
    with lock.election(server_dir(tmp_path / "spool")):
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()
        assert openmeter.ids == []
    closing.join()
    assert openmeter.ids == ["1"]


def test_at_its_exit_it_waits_no_longer_than_it_may(uwsgi, openmeter, tmp_path):
    """The spool keeps the waiting events."""
    uwsgi()
    queue = spool_queue(tmp_path / "spool", openmeter.url)
    queue.put(event("1"))
    with lock.election(server_dir(tmp_path / "spool")):
        queue.close(0.1)
    assert openmeter.ids == []

    other = spool_queue(tmp_path / "spool", openmeter.url)
    other.put(event("2"))
    other.close(40)
    assert sorted(openmeter.ids) == ["1", "2"]


def test_a_flush_without_threads_ends_in_time(uwsgi, openmeter, tmp_path):
    """The attempts and the wait for other processes share one deadline."""
    uwsgi()
    queue = spool_queue(tmp_path / "spool", openmeter.url)
    queue.put(event("1"))
    openmeter.down()

    began = time.monotonic()
    assert not queue.flush(3)
    took = time.monotonic() - began
    queue.close(0)
    queue.forget_exit()
    assert took < 5
