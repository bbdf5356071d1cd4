"""Finds the billing of a request by rules such as ``POST /v1/users/<id>``.

`RouteRule` parses and checks one rule. `Routes` matches requests against all rules of a
policy: exact paths by a dictionary, paths with variables by werkzeug's routing.
"""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import unquote

from werkzeug.exceptions import HTTPException

from openmeter_wsgi.request import method_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


_METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}
)
#: The rule for all requests that no other rule matches.
EVERY_OTHER = "*"
_RULE = re.compile(r"(?:([A-Za-z][A-Za-z,-]*)\s+)?(/\S*)")
#: A variable in werkzeug's syntax, such as ``<int(signed=True):id>``.
_VARIABLE = re.compile(
    r"<(?:(?P<converter>[a-z_]\w*)(?:\((?P<arguments>.*?)\))?:)?[a-z_]\w*>",
    re.ASCII | re.IGNORECASE,
)
#: Variables of other frameworks: ``<id:int>`` and ``<id:re:…>`` (Bottle).
_NAME_AND_TYPE = re.compile(r"<(\w+):(int|float|path|re|str|uuid)\b[^<>]*>", re.ASCII)
#: ``<str:name>`` and ``<slug:name>`` (Django).
_TEXT_VARIABLE = re.compile(r"<(?:str|slug):(\w+)>", re.ASCII)
#: ``{id}`` and ``{id:int}``; ``/:id``; ``/*`` and ``/*rest`` at the end.
_BRACES = re.compile(r"\{(\w+)(?::(\w*)[^{}]*)?\}", re.ASCII)
_COLON = re.compile(r"/:([a-z_]\w*)", re.ASCII | re.IGNORECASE)
_STAR = re.compile(r"/\*(\w*)$", re.ASCII)
_QUERY = re.compile(r"[?#].*", re.DOTALL)
_ESCAPE = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
#: Converters whose values have a maximum length.
_BOUNDED_CONVERTERS = frozenset({"any", "uuid"})
#: Maximum number of unbounded variables in one regular expression. It is the exponent
#: of the matching time: a path of 4,000 bytes takes 50 ms with two, 18 s with three.
_MAX_TOGETHER = 2


class RouteRule:
    """A parsed rule: HTTP methods and a path in werkzeug's syntax, or ``*``.

    :raises ValueError: if *text* is not a rule such as ``POST /v1/analyze``, if no
        request can match the rule, or if matching could take too long.
    """

    __slots__ = ("methods", "path", "text")

    text: str
    path: str
    #: In upper case; empty for all methods.
    methods: frozenset[str]

    def __init__(self, text: object) -> None:
        if isinstance(text, str) and text.strip() == EVERY_OTHER:
            self.text = self.path = EVERY_OTHER
            self.methods = frozenset()
            return
        match = _RULE.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise ValueError(
                "expected a rule such as '/v1/search' or 'POST /v1/users/<id>', or "
                f"'*' for all requests that no other rule matches, got {text!r}"
            )
        self.text = match[0]
        self.path = match[2]
        self.methods = frozenset(filter(None, (match[1] or "").upper().split(",")))
        if unknown := self.methods - _METHODS:
            raise ValueError(
                f"{text!r}: expected methods such as GET, got {', '.join(unknown)}"
            )
        if (path := _as_werkzeug_rule(self.path)) != self.path:
            proposed = f"{match[0][: -len(self.path)]}{path}"
            raise ValueError(f"{text!r}: no request matches it; write {proposed!r}")
        if (together := _max_variables_together(self.path)) > _MAX_TOGETHER:
            raise ValueError(
                f"{text!r}: expected at most two variables of any length that are "
                f"matched together, got {together}: matching a long path would take "
                "seconds; leave out a <path:…>, or limit the length of the others, "
                "such as <string(maxlength=40):name>"
            )
        # Imported here: werkzeug's routing takes half as long to import as this package
        # does, and many applications have no routes.
        from openmeter_wsgi.path_matcher import path_adapter

        try:
            path_adapter([self.path])
        except (ValueError, LookupError, TypeError, SyntaxError) as error:
            raise ValueError(f"{text!r}: {error}") from None

    @property
    def is_every_other(self) -> bool:
        """True for ``*``, the rule for all requests that no other rule matches."""
        return self.path == EVERY_OTHER

    @property
    def is_exact(self) -> bool:
        """True if the rule has no variable."""
        return "<" not in self.path

    @property
    def names_options(self) -> bool:
        """True if the rule names the method OPTIONS. Only then OPTIONS is metered."""
        return "OPTIONS" in self.methods


