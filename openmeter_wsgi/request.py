"""The record of one request, and the helpers with which handlers change it.

The record is stored in the environ under `REQUEST`. A copy of the environ refers to the
same record. Helpers such as `set_meters` find the record by the request object of any
framework, and write to it. The response reads it when it settles the request.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

from openmeter_wsgi import log
from openmeter_wsgi.errors import MeterValueError
from openmeter_wsgi.events import (
    CheckedUsage,
    Meter,
    Meters,
    Number,
    add_numbers,
    read_usage,
)
from openmeter_wsgi.values import text_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping
    from wsgiref.types import StartResponse

    from openmeter_wsgi.billing import Billing
    from openmeter_wsgi.entitlements.decision import Decision
    from openmeter_wsgi.exchange import ResponseCapture
    from openmeter_wsgi.framework_base import RememberedSubjects
    from openmeter_wsgi.quota.account import Reservation

logger: Final = log.get_logger(__name__)

#: "OPTIONS" in any mixture of cases: a set lookup is faster than `upper`.
OPTIONS: Final = frozenset(
    map("".join, itertools.product("Oo", "Pp", "Tt", "Ii", "Oo", "Nn", "Ss"))
)
_ERROR_STATUS = "500"
#: The keys of `RequestRecord.caller`.
SUBJECT: Final = "subject"
USER: Final = "user"
#: The key of the record in the environ.
REQUEST: Final = "openmeter_wsgi.request"

# States of a request. Comparisons rely on the order of the numbers.
#: No middleware has started to meter the request.
UNMETERED: Final = 0
#: A middleware meters the request, and no part of the body has been sent.
OPEN: Final = 1
#: The first non-empty part of the body is being sent, or has been sent.
STARTED: Final = 2
#: The client disconnected while the application was calling `write`.
DISCONNECTED: Final = 3
#: The application raised.
RAISED: Final = 4
#: The body was iterated to its end, or the application returned a file for `sendfile`.
FINISHED: Final = 5
#: The events are encoded, and some of them may be in the queue.
ENCODED: Final = 6
#: All events are in the queue.
SETTLED: Final = 7

# Outcomes of a response, by which `Billing` decides what is billed.
#: The response was sent completely.
COMPLETED: Final = "completed"
#: The application raised.
FAILED: Final = "failed"
#: The server closed the response early, because the client disconnected.
ABORTED: Final = "aborted"


class RequestRecord:
    """The state of one request. Used only by the thread that serves the request.

    The application gets `start_response` of this object in place of the server's.
    """

    __slots__ = (
        "billing", "caller", "capture", "decision", "remembered", "reserved", "route",
        "server_start", "server_write", "state", "status", "usage",
    )  # fmt: skip

    # `new_record` and the middleware set the attributes: an __init__ would cost a call.
    #: The billing of the middleware's policy, of the route or of the view.
    billing: Billing | None
    state: int
    #: The status line that the server accepted, None before that.
    status: str | None
    #: The callables of the server, None once the request is settled.
    server_start: StartResponse | None
    server_write: Callable[[bytes], object] | None
    #: Measures the response, None if no meter needs a measurement.
    capture: ResponseCapture | None
    #: The arguments of :func:`set_subject` and :func:`set_user`, None without a call.
    caller: dict[str, object] | None
    #: The usage that the handler added with helpers, None if it added none.
    usage: RunTimeUsage | None
    #: The template of the path, such as ``/users/<id>``: see :func:`set_route`.
    route: str | None
    #: The last decision about entitlements, None without a check.
    decision: Decision | None
    #: Reservations of quota by feature key, None without one.
    reserved: dict[str, Reservation] | None
    #: Subjects that were read from the framework while it served the request.
    remembered: RememberedSubjects | None

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """Call the server's start_response, and keep the status (PEP 3333).

        :raises AssertionError: if the response is closed.
        """
        start = self.server_start
        if start is None:
            raise AssertionError("start_response called after the response was closed")
        # Some test clients accept only two arguments.
        if exc_info is None:
            self.server_write = start(status, headers)
        else:
            self.server_write = start(status, headers, exc_info)
        self.status = status
        if self.capture is not None:
            self.capture.begin(status, headers)
        return self.write

    def write(self, data: bytes) -> object:
        """Call the server's write callable (PEP 3333)."""
        write = self.server_write
        if write is None:
            raise AssertionError("write called after the response was closed")
        if data and self.state == OPEN:
            self.state = STARTED
        try:
            written = write(data)
        except (AssertionError, TypeError, ValueError):
            raise  # the application passed a wrong argument
        except Exception:
            if self.state < ENCODED:
                self.state = DISCONNECTED
            raise
        if self.capture is not None:
            self.capture.read_chunk(data)
        return written

    def mark_settled(self) -> None:
        """Mark the request as settled, and drop the references to the server's objects.

        The server may keep the environ, and thereby this record.
        """
        self.state = SETTLED
        self.server_start = self.server_write = self.capture = None

    def mark_failed(self) -> None:
        """Set state and status of a request whose application raised."""
        if self.state == DISCONNECTED:
            return  # the server raised, not the application
        if self.state == OPEN:
            # Nothing has been sent, so the server answers 500.
            self.status = _ERROR_STATUS
        if self.state < ENCODED:
            self.state = RAISED


