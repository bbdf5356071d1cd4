"""The ``source`` of an event: a URI reference (CloudEvents 1.0, RFC 3986)."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_CHARACTERS = re.compile(r"(?:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")


def source_problem(source: object) -> str | None:
    """Say what is wrong with *source*, as the parser behind OpenMeter sees it."""
    if not isinstance(source, str) or not _CHARACTERS.fullmatch(source):
        return f"expected a URI reference such as 'my-api', got {source!r}"
    first_segment = re.split(r"[/?#]", source, maxsplit=1)[0]
    if ":" in first_segment and not _SCHEME.match(source):
        return (
            "expected a URI reference, whose first part has no colon unless it is a "
            f"scheme, got {source!r}"
        )
    try:
        _ = urlsplit(source).port
    except ValueError as error:
        return f"expected a URI reference, got {source!r}: {error}"
    return None
