"""What OpenMeter answered, and what that means where it was not hoped for."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from openmeter_wsgi.errors import MAX_REASON, Held, Unavailable
from openmeter_wsgi.log import clean

if TYPE_CHECKING:
    from collections.abc import Mapping

_TRY_LATER = {408, 429}
#: A wait longer than this is taken for a mistake of the server.
MAX_RETRY_AFTER = 3_600.0


class Reply(NamedTuple):
    """What the server answered."""

    status: int
    #: Whatever the case of a name.
    headers: Mapping[str, str]
    #: The start of the body, without our key should the server repeat it.
    body: bytes

    @property
    def date(self) -> float | None:
        """When the server answered by its own clock, None if it does not say."""
        return _moment(self.headers.get("Date", ""))

    @property
    def is_page(self) -> bool:
        """Whether it is a web page, as a proxy or a login shows it."""
        content_type = self.headers.get("Content-Type", "").lower()
        return "html" in content_type or self.body.lstrip()[:1] == b"<"


def failure(reply: Reply) -> Unavailable | Held:
    """Return what an answer means that is not what was hoped for."""
    status, headers, body = reply
    if status < 300 and reply.is_page:
        return Held("a web page instead of an OpenMeter server", status=status)
    said = reason(body)
    if status in _TRY_LATER or 500 <= status <= 599:
        return Unavailable(
            said,
            status=status,
            retry_after=_retry_after(headers.get("Retry-After")),
            # OpenMeter stops at the first event that it cannot process: those
            # before it are taken. Nobody can say who else sends a 5xx, and when.
            ambiguous=status >= 500,
        )
    if 300 <= status <= 399:
        said = f"a redirect to {headers.get('Location')!r}, which is not followed"
    return Held(said, status=status)


def reason(body: bytes) -> str:
    """Return what the server said, from a problem document (RFC 9457) if it is one."""
    text = body.decode(errors="replace")
    try:
        problem = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        problem = None
    if isinstance(problem, dict):
        said = problem.get("detail") or _validation(problem) or problem.get("title")
        text = str(said or text)
    return clean(text, MAX_REASON)


def _validation(problem: dict[str, Any]) -> str:
    """Return what is wrong with single fields, which version 3 tells in their place."""
    extensions = problem.get("extensions")
    errors = extensions.get("validationErrors") if isinstance(extensions, dict) else ()
    if not isinstance(errors, list):
        return ""
    return "; ".join(
        f"{error.get('message')} {error['value']!r}"
        if "value" in error
        else f"{error.get('message')}: {error.get('field')}"
        for error in errors
        if isinstance(error, dict)
    )


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After asks for (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return min(float(value), MAX_RETRY_AFTER)
    if (moment := _moment(value)) is None:
        return None
    return min(max(moment - time.time(), 0.0), MAX_RETRY_AFTER)


def _moment(date: str) -> float | None:
    """Return the time of an HTTP date in seconds since 1970, None if it is none."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None
