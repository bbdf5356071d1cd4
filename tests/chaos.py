"""Count lost and repeated events under kills and other faults.

    python -m tests.chaos [--kills 200] [--seed 1]

gunicorn serves requests under load, each run with one fault at random moments:

- one worker, or gunicorn with all workers, is killed with SIGKILL;
- the oldest files of the spool are deleted ("cleaned");
- a worker is stopped for a second ("frozen");
- OpenMeter answers byte by byte ("dripping");
- workers end after a few requests ("short-lived");
- applications that send to two different servers share one spool.

The middleware is wrapped in `Marked`, which writes a mark for each request whose
response was closed, and so was settled. In the end every mark must have exactly one
event, at the right server.
"""

# ruff: noqa: T201 - also a program that prints
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

sys.path.insert(0, str(Path(__file__).parent))

from openmeter_wsgi import OpenMeterMiddleware
from openmeter_wsgi.process import Process, client_factory
from openmeter_wsgi.spool.delivery import SpoolDelivery
from openmeter_wsgi.spool.files import MAPPED, WRITTEN
from openmeter_wsgi.stats import Counts
from servers import GTHREAD, SYNC, TIMEOUT, Sink, environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from http.server import BaseHTTPRequestHandler
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_wsgi.policy import Policy

SERVERS = {"sync": SYNC, "gthread": GTHREAD}
VICTIMS = ("worker", "all")
FAULTS = ("cleaned", "frozen", "dripping", "short-lived")
FORMS = (MAPPED, WRITTEN)
CLIENTS = 4
#: Maximum number of seconds between a settled request and the next kill.
_MOMENT = 0.4
#: Maximum number of seconds until the sink answers, so that kills hit open requests.
_THINKING = 0.02
#: Number of seconds for which a worker is frozen, or the sink drips.
_FAULT_TIME = 1.0
#: Age in seconds from which on a spool file is deleted.
_OLD = 0.5
#: Number of requests after which a short-lived worker ends.
_FEW_REQUESTS = "40"


# -- In the server


