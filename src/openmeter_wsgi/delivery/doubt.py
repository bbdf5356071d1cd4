"""A client that remembers, across crashes, what it may have sent."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from openmeter_wsgi.errors import DeliveryError, Expired

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.delivery.part import SpoolBatch
    from openmeter_wsgi.delivery.sender import Client
    from openmeter_wsgi.delivery.spool import Spool


class RecordingClient:
    """Writes down which batch is in doubt before it sends it.

    A batch whose first ambiguous attempt is longer ago than *resend_window* seconds
    is not sent again: OpenMeter may have forgotten its ids.
    """

    def __init__(
        self,
        client: Client[SpoolBatch],
        spool: Spool,
        *,
        resend_window: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._spool = spool
        self._resend_window = resend_window
        self._clock = clock

    def ingest(self, batch: SpoolBatch, /) -> None:
        """Send *batch* as the client does.

        :raises Expired: if it is in doubt for too long.
        """
        now = self._clock()
        since = self._spool.in_doubt_since(batch)
        if since is not None and now - since > self._resend_window:
            raise Expired(
                f"expired: a batch got no answer {now - since:.0f} s ago; sent again "
                "it might be billed twice"
            )
        if since is None:
            self._spool.doubt(batch, now)
        try:
            self._client.ingest(batch)
        except DeliveryError as error:
            if since is None and not error.ambiguous:
                self._spool.trust(batch)
            raise
