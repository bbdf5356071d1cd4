"""HTTP/1.1 with connections that stay open, and that can be ended."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from werkzeug.exceptions import BadRequest
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler
from werkzeug.test import run_wsgi_app

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

logger = logging.getLogger("openmeter_wsgi.sandbox")


class _Handler(WSGIRequestHandler):
    """One connection.

    Werkzeug's own way of answering closes the connection each time, because it cannot
    know whether the application has read the whole request. Here the body is read
    first, which leaves nothing to know.
    """

    protocol_version = "HTTP/1.1"
    # An answer is one small packet; waiting for more costs 40 ms.
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
        environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        environ["wsgi.input_terminated"] = True
        chunks, status, headers = run_wsgi_app(app, environ, buffered=True)
        code, _, reason = status.partition(" ")
        self.send_response(int(code), reason)
        for name, value in headers:
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.writelines(chunks)
        self.wfile.flush()

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
    """A server that knows its connections, so that it can end them."""

    def __init__(
        self, listener: socket.socket, host: str, app: WSGIApplication
    ) -> None:
        port = listener.getsockname()[1]
        super().__init__(host, port, app, _Handler, fd=listener.fileno())
        self._open: dict[socket.socket, threading.Thread] = {}

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection from a thread of its own."""
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
        """Log what ended a connection."""
        logger.error("%s on %r", client_address, request, exc_info=sys.exception())

    def end_connections(self, timeout: float) -> None:
        """Let requests that are being answered finish, then close all connections."""
        deadline = time.monotonic() + timeout
        for connection, thread in list(self._open.items()):
            # For a thread that waits for the next request this is the end of file.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
            thread.join(max(0.0, deadline - time.monotonic()))
        for connection in list(self._open):
            self.shutdown_request(connection)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; werkzeug's own way would exit the process."""
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
