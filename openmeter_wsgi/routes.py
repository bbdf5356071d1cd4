"""Routes: rules of methods and paths, and the policy of a request."""

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
#: The rule of all requests that no other rule matches.
EVERY_OTHER = "*"
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
    """One rule: the methods, none for all of them, and werkzeug's rule; or ``*``.

    :raises ValueError: if *text* is none, such as ``POST /v1/analyze``; if no path
        matches it, or matching one takes too long.
    """

    __slots__ = ("methods", "path", "text")

    text: str
    path: str
    #: Empty for all of them.
    methods: frozenset[str]

    def __init__(self, text: object) -> None:
        if isinstance(text, str) and text.strip() == EVERY_OTHER:
            self.text = self.path = EVERY_OTHER
            self.methods = frozenset()
            return
        found = _RULE.fullmatch(text.strip()) if isinstance(text, str) else None
        if found is None:
            raise ValueError(
                "expected a rule such as '/v1/search' or 'POST /v1/users/<id>', or "
                f"'*' for what no other rule matches, got {text!r}"
            )
        self.text = found[0]
        self.path = found[2]
        self.methods = frozenset(filter(None, (found[1] or "").upper().split(",")))
        if unknown := self.methods - _METHODS:
            raise ValueError(
                f"{text!r}: expected methods such as GET, got {', '.join(unknown)}"
            )
        if (path := _as_werkzeug_rule(self.path)) != self.path:
            meant = f"{found[0][: -len(self.path)]}{path}"
            raise ValueError(f"{text!r}: no request matches it; write {meant!r}")
        if (together := _max_variables_together(self.path)) > _MAX_TOGETHER:
            raise ValueError(
                f"{text!r}: expected at most two variables of any length that are "
                f"matched together, got {together}: a long path would take a worker "
                "seconds; leave a <path:…> out, or bound the others, such as "
                "<string(maxlength=40):name>"
            )
        # Here, as werkzeug's routing costs as much as half of this package and many
        # applications have no routes, or those of another framework.
        from openmeter_wsgi.path_matcher import bound

        try:
            bound([self.path])
        except (ValueError, LookupError, TypeError, SyntaxError) as error:
            raise ValueError(f"{text!r}: {error}") from None

    @property
    def is_every_other(self) -> bool:
        """True for ``*``, the rule of all requests that no other rule matches."""
        return self.path == EVERY_OTHER

    @property
    def is_exact(self) -> bool:
        """True if it matches one path only."""
        return "<" not in self.path

    @property
    def names_options(self) -> bool:
        """True if it names OPTIONS, which is metered under such a rule only."""
        return "OPTIONS" in self.methods


def _as_werkzeug_rule(path: str) -> str:
    """Return *path*, written as in another framework, as a rule of werkzeug."""
    path = _TYPE_BEHIND.sub(lambda found: _variable(found[1], found[2]), path)
    path = _TEXT.sub(lambda found: _variable(found[1], ""), path)
    meant, end = "", 0
    for variable in _VARIABLE.finditer(path):
        meant += _literal_as_werkzeug_rule(path[end : variable.start()]) + variable[0]
        end = variable.end()
    return meant + _literal_as_werkzeug_rule(path[end:])


def _literal_as_werkzeug_rule(text: str) -> str:
    """Return *text*, a part without variables of werkzeug, as a part of its rule."""
    text = _QUERY.sub("", text)
    text = _BRACES.sub(lambda found: _variable(found[1], found[2] or ""), text)
    text = _COLON.sub(lambda found: f"/<{found[1]}>", text)
    text = _STAR.sub(lambda found: f"/<path:{found[1] or 'rest'}>", text)
    # The server has decoded the path when it is matched.
    return _ESCAPE.sub(lambda found: unquote(found[0]), text)


def _variable(name: str, kind: str) -> str:
    return f"<{kind}:{name}>" if kind in _SHARED else f"<{name}>"