def new_record() -> RequestRecord:
    """Return a record in the state UNMETERED."""
    record = RequestRecord()
    record.billing = record.status = None
    record.state = UNMETERED
    record.server_start = record.server_write = record.capture = None
    record.caller = record.usage = record.route = None
    record.decision = record.reserved = record.remembered = None
    return record


def adopt_record(
    environ: dict[str, Any], billing: Billing, start_response: StartResponse
) -> RequestRecord | None:
    """Start metering a request whose environ has a record already; return the record.

    Return None if an outer middleware meters the request.
    """
    record: RequestRecord = environ[REQUEST]
    if record.state == SETTLED:  # the environ is used for a second request
        settled, record = record, new_record()
        # A layer outside the middleware may have called `set_subject` once for both.
        record.caller = settled.caller
        environ[REQUEST] = record
    elif record.state != UNMETERED:
        return None
    record.billing = billing
    record.server_start = start_response
    record.state = OPEN
    return record


def environ_of(request: object) -> dict[str, Any] | None:
    """Return the WSGI environ of *request*, which may be the environ itself, or None.

    Requests of Flask, Django, Bottle and Pyramid have an attribute ``environ``, those
    of Falcon ``env``.
    """
    if isinstance(request, dict):
        return request
    for name in ("environ", "env"):
        environ = getattr(request, name, None)
        if isinstance(environ, dict):
            return environ
    return None


def metered_request(environ: Mapping[str, Any] | None) -> RequestRecord | None:
    """Return the record of a request that is metered, or None."""
    request: RequestRecord | None = None if environ is None else environ.get(REQUEST)
    return None if request is None or request.billing is None else request


def record_of(environ: MutableMapping[str, Any]) -> RequestRecord:
    """Return the record of a request. Create the record if there is none."""
    request: RequestRecord | None = environ.get(REQUEST)
    if request is None:
        request = environ[REQUEST] = new_record()
    return request


def raise_after_settling(environ: Mapping[str, Any], error: BaseException) -> None:
    """Keep *error*, such as SystemExit, and raise it once the request is settled.

    :raises BaseException: *error* at once, outside a metered request.
    """
    record = metered_request(environ)
    if record is None:
        raise error
    if record.usage is None:
        record.usage = RunTimeUsage()
    record.usage.interruption = error


def reservations_of(environ: dict[str, Any]) -> dict[str, Reservation]:
    """Return the mutable mapping of the request's reservations by feature key."""
    request = record_of(environ)
    if request.reserved is None:
        request.reserved = {}
    return request.reserved


def billing_of(environ: Mapping[str, Any] | None) -> Billing | None:
    """Return the billing of a request, or None if the request is not metered."""
    request = metered_request(environ)
    return None if request is None else request.billing


def has_user(environ: Mapping[str, Any]) -> bool:
    """Return True if :func:`set_user` was called for this request."""
    request: RequestRecord | None = environ.get(REQUEST)
    return request is not None and USER in (request.caller or ())


def method_of(environ: Mapping[str, Any]) -> str:
    """Return the HTTP method of a request in upper case, as most frameworks do.

    Many servers leave the case as the client sent it.
    """
    return str(environ.get("REQUEST_METHOD", "")).upper()


