"""What was spent, by the whole second in which it was settled."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

#: So many seconds are remembered one by one.
_MAX_SECONDS = 600


class Spending:
    """The amounts of one account and process. Whoever calls holds its lock."""

    __slots__ = ("_handed_in", "_past", "amount", "second")

    def __init__(self) -> None:
        #: The running second, and what was spent in it and is not handed in.
        self.second = 0
        self.amount = 0.0
        #: The same of other seconds.
        self._past: dict[int, float] = {}
        #: What was handed in: another store needs it.
        self._handed_in: dict[int, float] = {}

    def __bool__(self) -> bool:
        """Say whether there is something to be handed in."""
        return bool(self.amount or self._past)

    def add(self, second: int, amount: float) -> None:
        """Add what was spent in a second other than the running one."""
        if second > self.second:
            before, self.amount = self.amount, 0.0
            if before:
                self._past[self.second] = self._past.get(self.second, 0.0) + before
            self.second = second
            self.amount += amount
        else:  # a thread that was slow, or a clock that was put back
            self._past[second] = self._past.get(second, 0.0) + amount

    def take(self) -> dict[int, float]:
        """Take out all that is to be handed in."""
        taken, self._past = self._past, {}
        amount, self.amount = self.amount, 0.0
        if amount:
            taken[self.second] = taken.get(self.second, 0.0) + amount
        _merge(self._handed_in, taken)
        return taken

    def put_back(self, spent: Mapping[int, float]) -> None:
        """Undo `take`."""
        _merge(self._past, spent)
        _merge(self._handed_in, {second: -amount for second, amount in spent.items()})

    def recent(self, *, but: Mapping[int, float]) -> dict[int, float]:
        """Return what was handed in and is perhaps in no answer, without *but*."""
        rest = {s: amount - but.get(s, 0.0) for s, amount in self._handed_in.items()}
        return {second: amount for second, amount in rest.items() if amount > 0}

    def forget_before(self, moment: float) -> None:
        """Forget what was handed in of seconds that an answer has long covered."""
        self._handed_in = {
            second: amount
            for second, amount in self._handed_in.items()
            if second + 1 > moment
        }


def _merge(into: dict[int, float], amounts: Mapping[int, float]) -> None:
    for second, amount in amounts.items():
        into[second] = into.get(second, 0.0) + amount
    while len(into) > _MAX_SECONDS:
        first, second, *_ = sorted(into)
        into[second] += into.pop(first)  # later: it is the safe side
