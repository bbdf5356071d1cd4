"""Whether OpenMeter drops a repeated event."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from openmeter_wsgi.commands.asking import NoAnswer
from openmeter_wsgi.commands.checks.event import INTERVAL, PATIENCE, listed
from openmeter_wsgi.commands.checks.findings import failure, ok, unknown
from openmeter_wsgi.errors import DeliveryError
from openmeter_wsgi.spool import deduplication

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.checks.findings import Finding, Sent, Situation

_NAME = "deduplication"
#: The two are so many seconds apart: within one flush of its sink, 2 s as shipped,
#: OpenMeter drops a repetition even where deduplication is off.
PAUSE = 5.0
#: So long after a later event is listed, the repetition has had its time, too.
GRACE = 2.5


def look_at_repetition(situation: Situation) -> Iterator[Finding]:
    """Send the marked event again, and see whether it is stored again."""
    sent = situation.sent
    assert sent is not None  # noqa: S101 - the table says so
    try:
        times = _times_stored(situation, sent)
    except (NoAnswer, DeliveryError) as error:
        yield unknown(_NAME, str(error))
        return
    if not times:
        yield unknown(_NAME, "OpenMeter does not list what was sent to it")
        return
    if times > 1:
        yield failure(
            _NAME,
            "an event that was sent twice is stored twice: what is sent again "
            "because its answer was lost is billed twice",
            deduplication.REMEDY,
        )
        yield from _keys_in_vain(situation)
    else:
        yield ok(
            _NAME,
            f"of an event sent twice, {PAUSE:g} s apart, one is stored",
            deduplication.IN_THE_SINK,
        )
    yield from _keep(situation, deduplicates=times == 1)


def _keys_in_vain(situation: Situation) -> Iterator[Finding]:
    """Say what becomes of set_idempotency_key, where it is used."""
    if any(policy.idempotency_keys for _, policy in situation.policies()):
        yield failure(
            "idempotency keys",
            "set_idempotency_key has no effect: a request that is repeated under its "
            "key is billed again, since nothing drops the second event",
            "switch deduplication on, or do not let customers repeat requests for free",
        )


def _times_stored(situation: Situation, sent: Sent) -> int:
    """Repeat the event, and return how often it is listed then; 0: not even once.

    :raises NoAnswer: if the server lists nothing.
    :raises DeliveryError: if it takes no more events.
    """
    left = sent.at + PAUSE - time.monotonic()
    situation.wait(max(left, 0.0), "Waiting before an event is repeated")
    situation.client.ingest([sent.encoded])
    # Listed after the repetition, whether that one is or not.
    after = situation.send()
    if not listed(situation, after.id, PATIENCE):
        return 0
    source = situation.policy.event_source
    deadline = time.monotonic() + GRACE
    while (times := len(situation.listing.entries(sent.id, source))) <= 1:
        if (left := deadline - time.monotonic()) <= 0:
            break
        pause = min(left, INTERVAL)
        situation.wait(pause, "Waiting whether a repeated event is stored")
    return times


def _keep(situation: Situation, *, deduplicates: bool) -> Iterator[Finding]:
    """Leave the verdict to the sender of the spool, which says it at its start."""
    if situation.spool is None:
        return
    url = situation.policy.api_url
    try:
        deduplication.save(situation.spool, url, deduplicates=deduplicates)
    except OSError as error:
        yield unknown("deduplication verdict", f"cannot be kept: {error}")