def _as_werkzeug_rule(path: str) -> str:
    """Translate *path* from the syntax of any framework to werkzeug's."""
    path = _NAME_AND_TYPE.sub(lambda match: _variable(match[1], match[2]), path)
    path = _TEXT_VARIABLE.sub(lambda match: _variable(match[1], ""), path)
    rule, end = "", 0
    for variable in _VARIABLE.finditer(path):
        rule += _literal_as_werkzeug_rule(path[end : variable.start()]) + variable[0]
        end = variable.end()
    return rule + _literal_as_werkzeug_rule(path[end:])


def _literal_as_werkzeug_rule(text: str) -> str:
    """Translate a part of a path that has no variable in werkzeug's syntax."""
    text = _QUERY.sub("", text)
    text = _BRACES.sub(lambda match: _variable(match[1], match[2] or ""), text)
    text = _COLON.sub(lambda match: f"/<{match[1]}>", text)
    text = _STAR.sub(lambda match: f"/<path:{match[1] or 'rest'}>", text)
    # Servers percent-decode the path (PEP 3333).
    return _ESCAPE.sub(lambda match: unquote(match[0]), text)


def _variable(name: str, kind: str) -> str:
    # Integers, floats and UUIDs of Bottle and Falcon have spellings, such as -5, that
    # werkzeug's converters do not match. A text matches all of them.
    return f"<path:{name}>" if kind == "path" else f"<{name}>"


def _max_variables_together(path: str) -> int:
    """Return the largest number of unbounded variables that are matched together.

    werkzeug compiles one regular expression per part between slashes, and a single one
    for all parts from a ``<path:…>`` on. A variable that is alone between two slashes
    is not counted, because it ends at the slash.
    """
    parts = _VARIABLE.sub(_mark, path).split("/")
    most = together = 0
    for part in parts:
        has_path = _PATH_MARK in part
        variables = part.count(_VARIABLE_MARK) + part.count(_PATH_MARK)
        counted = variables if variables > 1 or has_path else 0
        together = together + counted if has_path or together else 0
        most = max(most, counted, together)
    return most


#: Placeholders of an unbounded variable and of a ``<path:…>``. No rule has white space.
_VARIABLE_MARK, _PATH_MARK = " ", "\n"


def _mark(variable: re.Match[str]) -> str:
    converter, arguments = variable["converter"], variable["arguments"] or ""
    if converter == "path":
        return _PATH_MARK
    # The arguments `length` and `maxlength` limit the length, `minlength` does not.
    is_limited = "length" in arguments.replace("minlength", "")
    return "" if is_limited or converter in _BOUNDED_CONVERTERS else _VARIABLE_MARK


T = TypeVar("T")

#: Key of the table for all methods that no rule names.
_ANY = ""
#: A variable in a route template of any framework.
_TEMPLATE_VARIABLE = re.compile(r"<[^<>]*>|\{[^{}]*\}|(?<=/)\*\w*\Z")
#: A path that some framework normalizes: without a leading slash, with double slashes,
#: dot segments, line ends, or bytes that may not be UTF-8 (one character each).
_UNUSUAL = re.compile(r"\A[^/]|//|/\.\.?(?:/|\Z)|[\x00-\x1f\x7f-\xff]")


