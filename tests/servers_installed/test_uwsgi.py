"""uWSGI, which forks in C without Python's hooks, and may not run threads."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import sysconfig
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import openmeter_wsgi
from installed import (
    InstalledServer,
    assert_billed_once,
    deliver_from_elsewhere,
    variables,
    wait_until,
)

if TYPE_CHECKING:
    from openmeter_server import OpenMeterServer

#: The newest uWSGI always runs threads, Debian's only with --enable-threads.
TODAYS = str(Path(sys.executable).with_name("uwsgi"))
DEBIANS = "/usr/bin/uwsgi_python3"
LOADING = {"lazy": ["--lazy-apps"], "forked": []}
RUNNING = {
    "threaded": [TODAYS, "--threads", "2"],
    "todays": [TODAYS],
    "debians": [DEBIANS, "--enable-threads"],
    "no-threads": [DEBIANS],
}
#: With die-on-term a busy worker would end without its exit hooks.
STOPPING = ("--hook-master-start", "unix_signal:15 gracefully_kill_them_all")
WITH_THREADS = ("threaded", "todays", "debians")


def uwsgi(
    loading: str, running: str, log: Path, env: dict[str, str], *, processes: int = 2
) -> InstalledServer:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    # Debian's uWSGI runs Debian's Python, which ignores an editable install.
    package = str(Path(openmeter_wsgi.__file__).parents[1])
    path = [env["PYTHONPATH"], package, sysconfig.get_path("platlib")]
    env = {**env, "PYTHONPATH": os.pathsep.join(path)}
    command = [
        *RUNNING[running], "--http-socket", f"{address[0]}:{address[1]}", "--master",
        "--processes", str(processes), "--need-app", *STOPPING, "--disable-logging",
        "--module", "installed_app", *LOADING[loading],
    ]  # fmt: skip
    server = InstalledServer(command, address, log, env)
    # A worker fails if it is stopped while it still loads the application.
    loaded = processes if loading == "lazy" else 1
    wait_until(lambda: log.read_text().count("(mountpoint='') ready") == loaded)
    return server


@pytest.mark.parametrize(
    ("loading", "running", "queue"),
    list(itertools.product(LOADING, WITH_THREADS, ("memory", "spool"))),
)
def test_events_arrive_while_the_server_is_idle(
    loading: str, running: str, queue: str, openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    spool = {"OPENMETER_SPOOL_DIR": str(tmp_path / "spool")} if queue == "spool" else {}
    env = variables(openmeter, **spool)

    with uwsgi(loading, running, tmp_path / "log", env) as server:
        names = server.load()
        openmeter.wait_for(len(names))
        server.stop()

    assert_billed_once(openmeter, names)


@pytest.mark.parametrize(
    ("running", "run"),
    [*((name, True) for name in WITH_THREADS), ("no-threads", False)],
)
def test_threads_run_between_requests_only_where_they_are_enabled(
    running: str, run: bool, openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    env = variables(openmeter)

    with uwsgi("lazy", running, tmp_path / "log", env, processes=1) as server:
        before = int(server.get("/ticks"))
        threading.Event().wait(1)
        ticks = int(server.get("/ticks")) - before

    assert (ticks > 15) is run
    assert run or ticks <= 3  # threads run only within the two requests


@pytest.mark.parametrize("loading", LOADING)
def test_without_threads_the_exit_delivers_what_waits_in_memory(
    loading: str, openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    with uwsgi(loading, "no-threads", tmp_path / "log", variables(openmeter)) as server:
        names = server.load()
        server.stop()

    assert_billed_once(openmeter, names)


@pytest.mark.parametrize("running", RUNNING)
def test_a_worker_that_is_stopped_in_the_middle_of_a_request_delivers_all(
    running: str, openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    env = variables(openmeter, OPENMETER_FLUSH_INTERVAL="3600")

    with uwsgi("lazy", running, tmp_path / "log", env, processes=1) as server:
        server.get("/", subject="early")
        # The client has the whole body while the worker is still in close().
        server.get("/closes-slowly", subject="late")
        server.stop()

    assert_billed_once(openmeter, {"early", "late"})


@pytest.mark.parametrize("loading", LOADING)
def test_without_threads_another_process_delivers_the_spool(
    loading: str, openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    env = variables(
        openmeter,
        OPENMETER_SPOOL_DIR=str(tmp_path / "spool"),
        OPENMETER_DELIVERY="ship",
    )

    with uwsgi(loading, "no-threads", tmp_path / "log", env) as server:
        names = server.load()
        deliver_from_elsewhere(env)
        openmeter.wait_for(len(names))
        server.stop()

    assert_billed_once(openmeter, names)


@pytest.mark.parametrize("loading", LOADING)
def test_without_threads_an_idle_worker_keeps_nobody_from_delivering_the_spool(
    loading: str, openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    env = variables(openmeter, OPENMETER_SPOOL_DIR=str(tmp_path / "spool"))

    with uwsgi(loading, "no-threads", tmp_path / "log", env) as server:
        names = server.load()
        assert openmeter.ids == []
        deliver_from_elsewhere(env)
        openmeter.wait_for(len(names))
        server.stop()

    assert_billed_once(openmeter, names)
    log = (tmp_path / "log").read_text()
    # One line for each worker that has served.
    assert 1 <= log.count("uWSGI leaves threads no time") <= 2


@pytest.mark.parametrize("loading", LOADING)
def test_without_threads_the_exit_delivers_the_spool(
    loading: str, openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    env = variables(openmeter, OPENMETER_SPOOL_DIR=str(tmp_path / "spool"))

    with uwsgi(loading, "no-threads", tmp_path / "log", env) as server:
        names = server.load()
        server.stop()

    assert_billed_once(openmeter, names)


@pytest.mark.parametrize("running", WITH_THREADS)
def test_where_threads_run_nothing_is_said_of_them(
    running: str, openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    env = variables(openmeter, OPENMETER_SPOOL_DIR=str(tmp_path / "spool"))

    with uwsgi("lazy", running, tmp_path / "log", env) as server:
        names = server.load()
        openmeter.wait_for(len(names))
        server.stop()

    assert "leaves threads no time" not in (tmp_path / "log").read_text()
