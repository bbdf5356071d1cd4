"""Application of the configurations in this directory; replace it by your own.

Variables ``OPENMETER_…`` set address, key, spool and subject, so the application and
``openmeter-wsgi ship`` read the same ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi import OpenMeterMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse


def _hello(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Length", "6")])
    return [b"hello\n"]


application = OpenMeterMiddleware(_hello, meters={"api_requests": 1})
