"""`Policy`: all options of a middleware, checked together and immutable.

The options are the fields of three base classes: billing, delivery and entitlements.
The ``#:`` comment of a field is its documentation. The reader in ``metadata["read"]``
checks and converts the value (see `options`). Without a reader, the type is checked.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeAlias,
    Unpack,
    get_type_hints,
)

import msgspec

from openmeter_wsgi import options as read
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.events import CheckedUsage, Meter, number_meter
from openmeter_wsgi.measures import Measure, MeasuredMeter, split
from openmeter_wsgi.options import (
    ApiKey,
    CountedMeter,
    invalid_feature_keys,
    is_konnect,
    read_file,
    read_variables,
)
from openmeter_wsgi.routes import RouteRule
from openmeter_wsgi.status_codes import StatusCodes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.option_types import Options, OptionsBesideRoutes


Billed: TypeAlias = Literal["all", "measured", "none"]
#: Takes the environ and returns the subject. Empty text or None means no subject.
SubjectCallable: TypeAlias = Callable[[dict[str, Any]], str | None]

DEFAULT_SOURCE = "openmeter_wsgi"
_HEADER = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9\-]+$")]


@dataclasses.dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class BillingOptions:
    """Options of billing: meters, billed responses and subject."""

    # -- Meters
    #: The events of each request: a document ``{"type": …, "data": {…}}``, or a list of
    #: documents. Measures in ``data`` are replaced by their values.
    meter: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = dataclasses.field(
        default=None, metadata={"read": read.meter}
    )
    #: The amounts of each request by event type: ``{"api_requests": 1}`` sends an event
    #: with the data ``{"total": 1}``. An amount may be a measure. Zero sends no event.
    meters: Mapping[str, float | Measure | str] | None = dataclasses.field(
        default=None, metadata={"read": read.meters}
    )
    #: An additional condition for billing a response: a callable that takes the
    #: ``Exchange``, ``computed(callable, "json")`` if it reads the body, or a
    #: measure, also as text (``"$response.succeeded"``).
    meter_when: Callable[[Any], object] | Measure | str | None = dataclasses.field(
        default=None, metadata={"read": read.meter_when}
    )
    #: The status codes that are billed: ``"200-299"``, ``"2xx, 304"``, ``[200, 201]``.
    #: Responses with other codes are counted and not billed. If error codes are billed,
    #: a warning is logged at startup, and ``openmeter-wsgi check`` reports it.
    meter_on_status_codes: StatusCodes | str | Iterable[int | str] = dataclasses.field(
        default="200-299", metadata={"read": StatusCodes}
    )
    #: The part that is billed if the application fails after the response has begun.
    #: ``"measured"`` bills the usage of handlers and measures, without flat prices. An
    #: exception before the first byte gives a 500, which is not billed by default.
    on_failure: Billed = "measured"
    #: The part that is billed if the client disconnects before the end of the response.
    #: With less than ``"all"``, a client can pay less by closing the connection before
    #: the last byte.
    on_abort: Billed = "all"
    #: True bills OPTIONS requests like all others. Browsers send them for CORS.
    meter_options: bool = False
    #: The ``source`` of the events: the name of the service (CloudEvents 1.0).
    #: OpenMeter deduplicates by source and id of an event. With Flask and Django the
    #: default is the name of the application.
    event_source: str = dataclasses.field(
        default=DEFAULT_SOURCE, metadata={"read": read.source}
    )
    #: Name of a header with the request id, from which the event ids are made. Your
    #: proxy must set it, and clients must not be able to. Requires an explicit
    #: ``event_source``.
    trusted_request_id_header: _HEADER | None = None
    #: A callable that gets a mapping with the reason for each settled request that
    #: became no event. The logger ``openmeter_wsgi.audit`` has the same at level DEBUG.
    audit: Callable[[dict[str, Any]], object] | None = dataclasses.field(
        default=None, metadata={"read": read.audit}
    )
    #: Options of single routes, by rule (``"POST /v1/users/<id>"``). None: the route is
    #: not metered. A route inherits all options that it does not set. The rule ``"*"``
    #: is for requests that no other rule matches. Without it, they are metered by the
    #: options of the middleware.
    routes: Mapping[str, Mapping[str, Any] | None] | None = dataclasses.field(
        default=None, metadata={"read": read.routes}
    )

    # -- Subject
    #: The subject to bill: a callable that takes the environ, or ``"header:Name"``. If
    #: clients can set that header, they can send usage to another customer's bill. The
    #: packages for Flask and Django also take a path, such as ``"g.customer"`` and
    #: ``"request.user.pk"``.
    subject: str | SubjectCallable | None = dataclasses.field(
        default=None, metadata={"read": read.subject}
    )
    #: True allows commas in a subject from a header. By default, a comma means that the
    #: header was sent twice, and the request counts as one without subject.
    subject_commas: bool = False
    #: The path to the subject in the argument of :func:`set_user`, such as ``.sub``.
    subject_path: str = dataclasses.field(
        default=".sub", metadata={"read": read.subject_path}
    )
    #: The subject that is billed for requests without subject. ``"skip"``: such
    #: requests are counted and not billed.
    on_missing_subject: str = dataclasses.field(
        default="skip", metadata={"read": read.text}
    )


ApiFlavor: TypeAlias = Literal["v1", "v3"]


@dataclasses.dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class DeliveryOptions:
    """Options of delivery. They apply to the whole middleware."""

    # -- Server
    #: The API key of OpenMeter Cloud or Kong Konnect: text, or a callable that returns
    #: it and is called again after a 401. A self-hosted OpenMeter needs no key.
    api_key: str | Callable[[], str] | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.key}
    )
    #: Path of a file with the API key. The file is read again after a 401.
    api_key_file: str | None = dataclasses.field(
        default=None, metadata={"read": read.path}
    )
    #: The API key for requests about entitlements. Default: ``api_key``.
    entitlements_api_key: str | Callable[[], str] | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.key}
    )
    #: URL of the OpenMeter server, without ``/api``.
    api_url: str = dataclasses.field(
        default="https://openmeter.cloud", metadata={"read": read.url}
    )
    #: The version of OpenMeter's API: ``"v1"`` (with version 2 for entitlements) or
    #: ``"v3"``. Kong Konnect has version 3 only.
    api_flavor: ApiFlavor = dataclasses.field(
        default="v1", metadata={"read": read.api_flavor}
    )
    #: Timeout of one attempt to send a batch, in seconds.
    request_timeout: Annotated[float, msgspec.Meta(gt=0, le=600)] = 10.0

    # -- Queue and batches
    #: Maximum number of events in one batch. A full batch is sent immediately.
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 500
    #: Maximum number of seconds that an event waits for its batch to fill. In a spool,
    #: the wait begins when the sender finds the event, at most a second later.
    flush_interval: Annotated[float, msgspec.Meta(gt=0, le=3_600)] = 1.0
    #: Maximum size of the queue in memory, in bytes of events. Events that do not fit
    #: are dropped and counted.
    max_queue_bytes: Annotated[int, msgspec.Meta(ge=1_000)] = 100_000_000
    #: Maximum number of seconds to send the queued events when the process exits.
    shutdown_timeout: Annotated[float, msgspec.Meta(ge=0, le=3_600)] = 5.0
    #: Directory in which events are stored until delivered, so that they survive the
    #: process. None: events are queued in memory. Any number of processes may share it.
    #: Each OpenMeter server has a subdirectory.
    spool_dir: str | None = dataclasses.field(
        default=None, metadata={"read": read.path}
    )
    #: Maximum size of the subdirectory of a server, in bytes. It may be exceeded by one
    #: segment file per process.
    max_spool_bytes: Annotated[int, msgspec.Meta(ge=16 * 1024**2)] = 1024**3
    #: Seconds within which a spool sends a batch without an answer again, and within
    #: which a ticket of :func:`defer` may be used. It must not be longer than OpenMeter
    #: deduplicates: otherwise events may be billed twice.
    resend_window: Annotated[float, msgspec.Meta(gt=0)] = 86_400.0
    #: The secret that signs the tickets of :func:`defer`, at least 16 characters. To
    #: rotate it, set the new and the old secret with a space between them: the first
    #: signs, both are accepted. Requires ``pip install 'openmeter_wsgi[jobs]'``.
    ticket_secret: str | Iterable[str] | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.ticket_secret}
    )
    #: ``"thread"``: a background thread sends the events. ``"ship"``: the command
    #: ``openmeter-wsgi ship`` sends them from the spool.
    delivery: Literal["thread", "ship"] = "thread"
    #: True logs and counts the events, and sends nothing.
    dry_run: bool = False


FailMode: TypeAlias = Literal["open", "closed", "stale"]


@dataclasses.dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class EntitlementOptions:
    """Options of entitlements: required features, denials, quotas and caches."""

    # -- Decision
    #: Keys of the features that a customer must have, all of them.
    required_entitlements: tuple[str, ...] = dataclasses.field(
        default=(), metadata={"read": read.features}
    )
    #: A callable or a mapping from a subject to its customer key. Default: the customer
    #: whose key, or one of whose subject keys, is the subject.
    customer: Callable[[str], str | None] | Mapping[str, str] | None = (
        dataclasses.field(default=None, metadata={"read": read.customer})
    )
    #: The decision if OpenMeter does not answer and no cached answer is usable (see
    #: ``max_stale``). ``"open"`` allows the request, ``"closed"`` answers 503,
    #: ``"stale"`` uses the last answer, however old, and allows if there is none.
    fail_mode: FailMode = "open"
    #: False allows all requests, and only counts and logs denials.
    enforce: bool = True
    #: The status code of a denial if a quota is used up.
    limit_status: Literal[429, 402, 403] = 429
    #: A callable that takes environ and ``Decision``, and returns the WSGI
    #: application that answers a denied request. Default: problem details (RFC 9457).
    denied_response: Callable[[dict[str, Any], Any], Any] | None = dataclasses.field(
        default=None, metadata={"read": read.function}
    )
    #: True adds RateLimit headers with limit, remaining amount and reset time.
    usage_headers: bool = False

    # -- Quotas
    #: The event type that uses up each feature's quota:
    #: ``{"feature_key": "event_type"}``, or a list of features whose key equals the
    #: event type. The quotas are counted down locally between two answers of OpenMeter.
    entitlement_meters: Mapping[str, CountedMeter] = dataclasses.field(
        default_factory=dict, metadata={"read": read.counted_meters}
    )
    #: The amounts that a request reserves when it starts, by feature, or a callable
    #: that takes the environ and returns them. Default: the policy's static amounts.
    reserve: Mapping[str, float] | Callable[[dict[str, Any]], Any] | None = (
        dataclasses.field(default=None, metadata={"read": read.reserved})
    )

    # -- Server and cache
    #: URL of the server for entitlements. Default: ``api_url``.
    entitlements_url: str | None = dataclasses.field(
        default=None, metadata={"read": read.optional_url}
    )
    #: Maximum number of seconds that a request waits for an answer of OpenMeter.
    entitlement_timeout: Annotated[float, msgspec.Meta(gt=0, le=60)] = 1.0
    #: TTL in seconds of a cached answer that allows. Then it is refreshed in the
    #: background.
    allow_ttl: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    #: TTL in seconds of a cached answer that denies.
    deny_ttl: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    #: Seconds beyond the TTL for which a cached answer is used if OpenMeter does not
    #: answer.
    max_stale: Annotated[float, msgspec.Meta(ge=0)] = 600.0
    #: Maximum number of entitlement requests per second to OpenMeter, for all processes
    #: that share a spool or a Redis together, otherwise per process. Default: 25 for
    #: OpenMeter Cloud, which allows 30, and for Kong Konnect; 200 for other servers.
    question_rate: Annotated[float, msgspec.Meta(gt=0)] | None = None
    #: Seconds after which a delivered event is assumed to be included in OpenMeter's
    #: balances. Used only if OpenMeter's list of events is not available.
    visibility_lag: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    #: Seconds after which an event that OpenMeter accepted but does not list is no
    #: longer waited for: its quota stops subtracting it.
    max_visibility_lag: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    #: URL of a Redis that several hosts share, so that a quota applies to all of them.
    redis_url: str | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.redis_url}
    )


def contradictions(policy: Policy) -> list[str]:
    """Return one sentence per contradiction between options."""
    return [
        *_source_problems(policy),
        *_spool_problems(policy),
        *_api_problems(policy),
        *_reserve_problems(policy),
        *_feature_problems(policy),
    ]


def _source_problems(policy: Policy) -> list[str]:
    if policy.trusted_request_id_header and policy.event_source == DEFAULT_SOURCE:
        return [
            "event_source: expected the name of this service, got the default: with "
            "trusted_request_id_header, two services behind one proxy would have the "
            "same event ids"
        ]
    return []


def _spool_problems(policy: Policy) -> list[str]:
    if policy.delivery == "ship" and policy.spool_dir is None:
        return ["spool_dir: expected a directory for delivery='ship'"]
    return []


def _api_problems(policy: Policy) -> list[str]:
    """Return the options that the version of OpenMeter's API does not support."""
    if policy.api_flavor == "v3":
        return list(_not_in_v3(policy))
    return [
        f"api_flavor: expected 'v3' for {url}, as Kong Konnect has version 3 only, "
        "got 'v1'"
        for url in (policy.api_url, policy.entitlements_url)
        if url is not None and is_konnect(url)
    ]


