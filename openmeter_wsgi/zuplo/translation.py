"""Policies and routes together: the options of every route."""

from __future__ import annotations

import dataclasses
import difflib
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.errors import ConfigError, MeterValueError
from openmeter_wsgi.zuplo.combination import combined
from openmeter_wsgi.zuplo.documents import did_you_mean
from openmeter_wsgi.zuplo.options import OPTIONS
from openmeter_wsgi.zuplo.overlap import overlapping

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from openmeter_wsgi.zuplo.policies import ZuploPolicy

#: Options of the one queue that all routes share.
DELIVERY = ("api_key", "api_url")


@dataclasses.dataclass(frozen=True)
class Translation:
    """What a configuration of Zuplo's says, in our options."""

    #: Of requests that no route governs; None: they are not metered.
    default_options: dict[str, Any] | None = dataclasses.field(repr=False)
    #: By rule; None: such a request is not metered.
    routes: dict[str, dict[str, Any] | None] = dataclasses.field(repr=False)
    #: What was not taken over, and why.
    warnings: list[str]
    #: The variables that held the key; () if it was text, None if there is none.
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
    """Return the options that *policies* have on *routes*.

    Without routes the one policy that meters governs every request; with routes,
    what they do not name is not metered.

    :raises ConfigError: if that cannot be said, with every problem.
    """
    metering = [policy for policy in policies if policy.metered]
    if not metering:
        kinds = " or ".join(map(repr, OPTIONS))
        raise ConfigError([f"expected a policy of the type {kinds}, got none"])
    if routes is None:
        if len(metering) > 1:
            several = ", ".join(map(str, metering))
            raise ConfigError(
                [f"routes: expected, to know which policy governs what: {several}"]
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
    named = _Named(policies, problems, warnings)
    governing = {rule: named.governing(rule, names) for rule, names in routes.items()}
    used = [p for p in metering if any(p in its for its in governing.values())]
    if not used and not problems:
        problems.append("routes: expected one that names a policy that meters")
    delivery, key_variables = _delivery(used, problems)
    by_rule = _combined_by_rule(governing, delivery, problems)
    if problems:
        raise ConfigError(problems)
    idle = [f"{policy}: no route names it" for policy in metering if policy not in used]
    kept, notes = overlapping(by_rule)
    warnings = [*_notes(used), *warnings, *idle, *notes]
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


class _Named:
    """The policies by name, with groups in place of their members."""

    def __init__(
        self,
        policies: Sequence[ZuploPolicy],
        problems: list[str],
        warnings: list[str],
    ) -> None:
        self._policies = {policy.name: policy for policy in policies if policy.name}
        self._problems = problems
        self._warnings = warnings

    def governing(self, rule: str, names: Sequence[str]) -> list[ZuploPolicy]:
        """Return the policies that meter *rule*, in their order."""
        found: list[ZuploPolicy] = []
        for n, name in enumerate(names):
            for policy in self._expand(name, f"{rule}: inbound[{n}]", ()):
                if policy in found:
                    self._warnings.append(
                        f"{rule}: {policy} is named twice; once counts"
                    )
                else:
                    found.append(policy)
        return found

    def _expand(
        self, name: str, place: str, within: tuple[str, ...]
    ) -> list[ZuploPolicy]:
        policy = self._policies.get(name)
        if policy is None:
            self._unknown(name, place)
            return []
        if name in within:
            self._problems.append(f"{place}: the group {name!r} contains itself")
            return []
        if policy.metered:
            return [policy]
        return [
            found
            for member in policy.members
            for found in self._expand(member, f"{place} ({name})", (*within, name))
        ]

    def _unknown(self, name: str, place: str) -> None:
        """Refuse what may be one of ours, misspelt; warn of anything else."""
        ours = [key for key, policy in self._policies.items() if policy.metered]
        text = (
            f"{place}: no policy is named {name!r}{did_you_mean(name, self._policies)}"
        )
        near = difflib.get_close_matches(name, ours, n=1, cutoff=0.8)
        (self._problems if near else self._warnings).append(text)


def _delivery(
    policies: Sequence[ZuploPolicy], problems: list[str]
) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """Return the options of delivery that *policies* share, and where the key was."""
    shared: dict[str, Any] = {}
    for name in DELIVERY:
        stating = [policy for policy in policies if _stated(policy, name) is not None]
        if len({_stated(policy, name) for policy in stating}) > 1:
            several = ", ".join(map(str, stating))
            problems.append(
                f"{name}: expected the same for all routes, as one middleware "
                f"delivers to one server; they differ: {several}"
            )
        elif stating and name in stating[0].options:
            shared[name] = stating[0].options[name]
    keys = [p.key_variables for p in policies if p.key_variables is not None]
    return shared, keys[0] if keys else None


def _stated(policy: ZuploPolicy, name: str) -> object:
    """Return the value, or where it comes from if it was not looked up."""
    unread = policy.key_variables if name == "api_key" else None
    return policy.options.get(name, unread)