class Routes(Generic[T]):
    """Maps a request to the entry of its rule, by method and path.

    Entries are billings. Immutable; any thread. A rule with a method takes precedence
    over a rule without, an exact path over variables, and a more specific rule over
    others, in werkzeug's order. GET includes HEAD unless a rule names HEAD. A trailing
    slash makes no difference unless rules name both forms.

    Some frameworks normalize paths: they serve ``/v1//search`` or ``/v1/sea%FFrch`` as
    ``/v1/search``. If the path as sent and the normalized path have different entries,
    the one with the greater *strictness* is returned, so that a client cannot get a
    lower price by another spelling.
    """

    def __init__(
        self,
        rules: Sequence[tuple[RouteRule, T]],
        default: T,
        strictness: Callable[[T], Any] = lambda entry: entry is not None,
    ) -> None:
        from werkzeug.routing.exceptions import RoutingException  # as in `RouteRule`

        every_other = [entry for rule, entry in rules if rule.is_every_other]
        #: The entry of requests that no other rule matches.
        self._unmatched = every_other[0] if every_other else default
        rules = [pair for pair in rules if not pair[0].is_every_other]
        #: Raised if no rule matches; ValueError for an integer with too many digits.
        self._not_found = (HTTPException, RoutingException, ValueError)
        self._strictness = strictness
        self._tables = {
            method: _Table(_for_method(rules, method))
            for method in {
                _ANY,
                *(m for rule, _ in rules for m in rule.methods),
                "HEAD",
            }
        }

    def find(self, environ: Mapping[str, Any]) -> T:
        """Return the entry of a request. Never raises."""
        tables = self._tables
        table = tables.get(method_of(environ)) or tables[_ANY]
        path = environ.get("PATH_INFO", "")
        entry: T | _Table[T] = table.exact.get(path, table)
        if not isinstance(entry, _Table):
            return entry
        as_sent = self._match(table, path)
        if _UNUSUAL.search(path) is None or (plain := _normalized_path(path)) == path:
            return as_sent
        exact: Any = table.exact
        normalized: T = exact[plain] if plain in exact else self._match(table, plain)
        # `max` returns the first of equally strict entries: prefer a rule to no rule.
        is_unmatched = normalized is self._unmatched
        both = (as_sent, normalized) if is_unmatched else (normalized, as_sent)
        return max(both, key=self._strictness)

    def by_template(
        self, template: str, environ: Mapping[str, Any], current: T
    ) -> T | None:
        """Return the entry of the rule that equals *template*, a framework's route.

        Return None if there is no such rule, or if it is not stricter than *current*.
        """
        table = self._tables.get(method_of(environ)) or self._tables[_ANY]
        entry: Any = table.by_template.get(_normalized_template(template), current)
        strictness = self._strictness
        return entry if strictness(entry) > strictness(current) else None

    def _match(self, table: _Table[T], path: str) -> T:
        """Return the entry of the rule with variables that matches *path*."""
        if table.adapter is None:
            return self._unmatched
        try:
            index, _ = table.adapter.match(_decoded(path))
        except self._not_found:
            return self._unmatched
        entry: T = table.variable[index]
        return entry


class _Table(Generic[T]):
    """The rules of one HTTP method."""

    __slots__ = ("adapter", "by_template", "exact", "variable")

    def __init__(self, rules: list[tuple[RouteRule, T]]) -> None:
        from openmeter_wsgi.path_matcher import path_adapter  # as in `RouteRule`

        self.exact: dict[str, Any] = {
            rule.path.encode().decode("latin-1"): entry
            for rule, entry in rules
            if rule.is_exact
        }
        for path, entry in list(self.exact.items()):
            self.exact.setdefault(path.removesuffix("/"), entry)
            self.exact.setdefault(path.removesuffix("/") + "/", entry)
        #: By the template of the rule, in a form that is the same for all frameworks.
        self.by_template = {
            _normalized_template(rule.path): entry for rule, entry in rules
        }
        variable = [(rule.path, entry) for rule, entry in rules if not rule.is_exact]
        #: By the endpoint of the rule, which is an index.
        self.variable = [entry for _, entry in variable]
        #: Bound once: binding for each request would cost more than matching.
        self.adapter = path_adapter(path for path, _ in variable) if variable else None


def _for_method(
    rules: list[tuple[RouteRule, T]], method: str
) -> list[tuple[RouteRule, T]]:
    """Return the rules for requests of *method*, one for each path."""
    by_path: dict[str, tuple[RouteRule, T]] = {}
    # Later rules replace earlier ones: from the least to the most specific method.
    for wanted in (_ANY, "GET" if method == "HEAD" else method, method):
        for rule, entry in rules:
            if wanted in rule.methods or (wanted == _ANY and not rule.methods):
                by_path[rule.path] = (rule, entry)
    return list(by_path.values())


def _normalized_template(template: str) -> str:
    """Return *template*, of any framework, with each variable replaced by ``<>``."""
    return _TEMPLATE_VARIABLE.sub("<>", template).rstrip("/")


def _decoded(path: str) -> str:
    """Decode a path of WSGI, in which each byte is one character (PEP 3333)."""
    if path.isascii():
        return path
    return path.encode("latin-1", "replace").decode(errors="replace")


def _normalized_path(path: str) -> str:
    """Return *path* normalized in all ways in which some framework normalizes it.

    Bottle drops bytes that are not UTF-8, Falcon and werkzeug merge leading slashes,
    Pyramid resolves dot segments, and a regular expression that ends with ``$`` ignores
    a line end.
    """
    text = path.encode("latin-1", "ignore").decode(errors="ignore").removesuffix("\n")
    is_directory = text.endswith("/")
    text = posixpath.normpath(f"/{text.lstrip('/')}")
    if is_directory and text != "/":
        text += "/"
    return text.encode().decode("latin-1")