def _not_in_v3(policy: Policy) -> Iterator[str]:
    if policy.entitlement_meters:
        yield (
            "entitlement_meters: expected none with api_flavor='v3', which returns no "
            f"balance to count down, got {[*policy.entitlement_meters]}; leave it out, "
            "or set api_flavor='v1' if the server has version 1"
        )
    if policy.usage_headers:
        yield (
            "usage_headers: expected False with api_flavor='v3', which returns no "
            "limit and no balance, got True"
        )


def _reserve_problems(policy: Policy) -> list[str]:
    if not isinstance(policy.reserve, dict):
        return []
    counted = policy.entitlement_meters
    return [
        f"reserve: {feature!r} is not in entitlement_meters, so it is not counted"
        for feature in policy.reserve
        if feature not in counted
    ]


def _feature_problems(policy: Policy) -> list[str]:
    if policy.api_flavor != "v3":
        return []
    named = {*policy.required_entitlements, *policy.entitlement_meters}
    return [
        f"required_entitlements: {feature!r} is an id, which version 3 of OpenMeter's "
        "API does not accept; write the key of the feature"
        for feature in invalid_feature_keys(sorted(named))
    ]


#: Options that a route or view can set. All others apply to the whole middleware.
PER_ROUTE = frozenset({
    "audit", "customer", "denied_response", "enforce",
    "event_source", "fail_mode", "limit_status", "meter", "meter_on_status_codes",
    "meter_options", "meter_when", "meters", "on_abort", "on_failure",
    "on_missing_subject", "required_entitlements", "reserve", "subject",
    "subject_commas", "subject_path", "trusted_request_id_header", "usage_headers",
})  # fmt: skip


