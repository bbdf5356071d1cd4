"""Usage metering for WSGI applications, billed by what was delivered."""

from typing import TYPE_CHECKING

from openmeter_wsgi.version import VERSION as __version__  # noqa: F401, N811

if TYPE_CHECKING:
    from openmeter_wsgi.bodies.sdk import usage_of as usage_of
    from openmeter_wsgi.decorators import meter as meter
    from openmeter_wsgi.decorators import no_meter as no_meter
    from openmeter_wsgi.entitlements.decision import Decision as Decision
    from openmeter_wsgi.entitlements.decision import Denial as Denial
    from openmeter_wsgi.entitlements.handlers import (
        EntitlementDenied as EntitlementDenied,
    )
    from openmeter_wsgi.entitlements.handlers import (
        check_entitlements as check_entitlements,
    )
    from openmeter_wsgi.entitlements.handlers import (
        require_entitlements as require_entitlements,
    )
    from openmeter_wsgi.errors import ConfigError as ConfigError
    from openmeter_wsgi.errors import MeterValueError as MeterValueError
    from openmeter_wsgi.errors import OpenMeterWSGIError as OpenMeterWSGIError
    from openmeter_wsgi.errors import TicketError as TicketError
    from openmeter_wsgi.exchange import Exchange as Exchange
    from openmeter_wsgi.health import Health as Health
    from openmeter_wsgi.health import HealthEndpoint as HealthEndpoint
    from openmeter_wsgi.health import Problem as Problem
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
    from openmeter_wsgi.middleware import OpenMeterMiddleware as OpenMeterMiddleware
    from openmeter_wsgi.policy import Policy as Policy
    from openmeter_wsgi.request import add_meters as add_meters
    from openmeter_wsgi.request import get_meters as get_meters
    from openmeter_wsgi.request import set_idempotency_key as set_idempotency_key
    from openmeter_wsgi.request import set_meters as set_meters
    from openmeter_wsgi.request import set_route as set_route
    from openmeter_wsgi.request import set_subject as set_subject
    from openmeter_wsgi.request import set_user as set_user
    from openmeter_wsgi.stats import Stats as Stats
    from openmeter_wsgi.status_codes import StatusCodes as StatusCodes
    from openmeter_wsgi.tickets import defer as defer
    from openmeter_wsgi.usage import Usage as Usage

# The package alone imports nothing: its pytest plugin is loaded in every run of
# pytest. The first of these names imports all of them, so that no request does.
_TOGETHER = {
    "entitlements.decision": ("Decision", "Denial"),
    "entitlements.handlers": (
        "EntitlementDenied", "check_entitlements", "require_entitlements",
    ),
    "errors": (
        "ConfigError", "MeterValueError", "OpenMeterWSGIError", "TicketError",
    ),
    "exchange": ("Exchange",),
    "health": ("Health", "HealthEndpoint", "Problem"),
    "middleware": ("OpenMeterMiddleware",),
    "request": (
        "add_meters", "get_meters", "set_idempotency_key", "set_meters", "set_route",
        "set_subject", "set_user",
    ),
}  # fmt: skip
# These come one by one: options and measures with a policy or a middleware,
# decorators with a view.
_LATE = {
    "bodies.sdk": ("usage_of",),
    "decorators": ("meter", "no_meter"),
    "measures": (
        "Measure", "bytes_received", "bytes_sent", "computed", "duration", "llm_usage",
        "method", "multi_status", "records", "request_header", "response_header",
        "response_json", "route", "status",
    ),
    "policy": ("Policy",),
    "status_codes": ("StatusCodes",),
    "stats": ("Stats",),
    "tickets": ("defer",),
    "usage": ("Usage",),
}  # fmt: skip
_MODULE = {
    name: module
    for modules in (_TOGETHER, _LATE)
    for module, names in modules.items()
    for name in names
}
_AT_ONCE = frozenset(name for names in _TOGETHER.values() for name in names)


def __getattr__(name: str) -> object:
    """Return a name that is imported when it is first used (PEP 562)."""
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    for each in _AT_ONCE if name in _AT_ONCE else (name,):
        found: object = getattr(import_module(f"{__name__}.{_MODULE[each]}"), each)
        globals()[each] = found
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE})
