"""Descriptions of the values that an option accepts, made from its type."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from openmeter_wsgi import Measure, StatusCodes

_NAMES = {
    Callable: "callable",
    Mapping: "mapping",
    Iterable: "list",
    tuple: "list",
    Measure: "measure",
    StatusCodes: "`StatusCodes`",
}
_IN_FILES = (str, int, float, bool, Mapping, Iterable, tuple, Literal)


def takes(hint: Any) -> str:
    """Return the kinds of value that *hint* allows, in Markdown."""
    return " or ".join(dict.fromkeys(_phrases(hint)))


def can_be_none(hint: Any) -> bool:
    """Return True if None is a value of type *hint*."""
    return type(None) in _alternatives(hint)


def can_be_written(hint: Any) -> bool:
    """Return True if a variable or a file can hold a value: a callable has no text."""
    return any(
        part in _IN_FILES or get_origin(part) in _IN_FILES
        for part in map(_bare, _alternatives(hint))
    )


def default(field: dataclasses.Field[Any]) -> str:
    """Return the default of *field* as Python source."""
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    value = field.default
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:_}" if is_count else repr(value)


def _phrases(hint: Any) -> Iterable[str]:
    for part in _alternatives(hint):
        bare, kind = _bare(part), get_origin(_bare(part))
        if kind is Literal:
            yield from (f"`{value!r}`" for value in get_args(bare))
        elif bare is not type(None):
            name = _NAMES.get(kind or bare) or f"`{bare.__name__}`"
            yield name + "".join(_bounds(part))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = get_origin(hint) in {Union, types.UnionType}
    return get_args(hint) if is_union else (hint,)


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _bounds(hint: Any) -> Iterable[str]:
    for meta in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
        if meta.gt is not None:
            yield f" > {meta.gt:,}"
        if meta.ge is not None:
            yield f" ≥ {meta.ge:,}"
        if meta.le is not None:
            yield f", ≤ {meta.le:,}"
        if meta.min_length:
            yield ", not empty"
