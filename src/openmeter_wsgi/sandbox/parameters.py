"""Query parameters, refused in the words of OpenMeter's validator."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from openmeter_wsgi.sandbox.cloudevent import parse_time
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.schema import DATE_TIME, matches

if TYPE_CHECKING:
    from werkzeug.datastructures import MultiDict

    from openmeter_wsgi.sandbox.resources import Document

    Arguments = MultiDict[str, str]


def refuse(name: str, reason: str) -> Problem:
    """Return the problem of a parameter."""
    return Problem(400, f'parameter "{name}" in query has an error: {reason}')


def integer(
    arguments: Arguments, name: str, default: int, least: int, most: int
) -> int:
    """Return the number *name* from *least* to *most*."""
    text = arguments.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"-?[0-9]{1,18}", text, re.ASCII):
        raise refuse(name, f"value {text}: an invalid integer: invalid syntax")
    value = int(text)
    if value < least:
        raise refuse(name, f"number must be at least {least}")
    if value > most:
        raise refuse(name, f"number must be at most {most}")
    return value


def moment(text: str | None, name: str) -> int | None:
    """Return RFC 3339 *text* in Unix seconds."""
    if text is None:
        return None
    wrong = refuse(name, 'string doesn\'t match the format "date-time"')
    if not matches(DATE_TIME, text):
        raise wrong
    try:
        return parse_time(text)
    except ValueError:
        raise wrong from None


def parse_moment(text: str) -> int:
    """Return a time in a document, which has passed the schema, in Unix seconds."""
    try:
        return parse_time(text)
    except ValueError:
        detail = f'parsing time "{text}": not in RFC3339 format'
        raise Problem(400, f"request body has an error: {detail}") from None


def page(arguments: Arguments) -> tuple[int, int]:
    """Return the number of the page, from 1, and how many items are on one."""
    number = integer(arguments, "page", 1, 1, 10**9)
    return number, integer(arguments, "pageSize", 100, 1, 1000)


def paged(items: list[Document], arguments: Arguments) -> Document:
    """Return the page of *items* that is asked for, as the API wraps it."""
    number, size = page(arguments)
    return {
        "totalCount": len(items),
        "page": number,
        "pageSize": size,
        "items": items[(number - 1) * size : number * size],
    }
