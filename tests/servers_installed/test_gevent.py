"""gevent workers, in which a blocking call would block every request."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

import pytest

from installed import InstalledServer, assert_billed_once, variables
from servers import GUNICORN

if TYPE_CHECKING:
    from pathlib import Path

    from openmeter_server import OpenMeterServer


#: A server that calls gevent's monkey.patch_all() after the application was made.
PATCHED_LATE = """
import sys
from installed_app import application
from gevent import monkey
monkey.patch_all()
from gevent.pywsgi import WSGIServer
import gevent, signal
server = WSGIServer(("127.0.0.1", int(sys.argv[1])), application, log=None)
gevent.signal_handler(signal.SIGTERM, server.stop)
server.serve_forever()
"""


def deliver(
    command: list[str],
    address: tuple[str, int],
    queue: str,
    openmeter: OpenMeterServer,
    directory: Path,
) -> None:
    """Serve, stop as a deployment does, and check that each event arrives once."""
    spool = {"OPENMETER_SPOOL_DIR": str(directory / "spool")}
    env = variables(openmeter, **(spool if queue == "spool" else {}))
    with InstalledServer(command, address, directory / "log", env) as server:
        names = server.load()
        openmeter.wait_for(len(names))
        server.stop()

    assert_billed_once(openmeter, names)


@pytest.fixture
def address() -> tuple[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        host, port = free.getsockname()
    return host, port


@pytest.mark.parametrize("queue", ["memory", "spool"])
@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent"])
def test_workers_of_every_kind_deliver_everything(
    worker: str,
    preload: list[str],
    queue: str,
    address: tuple[str, int],
    openmeter: OpenMeterServer,
    tmp_path: Path,
) -> None:
    command = [
        *GUNICORN, "--worker-class", worker, "--workers", "2", *preload,
        "--bind", f"{address[0]}:{address[1]}", "installed_app:application",
    ]  # fmt: skip
    deliver(command, address, queue, openmeter, tmp_path)


@pytest.mark.parametrize("queue", ["memory", "spool"])
def test_a_middleware_that_is_made_before_the_patch_delivers_everything(
    queue: str, address: tuple[str, int], openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", PATCHED_LATE, str(address[1])]
    deliver(command, address, queue, openmeter, tmp_path)
