"""``policies.json``: the policies that meter, in our options."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.options.entitlement_values import feature_like
from openmeter_wsgi.zuplo.documents import (
    Source,
    did_you_mean,
    inside,
    load,
    resolve,
    variables_in,
)
from openmeter_wsgi.zuplo.entries import COMPOSITE, Entry, read_entries
from openmeter_wsgi.zuplo.options import OPTIONS, Option, feature_key, read_names

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEY = "apiKey"


@dataclasses.dataclass(frozen=True)
class ZuploPolicy:
    """One policy of a ``policies.json``; one that does not meter has no options."""

    #: What routes call it, None for one that stands alone.
    name: str | None
    #: Its type, such as ``"openmeter-inbound"``.
    kind: str
    #: What it says, in our options. Not shown: the key is among them.
    options: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    #: Where something stands that has no meaning here, and why it has none.
    ignored: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    #: The policies that a group consists of.
    members: tuple[str, ...] = ()
    #: The variables that held the key; () if it was text, None if there is none.
    key_variables: tuple[str, ...] | None = None

    @property
    def metered(self) -> bool:
        """Whether it is one that meters."""
        return self.kind in OPTIONS

    def __str__(self) -> str:
        return repr(self.name) if self.name else f"the nameless {self.kind}"


def read_policies(
    source: Source,
    environ: Mapping[str, str] = os.environ,
    *,
    secrets: bool = True,
) -> list[ZuploPolicy]:
    """Return the policies in *source*: a whole ``policies.json``, a list, or one.

    ``$env(NAME)`` is looked up in *environ*. Without *secrets* the key is not, and
    is left out of the options.

    :raises ConfigError: with every problem and its place.
    """
    problems: list[str] = []
    entries = read_entries(load(source), problems)
    reader = _Reader(environ, problems, secrets=secrets)
    policies = [
        reader.read(entry) if entry.kind in OPTIONS else reader.leave_out(entry)
        for entry in entries
    ]
    names = [entry.name for entry in entries]
    problems += [
        f"{inside(entry.place, 'name')}: another policy is called {entry.name!r}, too"
        for n, entry in enumerate(entries)
        if entry.name is not None and entry.name in names[:n]
    ]
    if problems:
        raise ConfigError(problems)
    return policies


class _Reader:
    """Reads the options of entries, and collects what is wrong with them."""

    def __init__(
        self, environ: Mapping[str, str], problems: list[str], *, secrets: bool
    ) -> None:
        self._environ = environ
        self._problems = problems
        self._secrets = secrets

    def read(self, entry: Entry) -> ZuploPolicy:
        """Return a policy that meters."""
        known = OPTIONS[entry.kind]
        policy = ZuploPolicy(entry.name, entry.kind, key_variables=_variables(entry))
        policy.ignored.extend(
            (inside(entry.place, key), "says nothing about metering")
            for key in entry.unknown
        )
        for key, value in entry.options.items():
            place = inside(entry.options_place, key)
            if key not in known:
                hint = did_you_mean(key, known)
                self._problems.append(f"{place}: unknown option{hint}")
            elif known[key].name is None:
                policy.ignored.append((place, known[key].why))
            elif key != _KEY or self._secrets:
                self._read_option(policy, known[key], place, value)
        if entry.kind == "monetization-inbound":
            _note_what_zuplo_checks(policy, entry.options_place)
        return policy

    def _read_option(
        self, policy: ZuploPolicy, option: Option, place: str, value: Any
    ) -> None:
        unset: list[str] = []
        value = resolve(value, place, self._environ, unset)
        if unset:
            self._problems += unset
            return
        try:
            read = option.read(value)
        except ValueError as error:
            self._problems.append(f"{place}: {error}")
            return
        if read is not None and option.name is not None:
            policy.options[option.name] = read
            if option.name == "required_entitlements":
                _note_renamed_features(policy, place, value)

    def leave_out(self, entry: Entry) -> ZuploPolicy:
        """Return a policy that does not meter, or a group of policies."""
        if entry.kind != COMPOSITE:
            why = [(entry.place, "does not meter")]
            return ZuploPolicy(entry.name, entry.kind, ignored=why)
        members: list[str] | None = None
        try:
            members = read_names(entry.options.get("policies", []))
        except ValueError as error:
            place = inside(entry.options_place, "policies")
            self._problems.append(f"{place}: {error}")
        return ZuploPolicy(entry.name, entry.kind, members=tuple(members or ()))


def _variables(entry: Entry) -> tuple[str, ...] | None:
    return variables_in(entry.options[_KEY]) if _KEY in entry.options else None


def _note_renamed_features(policy: ZuploPolicy, place: str, names: list[str]) -> None:
    """Note the names of features that OpenMeter does not take as keys."""
    for n, name in enumerate(names):
        if (key := feature_key(name)) != name:
            why = (
                f"OpenMeter takes no feature key like {name!r}; {key!r} is written in "
                "its place, and the feature needs that key in OpenMeter"
            )
            policy.ignored.append((f"{place}[{n}]", why))


def _note_what_zuplo_checks(policy: ZuploPolicy, place: str) -> None:
    """Note what ``monetization-inbound`` does beside metering."""
    asked = policy.options.get("required_entitlements", [])
    meters = policy.options.get("meters", {})
    if unasked := [m for m in meters if (feature_like(m) or m) not in asked]:
        why = (
            "Zuplo refuses a caller without a balance of "
            f"{', '.join(map(repr, unasked))}; here required_entitlements would"
        )
        policy.ignored.append((inside(place, "meters"), why))
    if not asked and policy.options.pop("allow_ttl", None) is not None:
        why = "nothing is asked for, so nothing is cached"
        policy.ignored.append((inside(place, "cacheTtlSeconds"), why))
