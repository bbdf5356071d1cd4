"""Paths with variables, in the form in which werkzeug matches them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from werkzeug.routing import Map, MapAdapter, Rule

if TYPE_CHECKING:
    from collections.abc import Iterable


def bound(paths: Iterable[str]) -> MapAdapter:
    """Return what matches *paths*; the endpoint of each is its number.

    :raises ValueError: or LookupError, TypeError, SyntaxError, if one is no rule.
    """
    made = Map(strict_slashes=False, merge_slashes=False, redirect_defaults=False)
    for number, path in enumerate(paths):
        made.add(Rule(path, endpoint=number))
    made.update()
    return made.bind("")
