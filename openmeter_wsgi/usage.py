"""`Usage`: bills usage outside a request, in jobs, scripts and webhook consumers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Unpack

from openmeter_wsgi import log
from openmeter_wsgi.deferred_usage import read_ticket
from openmeter_wsgi.errors import MeterValueError
from openmeter_wsgi.events import derived_id, encode_events, read_usage, size_problem
from openmeter_wsgi.middleware import OpenMeterMiddleware
from openmeter_wsgi.values import text_problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from openmeter_wsgi.events import Meter, Meters
    from openmeter_wsgi.option_types import Options
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.process import Process
    from openmeter_wsgi.stats import Health, Stats

logger: Final = log.get_logger(__name__)


class Usage:
    """Bills usage outside a request, with the queue and delivery of the middleware.

    *policy* and *options* are those of :class:`OpenMeterMiddleware`. Make one object
    per process, at import: the constructor starts no thread and opens no socket. Any
    thread may use the object, also after a fork. It is closed when the process exits.

    :raises ConfigError: listing all problems of the configuration.
    """

    def __init__(
        self, policy: Policy | None = None, **options: Unpack[Options]
    ) -> None:
        # A middleware that serves no request, for its ids, counts, queue and delivery.
        self._middleware = OpenMeterMiddleware(_no_application, policy, **options)
        self._policy = self._middleware.policy

    def record(self, subject: str, meters: Meters, *, key: str | None = None) -> None:
        """Bill *subject* for *meters*, given as for :func:`set_meters`.

        With a *key*, the event ids are derived from subject and key, so that OpenMeter
        drops a repetition. OpenMeter must deduplicate for that. The first amount
        counts: the same key with another amount changes nothing.

        With a ``spool_dir``, the events are in a file when this method returns, and
        survive even ``kill -9``. Without one, they are queued in memory.

        :raises MeterValueError: naming the invalid value. Nothing is billed then.
        """
        if problem := text_problem(subject):
            raise MeterValueError(f"subject: {problem}")
        if key is not None and (problem := text_problem(key)):
            raise MeterValueError(f"key: {problem}")
        read_meters = self._policy.as_meters(read_usage(meters))
        if key is None:
            request_id = self._process().ids.new()
        else:
            request_id = derived_id(subject, key)
        source = self._policy.event_source
        self.put(_encoded(read_meters, request_id, subject, source))

    def settle(self, ticket: str, meters: Meters) -> None:
        """Bill *meters* to the subject of a *ticket* from :func:`defer`.

        The event ids come from the ticket; the events have the current time. Call this
        when the job has succeeded, in any process on any host that has the same
        ``ticket_secret``. A ticket that is settled twice is billed once if OpenMeter
        deduplicates: the first amount of each type counts.

        :raises TicketError: if the ticket was altered, was signed with another secret,
            or has expired.
        :raises MeterValueError: naming the invalid value, or a type that the ticket
            does not cover. Nothing is billed then.
        """
        content = read_ticket(ticket, self._policy)
        read_meters = self._policy.as_meters(read_usage(meters))
        for meter in read_meters:
            if content.types is not None and meter.type not in content.types:
                raise MeterValueError(
                    f"meter {meter.type!r}: expected a type that the ticket covers, "
                    f"one of {', '.join(map(repr, content.types))}"
                )
        if content.subject is None:
            billed = [meter for meter in read_meters if meter.subject]
            dropped = len(read_meters) - len(billed)
            self._process().counts.dropped["no_subject"] += dropped
            logger.warning(
                "settle: a ticket of %r is not billed, as its request had no subject",
                content.policy,
            )
            read_meters = (*billed,)
        self.put(_encoded(read_meters, content.id, content.subject, content.source))

    def put(self, events: Iterable[bytes]) -> None:
        """Queue encoded events without checks. For `record`, `settle` and the CLI."""
        process = self._process()
        if not process.is_started:
            process.start({})
        for event in events:
            process.counts.events += 1
            process.transport.put(event)

    def _process(self) -> Process:
        process = self._middleware.process()
        process.guard.confirm()
        return process

    def flush(self, timeout: float | None = None) -> bool:
        """Send the queued events; return True if none is left at the end. Any thread.

        :param timeout: maximum wait in seconds; None waits until OpenMeter answers.
        """
        return self._middleware.flush(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Send the queued events, stop delivery, and log the number of events left.

        Called when the process exits. Usage may be recorded afterwards.

        :param timeout: maximum wait in seconds; default: ``shutdown_timeout``.
        """
        self._middleware.close(timeout)

    def stats(self) -> Stats:
        """Return the counts of this process."""
        return self._middleware.stats()

    def health(self) -> Health:
        """Return the current problems of this process, without waiting."""
        return self._middleware.health()


def _encoded(
    meters: Sequence[Meter], request_id: str, subject: str | None, source: str
) -> list[bytes]:
    events = encode_events(
        meters, request_id=request_id, subject=subject, source=source
    )
    for event in events:
        if problem := size_problem(event):
            raise MeterValueError(f"the event is too large: {problem}")
    return events


def _no_application(*_: Any) -> list[bytes]:
    return []
