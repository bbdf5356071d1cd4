"""Check of routes that answer 202 and bill a flat price."""

from __future__ import annotations

import dataclasses
import inspect
from types import CodeType
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.cli.check_configuration import policy_of_route
from openmeter_wsgi.cli.findings import warning
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.framework_routes import OPTIONS_ATTRIBUTE, served_routes
from openmeter_wsgi.policy import overriding_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.cli.findings import Finding, Situation
    from openmeter_wsgi.framework_routes import ServedRoute
    from openmeter_wsgi.middleware import OpenMeterMiddleware
    from openmeter_wsgi.policy import Policy

_ACCEPTED = "accepted work"
_ACCEPTED_REMEDY = (
    "let the job bill when it has succeeded: defer(request) and usage.settle(ticket, "
    "meters); or leave 202 out of meter_on_status_codes"
)
#: Names by which the code of a view says 202.
_NAMES_OF_202 = {"ACCEPTED", "HTTP_202_ACCEPTED", "HTTPAccepted"}


def look_at_accepted(situation: Situation) -> Iterator[Finding]:
    """Name each policy that bills a flat price for the status 202 by its number."""
    for route, policy in situation.policies():
        codes = policy.meter_on_status_codes.codes  # type: ignore[union-attr]
        named = "202" in codes and "203" not in codes
        if named and policy.static_meters and policy.ticket_secret is None:
            yield _accepted(route, policy)


def look_at_accepting_views(middleware: OpenMeterMiddleware) -> Iterator[Finding]:
    """Name each view that answers 202 and bills a flat price, as far as code tells."""
    for route in served_routes(middleware.app, closures=False):
        policy = _policy_of(route, middleware.policy)
        if policy is None or not policy.static_meters or not _answers_202(route.view):
            continue
        if "202" in policy.meter_on_status_codes.codes:  # type: ignore[union-attr]
            yield _accepted(repr(route.template), policy)


def _accepted(route: str | None, policy: Policy) -> Finding:
    types = ", ".join(repr(meter.type) for meter in policy.static_meters)
    return warning(
        _ACCEPTED if route is None else f"{_ACCEPTED} of {route}",
        f"the answer 202 is billed a flat price ({types}), also if the work that it "
        "promises fails",
        _ACCEPTED_REMEDY,
    )


def _policy_of(route: ServedRoute, policy: Policy) -> Policy | None:
    """Return the policy that bills *route*, None if nothing does."""
    found = policy_of_route(policy, route)
    options = getattr(route.view, OPTIONS_ATTRIBUTE, {})
    if found is None or options is None:
        return None
    try:
        return dataclasses.replace(found, routes=None, **overriding_options(options))
    except ConfigError:
        return found  # as when a request is billed; `decorated_views` reports it


def _answers_202(view: Any) -> bool:
    """Return True if the code of *view* says 202 and calls no `defer`."""
    inner = inspect.unwrap(view) if callable(view) else view
    inner = getattr(inner, "view_class", None) or getattr(inner, "cls", inner)
    functions = vars(inner).values() if isinstance(inner, type) else (inner,)
    codes = [each.__code__ for each in functions if hasattr(each, "__code__")]
    said: set[object] = set()
    for code in codes:  # it grows by the functions inside
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        said.update(code.co_names)
        for each in code.co_consts:
            said.update(each if isinstance(each, tuple) else (each,))
    says = any(each == 202 or str(each).startswith("202 ") for each in said)
    return (says or not _NAMES_OF_202.isdisjoint(said)) and "defer" not in said
