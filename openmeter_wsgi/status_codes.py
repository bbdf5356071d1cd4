"""`StatusCodes`: the set of HTTP status codes that are billed."""

from __future__ import annotations

import re
from collections.abc import Iterable

_FORMS = "'200', '200-299' or '2xx'"
_TOKEN = re.compile(r"(\d{3})(?:\s*-\s*(\d{3}))?|([1-5])[xX]{2}", re.ASCII)


class StatusCodes:
    """An immutable set of HTTP status codes from 100 to 599.

    Written as ``"200-299, 304"``, ``"2xx"`` or ``[200, 201]``. A code is tested as
    text: ``"200" in StatusCodes("2xx")``.

    :raises ValueError: naming the part that is neither a code nor a range.
    """

    __slots__ = ("codes", "text")

    def __init__(self, codes: str | Iterable[int | str] | StatusCodes) -> None:
        #: All codes as text: the first three characters of a WSGI status line.
        self.codes: frozenset[str] = frozenset(f"{code}" for code in _read(codes))
        #: The shortest text of the set, such as ``"200-299,304"``.
        self.text: str = _shortest(sorted(map(int, self.codes)))

    def __contains__(self, code: str) -> bool:
        return code in self.codes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StatusCodes) and self.codes == other.codes

    def __hash__(self) -> int:
        return hash(self.codes)

    def __repr__(self) -> str:
        return f"StatusCodes({self.text!r})"


def _read(codes: object) -> set[int]:
    if isinstance(codes, StatusCodes):
        return set(map(int, codes.codes))
    tokens: Iterable[object]
    if isinstance(codes, str):
        tokens = [token.strip() for token in codes.split(",")]
    elif isinstance(codes, Iterable) and not isinstance(codes, bytes):
        tokens = codes
    else:
        raise ValueError(f"expected codes such as {_FORMS}, got {codes!r}")
    read = {code for token in tokens for code in _read_token(token)}
    if not read:
        raise ValueError(f"expected at least one code such as {_FORMS}, got {codes!r}")
    return read


def _read_token(token: object) -> range:
    if isinstance(token, int) and not isinstance(token, bool):
        token = str(token)
    if token == "*":  # noqa: S105 - no secret
        raise ValueError(
            "'*' would bill errors too: write '200-599' if that is what you mean"
        )
    match = _TOKEN.fullmatch(token.strip()) if isinstance(token, str) else None
    if not match:
        raise ValueError(f"expected {_FORMS}, got {token!r}")
    first, last, hundred = match.groups()
    if hundred:
        first, last = f"{hundred}00", f"{hundred}99"
    low, high = int(first), int(last or first)
    if low > high:
        raise ValueError(f"expected a range from low to high, got {token!r}")
    if not 100 <= low <= high <= 599:
        raise ValueError(f"expected codes from 100 to 599, got {token!r}")
    return range(low, high + 1)


def _shortest(codes: list[int]) -> str:
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)
