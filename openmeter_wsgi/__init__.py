"""Usage metering for WSGI applications, billed by what was delivered."""

from typing import TYPE_CHECKING

from openmeter_wsgi.version import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from openmeter_wsgi.bodies.sdk_responses import usage_of
    from openmeter_wsgi.decorators import meter, no_meter
    from openmeter_wsgi.entitlements.decision import Decision, Denial
    from openmeter_wsgi.entitlements.handlers import (
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
    from openmeter_wsgi.tickets import defer
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
    "middleware": ("OpenMeterMiddleware",),
    "request": (
        "add_meters", "get_meters", "set_idempotency_key", "set_meters", "set_route",
        "set_subject", "set_user",
    ),
    "stats": ("Health", "HealthEndpoint", "Problem", "Stats"),
}  # fmt: skip
# These come one by one: options and measures with a policy or a middleware,
# decorators with a view.
_LATE = {
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
