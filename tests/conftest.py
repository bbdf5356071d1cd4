"""Fixtures of all tests: a server to send to, and isolation from the machine."""

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

# No deadline: a busy machine must not fail a test. Benchmarks measure the speed.
settings.register_profile("tests", deadline=None)
settings.register_profile("long", deadline=None, max_examples=3_000)
settings.load_profile("tests")


#: The modules that `make test-pythons` runs with other versions of Python and of the
#: dependencies.
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
    """Mark the tests of the core modules with ``core``."""
    for item in items:
        if getattr(item, "module", None) and item.module.__name__ in CORE:
            item.add_marker(pytest.mark.core)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path_factory):
    """Hide the developer's keys, proxies, CA bundles and .netrc from a test."""
    for name in list(os.environ):
        if name.lower() in _FOREIGN or name.startswith("OPENMETER_"):
            monkeypatch.delenv(name)
    nowhere = tmp_path_factory.getbasetemp() / "no-netrc"
    monkeypatch.setenv("NETRC", str(nowhere))


@pytest.fixture(autouse=True)
def _own_threads(caplog):
    """Ignore log lines of earlier tests' threads; wait until this test's have ended."""
    # Compare threads and not their numbers, which the system uses again.
    earlier = begin_test() - {threading.current_thread()}
    caplog.handler.addFilter(lambda _: threading.current_thread() not in earlier)
    yield
    # This fixture is set up first and so ends last: the others have closed everything.
    until(lambda: not _leaked(), failure=lambda: [str(t) for t in _leaked()])


def _leaked():
    # A sandbox that several tests share may have open connections.
    sandbox = "openmeter_wsgi.sandbox"
    return [t for t in threads("openmeter_wsgi") if not t.name.startswith(sandbox)]


@pytest.fixture(autouse=True)
def _fresh_log():
    """Forget repeated log lines, which RepeatFilter would suppress in the next test."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("openmeter_wsgi"):
            logger = logging.getLogger(name)
            for old in [f for f in logger.filters if isinstance(f, RepeatFilter)]:
                logger.removeFilter(old)
                logger.addFilter(RepeatFilter())


@pytest.fixture
def entitled(openmeter):
    """The entitlements that the server knows; a test can change them."""
    return Entitled(openmeter)


@pytest.fixture
def middlewares(openmeter):
    """A list of middlewares that are closed after the test, with a healthy server."""
    made = []
    yield made
    openmeter.heal()
    for each in made:
        each.process().entitlements.close_connections()
    close_all(made)


@pytest.fixture
def patient_ledger(monkeypatch):
    """Let requests wait longer for the ledger, as a busy machine may need it."""
    monkeypatch.setattr("openmeter_wsgi.quota.sqlite.STORE_TIMEOUT", PATIENCE)
    monkeypatch.setattr("openmeter_wsgi.quota.sqlite._MEMORY_TIMEOUT", PATIENCE)
    monkeypatch.setattr("openmeter_wsgi.quota.account._LOCK_TIMEOUT", PATIENCE)


@pytest.fixture
def quick_path():
    """A temporary directory, in memory if possible, where fsync takes no time."""
    parent = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        yield Path(directory)


@pytest.fixture
def sandbox():
    """A sandbox for one test."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def api(sandbox):
    """A client of the sandbox's API."""
    with Api(sandbox.url) as api:
        yield api


@pytest.fixture
def openmeter(monkeypatch):
    """A fake OpenMeter server that accepts all events unless a test changes it.

    Workers of `spool_support` put events for this server.
    """
    with OpenMeterServer() as server:
        monkeypatch.setenv("SPOOL_SERVER", server.url)
        yield server
