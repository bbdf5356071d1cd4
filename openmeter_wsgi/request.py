"""The record of one request, and the helpers with which a handler adds to it.

The record is in the environ under one key. Something inside may copy the environ: the
record in the copy is the same one.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

from openmeter_wsgi import log
from openmeter_wsgi.errors import MeterValueError
from openmeter_wsgi.events import (
    Meter,
    Meters,
    Number,
    StatedUsage,
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
    from openmeter_wsgi.frameworks import RememberedSubjects
    from openmeter_wsgi.quota.account import Reservation

logger: Final = log.get_logger(__name__)

#: OPTIONS in every case: to look a method up costs a request less than to change it.
OPTIONS: Final = frozenset(
    map("".join, itertools.product("Oo", "Pp", "Tt", "Ii", "Oo", "Nn", "Ss"))
)
_ERROR_STATUS = "500"
#: What a caller is named by in a record.
SUBJECT: Final = "subject"
USER: Final = "user"
#: The key of the record in the environ.
REQUEST: Final = "openmeter_wsgi.request"

# How far a request has come. A later state has a larger number.
#: No middleware meters it, or none has seen it yet.
UNMETERED: Final = 0
#: The application was called, and nothing of the response has been sent.
OPEN: Final = 1
#: A part of the body that is not empty has been sent.
STARTED: Final = 2
#: The client hung up while the application was calling `write`.
HUNG_UP: Final = 3
#: The application raised.
BROKEN: Final = 4
#: The body has come to its end.
FINISHED: Final = 5
#: The events are made, and some of them may be in the queue.
FIXED: Final = 6
#: All events are in the queue.
SETTLED: Final = 7

# How a response ended.
#: To its end.
COMPLETED: Final = "completed"
#: The application raised.
FAILED: Final = "failed"
#: The server closed it early, because the client went away.
ABORTED: Final = "aborted"


class RequestRecord:
    """The state of one request. Belongs to the thread that serves the request.

    The application gets its `start_response`.
    """

    __slots__ = (
        "billing", "caller", "capture", "decision", "remembered", "reserved", "route",
        "server_start", "server_write", "state", "status", "usage",
    )  # fmt: skip

    # Set by `new_record` and the middleware: an __init__ would be one more call.
    #: The billing of its policy, route or view.
    billing: Billing | None
    state: int
    #: The status line that the server accepted.
    status: str | None
    #: The callables of the server, until the request is settled.
    server_start: StartResponse | None
    server_write: Callable[[bytes], object] | None
    #: Sees the chunks of the response if something is measured.
    capture: ResponseCapture | None
    #: The arguments of :func:`set_subject` and :func:`set_user`, None without a call.
    caller: dict[str, object] | None
    #: The usage that the handler stated, None if it stated none.
    usage: RunTimeMeters | None
    #: The template of the address, such as ``/users/<id>``: see :func:`set_route`.
    route: str | None
    #: The last decision about entitlements.
    decision: Decision | None
    #: The reservations of quotas, by feature.
    reserved: dict[str, Reservation] | None
    #: Subjects that a framework had while it served the request.
    remembered: RememberedSubjects | None

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """Pass on to the server, and remember the status that it accepted (PEP 3333).

        :raises AssertionError: if the response was closed before.
        """
        start = self.server_start
        if start is None:
            raise AssertionError("start_response called after the response was closed")
        # With two arguments if there are two: some test clients take no third.
        if exc_info is None:
            self.server_write = start(status, headers)
        else:
            self.server_write = start(status, headers, exc_info)
        self.status = status
        if self.capture is not None:
            self.capture.begin(status, headers)
        return self.write

    def write(self, data: bytes) -> object:
        """Pass on what the application writes (PEP 3333)."""
        write = self.server_write
        if write is None:
            raise AssertionError("write called after the response was closed")
        if data and self.state == OPEN:
            self.state = STARTED
        try:
            written = write(data)
        except (AssertionError, TypeError, ValueError):
            raise  # the application called it in a wrong way
        except Exception:
            if self.state < FIXED:
                self.state = HUNG_UP
            raise
        if self.capture is not None:
            self.capture.read_chunk(data)
        return written

    def end(self) -> None:
        """Mark the request as settled, and let go of the server.

        The server's handler keeps the environ, and the environ this record.
        """
        self.state = SETTLED
        self.server_start = self.server_write = self.capture = None

    def fail(self) -> None:
        """Note that the application raised, and the status that the client will see."""
        if self.state == HUNG_UP:
            return  # the server raised, not the application
        if self.state == OPEN:
            # Nothing has been sent, so the server answers with an error.
            self.status = _ERROR_STATUS
        if self.state < FIXED:
            self.state = BROKEN


def new_record() -> RequestRecord:
    """Return the record of a request that no middleware meters yet."""
    record = RequestRecord()
    record.billing = record.status = None
    record.state = UNMETERED
    record.server_start = record.server_write = record.capture = None
    record.caller = record.usage = record.route = None
    record.decision = record.reserved = record.remembered = None
    return record


def begin_again(
    environ: dict[str, Any], billing: Billing, start_response: StartResponse
) -> RequestRecord | None:
    """Return the record of a request whose environ has one; *billing* bills it now.

    None if another middleware, further out, meters it already.
    """
    record: RequestRecord = environ[REQUEST]
    if record.state == SETTLED:  # one environ serves a second request
        before, record = record, new_record()
        record.caller = before.caller
        environ[REQUEST] = record
    elif record.state != UNMETERED:
        return None
    record.billing = billing
    record.server_start = start_response
    record.state = OPEN
    return record


def environ_of(request: object) -> dict[str, Any] | None:
    """Return the environ that *request* is or carries, None if it has none.

    Flask, Django, Bottle and Pyramid keep it as ``.environ``, Falcon as ``.env``.
    """
    if isinstance(request, dict):
        return request
    for name in ("environ", "env"):
        environ = getattr(request, name, None)
        if isinstance(environ, dict):
            return environ
    return None


def metered_request(environ: Mapping[str, Any] | None) -> RequestRecord | None:
    """Return the record of a request that is metered, None for any other."""
    request: RequestRecord | None = None if environ is None else environ.get(REQUEST)
    return None if request is None or request.billing is None else request


def record_of(environ: MutableMapping[str, Any]) -> RequestRecord:
    """Return the record of a request, made now if there is none yet."""
    request: RequestRecord | None = environ.get(REQUEST)
    if request is None:
        request = environ[REQUEST] = new_record()
    return request


def interrupted(environ: Mapping[str, Any], error: BaseException) -> None:
    """Keep *error*, which is no Exception, until the request is settled; then raise it.

    :raises BaseException: now, outside a metered request.
    """
    record = metered_request(environ)
    if record is None:
        raise error
    if record.usage is None:
        record.usage = RunTimeMeters()
    record.usage.interruption = error


def reservations_of(environ: dict[str, Any]) -> dict[str, Reservation]:
    """Return the reservations of a request by feature, a dictionary to add to."""
    request = record_of(environ)
    if request.reserved is None:
        request.reserved = {}
    return request.reserved


def billing_of(environ: Mapping[str, Any] | None) -> Billing | None:
    """Return the billing of a request, None if it is not metered."""
    request = metered_request(environ)
    return None if request is None else request.billing


def has_user(environ: Mapping[str, Any]) -> bool:
    """Return True if :func:`set_user` was called for this request."""
    request: RequestRecord | None = environ.get(REQUEST)
    return request is not None and USER in (request.caller or ())


def method_of(environ: Mapping[str, Any]) -> str:
    """Return the method of a request in capitals, as most frameworks read it.

    Many servers pass it on as the client sent it.
    """
    return str(environ.get("REQUEST_METHOD", "")).upper()


def is_options(environ: Mapping[str, Any]) -> bool:
    """Return True for OPTIONS, which browsers send by themselves (CORS)."""
    return environ.get("REQUEST_METHOD") in OPTIONS


class RunTimeMeters:
    """The usage that the handler of one request stated.

    Belongs to the thread that serves the request, so it takes no lock.
    """

    __slots__ = (
        "_documents",
        "_flat",
        "_measured",
        "_overridden",
        "deferred",
        "denied",
        "idempotency_key",
        "interruption",
        "is_unmetered",
    )

    def __init__(self) -> None:
        #: What makes a repetition of this request the same to OpenMeter.
        self.idempotency_key: str | None = None
        #: What is no Exception, and was raised by a callable of the policy at the end.
        self.interruption: BaseException | None = None
        #: Whether the view says that it is not metered.
        self.is_unmetered: bool = False
        #: Whether the request was denied, so that nothing of it is billed.
        self.denied: bool = False
        #: The types of each ticket that was given out, None for all types.
        self.deferred: tuple[tuple[str, ...] | None, ...] = ()
        self._overridden: set[str] = set()
        self._flat: dict[str, Number] = {}
        self._measured: dict[str, Number] = {}
        self._documents: list[tuple[Meter, bool]] = []

    def raise_interruption(self) -> None:
        """Raise the error that interrupted a callable of the policy, after settling."""
        if self.interruption is not None:
            raise self.interruption

    def is_deferred(self, meter_type: str) -> bool:
        """Return True if a ticket holds the meters of that type."""
        return any(types is None or meter_type in types for types in self.deferred)

    def set(self, usage: StatedUsage, *, flat: bool) -> None:
        """Replace the stated usage, and static meters of the same types, by *usage*."""
        numbers = dict(usage.numbers)
        self._overridden = usage.types
        self._flat = numbers if flat else {}
        self._measured = {} if flat else numbers
        self._documents = [(meter, flat) for meter in usage.documents]

    def add(self, usage: StatedUsage) -> None:
        """Add *usage*. Nothing changes if a sum is not possible."""
        sums = {
            name: add_numbers(name, self._measured.get(name, 0), number)
            for name, number in usage.numbers.items()
        }
        self._measured.update(sums)
        self._documents += [(meter, False) for meter in usage.documents]

    def stated(self) -> list[dict[str, Any]]:
        """Return the stated usage: the documents, then one mapping of numbers."""
        numbers = dict(self._flat)
        for name, number in self._measured.items():
            numbers[name] = add_numbers(name, numbers.get(name, 0), number)
        documents = [meter.document() for meter, _ in self._documents]
        return [*documents, numbers] if numbers else documents

    def merged(self, policys: StatedUsage, *, with_flat: bool) -> StatedUsage:
        """Return the usage of the policy and this usage together.

        Without *with_flat* the flat amounts are left out. Deferred meters always are.
        """
        hidden = self._overridden
        numbers = {k: v for k, v in policys.numbers.items() if k not in hidden}
        documents = [m for m in policys.documents if m.type not in hidden]
        if with_flat:
            numbers |= self._flat
        for name, number in self._measured.items():
            if name not in numbers:
                numbers[name] = number
                continue
            try:
                numbers[name] = add_numbers(name, numbers[name], number)
            except MeterValueError as error:
                # Each part is valid and was accepted: the larger one is billed.
                logger.error("%s; the larger one is sent alone", error)
                numbers[name] = max(numbers[name], number, key=float)
        documents += [m for m, flat in self._documents if with_flat or not flat]
        if self.deferred:
            numbers = {k: v for k, v in numbers.items() if not self.is_deferred(k)}
            documents = [m for m in documents if not self.is_deferred(m.type)]
        return StatedUsage(numbers, tuple(documents))


def set_meters(request: object, meters: Meters, *, flat: bool = False) -> None:
    """Set the run-time usage of this request to *meters*.

    It replaces all usage that was set or added before, and static meters of the same
    type. With *flat* the amounts are fixed prices of the request, not measured usage
    (see ``on_failure`` and ``on_abort``).

    :raises MeterValueError: naming the bad value; nothing is changed then.
    """
    usage = read_usage(meters)
    if (stated := _run_time_meters(request, "set_meters")) is not None:
        stated.set(usage, flat=flat)


def add_meters(request: object, meters: Meters) -> None:
    """Add *meters* to the usage of this request.

    Numbers are added to the usage stated before and to the static meter of the same
    type; documents become events of their own. Call it from one thread: usage that
    several threads add at once may be lost.

    :raises MeterValueError: naming the bad value; nothing is changed then.
    """
    usage = read_usage(meters)
    if (stated := _run_time_meters(request, "add_meters")) is not None:
        stated.add(usage)


def get_meters(request: object) -> list[dict[str, Any]]:
    """Return the run-time usage stated so far, in a form `set_meters` takes."""
    stated = _run_time_meters(request, "get_meters")
    return [] if stated is None else stated.stated()


def set_idempotency_key(request: object, key: str) -> None:
    """Bill this request and its repetitions with the same *key* once.

    The ids of the events are derived from subject, method, path, key and type, so that
    OpenMeter drops the events of a repetition; it must deduplicate. No header does this
    by itself: the application decides which requests are repetitions. Only completed
    responses share an id; a failed or aborted attempt is billed separately.

    :raises ValueError: if *key* is no text.
    """
    if problem := text_problem(key):
        raise ValueError(f"idempotency key: {problem}")
    if (stated := _run_time_meters(request, "set_idempotency_key")) is not None:
        stated.idempotency_key = key


def leave_unmetered(request: object) -> None:
    """Bill nothing for this request: its view is not metered."""
    if (stated := _run_time_meters(request, "no_meter")) is not None:
        stated.is_unmetered = True


def bill_nothing(request: object) -> None:
    """Bill nothing for this request: it was denied."""
    if (stated := _run_time_meters(request, "require_entitlements")) is not None:
        stated.denied = True


def set_subject(request: object, subject: str) -> None:
    """Bill *subject* for this request, instead of the subject that the policy finds."""
    if (environ := _environ(request, "set_subject")) is not None:
        _caller_of(environ)[SUBJECT] = subject


def set_user(request: object, user: object) -> None:
    """Give the policy the authenticated user: claims, a mapping or an object.

    The option ``subject_path`` leads to the subject in it.
    """
    if (environ := _environ(request, "set_user")) is not None:
        _caller_of(environ)[USER] = user


def _caller_of(environ: dict[str, Any]) -> dict[str, object]:
    record = record_of(environ)
    if record.caller is None:
        record.caller = {}
    return record.caller


def set_route(request: object, route: str) -> None:
    """Set the template of the address of this request, such as ``/users/<id>``.

    Not needed for Flask and Bottle, nor for Django with its middleware.
    """
    if (environ := _environ(request, "set_route")) is not None:
        record_of(environ).route = route


def _environ(request: object, helper: str) -> dict[str, Any] | None:
    if (environ := environ_of(request)) is None:
        logger.warning(
            "%s: %s carries no WSGI environ; it says nothing of any request",
            helper, type(request).__name__,
        )  # fmt: skip
    return environ


def _run_time_meters(request: object, helper: str) -> RunTimeMeters | None:
    record = open_record(request, helper)
    if record is None:
        return None
    if record.usage is None:
        record.usage = RunTimeMeters()
    return record.usage


def open_record(request: object, helper: str) -> RequestRecord | None:
    """Return the record of a metered request that is not billed yet."""
    record = metered_request(environ_of(request))
    if record is None or record.billing is None:
        logger.warning(
            "%s: called outside a metered request; nothing is counted", helper
        )
        return None
    if record.state >= FIXED:
        if helper != "get_meters":
            record.billing.count_late(helper)
        return None
    return record
