"""Options of views by their content: equal ones are one object, and one policy.

A decorator may be applied anew for each request, in a view or by a class made for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

from openmeter_wsgi import log
from openmeter_wsgi.measures import Measure

if TYPE_CHECKING:
    from collections.abc import Hashable

logger = log.get_logger(__name__)

#: Options of one view that are remembered.
MAX_KNOWN = 1_000
#: Deeper than this no option is nested, but a function may refer to itself.
_MAX_DEPTH = 12

#: By the name of the view.
_known: defaultdict[str, dict[Hashable, dict[str, Any]]] = defaultdict(dict)


def known_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the view *name* that have this content: the first of them.

    Any thread. Past `MAX_KNOWN` a view gets its own, with a warning.
    """
    of_view = _known[name]
    content = _content(options, 0)
    if (found := of_view.get(content)) is not None:
        return found
    if len(of_view) >= MAX_KNOWN:
        logger.warning(
            "%s: @meter is applied again and again, with other options each time; each "
            "time costs memory that is never given back: apply it once",
            name,
        )
        return options
    return of_view.setdefault(content, options)


class _Same:
    """Stands for an object that is equal to itself alone, and keeps it."""

    __slots__ = ("_object",)

    def __init__(self, thing: object) -> None:
        self._object = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._object is self._object

    def __hash__(self) -> int:
        return id(self._object)


def _content(value: object, depth: int) -> Hashable:
    """Return what equals the content of an equal value, and of no other one."""
    if depth > _MAX_DEPTH:
        return _Same(value)
    inner = depth + 1
    if isinstance(value, Mapping):
        return "mapping", *((key, _content(v, inner)) for key, v in value.items())
    if isinstance(value, list | tuple):
        return "sequence", *(_content(each, inner) for each in value)
    if isinstance(value, Measure):
        return "measure", *(_content(each, inner) for each in value.content)
    if isinstance(value, FunctionType):
        return _content_of_function(value, inner)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    # 1, 1.0 and True are equal, and are not the same on an invoice.
    return type(value), value


def _content_of_function(function: FunctionType, depth: int) -> Hashable:
    """Return what a function does: its code, and what it has from where it was made."""
    cells = function.__closure__ or ()
    try:
        closed_over = [cell.cell_contents for cell in cells]
    except ValueError:  # not assigned yet
        return _Same(function)
    own = [function.__defaults__, function.__kwdefaults__, *closed_over]
    return function.__code__, *(_content(each, depth) for each in own)
