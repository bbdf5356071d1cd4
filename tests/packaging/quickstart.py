"""Run the README's first example as a new user would, against a sandbox.

Both come from the environment that this is run in: nothing of a checkout is used but
the text of the README.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Longer than anything takes here.
PATIENCE = 30.0
_ROUTE = re.compile(r'@app\.(get|post|put|delete|route)\("([^"<]+)"')


def main(readme: str) -> None:
    """Run it, and fail unless every request became usage with a subject."""
    code = first_example(Path(readme).read_text())
    Path("quickstart.py").write_text(code)
    routes = _ROUTE.findall(code)
    sandbox = [f"{sys.prefix}/bin/openmeter-wsgi", "sandbox", "--port", "0"]
    flask = [sys.executable, "-m", "flask", "--app", "quickstart", "run", "--port", "0"]
    with (
        serving(sandbox, "listens on") as openmeter,
        serving(flask, "Running on", OPENMETER_API_URL=openmeter) as application,
    ):
        for verb, path in routes:
            method = "GET" if verb == "route" else verb.upper()
            answer = requests.request(method, application + path, timeout=PATIENCE)
            print(f"{method} {path} was answered {answer.status_code}")
            assert answer.ok, answer.text
        for event in events(openmeter, at_least=len(routes)):
            print(f"billed {event['subject']}: {event['type']} {event['data']}")
            assert event["subject"]


def first_example(text: str) -> str:
    """Return the first block of Python in a page."""
    found = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, "the page has no example in Python"
    return found[1]


@contextlib.contextmanager
def serving(command: list[str], says: str, **variables: str) -> Iterator[str]:
    """Start a server, and yield the address that it says it listens on."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | variables,
    ) as process:
        try:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if found := re.search(rf"{says} (http://\S+)", line):
                    yield found[1]
                    break
            else:
                raise AssertionError("".join(said))
        finally:
            process.terminate()


def events(openmeter: str, *, at_least: int) -> list[dict[str, Any]]:
    """Return what has arrived, as soon as it has."""
    assert at_least, "the example has no routes"
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        listed = requests.get(f"{openmeter}/api/v1/events", timeout=PATIENCE).json()
        if len(listed) >= at_least:
            return [each["event"] for each in listed]
        time.sleep(0.1)
    raise AssertionError(f"{at_least} events expected, {len(listed)} have arrived")


if __name__ == "__main__":
    main(*sys.argv[1:])
