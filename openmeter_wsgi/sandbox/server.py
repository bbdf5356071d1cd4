"""The HTTP server of the sandbox, and its Python interface: `Sandbox`."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import unquote

from werkzeug.exceptions import BadRequest
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler
from werkzeug.test import run_wsgi_app

from openmeter_wsgi.sandbox.app import create_app, create_context
from openmeter_wsgi.sandbox.context import PAUSES
from openmeter_wsgi.sandbox.entitlements import wanted
from openmeter_wsgi.sandbox.faults import Faults
from openmeter_wsgi.sandbox.store import Store

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from wsgiref.types import WSGIApplication

    from openmeter_wsgi.sandbox.context import Question

logger: Final = logging.getLogger("openmeter_wsgi.sandbox")


class _SlowFile(io.RawIOBase):
    """A wrapper of *file* that writes byte by byte and calls *pause* after each."""

    def __init__(self, file: Any, pause: Callable[[], None]) -> None:
        self.file = file
        self._pause = pause

    def write(self, data: Any) -> int:
        for byte in bytes(data):
            self.file.write(bytes((byte,)))
            self.file.flush()
            self._pause()
        return len(data)


class _Handler(WSGIRequestHandler):
    """The handler of one connection, which may serve several requests.

    Werkzeug's own handler closes the connection after each response, because the
    application may have left a part of the request unread. This one always reads the
    whole body first, so that the connection can stay open.
    """

    protocol_version = "HTTP/1.1"
    # A response is one small packet, which Nagle's algorithm would delay by 40 ms.
    disable_nagle_algorithm = True
    wbufsize = -1

    def handle_expect_100(self) -> bool:
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()
        return True

    def run_wsgi(self) -> None:
        environ = self.make_environ()
        try:
            body = self._read_body(environ)
        except (OSError, ValueError):
            self.close_connection = True
            app: WSGIApplication = BadRequest()
            body = b""
        else:
            app = self.server.app
        environ["PATH_INFO"] = _path_info(self.path)
        environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        environ |= {"wsgi.input_terminated": True, PAUSES: []}
        chunks, status, headers = run_wsgi_app(app, environ, buffered=True)
        code, _, reason = status.partition(" ")
        for pause in environ[PAUSES]:
            self.wfile = _SlowFile(self.wfile, pause)  # type: ignore[assignment]
        self.send_response(int(code), reason)
        for name, value in headers:
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"".join(chunks))
        self.wfile.flush()
        if isinstance(self.wfile, _SlowFile):
            self.wfile = self.wfile.file

    def _read_body(self, environ: dict[str, Any]) -> bytes:
        if environ.get("wsgi.input_terminated"):
            stream: io.RawIOBase = environ["wsgi.input"]
            return stream.read() or b""
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = self.rfile.read(length) if length > 0 else b""
        if len(body) != max(length, 0):
            raise ConnectionError("the client went away in the middle of its request")
        return body

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        # %r keeps control characters of a path away from the terminal.
        logger.debug("%r %s %s", self.requestline, code, size)

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
        logger.debug("%s: %r", type, message % args if args else message)


class Server(ThreadedWSGIServer):
    """A server with a list of its connections, so that it can close them."""

    def __init__(
        self, listener: socket.socket, host: str, app: WSGIApplication
    ) -> None:
        port = listener.getsockname()[1]
        super().__init__(host, port, app, _Handler, fd=listener.fileno())
        self._open: dict[socket.socket, threading.Thread] = {}

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a new thread."""
        thread = threading.Thread(
            target=self.process_request_thread,
            args=(request, client_address),
            name="openmeter_wsgi.sandbox.connection",
            daemon=True,
        )
        self._open[request] = thread
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        super().shutdown_request(request)
        self._open.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the error that ended a connection."""
        logger.error("%s on %r", client_address, request, exc_info=sys.exception())

    def end_connections(self, timeout: float) -> None:
        """Wait *timeout* seconds for current requests, then close all connections."""
        deadline = time.monotonic() + timeout
        for connection, thread in list(self._open.items()):
            # A thread that waits for the next request reads the end of file, and ends.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
            thread.join(max(0.0, deadline - time.monotonic()))
        for connection in list(self._open):
            self.shutdown_request(connection)


def _path_info(target: str) -> str:
    """Return the path of a request, decoded except for ``%2F`` and ``%25``."""
    path = re.sub("%(2[Ff]|25)", r"%25\1", target.partition("?")[0])
    # WSGI defines PATH_INFO as latin-1 text.
    return unquote(path, "latin-1")


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, or raise OSError; werkzeug would exit the process."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


#: Maximum seconds that `Sandbox.close` waits for current requests.
CLOSE_TIMEOUT = 5.0


class Sandbox:
    """A local server with OpenMeter's API, including its quirks.

    It serves in background threads, from its construction until `close`::

        with Sandbox() as sandbox:
            requests.post(f"{sandbox.url}/api/v1/events", json=event)

    :param port: the port to listen on; 0 chooses a free one, see `url`.
    :param database: the SQLite file for all data; None uses a temporary file, which
        `close` removes.
    :param dedupe: True to drop an event whose source and id were seen before, as
        OpenMeter does if its deduplication is on.
    :param fail_rate: the share of ingest requests that is answered with 500, half of
        them after the events were stored.
    :param latency: the seconds by which responses to ingest requests are delayed.
        `faults` can change these two, and set other faults.
    :param visible_after: the seconds from an event's arrival until meters, balances
        and lists include it; about 1 in OpenMeter. ``store.visible_after`` changes it.
    :param clock: a function that returns the current time in Unix seconds.
    :raises OSError: if the server cannot listen on the address.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        database: str | Path | None = None,
        dedupe: bool = True,
        fail_rate: float = 0.0,
        latency: float = 0.0,
        visible_after: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.faults: Faults = Faults()
        self.faults.ingest.set(fail_rate=fail_rate, latency=latency)
        with listen(host, port) as listener:
            self.store: Store = Store(
                database, dedupe=dedupe, visible_after=visible_after, clock=clock
            )
            self._context = create_context(self.store, self.faults)
            app = create_app(self._context, host=host)
            self._server = Server(listener, host, app)
        self.host = host
        self.port: int = self._server.port
        self._closed = False
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.05},
            name="openmeter_wsgi.sandbox",
            daemon=True,
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """The URL of the page, and the base URL of the API."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def questions(self) -> Counter[Question]:
        """The numbers of entitlement requests by kind, customer and feature."""
        return self._context.questions.counts()

    def asked(self, **which: str | None) -> int:
        """Return the number of entitlement requests of a kind, customer and feature.

        :param which: any of ``kind``, ``customer`` and ``feature``, as in `questions`.
        """
        return self._context.questions.count(**which)

    def wait_asked(
        self, count: int = 1, *, timeout: float = 5.0, **which: str | None
    ) -> bool:
        """Wait for *count* such requests; return False if *timeout* seconds pass first.

        A request is counted when it arrives, even if its response is delayed.
        """
        return self._context.questions.wait(count, timeout, **which)

    def forget_questions(self) -> None:
        """Set the numbers of entitlement requests to zero."""
        self._context.questions.clear()

    def grant(
        self,
        customer: str,
        feature: str,
        amount: float | None = None,
        *,
        soft: bool = False,
        period: str = "MONTH",
        config: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Give *customer* access to *feature*, and return the entitlement.

        The entitlement is metered if there is an *amount* or a *soft* limit, static if
        there is a *config*, else boolean. A missing customer or feature is created, the
        feature with the meter of the same name. If the customer has an entitlement of
        the same kind, the amount is added to it; one of another kind is replaced. Only
        usage that arrives from now on counts.

        :param amount: the amount granted in every usage period; may be 0.
        :param soft: True to keep the access when the amount is used up.
        :param period: DAY, WEEK, MONTH, YEAR or an ISO 8601 duration.
        :raises ValueError: if an argument is invalid, or the feature has no meter.
        """
        description = wanted(amount, soft=soft, period=period, config=config)
        entitlement = self._context.granting.grant(customer, feature, description)
        return self._context.entitlements.document(entitlement)

    def revoke(self, customer: str, feature: str) -> None:
        """Delete the entitlement of *customer* to *feature*.

        :raises ValueError: if there is no such entitlement.
        """
        self._context.granting.revoke(customer, feature)

    def reset(self, customer: str, feature: str) -> None:
        """Begin a new usage period now: usage is zero and the amount is granted again.

        :raises ValueError: if there is no such metered entitlement.
        """
        self._context.granting.reset(customer, feature)

    def delete_customer(self, customer: str) -> None:
        """Delete *customer* and its entitlements.

        :raises ValueError: if there is no such customer.
        """
        self._context.granting.delete_customer(customer)

    def value(self, customer: str, feature: str) -> dict[str, Any]:
        """Return the value of *customer*'s entitlement to *feature*.

        It has all members of the API's response, and always ``hasAccess``, which the v2
        API leaves out if it is false. Faults do not apply, and the call is not counted.

        :raises ValueError: if there is no such customer.
        """
        payer = self._context.customers.get(customer)
        entitlement = self._context.entitlements.find(payer, feature)
        return self._context.access.value(payer, entitlement)

    def close(self) -> None:
        """Finish the current requests, then close the server and the store.

        Further calls do nothing.
        """
        if self._closed:
            return
        self._closed = True
        self.faults.stop()
        self._server.shutdown()
        self._thread.join()
        self._server.end_connections(CLOSE_TIMEOUT)
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