#: A reference to an environment variable in a file of Zuplo. Only `Policy.from_zuplo`
#: resolves it.
_REFERENCE = re.compile(r"\$env\([^()]*\)")


# Only __init__ is generated: to compile the other methods for 50 fields would slow down
# the import.
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Policy(BillingOptions, EntitlementOptions, DeliveryOptions):
    """All options of billing, entitlements and delivery, as keywords.

    Immutable; threads and middlewares may share one. ``dataclasses.replace`` returns a
    changed copy.

    :raises ConfigError: listing all problems of the options.
    """

    #: The API key from ``api_key`` or ``api_key_file``.
    key: ApiKey = dataclasses.field(init=False, repr=False, compare=False)
    #: The API key for entitlements. A separate object, because other threads use it.
    entitlements_key: ApiKey = dataclasses.field(init=False, repr=False, compare=False)
    #: The constant part of ``meter`` and ``meters``.
    static: CheckedUsage = dataclasses.field(init=False, repr=False, compare=False)
    #: The part of ``meter`` and ``meters`` that is measured for each response.
    measured: tuple[MeasuredMeter, ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )
    #: The rules of ``routes`` and their policies, None if a route is not metered.
    route_policies: tuple[tuple[RouteRule, Policy | None], ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )

    if TYPE_CHECKING:
        # The parameters have more types than the fields, which hold converted values.
        def __init__(self, **options: Unpack[Options]) -> None: ...

    def __new__(cls, **options: Any) -> Self:
        """Raise a ConfigError for unknown options, together with all other problems.

        The generated ``__init__`` would raise a TypeError for the first one only.
        """
        if unknown := [name for name in options if name not in _names()]:
            known = {k: v for k, v in options.items() if k not in unknown}
            _, problems = _read_options(known)
            misspelt = [read.unknown_option(name, _names()) for name in unknown]
            raise ConfigError([*misspelt, *problems])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _names()}
        values, problems = _read_options(given)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if not problems:
            problems = [*contradictions(self), *self._keys()]
        route_policies, wrong = ((), []) if problems else self._read_routes()
        if problems or wrong:
            raise ConfigError([*problems, *wrong])
        static, measured = split(self.meter, self.meters)
        object.__setattr__(self, "static", static)
        object.__setattr__(self, "measured", measured)
        object.__setattr__(self, "route_policies", route_policies)

    def __repr__(self) -> str:
        shown = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.repr
        )
        return f"{type(self).__qualname__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return _options(self) == _options(other)

    # Options may be mappings, which are not hashable.
    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] = os.environ, /, **options: Unpack[Options]
    ) -> Self:
        """Return the policy of *options*, and of environment variables for the others.

        The variable of ``batch_size`` is ``OPENMETER_BATCH_SIZE``. ``meter`` and
        ``meters`` are written as JSON.

        :raises ConfigError: listing all problems.
        """
        given: dict[str, Any] = {**read_variables(environ, _hints()), **options}
        return cls(**given)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], **options: Unpack[Options]
    ) -> Self:
        """Return the policy in a file: JSON if its name ends with .json, else TOML.

        Environment variables override the file, and *options* override both.

        :raises ConfigError: listing all problems.
        """
        in_file = read_file(Path(path))
        if found := dict.fromkeys(_REFERENCE.findall(repr(in_file))):
            references = " and ".join(map(repr, found))
            raise ConfigError(
                [
                    f"{str(path)!r}: expected values, got {references} of Zuplo's "
                    "file: replace each reference by its value"
                ]
            )
        in_variables = read_variables(os.environ, _hints())
        given: dict[str, Any] = {**in_file, **in_variables, **options}
        return cls(**given)

    @classmethod
    def from_zuplo(
        cls,
        policies: str | os.PathLike[str],
        routes: str | os.PathLike[str] | None = None,
        **options: Unpack[OptionsBesideRoutes],
    ) -> Self:
        """Return the policy in Zuplo's ``policies.json`` and ``routes.oas.json``.

        Environment variables override the files, and *options* override both: a key or
        URL that is overridden is not read from the files. With *routes*, requests that
        match none of them are not metered.

        :raises ConfigError: listing all problems and their places in the file. The
            message contains references to variables (``$env(NAME)``), not their values.
        """
        # Imported here: slow to import, and few applications need it.
        from openmeter_wsgi import zuplo

        given = {**read_variables(os.environ, _hints()), **options}
        in_files = zuplo.options_of(policies, routes, os.environ, replaced=given.keys())
        try:
            return cls(**{**in_files, **given})
        except ConfigError as error:
            names = zuplo.variables_in(zuplo.load_document(policies))
            raise ConfigError(
                [zuplo.hide_values(p, names, os.environ) for p in error.problems]
            ) from None

    @property
    def static_meters(self) -> tuple[Meter, ...]:
        """The meters of a request without usage set by the handler."""
        return self.as_meters(self.static)

    def as_meters(self, usage: CheckedUsage) -> tuple[Meter, ...]:
        """Return the meters of *usage*: non-zero amounts first, then documents."""
        numbers = (number_meter(name, number) for name, number in usage.numbers.items())
        return (*filter(None, numbers), *usage.documents)

    def _read_routes(
        self,
    ) -> tuple[tuple[tuple[RouteRule, Policy | None], ...], list[str]]:
        """Return the rules of ``routes`` with their policies, and all problems."""
        policies: list[tuple[RouteRule, Policy | None]] = []
        problems: list[str] = []
        for text, route_options in (self.routes or {}).items():
            rule = RouteRule(text)
            if not isinstance(route_options, Mapping):
                policies.append((rule, None))
                continue
            problems += [f"routes[{text!r}]: {p}" for p in _misplaced(route_options)]
            options = {**overriding_options(route_options), "routes": None}
            if rule.names_options:
                options.setdefault("meter_options", True)
            try:
                policies.append((rule, dataclasses.replace(self, **options)))
            except ConfigError as error:
                problems += [f"routes[{text!r}]: {p}" for p in error.problems]
        return tuple(policies), problems

    def _keys(self) -> list[str]:
        """Set the fields of the API keys; return their problems."""
        if self.api_key is not None and self.api_key_file is not None:
            return ["api_key_file: expected api_key or a file, got both"]
        try:
            key = ApiKey.from_options(self.api_key, self.api_key_file)
            separate_key = self.entitlements_api_key
            entitlements_key = (
                ApiKey.from_options(self.api_key, self.api_key_file)
                if separate_key is None
                else ApiKey.from_options(separate_key, None)
            )
        except ValueError as error:
            return [str(error)]
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "entitlements_key", entitlements_key)
        if key.required_by(self.api_url) and not self.dry_run:
            return [
                f"api_key: expected a key, which {self.api_url} requires, got none "
                "(or set OPENMETER_API_KEY); for a server of your own or the sandbox, "
                "set OPENMETER_API_URL"
            ]
        return []


