"""Sending events and waiting for the answer: batches, repetition, what is refused."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from openmeter_wsgi.commands.reasons import short_reason
from openmeter_wsgi.errors import DeliveryError, Rejected, Unavailable
from openmeter_wsgi.events import MAX_BATCH_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from openmeter_wsgi.delivery.sender import Client

#: The first repetition comes within so many seconds, later ones so far apart at most.
_FIRST_DELAY, _MAX_DELAY = 1.0, 30.0


class Refusal(NamedTuple):
    """An event that OpenMeter does not take."""

    id: str
    reason: str


class GaveUp(Exception):
    """OpenMeter takes no events, now or as it is configured."""


class Sending:
    """Sends events and counts what became of them.

    Unlike the sender of a queue it gives up: after *patience* seconds in which nothing
    got through, or at once where the configuration makes every attempt vain.
    """

    def __init__(
        self,
        client: Client[list[bytes]],
        *,
        batch_size: int,
        patience: float,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.sent = 0
        self.refused: list[Refusal] = []
        self._client = client
        self._batch_size = batch_size
        self._patience = patience
        self._sleep = sleep
        self._jitter = jitter

    def send(self, events: Iterable[bytes]) -> None:
        """Send *events* in order.

        :raises GaveUp: if OpenMeter takes no more of them.
        """
        for batch in self._batches(events):
            self._send(batch)

    def _batches(self, events: Iterable[bytes]) -> Iterator[list[bytes]]:
        batch: list[bytes] = []
        size = 0
        for event in events:
            full = len(batch) >= self._batch_size or size + len(event) > MAX_BATCH_BYTES
            if batch and full:
                yield batch
                batch, size = [], 0
            batch.append(event)
            size += len(event)
        if batch:
            yield batch

    def _send(self, batch: list[bytes]) -> None:
        try:
            self._attempts(batch)
        except Rejected as error:
            if len(batch) == 1:
                id_ = msgspec.json.decode(batch[0])["id"]
                self.refused.append(Refusal(id_, f"{error.status}: {error.reason}"))
                return
            middle = len(batch) // 2
            self._send(batch[:middle])
            self._send(batch[middle:])
        else:
            self.sent += len(batch)

    def _attempts(self, batch: list[bytes]) -> None:
        deadline = time.monotonic() + self._patience
        failures = 0
        while True:
            try:
                self._client.ingest(batch)
            except Unavailable as error:
                delay = self._delay(failures, error.retry_after)
                if time.monotonic() + delay > deadline:
                    raise GaveUp(_told(error)) from error
                failures += 1
                self._sleep(delay)
            except Rejected:
                raise
            except DeliveryError as error:
                raise GaveUp(_told(error)) from error
            else:
                return

    def _delay(self, failures: int, asked: float | None) -> float:
        longest = min(_MAX_DELAY, _FIRST_DELAY * 2 ** min(failures, 10))
        return max(self._jitter(0, longest), asked or 0.0)


def _told(error: DeliveryError) -> str:
    if error.status is None:
        return f"OpenMeter does not answer: {short_reason(error)}"
    return f"OpenMeter answers {error.status}: {error.reason}"
