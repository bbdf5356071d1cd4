"""Paths of Zuplo's routes, as the rules that werkzeug has for the same.

Zuplo knows two forms (its page on routing): OpenAPI's ``/users/{id}``, and, where
``pathMode`` is ``url-pattern``, the URL Pattern of the web: ``/users/:id``,
``/files/:path*``, ``/icon-:n(\\d+).png``, ``/users/(.*)``, ``/cars/:maker{/}?``.
"""

from __future__ import annotations

import itertools
import re
from typing import Final

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
    """Return the rules that together match what *path* does.

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
    end = 0
    for found in pattern.finditer(path):
        pieces += [[_literal(path[end : found.start()])], piece(found, names)]
        end = found.end()
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