def overriding_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a route or view that replace those of the policy.

    Either of ``meter`` and ``meters`` replaces both. An empty one means no meters.
    """
    if "meter" not in options and "meters" not in options:
        return dict(options)
    replaced = dict(options)
    for name in ("meter", "meters"):
        given = options.get(name)
        if isinstance(given, list | tuple | Mapping) and not given:
            given = None
        replaced[name] = given
    return replaced


def read_text_options(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the options in *texts*, named and written like environment variables.

    :raises ConfigError: naming each text that cannot be parsed.
    """
    return read_variables(texts, _hints())


def view_problems(options: Mapping[str, Any]) -> list[str]:
    """Return the problems of the options of a single view."""
    unknown = [name for name in options if name not in _names()]
    known = {k: v for k, v in options.items() if k not in unknown}
    misspelt = [read.unknown_option(name, sorted(PER_ROUTE)) for name in unknown]
    return [*misspelt, *_misplaced(known), *_read_options(overriding_options(known))[1]]


def _misplaced(options: Iterable[str]) -> list[str]:
    """Return a problem for each option that applies only to the whole middleware."""
    return [
        f"{name}: belongs to the middleware as a whole"
        for name in options
        if name in _names() and name not in PER_ROUTE
    ]


def _options(policy: Policy) -> tuple[object, ...]:
    return tuple(getattr(policy, name) for name in _names())


@functools.cache
def _names() -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(Policy) if field.init)


# Cached: evaluating all type hints takes as long as all other checks together.
@functools.cache
def _hints() -> Mapping[str, Any]:
    hints = get_type_hints(Policy, include_extras=True)
    return {name: hints[name] for name in _names()}


def _read_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the converted values, and one sentence per invalid value."""
    readers = {f.name: f.metadata.get("read") for f in dataclasses.fields(Policy)}
    hints = _hints()
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in options.items():
        reader = readers[name]
        try:
            values[name] = reader(value) if reader else read.typed(value, hints[name])
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return values, problems
