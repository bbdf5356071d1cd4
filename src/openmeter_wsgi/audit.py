"""Why was it not billed? Every request that became no event, with the reason."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.timestamps import timestamp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = log.get_logger(__name__)

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


def audit_record(
    environ: Mapping[str, Any], *, policy: str, reason: str, status: str | None
) -> dict[str, Any]:
    """Return what is told of one request. Of what a client sent only the address."""
    return {
        "time": timestamp(),
        "policy": policy,
        "reason": reason,
        "method": environ.get("REQUEST_METHOD", "").upper(),
        "path": f"{environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}",
        "status": status,
    }


class Audit:
    """Takes records: hands them to a callable, or appends them to a file.

    Any thread, any process: a line is one call of the system. What goes wrong is
    logged, and the request goes on.
    """

    def __init__(self, target: str | Callable[[dict[str, Any]], object]) -> None:
        self._target = target

    def tell(self, record: dict[str, Any]) -> None:
        """Take one record. Never raises an Exception."""
        try:
            if callable(self._target):
                self._target(record)
            else:
                _append(self._target, msgspec.json.encode(record) + b"\n")
        except Exception as error:  # noqa: BLE001 - the user's code or disk, on our path
            logger.error("audit: %r took no record: %r", self._target, error)


def _append(path: str, line: bytes) -> None:
    # Opened each time: it may be rotated, and no descriptor crosses a fork.
    fd = os.open(path, _FLAGS, 0o600)
    try:
        os.write(fd, line)
    finally:
        os.close(fd)
