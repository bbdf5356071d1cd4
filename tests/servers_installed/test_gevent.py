"""A gevent worker has one thread: whatever blocks it blocks every request."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from installed import InstalledServer, assert_billed_once, variables
from servers import GUNICORN

if TYPE_CHECKING:
    from pathlib import Path

    from openmeter_server import OpenMeterServer


@pytest.mark.parametrize("queue", ["memory", "spool"])
def test_gevent_workers_deliver_everything(
    queue: str, openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    spool = {"OPENMETER_SPOOL_DIR": str(tmp_path / "spool")} if queue == "spool" else {}
    env = variables(openmeter, **spool)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    command = [
        *GUNICORN, "--worker-class", "gevent", "--workers", "2",
        "--bind", f"{address[0]}:{address[1]}", "installed_app:application",
    ]  # fmt: skip

    with InstalledServer(command, address, tmp_path / "log", env) as server:
        names = server.load()
        openmeter.wait_for(len(names))
        server.stop()

    assert_billed_once(openmeter, names)
