"""What has arrived since the sandbox was started."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

#: Reasons may quote the client; they must not fill the memory.
MAX_REASONS = 50
MAX_REASON = 300


class Tally:
    """Counts of requests and events, by what became of them. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        #: Grows with every change.
        self.version = 0

    def add(self, **counts: int) -> None:
        """Add *counts* by name."""
        with self._lock:
            self._counts.update(counts)
            self.version += 1

    def refuse(self, reason: str) -> None:
        """Count a request that was refused, none of whose events were taken."""
        reason = reason[:MAX_REASON]
        with self._lock:
            self._counts["refused"] += 1
            if reason not in self._refusals and len(self._refusals) >= MAX_REASONS:
                reason = "other reasons"
            self._refusals[reason] += 1
            self.version += 1

    def counts(self) -> dict[str, int]:
        """Return the counts; see the keys."""
        names = ("requests", "received", "stored", "duplicates", "dropped", "refused",
                 "failed")  # fmt: skip
        with self._lock:
            return {name: self._counts[name] for name in names}

    def refusals(self) -> list[dict[str, Any]]:
        """Return the reasons of refusals, the most frequent first."""
        with self._lock:
            return [
                {"reason": reason, "count": count}
                for reason, count in self._refusals.most_common()
            ]
