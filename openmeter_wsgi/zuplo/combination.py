"""Several policies on one route: one policy with all their meters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.status_codes import StatusCodes
from openmeter_wsgi.usage import add_numbers
from openmeter_wsgi.zuplo.options import DEFAULTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openmeter_wsgi.zuplo.policies import ZuploPolicy

#: Zuplo runs all policies of a route, so of these all hold.
_ADDED_UP = ("meter", "meters", "required_entitlements")


def combined(policies: Sequence[ZuploPolicy]) -> dict[str, Any]:
    """Return the options of all *policies*, whose meters are added up.

    :raises ConfigError: naming the policies that differ in anything else.
    """
    options: dict[str, Any] = {}
    for policy in policies:
        for name, value in policy.options.items():
            if name not in _ADDED_UP:
                options.setdefault(name, value)
    problems = [
        f"{name}: expected the same of all policies on one route, they differ: "
        + ", ".join(map(str, policies))
        for name in options
        if len({_effect(policy, name, options) for policy in policies}) > 1
    ]
    if problems:
        raise ConfigError(problems)
    return {**_added_up(policies), **options}


def _effect(policy: ZuploPolicy, name: str, options: dict[str, Any]) -> object:
    """Return what *policy* says of *name*, be it by default."""
    value = policy.options.get(name, DEFAULTS.get(name, options[name]))
    return StatusCodes(value) if name == "meter_on_status_codes" else value


def _added_up(policies: Sequence[ZuploPolicy]) -> dict[str, Any]:
    documents: list[dict[str, Any]] = []
    numbers: dict[str, Any] = {}
    features: list[str] = []
    for policy in policies:
        said = policy.options
        meter = said.get("meter", [])
        documents += meter if isinstance(meter, list) else [meter]
        for name, number in said.get("meters", {}).items():
            numbers[name] = add_numbers(name, numbers.get(name, 0), number)
        features += said.get("required_entitlements", [])
    found = {
        "meter": documents[0] if len(documents) == 1 else documents,
        "meters": numbers,
        "required_entitlements": list(dict.fromkeys(features)),
    }
    return {name: value for name, value in found.items() if value}
