"""The dashboard, computed once however many pages look at it."""

from __future__ import annotations

import threading
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.dashboard import dashboard

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from openmeter_wsgi.sandbox.curves import View
    from openmeter_wsgi.sandbox.resources import Resources
    from openmeter_wsgi.sandbox.store import Store


class DashboardCache:
    """The dashboard, computed once however many pages look at it. Any thread."""

    def __init__(self, store: Store, meters: Resources) -> None:
        self._store = store
        self._meters = meters
        self._lock = threading.Lock()
        self._known: dict[Hashable, tuple[Hashable, dict[str, Any]]] = {}

    def read(self, span: int, views: Mapping[str, View]) -> dict[str, Any]:
        """Return the dashboard of the last *span* seconds, at most a second old."""
        asked = (span, tuple(sorted(views.items(), key=itemgetter(0))))
        with self._lock:
            now = int(self._store.clock())
            state = (self._store.version, now)
            known, shown = self._known.get(asked, (None, {}))
            if known != state:
                with self._store.reading() as connection:
                    meters = self._meters.within(connection)
                    shown = dashboard(
                        connection,
                        meters,
                        span,
                        now,
                        views=views,
                        horizon=self._store.horizon(connection),
                    )
                if len(self._known) > 10:
                    self._known.clear()
                self._known[asked] = (state, shown)
            return shown
