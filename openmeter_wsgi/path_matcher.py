"""Paths with variables, as werkzeug's routing matches them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from werkzeug.routing import BaseConverter, Map, MapAdapter, Rule

if TYPE_CHECKING:
    from collections.abc import Iterable


class _PathConverter(BaseConverter):
    """`<path:…>`, for each text that any framework takes for one.

    werkzeug's own stops at a line end and wants another first character than a slash,
    so `/files//a` and `/files/a%0A` would escape a rule that Django, Bottle or Falcon
    serves them by.
    """

    part_isolating = False
    regex = "(?s:.+?)"
    weight = 200  # as werkzeug's own: behind every other variable


def bound(paths: Iterable[str]) -> MapAdapter:
    """Return what matches *paths*; the endpoint of each is its number.

    :raises ValueError: or LookupError, TypeError, SyntaxError, if one is no rule.
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
