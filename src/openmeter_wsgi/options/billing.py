"""Options of a policy: what is billed, and to whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from openmeter_wsgi.measures import Measure  # noqa: TC001 - a hint
from openmeter_wsgi.options import values as read
from openmeter_wsgi.status_codes import StatusCodes

Billed: TypeAlias = Literal["all", "measured", "none"]
#: From an environ to the subject of its request, empty or None if it has none.
SubjectCallable: TypeAlias = Callable[[dict[str, Any]], str | None]

DEFAULT_SOURCE = "api-gateway"
_NAME = Annotated[str, msgspec.Meta(min_length=1)]
_HEADER = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9\-]+$")]


@dataclasses.dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class BillingOptions:
    """What is billed, and to whom."""

    #: What each request is billed: a document, ``{"type": …, "data": {…}}``, or a
    #: list of them. ``data`` is sent as it stands, with measures in it filled in.
    meter: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = dataclasses.field(
        default=None, metadata={"read": read.meter}
    )
    #: The same as numbers by type: ``{"api_requests": 1}`` sends ``{"total": 1}``.
    #: Zero is allowed and sends nothing.
    meters: Mapping[str, float] | None = dataclasses.field(
        default=None, metadata={"read": read.meters}
    )
    #: A predicate on the finished exchange besides the status: a callable,
    #: ``computed(callable, "json")`` where it looks at the body, or a measure, which
    #: may be text (``"$response.succeeded"``).
    meter_when: Callable[[Any], object] | Measure | str | None = dataclasses.field(
        default=None, metadata={"read": read.meter_when}
    )
    #: The name of the number in the ``data`` of an event made from a number.
    value_property: _NAME = "total"
    #: The status codes that are billed: ``"200-299"``, ``"2xx, 304"``, ``[200, 201]``.
    #: Everything else is counted and not billed.
    meter_on_status_codes: StatusCodes | str | Iterable[int | str] = dataclasses.field(
        default="200-299", metadata={"read": StatusCodes}
    )
    #: ``"intended"``: codes from 400 on among those are billed on purpose. Without it
    #: ``openmeter-wsgi check`` takes them for a mistake.
    billing_errors: Literal["intended"] | None = None
    #: What of a response that the application broke off is billed: ``"measured"`` is
    #: what handlers and measures counted, without the flat price of the request.
    on_failure: Billed = "measured"
    #: What of a response that the client did not take to its end is billed. With less
    #: than ``"all"`` a client that hangs up before the last byte pays less.
    on_abort: Billed = "all"
    #: Whether OPTIONS requests, which browsers send by themselves, count as others do.
    meter_options: bool = False
    #: The service that the events come from, constant per service: together with an
    #: event's id it is what OpenMeter deduplicates by.
    event_source: str = dataclasses.field(
        default=DEFAULT_SOURCE, metadata={"read": read.source}
    )
    #: A header that your own proxy sets and clients cannot: its value becomes the id
    #: of the request in the ids of its events. Wants an ``event_source`` of its own.
    trusted_request_id_header: _HEADER | None = None

    #: Whether handlers call :func:`set_idempotency_key`: OpenMeter must deduplicate.
    idempotency_keys: bool = False
    #: Gets every settled request that became no event, and why: a callable on a
    #: mapping, or a file that grows by a line of JSON for each.
    audit: str | Callable[[dict[str, Any]], object] | None = dataclasses.field(
        default=None, metadata={"read": read.audit}
    )
    #: Options of single routes, by rule (``"POST /v1/users/<id>"``); None: not
    #: metered. What a route does not name it inherits.
    routes: Mapping[str, Mapping[str, Any] | None] | None = dataclasses.field(
        default=None, metadata={"read": read.routes}
    )
    #: Under what a request is that no rule names: this policy, or none.
    unmatched: Literal["policy"] | None = dataclasses.field(
        default="policy", metadata={"read": read.unmatched}
    )

    # -- To whom
    #: Who is billed: a callable on the environ, or ``"header:Name"``. A header that
    #: clients can set lets them bill each other.
    subject: str | SubjectCallable | None = dataclasses.field(
        default=None, metadata={"read": read.subject}
    )
    #: Whether subjects in a header may hold commas. Without it a header with a comma is
    #: one that was sent twice, and the request has no subject.
    subject_commas: bool = False
    #: Where the subject is in what :func:`set_user` was given.
    subject_path: str = dataclasses.field(
        default=".sub", metadata={"read": read.subject_path}
    )
    #: What becomes of a request without subject: ``"skip"`` counts it and bills
    #: nobody, any other text is the subject that is billed instead.
    on_missing_subject: str = dataclasses.field(
        default="skip", metadata={"read": read.text}
    )
