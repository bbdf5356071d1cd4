"""Runs the demo from beginning to end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import requests

from examples.demo import access, report
from examples.demo.comparison import Billed, differences
from examples.demo.expectation import expect
from examples.demo.load import KEYS, plan, send_all
from examples.demo.openmeter import OpenMeter
from examples.demo.processes import Process

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from examples.demo.expectation import Expectation
    from examples.demo.load import Answer, Request

ROOT = Path(__file__).parents[2]
#: Seconds to wait for the usage while the workers keep running.
ARRIVAL_TIMEOUT = 30.0
#: The quota of each customer, shown on the sandbox's page.
QUOTA = 1_000
#: Seconds without a new event after which all have arrived; more than the flush
#: interval.
QUIET = 1.5
_LOOK_INTERVAL = 0.1


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    requests: int = 3_000
    keep: bool = False
    #: The same seed draws the same requests.
    seed: int = 1
    #: The share of ingest requests that the sandbox answers with 500.
    fail_rate: float = 0.1
    #: More options of ``openmeter-wsgi sandbox``.
    sandbox: Sequence[str] = ()


class Demo:
    """One run. Its processes end with the context."""

    def __init__(self, console: Console, options: Options, logs: Path) -> None:
        self._console = console
        self._options = options
        self._logs = logs
        self._stack = ExitStack()
        self.processes: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> list[str]:
        """Run the demo, print its tables, and return the differences."""
        openmeter = self._stack.enter_context(OpenMeter(self._start_sandbox()))
        openmeter.define(KEYS)
        for subject in KEYS:
            openmeter.grant(subject, "api_requests", QUOTA)
        openmeter.grant("acme", "exports", None)
        self._print(f"OpenMeter sandbox  {openmeter.url}  (open it in a browser)")
        gunicorn, address = self._start_gunicorn(openmeter.url)
        self._print(f"Flask on gunicorn  {_url(address)}  2 workers")
        if self._options.fail_rate:
            self._stack.enter_context(_first_fails(openmeter.url, self._options))
        expected = expect(self._send(address))
        if self._options.keep:
            billed, before = self._await(openmeter, expected), None
        else:
            before = openmeter.counts()["stored"]
            billed = self._stop_and_read(gunicorn, openmeter)
        found = differences(expected, billed)
        self._print_tables(expected, billed, before)
        checks = self._try_access()
        wrong = report.conclude_access(self._console, checks)
        report.conclude(self._console, expected, found)
        if self._options.keep:
            self._keep_running(openmeter.url, _url(address))
        return found + wrong

    def print_logs(self) -> None:
        """Print the last lines of the logs of the processes."""
        for process in self.processes:
            report.print_end_of_log(self._console, process.name, process.output())

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _start(self, name: str, command: Sequence[str], **environ: str) -> Process:
        process = Process(
            name, command, self._logs / f"{name}.log", _environ() | environ
        )
        self.processes.append(self._stack.enter_context(process))
        return process

    def _start_sandbox(self) -> str:
        command = str(Path(sys.executable).with_name("openmeter-wsgi"))
        arguments = ["--port", "0", *self._options.sandbox]
        process = self._start("sandbox", [command, "sandbox", *arguments])
        return _url(process.wait_for_address("listens on"))

    def _start_gunicorn(self, url: str) -> tuple[Process, tuple[str, int]]:
        command = [sys.executable, "-m", "gunicorn", "--chdir", str(ROOT)]
        command += ["--config", str(ROOT / "examples" / "gunicorn.conf.py")]
        process = self._start(
            "gunicorn",
            [*command, "examples.flask_app:app"],
            BIND="127.0.0.1:0",
            # New versions of gunicorn make a socket there; another may have one.
            XDG_RUNTIME_DIR=str(self._logs),
            OPENMETER_API_URL=url,
        )
        return process, process.wait_for_address("Listening at:")

    def _send(self, address: tuple[str, int]) -> list[tuple[Request, Answer]]:
        planned = plan(self._options.requests, self._options.seed)
        started = time.monotonic()
        with report.make_progress(self._console) as progress:
            task = progress.add_task("sending requests", total=len(planned))
            answers = send_all(address, planned, lambda: progress.advance(task))
        seconds = time.monotonic() - started
        self._print(f"{len(answers):,} requests answered in {seconds:.1f} s")
        return answers

    def _stop_and_read(self, gunicorn: Process, openmeter: OpenMeter) -> Billed:
        """Stop the workers, which send their waiting events, and read the usage."""
        gunicorn.stop()
        self._print("gunicorn stopped (SIGTERM); its workers sent the waiting events")
        counts = re.findall(r"usage (\{.*\})", gunicorn.output())
        return _read(openmeter, [json.loads(worker) for worker in counts])

    def _await(self, openmeter: OpenMeter, expected: Expectation) -> Billed:
        """Wait until all events have arrived and no more follow; read the usage."""
        due = expected.events
        now = changed = time.monotonic()
        deadline, stored = now + ARRIVAL_TIMEOUT, -1
        with self._console.status("waiting for the workers to send"):
            while now < deadline and (stored < due or now < changed + QUIET):
                time.sleep(_LOOK_INTERVAL)
                now, before = time.monotonic(), stored
                stored = openmeter.counts()["stored"]
                changed = changed if stored == before else now
        return _read(openmeter, None)

    def _print_tables(
        self, expected: Expectation, billed: Billed, before_stop: int | None
    ) -> None:
        self._console.print()
        delivery = report.delivery_table(billed, before_stop=before_stop)
        for title, table in (
            ("Requests", report.requests_table(expected)),
            ("Usage", report.usage_table(expected, billed)),
            ("Delivery", delivery),
        ):
            self._console.print(f"[bold]{title}[/]")
            self._console.print(table)

    def _try_access(self) -> list[access.Check]:
        with self._console.status("checking access"):
            checks = access.run_checks()
        self._console.print("[bold]Access[/]")
        self._console.print(report.access_table(checks))
        return checks

    def _keep_running(self, openmeter: str, app: str) -> None:
        """Print the addresses and wait for Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt):
            report.print_addresses(self._console, openmeter, app)
            while True:
                signal.pause()
        self._print("\nstopping both")


@contextlib.contextmanager
def _first_fails(url: str, options: Options) -> Iterator[None]:
    """Fail all ingest requests until one has failed, then the chosen share.

    The sandbox stores the events of the first failed request, and so gets them twice.
    """
    is_over = threading.Event()

    def wait_for_failure() -> None:
        ended = contextlib.suppress(requests.RequestException)
        with ended, OpenMeter(url) as openmeter:
            while not (openmeter.counts()["failed"] or is_over.wait(_LOOK_INTERVAL)):
                pass
            openmeter.fail(options.fail_rate)

    with OpenMeter(url) as openmeter:
        openmeter.fail(1.0)
    thread = threading.Thread(target=wait_for_failure)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _read(openmeter: OpenMeter, workers: Sequence[dict[str, Any]] | None) -> Billed:
    return Billed(openmeter.usage(), openmeter.events(), openmeter.counts(), workers)


def _url(address: tuple[str, int]) -> str:
    host, port = address
    return f"http://{host}:{port}"


def _environ() -> dict[str, str]:
    """Return the environment without variables that redirect usage or requests."""
    foreign = ("OPENMETER_", "GUNICORN_")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and not name.lower().endswith("_proxy")
    }
