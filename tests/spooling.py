"""Helpers for tests of a spool: make one, run processes with it, list its files."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from openmeter_wsgi.delivery.client import OpenMeterClient
from openmeter_wsgi.options import ApiKey
from openmeter_wsgi.policy import Policy
from openmeter_wsgi.spool.delivery import SpoolDelivery
from openmeter_wsgi.spool.server_directories import Server, prepare_server_directory
from openmeter_wsgi.stats import Counts

#: Maximum number of seconds to wait.
PATIENCE = 40.0
#: Bytes of a segment: so few that a test fills several segments.
SMALL = 16 * 1024


def event(id_: str, subject: str = "acme", **data: Any) -> bytes:
    """Encode an event."""
    document = {
        "specversion": "1.0", "type": "a", "source": "s", "data": data or {"n": 1},
        "subject": subject, "time": "2026-01-01T00:00:00Z", "id": id_,
    }  # fmt: skip
    return json.dumps(document, separators=(",", ":")).encode()


def spool_policy(
    directory: Path, url: str = "http://127.0.0.1:1", **options: Any
) -> Policy:
    """Return a policy with a spool and a short flush_interval."""
    options = {"flush_interval": 0.1, "api_key": "secret", **options}
    return Policy(spool_dir=str(directory), api_url=url, **options)


def new_client(url: str) -> OpenMeterClient:
    return OpenMeterClient(
        url=url, flavor="v1", key=ApiKey.from_options("secret", None), timeout=30
    )


def spool_queue(
    directory: Path,
    url: str,
    *,
    segment_bytes: int = SMALL,
    form: str | None = None,
    **options: Any,
) -> SpoolDelivery:
    """Return a queue on the directory, which the caller must close."""
    directory.mkdir(mode=0o700, exist_ok=True)
    return SpoolDelivery(
        spool_policy(directory, url, **options),
        lambda: new_client(url),
        Counts(),
        segment_bytes=segment_bytes,
        form=form,
    )


class Process:
    """A Python process that runs *code* and reports in lines of its output."""

    def __init__(self, code: str, *arguments: str) -> None:
        here = Path(__file__).parent
        path = os.pathsep.join([str(here.parent), str(here)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    def line(self) -> str:
        """Return the next line of its output; fail if there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode().strip()
        assert line, "the process ended without output"
        return line

    def kill(self) -> list[str]:
        """Kill it with -9 and return the remaining words of its whole lines."""
        self.process.kill()
        assert self.process.stdout is not None
        text = self.process.stdout.read().decode()
        self.wait()
        return text[: text.rfind("\n") + 1].split()

    def wait(self) -> int:
        with self.process:
            return self.process.wait(PATIENCE)

    def end(self) -> int:
        """Close its input, at which it ends, and return its status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError), self.process:
            self.process.wait(PATIENCE)


def server_dir(directory: Path, url: str | None = None) -> Path:
    """Return the directory of a server in a spool; without *url*, of the only one."""
    if url is not None:
        return prepare_server_directory(directory, Server(url))
    (found,) = [path for path in directory.iterdir() if path.is_dir()]
    return found


def files(directory: Path, ending: str) -> list[Path]:
    """Return the files of all servers whose names end with *ending*."""
    return sorted(path for path in directory.rglob("*") if path.name.endswith(ending))


def segments(directory: Path) -> list[Path]:
    """Return the segments of all servers, with sealed ones."""
    return sorted(
        p for p in directory.rglob("*") if ".mapped" in p.name or ".written" in p.name
    )


#: Threads that existed before the test.
_earlier: set[threading.Thread] = set()


def begin_test() -> set[threading.Thread]:
    """Exclude all current threads from `threads`, and return them."""
    _earlier.clear()
    _earlier.update(threading.enumerate())
    return _earlier


def threads(prefix: str) -> list[threading.Thread]:
    """Return the threads of this test whose names start with *prefix*."""
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith(prefix) and thread not in _earlier
    ]


def until(
    condition: Callable[[], bool],
    timeout: float = PATIENCE,
    *,
    failure: Callable[[], object] = lambda: "the condition did not become true",
) -> None:
    """Poll *condition*; after *timeout* fail with the result of *failure*."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, failure()
        time.sleep(0.01)
