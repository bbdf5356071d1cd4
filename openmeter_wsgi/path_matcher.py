"""Matches paths with variables by werkzeug's routing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from werkzeug.routing import BaseConverter, Map, MapAdapter, Rule

if TYPE_CHECKING:
    from collections.abc import Iterable


class _PathConverter(BaseConverter):
    """The converter `<path:…>`, which matches every text.

    werkzeug's own stops at a line end and refuses a slash at the beginning, so that
    `/files//a` and `/files/a%0A`, which Django, Bottle or Falcon serve, would escape
    the rule.
    """

    part_isolating = False
    regex = "(?s:.+?)"
    weight = 200  # as werkzeug's own: tried after every other variable


def bound(paths: Iterable[str]) -> MapAdapter:
    """Return a matcher of *paths*; the endpoint of each is its number.

    :raises ValueError: or LookupError, TypeError, SyntaxError, if a path is no rule.
    """
    made = Map(
        strict_slashes=False,
        merge_slashes=False,
        redirect_defaults=False,
        converters={"path": _PathConverter},
    )
    for number, path in enumerate(paths):
        made.add(Rule(path, endpoint=number))
    made.update()
    return made.bind("")
