"""What a test expects to be metered, and whether an event is it."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

from openmeter_wsgi.testing.report import shown
from openmeter_wsgi.wire import add_exactly, written_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from openmeter_wsgi.testing.collecting import Event


class Expectation(NamedTuple):
    """Events of one type, and what they come to together."""

    type: str
    subject: str | None = None
    #: The sum of their numbers of the name *of*.
    total: float | Decimal | None = None
    of: str = "total"
    #: What the data of each has at least.
    data: Mapping[str, Any] | None = None
    times: int | None = None

    def __str__(self) -> str:
        text = f"expected {self.type!r} to be metered"
        if self.times is not None:
            text += f" {self.times} times" if self.times != 1 else " once"
        if self.subject is not None:
            text += f", subject {self.subject!r}"
        if self.data is not None:
            text += f", with data {shown(dict(self.data))}"
        if self.total is not None:
            text += f", {self.of} {self.total} in all"
        return text

    def mismatch(self, event: Event) -> str:
        """Say in what *event* differs, nothing if it is one of those."""
        if event.type != self.type:
            return f"type {event.type!r}"
        if self.subject not in {None, event.subject}:
            return f"subject {event.subject!r}"
        for name, value in (self.data or {}).items():
            if name not in event.data:
                return f"no {name!r} in its data"
            if not _equal(event.data[name], value):
                return f"{name} {event.data[name]!r}"
        return ""

    def shortfall(self, found: Sequence[Event]) -> str:
        """Say what is wrong with all that were found, nothing if they are it."""
        if self.times is not None and len(found) != self.times:
            return f"but {len(found)} were"
        if self.times is None and not found:
            return "but none was"
        if self.total is None:
            return ""
        try:
            values = [Decimal(str(event.data[self.of])) for event in found]
        except KeyError:
            names = sorted({name for event in found for name in event.data})
            return f"but there is no {self.of!r} in the data: say of={_or(names)}"
        except InvalidOperation:
            return f"but {self.of!r} is no number"
        total = reduce(add_exactly, values, Decimal(0))
        if total != Decimal(str(self.total)):
            return f"but it comes to {total}"
        return ""


def _or(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names)) or "…"


def _equal(found: Any, wanted: Any) -> bool:
    """Compare as OpenMeter does, to which an exact number comes as text."""
    if found == wanted:
        return True
    return isinstance(wanted, int | Decimal) and written_number(wanted) == found
