"""The options of one policy: frozen, checked, all problems told at once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, get_type_hints

import msgspec

from openmeter_wsgi import entitlement_options as read_entitlement
from openmeter_wsgi import options as read
from openmeter_wsgi.api_key import ApiKey
from openmeter_wsgi.contradictions import contradictions
from openmeter_wsgi.entitlement_options import CountedMeter  # noqa: TC001 - a hint
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.measured_meters import MeasuredMeter, split
from openmeter_wsgi.measures import Measure  # noqa: TC001 - a hint
from openmeter_wsgi.policy_files import read_file, read_variables
from openmeter_wsgi.routes import RouteRule
from openmeter_wsgi.status_codes import StatusCodes
from openmeter_wsgi.usage import Meter, Usage, number_meter

Billed: TypeAlias = Literal["all", "measured", "none"]
ApiFlavor: TypeAlias = Literal["v1", "v3", "konnect"]
FailMode: TypeAlias = Literal["open", "closed", "stale"]
EntitlementsPath: TypeAlias = Literal["v2", "v1", "subjects"]
#: From an environ to the subject of its request, empty or None if it has none.
SubjectCallable: TypeAlias = Callable[[dict[str, Any]], str | None]

_DEFAULT_SOURCE = "api-gateway"
#: What a route can say of itself. All else is one for the whole process.
PER_ROUTE = frozenset({
    "audit", "billing_errors", "customer", "denied_response", "enforce",
    "event_source", "fail_mode", "limit_status", "meter", "meter_on_status_codes",
    "meter_options", "meter_when", "meters", "on_abort", "on_failure",
    "on_missing_subject", "required_entitlements", "reserve", "subject",
    "subject_path", "trusted_request_id_header", "usage_headers", "value_property",
})  # fmt: skip
_NAME = Annotated[str, msgspec.Meta(min_length=1)]
_HEADER = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9\-]+$")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What is metered, under which name, and how it reaches OpenMeter.

    Immutable and safe to share. ``dataclasses.replace`` makes a changed copy.

    :raises ConfigError: with every problem of the given options.
    """

    # -- OpenMeter
    #: Text, or a callable that is called again after a 401.
    api_key: str | Callable[[], str] | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.key}
    )
    #: A file that holds the key, read again after a 401.
    api_key_file: str | None = None
    #: The key for questions about entitlements; default: ``api_key``.
    entitlements_api_key: str | Callable[[], str] | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.key}
    )
    api_url: str = dataclasses.field(
        default="https://openmeter.cloud", metadata={"read": read.url}
    )
    api_flavor: ApiFlavor = "v1"
    #: Seconds until an attempt without an answer is given up.
    request_timeout: Annotated[float, msgspec.Meta(gt=0, le=600)] = 10.0

    # -- What is billed
    #: A document, ``{"type": …, "data": {…}}``, or a list of them.
    meter: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = dataclasses.field(
        default=None, metadata={"read": read.meter}
    )
    #: Numbers by type.
    meters: Mapping[str, float] | None = dataclasses.field(
        default=None, metadata={"read": read.meters}
    )
    #: A predicate on the finished exchange besides the status: a callable, or
    #: ``computed(callable, "json")`` where it looks at the body.
    meter_when: Callable[[Any], object] | Measure | None = dataclasses.field(
        default=None, metadata={"read": read.meter_when}
    )
    #: The name of the number in the ``data`` of an event made from a number.
    value_property: _NAME = "total"
    meter_on_status_codes: StatusCodes | str | Iterable[int | str] = dataclasses.field(
        default="200-299", metadata={"read": StatusCodes}
    )
    #: ``"intended"``: codes from 400 on among those are billed on purpose. Without it
    #: ``openmeter-wsgi check`` takes them for a mistake.
    billing_errors: Literal["intended"] | None = None
    #: What of a response that the application broke off is billed.
    on_failure: Billed = "measured"
    #: What of a response that the client did not take to its end is billed.
    on_abort: Billed = "all"
    #: Whether OPTIONS requests, which browsers send by themselves, count as others do.
    meter_options: bool = False
    #: The service that the events come from, constant per service.
    event_source: str = dataclasses.field(
        default=_DEFAULT_SOURCE, metadata={"read": read.source}
    )
    #: A header that your own proxy sets and clients cannot.
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

    # -- Who is billed
    #: A callable on the environ, or ``"header:Name"``.
    subject: str | SubjectCallable | None = dataclasses.field(
        default=None, metadata={"read": read.subject}
    )
    #: Where the subject is in what :func:`set_user` was given.
    subject_path: str = dataclasses.field(
        default=".sub", metadata={"read": read.subject_path}
    )
    #: ``"skip"``, or the subject that is billed instead.
    on_missing_subject: str = dataclasses.field(
        default="skip", metadata={"read": read.text}
    )

    # -- Who may
    #: The features that a request's customer must have access to, all of them.
    required_entitlements: tuple[str, ...] = dataclasses.field(
        default=(), metadata={"read": read_entitlement.features}
    )
    #: From a subject to the key of its customer: a callable or a mapping. Default:
    #: the subject itself.
    customer: Callable[[str], str | None] | Mapping[str, str] | None = (
        dataclasses.field(default=None, metadata={"read": read_entitlement.customer})
    )
    #: What decides where OpenMeter does not answer and nothing is known: let through,
    #: answer 503, or go by the last known answer however old it is.
    fail_mode: FailMode = "open"
    #: False: decide, count and log, and let everything through.
    enforce: bool = True
    #: The status of a denial for a quota that is used up.
    limit_status: Literal[429, 402, 403] = 429
    #: A callable on environ and decision; the WSGI application it returns answers.
    denied_response: Callable[[dict[str, Any], Any], Any] | None = dataclasses.field(
        default=None, metadata={"read": read.function}
    )
    #: Whether responses tell limit, remaining and reset in RateLimit headers.
    usage_headers: bool = False
    #: Features whose quota is counted down between two answers, and the meter types
    #: that they count (a list where both have the same name).
    entitlement_meters: Mapping[str, CountedMeter] = dataclasses.field(
        default_factory=dict, metadata={"read": read_entitlement.counted_meters}
    )
    #: What a request sets apart when it begins, by feature, where the policy's own
    #: meters do not say it; or a callable on the environ that says so.
    reserve: Mapping[str, float] | Callable[[dict[str, Any]], Any] | None = (
        dataclasses.field(default=None, metadata={"read": read_entitlement.reserved})
    )
    #: Where entitlements are asked for; default: ``api_url``.
    entitlements_url: str | None = dataclasses.field(
        default=None, metadata={"read": read.optional_url}
    )
    #: Customers of v2 or v1, or the deprecated subjects of v1.
    entitlements_path: EntitlementsPath = "v2"
    #: Seconds that a request waits for an answer never heard before.
    entitlement_timeout: Annotated[float, msgspec.Meta(gt=0, le=60)] = 1.0
    #: Seconds for which an allowance, a denial holds.
    allow_ttl: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    deny_ttl: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    #: Seconds for which either holds longer while OpenMeter does not answer.
    max_stale: Annotated[float, msgspec.Meta(ge=0)] = 600.0
    entitlement_cache_size: Annotated[int, msgspec.Meta(ge=1)] = 10_000
    #: Questions a second that one host asks at most. OpenMeter Cloud allows 30.
    question_rate: Annotated[float, msgspec.Meta(gt=0)] = 25.0
    #: Seconds after which OpenMeter has counted what was delivered to it.
    visibility_lag: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    #: A Redis that hosts share, so that a quota holds across all of them.
    redis_url: str | None = dataclasses.field(
        default=None, repr=False, metadata={"read": read.redis_url}
    )

    # -- Delivery
    #: Events that make a batch go before ``flush_interval`` is over.
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 100
    #: Seconds that an event waits for others at most.
    flush_interval: Annotated[float, msgspec.Meta(gt=0, le=3_600)] = 1.0
    max_queue_events: Annotated[int, msgspec.Meta(ge=1)] = 250_000
    max_queue_bytes: Annotated[int, msgspec.Meta(ge=1_000_000)] = 100_000_000
    #: Seconds that the exit of a process may take for what still waits.
    shutdown_timeout: Annotated[float, msgspec.Meta(ge=0, le=3_600)] = 5.0
    #: Where settled usage waits, so that it survives the process; None: in memory.
    #: One directory per OpenMeter server and key; any number of processes.
    spool_dir: str | None = None
    #: How a process appends there. ``"auto"``: the fastest form that is safe there.
    journal: Literal["auto", "mmap", "write"] = "auto"
    #: Of this size the spool takes no more; a segment per process more or less.
    max_spool_bytes: Annotated[int, msgspec.Meta(ge=16 * 1024**2)] = 1024**3
    #: Seconds for which a batch without an answer may be sent again. Longer than
    #: OpenMeter remembers ids, it might be billed twice.
    resend_window: Annotated[float, msgspec.Meta(gt=0)] = 86_400.0
    #: ``"ship"``: another process delivers the spool, this one starts no thread.
    delivery: Literal["thread", "ship"] = "thread"
    #: Settle, count and log what would be billed, and send nothing.
    dry_run: bool = False

    #: The key, from wherever it comes.
    key: ApiKey = dataclasses.field(init=False, repr=False, compare=False)
    #: The key for questions: its own object, because other threads use it.
    questions_key: ApiKey = dataclasses.field(init=False, repr=False, compare=False)
    #: ``meter`` and ``meters`` together, as far as they are known beforehand …
    static: Usage = dataclasses.field(init=False, repr=False, compare=False)
    #: … and what of them is known only at the end of a response.
    measured: tuple[MeasuredMeter, ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )
    #: The policies of single routes.
    of_routes: tuple[tuple[RouteRule, Policy | None], ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )

    def __new__(cls, **options: Any) -> Self:
        """Refuse options that do not exist."""
        # Here, so that a misspelt name is told together with all other problems
        # and not as the TypeError of the generated __init__.
        if unknown := [name for name in options if name not in _names()]:
            known = {k: v for k, v in options.items() if k not in unknown}
            _, problems = _read_options(known)
            misspelt = [read.unknown(name, _names()) for name in unknown]
            raise ConfigError([*misspelt, *problems])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _names()}
        values, problems = _read_options(given)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if not problems:
            problems = [*contradictions(self, _DEFAULT_SOURCE), *self._keys()]
        of_routes, wrong = ((), []) if problems else self._of_routes()
        if problems or wrong:
            raise ConfigError([*problems, *wrong])
        static, measured = split(self.meter, self.meters)
        object.__setattr__(self, "static", static)
        object.__setattr__(self, "measured", measured)
        object.__setattr__(self, "of_routes", of_routes)

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] = os.environ, /, **options: Any
    ) -> Self:
        """Return the policy that *options* and, for the rest, variables say.

        A variable is named ``OPENMETER_`` and the option's name in capitals;
        ``meter`` and ``meters`` are written as JSON.
        """
        return cls(**{**read_variables(environ, _hints()), **options})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Return the policy in a TOML or JSON file (by its ending).

        A variable outdoes the file, and *options* outdo both.
        """
        said = {**read_file(Path(path)), **read_variables(os.environ, _hints())}
        return cls(**{**said, **options})

    @property
    def static_meters(self) -> tuple[Meter, ...]:
        """The meters of a request whose handler states nothing."""
        return self.as_meters(self.static)

    def as_meters(self, usage: Usage) -> tuple[Meter, ...]:
        """Return *usage* as meters, numbers first; zeros are left out."""
        numbers = (
            number_meter(name, number, self.value_property)
            for name, number in usage.numbers.items()
        )
        return (*filter(None, numbers), *usage.documents)

    def _of_routes(
        self,
    ) -> tuple[tuple[tuple[RouteRule, Policy | None], ...], list[str]]:
        """Make the policies of the routes; say what is wrong with them."""
        made: list[tuple[RouteRule, Policy | None]] = []
        problems: list[str] = []
        for text, own in (self.routes or {}).items():
            rule = RouteRule(text)
            if not isinstance(own, Mapping):
                made.append((rule, None))
                continue
            problems += [f"routes[{text!r}]: {each}" for each in _misplaced(own)]
            options = {**own, "routes": None}
            if rule.names_options:
                options.setdefault("meter_options", True)
            try:
                made.append((rule, dataclasses.replace(self, **options)))
            except ConfigError as error:
                problems += [f"routes[{text!r}]: {each}" for each in error.problems]
        return tuple(made), problems

    def _keys(self) -> list[str]:
        """Make the keys of ingest and questions; say what is wrong with them."""
        if self.api_key is not None and self.api_key_file is not None:
            return ["api_key_file: expected api_key or a file, got both"]
        try:
            key = ApiKey.from_options(self.api_key, self.api_key_file)
            own = self.entitlements_api_key
            questions_key = (
                ApiKey.from_options(self.api_key, self.api_key_file)
                if own is None
                else ApiKey.from_options(own, None)
            )
        except ValueError as error:
            return [str(error)]
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "questions_key", questions_key)
        if key.required_by(self.api_url, self.api_flavor) and not self.dry_run:
            return [
                f"api_key: expected a key, which {self.api_url} requires, got none "
                "(or set OPENMETER_API_KEY)"
            ]
        return []


def view_problems(options: Mapping[str, Any]) -> list[str]:
    """Say what is wrong with the options of a single view."""
    unknown = [name for name in options if name not in _names()]
    known = {k: v for k, v in options.items() if k not in unknown}
    misspelt = [read.unknown(name, sorted(PER_ROUTE)) for name in unknown]
    return [*misspelt, *_misplaced(known), *_read_options(known)[1]]


def _misplaced(options: Iterable[str]) -> list[str]:
    """Say of each option that is one of the whole middleware that it is."""
    return [
        f"{name}: belongs to the middleware as a whole"
        for name in options
        if name in _names() and name not in PER_ROUTE
    ]


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(Policy) if field.init]


def _hints() -> dict[str, Any]:
    hints = get_type_hints(Policy, include_extras=True)
    return {name: hints[name] for name in _names()}


def _read_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the checked values and a sentence for each that is wrong."""
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
