"""What the page shows of usage: totals, curves, and what nobody counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.curves import View, meter_over_time
from openmeter_wsgi.sandbox.suggestions import uncounted

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

Document = dict[str, Any]

#: Columns of a plot, whatever time it spans.
COLUMNS = 60


def dashboard(
    connection: sqlite3.Connection,
    meters: list[Document],
    span: int,
    now: int,
    *,
    views: Mapping[str, View],
    horizon: int,
) -> Document:
    """Return what the page shows of the *span* seconds until *now*, and of all time.

    :param views: how the usage of a meter is divided, by slug; else by subject.
    :param horizon: the number of the last event that meters count by now.
    """
    step = max(1, span // COLUMNS)
    # Whole steps, so that columns keep their events as time goes on.
    end = (now // step + 1) * step
    times = range(end - step * COLUMNS, end, step)
    return {
        "times": list(times),
        "step": step,
        "stored": connection.execute("SELECT count(*) FROM events").fetchone()[0],
        "meters": [
            meter_over_time(
                connection,
                meter,
                times,
                view=views.get(meter["slug"], View()),
                horizon=horizon,
            )
            for meter in meters
        ],
        "uncounted": uncounted(connection, meters),
    }
