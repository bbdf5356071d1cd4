"""Other packages for comparison, each in a virtual environment and process of its own.

They are installed from PyPI into `build/peers`, only for a run with --peers. A turn
times the bare and the wrapped application in the same process, so that differences
between processes do not count.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).parents[2]
ENVIRONMENTS = CHECKOUT / "build" / "peers"
#: Maximum number of seconds for an installation, and for an answer of the process.
INSTALLING, ANSWERING = 120.0, 30.0

TRIVIAL, FLASK = "trivial", "Flask"


class Peer(NamedTuple):
    """A package that is compared."""

    name: str
    #: The requirements that pip installs; none if this interpreter has the package.
    requirements: tuple[str, ...]
    applications: tuple[str, ...] = (TRIVIAL, FLASK)


THIS_PACKAGE = Peer("this package, with delivery", ())
PEERS = (
    THIS_PACKAGE,
    Peer("moesifwsgi 1.10.5", ("moesifwsgi==1.10.5", "moesifapi==1.5.5")),
    Peer("apitally 1.0.0", ("apitally[flask]==1.0.0",), (FLASK,)),
    Peer(
        "opentelemetry-instrumentation-wsgi 0.66b2",
        (
            "opentelemetry-instrumentation-wsgi==0.66b2",
            "opentelemetry-sdk==1.45.2",
            "opentelemetry-exporter-otlp-proto-http==1.45.2",
        ),
    ),
    Peer("openmeter 1.0.0b236, one call a request", ("openmeter==1.0.0b236",)),
)


class UnavailableError(Exception):
    """A peer cannot be measured; the message is the reason in one line."""


class Turn(NamedTuple):
    """The seconds that a request takes."""

    bare: float
    wrapped: float


def interpreter(peer: Peer, environments: Path = ENVIRONMENTS) -> str:
    """Return the interpreter of *peer*, and install the peer if it is missing."""
    if not peer.requirements:
        return sys.executable
    directory = environments / peer.name.split()[0]
    python, installed = directory / "bin" / "python", directory / "installed.txt"
    wanted = "\n".join(peer.requirements)
    if not installed.is_file() or installed.read_text() != wanted:
        shutil.rmtree(directory, ignore_errors=True)
        _run("venv", "--without-pip", str(directory))
        _run(
            "pip", "--python", str(python), "--disable-pip-version-check", "install",
            "--quiet", "--constraint", str(CHECKOUT / "constraints.txt"),
            *peer.requirements, *_dependencies(),
        )  # fmt: skip
        installed.write_text(wanted)
    return str(python)


def _dependencies() -> list[str]:
    """Return the dependencies of this package, which itself comes from the checkout."""
    parted = [each.partition(";") for each in requires("openmeter_wsgi") or ()]
    return [name for name, _, marker in parted if not marker or '"sandbox"' in marker]


def install(environments: Path = ENVIRONMENTS) -> dict[str, str | UnavailableError]:
    """Return the interpreter of every peer, or the reason for a missing one."""

    def tried(peer: Peer) -> str | UnavailableError:
        try:
            return interpreter(peer, environments)
        except UnavailableError as error:
            return error

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(
            zip([each.name for each in PEERS], pool.map(tried, PEERS), strict=True)
        )


def _run(module: str, *arguments: str) -> None:
    try:
        subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True, text=True, check=True, timeout=INSTALLING,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise UnavailableError(_last_line(error.stderr)) from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{module}: not done in {INSTALLING:g} s") from error


class Running:
    """The process of one peer that wraps one application; close() ends it."""

    def __init__(self, peer: Peer, application: str, url: str, python: str) -> None:
        self.name = peer.name
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [
                python, "-m", "tests.benchmarks.peer_process",
                peer.name, application, url,
            ],
            cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
        )  # fmt: skip

    def turn(self, requests: int) -> Turn:
        """Serve at most *requests* requests and return the time of one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Timer(ANSWERING, self._process.kill)
        late.start()
        try:
            self._process.stdin.write(f"{requests}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            late.cancel()
        result = json.loads(answer) if answer else self._failure()
        if isinstance(result, str):
            raise UnavailableError(result)
        return Turn(*result)

    def close(self) -> None:
        """End the process, and wait for its last deliveries."""
        try:
            self._process.communicate(timeout=ANSWERING)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.communicate()
        self._stderr.close()

    def _failure(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"gave no answer in {ANSWERING:g} s"
        self._stderr.seek(0)
        return _last_line(self._stderr.read()) or f"ended with {code}"


def _last_line(text: str) -> str:
    """Return the last line with words: pip may print an arrow below an error."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else ""
