"""Start servers that have to be installed, send them requests, empty their spools."""

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
#: Maximum number of seconds for a server to start, to stop, or to deliver.
PATIENCE = 40
CLIENTS = 4


class InstalledServer:
    """A server that a command starts in another process."""

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
        """Send *requests* requests and return their subjects, all different."""
        names = {f"client-{n}" for n in range(requests)}
        with ThreadPoolExecutor(CLIENTS) as clients:
            bodies = set(clients.map(lambda name: self.get("/", name), names))
        assert bodies == {body}
        return names

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Stop the server as a deployment does, and check that its status is 0."""
        self.process.send_signal(signum)
        try:
            status: int | None = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = None  # the server hangs
        assert status == 0, self.log.read_text()

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            self.get("/ticks")
        except OSError:
            return False
        return True

    def _end(self) -> None:
        """End the server and its children, by SIGKILL if necessary."""
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
    """Deliver the events of the spool that *env* names, from another process."""
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
    """Poll *condition*, which another process makes true."""
    deadline = time.monotonic() + PATIENCE
    never = threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        never.wait(0.05)


def assert_billed_once(openmeter: OpenMeterServer, names: set[str]) -> None:
    """Check that exactly the subjects *names* are billed, each for one request."""
    subjects = openmeter.subjects
    missing = names - set(subjects)
    assert not missing, f"{len(missing)} of {len(names)} are not billed"
    assert sorted(subjects) == sorted(names)
