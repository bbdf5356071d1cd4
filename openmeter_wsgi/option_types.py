"""The types of all options, for type checkers and editors: `Options`.

These are the types that the readers in `options` accept. The fields of a `Policy` have
the types of the converted values. No other module imports this one at run time.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias, TypedDict

from openmeter_wsgi.measures import Measure
from openmeter_wsgi.options import CountedMeter
from openmeter_wsgi.policy import ApiFlavor, Billed, FailMode, SubjectCallable
from openmeter_wsgi.status_codes import StatusCodes

_Document: TypeAlias = Mapping[str, Any]
_Key: TypeAlias = str | Callable[[], str] | None
_CountedMeters: TypeAlias = (
    Mapping[str, str | Mapping[str, str] | CountedMeter] | Iterable[str]
)
_Path: TypeAlias = str | os.PathLike[str] | None


class RouteOptions(TypedDict, total=False):
    """The options of a route in ``routes``, or of a view with :func:`meter`."""

    meter: _Document | Iterable[_Document] | None
    meters: Mapping[str, float | Measure | str] | None
    meter_when: Callable[[Any], object] | Measure | str | None
    meter_on_status_codes: StatusCodes | str | Iterable[int | str]
    on_failure: Billed
    on_abort: Billed
    meter_options: bool
    event_source: str
    trusted_request_id_header: str | None
    audit: Callable[[dict[str, Any]], object] | None
    subject: str | SubjectCallable | None
    subject_commas: bool
    subject_path: str
    on_missing_subject: str
    required_entitlements: Iterable[str]
    customer: Callable[[str], str | None] | Mapping[str, str] | None
    fail_mode: FailMode
    enforce: bool
    limit_status: Literal[429, 402, 403]
    denied_response: Callable[[dict[str, Any], Any], Any] | None
    usage_headers: bool
    reserve: Mapping[str, float] | Callable[[dict[str, Any]], Any] | None


class OptionsBesideRoutes(RouteOptions, total=False):
    """The options of a middleware except ``routes``, which are in a separate file."""

    api_key: _Key
    api_key_file: _Path
    entitlements_api_key: _Key
    api_url: str
    api_flavor: ApiFlavor
    request_timeout: float
    batch_size: int
    flush_interval: float
    max_queue_bytes: int
    shutdown_timeout: float
    spool_dir: _Path
    max_spool_bytes: int
    resend_window: float
    ticket_secret: str | Iterable[str] | None
    delivery: Literal["thread", "ship"]
    dry_run: bool
    entitlement_meters: _CountedMeters
    entitlements_url: str | None
    entitlement_timeout: float
    allow_ttl: float
    deny_ttl: float
    max_stale: float
    question_rate: float | None
    visibility_lag: float
    max_visibility_lag: float
    redis_url: str | None


class Options(OptionsBesideRoutes, total=False):
    """The options of a middleware, or of a `Policy`."""

    routes: Mapping[str, RouteOptions | Literal[False] | None] | None
