"""Run an example in another process that sends its events to a sandbox."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Self

import requests

from openmeter_wsgi.sandbox import Sandbox
from servers import TESTS, TIMEOUT, Server

if TYPE_CHECKING:
    from pathlib import Path

ROOT = TESTS.parent
PAGE = b"x" * 1024


class ServedExample:
    """An example on a real server; sends it requests and returns the billed events."""

    def __init__(
        self,
        command: list[str],
        app: str,
        directory: Path,
        *,
        path: Path = ROOT,
        **variables: str,
    ) -> None:
        self.sandbox = Sandbox()
        self.variables = {
            "OPENMETER_API_URL": self.sandbox.url,
            "PYTHONPATH": os.pathsep.join(map(str, dict.fromkeys([path, ROOT, TESTS]))),
            **variables,
        }
        self.log = directory / "server.log"
        self._server = Server(command, app, self.log, **self.variables)
        self.session = requests.Session()

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        host, port = self._server.address
        url = f"http://{host}:{port}{path}"
        return self.session.request(method, url, timeout=TIMEOUT, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.request("GET", path, **options)

    def billed(self) -> list[tuple[str, str, Any]]:
        """Stop the server, and return the events that it billed."""
        self._server.stop()
        answer = requests.get(f"{self.sandbox.url}/api/v2/events", timeout=TIMEOUT)
        events = [item["event"] for item in answer.json()["items"]]
        return sorted(((e["subject"], e["type"], e["data"]) for e in events), key=repr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        self.session.close()
        with self._server:
            pass
        self.sandbox.close()
        if failed:
            sys.stderr.write(self.log.read_text())
