"""Tests of the unchanged files in examples/deploy that need only Python."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from deployed import (
    BODY,
    REQUESTS,
    free_address,
    gunicorn,
    make_state_directory,
    read_unit,
    serving,
    settings,
    shipper,
)
from installed import assert_billed_once
from openmeter_wsgi.spool import watermark
from spooling import server_dir, until

if TYPE_CHECKING:
    from pathlib import Path

    from openmeter_server import OpenMeterServer


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_gunicorn_delivers_what_still_waits_when_it_is_stopped(
    worker_class: str, openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    env = settings(openmeter, WORKER_CLASS=worker_class)
    env["OPENMETER_FLUSH_INTERVAL"] = "3600"

    with gunicorn(tmp_path / "log", env) as server:
        names = server.load(REQUESTS, BODY)
        server.stop()

    assert_billed_once(openmeter, names)


def test_of_the_two_units_the_shipper_alone_delivers(
    openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    spool = make_state_directory(tmp_path / "spool")
    app, ship = (read_unit(name, spool) for name in ("app.service", SHIP))
    env = settings(openmeter)
    log = tmp_path / "ship.log"

    # It starts first and ends last, as the unit says.
    with shipper(ship.command, log, env | ship.variables):
        log_of_app = tmp_path / "log"
        server = serving(app.command, free_address(), log_of_app, env | app.variables)
        with server:
            names = server.load(REQUESTS, BODY)
            server.stop(app.stop_signal)

    assert_billed_once(openmeter, names)
    assert f"{REQUESTS} events delivered, 0 dead letters, 0 events" in log.read_text()


def test_waitress_delivers_at_the_signal_that_its_unit_names(
    openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    unit = read_unit("waitress.service", tmp_path / "spool")
    env = settings(openmeter)  # without a spool, where an exit is all there is
    env["OPENMETER_FLUSH_INTERVAL"] = "3600"
    address = free_address()
    command = _listening(unit.command, address)

    with serving(command, address, tmp_path / "log", env) as server:
        names = server.load(REQUESTS, BODY)
        server.stop(unit.stop_signal)

    assert_billed_once(openmeter, names)


def test_what_waitress_leaves_at_a_sigterm_is_shipped(
    openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    spool = make_state_directory(tmp_path / "spool")
    unit, ship = (read_unit(name, spool) for name in ("waitress.service", SHIP))
    env = settings(openmeter)
    address = free_address()
    command = _listening(unit.command, address)
    slow = env | unit.variables | {"OPENMETER_FLUSH_INTERVAL": "3600"}

    with serving(command, address, tmp_path / "log", slow) as server:
        names = server.load(REQUESTS, BODY)
        # A client may have its answer before the response is closed.
        until(
            lambda: (
                watermark.backlog(server_dir(spool, openmeter.url)).events == REQUESTS
            )
        )
        server.process.terminate()
        assert server.process.wait() == -signal.SIGTERM
    with shipper(ship.command, tmp_path / "ship.log", env | ship.variables):
        openmeter.wait_for(len(names))

    assert_billed_once(openmeter, names)


SHIP = "openmeter-ship.service"


def _listening(command: list[str], address: tuple[str, int]) -> list[str]:
    listen = f"--listen={address[0]}:{address[1]}"
    return [listen if word.startswith("--listen") else word for word in command]
