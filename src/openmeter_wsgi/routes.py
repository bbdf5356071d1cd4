"""Which policy governs a request: rules compiled once, werkzeug's own."""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from werkzeug.exceptions import HTTPException
from werkzeug.routing.exceptions import RoutingException

from openmeter_wsgi.request import method_of
from openmeter_wsgi.route_map import bound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from openmeter_wsgi.route_rules import RouteRule

T = TypeVar("T")

#: Stands for every method that no rule names.
_ANY = ""
#: A variable of werkzeug's, Bottle's, Django's, Falcon's or Pyramid's.
_VARIABLE = re.compile(r"<[^<>]*>|\{[^{}]*\}|(?<=/)\*\w*\Z")
#: A path that some framework reads as another one: no slash in front, two in a row,
#: dots for directories, bytes that are no UTF-8 (each a character here), line ends.
_ODD = re.compile(r"\A[^/]|//|/\.\.?(?:/|\Z)|[\x00-\x1f\x7f-\xff]")


class Routes(Generic[T]):
    """What belongs to a request by its method and path. Immutable; any thread.

    A rule with a method goes before one without, an exact path before a variable, and
    among variables werkzeug's order decides: the most specific wins. GET means HEAD,
    too, unless HEAD is named. A slash at the end makes no difference unless both forms
    are named: an application may serve both, and means the same price.

    A path in an odd spelling, such as ``/v1//search`` or ``/v1/sea%FFrch``, is one that
    some frameworks serve as ``/v1/search``. Of what belongs to the two, that governs
    for which *strictness* is greater: a client cannot choose a price by its spelling.
    """

    def __init__(
        self,
        rules: Iterable[tuple[RouteRule, T]],
        unmatched: T,
        strictness: Callable[[T], Any] = lambda found: found is not None,
    ) -> None:
        rules = list(rules)
        self._unmatched = unmatched
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
        """Return what belongs to the request. Never raises."""
        tables = self._tables
        table = tables.get(method_of(environ)) or tables[_ANY]
        path = environ.get("PATH_INFO", "")
        found: T | _Table[T] = table.exact.get(path, table)
        if not isinstance(found, _Table):
            return found
        own = self._match(table, path)
        if _ODD.search(path) is None or (plain := _plain(path)) == path:
            return own
        exact: Any = table.exact
        meant: T = exact[plain] if plain in exact else self._match(table, plain)
        # Of two that are equally strict a rule goes before none.
        both = (own, meant) if meant is self._unmatched else (meant, own)
        return max(both, key=self._strictness)

    def by_template(
        self, template: str, environ: Mapping[str, Any], own: T
    ) -> T | None:
        """Return what belongs to the rule that is written as *template*.

        None if there is no such rule, or it is not stricter than *own*. For requests of
        which the framework has said by which of its routes it serves them.
        """
        table = self._tables.get(method_of(environ)) or self._tables[_ANY]
        found: Any = table.by_template.get(_shape(template), own)
        strictness = self._strictness
        return found if strictness(found) > strictness(own) else None

    def _match(self, table: _Table[T], path: str) -> T:
        """Return what belongs to the rule with a variable that *path* matches."""
        if table.adapter is None:
            return self._unmatched
        try:
            number, _ = table.adapter.match(_text(path))
        except (HTTPException, RoutingException, ValueError):
            return self._unmatched  # ValueError: a converter's, of a value too long
        own: T = table.variable[number]
        return own


class _Table(Generic[T]):
    """The rules of one method."""

    __slots__ = ("adapter", "by_template", "exact", "variable")

    def __init__(self, rules: list[tuple[RouteRule, T]]) -> None:
        self.exact: dict[str, Any] = {
            rule.path.encode().decode("latin-1"): each
            for rule, each in rules
            if rule.is_exact
        }
        for path, each in list(self.exact.items()):
            self.exact.setdefault(path.removesuffix("/"), each)
            self.exact.setdefault(path.removesuffix("/") + "/", each)
        #: By what all spellings of a rule have in common, in every framework.
        self.by_template = {_shape(rule.path): each for rule, each in rules}
        variable = [(rule.path, each) for rule, each in rules if not rule.is_exact]
        #: By the number that is the endpoint of its rule.
        self.variable = [each for _, each in variable]
        #: Bound once: binding anew for each request costs more than matching.
        self.adapter = bound(path for path, _ in variable) if variable else None


def _for_method(
    rules: list[tuple[RouteRule, T]], method: str
) -> list[tuple[RouteRule, T]]:
    """Return the rules that a request of *method* can meet, one for each path."""
    by_path: dict[str, tuple[RouteRule, T]] = {}
    for wanted in (_ANY, "GET" if method == "HEAD" else method, method):
        for rule, belongs in rules:
            if wanted in rule.methods or (wanted == _ANY and not rule.methods):
                by_path[rule.path] = (rule, belongs)
    return list(by_path.values())


def _shape(template: str) -> str:
    """Return a template with its variables alike, however a framework writes them."""
    return _VARIABLE.sub("<>", template).rstrip("/")


def _text(path: str) -> str:
    """Return a path as the text that it was sent as.

    WSGI hands over its bytes, each as one character (PEP 3333).
    """
    if path.isascii():
        return path
    return path.encode("latin-1", "replace").decode(errors="replace")


def _plain(path: str) -> str:
    """Return *path* in its usual spelling, as some framework reads it.

    Bottle drops bytes that are no UTF-8, Falcon and werkzeug take any number of slashes
    in front for one, Pyramid resolves dots, regular expressions that end in ``$`` let a
    line end pass.
    """
    text = path.encode("latin-1", "ignore").decode(errors="ignore").removesuffix("\n")
    is_directory = text.endswith("/")
    text = posixpath.normpath(f"/{text.lstrip('/')}")
    if is_directory and text != "/":
        text += "/"
    return text.encode().decode("latin-1")