def is_options(environ: Mapping[str, Any]) -> bool:
    """Return True if the method is OPTIONS. Browsers send such requests for CORS."""
    return environ.get("REQUEST_METHOD") in OPTIONS


class RunTimeUsage:
    """The usage that a handler sets and adds while it serves one request.

    Used only by the thread that serves the request, so there is no lock.
    """

    __slots__ = (
        "_documents",
        "_flat",
        "_measured",
        "_overridden",
        "deferred",
        "idempotency_key",
        "interruption",
        "is_denied",
        "is_unmetered",
    )

    def __init__(self) -> None:
        #: The key that all repetitions of this operation share, None without one.
        self.idempotency_key: str | None = None
        #: The exception that `raise_after_settling` keeps, such as SystemExit.
        self.interruption: BaseException | None = None
        #: True if the view is decorated with `no_meter`.
        self.is_unmetered: bool = False
        #: True if the request was denied: nothing is billed.
        self.is_denied: bool = False
        #: The meter types of each issued ticket; None in place of the types: all types.
        self.deferred: tuple[tuple[str, ...] | None, ...] = ()
        #: Types of the policy's meters that `set` replaced.
        self._overridden: set[str] = set()
        #: Amounts by meter type: flat prices, and measured usage.
        self._flat: dict[str, Number] = {}
        self._measured: dict[str, Number] = {}
        #: Documents, each with True if it is a flat price.
        self._documents: list[tuple[Meter, bool]] = []

    def raise_interruption(self) -> None:
        """Raise the error that `raise_after_settling` kept, if any."""
        if self.interruption is not None:
            raise self.interruption

    def is_deferred(self, meter_type: str) -> bool:
        """Return True if a ticket covers the meters of that type."""
        return any(types is None or meter_type in types for types in self.deferred)

    def set(self, usage: CheckedUsage, *, flat: bool) -> None:
        """Replace this usage, and the policy's meters of the same types, by *usage*."""
        numbers = dict(usage.numbers)
        self._overridden = usage.types
        self._flat = numbers if flat else {}
        self._measured = {} if flat else numbers
        self._documents = [(meter, flat) for meter in usage.documents]

    def add(self, usage: CheckedUsage) -> None:
        """Add *usage*. Nothing is changed if a sum is too large."""
        sums = {
            name: add_numbers(name, self._measured.get(name, 0), number)
            for name, number in usage.numbers.items()
        }
        self._measured.update(sums)
        self._documents += [(meter, False) for meter in usage.documents]

    def as_meters(self) -> list[dict[str, Any]]:
        """Return this usage as `set_meters` takes it: documents, then the numbers."""
        numbers = dict(self._flat)
        for name, number in self._measured.items():
            numbers[name] = add_numbers(name, numbers.get(name, 0), number)
        documents = [meter.document() for meter, _ in self._documents]
        return [*documents, numbers] if numbers else documents

    def merged(self, of_policy: CheckedUsage, *, with_flat: bool) -> CheckedUsage:
        """Return the sum of the policy's usage and this usage.

        Flat amounts are left out if *with_flat* is False. Deferred meters are always
        left out.
        """
        overridden = self._overridden
        numbers = {k: v for k, v in of_policy.numbers.items() if k not in overridden}
        documents = [m for m in of_policy.documents if m.type not in overridden]
        if with_flat:
            numbers |= self._flat
        for name, number in self._measured.items():
            if name not in numbers:
                numbers[name] = number
                continue
            try:
                numbers[name] = add_numbers(name, numbers[name], number)
            except MeterValueError as error:
                # Both amounts were accepted before, so at least one must be billed.
                logger.error("%s; only the larger amount is billed", error)
                numbers[name] = max(numbers[name], number, key=float)
        documents += [m for m, flat in self._documents if with_flat or not flat]
        if self.deferred:
            numbers = {k: v for k, v in numbers.items() if not self.is_deferred(k)}
            documents = [m for m in documents if not self.is_deferred(m.type)]
        return CheckedUsage(numbers, tuple(documents))


