"""Cost of a metered stream over a socket, compared with a bare one.

    python -m tests.benchmarks.socket_cost [--rounds 15] [--chunks 2000]

Every round sends the same chunks of 16 KiB bare and metered, one after the other, into
a socket that another process empties. A figure is the ratio of the two times.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

from openmeter_wsgi import OpenMeterMiddleware
from tests.benchmarks import report

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIApplication

CHUNK = bytes(16 * 1024)
WHAT = "a chunk of 16 KiB over a socket, metered ÷ bare"
#: Maximum time of a metered stream, divided by that of a bare one.
MOST = 1.10


@contextlib.contextmanager
def emptied_socket() -> Iterator[socket.socket]:
    """Yield a socket whose other end another process reads."""
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        subprocess.Popen(["cat"], stdin=theirs, stdout=subprocess.DEVNULL) as reader,
    ):
        try:
            yield ours
        finally:
            ours.close()
            theirs.close()
            reader.kill()


def send(app: WSGIApplication, receiver: socket.socket) -> float:
    """Serve one response as a server does, and return the seconds that it took."""
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    began = time.perf_counter()
    response: Any = app(environ, lambda *_: lambda data: None)
    for chunk in response:
        receiver.sendall(chunk)
    if hasattr(response, "close"):
        response.close()
    return time.perf_counter() - began


def measure(rounds: int, chunks: int) -> list[report.Row]:
    def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "application/octet-stream")])
        return (CHUNK for _ in range(chunks))

    metered = OpenMeterMiddleware(
        app, api_url="http://127.0.0.1:9", on_missing_subject="acme",
        flush_interval=3_600.0, shutdown_timeout=0, dry_run=True,
    )  # fmt: skip
    ratios = []
    with emptied_socket() as receiver:
        send(metered, receiver)  # warms up
        for _ in range(rounds):
            bare = send(app, receiver)
            ratios.append(send(metered, receiver) / bare)
    return [report.Row(WHAT, "x", ratios, MOST)]


def main() -> None:
    args = report.arguments(__doc__, rounds=15, chunks=2_000).parse_args()
    report.show("Streams", measure(args.rounds, args.chunks), args.json)


if __name__ == "__main__":
    main()
