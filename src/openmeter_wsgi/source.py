"""The ``source`` of an event: a URI reference (CloudEvents 1.0, RFC 3986)."""

from __future__ import annotations

from string import ascii_letters, digits, hexdigits
from urllib.parse import urlsplit

from openmeter_wsgi.errors import shown

# Sets, not a regular expression: that takes a millisecond to compile, at every import.
_IN_SCHEME = frozenset(ascii_letters + digits + "+.-")
_CHARACTERS = _IN_SCHEME | frozenset("_~:/?#[]@!$&'()*,;=%")
_HEX = frozenset(hexdigits)
#: What ends the first segment of a path.
_ENDS = frozenset("/?#")


def source_problem(source: object) -> str | None:
    """Say what is wrong with *source*, as the parser behind OpenMeter sees it."""
    if not isinstance(source, str) or not _is_written_right(source):
        return f"expected a URI reference such as 'my-api', got {shown(source)}"
    before, colon, _ = source.partition(":")
    if colon and _ENDS.isdisjoint(before) and not _is_scheme(before):
        return (
            "expected a URI reference, whose first part has no colon unless it is a "
            f"scheme, got {shown(source)}"
        )
    try:
        _ = urlsplit(source).port
    except ValueError as error:
        return f"expected a URI reference, got {shown(source)}: {error}"
    return None


def _is_written_right(source: str) -> bool:
    escapes = source.split("%")[1:]
    return (
        source != ""
        and _CHARACTERS.issuperset(source)
        and all(len(each) >= 2 and _HEX.issuperset(each[:2]) for each in escapes)
    )


def _is_scheme(text: str) -> bool:
    return text[:1].isalpha() and _IN_SCHEME.issuperset(text)
