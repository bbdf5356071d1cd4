"""Requests that became no event: counted by reason, and told to whoever asks why."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from openmeter_wsgi import log
from openmeter_wsgi.audit import Audit, audit_record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

logger = log.get_logger(__name__)
#: Which levels are written: with DEBUG each request is explained.
LEVELS = log.levels_known(logger)


class Unbilled:
    """The requests of one policy that became no event. One process, any thread."""

    def __init__(
        self, policy_name: str, audit: str | Callable[[dict[str, Any]], object] | None
    ) -> None:
        #: How many, by reason.
        self.counts: defaultdict[str, int] = defaultdict(int)
        self._policy_name = policy_name
        self._audit = Audit(audit) if audit is not None else None

    def note(
        self, reason: str, environ: Mapping[str, Any], status: str | None
    ) -> Sequence[bytes]:
        """Count a request, and return its events: none."""
        self.counts[reason] += 1
        if self._audit is not None or logger.isEnabledFor(logging.DEBUG):
            self._explain(reason, environ, status)
        if reason == "no_subject":
            logger.warning(
                "%s: a request without subject is not billed (see subject, "
                "subject_path, set_subject and on_missing_subject)",
                reason,
            )
        return ()

    def _explain(
        self, reason: str, environ: Mapping[str, Any], status: str | None
    ) -> None:
        record = audit_record(
            environ, policy=self._policy_name, reason=reason, status=status
        )
        logger.debug(
            "not billed: %(method)s %(path)s (%(status)s): %(reason)s [%(policy)s]",
            record,
        )
        if self._audit is not None:
            self._audit.tell(record)
