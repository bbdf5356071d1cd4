"""The status of a part of a response."""

from __future__ import annotations

import re

#: ``207``, ``207 Multi-Status``, ``HTTP/1.1 207 Multi-Status``.
_STATUS = re.compile(
    r"\s*(?:HTTP/[\d.]+\s+)?([1-5]\d\d)(?:\s.*)?", re.ASCII | re.DOTALL
)


def status_code(status: object) -> int | None:
    """Return the code in a number, a code as text or a status line, else None."""
    if isinstance(status, str):
        found = _STATUS.fullmatch(status)
        return int(found[1]) if found else None
    if isinstance(status, int) and not isinstance(status, bool):
        return status if 100 <= status <= 599 else None
    return None


class Tally:
    """How many parts have succeeded so far, how many have not."""

    __slots__ = ("failed", "succeeded")

    def __init__(self) -> None:
        self.succeeded = 0
        self.failed = 0

    def count_code(self, code: int | None) -> None:
        """Count a part with this status; one without counts as neither."""
        if code is not None:
            self.count(is_success=200 <= code <= 299)

    def count(self, *, is_success: bool) -> None:
        """Count one more part."""
        if is_success:
            self.succeeded += 1
        else:
            self.failed += 1
