r"""Zuplo's `routes.oas.json`: the policies of each route, and its paths as rules.

Zuplo knows two forms (its page on routing): OpenAPI's ``/users/{id}``, and, where
``pathMode`` is ``url-pattern``, the URL Pattern of the web: ``/users/:id``,
``/files/:path*``, ``/icon-:n(\d+).png``, ``/users/(.*)``, ``/cars/:maker{/}?``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.zuplo.policies import DocumentSource, inside, load_document

if TYPE_CHECKING:
    from openmeter_wsgi.zuplo.policies import ZuploPolicy


#: The rules that the optional pieces of one path make at most.
MAX_RULES = 1_000
#: The variables of one path.
MAX_VARIABLES = 100
#: The rules of all paths.
MAX_RULES_IN_ALL = 5_000

OPEN_API: Final = "open-api"
URL_PATTERN: Final = "url-pattern"

_OPEN_API = re.compile(r"\{(?P<name>[^{}*]+)(?P<rest>\*)?\}|\(\.\*\)")
_URL_PATTERN = re.compile(
    r"(?P<slash>\{/\}\?)"
    r"|(?P<before>/?)"
    r"(?:(?::(?P<name>[^\W\d]\w*)(?:\((?P<named>[^()]*)\))?)"
    r"|\((?P<unnamed>[^()]*)\)"
    r"|(?P<wildcard>\*))"
    r"(?P<modifier>[*+?])?"
)
#: What a rule cannot hold as it stands.
_SPECIAL = re.compile(r"[<>{}\\]")
_DIGITS = {r"\d+", r"\d++", "[0-9]+"}
_CHOICE = re.compile(r"[\w.-]+(?:\|[\w.-]+)+")


def rules(path: str, mode: str = OPEN_API) -> list[str]:
    """Return the rules that together match the requests of *path*.

    Two, where something in it may be absent.

    :raises ValueError: naming what no rule can say.
    """
    # Zuplo's page on routing shows these without the mode that they need.
    if mode == URL_PATTERN or re.search(r"/:\w", path):
        pattern, piece = _URL_PATTERN, _url_pattern_piece
    else:
        pattern, piece = _OPEN_API, _open_api_piece
    names: set[str] = set()
    pieces: list[list[str]] = []
    end, number = 0, 1
    for found in pattern.finditer(path):
        choices = piece(found, names)
        pieces += [[_literal(path[end : found.start()])], choices]
        end = found.end()
        number *= len(choices)
        if number > MAX_RULES:
            raise ValueError(
                f"expected a path whose optional pieces make at most {MAX_RULES:,} "
                "rules, got more"
            )
        if len(names) > MAX_VARIABLES:
            raise ValueError(f"expected at most {MAX_VARIABLES} variables, got more")
    pieces.append([_literal(path[end:])])
    made = ("".join(parts) for parts in itertools.product(*pieces))
    return list(dict.fromkeys("/" + rule.removeprefix("/") for rule in made))


def _literal(text: str) -> str:
    if found := _SPECIAL.search(text):
        raise ValueError(f"expected a path that a rule can say, got {found[0]!r} in it")
    return text


def _open_api_piece(found: re.Match[str], names: set[str]) -> list[str]:
    if found["name"] is None:
        return ["", f"<path:{_variable('rest', names)}>"]
    converter = "path:" if found["rest"] else ""
    return [f"<{converter}{_variable(found['name'], names)}>"]


def _url_pattern_piece(found: re.Match[str], names: set[str]) -> list[str]:
    if found["slash"]:
        return ["", "/"]
    before, modifier = found["before"], found["modifier"]
    name = _variable(found["name"] or "rest", names)
    expression = found["named"] if found["unnamed"] is None else found["unnamed"]
    if found["wildcard"]:
        expression = ".*"
    if modifier == "?":
        return ["", *_expression_pieces(before, expression, name)]
    if modifier is None:
        return _expression_pieces(before, expression, name)
    if expression is not None or not before:
        raise ValueError(f"expected a path that a rule can say, got {found[0]!r} in it")
    several = f"/<path:{name}>"
    return ["", several] if modifier == "*" else [several]


def _expression_pieces(before: str, expression: str | None, name: str) -> list[str]:
    if expression is None or expression == "[^/]+":
        return [f"{before}<{name}>"]
    if expression in {".*", "/.*"}:
        before += expression.removesuffix(".*")
        return [before, f"{before}<path:{name}>"]
    if expression == ".+":
        return [f"{before}<path:{name}>"]
    if expression in _DIGITS:
        return [f"{before}<int:{name}>"]
    if _CHOICE.fullmatch(expression):
        choices = ",".join(f'"{choice}"' for choice in expression.split("|"))
        return [f"{before}<any({choices}):{name}>"]
    raise ValueError(f"expected a path that a rule can say, got ({expression}) in it")


def _variable(name: str, names: set[str]) -> str:
    """Return a name that a rule accepts and that no other variable in it has."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    if not plain[0].isalpha():
        plain = f"v{plain}"
    unique = next(
        candidate
        for n in itertools.count(1)
        if (candidate := plain if n == 1 else f"{plain}{n}") not in names
    )
    names.add(unique)
    return unique


_METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")


class _Route(NamedTuple):
    place: str
    path: str
    mode: Any
    method: str
    #: Its inbound policies, in their order.
    policies: list[str]


def read_routes(
    source: DocumentSource, policies: Sequence[ZuploPolicy] = ()
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
    for route in _routes(load_document(source), problems):
        try:
            made = _rules(route)
        except ValueError as error:
            if set(route.policies) - others:
                problems.append(f"{route.place}: {error}")
            continue
        for rule in made:
            found.setdefault(f"{route.method.upper()} {rule}", route.policies)
        if len(found) > MAX_RULES_IN_ALL:
            problems.append(
                f"paths: expected at most {MAX_RULES_IN_ALL:,} rules for all routes, "
                "got more"
            )
            break
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
