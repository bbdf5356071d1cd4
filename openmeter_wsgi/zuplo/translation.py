"""Translation of Zuplo's policies and routes into our options, in code or as TOML.

`translate` makes a `Translation`. `options_of` returns it as options for a `Policy`,
`to_toml` writes it as a file. If several routes match a request, Zuplo takes the first
one in the document (its page on routing); our rules take the most specific one, as web
frameworks do.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

from openmeter_wsgi import log
from openmeter_wsgi.errors import ConfigError, MeterValueError
from openmeter_wsgi.events import add_numbers
from openmeter_wsgi.routes import EVERY_OTHER
from openmeter_wsgi.status_codes import StatusCodes
from openmeter_wsgi.zuplo.openapi import read_routes
from openmeter_wsgi.zuplo.policies import (
    DEFAULTS,
    MAX_NESTING,
    ZUPLO_OPTIONS,
    did_you_mean,
    read_policies,
    variables_in,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from openmeter_wsgi.zuplo.policies import ZuploPolicy

logger: Final = log.get_logger(__name__)


#: Options of a route; None: its requests are not metered.
Options = dict[str, Any] | None


def overlapping(
    routes: Mapping[str, Options],
) -> tuple[dict[str, Options], list[str]]:
    """Return the routes that are needed, and notes where Zuplo matches differently.

    An unmetered route is needed only if the rule of a metered route matches its
    requests as well.
    """
    needed = {rule for rule, options in routes.items() if options is not None}
    notes: list[str] = []
    for (first, options), (second, other) in combinations(routes.items(), 2):
        if options == other or not _overlap(first, second):
            continue
        needed |= {first, second}
        if specificity(second) > specificity(first):
            notes.append(
                f"{second}: Zuplo would use {first}, which comes first in the file; "
                "here the more specific rule governs"
            )
    return {rule: routes[rule] for rule in routes if rule in needed}, notes


def specificity(rule: str) -> tuple[bool, ...]:
    """Return a sort key, which is greater for the more specific of two rules."""
    return tuple("<" not in part for part in rule.split("/"))


def _overlap(left: str, right: str) -> bool:
    """Return True if a request can match both rules, or might."""
    lefts, rights = left.split("/"), right.split("/")
    for left_part, right_part in zip(lefts, rights, strict=False):
        if "<path:" in left_part or "<path:" in right_part:
            return True
        if left_part != right_part and "<" not in left_part + right_part:
            return False
    return len(lefts) == len(rights)


#: Options that are added up: Zuplo runs all policies of a route.
_ADDED_UP = ("meter", "meters", "required_entitlements")


def combined(policies: Sequence[ZuploPolicy]) -> dict[str, Any]:
    """Return the options of several policies on one route, with their meters added up.

    :raises ConfigError: if the policies differ in other options.
    """
    options: dict[str, Any] = {}
    for policy in policies:
        for name, value in policy.options.items():
            if name not in _ADDED_UP:
                options.setdefault(name, value)
    problems = [
        f"{name}: expected the same value in all policies of a route, they differ: "
        + ", ".join(map(str, policies))
        for name in options
        if len({_effect(policy, name, options) for policy in policies}) > 1
    ]
    if problems:
        raise ConfigError(problems)
    return {**_added_up(policies), **options}


def _effect(policy: ZuploPolicy, name: str, options: dict[str, Any]) -> object:
    """Return the value of the option *name* in *policy*, or its default."""
    value = policy.options.get(name, DEFAULTS.get(name, options[name]))
    if name == "meter_on_status_codes" and not variables_in(value):
        return StatusCodes(value)
    return value


def _added_up(policies: Sequence[ZuploPolicy]) -> dict[str, Any]:
    documents: list[dict[str, Any]] = []
    numbers: dict[str, Any] = {}
    features: list[str] = []
    for policy in policies:
        options = policy.options
        meter = options.get("meter", [])
        documents += meter if isinstance(meter, list) else [meter]
        for name, number in options.get("meters", {}).items():
            numbers[name] = add_numbers(name, numbers.get(name, 0), number)
        features += options.get("required_entitlements", [])
    sums = {
        "meter": documents[0] if len(documents) == 1 else documents,
        "meters": numbers,
        "required_entitlements": list(dict.fromkeys(features)),
    }
    return {name: value for name, value in sums.items() if value}


#: Options of delivery: all routes share one queue.
DELIVERY = ("api_key", "api_url")


@dataclasses.dataclass(frozen=True)
class Translation:
    """Our options for a configuration of Zuplo."""

    #: Options of requests that match no route; None: they are not metered.
    default_options: dict[str, Any] | None = dataclasses.field(repr=False)
    #: Options by rule; None: the requests are not metered.
    routes: dict[str, dict[str, Any] | None] = dataclasses.field(repr=False)
    #: Parts of the configuration without a counterpart, and the reasons.
    warnings: list[str]
    #: Variables that the key refers to; () for a key as text, None without a key.
    key_variables: tuple[str, ...] | None = None

    @property
    def delivery(self) -> dict[str, Any]:
        """The options of delivery, the same for all routes."""
        of_routes = [options for options in self.routes.values() if options]
        options = self.default_options or (of_routes[0] if of_routes else {})
        return {name: options[name] for name in DELIVERY if name in options}


def translate(
    policies: Sequence[ZuploPolicy],
    routes: Mapping[str, Sequence[str]] | None = None,
) -> Translation:
    """Return our options for *policies* on *routes*.

    Without routes the only policy that meters governs every request. With routes, the
    requests that match none of them are not metered.

    :raises ConfigError: with every problem, such as several policies without routes.
    """
    metering = [policy for policy in policies if policy.metered]
    if not metering:
        kinds = " or ".join(map(repr, ZUPLO_OPTIONS))
        raise ConfigError([f"expected a policy of the type {kinds}, got none"])
    if routes is None:
        if len(metering) > 1:
            several = ", ".join(map(str, metering))
            raise ConfigError(
                [f"routes: expected, as several policies meter: {several}"]
            )
        (policy,) = metering
        notes = _notes(metering)
        return Translation(dict(policy.options), {}, notes, policy.key_variables)
    return _by_route(policies, metering, routes)


def _by_route(
    policies: Sequence[ZuploPolicy],
    metering: Sequence[ZuploPolicy],
    routes: Mapping[str, Sequence[str]],
) -> Translation:
    problems: list[str] = []
    warnings: list[str] = []
    by_name = _PoliciesByName(policies, problems, warnings)
    governing = {rule: by_name.metering(rule, names) for rule, names in routes.items()}
    used = [p for p in metering if any(p in named for named in governing.values())]
    if not used and not problems:
        problems.append("routes: expected one that names a policy that meters")
    delivery, key_variables = _delivery(used, problems)
    by_rule = _combined_by_rule(governing, delivery, problems)
    if problems:
        raise ConfigError(problems)
    unused = [
        f"{policy}: no route names it" for policy in metering if policy not in used
    ]
    kept, notes = overlapping(by_rule)
    warnings = [*_notes(used), *warnings, *unused, *notes]
    return Translation(None, kept, warnings, key_variables)


def _combined_by_rule(
    governing: Mapping[str, Sequence[ZuploPolicy]],
    delivery: Mapping[str, Any],
    problems: list[str],
) -> dict[str, dict[str, Any] | None]:
    by_rule: dict[str, dict[str, Any] | None] = dict.fromkeys(governing)
    for rule, policies in governing.items():
        if policies:
            try:
                by_rule[rule] = {**combined(policies), **delivery}
            except ConfigError as error:
                problems += [f"{rule}: {problem}" for problem in error.problems]
            except MeterValueError as error:
                problems.append(f"{rule}: {error}")
    return by_rule


def _notes(policies: Sequence[ZuploPolicy]) -> list[str]:
    return [f"{place}: {why}" for policy in policies for place, why in policy.ignored]


class _PoliciesByName:
    """Finds policies by name, and the members of groups."""

    def __init__(
        self,
        policies: Sequence[ZuploPolicy],
        problems: list[str],
        warnings: list[str],
    ) -> None:
        self._policies = {policy.name: policy for policy in policies if policy.name}
        self._problems = problems
        self._warnings = warnings
        #: Policies that meter, by the name of their group.
        self._expanded: dict[str, list[ZuploPolicy]] = {}

    def metering(self, rule: str, names: Sequence[str]) -> list[ZuploPolicy]:
        """Return the policies among *names* that meter the requests of *rule*."""
        found: list[ZuploPolicy] = []
        for n, name in enumerate(names):
            for policy in self._expand(name, f"{rule}: inbound[{n}]", ()):
                if policy in found:
                    self._warnings.append(
                        f"{rule}: {policy} is named twice, and counts once"
                    )
                else:
                    found.append(policy)
        return found

    def _expand(
        self, name: str, place: str, within: tuple[str, ...]
    ) -> list[ZuploPolicy]:
        """Return the policies that meter: the one of this name, or those of its group.

        :param within: the names of the groups around it.
        """
        policy = self._policies.get(name)
        if policy is None:
            self._unknown(name, place)
            return []
        if name in within:
            self._problems.append(f"{place}: the group {name!r} contains itself")
            return []
        if policy.metered:
            return [policy]
        if len(within) >= MAX_NESTING:
            self._problems.append(
                f"{place}: expected at most {MAX_NESTING} levels of groups"
            )
            return []
        if name not in self._expanded:
            place = f"{place} ({name})"
            inner = [
                found
                for member in policy.members
                for found in self._expand(member, place, (*within, name))
            ]
            # Without duplicates, as groups of groups could multiply a policy.
            unique = {str(policy): policy for policy in inner}
            self._expanded[name] = list(unique.values())
        return self._expanded[name]

    def _unknown(self, name: str, place: str) -> None:
        """Refuse a name similar to a policy that meters; warn of any other name."""
        metering = [key for key, policy in self._policies.items() if policy.metered]
        text = (
            f"{place}: no policy is named {name!r}{did_you_mean(name, self._policies)}"
        )
        near = difflib.get_close_matches(name, metering, n=1, cutoff=0.8)
        (self._problems if near else self._warnings).append(text)


def _delivery(
    policies: Sequence[ZuploPolicy], problems: list[str]
) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """Return the options of delivery of *policies*, and the variables of the key."""
    shared: dict[str, Any] = {}
    for name in DELIVERY:
        stating = [policy for policy in policies if _stated(policy, name) is not None]
        if len({_stated(policy, name) for policy in stating}) > 1:
            several = ", ".join(map(str, stating))
            problems.append(
                f"{name}: expected the same value for all routes, as a middleware "
                f"delivers to one server; they differ: {several}"
            )
        elif stating and name in stating[0].options:
            shared[name] = stating[0].options[name]
    keys = [p.key_variables for p in policies if p.key_variables is not None]
    return shared, keys[0] if keys else None


def _stated(policy: ZuploPolicy, name: str) -> object:
    """Return the value of an option, or its variables if the value is not read."""
    unread = policy.key_variables if name == "api_key" else None
    return policy.options.get(name, unread)


_VARIABLE = "OPENMETER_API_KEY"
_ADDRESS, _ADDRESS_VARIABLE = "api_url", "OPENMETER_API_URL"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(translation: Translation) -> str:
    """Return *translation* as TOML, without the key.

    A route that is not metered is ``false``.

    :raises ConfigError: for a null in the data of a meter, which TOML does not have.
    """
    defaults = translation.default_options
    lines = [_comment(f"Not taken over: {text}") for text in translation.warnings]
    lines += _key_comment(translation)
    lines += _address_comment(translation)
    lines += _reference_comment(translation)
    options = {**_SOURCE, **(translation.delivery if defaults is None else defaults)}
    if variables_in(options.get(_ADDRESS)):
        del options[_ADDRESS]
    lines += _options(options)
    if defaults is None:
        lines += ["", *_routes({**translation.routes, EVERY_OTHER: None})]
    return "\n".join(lines) + "\n"


def _routes(routes: Mapping[str, dict[str, Any] | None]) -> Iterator[str]:
    if unmetered := [rule for rule, options in routes.items() if options is None]:
        yield "[routes]"
        for rule in unmetered:
            yield f"{_key(rule)} = false"
        yield ""
    blocks = [
        [f"[routes.{_key(rule)}]", *_options(options, leave_out=DELIVERY)]
        for rule, options in routes.items()
        if options is not None
    ]
    for n, block in enumerate(blocks):
        yield from ["", *block] if n else block


def _key_comment(translation: Translation) -> Iterator[str]:
    variables = translation.key_variables
    if variables is None:
        return
    if variables == (_VARIABLE,):
        yield _comment(f"The key is read from the variable {_VARIABLE}.")
    elif variables:
        names = " and ".join(variables)
        yield _comment(f"Set the variable {_VARIABLE} to the value of {names}.")
    else:
        yield _comment(f"Set the variable {_VARIABLE} to the key in Zuplo's file.")


def _address_comment(translation: Translation) -> Iterator[str]:
    variables = variables_in(translation.delivery.get(_ADDRESS))
    if variables == (_ADDRESS_VARIABLE,):
        yield _comment(f"The address is read from the variable {_ADDRESS_VARIABLE}.")
    elif variables:
        names = " and ".join(variables)
        text = f"Set the variable {_ADDRESS_VARIABLE} to the value of {names}."
        yield _comment(text)


def _reference_comment(translation: Translation) -> Iterator[str]:
    all_options = [translation.default_options, *translation.routes.values()]
    names = [
        name
        for options in filter(None, all_options)
        for option, value in options.items()
        if option not in DELIVERY
        for name in variables_in(value)
    ]
    if names:
        listed = ", ".join(sorted(set(names)))
        yield _comment(f"Replace each reference to a variable by its value: {listed}.")


def _options(
    options: Mapping[str, Any], leave_out: tuple[str, ...] = ()
) -> Iterator[str]:
    for name, value in options.items():
        if name != "api_key" and name not in leave_out:
            yield f"{_key(name)} = {_value(value, name)}"


def _comment(text: str) -> str:
    # Control characters are escaped: a line break would end the comment.
    return "# " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _text(name)


def _value(value: Any, place: str) -> str:
    if isinstance(value, dict):
        pairs = (f"{_key(k)} = {_value(v, f'{place}.{k}')}" for k, v in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, list):
        return f"[{', '.join(_value(v, f'{place}[{n}]') for n, v in enumerate(value))}]"
    if isinstance(value, str):
        return _text(value)
    if value is None:
        raise ConfigError([f"{place}: expected a value of TOML, got null"])
    return json.dumps(value)


def _text(text: str) -> str:
    # TOML has the escapes of JSON, except surrogate pairs, which ensure_ascii would
    # write, and requires one for DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


#: An option of each policy at Zuplo, and of the whole middleware here.
_LIFETIME = "allow_ttl"
#: Zuplo's default, which differs from ours. Event ids and queries depend on it.
_SOURCE = {"event_source": DEFAULTS["event_source"]}


def options_of(
    policies: str | os.PathLike[str],
    routes: str | os.PathLike[str] | None,
    environ: Mapping[str, str],
    *,
    replaced: Collection[str] = (),
) -> dict[str, Any]:
    """Return the options in the files, and log a warning for each part left out.

    :param replaced: options that replace the file's; its key and address are then not
        read.
    :raises ConfigError: with every problem, each with its place.
    """
    leave_out = {name for name in DELIVERY if name in replaced}
    if "api_key_file" in replaced:
        leave_out.add("api_key")
    read = read_policies(os.fspath(policies), environ, leave_out=leave_out)
    rules = None if routes is None else read_routes(os.fspath(routes), read)
    translation = translate(read, rules)
    for warning in translation.warnings:
        logger.warning("Zuplo's configuration: %s", warning)
    if translation.default_options is not None:
        return {**_SOURCE, **translation.default_options}
    return {**_SOURCE, **_with_lifetime(translation)}


def _with_lifetime(translation: Translation) -> dict[str, Any]:
    """Return the options by route, with the shortest lifetime for all of them."""
    routes = {
        rule: dict(options) if options else None
        for rule, options in translation.routes.items()
    }
    lifetimes = []
    for options in filter(None, routes.values()):
        if _LIFETIME in options:
            lifetimes.append(options.pop(_LIFETIME))
        for name in DELIVERY:
            options.pop(name, None)
    merged = {**translation.delivery, "routes": {**routes, EVERY_OTHER: None}}
    if lifetimes:
        merged[_LIFETIME] = min(lifetimes)
    return merged
