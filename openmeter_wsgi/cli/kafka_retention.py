"""Warnings of events older than the time for which Kafka keeps messages.

Kafka deletes a message by the time of its event, so an old event may be lost after
OpenMeter has taken it.
"""

from __future__ import annotations

import time

from openmeter_wsgi.values import age_of

#: Number of days for which Kafka keeps a message by default.
RETENTION_DAYS = 7
_DAY = 86_400.0

REMEDY = (
    "raise retention.ms of OpenMeter's topic (om_default_events) before they are sent, "
    "and compare 'openmeter-wsgi usage' with the sent events"
)


def is_old(event: bytes) -> bool:
    """Return True if an encoded event is older than Kafka's default retention."""
    return age_of(event) > RETENTION_DAYS * _DAY


def oldest(moment: float | None) -> str | None:
    """Return a warning if the oldest event, of time *moment*, is too old, else None."""
    days = 0.0 if moment is None else (time.time() - moment) / _DAY
    if days <= RETENTION_DAYS:
        return None
    return f"the oldest waiting event is {days:.0f} days old; {_DANGER}"


def several(events: int) -> str:
    """Return a warning about a number of old events."""
    return f"{events} events are older than {RETENTION_DAYS} days; {_DANGER}"


_DANGER = (
    f"Kafka, which keeps {RETENTION_DAYS} days by default, may delete such an event "
    "after OpenMeter has taken it, without an error"
)
