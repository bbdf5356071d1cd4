"""Collect these tests only on request: they need the script `install`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
import redis
import requests

from servers import TIMEOUT, environment
from spooling import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openmeter_wsgi.sandbox import Sandbox

HERE = Path(__file__).parent
#: Maximum number of seconds of a run, also on a slow machine.
LONG = 200.0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_requested = any("jobs_installed" in argument for argument in config.args)
    return None if is_requested else True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


class Process:
    """A program with child processes that can all be killed at once."""

    def __init__(self, *command: str, variables: dict[str, str]) -> None:
        self.pid = 0
        self._command = command
        self._variables = environment(**variables)
        # The examples are imported as examples.…, from the root of the repository.
        paths = [str(HERE.parents[1]), str(HERE), self._variables["PYTHONPATH"]]
        self._variables["PYTHONPATH"] = os.pathsep.join(paths)
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", *self._command],
            env=self._variables, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.pid = self._process.pid

    def kill_a_child(self) -> None:
        """Kill one of its children with -9, as soon as it has one."""
        listed = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        until(lambda: bool(listed.read_text()), LONG)
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(int(listed.read_text().split()[0]), signal.SIGKILL)

    def kill(self) -> None:
        """Kill the program and its children with -9."""
        with self._process:
            os.killpg(self.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[redis.Redis]:
    """A Redis server for one test."""
    port = str(free_port())
    with (
        subprocess.Popen(
            ["redis-server", "--port", port, "--save", "", "--dir", str(tmp_path)],
            stdout=subprocess.DEVNULL,
        ) as server,
        redis.Redis(port=int(port)) as client,
    ):

        def answers() -> bool:
            with contextlib.suppress(redis.ConnectionError):
                return bool(client.ping())
            return False

        until(answers)
        yield client
        server.kill()


@pytest.fixture
def variables(sandbox: Sandbox, broker: redis.Redis, tmp_path: Path) -> dict[str, str]:
    """The environment variables of the examples."""
    port = broker.connection_pool.connection_kwargs["port"]
    return {
        "OPENMETER_API_URL": sandbox.url,
        "OPENMETER_SPOOL_DIR": str(tmp_path / "spool"),
        "OPENMETER_TICKET_SECRET": "a-secret-of-the-tests",
        "REDIS_URL": f"redis://127.0.0.1:{port}/0",
    }


@pytest.fixture
def submit(variables: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """A function that serves an example under gunicorn and submits videos to it."""
    with contextlib.ExitStack() as served:
        session = served.enter_context(requests.Session())

        def submit(app: str, names: list[str]) -> None:
            url = f"127.0.0.1:{free_port()}"
            served.enter_context(
                Process(
                    "gunicorn", "--bind", url, "--workers", "2", "--threads", "2", app,
                    variables=variables,
                )
            )  # fmt: skip
            until(lambda: _is_up(url), timeout=LONG)
            for name in names:
                answer = session.post(
                    f"http://{url}/videos/{name}", headers={"X-Customer": "acme"},
                    timeout=TIMEOUT,
                )  # fmt: skip
                assert answer.status_code == 202

        yield submit


def _is_up(url: str) -> bool:
    host, port = url.split(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
        return True
    return False
