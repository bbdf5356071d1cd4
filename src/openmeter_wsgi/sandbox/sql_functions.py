"""What SQLite is taught so that it adds up events as ClickHouse does."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from openmeter_wsgi.sandbox.metering import to_float
from openmeter_wsgi.sandbox.windows import window_start

if TYPE_CHECKING:
    import sqlite3


def install(connection: sqlite3.Connection) -> None:
    """Teach *connection* the functions of this module."""
    connection.create_function("to_number", 1, to_number, deterministic=True)
    connection.create_function("window_start", 3, window_start, deterministic=True)
    connection.create_aggregate("latest", 3, Latest)  # type: ignore[arg-type]


class Latest:
    """SQL aggregate: the value of the newest event that has one."""

    def __init__(self) -> None:
        self._newest: tuple[int, int, float | None] = (-1, -1, None)

    def step(self, moment: int, seq: int, value: float | None) -> None:
        """Take one event."""
        if value is not None:
            self._newest = max(self._newest, (moment, seq, value))

    def finalize(self) -> float | None:
        """Return the newest value."""
        return self._newest[2]


@lru_cache(maxsize=4096)
def to_number(text: str) -> float | None:
    """Return *text* as ClickHouse's ``toFloat64OrNull`` does, infinities excluded."""
    try:
        value = to_float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
