"""What may have been sent, of all segments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmeter_wsgi.delivery import ranges
from openmeter_wsgi.delivery.progress import Doubt

if TYPE_CHECKING:
    from collections.abc import Iterable

    from openmeter_wsgi.delivery.part import Run


class Doubts:
    """Which lines may have been sent, and since when."""

    def __init__(self) -> None:
        self._by_moment: dict[float, Doubt] = {}

    @property
    def known(self) -> list[Doubt]:
        """All of them."""
        return list(self._by_moment.values())

    def since(self, runs: Iterable[Run]) -> float | None:
        """Return when the first of *runs* may have been sent, None if none was."""
        moments = (
            doubt.since
            for run in runs
            for doubt in self._by_moment.values()
            if ranges.overlap(doubt.lines.get(run.key, []), run.start, run.end)
        )
        return min(moments, default=None)

    def add(self, runs: Iterable[Run], since: float) -> None:
        """Note that *runs* are sent at that moment."""
        doubt = self._by_moment.setdefault(since, Doubt(since, {}))
        for run in runs:
            places = doubt.lines.setdefault(run.key, [])
            ranges.add(places, run.start, run.end)

    def forget(self, runs: Iterable[Run]) -> None:
        """Note that *runs* have arrived, or have not."""
        for run in runs:
            key = run.key
            for doubt in self._by_moment.values():
                if places := doubt.lines.pop(key, None):
                    left = ranges.subtract(places, run.start, run.end)
                    doubt.lines.update({key: left} if left else {})
        self._by_moment = {k: v for k, v in self._by_moment.items() if v.lines}
