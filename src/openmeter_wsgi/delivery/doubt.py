"""What may have been sent: known, across crashes, before it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from openmeter_wsgi.delivery import ranges
from openmeter_wsgi.delivery.progress import Doubt
from openmeter_wsgi.errors import DeliveryError, Expired

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from openmeter_wsgi.delivery.part import Run, SpoolBatch
    from openmeter_wsgi.delivery.sender import Client
    from openmeter_wsgi.delivery.spool import Spool


class Doubts:
    """Which lines may have been sent, and since when."""

    def __init__(self) -> None:
        self._by_moment: dict[float, Doubt] = {}

    @property
    def known(self) -> list[Doubt]:
        """All of them."""
        return list(self._by_moment.values())

    def since(self, runs: Iterable[Run]) -> float | None:
        """Return when the first of *runs* may have been sent, None if none was."""
        moments = (
            doubt.since
            for run in runs
            for doubt in self._by_moment.values()
            if ranges.overlap(
                doubt.lines.get(run.reading.name.key, []), run.start, run.end
            )
        )
        return min(moments, default=None)

    def add(self, runs: Iterable[Run], since: float) -> None:
        """Note that *runs* are sent at that moment."""
        doubt = self._by_moment.setdefault(since, Doubt(since, {}))
        for run in runs:
            places = doubt.lines.setdefault(run.reading.name.key, [])
            ranges.add(places, run.start, run.end)

    def forget(self, runs: Iterable[Run]) -> None:
        """Note that *runs* have arrived, or have not."""
        for run in runs:
            key = run.reading.name.key
            for doubt in self._by_moment.values():
                if places := doubt.lines.pop(key, None):
                    left = ranges.subtract(places, run.start, run.end)
                    doubt.lines.update({key: left} if left else {})
        self._by_moment = {k: v for k, v in self._by_moment.items() if v.lines}


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
