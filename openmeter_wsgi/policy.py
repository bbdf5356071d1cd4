"""`Policy`: all options of a middleware, checked together and immutable."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import (
    Callable,
    Iterable,
    Mapping,
)
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
from openmeter_wsgi.measures import (
    Measure,
    MeasuredMeter,
    split,
)
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
#: Returns the subject of the request with this environ; empty or None for none.
SubjectCallable: TypeAlias = Callable[[dict[str, Any]], str | None]

DEFAULT_SOURCE = "openmeter_wsgi"
_HEADER = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9\-]+$")]


@dataclasses.dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class BillingOptions:
    """Options of billing: the meters and the subject."""

    #: The events of each request: a document, ``{"type": …, "data": {…}}``, or a list
    #: of documents. Measures in ``data`` are replaced by their values.
    meter: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = dataclasses.field(
        default=None, metadata={"read": read.meter}
    )
    #: The numbers of each request by type: ``{"api_requests": 1}`` sends the data
    #: ``{"total": 1}``. A number may be a measure; zero sends no event.
    meters: Mapping[str, float | Measure | str] | None = dataclasses.field(
        default=None, metadata={"read": read.meters}
    )
    #: A further condition on the finished exchange: a callable, or
    #: ``computed(callable, "json")`` if it reads the body, or a measure, also as text
    #: (``"$response.succeeded"``).
    meter_when: Callable[[Any], object] | Measure | str | None = dataclasses.field(
        default=None, metadata={"read": read.meter_when}
    )
    #: The status codes that are billed: ``"200-299"``, ``"2xx, 304"``, ``[200, 201]``.
    #: All others are counted and not billed. Errors among them are warned of at the
    #: start and by ``openmeter-wsgi check``.
    meter_on_status_codes: StatusCodes | str | Iterable[int | str] = dataclasses.field(
        default="200-299", metadata={"read": StatusCodes}
    )
    #: The part that is billed of a response that the application broke off:
    #: ``"measured"`` is the usage of handlers and measures, without flat prices.
    on_failure: Billed = "measured"
    #: The part that is billed of a response that the client did not read to its end.
    #: With less than ``"all"`` a client pays less by hanging up before the last byte.
    on_abort: Billed = "all"
    #: True bills OPTIONS requests, which browsers send by themselves, like others.
    meter_options: bool = False
    #: The name of the service that the events come from. OpenMeter deduplicates by it
    #: and the event's id. Flask and Django set it to the name of the application.
    event_source: str = dataclasses.field(
        default=DEFAULT_SOURCE, metadata={"read": read.source}
    )
    #: A header that your proxy sets and clients cannot: its value becomes the id of the
    #: request in the ids of its events. It needs an explicit ``event_source``.
    trusted_request_id_header: _HEADER | None = None

    #: A callable that gets a mapping for every settled request that became no event,
    #: with the reason. The logger ``openmeter_wsgi.audit`` has a line at level DEBUG.
    audit: Callable[[dict[str, Any]], object] | None = dataclasses.field(
        default=None, metadata={"read": read.audit}
    )
    #: Options of single routes, by rule (``"POST /v1/users/<id>"``); None: not
    #: metered. A route inherits the options that it does not name. The rule ``"*"`` is
    #: for all requests that no other rule matches; without it they are metered by the
    #: options of the middleware.
    routes: Mapping[str, Mapping[str, Any] | None] | None = dataclasses.field(
        default=None, metadata={"read": read.routes}
    )

    # -- To whom
    #: The subject to bill: a callable on the environ, or ``"header:Name"``. Clients who
    #: can set that header can bill each other.
    subject: str | SubjectCallable | None = dataclasses.field(
        default=None, metadata={"read": read.subject}
    )
    #: True allows commas in a subject from a header. By default a comma means that the
    #: header was sent twice, and the request has no subject.
    subject_commas: bool = False
    #: The path to the subject in the argument of :func:`set_user`.
    subject_path: str = dataclasses.field(
        default=".sub", metadata={"read": read.subject_path}
    )
    #: The subject of requests without one. ``"skip"`` counts such requests and bills
    #: nobody.
    on_missing_subject: str = dataclasses.field(
        default="skip", metadata={"read": read.text}
    )


ApiFlavor: TypeAlias = Literal["v1", "v3"]


@dataclasses.dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class DeliveryOptions:
    """Options of delivery, one set for the whole process."""

    #: The key of OpenMeter Cloud or Kong Konnect: text, or a callable that is called
    #: again after a 401. A server of your own needs no key.
    api_key: str | Callable[[], str] | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.key}
    )
    #: The file with the key, read again after a 401.
    api_key_file: str | None = dataclasses.field(
        default=None, metadata={"read": read.path}
    )
    #: The key for requests about entitlements; default: ``api_key``.
    entitlements_api_key: str | Callable[[], str] | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.key}
    )
    #: The address of the server, without ``/api``.
    api_url: str = dataclasses.field(
        default="https://openmeter.cloud", metadata={"read": read.url}
    )
    #: The version of OpenMeter's API: ``"v1"`` (with version 2 for entitlements), or
    #: ``"v3"``, the only version of Kong Konnect.
    api_flavor: ApiFlavor = dataclasses.field(
        default="v1", metadata={"read": read.api_flavor}
    )
    #: Seconds to wait for the answer to one attempt to send.
    request_timeout: Annotated[float, msgspec.Meta(gt=0, le=600)] = 10.0

    #: The most events in one batch. So many waiting events are sent at once, before
    #: ``flush_interval`` is over.
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 500
    #: The most seconds that an event waits for a batch to fill.
    flush_interval: Annotated[float, msgspec.Meta(gt=0, le=3_600)] = 1.0
    #: The size of the queue in memory, in bytes of events. An event that finds no room
    #: is dropped and counted.
    max_queue_bytes: Annotated[int, msgspec.Meta(ge=1_000)] = 100_000_000
    #: The most seconds that the exit of a process may take to send waiting events.
    shutdown_timeout: Annotated[float, msgspec.Meta(ge=0, le=3_600)] = 5.0
    #: Where settled usage waits, so that it survives the process; None: in memory.
    #: Any number of processes; each server has a directory of its own in it.
    spool_dir: str | None = dataclasses.field(
        default=None, metadata={"read": read.path}
    )
    #: Of this size the directory of a server takes no more; a segment per process
    #: more or less.
    max_spool_bytes: Annotated[int, msgspec.Meta(ge=16 * 1024**2)] = 1024**3
    #: Seconds within which a batch without an answer is sent again. If OpenMeter
    #: forgets ids sooner, events may be billed twice.
    resend_window: Annotated[float, msgspec.Meta(gt=0)] = 86_400.0
    #: The secret that signs the tickets of :func:`defer`, at least 16 characters. To
    #: replace it, give the new one and the old one with a space between them: the first
    #: signs, both are accepted. Needs ``pip install 'openmeter_wsgi[jobs]'``.
    ticket_secret: str | Iterable[str] | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.ticket_secret}
    )
    #: ``"ship"``: ``openmeter-wsgi ship`` delivers the spool, not a thread.
    delivery: Literal["thread", "ship"] = "thread"
    #: True logs and counts the events, and sends none.
    dry_run: bool = False


FailMode: TypeAlias = Literal["open", "closed", "stale"]


@dataclasses.dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class EntitlementOptions:
    """Options of entitlements: the required features, and denials."""

    #: The features that the customer needs, all of them.
    required_entitlements: tuple[str, ...] = dataclasses.field(
        default=(), metadata={"read": read.features}
    )
    #: The key of the customer of a subject: a callable or a mapping. Default: the
    #: subject itself.
    customer: Callable[[str], str | None] | Mapping[str, str] | None = (
        dataclasses.field(default=None, metadata={"read": read.customer})
    )
    #: The decision while OpenMeter does not answer and no answer is cached: ``"open"``
    #: allows the request, ``"closed"`` answers 503, ``"stale"`` uses the last answer,
    #: however old it is.
    fail_mode: FailMode = "open"
    #: False allows all requests, and counts and logs the denials.
    enforce: bool = True
    #: The status of a denial because a quota is used up.
    limit_status: Literal[429, 402, 403] = 429
    #: A callable on environ and decision that returns the WSGI application to answer a
    #: denied request.
    denied_response: Callable[[dict[str, Any], Any], Any] | None = dataclasses.field(
        default=None, metadata={"read": read.function}
    )
    #: True adds RateLimit headers with limit, remaining amount and reset.
    usage_headers: bool = False
    #: The meter type of each feature whose quota is counted down locally between two
    #: answers of OpenMeter. A list if feature and type have the same name.
    entitlement_meters: Mapping[str, CountedMeter] = dataclasses.field(
        default_factory=dict, metadata={"read": read.counted_meters}
    )
    #: The amounts that a request reserves when it begins, by feature, or a callable on
    #: the environ that returns them. Default: the amounts of the policy's own meters.
    reserve: Mapping[str, float] | Callable[[dict[str, Any]], Any] | None = (
        dataclasses.field(default=None, metadata={"read": read.reserved})
    )
    #: The address of the server for entitlements; default: ``api_url``.
    entitlements_url: str | None = dataclasses.field(
        default=None, metadata={"read": read.optional_url}
    )
    #: The most seconds that a request waits for an answer that is not cached.
    entitlement_timeout: Annotated[float, msgspec.Meta(gt=0, le=60)] = 1.0
    #: Seconds for which an answer that allows is cached. Then it is refreshed in the
    #: background.
    allow_ttl: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    #: Seconds for which an answer that denies is cached.
    deny_ttl: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    #: Further seconds for which a cached answer is used while OpenMeter is away.
    max_stale: Annotated[float, msgspec.Meta(ge=0)] = 600.0
    #: Questions a second that all who share a spool or a Redis ask at most, and each
    #: process where there is neither. Default: 25 for OpenMeter Cloud, which allows 30,
    #: and for Kong Konnect; 200 for a server of your own.
    question_rate: Annotated[float, msgspec.Meta(gt=0)] | None = None
    #: Seconds after which OpenMeter has counted what was delivered to it, where its
    #: list of events cannot be asked, which knows better.
    visibility_lag: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    #: Seconds after which an event that OpenMeter accepted and does not list is lost:
    #: quotas no longer wait for it.
    max_visibility_lag: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    #: A Redis that hosts share, so that a quota holds across all of them.
    redis_url: str | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.redis_url}
    )


def contradictions(policy: Policy) -> list[str]:
    """Return a sentence for each contradiction between options."""
    return [
        *_sources(policy),
        *_places(policy),
        *_versions(policy),
        *_quotas(policy),
        *_ids(policy),
    ]


def _sources(policy: Policy) -> list[str]:
    if policy.trusted_request_id_header and policy.event_source == DEFAULT_SOURCE:
        return [
            "event_source: expected a name of this service's own, got the default: "
            "with trusted_request_id_header two services behind one proxy would "
            "share ids"
        ]
    return []


def _places(policy: Policy) -> list[str]:
    if policy.delivery == "ship" and policy.spool_dir is None:
        return ["spool_dir: expected a directory for delivery='ship'"]
    return []


def _versions(policy: Policy) -> list[str]:
    """Return the options that the version of the API does not support."""
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
            "entitlement_meters: expected none with api_flavor='v3', which tells no "
            f"balance that could be counted down, got {[*policy.entitlement_meters]}; "
            "leave it out, or set api_flavor='v1' where the server has version 1"
        )
    if policy.usage_headers:
        yield (
            "usage_headers: expected False with api_flavor='v3', which tells no limit "
            "and no balance, got True"
        )


def _quotas(policy: Policy) -> list[str]:
    if not isinstance(policy.reserve, dict):
        return []
    counted = policy.entitlement_meters
    return [
        f"reserve: {feature!r} is not in entitlement_meters, so nothing counts it"
        for feature in policy.reserve
        if feature not in counted
    ]


def _ids(policy: Policy) -> list[str]:
    if policy.api_flavor != "v3":
        return []
    named = {*policy.required_entitlements, *policy.entitlement_meters}
    return [
        f"required_entitlements: {feature!r} is an id, which OpenMeter's version 3 "
        "does not take; write the key of the feature"
        for feature in invalid_feature_keys(sorted(named))
    ]


#: The options that a route or view can set. All others hold for the whole process.
PER_ROUTE = frozenset({
    "audit", "customer", "denied_response", "enforce",
    "event_source", "fail_mode", "limit_status", "meter", "meter_on_status_codes",
    "meter_options", "meter_when", "meters", "on_abort", "on_failure",
    "on_missing_subject", "required_entitlements", "reserve", "subject",
    "subject_commas", "subject_path", "trusted_request_id_header", "usage_headers",
})  # fmt: skip


#: A variable of Zuplo's, which nothing but `Policy.from_zuplo` looks up.
_REFERENCE = re.compile(r"\$env\([^()]*\)")


# Only __init__ is generated: compiling the other methods for so many options would take
# longer than importing ten modules.
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Policy(BillingOptions, EntitlementOptions, DeliveryOptions):
    """The options of billing, entitlements and delivery, all by keyword.

    Immutable and safe to share. ``dataclasses.replace`` makes a changed copy.

    :raises ConfigError: with every problem of the given options.
    """

    #: The key of ``api_key`` or ``api_key_file``.
    key: ApiKey = dataclasses.field(init=False, repr=False, compare=False)
    #: The key for entitlements: an object of its own, because other threads use it.
    entitlements_key: ApiKey = dataclasses.field(init=False, repr=False, compare=False)
    #: The constant part of ``meter`` and ``meters`` …
    static: CheckedUsage = dataclasses.field(init=False, repr=False, compare=False)
    #: … and the part that is measured at the end of a response.
    measured: tuple[MeasuredMeter, ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )
    #: The policies of single routes.
    route_policies: tuple[tuple[RouteRule, Policy | None], ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )

    if TYPE_CHECKING:
        # The fields hold what was read; a reader takes more.
        def __init__(self, **options: Unpack[Options]) -> None: ...

    def __new__(cls, **options: Any) -> Self:
        """Refuse options that do not exist."""
        # Here, so that a misspelt name is told together with all other problems
        # and not as the TypeError of the generated __init__.
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

    # There are mappings among the options.
    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] = os.environ, /, **options: Unpack[Options]
    ) -> Self:
        """Return the policy of *options* and, for the rest, of variables.

        A variable is named ``OPENMETER_`` and the option's name in capitals;
        ``meter`` and ``meters`` are written as JSON.
        """
        given: dict[str, Any] = {**read_variables(environ, _hints()), **options}
        return cls(**given)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], **options: Unpack[Options]
    ) -> Self:
        """Return the policy of a TOML or JSON file, by the ending of its name.

        A variable wins over the file, and *options* win over both.
        """
        file = read_file(Path(path))
        if found := dict.fromkeys(_REFERENCE.findall(repr(file))):
            several = " and ".join(map(repr, found))
            raise ConfigError(
                [
                    f"{str(path)!r}: expected values, got the references {several} of "
                    "Zuplo's file: replace them by their values"
                ]
            )
        said = {**file, **read_variables(os.environ, _hints())}
        given: dict[str, Any] = {**said, **options}
        return cls(**given)

    @classmethod
    def from_zuplo(
        cls,
        policies: str | os.PathLike[str],
        routes: str | os.PathLike[str] | None = None,
        **options: Unpack[OptionsBesideRoutes],
    ) -> Self:
        """Return the policy in Zuplo's ``policies.json`` and ``routes.oas.json``.

        A variable wins over the files, and *options* win over both. With *routes*,
        requests that match none of them are not metered.

        :raises ConfigError: with every problem and its place in the file. It quotes
            references to variables (``$env(NAME)``), and never their values.
        """
        # Here, as it takes a tenth of the whole import and few applications need it.
        from openmeter_wsgi import zuplo

        said = zuplo.options_of(policies, routes, os.environ)
        given: dict[str, Any] = {**said, **read_variables(os.environ, _hints())}
        try:
            return cls(**{**given, **options})
        except ConfigError as error:
            names = zuplo.variables_in(zuplo.load_document(policies))
            raise ConfigError(
                [zuplo.hide_values(each, names, os.environ) for each in error.problems]
            ) from None

    @property
    def static_meters(self) -> tuple[Meter, ...]:
        """The meters of a request without run-time usage."""
        return self.as_meters(self.static)

    def as_meters(self, usage: CheckedUsage) -> tuple[Meter, ...]:
        """Return *usage* as meters, numbers first, without zeros."""
        numbers = (number_meter(name, number) for name, number in usage.numbers.items())
        return (*filter(None, numbers), *usage.documents)

    def _read_routes(
        self,
    ) -> tuple[tuple[tuple[RouteRule, Policy | None], ...], list[str]]:
        """Return the policies of the routes, and their problems."""
        made: list[tuple[RouteRule, Policy | None]] = []
        problems: list[str] = []
        for text, own in (self.routes or {}).items():
            rule = RouteRule(text)
            if not isinstance(own, Mapping):
                made.append((rule, None))
                continue
            problems += [f"routes[{text!r}]: {each}" for each in _misplaced(own)]
            options = {**overriding_options(own), "routes": None}
            if rule.names_options:
                options.setdefault("meter_options", True)
            try:
                made.append((rule, dataclasses.replace(self, **options)))
            except ConfigError as error:
                problems += [f"routes[{text!r}]: {each}" for each in error.problems]
        return tuple(made), problems

    def _keys(self) -> list[str]:
        """Set the keys of ingest and entitlements; return their problems."""
        if self.api_key is not None and self.api_key_file is not None:
            return ["api_key_file: expected api_key or a file, got both"]
        try:
            key = ApiKey.from_options(self.api_key, self.api_key_file)
            own = self.entitlements_api_key
            entitlements_key = (
                ApiKey.from_options(self.api_key, self.api_key_file)
                if own is None
                else ApiKey.from_options(own, None)
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


def overriding_options(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a route or view; its ``meter`` or ``meters`` replaces both.

    If one of them is empty, there are no meters.
    """
    if "meter" not in own and "meters" not in own:
        return dict(own)
    replaced = dict(own)
    for name in ("meter", "meters"):
        given = own.get(name)
        if isinstance(given, list | tuple | Mapping) and not given:
            given = None
        replaced[name] = given
    return replaced


def read_text_options(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the options in *texts*, which are named and written like variables.

    :raises ConfigError: naming each text that cannot be read.
    """
    return read_variables(texts, _hints())


def view_problems(options: Mapping[str, Any]) -> list[str]:
    """Return the problems of the options of a single view."""
    unknown = [name for name in options if name not in _names()]
    known = {k: v for k, v in options.items() if k not in unknown}
    misspelt = [read.unknown_option(name, sorted(PER_ROUTE)) for name in unknown]
    return [*misspelt, *_misplaced(known), *_read_options(overriding_options(known))[1]]


def _misplaced(options: Iterable[str]) -> list[str]:
    """Return a problem for each option that only the whole middleware can have."""
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


# Once: it evaluates the text of every hint, which takes as long as all other checks.
@functools.cache
def _hints() -> Mapping[str, Any]:
    hints = get_type_hints(Policy, include_extras=True)
    return {name: hints[name] for name in _names()}


def _read_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the checked values, and a sentence for each wrong one."""
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
