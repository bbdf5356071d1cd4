"""Counts settled requests that became no event, by reason.

Each is reported to the callable of the option ``audit``, and logged at level DEBUG.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from openmeter_wsgi import log
from openmeter_wsgi.request import method_of, raise_after_settling
from openmeter_wsgi.values import timestamp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Users know the logger by the name of the option.
logger: Final = log.get_logger("openmeter_wsgi.audit")


class NotMetered:
    """Counts the requests of one policy that became no event. Any thread."""

    def __init__(
        self, policy_name: str, audit: Callable[[dict[str, Any]], object] | None
    ) -> None:
        #: Number of requests by reason.
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.audit: Final = audit
        self._policy_name = policy_name

    def count(
        self, reason: str, environ: Mapping[str, Any], status: str | None
    ) -> Sequence[bytes]:
        """Count and report a request; return its events, an empty sequence."""
        self.counts[reason] += 1
        if self.audit or logger.isEnabledFor(logging.DEBUG):
            self.report(reason, environ, status)
        return ()

    def report(
        self, reason: str, environ: Mapping[str, Any], status: str | None
    ) -> None:
        """Pass a record of the request to the callable of the policy and to the log."""
        record = {
            "time": timestamp(),
            "policy": self._policy_name,
            "reason": reason,
            "method": method_of(environ),
            # No query, header or body: they may contain secrets.
            "path": f"{environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}",
            "status": status,
        }
        logger.debug(
            "not billed: %(method)s %(path)s (%(status)s): %(reason)s [%(policy)s]",
            record,
        )
        if self.audit is not None:
            try:
                call_audit(self.audit, record)
            except BaseException as error:  # noqa: BLE001 - such as SystemExit
                raise_after_settling(environ, error)


def call_audit(
    audit: Callable[[dict[str, Any]], object], record: dict[str, Any]
) -> None:
    """Call *audit* with *record*. An Exception is logged and not raised."""
    try:
        audit(record)
    except Exception as error:  # noqa: BLE001 - code of the application
        logger.error("audit: %r raised %r; the record is lost", audit, error)
