"""Check of routes that answer 202 and bill a flat price."""

from __future__ import annotations

import dataclasses
import inspect
from types import CodeType
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.cli.check_configuration import policy_of_route
from openmeter_wsgi.cli.findings import warning
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.framework_routes import (
    OPTIONS_ATTRIBUTE,
    handlers_of,
    served_routes,
    view_class_of,
)
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
        for function in _accepting(route.view):
            policy = _policy_of(route, function, middleware.policy)
            if policy is None or not policy.static_meters:
                continue
            if "202" in policy.meter_on_status_codes.codes:  # type: ignore[union-attr]
                yield _accepted(repr(route.template), policy)
                break


def _accepted(route: str | None, policy: Policy) -> Finding:
    types = ", ".join(repr(meter.type) for meter in policy.static_meters)
    return warning(
        _ACCEPTED if route is None else f"{_ACCEPTED} of {route}",
        f"the answer 202 is billed a flat price ({types}), also if the work that it "
        "promises fails",
        _ACCEPTED_REMEDY,
    )


def _policy_of(route: ServedRoute, function: Any, policy: Policy) -> Policy | None:
    """Return the policy of *function*, which serves *route*; None: it is unmetered."""
    found = policy_of_route(policy, route)
    of_view = getattr(route.view, OPTIONS_ATTRIBUTE, {})
    options = getattr(function, OPTIONS_ATTRIBUTE, of_view)
    if found is None or options is None:
        return None
    try:
        return dataclasses.replace(found, routes=None, **overriding_options(options))
    except ConfigError:
        return found  # as when a request is billed; `decorated_views` reports it


def _accepting(view: Any) -> list[Any]:
    """Return the functions of *view* whose code says 202, none if it calls `defer`."""
    of_class, handlers = view_class_of(view), handlers_of(view)
    members = [view] if of_class is None else [*vars(of_class).values(), *handlers]
    if any("defer" in _words(member) for member in members):
        return []
    # A route of a ViewSet is served by some of its functions.
    serving = handlers if hasattr(view, "actions") else members
    return [function for function in serving if _says_202(_words(function))]


def _says_202(words: set[object]) -> bool:
    says = any(each == 202 or str(each).startswith("202 ") for each in words)
    return says or not _NAMES_OF_202.isdisjoint(words)


def _words(function: Any) -> set[object]:
    """Return the names and constants in the code of *function*, inner ones included."""
    inner = inspect.unwrap(function) if callable(function) else function
    codes = [inner.__code__] if hasattr(inner, "__code__") else []
    words: set[object] = set()
    for code in codes:  # it grows by the functions inside
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        words.update(code.co_names)
        for each in code.co_consts:
            words.update(each if isinstance(each, tuple) else (each,))
    return words
