"""Which id the events of one request bear."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.environ import method_of
from openmeter_wsgi.outcome import COMPLETED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openmeter_wsgi.events import RequestIds
    from openmeter_wsgi.meters import RunTimeMeters
    from openmeter_wsgi.policy import Policy

_MAX_LENGTH = 128


class Identity:
    """Makes the ids of requests under one policy. One process, any thread."""

    def __init__(self, policy: Policy, ids: RequestIds) -> None:
        self._ids = ids
        header = policy.trusted_request_id_header
        self._key = header and "HTTP_" + header.upper().replace("-", "_")

    @property
    def is_ours(self) -> bool:
        """Whether no request brings its own."""
        return not self._key

    def of(
        self,
        environ: Mapping[str, Any],
        stated: RunTimeMeters | None,
        subject: str | None,
        outcome: str,
    ) -> str:
        """Return the id of one request that has ended."""
        if stated is not None and stated.idempotency_key and outcome is COMPLETED:
            return _derived_id(environ, subject, stated.idempotency_key)
        if self._key:
            given = str(environ.get(self._key, ""))
            if (
                given.isascii()
                and given.isprintable()
                and 0 < len(given) <= _MAX_LENGTH
            ):
                return given
        return self._ids.new()


def _derived_id(environ: Mapping[str, Any], subject: str | None, key: str) -> str:
    """Return the id that every completed attempt of one operation has."""
    parts = (
        subject or "",
        method_of(environ),
        f"{environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}",
        key,
    )
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode(errors="surrogatepass")
        digest.update(b"%d:" % len(encoded) + encoded)
    return f"once-{digest.hexdigest()[:40]}"
