"""Type checkers know the public names and refuse mistakes; editors complete options."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from test_typed_options import FIELDS, ROOT, WRONG, environment, run_checker
from test_typed_options import PROGRAM as WRONG_PROGRAM

CALLS = {
    "OpenMeterMiddleware(application, ": FIELDS,
    "OpenMeter(flask.Flask('shop'), ": FIELDS,
    "Policy.from_env(": FIELDS,
    "@meter(": {"meters", "required_entitlements", "on_abort"},
}
PROGRAM = """\
import flask
from openmeter_wsgi import OpenMeterMiddleware, Policy, meter
from openmeter_wsgi.flask import OpenMeter

application = flask.Flask("shop")
"""


def test_every_public_name_has_a_type() -> None:
    said = run_checker(
        "pyright", "--outputjson", "--ignoreexternal", "--verifytypes=openmeter_wsgi"
    )
    found = json.loads(said)["typeCompleteness"]

    incomplete = [each["name"] for each in found["symbols"] if not each["isTypeKnown"]]
    assert incomplete == []
    assert found["completenessScore"] == 1


def test_mypy_refuses_each_mistake_and_nothing_else() -> None:
    said = run_checker("mypy", "--strict", str(WRONG_PROGRAM))

    assert {int(number) for number in re.findall(r":(\d+): error:", said)} == WRONG


def test_pyright_refuses_each_mistake_and_nothing_else() -> None:
    found: dict[str, Any] = json.loads(
        run_checker("pyright", "--outputjson", str(WRONG_PROGRAM))
    )

    lines = {
        each["range"]["start"]["line"] + 1
        for each in found["generalDiagnostics"]
        if each["severity"] == "error"
    }
    assert lines == WRONG


class LanguageServer:
    """pyright as an editor uses it: the Language Server Protocol over pipes."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [str(Path(sys.executable).with_name("pyright-langserver")), "--stdio"],
            cwd=directory, env=environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._requests = 0
        self.ask("initialize", {
            "processId": None, "rootUri": directory.as_uri(), "capabilities": {},
            "workspaceFolders": [{"uri": directory.as_uri(), "name": "shop"}],
        })  # fmt: skip
        self.tell("initialized", {})

    def tell(self, method: str, params: Any) -> None:
        self._send({"method": method, "params": params})

    def ask(self, method: str, params: Any) -> Any:
        self._requests += 1
        self._send({"id": self._requests, "method": method, "params": params})
        while True:
            message = self._receive()
            if "method" in message and "id" in message:  # it asks for settings
                self._send({"id": message["id"], "result": None})
            elif message.get("id") == self._requests:
                return message["result"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _send(self, message: dict[str, Any]) -> None:
        text = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self._process.stdin
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(text) + text)
        self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout
        length = 0
        while line := self._process.stdout.readline().strip():
            name, _, value = line.partition(b":")
            if name == b"Content-Length":
                length = int(value)
        assert length, "the language server has ended"
        return json.loads(self._process.stdout.read(length))


@pytest.mark.timeout(200)
def test_an_editor_offers_the_names_of_all_options(tmp_path: Path) -> None:
    program = tmp_path / "shop.py"
    text = PROGRAM + "".join(f"\n{call}" for call in CALLS)
    server = LanguageServer(tmp_path)
    try:
        server.tell("textDocument/didOpen", {"textDocument": {
            "uri": program.as_uri(), "languageId": "python", "version": 1,
            "text": text,
        }})  # fmt: skip
        lines = text.splitlines()
        offered = {
            call: server.ask(
                "textDocument/completion",
                {
                    "textDocument": {"uri": program.as_uri()},
                    "position": {"line": lines.index(call), "character": len(call)},
                },
            )
            for call in CALLS
        }
    finally:
        server.close()

    for call, names in CALLS.items():
        labels = {item["label"].rstrip("=") for item in offered[call]["items"]}
        assert names - labels == set(), call
    assert ROOT not in program.parents  # it knows the installed package
