"""Start servers that have to be installed, load them, and empty their spools."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

from servers import TIMEOUT, environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_server import OpenMeterServer

HERE = Path(__file__).parent / "servers_installed"
REQUESTS = 500
#: Seconds that a server may take to start, or to stop, or another to deliver.
PATIENCE = 40
CLIENTS = 4


class InstalledServer:
    """A server that is started by a command, in a process of its own."""

    def __init__(
        self,
        command: list[str],
        address: tuple[str, int],
        log: Path,
        env: dict[str, str],
        directory: Path | None = None,
    ) -> None:
        self.address = address
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=env, stdout=output, stderr=output, cwd=directory
            )
        try:
            wait_until(self._answers)
        except BaseException:
            self._end()
            raise

    def get(self, path: str, subject: str = "") -> bytes:
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        try:
            connection.request("GET", path, headers={"X-Subject": subject})
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200, (response.status, body)
            return body
        finally:
            connection.close()

    def load(self, requests: int = REQUESTS, body: bytes = b"all at once") -> set[str]:
        """Ask as often as it must be billed, and return to whom."""
        names = {f"client-{n}" for n in range(requests)}
        with ThreadPoolExecutor(CLIENTS) as clients:
            bodies = set(clients.map(lambda name: self.get("/", name), names))
        assert bodies == {body}
        return names

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Stop it as a deployment does; it must end well, and soon."""
        self.process.send_signal(signum)
        try:
            status: int | None = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = None  # it hangs
        assert status == 0, self.log.read_text()

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            self.get("/ticks")
        except OSError:
            return False
        return True

    def _end(self) -> None:
        """Whatever it does: no process of it is left."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                kill_with_children(self.process.pid)
                self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()


def kill_with_children(pid: int) -> None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for process in (pid, *map(int, children)):
        os.kill(process, signal.SIGKILL)


def variables(openmeter: OpenMeterServer, **more: str) -> dict[str, str]:
    """Return the environment of a server that loads `installed_app`."""
    env = environment(OPENMETER_API_URL=openmeter.url, **more)
    return {**env, "PYTHONPATH": os.pathsep.join([str(HERE), env["PYTHONPATH"]])}


def deliver_from_elsewhere(env: dict[str, str]) -> None:
    """Have another process deliver what is in the spool that *env* names."""
    code = (
        "import os; os.environ.pop('OPENMETER_DELIVERY', None)\n"
        "from installed_app import application\n"
        f"raise SystemExit(not application.flush({PATIENCE}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env, timeout=TIMEOUT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for another process, which can only be asked."""
    deadline = time.monotonic() + PATIENCE
    never = threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        never.wait(0.05)


def assert_billed_once(openmeter: OpenMeterServer, names: set[str]) -> None:
    """Check that *names*, and nobody else, are billed for one request each."""
    subjects = openmeter.subjects
    missing = names - set(subjects)
    assert not missing, f"{len(missing)} of {len(names)} are not billed"
    assert sorted(subjects) == sorted(names)
