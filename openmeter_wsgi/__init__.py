"""WSGI middleware that meters delivered responses and sends the usage to OpenMeter.

Importing the package imports none of its modules: pytest loads its plugin in every run.
Each public name is imported on first use (PEP 562).
"""

from typing import TYPE_CHECKING

from openmeter_wsgi.version import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from openmeter_wsgi.bodies.sdk_responses import usage_of
    from openmeter_wsgi.decorators import meter, no_meter
    from openmeter_wsgi.deferred_usage import defer
    from openmeter_wsgi.entitlements.decision import Decision, Denial
    from openmeter_wsgi.entitlements.denials import (
        EntitlementDenied,
        check_entitlements,
        require_entitlements,
    )
    from openmeter_wsgi.errors import (
        ConfigError,
        MeterValueError,
        OpenMeterWSGIError,
        TicketError,
    )
    from openmeter_wsgi.exchange import Exchange
    from openmeter_wsgi.measures import (
        Measure,
        bytes_received,
        bytes_sent,
        computed,
        duration,
        llm_usage,
        method,
        multi_status,
        records,
        request_header,
        response_header,
        response_json,
        route,
        status,
    )
    from openmeter_wsgi.middleware import OpenMeterMiddleware
    from openmeter_wsgi.option_types import Options, RouteOptions
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.request import (
        add_meters,
        get_meters,
        set_idempotency_key,
        set_meters,
        set_route,
        set_subject,
        set_user,
    )
    from openmeter_wsgi.stats import Health, HealthEndpoint, Problem, Stats
    from openmeter_wsgi.status_codes import StatusCodes
    from openmeter_wsgi.usage import Usage

__all__ = [
    "ConfigError",
    "Decision",
    "Denial",
    "EntitlementDenied",
    "Exchange",
    "Health",
    "HealthEndpoint",
    "Measure",
    "MeterValueError",
    "OpenMeterMiddleware",
    "OpenMeterWSGIError",
    "Options",
    "Policy",
    "Problem",
    "RouteOptions",
    "Stats",
    "StatusCodes",
    "TicketError",
    "Usage",
    "__version__",
    "add_meters",
    "bytes_received",
    "bytes_sent",
    "check_entitlements",
    "computed",
    "defer",
    "duration",
    "get_meters",
    "llm_usage",
    "meter",
    "method",
    "multi_status",
    "no_meter",
    "records",
    "request_header",
    "require_entitlements",
    "response_header",
    "response_json",
    "route",
    "set_idempotency_key",
    "set_meters",
    "set_route",
    "set_subject",
    "set_user",
    "status",
    "usage_of",
]

# Public names by module. The first use of one of these names imports all of them, so
# that no request imports a module.
_IMPORTED_TOGETHER = {
    "entitlements.decision": ("Decision", "Denial"),
    "entitlements.denials": (
        "EntitlementDenied", "check_entitlements", "require_entitlements",
    ),
    "errors": (
        "ConfigError", "MeterValueError", "OpenMeterWSGIError", "TicketError",
    ),
    "exchange": ("Exchange",),
    "middleware": ("OpenMeterMiddleware",),
    "request": (
        "add_meters", "get_meters", "set_idempotency_key", "set_meters", "set_route",
        "set_subject", "set_user",
    ),
    "stats": ("Health", "HealthEndpoint", "Problem", "Stats"),
}  # fmt: skip
# These names are imported one by one: an application needs few of them, and needs them
# while it is set up.
_IMPORTED_SINGLY = {
    "bodies.sdk_responses": ("usage_of",),
    "decorators": ("meter", "no_meter"),
    "measures": (
        "Measure", "bytes_received", "bytes_sent", "computed", "duration", "llm_usage",
        "method", "multi_status", "records", "request_header", "response_header",
        "response_json", "route", "status",
    ),
    "option_types": ("Options", "RouteOptions"),
    "policy": ("Policy",),
    "status_codes": ("StatusCodes",),
    "deferred_usage": ("defer",),
    "usage": ("Usage",),
}  # fmt: skip
_MODULE_OF = {
    name: module
    for modules in (_IMPORTED_TOGETHER, _IMPORTED_SINGLY)
    for module, names in modules.items()
    for name in names
}
_NAMES_TOGETHER = tuple(name for names in _IMPORTED_TOGETHER.values() for name in names)


def __getattr__(name: str) -> object:
    """Import and return a public name on its first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    for needed in _NAMES_TOGETHER if name in _NAMES_TOGETHER else (name,):
        module = import_module(f"{__name__}.{_MODULE_OF[needed]}")
        globals()[needed] = getattr(module, needed)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
