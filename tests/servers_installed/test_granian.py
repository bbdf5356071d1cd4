"""granian, whose workers are multiprocessing processes and run no atexit hooks."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

import pytest

from installed import InstalledServer, assert_billed_once, variables

if TYPE_CHECKING:
    from pathlib import Path

    from openmeter_server import OpenMeterServer


@pytest.mark.parametrize("queue", ["memory", "spool"])
def test_workers_deliver_what_they_have_when_they_are_stopped(
    queue: str, openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    spool = {"OPENMETER_SPOOL_DIR": str(tmp_path / "spool")} if queue == "spool" else {}
    env = variables(openmeter, OPENMETER_FLUSH_INTERVAL="3600", **spool)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    command = [
        sys.executable, "-m", "granian", "--interface", "wsgi", "--workers", "1",
        "--host", address[0], "--port", str(address[1]), "installed_app:application",
    ]  # fmt: skip

    with InstalledServer(command, address, tmp_path / "log", env) as server:
        names = server.load()
        server.stop()

    openmeter.wait_for(len(names))
    assert_billed_once(openmeter, names)
