"""The options of one policy: frozen, checked, all problems told at once."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, get_type_hints

from openmeter_wsgi.api_key import ApiKey
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.measured_meters import MeasuredMeter, split
from openmeter_wsgi.options import values as read
from openmeter_wsgi.options.billing import BillingOptions
from openmeter_wsgi.options.contradictions import contradictions
from openmeter_wsgi.options.delivery import DeliveryOptions
from openmeter_wsgi.options.entitlements import EntitlementOptions
from openmeter_wsgi.options.files import read_file, read_variables
from openmeter_wsgi.route_rules import RouteRule
from openmeter_wsgi.usage import Meter, Usage, number_meter

#: What a route can say of itself. All else is one for the whole process.
PER_ROUTE = frozenset({
    "audit", "billing_errors", "customer", "denied_response", "enforce",
    "event_source", "fail_mode", "limit_status", "meter", "meter_on_status_codes",
    "meter_options", "meter_when", "meters", "on_abort", "on_failure",
    "on_missing_subject", "required_entitlements", "reserve", "subject",
    "subject_commas", "subject_path", "trusted_request_id_header", "usage_headers",
    "value_property",
})  # fmt: skip


# Of what is generated only __init__, for its signature: compiling the rest for so many
# options takes longer than importing ten modules.
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Policy(BillingOptions, EntitlementOptions, DeliveryOptions):
    """What is metered, under which name, who may, and how it reaches OpenMeter.

    Immutable and safe to share. ``dataclasses.replace`` makes a changed copy. The
    options are those of its three parts, all by keyword.

    :raises ConfigError: with every problem of the given options.
    """

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
            problems = [*contradictions(self), *self._keys()]
        of_routes, wrong = ((), []) if problems else self._of_routes()
        if problems or wrong:
            raise ConfigError([*problems, *wrong])
        static, measured = split(self.meter, self.meters)
        object.__setattr__(self, "static", static)
        object.__setattr__(self, "measured", measured)
        object.__setattr__(self, "of_routes", of_routes)

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
    __hash__ = None  # type: ignore[assignment]

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
        if key.required_by(self.api_url) and not self.dry_run:
            return [
                f"api_key: expected a key, which {self.api_url} requires, got none "
                "(or set OPENMETER_API_KEY)"
            ]
        return []


def read_text_options(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the options in texts that are named and written as variables are.

    :raises ConfigError: naming each text that cannot be read.
    """
    return read_variables(texts, _hints())


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