def set_meters(request: object, meters: Meters, *, flat: bool = False) -> None:
    """Replace the usage of this request by *meters*.

    This replaces all usage that was set or added before, and the policy's meters of the
    same types. Call it on the thread of the request.

    :param flat: True if the amounts are fixed prices of the request, not measured
        usage. The options ``on_failure`` and ``on_abort`` treat them differently.
    :raises MeterValueError: naming the invalid value. Nothing is changed then.
    """
    usage = read_usage(meters)
    if (run_time := _run_time_usage(request, "set_meters")) is not None:
        run_time.set(usage, flat=flat)


def add_meters(request: object, meters: Meters) -> None:
    """Add *meters* to the usage of this request.

    A number is added to the usage of the same type that was set or added before, and to
    the policy's meter of that type. Each document becomes an event of its own. Call it
    from one thread only: usage that several threads add at the same time may be lost.

    :raises MeterValueError: naming the invalid value. Nothing is changed then.
    """
    usage = read_usage(meters)
    if (run_time := _run_time_usage(request, "add_meters")) is not None:
        run_time.add(usage)


def get_meters(request: object) -> list[dict[str, Any]]:
    """Return the usage that was set or added so far, in a form for :func:`set_meters`.

    The policy's own meters are not included.
    """
    run_time = _run_time_usage(request, "get_meters")
    return [] if run_time is None else run_time.as_meters()


def set_idempotency_key(request: object, key: str) -> None:
    """Mark requests with the same *key* as one operation, which is billed once.

    The event ids are derived from subject, method, path, key and meter type, so that
    OpenMeter drops the events of a repetition. This needs deduplication in OpenMeter.
    An ``Idempotency-Key`` header alone has no effect: the application decides which
    requests are repetitions. Only completed responses share ids. A failed or aborted
    attempt is billed separately.

    :raises ValueError: if *key* is not text, or is empty.
    """
    if problem := text_problem(key):
        raise ValueError(f"idempotency key: {problem}")
    if (run_time := _run_time_usage(request, "set_idempotency_key")) is not None:
        run_time.idempotency_key = key


def mark_unmetered(request: object) -> None:
    """Bill nothing for this request, because its view is not metered."""
    if (run_time := _run_time_usage(request, "no_meter")) is not None:
        run_time.is_unmetered = True


def mark_denied(request: object) -> None:
    """Bill nothing for this request, because it was denied."""
    if (run_time := _run_time_usage(request, "require_entitlements")) is not None:
        run_time.is_denied = True


def set_subject(request: object, subject: str) -> None:
    """Bill *subject* for this request, in place of the subject of the policy."""
    if (environ := _environ(request, "set_subject")) is not None:
        _caller_of(environ)[SUBJECT] = subject


def set_user(request: object, user: object) -> None:
    """Store the authenticated *user* of this request: token claims, or any object.

    The option ``subject_path`` is the path to the subject in *user*.
    """
    if (environ := _environ(request, "set_user")) is not None:
        _caller_of(environ)[USER] = user


def _caller_of(environ: dict[str, Any]) -> dict[str, object]:
    record = record_of(environ)
    if record.caller is None:
        record.caller = {}
    return record.caller


def set_route(request: object, route: str) -> None:
    """Set the path template of this request, such as ``/users/<id>``.

    Not needed with Flask, Bottle, or Django with this package's middleware.
    """
    if (environ := _environ(request, "set_route")) is not None:
        record_of(environ).route = route


def _environ(request: object, helper: str) -> dict[str, Any] | None:
    if (environ := environ_of(request)) is None:
        logger.warning(
            "%s: %s has no WSGI environ, so the call has no effect",
            helper, type(request).__name__,
        )  # fmt: skip
    return environ


def _run_time_usage(request: object, helper: str) -> RunTimeUsage | None:
    record = unsettled_record(request, helper)
    if record is None:
        return None
    if record.usage is None:
        record.usage = RunTimeUsage()
    return record.usage


def unsettled_record(request: object, helper: str) -> RequestRecord | None:
    """Return the record of a metered request that is not settled yet, or None.

    If it returns None, it logs that the call of *helper* has no effect, and counts
    late usage as lost. A late `get_meters` loses nothing and is not logged.
    """
    record = metered_request(environ_of(request))
    if record is None or record.billing is None:
        logger.warning(
            "%s: called outside a metered request, so the call has no effect", helper
        )
        return None
    if record.state >= ENCODED:
        if helper != "get_meters":
            record.billing.report_late_call(helper)
        return None
    return record