def _max_variables_together(path: str) -> int:
    """Return the most variables of any length in one regular expression of werkzeug.

    werkzeug makes one expression for each part between slashes, and one for all parts
    from a ``<path:…>`` on. A variable alone between two slashes is not counted, because
    it ends at the slash.
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


#: These stand for a variable of any length; no rule has blanks.
_VARIABLE_MARK, _PATH_MARK = " ", "\n"


def _mark(variable: re.Match[str]) -> str:
    converter, arguments = variable["converter"], variable["arguments"] or ""
    if converter == "path":
        return _PATH_MARK
    is_bounded = converter in _BOUNDED or "length" in arguments.replace("minlength", "")
    return "" if is_bounded else _VARIABLE_MARK


T = TypeVar("T")

#: Stands for every method that no rule names.
_ANY = ""
#: A variable of werkzeug's, Bottle's, Django's, Falcon's or Pyramid's.
_ROUTES_VARIABLE = re.compile(r"<[^<>]*>|\{[^{}]*\}|(?<=/)\*\w*\Z")
#: A path that some framework reads as another one: no slash in front, two in a row,
#: dots for directories, bytes that are no UTF-8 (each a character here), line ends.
_ODD = re.compile(r"\A[^/]|//|/\.\.?(?:/|\Z)|[\x00-\x1f\x7f-\xff]")


class Routes(Generic[T]):
    """Finds the entry of a request by its method and path. Immutable; any thread.

    A rule with a method wins over one without, an exact path over a variable, and among
    variables the most specific rule wins, in werkzeug's order. GET includes HEAD unless
    HEAD is named. A slash at the end makes no difference unless both forms are named,
    because an application may serve both.

    Some frameworks serve ``/v1//search`` or ``/v1/sea%FFrch`` as ``/v1/search``. Of the
    entries for both spellings the one with the greater *strictness* wins, so that no
    client chooses a price by spelling.
    """

    def __init__(
        self,
        rules: Sequence[tuple[RouteRule, T]],
        default: T,
        strictness: Callable[[T], Any] = lambda found: found is not None,
    ) -> None:
        from werkzeug.routing.exceptions import RoutingException  # as in `RouteRule`

        every_other = [each for rule, each in rules if rule.is_every_other]
        #: What belongs to requests that no other rule matches.
        self._unmatched = every_other[0] if every_other else default
        rules = [each for each in rules if not each[0].is_every_other]
        #: A converter raises ValueError for a value that is too long.
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
        """Return the entry of the request. Never raises."""
        tables = self._tables
        table = tables.get(method_of(environ)) or tables[_ANY]
        path = environ.get("PATH_INFO", "")
        found: T | _Table[T] = table.exact.get(path, table)
        if not isinstance(found, _Table):
            return found
        own = self._match(table, path)
        if _ODD.search(path) is None or (plain := _normalized_path(path)) == path:
            return own
        exact: Any = table.exact
        meant: T = exact[plain] if plain in exact else self._match(table, plain)
        # If both are equally strict, a rule wins over no rule.
        both = (own, meant) if meant is self._unmatched else (meant, own)
        return max(both, key=self._strictness)

    def by_template(
        self, template: str, environ: Mapping[str, Any], own: T
    ) -> T | None:
        """Return the entry of the rule that is written as *template*.

        None if there is no such rule, or it is not stricter than *own*. For requests
        whose route the framework has told.
        """
        table = self._tables.get(method_of(environ)) or self._tables[_ANY]
        found: Any = table.by_template.get(_normalized_template(template), own)
        strictness = self._strictness
        return found if strictness(found) > strictness(own) else None

    def _match(self, table: _Table[T], path: str) -> T:
        """Return the entry of the rule with variables that *path* matches."""
        if table.adapter is None:
            return self._unmatched
        try:
            number, _ = table.adapter.match(_decoded(path))
        except self._not_found:
            return self._unmatched
        own: T = table.variable[number]
        return own


class _Table(Generic[T]):
    """The rules of one method."""

    __slots__ = ("adapter", "by_template", "exact", "variable")

    def __init__(self, rules: list[tuple[RouteRule, T]]) -> None:
        from openmeter_wsgi.path_matcher import bound  # as in `RouteRule`

        self.exact: dict[str, Any] = {
            rule.path.encode().decode("latin-1"): each
            for rule, each in rules
            if rule.is_exact
        }
        for path, each in list(self.exact.items()):
            self.exact.setdefault(path.removesuffix("/"), each)
            self.exact.setdefault(path.removesuffix("/") + "/", each)
        #: By the shape of the rule, which is the same in every framework.
        self.by_template = {
            _normalized_template(rule.path): each for rule, each in rules
        }
        variable = [(rule.path, each) for rule, each in rules if not rule.is_exact]
        #: By the number that is the endpoint of its rule.
        self.variable = [each for _, each in variable]
        #: Bound once: binding anew for each request costs more than matching.
        self.adapter = bound(path for path, _ in variable) if variable else None


def _for_method(
    rules: list[tuple[RouteRule, T]], method: str
) -> list[tuple[RouteRule, T]]:
    """Return the rules that a request of *method* can match, one for each path."""
    by_path: dict[str, tuple[RouteRule, T]] = {}
    for wanted in (_ANY, "GET" if method == "HEAD" else method, method):
        for rule, belongs in rules:
            if wanted in rule.methods or (wanted == _ANY and not rule.methods):
                by_path[rule.path] = (rule, belongs)
    return list(by_path.values())


def _normalized_template(template: str) -> str:
    """Return a template with its variables alike, however a framework writes them."""
    return _ROUTES_VARIABLE.sub("<>", template).rstrip("/")


def _decoded(path: str) -> str:
    """Return a path as text. In WSGI each byte is one character (PEP 3333)."""
    if path.isascii():
        return path
    return path.encode("latin-1", "replace").decode(errors="replace")


def _normalized_path(path: str) -> str:
    """Return *path* in its usual spelling, as some framework reads it.

    Bottle drops bytes that are not UTF-8, Falcon and werkzeug read several slashes in
    front as one, Pyramid resolves dots, and regular expressions that end in ``$`` match
    a line end.
    """
    text = path.encode("latin-1", "ignore").decode(errors="ignore").removesuffix("\n")
    is_directory = text.endswith("/")
    text = posixpath.normpath(f"/{text.lstrip('/')}")
    if is_directory and text != "/":
        text += "/"
    return text.encode().decode("latin-1")
