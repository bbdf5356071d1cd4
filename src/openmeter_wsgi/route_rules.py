"""Rules of routes, one by one: which methods, and which paths."""

from __future__ import annotations

import re

_METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}
)
_RULE = re.compile(r"(?:([A-Za-z][A-Za-z,-]*)\s+)?(/\S*)")


class RouteRule:
    """One rule: the methods, none for all of them, and werkzeug's rule.

    :raises ValueError: if *text* is none, such as ``POST /v1/analyze``.
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
