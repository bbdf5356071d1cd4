"""Small WSGI applications, each with another form of response that WSGI allows."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs
from wsgiref.util import FileWrapper

import flask

from openmeter_wsgi import (
    OpenMeterMiddleware,
    add_meters,
    bytes_received,
    bytes_sent,
    duration,
    llm_usage,
    method,
    multi_status,
    records,
    response_header,
    response_json,
    route,
    set_idempotency_key,
    status,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIApplication

    Environ = dict[str, Any]

TEXT = [("Content-Type", "text/plain")]
CHUNKS = [b"one", b"", b"two, which is longer", b"three"]
BLOCK = bytes(range(256)) * 4096
BLOCKS = 100


def listed(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", list(TEXT))
    return [b"all at once"]


def listed_in_parts(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", list(TEXT))
    return list(CHUNKS)


def tupled(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("201 Created", [*TEXT, ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")])
    return (b"a tuple",)


def with_length(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    body = b"".join(CHUNKS)
    start_response("200 OK", [*TEXT, ("Content-Length", str(len(body)))])
    return iter(CHUNKS)


def empty(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", list(TEXT))
    return []


def generated(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
    start_response("200 OK", list(TEXT))
    return (chunk for chunk in CHUNKS)


def started_late(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
    yield from _late(start_response)


def _late(start_response: StartResponse) -> Iterator[bytes]:
    start_response("200 OK", list(TEXT))
    yield from CHUNKS


def started_twice(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
    start_response("200 OK", list(TEXT))
    try:
        int("not a number")
    except ValueError:
        start_response("404 Not Found", list(TEXT), sys.exc_info())
    yield b"it is not here"


def written(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    write = start_response("200 OK", list(TEXT))
    write(b"written, ")
    write(b"")
    write(b"then ")
    return [b"returned"]


def no_content(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("204 No Content", [])
    return []


def not_modified(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("304 Not Modified", [("ETag", '"x"')])
    return []


def not_found(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("404 Not Found", list(TEXT))
    return [b"nothing here"]


def echoed(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", list(TEXT))
    return [environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))]


def raises(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    raise ValueError("before anything")


def raises_after_start(
    environ: Environ, start_response: StartResponse
) -> Iterable[bytes]:
    start_response("200 OK", list(TEXT))
    raise ValueError("after start_response")


def raises_before_first_chunk(
    environ: Environ, start_response: StartResponse
) -> Iterator[bytes]:
    start_response("200 OK", list(TEXT))
    yield b""
    raise ValueError("before the first chunk")


def raises_after_first_chunk(
    environ: Environ, start_response: StartResponse
) -> Iterator[bytes]:
    start_response("200 OK", list(TEXT))
    yield b"so far so good"
    raise ValueError("after the first chunk")


def raises_after_write(
    environ: Environ, start_response: StartResponse
) -> Iterable[bytes]:
    start_response("200 OK", list(TEXT))(b"so far so good")
    raise ValueError("after write")


class ClosesBadly:
    def __iter__(self) -> Iterator[bytes]:
        return iter([b"the whole ", b"body"])

    def close(self) -> None:
        raise ValueError("in close")


def raises_in_close(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", list(TEXT))
    return ClosesBadly()


def _wrap(environ: Environ, file: Any) -> Iterable[bytes]:
    wrapped: Iterable[bytes] = environ.get("wsgi.file_wrapper", FileWrapper)(file, 1000)
    return wrapped


def file_on_disk(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    file = Path(__file__).open("rb")  # noqa: SIM115 - the server closes it
    size = os.fstat(file.fileno()).st_size
    start_response("200 OK", [*TEXT, ("Content-Length", str(size))])
    return _wrap(environ, file)


def file_without_length(
    environ: Environ, start_response: StartResponse
) -> Iterable[bytes]:
    start_response("200 OK", list(TEXT))
    return _wrap(environ, Path(__file__).open("rb"))


def file_in_memory(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", list(TEXT))
    return _wrap(environ, io.BytesIO(b"in memory " * 1000))


def large(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    return (BLOCK for _ in range(BLOCKS))


def large_digest() -> str:
    digest = hashlib.sha256()
    for _ in range(BLOCKS):
        digest.update(BLOCK)
    return digest.hexdigest()


def gated(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
    """Send the second chunk once the test sends bytes over its port ``gate``."""
    gate = int(parse_qs(environ["QUERY_STRING"])["gate"][0])
    start_response("200 OK", list(TEXT))
    yield b"first\n"
    with socket.create_connection(("127.0.0.1", gate), timeout=40) as connection:
        yield connection.recv(100)


def keyed(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
    """Set the idempotency key, answer with the process id, and wait for ``gate``."""
    query = parse_qs(environ["QUERY_STRING"])
    set_idempotency_key(environ, query["key"][0])
    start_response("200 OK", list(TEXT))
    yield b"%d\n" % os.getpid()
    if "gate" in query:
        with socket.create_connection(("127.0.0.1", int(query["gate"][0]))) as gate:
            gate.recv(1)
    yield from [b"x" * 200_000] * 20


def counted(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    """Bill five tokens."""
    add_meters(environ, {"tokens": 5})
    start_response("200 OK", list(TEXT))
    return [b"counted"]


def stuck(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    """Answer at once; never answer a request of ``/stuck``."""
    if environ["PATH_INFO"] == "/stuck":
        left, right = socket.socketpair()
        with left, right:
            left.recv(1)
    return listed(environ, start_response)


_flask = flask.Flask(__name__)


@_flask.route("/file")
def _send_file() -> flask.Response:
    return flask.send_file(__file__, max_age=60)


@_flask.route("/memory")
def _send_memory() -> flask.Response:
    return flask.send_file(io.BytesIO(b"x" * 10_000), mimetype="text/plain")


@_flask.route("/stream")
def _stream() -> flask.Response:
    return flask.Response((c for c in CHUNKS), mimetype="text/plain")


@_flask.route("/json")
def _json() -> dict[str, int]:
    return {"answer": 42}


def _flask_at(path: str) -> WSGIApplication:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        environ["PATH_INFO"] = path
        return _flask.wsgi_app(environ, start_response)

    return app


#: The applications that succeed.
APPS: dict[str, WSGIApplication] = {
    app.__name__: app
    for app in (
        listed, listed_in_parts, tupled, with_length, empty, generated, started_late,
        started_twice, written, no_content, not_modified, not_found, echoed,
        file_on_disk, file_without_length, file_in_memory,
    )
}  # fmt: skip
FAILING: dict[str, WSGIApplication] = {
    app.__name__: app
    for app in (
        raises, raises_after_start, raises_before_first_chunk,
        raises_after_first_chunk, raises_after_write, raises_in_close,
    )
}  # fmt: skip
FRAMEWORK = {
    f"flask_{name}": _flask_at(f"/{name}")
    for name in ("file", "memory", "stream", "json", "missing")
}
SERVED = {**APPS, **FAILING, **FRAMEWORK}


def metered(app: WSGIApplication, **options: Any) -> OpenMeterMiddleware:
    """Return *app* in a middleware that takes the subject from X-Subject."""
    options = {"meters": {"requests": 1}, "subject": "header:X-Subject", **options}
    options.setdefault("on_missing_subject", "anonymous")
    return OpenMeterMiddleware(app, **options)


HALF = {
    "type": "api_requests",
    "data": {"total": 1, "half": "$request.header.X-Half"},
}
#: A meter with all measures, so that the middleware reads the whole response.
MEASURED = {
    "type": "measured",
    "data": {
        repr(measure): measure.default(None)
        for measure in (
            bytes_received(), bytes_sent(), duration(), llm_usage(), method(),
            multi_status(), records(), response_header("X"), response_json("$.answer"),
            route(), status(),
        )
    },
}  # fmt: skip


def one_of_many() -> WSGIApplication:
    """Serve each application as `/bare/NAME`, `/metered/NAME` and `/measured/NAME`."""
    apps: dict[str, dict[str, Callable[..., Iterable[bytes]]]] = {
        "bare": {**SERVED, "gated": gated, "large": large},
    }
    apps["metered"] = {
        name: metered(app, dry_run=True) for name, app in apps["bare"].items()
    }
    apps["measured"] = {
        name: metered(app, dry_run=True, meter=MEASURED)
        for name, app in apps["bare"].items()
    }

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        _, kind, name = environ["PATH_INFO"].split("/")
        environ["PATH_INFO"] = f"/{name}"
        return apps[kind][name](environ, start_response)

    return app


def __getattr__(name: str) -> Any:
    """Make an application when a server loads it by name, so only in the server."""
    makers = {
        "bare_or_metered": one_of_many,
        "billed": lambda: metered(listed, flush_interval=0.05),
        "billed_once": lambda: metered(keyed, meters={"bytes": bytes_sent()}),
        "limited": lambda: OpenMeterMiddleware(listed, meters={"api_requests": 1}),
        "halves": lambda: OpenMeterMiddleware(listed, meter=HALF),
        "billed_at_exit": lambda: metered(stuck, flush_interval=3600, batch_size=1000),
    }
    if name in makers:
        return makers[name]()
    raise AttributeError(name)
