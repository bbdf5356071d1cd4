"""Usage outside a request: in jobs, in scripts, in consumers of webhooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Unpack

from openmeter_wsgi import log
from openmeter_wsgi.errors import MeterValueError
from openmeter_wsgi.events import derived_id, encode_events, read_usage, size_problem
from openmeter_wsgi.middleware import OpenMeterMiddleware
from openmeter_wsgi.tickets import read_ticket
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
    """Bills usage outside a request, in the same way as the middleware.

    *policy* and *options* are those of :class:`OpenMeterMiddleware`. Make one object
    for each process, at import: it starts no thread and opens no socket, works in any
    thread and after a fork, and is closed when the process ends.

    :raises ConfigError: with every problem of the configuration.
    """

    def __init__(
        self, policy: Policy | None = None, **options: Unpack[Options]
    ) -> None:
        # It serves no request. Its ids, counts, delivery and exit are all that we need.
        self._middleware = OpenMeterMiddleware(_no_application, policy, **options)
        self._policy = self._middleware.policy

    def record(self, subject: str, meters: Meters, *, key: str | None = None) -> None:
        """Bill *subject* for *meters*, in the forms that :func:`set_meters` takes.

        With a *key* the events have ids that are derived from subject and key.
        OpenMeter drops a repetition, if it deduplicates. The first amount counts: the
        same key with another amount changes nothing.

        With a ``spool_dir`` the events survive the end of the process, also by
        ``kill -9``, as soon as this returns.

        :raises MeterValueError: naming the bad value; nothing is billed then.
        """
        if problem := text_problem(subject):
            raise MeterValueError(f"subject: {problem}")
        if key is not None and (problem := text_problem(key)):
            raise MeterValueError(f"key: {problem}")
        read = self._policy.as_meters(read_usage(meters))
        if key is None:
            request_id = self._process().ids.new()
        else:
            request_id = derived_id(subject, key)
        source = self._policy.event_source
        self.put(_encoded(read, request_id, subject, source))

    def settle(self, ticket: str, meters: Meters) -> None:
        """Bill *meters* under the ids of a *ticket* from :func:`defer`, dated now.

        Any process on any host may call it, if it has the same ``ticket_secret``. To
        settle a ticket twice bills once, if OpenMeter deduplicates: the first amount of
        each type counts. A job that has failed settles nothing.

        :raises TicketError: if the ticket was altered, signed with another secret, or
            has expired.
        :raises MeterValueError: naming the bad value, or a type that the ticket does
            not hold. Nothing is billed then.
        """
        found = read_ticket(ticket, self._policy)
        read = self._policy.as_meters(read_usage(meters))
        for meter in read:
            if found.types is not None and meter.type not in found.types:
                raise MeterValueError(
                    f"meter {meter.type!r}: expected a type that the ticket holds, one "
                    f"of {', '.join(map(repr, found.types))}"
                )
        if found.subject is None:
            billed = [meter for meter in read if meter.subject]
            self._process().counts.dropped["no_subject"] += len(read) - len(billed)
            logger.warning(
                "settle: a ticket of %r is not billed, as its request had no subject",
                found.policy,
            )
            read = (*billed,)
        self.put(_encoded(read, found.id, found.subject, found.source))

    def put(self, events: Iterable[bytes]) -> None:
        """Queue encoded events. The command ``send`` has checked its own."""
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
        """Send all waiting events; return True if that succeeds within *timeout*.

        Without a timeout it waits as long as OpenMeter does not answer.
        """
        return self._middleware.flush(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Send all waiting events, stop, and log the number of those that are left.

        The default of *timeout* is ``shutdown_timeout``. The end of the process calls
        it. You may call it again, and record more afterwards.
        """
        self._middleware.close(timeout)

    def stats(self) -> Stats:
        """Return the counts of this process."""
        return self._middleware.stats()

    def health(self) -> Health:
        """Return the present problems of this process. Waits for nothing."""
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