class Marked:
    """WSGI middleware that writes the name of each request once it is settled."""

    def __init__(self, app: WSGIApplication, marks: str) -> None:
        self._app = app
        self._fd = os.open(marks, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def __call__(
        self, environ: dict[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        name = environ["HTTP_X_SUBJECT"]
        response = self._app(environ, start_response)
        return _MarkedResponse(response, f"{name}\n".encode(), self._fd)


class _MarkedResponse:
    def __init__(self, response: Any, mark: bytes, fd: int) -> None:
        self._response = response
        self._mark = mark
        self._fd = fd

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._response)

    def close(self) -> None:
        self._response.close()
        os.write(self._fd, self._mark)


def _answer(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"all at once"]


def __getattr__(name: str) -> Any:
    """Make `application` when gunicorn loads it, so only in its workers."""
    if name != "application":
        raise AttributeError(name)
    app = OpenMeterMiddleware(
        _answer,
        meters={"requests": 1},
        subject="header:X-Subject",
        flush_interval=0.05,
        batch_size=20,
    )
    app.replace_process(_new_process)
    return Marked(app, os.environ["CHAOS_MARKS"])


def _new_process(policy: Policy) -> Process:
    counts = Counts()
    form = os.environ.get("CHAOS_FORM", MAPPED)
    transport = SpoolDelivery(policy, client_factory(policy), counts, form=form)
    return Process(policy, counts=counts, transport=transport)


# -- Outside the server


@dataclasses.dataclass
class Result:
    """The counts of one run."""

    #: Number of kills or other faults.
    kills: int = 0
    #: Number of requests with a mark: they were settled.
    acknowledged: int = 0
    #: Number of marked requests without an event.
    lost: int = 0
    #: Number of requests with events of different ids: they would be billed twice.
    twice: int = 0
    #: Number of ids received more than once: OpenMeter counts each once.
    repeated: int = 0
    #: Number of batches with such ids.
    repeated_batches: int = 0
    #: Number of batches answered byte by byte: each of them has to be repeated.
    dripped: int = 0
    #: Number of requests whose events came to the wrong server.
    strayed: int = 0

    @property
    def repeats_as_it_may(self) -> bool:
        """True if at most one batch per fault was repeated."""
        return self.repeated_batches <= self.kills + self.dripped

    def __add__(self, other: Result) -> Result:
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Result(*(a + b for a, b in zip(ours, theirs, strict=True)))


class CountingSink(Sink):
    """A sink that delays its answers and counts repeated events."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._taking = threading.Lock()
        self._never = threading.Event()
        self.id_of: dict[str, str] = {}
        self.twice: set[str] = set()
        self.repeated_batches = 0
        self.dripping = threading.Event()
        self.dripped = 0
        super().__init__()

    def take(self, events: list[dict[str, Any]]) -> None:
        with self._taking:
            self.repeated_batches += any(event["id"] in self.ids for event in events)
            self.ids.update(event["id"] for event in events)
            for event in events:
                if self.id_of.setdefault(event["subject"], event["id"]) != event["id"]:
                    self.twice.add(event["subject"])
            self.received.set()
            thinking = self._chance.uniform(0, _THINKING)
        self._never.wait(thinking)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if not self.dripping.is_set():
            super().answer(handler)
            return
        self.dripped += 1
        handler.close_connection = True
        with contextlib.suppress(OSError):
            while not self._never.wait(0.05):
                handler.wfile.write(b"H")


class Gunicorn:
    """A gunicorn process that can be killed and restarted on one listening socket."""

    def __init__(self, command: list[str], directory: Path, **env: str) -> None:
        self.marks = directory / "marks"
        self.log = directory / "log"
        self._env = environment(CHAOS_MARKS=str(self.marks), **env)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address: tuple[str, int] = self._listener.getsockname()
        fd = self._listener.fileno()
        self._command = [*command, "--bind", f"fd://{fd}", "chaos:application"]
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                pass_fds=[self._listener.fileno()],
                env=self._env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def workers(self) -> list[int]:
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in children.split()]

    def kill(self, victim: str, chance: random.Random) -> None:
        if victim == "all":
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._start()
        else:
            # The id still belongs to this worker, as the master has not reaped it.
            os.kill(chance.choice(self.workers()), signal.SIGKILL)

    def strike(self, fault: str, spool: Path, sink: CountingSink, seed: Any) -> None:
        """Cause one of `FAULTS`."""
        if fault == "cleaned":
            _delete_oldest(spool)
        elif fault == "frozen":
            worker = seed.choice(self.workers())
            os.kill(worker, signal.SIGSTOP)
            time.sleep(_FAULT_TIME)
            os.kill(worker, signal.SIGCONT)
        elif fault == "dripping":
            sink.dripping.set()
            time.sleep(_FAULT_TIME)
            sink.dripping.clear()

    def stop(self) -> int:
        """Stop gunicorn with SIGTERM, as a deployment does, and return its status."""
        self._process.terminate()
        return self._process.wait(TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._listener.close()


class Load:
    """Clients that send requests until the end, each with a name of its own."""

    def __init__(self, address: tuple[str, int], prefix: str = "client") -> None:
        self._address = address
        self._prefix = prefix
        self._numbers = itertools.count()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        while not self._over.is_set():
            ask(self._address, f"{self._prefix}-{next(self._numbers)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def ask(address: tuple[str, int], name: str) -> bool:
    """Send a request with *name* and return True if the whole answer came."""
    connection = http.client.HTTPConnection(*address, timeout=TIMEOUT)
    try:
        connection.request("GET", "/", headers={"X-Subject": name})
        return connection.getresponse().read() == b"all at once"
    except (OSError, http.client.HTTPException):
        return False  # killed
    finally:
        connection.close()


def run(
    server: str,
    victim: str,
    kills: int,
    directory: Path,
    *,
    form: str = MAPPED,
    seed: int = 0,
) -> Result:
    """Kill *victim* under load and restart it, *kills* times; count the events."""
    chance = random.Random(f"{server} {victim} {form} {seed}")
    with (
        CountingSink(chance) as sink,
        Gunicorn(
            SERVERS[server],
            directory,
            OPENMETER_API_URL=sink.url,
            OPENMETER_SPOOL_DIR=str(directory / "spool"),
            CHAOS_FORM=form,
        ) as gunicorn,
    ):
        with Load(gunicorn.address):
            for _ in range(kills):
                _wait_for_marks(gunicorn)
                time.sleep(chance.uniform(0, _MOMENT))
                gunicorn.kill(victim, chance)
            _wait_for_marks(gunicorn)
        # The load ends with a kill, as a clean exit would deliver the waiting events.
        gunicorn.kill("all", chance)
        if not ask(gunicorn.address, "who-wakes-the-sender"):
            raise AssertionError(f"gunicorn does not answer, see {gunicorn.log}")
        marked = _names(gunicorn.marks)
        _wait_until(lambda: marked <= sink.id_of.keys())
        status = gunicorn.stop()
        if status:
            raise AssertionError(f"gunicorn ended with {status}, see {gunicorn.log}")
    return Result(
        kills=kills + 1,
        acknowledged=len(marked),
        lost=len(marked - sink.id_of.keys()),
        twice=len(sink.twice),
        repeated=len(sink.repeated()),
        repeated_batches=sink.repeated_batches,
    )


def run_fault(
    server: str, fault: str, times: int, directory: Path, *, seed: int = 0
) -> Result:
    """Cause *fault* under load, *times* times, stop, and count the events."""
    chance = random.Random(f"{server} {fault} {seed}")
    command = SERVERS[server]
    if fault == "short-lived":
        command = [*command, "--max-requests", _FEW_REQUESTS]
    spool = directory / "spool"
    with (
        CountingSink(chance) as sink,
        Gunicorn(
            command,
            directory,
            OPENMETER_API_URL=sink.url,
            OPENMETER_SPOOL_DIR=str(spool),
            OPENMETER_REQUEST_TIMEOUT="0.3" if fault == "dripping" else "10",
        ) as gunicorn,
    ):
        with Load(gunicorn.address):
            for _ in range(times):
                _wait_for_marks(gunicorn)
                time.sleep(chance.uniform(0, _MOMENT))
                gunicorn.strike(fault, spool, sink, chance)
            _wait_for_marks(gunicorn)
        marked = _names(gunicorn.marks)
        # A worker whose files were deleted notices it at its next request.
        _wait_until(lambda: _all_arrived(gunicorn, marked, sink))
        status = gunicorn.stop()
        if status:
            raise AssertionError(f"gunicorn ended with {status}, see {gunicorn.log}")
    return Result(
        kills=times,
        acknowledged=len(marked),
        lost=len(marked - sink.id_of.keys()),
        twice=len(sink.twice),
        repeated=len(sink.repeated()),
        repeated_batches=sink.repeated_batches,
        dripped=sink.dripped,
    )


def run_two_servers(
    server: str, kills: int, directory: Path, *, seed: int = 0
) -> Result:
    """Kill two applications that share a spool and send to different servers."""
    chance = random.Random(f"{server} two servers {seed}")
    total = Result()
    with contextlib.ExitStack() as opened:
        pairs = []
        for name in ("staging", "production"):
            (directory / name).mkdir()
            sink = opened.enter_context(CountingSink(chance))
            gunicorn = Gunicorn(
                SERVERS[server],
                directory / name,
                OPENMETER_API_URL=sink.url,
                OPENMETER_API_KEY=f"om_{name}",
                OPENMETER_SPOOL_DIR=str(directory / "spool"),
            )
            pairs.append((name, sink, opened.enter_context(gunicorn)))
        with contextlib.ExitStack() as loads:
            for name, _, gunicorn in pairs:
                loads.enter_context(Load(gunicorn.address, name))
            for _ in range(kills):
                for _, _, gunicorn in pairs:
                    _wait_for_marks(gunicorn)
                time.sleep(chance.uniform(0, _MOMENT))
                chance.choice(pairs)[2].kill(chance.choice(VICTIMS), chance)
            for _, _, gunicorn in pairs:
                _wait_for_marks(gunicorn)
        for name, sink, gunicorn in pairs:
            marked = _names(gunicorn.marks)
            _wait_until(
                lambda marked=marked, gunicorn=gunicorn, sink=sink: _all_arrived(
                    gunicorn, marked, sink
                )
            )
            if status := gunicorn.stop():
                raise AssertionError(f"gunicorn ended with {status}: {gunicorn.log}")
            total += Result(
                acknowledged=len(marked),
                lost=len(marked - sink.id_of.keys()),
                twice=len(sink.twice),
                repeated=len(sink.repeated()),
                repeated_batches=sink.repeated_batches,
                strayed=sum(not n.startswith((name, "who-")) for n in sink.id_of),
            )
    return total + Result(kills=kills)


def _all_arrived(gunicorn: Gunicorn, marked: set[str], sink: CountingSink) -> bool:
    ask(gunicorn.address, f"who-looks-around-{time.monotonic_ns()}")
    return marked <= sink.id_of.keys()


def _delete_oldest(spool: Path) -> None:
    """Delete the three oldest files of a spool if they are old enough."""
    files = []
    for path in filter(Path.is_file, spool.rglob("*")):
        with contextlib.suppress(OSError):
            files.append((path.stat().st_mtime, path))
    for modified, path in sorted(files)[:3]:
        if time.time() - modified > _OLD:
            path.unlink(missing_ok=True)


def _names(marks: Path) -> set[str]:
    return set(marks.read_text().split()) if marks.exists() else set()


def _wait_for_marks(gunicorn: Gunicorn) -> None:
    before = _size(gunicorn.marks)
    if not _wait_until(lambda: _size(gunicorn.marks) > before):
        raise AssertionError(f"gunicorn settles nothing, see {gunicorn.log}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _wait_until(condition: Callable[[], bool], timeout: float = 40.0) -> bool:
    """Poll *condition*, which other processes make true; return False at timeout."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    runs = list(itertools.product(SERVERS, VICTIMS, FORMS))
    print(
        "| server | struck | journal | times | acknowledged | lost "
        "| repeated | in batches |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|")
    total = Result()
    for server, victim, form in runs:
        with tempfile.TemporaryDirectory() as directory:
            result = run(
                server,
                victim,
                max(args.kills // len(runs) - 1, 1),
                Path(directory),
                form=form,
                seed=args.seed,
            )
        total += result
        _print_row(server, victim, form, result)
    for server, fault in itertools.product(SERVERS, FAULTS):
        times = max(args.kills // 20, 1)
        with tempfile.TemporaryDirectory() as directory:
            result = run_fault(server, fault, times, Path(directory), seed=args.seed)
        total += result
        _print_row(server, fault, MAPPED, result)
    for server in SERVERS:
        times = max(args.kills // 20, 1)
        with tempfile.TemporaryDirectory() as directory:
            result = run_two_servers(server, times, Path(directory), seed=args.seed)
        total += result
        _print_row(server, "two servers", MAPPED, result)
    _print_row("all", "", "", total)
    if total.lost or total.twice or total.strayed or not total.repeats_as_it_may:
        sys.exit("lost, strayed, billed twice, or repeated too often: see above")


def _print_row(server: str, victim: str, form: str, result: Result) -> None:
    print(
        f"| {server} | {victim} | {form} | {result.kills} | "
        f"{result.acknowledged} | {result.lost} | {result.repeated} | "
        f"{result.repeated_batches} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
