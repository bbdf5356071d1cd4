"""Usage metering for WSGI applications, billed by what was delivered."""

from typing import TYPE_CHECKING

from openmeter_wsgi.entitlements.decision import Decision as Decision
from openmeter_wsgi.entitlements.decision import Denial as Denial
from openmeter_wsgi.entitlements.handlers import EntitlementDenied as EntitlementDenied
from openmeter_wsgi.entitlements.handlers import (
    check_entitlements as check_entitlements,
)
from openmeter_wsgi.entitlements.handlers import (
    require_entitlements as require_entitlements,
)
from openmeter_wsgi.errors import ConfigError as ConfigError
from openmeter_wsgi.errors import MeterValueError as MeterValueError
from openmeter_wsgi.errors import OpenMeterWSGIError as OpenMeterWSGIError
from openmeter_wsgi.exchange import Exchange as Exchange
from openmeter_wsgi.health import Health as Health
from openmeter_wsgi.health import HealthEndpoint as HealthEndpoint
from openmeter_wsgi.health import Problem as Problem
from openmeter_wsgi.middleware import OpenMeterMiddleware as OpenMeterMiddleware
from openmeter_wsgi.request import add_meters as add_meters
from openmeter_wsgi.request import get_meters as get_meters
from openmeter_wsgi.request import set_idempotency_key as set_idempotency_key
from openmeter_wsgi.request import set_meters as set_meters
from openmeter_wsgi.request import set_route as set_route
from openmeter_wsgi.request import set_subject as set_subject
from openmeter_wsgi.request import set_user as set_user
from openmeter_wsgi.version import VERSION as __version__  # noqa: F401, N811

if TYPE_CHECKING:
    from openmeter_wsgi.measures import Measure as Measure
    from openmeter_wsgi.measures import bytes_received as bytes_received
    from openmeter_wsgi.measures import bytes_sent as bytes_sent
    from openmeter_wsgi.measures import computed as computed
    from openmeter_wsgi.measures import duration as duration
    from openmeter_wsgi.measures import llm_usage as llm_usage
    from openmeter_wsgi.measures import method as method
    from openmeter_wsgi.measures import multi_status as multi_status
    from openmeter_wsgi.measures import records as records
    from openmeter_wsgi.measures import request_header as request_header
    from openmeter_wsgi.measures import response_header as response_header
    from openmeter_wsgi.measures import response_json as response_json
    from openmeter_wsgi.measures import route as route
    from openmeter_wsgi.measures import status as status
    from openmeter_wsgi.policy import Policy as Policy
    from openmeter_wsgi.stats import Stats as Stats
    from openmeter_wsgi.status_codes import StatusCodes as StatusCodes
    from openmeter_wsgi.views import meter as meter
    from openmeter_wsgi.views import no_meter as no_meter

# What an application is made with comes with its first use: options and measures with a
# policy or a middleware, decorators with a view. What a handler calls is above, so that
# no request imports anything.
_LATE = {
    "measures": (
        "Measure", "bytes_received", "bytes_sent", "computed", "duration", "llm_usage",
        "method", "multi_status", "records", "request_header", "response_header",
        "response_json", "route", "status",
    ),
    "policy": ("Policy",),
    "stats": ("Stats",),
    "status_codes": ("StatusCodes",),
    "views": ("meter", "no_meter"),
}  # fmt: skip
_MODULE = {name: module for module, names in _LATE.items() for name in names}


def __getattr__(name: str) -> object:
    """Return a name of those that come late (PEP 562)."""
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE})
