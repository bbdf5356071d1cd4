"""Sets of numbers that are mostly one run: offsets of a file, numbers of events."""

from __future__ import annotations

from typing import TypeAlias

#: From where to where, the end excluded; sorted, apart.
Ranges: TypeAlias = list[tuple[int, int]]


def add(ranges: Ranges, start: int, end: int) -> None:
    """Add a range to sorted ones, joining those that touch."""
    at = len(ranges)
    while at and ranges[at - 1][1] >= start:
        at -= 1
    after = at
    while after < len(ranges) and ranges[after][0] <= end:
        start = min(start, ranges[after][0])
        end = max(end, ranges[after][1])
        after += 1
    ranges[at:after] = [(start, end)]


def first_gap(ranges: Ranges) -> int:
    """Return up to where all is there, from the beginning."""
    return ranges[0][1] if ranges and ranges[0][0] == 0 else 0


def subtract(ranges: Ranges, start: int, end: int) -> Ranges:
    """Return *ranges* without what is from *start* to *end*."""
    left: Ranges = []
    for low, high in ranges:
        if low < start:
            left.append((low, min(high, start)))
        if high > end:
            left.append((max(low, end), high))
    return [(low, high) for low, high in left if low < high]


def overlap(ranges: Ranges, start: int, end: int) -> bool:
    """Say whether anything from *start* to *end* is in *ranges*."""
    return any(low < end and start < high for low, high in ranges)
