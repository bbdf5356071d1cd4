"""Start the processes that the files in examples/deploy describe."""

from __future__ import annotations

import configparser
import os
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from installed import PATIENCE, InstalledServer
from servers import environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_server import OpenMeterServer

DEPLOY = Path(__file__).parents[1] / "examples" / "deploy"
BODY = b"hello\n"
REQUESTS = 60
#: Paths in these files, which tests replace by paths of this machine.
_BIN, _SPOOL = "/srv/app/.venv/bin", "/var/lib/openmeter-spool"


def free_address() -> tuple[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address: tuple[str, int] = free.getsockname()
    return address


def settings(openmeter: OpenMeterServer, **variables: str) -> dict[str, str]:
    """Return the variables of a typical /etc/openmeter.env, and *variables*."""
    usual = {
        "OPENMETER_API_URL": openmeter.url,
        "OPENMETER_SUBJECT": "header:X-Subject",
        "OPENMETER_FLUSH_INTERVAL": "0.1",
    }
    return environment(**usual, **variables)


class Unit(NamedTuple):
    """The settings of a systemd unit that tests use."""

    command: list[str]
    variables: dict[str, str]
    stop_signal: signal.Signals


def read_unit(name: str, spool: Path) -> Unit:
    """Read a systemd unit, with its paths replaced by those of this machine."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / name)
    service = parser["Service"]
    command = shlex.split(service["ExecStart"].replace(_BIN, sys.exec_prefix + "/bin"))
    assignments = service["Environment"].replace(_SPOOL, str(spool))
    variables = dict(word.split("=", 1) for word in shlex.split(assignments))
    stop_signal = signal.Signals[service.get("KillSignal", "SIGTERM")]
    return Unit(command, variables, stop_signal)


def make_state_directory(spool: Path) -> Path:
    """Make the spool directory, as systemd or the image of a container does."""
    spool.mkdir(mode=0o700)
    return spool


def gunicorn(log: Path, env: dict[str, str]) -> InstalledServer:
    """Start gunicorn with its configuration in examples/deploy."""
    address = free_address()
    command = [
        os.path.join(sys.exec_prefix, "bin", "gunicorn"),
        "-c", "gunicorn.conf.py", "wsgi:application",
    ]  # fmt: skip
    return serving(command, address, log, env)


def serving(
    command: list[str], address: tuple[str, int], log: Path, env: dict[str, str]
) -> InstalledServer:
    """Start a server in examples/deploy, the directory of its application."""
    bind = f"{address[0]}:{address[1]}"
    return InstalledServer(command, address, log, {**env, "BIND": bind}, DEPLOY)


@contextmanager
def shipper(command: list[str], log: Path, env: dict[str, str]) -> Iterator[None]:
    """Run a shipper, stop it with SIGTERM, and check that it exits with status 0."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output)
    try:
        yield
        process.terminate()
        assert process.wait(PATIENCE) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
