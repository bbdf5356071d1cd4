"""Helpers for tests of the commands: processes that put events, and the commands."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time

from click.testing import CliRunner

from openmeter_wsgi.cli import spool
from openmeter_wsgi.spool.files import MAPPED

COMMAND = [sys.executable, "-X", "dev", "-W", "error", "-m", "openmeter_wsgi"]
#: Program that puts the events of its input into a spool, for the server SPOOL_SERVER.
WORKER = """
import json, os, sys
from openmeter_wsgi.delivery.client import OpenMeterClient
from openmeter_wsgi.spool.delivery import SpoolDelivery
from openmeter_wsgi.policy import Policy
from openmeter_wsgi.stats import Counts

policy = Policy(
    spool_dir=sys.argv[1],
    delivery="ship",
    api_url=os.environ.get("SPOOL_SERVER", "http://127.0.0.1:9"),
)
queue = SpoolDelivery(policy, lambda: OpenMeterClient(
    url=policy.api_url, flavor="v1", key=policy.key, timeout=1), Counts(),
    form=sys.argv[2])
for line in sys.stdin:
    for event in json.loads(line):
        queue.put(json.dumps(event).encode())
    print("put", flush=True)
"""


def event(id_, **changes):
    whole = {"specversion": "1.0", "id": id_, "source": "test", "type": "call"}
    return whole | {"subject": "customer", "data": {"total": 1}} | changes


def days_ago(days):
    """Return the time of *days* days ago, in the form of an event."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * 86_400))


class Worker:
    """A process that puts events into a spool and does not deliver them."""

    def __init__(self, directory, form):
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(directory), form],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def put(self, *events):
        self._process.stdin.write(json.dumps(events) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "put\n"

    def kill(self):
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def worker(directory, form=MAPPED):
    directory.mkdir(mode=0o700, exist_ok=True)
    made = Worker(directory, form)
    try:
        yield made
    finally:
        made.kill()


def put(directory, *events, form=MAPPED):
    """Put events with a process that is killed afterwards."""
    with worker(directory, form) as made:
        made.put(*events)


class Ship:
    """A ``ship`` process and its output."""

    def __init__(self, process):
        self.process = process
        self.output = []

    def wait_for(self, text):
        for line in self.process.stderr:
            self.output.append(line)
            if text in line:
                return line
        raise AssertionError(self.output)

    def end(self, signal):
        self.process.send_signal(signal)
        _, rest = self.process.communicate(timeout=40)
        self.output.append(rest)
        return self.process.returncode, "".join(self.output)


@contextlib.contextmanager
def shipping(directory, server, *options, **variables):
    overrides = {f"OPENMETER_{k.upper()}": str(v) for k, v in variables.items()}
    settings = {"OPENMETER_API_URL": server.url, "OPENMETER_FLUSH_INTERVAL": "0.01"}
    with subprocess.Popen(
        [*COMMAND, "ship", "--spool-dir", str(directory), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | settings | overrides,
    ) as process:
        try:
            yield Ship(process)
        finally:
            process.kill()


def run(directory, *arguments, **variables):
    """Run a subcommand of ``spool`` within this process."""
    return CliRunner().invoke(
        spool.command,
        ["--spool-dir", str(directory), *arguments],
        env={f"OPENMETER_{k.upper()}": v for k, v in variables.items()},
    )


def status_of(directory):
    """Return the output of ``status`` about the only server in a spool."""
    (status,) = json_output(directory, "status")["servers"]
    return status


def json_output(directory, *arguments, **variables):
    """Return the JSON output of a subcommand."""
    result = run(directory, *arguments, "--json", **variables)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)
