"""Run the README's first example as a new user would, against a sandbox.

The package and the sandbox are those installed for the Python that runs this program.
Only the README comes from the checkout.
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

#: Maximum number of seconds to wait.
PATIENCE = 30.0
_ROUTE = re.compile(r'@app\.(get|post|put|delete|route)\("([^"<]+)"')


def main(readme: str) -> None:
    """Run the example and fail unless each request became an event with a subject."""
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
    """Return the first Python block of a page."""
    found = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, "the page has no example in Python"
    return found[1]


@contextlib.contextmanager
def serving(command: list[str], says: str, **variables: str) -> Iterator[str]:
    """Start a server and yield its address, which follows *says* in its output."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | variables,
    ) as process:
        try:
            assert process.stdout is not None
            output = []
            for line in process.stdout:
                output.append(line)
                if found := re.search(rf"{says} (http://\S+)", line):
                    yield found[1]
                    break
            else:
                raise AssertionError("".join(output))
        finally:
            process.terminate()


def events(openmeter: str, *, at_least: int) -> list[dict[str, Any]]:
    """Wait for *at_least* events, and return all events."""
    assert at_least, "the example has no routes"
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        listed = requests.get(f"{openmeter}/api/v1/events", timeout=PATIENCE).json()
        if len(listed) >= at_least:
            return [each["event"] for each in listed]
        time.sleep(0.1)
    raise AssertionError(f"expected {at_least} events, got {len(listed)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
