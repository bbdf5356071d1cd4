"""Routes that match the same request.

Zuplo takes the one that stands first in the document (its page on routing), a rule's
matcher the more exact one, as web frameworks do.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

Options = dict[str, Any] | None


def overlapping(
    routes: Mapping[str, Options],
) -> tuple[dict[str, Options], list[str]]:
    """Return the routes that are needed, and what matches otherwise than in Zuplo.

    A route that is not metered is needed where the rule of another one, which is
    metered, would match it as well.
    """
    needed = {rule for rule, options in routes.items() if options is not None}
    notes: list[str] = []
    for (first, its), (second, other) in combinations(routes.items(), 2):
        if its == other or not _overlap(first, second):
            continue
        needed |= {first, second}
        if exactness(second) > exactness(first):
            notes.append(
                f"{second}: Zuplo would use {first}, which stands before it; here the "
                "more exact rule governs"
            )
    return {rule: routes[rule] for rule in routes if rule in needed}, notes


def exactness(rule: str) -> tuple[bool, ...]:
    """Return what sorts the more exact of two overlapping rules behind."""
    return tuple("<" not in part for part in rule.split("/"))


def _overlap(left: str, right: str) -> bool:
    """Say whether a request may match both rules; in doubt it may."""
    lefts, rights = left.split("/"), right.split("/")
    for one, other in zip(lefts, rights, strict=False):
        if "<path:" in one or "<path:" in other:
            return True
        if one != other and "<" not in one and "<" not in other:
            return False
    return len(lefts) == len(rights)
