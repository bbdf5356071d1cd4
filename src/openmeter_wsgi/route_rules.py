"""Rules of routes, one by one: which methods, and which paths."""

from __future__ import annotations

import re
from urllib.parse import unquote

_METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}
)
_RULE = re.compile(r"(?:([A-Za-z][A-Za-z,-]*)\s+)?(/\S*)")
#: A variable of werkzeug's, such as ``<int(signed=True):id>``.
_VARIABLE = re.compile(
    r"<(?:(?P<converter>[a-z_]\w*)(?:\((?P<arguments>.*?)\))?:)?[a-z_]\w*>",
    re.ASCII | re.IGNORECASE,
)
#: Other frameworks' variables: ``<id:int>`` and ``<id:re:…>`` (Bottle), ``<str:name>``
#: (Django) …
_TYPE_BEHIND = re.compile(r"<(\w+):(int|float|path|re|str|uuid)\b[^<>]*>", re.ASCII)
_TEXT = re.compile(r"<(?:str|slug):(\w+)>", re.ASCII)
#: … and ``{id}``, ``{id:int}``, ``/:id``, ``/*`` or ``/*rest`` at the end.
_BRACES = re.compile(r"\{(\w+)(?::(\w*)[^{}]*)?\}", re.ASCII)
_COLON = re.compile(r"/:([a-z_]\w*)", re.ASCII | re.IGNORECASE)
_STAR = re.compile(r"/\*(\w*)$", re.ASCII)
_QUERY = re.compile(r"[?#].*", re.DOTALL)
_ESCAPE = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
#: Converters that other frameworks have under the same name.
_SHARED = frozenset({"int", "float", "path", "uuid"})
#: Converters of values that are never longer than the rule allows.
_BOUNDED = frozenset({"any", "uuid"})
#: Matching takes time by this power of a path's length: of a path of 4,000 bytes two
#: variables cost 50 ms, three cost 18 s.
_MAX_TOGETHER = 2


class RouteRule:
    """One rule: the methods, none for all of them, and werkzeug's rule.

    :raises ValueError: if *text* is none, such as ``POST /v1/analyze``; if no path
        matches it, or matching one takes too long.
    """

    __slots__ = ("methods", "path", "text")

    def __init__(self, text: object) -> None:
        found = _RULE.fullmatch(text.strip()) if isinstance(text, str) else None
        if found is None:
            raise ValueError(
                "expected a rule such as '/v1/search' or 'POST /v1/users/<id>', got "
                f"{text!r}"
            )
        self.text = found[0]
        self.path = found[2]
        self.methods = frozenset(filter(None, (found[1] or "").upper().split(",")))
        if unknown := self.methods - _METHODS:
            raise ValueError(
                f"{text!r}: expected methods such as GET, got {', '.join(unknown)}"
            )
        if (path := _meant(self.path)) != self.path:
            meant = f"{found[0][: -len(self.path)]}{path}"
            raise ValueError(f"{text!r}: no request matches it; write {meant!r}")
        if (together := _matched_together(self.path)) > _MAX_TOGETHER:
            raise ValueError(
                f"{text!r}: expected at most two variables of any length that are "
                f"matched together, got {together}: a long path would take a worker "
                "seconds; leave a <path:…> out, or bound the others, such as "
                "<string(maxlength=40):name>"
            )
        # Here, as werkzeug's routing costs as much as half of this package and many
        # applications have no routes, or those of another framework.
        from openmeter_wsgi.route_map import bound

        try:
            bound([self.path])
        except (ValueError, LookupError, TypeError, SyntaxError) as error:
            raise ValueError(f"{text!r}: {error}") from None

    @property
    def is_exact(self) -> bool:
        """Whether it stands for one path alone."""
        return "<" not in self.path

    @property
    def names_options(self) -> bool:
        """Whether it names OPTIONS, which is metered nowhere else."""
        return "OPTIONS" in self.methods


def _meant(path: str) -> str:
    """Return the rule that *path* stands for in other frameworks and documents."""
    path = _TYPE_BEHIND.sub(lambda found: _variable(found[1], found[2]), path)
    path = _TEXT.sub(lambda found: _variable(found[1], ""), path)
    meant, end = "", 0
    for variable in _VARIABLE.finditer(path):
        meant += _literal_meant(path[end : variable.start()]) + variable[0]
        end = variable.end()
    return meant + _literal_meant(path[end:])


def _literal_meant(text: str) -> str:
    """Return what is meant by *text*, in which there is no variable of werkzeug's."""
    text = _QUERY.sub("", text)
    text = _BRACES.sub(lambda found: _variable(found[1], found[2] or ""), text)
    text = _COLON.sub(lambda found: f"/<{found[1]}>", text)
    text = _STAR.sub(lambda found: f"/<path:{found[1] or 'rest'}>", text)
    # The server has decoded the path when it is matched.
    return _ESCAPE.sub(lambda found: unquote(found[0]), text)


def _variable(name: str, kind: str) -> str:
    return f"<{kind}:{name}>" if kind in _SHARED else f"<{name}>"


def _matched_together(path: str) -> int:
    """Return how many variables of any length one regular expression has to match.

    werkzeug makes one of each part between slashes, and of all from a ``<path:…>`` on.
    One variable alone between two slashes ends there, so it is not counted.
    """
    parts = _VARIABLE.sub(_mark, path).split("/")
    most = together = 0
    for part in parts:
        has_path = _PATH_MARK in part
        variables = part.count(_MARK) + part.count(_PATH_MARK)
        counted = variables if variables > 1 or has_path else 0
        together = together + counted if has_path or together else 0
        most = max(most, counted, together)
    return most


#: Stand for a variable of any length; no rule holds blanks.
_MARK, _PATH_MARK = " ", "\n"


def _mark(variable: re.Match[str]) -> str:
    converter, arguments = variable["converter"], variable["arguments"] or ""
    if converter == "path":
        return _PATH_MARK
    is_bounded = converter in _BOUNDED or "length" in arguments.replace("minlength", "")
    return "" if is_bounded else _MARK
