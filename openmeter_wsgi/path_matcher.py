"""Matches paths against rules with variables, by werkzeug's routing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from werkzeug.routing import BaseConverter, Map, MapAdapter, Rule

if TYPE_CHECKING:
    from collections.abc import Iterable


class _PathConverter(BaseConverter):
    """The converter `<path:…>`. It matches any text that is not empty.

    werkzeug's own converter excludes line ends and a leading slash. Django, Bottle and
    Falcon serve such paths, for example `/files//a` and `/files/a%0A`: with werkzeug's
    converter these would not be billed by the rule.
    """

    part_isolating = False
    regex = "(?s:.+?)"
    weight = 200  # as in werkzeug's: tried after all other converters


def path_adapter(paths: Iterable[str]) -> MapAdapter:
    """Return an adapter that matches *paths*. The endpoint of a path is its index.

    :raises ValueError: or LookupError, TypeError, SyntaxError, if a path is not a valid
        rule of werkzeug.
    """
    rules = Map(
        strict_slashes=False,
        merge_slashes=False,
        redirect_defaults=False,
        converters={"path": _PathConverter},
    )
    for index, path in enumerate(paths):
        rules.add(Rule(path, endpoint=index))
    rules.update()
    return rules.bind("")
