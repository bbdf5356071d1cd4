"""``routes.oas.json``: an OpenAPI document that says which policies a route has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.zuplo.documents import Source, inside, load
from openmeter_wsgi.zuplo.paths import OPEN_API, URL_PATTERN, rules

if TYPE_CHECKING:
    from openmeter_wsgi.zuplo.policies import ZuploPolicy

_METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")


class _Route(NamedTuple):
    place: str
    path: str
    mode: Any
    method: str
    #: Its inbound policies, in their order.
    policies: list[str]


def read_routes(
    source: Source, policies: Sequence[ZuploPolicy] = ()
) -> dict[str, list[str]]:
    """Return the inbound policies by rule, such as ``"GET /v1/users/<id>"``.

    In the order of the document, every route, also those without policies: a rule
    for ``/users/<id>`` alone would meter ``/users/me``, too. Of rules that are the
    same the first holds, as with Zuplo.

    :param policies: What was read from ``policies.json``: a route that names only
        policies that do not meter may have a path that no rule can say.
    :raises ConfigError: with every problem and its place.
    """
    problems: list[str] = []
    others = {policy.name for policy in policies if _never_meters(policy)}
    found: dict[str, list[str]] = {}
    for route in _routes(load(source), problems):
        try:
            made = _rules(route)
        except ValueError as error:
            if set(route.policies) - others:
                problems.append(f"{route.place}: {error}")
            continue
        for rule in made:
            found.setdefault(f"{route.method.upper()} {rule}", route.policies)
    if problems:
        raise ConfigError(problems)
    return found


def _never_meters(policy: ZuploPolicy) -> bool:
    return not policy.metered and not policy.members


def _rules(route: _Route) -> list[str]:
    if route.mode not in {OPEN_API, URL_PATTERN}:
        raise ValueError(
            f"pathMode: expected {OPEN_API!r} or {URL_PATTERN!r}, got {route.mode!r}"
        )
    return rules(route.path, route.mode)


def _routes(document: Any, problems: list[str]) -> Iterator[_Route]:
    paths = document.get("paths") if isinstance(document, Mapping) else None
    if not isinstance(paths, Mapping):
        problems.append("paths: expected an OpenAPI document, which has them, got none")
        return
    for path, under in paths.items():
        place = inside("paths", path)
        item = _mapping(under, place, problems)
        extension = inside(place, "x-zuplo-path")
        said = _mapping(item.get("x-zuplo-path"), extension, problems)
        for method in _METHODS:
            if method not in item:
                continue
            here = inside(place, method)
            inbound = _inbound(_mapping(item[method], here, problems), here, problems)
            yield _Route(here, path, said.get("pathMode", OPEN_API), method, inbound)


def _inbound(
    operation: Mapping[str, Any], place: str, problems: list[str]
) -> list[str]:
    value: Mapping[str, Any] = operation
    for key in ("x-zuplo-route", "policies"):
        place = inside(place, key)
        value = _mapping(value.get(key), place, problems)
    names = value.get("inbound")
    if names is None:
        return []
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    problems.append(
        f"{inside(place, 'inbound')}: expected a list of names, got {names!r}"
    )
    return []


def _mapping(value: Any, place: str, problems: list[str]) -> Mapping[str, Any]:
    if value is None or isinstance(value, Mapping):
        return value or {}
    problems.append(f"{place}: expected an object, got {value!r}")
    return {}
