"""What all tests share: a server to send to, and nothing of the machine they run on."""

import logging
import os
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings

from entitling import Entitled, close_all
from openmeter_server import OpenMeterServer
from openmeter_wsgi.log import RepeatFilter
from openmeter_wsgi.sandbox import Sandbox
from spooling import PATIENCE, begin_test, threads, until
from test_sandbox_support import Api

_FOREIGN = {
    "http_proxy", "https_proxy", "all_proxy", "no_proxy", "netrc",
    "requests_ca_bundle", "curl_ca_bundle", "ssl_cert_file", "ssl_cert_dir",
}  # fmt: skip

#: A busy machine is no fault of the code: what is slow shows in the benchmarks.
settings.register_profile("tests", deadline=None)
settings.register_profile("long", deadline=None, max_examples=3_000)
settings.load_profile("tests")


#: The modules that `make test-pythons` runs: another interpreter, or another version of
#: a dependency, would show there.
CORE = {
    f"test_{name}"
    for name in (
        "command_line", "decorators", "django", "entitlements", "flask", "fork",
        "forms", "journal", "ledger", "lock", "meters", "policy", "progress",
        "response", "routes", "sender", "spool_files", "stats", "status_codes",
        "subject", "zuplo",
    )
}  # fmt: skip


def pytest_collection_modifyitems(items):
    """Mark the tests of these modules with ``core``."""
    for item in items:
        if getattr(item, "module", None) and item.module.__name__ in CORE:
            item.add_marker(pytest.mark.core)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path_factory):
    """No key, proxy, CA bundle or .netrc of the developer's reaches a test."""
    for name in list(os.environ):
        if name.lower() in _FOREIGN or name.startswith("OPENMETER_"):
            monkeypatch.delenv(name)
    nowhere = tmp_path_factory.getbasetemp() / "no-netrc"
    monkeypatch.setenv("NETRC", str(nowhere))


@pytest.fixture(autouse=True)
def _own_threads(caplog):
    """No thread of another test is taken for one of this, and none is left behind."""
    # The threads, not their numbers: a new thread may get that of one that ended.
    earlier = begin_test() - {threading.current_thread()}
    caplog.handler.addFilter(lambda _: threading.current_thread() not in earlier)
    yield
    # Set up first, this ends last: all that a test made is closed by now.
    until(lambda: not _left_behind(), told=lambda: [str(t) for t in _left_behind()])


def _left_behind():
    # A sandbox that several tests share may have connections that are open.
    sandbox = "openmeter_wsgi.sandbox"
    return [t for t in threads("openmeter_wsgi") if not t.name.startswith(sandbox)]


@pytest.fixture(autouse=True)
def _fresh_log():
    """A line thinned out in one test is written again in the next."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("openmeter_wsgi"):
            logger = logging.getLogger(name)
            for old in [f for f in logger.filters if isinstance(f, RepeatFilter)]:
                logger.removeFilter(old)
                logger.addFilter(RepeatFilter())


@pytest.fixture
def entitled(openmeter):
    """The answers of the server about entitlements, which a test changes."""
    return Entitled(openmeter)


@pytest.fixture
def middlewares(openmeter):
    """A list of middlewares that are closed after the test, by a healthy server."""
    made = []
    yield made
    openmeter.heal()
    for each in made:
        each.process().entitlements.close_connections()
    close_all(made)


@pytest.fixture
def patient_ledger(monkeypatch):
    """No request passes only because a busy machine gives it no turn in time."""
    monkeypatch.setattr("openmeter_wsgi.quota.sqlite.STORE_TIMEOUT", PATIENCE)
    monkeypatch.setattr("openmeter_wsgi.quota.sqlite._MEMORY_TIMEOUT", PATIENCE)
    monkeypatch.setattr("openmeter_wsgi.quota.account._LOCK_TIMEOUT", PATIENCE)


@pytest.fixture
def quick_path():
    """A directory in memory, where there is one: to sync a file there takes no time."""
    room = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=room) as directory:
        yield Path(directory)


@pytest.fixture
def sandbox():
    """A sandbox of the test's own."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def api(sandbox):
    """A session of requests to that sandbox."""
    with Api(sandbox.url) as api:
        yield api


@pytest.fixture
def openmeter(monkeypatch):
    """A fake of OpenMeter's ingest that accepts everything until told otherwise.

    Workers of the test (`spool_support`) put their events for it.
    """
    with OpenMeterServer() as server:
        monkeypatch.setenv("SPOOL_SERVER", server.url)
        yield server
