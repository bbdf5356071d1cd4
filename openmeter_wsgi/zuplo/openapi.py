r"""Parser of Zuplo's `routes.oas.json`: the rules and the policies of each route.

Zuplo has two forms of paths (its page on routing): OpenAPI, ``/users/{id}``, and, if
``pathMode`` is ``url-pattern``, the URL Pattern API of browsers: ``/users/:id``,
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


#: Maximum number of rules made from one path with optional pieces.
MAX_RULES = 1_000
#: Maximum number of variables in one path.
MAX_VARIABLES = 100
#: Maximum number of rules made from all paths.
MAX_RULES_IN_ALL = 5_000

#: Values of ``pathMode``.
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
#: Characters that a rule cannot contain as text.
_SPECIAL = re.compile(r"[<>{}\\]")
_DIGITS = {r"\d+", r"\d++", "[0-9]+"}
_CHOICE = re.compile(r"[\w.-]+(?:\|[\w.-]+)+")


def rules(path: str, mode: str = OPEN_API) -> list[str]:
    """Return the rules that together match the requests of *path*.

    An optional piece doubles the number of rules: with the piece, and without it.

    :raises ValueError: naming the piece that no rule can express.
    """
    # Zuplo's page on routing shows URL patterns without their mode.
    if mode == URL_PATTERN or re.search(r"/:\w", path):
        pattern, piece = _URL_PATTERN, _url_pattern_piece
    else:
        pattern, piece = _OPEN_API, _open_api_piece
    names: set[str] = set()
    pieces: list[list[str]] = []
    end, number_of_rules = 0, 1
    for match in pattern.finditer(path):
        choices = piece(match, names)
        pieces += [[_literal(path[end : match.start()])], choices]
        end = match.end()
        number_of_rules *= len(choices)
        if number_of_rules > MAX_RULES:
            raise ValueError(
                f"expected a path whose optional pieces make at most {MAX_RULES:,} "
                "rules, got more"
            )
        if len(names) > MAX_VARIABLES:
            raise ValueError(f"expected at most {MAX_VARIABLES} variables, got more")
    pieces.append([_literal(path[end:])])
    joined = ("".join(parts) for parts in itertools.product(*pieces))
    return list(dict.fromkeys("/" + rule.removeprefix("/") for rule in joined))


def _literal(text: str) -> str:
    if special := _SPECIAL.search(text):
        raise ValueError(_inexpressible(repr(special[0])))
    return text


def _inexpressible(piece: str) -> str:
    return f"expected a path that a rule can express, got {piece} in it"


def _open_api_piece(match: re.Match[str], names: set[str]) -> list[str]:
    """Return the forms of a piece in a rule: one, or two for an optional piece."""
    if match["name"] is None:
        return ["", f"<path:{_variable('rest', names)}>"]
    converter = "path:" if match["rest"] else ""
    return [f"<{converter}{_variable(match['name'], names)}>"]


def _url_pattern_piece(match: re.Match[str], names: set[str]) -> list[str]:
    """Return the forms of a piece in a rule: one, or two for an optional piece."""
    if match["slash"]:
        return ["", "/"]
    before, modifier = match["before"], match["modifier"]
    name = _variable(match["name"] or "rest", names)
    expression = match["named"] if match["unnamed"] is None else match["unnamed"]
    if match["wildcard"]:
        expression = ".*"
    if modifier == "?":
        return ["", *_expression_pieces(before, expression, name)]
    if modifier is None:
        return _expression_pieces(before, expression, name)
    if expression is not None or not before:
        raise ValueError(_inexpressible(repr(match[0])))
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
    raise ValueError(_inexpressible(f"({expression})"))


def _variable(name: str, names: set[str]) -> str:
    """Return a valid and unique name for a variable, and add it to *names*."""
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
    """One method of a path in the document."""

    #: Its place in the document, for error messages.
    place: str
    path: str
    mode: Any
    method: str
    #: Names of its inbound policies, in order.
    policies: list[str]


def read_routes(
    source: DocumentSource, policies: Sequence[ZuploPolicy] = ()
) -> dict[str, list[str]]:
    """Return the names of the inbound policies by rule, in the order of the document.

    A rule is a text such as ``"GET /v1/users/<id>"``. The first of equal rules holds,
    as with Zuplo. Routes without policies are included: without ``/users/me`` the rule
    ``/users/<id>`` would meter it, too.

    :param policies: the policies of ``policies.json``. A path that no rule can express
        is accepted if its policies do not meter.
    :raises ConfigError: with every problem and its place.
    """
    problems: list[str] = []
    unmetered = {policy.name for policy in policies if _never_meters(policy)}
    by_rule: dict[str, list[str]] = {}
    for route in _routes(load_document(source), problems):
        try:
            rules_of_route = _rules(route)
        except ValueError as error:
            if set(route.policies) - unmetered:
                problems.append(f"{route.place}: {error}")
            continue
        for rule in rules_of_route:
            by_rule.setdefault(f"{route.method.upper()} {rule}", route.policies)
        if len(by_rule) > MAX_RULES_IN_ALL:
            problems.append(
                f"paths: expected at most {MAX_RULES_IN_ALL:,} rules for all routes, "
                "got more"
            )
            break
    if problems:
        raise ConfigError(problems)
    return by_rule


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
        problems.append("paths: expected the paths of an OpenAPI document, got none")
        return
    for path, value in paths.items():
        place = inside("paths", path)
        methods = _mapping(value, place, problems)
        extension = _mapping(
            methods.get("x-zuplo-path"), inside(place, "x-zuplo-path"), problems
        )
        mode = extension.get("pathMode", OPEN_API)
        for method in _METHODS:
            if method in methods:
                of_method = inside(place, method)
                operation = _mapping(methods[method], of_method, problems)
                inbound = _inbound(operation, of_method, problems)
                yield _Route(of_method, path, mode, method, inbound)


def _inbound(
    operation: Mapping[str, Any], place: str, problems: list[str]
) -> list[str]:
    """Return the names of the inbound policies of an operation."""
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
