"""Starts the processes of the demo and ends them in every case."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

START_TIMEOUT = 20.0
#: More than gunicorn's graceful_timeout.
STOP_TIMEOUT = 40.0
_LOOK_INTERVAL = 0.02


class ProcessFailed(Exception):
    """A process did not start, or did not end as it should."""


class Process:
    """A server in a session of its own, so that Ctrl-C reaches only the demo.

    Its output goes to a file. Leaving the context ends it and its children.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environ: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
            )

    def wait_for_address(self, announcement: str) -> tuple[str, int]:
        """Return the address of the server once it can be reached.

        *announcement* is the text in front of the address in its output.
        """
        pattern = re.compile(re.escape(announcement) + r" http://([\d.]+):(\d+)\s")
        deadline = time.monotonic() + START_TIMEOUT
        while (found := pattern.search(self.output())) is None:
            if self._process.poll() is not None:
                raise ProcessFailed(f"{self.name} ended before it listened")
            if time.monotonic() > deadline:
                raise ProcessFailed(
                    f"{self.name} did not listen within {START_TIMEOUT:g} s"
                )
            time.sleep(_LOOK_INTERVAL)
        address = found[1], int(found[2])
        socket.create_connection(address, START_TIMEOUT).close()
        return address

    def output(self) -> str:
        """Return its output so far."""
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        """Send SIGTERM and wait for the end of the process.

        :raises ProcessFailed: if it had to be killed, or ended with an error.
        """
        if self._process.returncode is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"{self.name} did not end") from None
        finally:
            self._kill()
        if status:
            raise ProcessFailed(f"{self.name} ended with status {status}")

    def _kill(self) -> None:
        """Kill the process and its children, unless it has ended."""
        if self._process.returncode is None:
            # It is not reaped yet, so its process id is not reused.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessFailed):
            self.stop()
