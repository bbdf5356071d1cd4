"""What others would pick instead, each in an environment and a process of its own.

They are installed from PyPI, into `build/peers`, and only when somebody asks for them.
A turn times the bare application and the wrapped one in the same process, so that two
processes are not compared.
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
#: Seconds until what is still not installed, or gives no answer, is given up.
INSTALLING, ANSWERING = 120.0, 30.0

TRIVIAL, FLASK = "trivial", "Flask"


class Peer(NamedTuple):
    """What is compared."""

    name: str
    #: What pip installs; nothing where this interpreter has it.
    requirements: tuple[str, ...]
    applications: tuple[str, ...] = (TRIVIAL, FLASK)


THIS_PACKAGE = Peer("this package, as it comes", ())
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
    """A peer cannot be measured: why, in a line."""


class Turn(NamedTuple):
    """The seconds that a request takes."""

    bare: float
    wrapped: float


def interpreter(peer: Peer, environments: Path = ENVIRONMENTS) -> str:
    """Return the interpreter that has *peer*, which is installed unless it is there."""
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
    """Return what this package needs, which itself is taken from the checkout."""
    parted = [each.partition(";") for each in requires("openmeter_wsgi") or ()]
    return [name for name, _, marker in parted if not marker or '"sandbox"' in marker]


def install(environments: Path = ENVIRONMENTS) -> dict[str, str | UnavailableError]:
    """Return the interpreter of every peer, or why there is none."""

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
    """One peer around one application, in a process that ends with it."""

    def __init__(self, peer: Peer, application: str, url: str, python: str) -> None:
        self.name = peer.name
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [
                python, "-m", "tests.benchmarks.peer_process",
                peer.name, application, url,
            ],
            cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
        )  # fmt: skip

    def turn(self, requests: int) -> Turn:
        """Return what each of so many requests takes, at most."""
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
        found = json.loads(answer) if answer else self._why()
        if isinstance(found, str):
            raise UnavailableError(found)
        return Turn(*found)

    def close(self) -> None:
        """End the process; its last deliveries may take it a moment."""
        try:
            self._process.communicate(timeout=ANSWERING)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.communicate()
        self._said.close()

    def _why(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"gave no answer in {ANSWERING:g} s"
        self._said.seek(0)
        return _last_line(self._said.read()) or f"ended with {code}"


def _last_line(text: str) -> str:
    """Return the last line with words: pip may end with an arrow below an error."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else ""
