"""HTTP client of OpenMeter's ingest endpoint."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openmeter_wsgi.connection import Connection, delivery_error, reason
from openmeter_wsgi.errors import Rejected
from openmeter_wsgi.options import v3_url

if TYPE_CHECKING:
    from openmeter_wsgi.options import ApiKey

#: Content types without a charset: with one, OpenMeter's v1 refuses the request.
_SINGLE_EVENT = "application/cloudevents+json"
_BATCH = "application/cloudevents-batch+json"

#: Status codes that refuse at least one event of the batch.
_REFUSED = {400, 413}


class Array(Sequence[bytes]):
    """A batch that can build its own JSON array."""

    @abstractmethod
    def joined(self) -> bytes:
        """Return the JSON array of all events."""


class OpenMeterClient:
    """Client that sends batches to one server. Belongs to one thread of one process."""

    def __init__(self, *, url: str, flavor: str, key: ApiKey, timeout: float) -> None:
        self._url = f"{v3_url(url) if flavor == 'v3' else f'{url}/api/v1'}/events"
        self._connection = Connection(key=key, timeout=timeout, needs_body=False)
        #: Seconds by which our clock is ahead of the server's, by its last answer.
        self.clock_ahead: float = 0.0

    def ingest(self, events: Sequence[bytes]) -> None:
        """Send encoded events in one request.

        :raises DeliveryError: if the server did not accept them. Its class tells the
            sender how to go on.
        """
        is_single = len(events) == 1
        reply = self._connection.request(
            "POST",
            self._url,
            data=events[0] if is_single else _array(events),
            headers={"Content-Type": _SINGLE_EVENT if is_single else _BATCH},
        )
        if (date := reply.date) is not None:
            self.clock_ahead = time.time() - date
        if reply.status in _REFUSED:
            raise Rejected(reason(reply.body), status=reply.status)
        if not 200 <= reply.status <= 299 or reply.is_page:
            raise delivery_error(reply)

    def close(self) -> None:
        """Close the connections. The next request opens new ones."""
        self._connection.close()


def _array(events: Sequence[bytes]) -> bytes:
    if isinstance(events, Array):
        return events.joined()
    first, *others, last = events
    return b",".join([b"[" + first, *others, last + b"]"])  # one copy, not two
