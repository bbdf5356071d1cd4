"""The parts of one sandbox, as its routes find them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from flask import Flask, current_app

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.access import Access
    from openmeter_wsgi.sandbox.customers import Customers
    from openmeter_wsgi.sandbox.dashboard_cache import DashboardCache
    from openmeter_wsgi.sandbox.entitlements import Entitlements
    from openmeter_wsgi.sandbox.faults import Faults
    from openmeter_wsgi.sandbox.questions import Questions
    from openmeter_wsgi.sandbox.resources import Resources
    from openmeter_wsgi.sandbox.store import Store
    from openmeter_wsgi.sandbox.tally import Tally

_KEY = "openmeter_wsgi.sandbox"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the requests to one sandbox share. Any thread."""

    store: Store
    tally: Tally
    faults: Faults
    dashboards: DashboardCache
    meters: Resources
    customers: Customers
    entitlements: Entitlements
    access: Access
    questions: Questions
    features: Resources
    subjects: Resources

    def install(self, app: Flask) -> None:
        """Let the routes of *app* find these parts."""
        app.extensions[_KEY] = self


def parts() -> Parts:
    """Return the parts of the sandbox that serves the current request."""
    return cast("Parts", current_app.extensions[_KEY])
