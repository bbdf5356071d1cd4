"""Check of routes that answer 202 and bill a flat price.

202 promises work that a job does later. A flat price bills the promise, also if the
job fails. Two sources show that a route answers 202: the code of its view, and a policy
that names this status code by itself, not within a range.
"""

from __future__ import annotations

import dataclasses
import inspect
from types import CodeType
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.cli.check_routes import policy_of_route
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
#: Names that stand for the status 202 in the code of a view.
_NAMES_OF_202 = {"ACCEPTED", "HTTP_202_ACCEPTED", "HTTPAccepted"}


def check_accepted_work(situation: Situation) -> Iterator[Finding]:
    """Report each view, or else each policy, that bills a flat price for 202."""
    # A policy that inherits its status codes is not reported once more.
    reported_codes = []
    if situation.middleware is not None:
        for route, policy in _views_answering_202(situation.middleware):
            reported_codes.append(policy.meter_on_status_codes)
            yield _accepted(repr(route.template), policy)
    for name, policy in situation.policies():
        codes = policy.meter_on_status_codes.codes  # type: ignore[union-attr]
        names_202 = "202" in codes and "203" not in codes
        is_reported = policy.meter_on_status_codes in reported_codes
        if not names_202 or is_reported or policy.ticket_secret is not None:
            continue
        if policy.static_meters:
            yield _accepted(name, policy)


def _accepted(route: str | None, policy: Policy) -> Finding:
    types = ", ".join(repr(meter.type) for meter in policy.static_meters)
    return warning(
        _ACCEPTED if route is None else f"{_ACCEPTED} of {route}",
        f"the answer 202 is billed a flat price ({types}), also if the work that it "
        "promises fails",
        _ACCEPTED_REMEDY,
    )


def _views_answering_202(
    middleware: OpenMeterMiddleware,
) -> Iterator[tuple[ServedRoute, Policy]]:
    """Yield the routes whose view answers 202 at a flat price, and their policy."""
    for route in served_routes(middleware.app, closures=False):
        for function in _functions_answering_202(route.view):
            policy = _policy_of(route, function, middleware.policy)
            if policy is None or not policy.static_meters:
                continue
            if "202" in policy.meter_on_status_codes.codes:  # type: ignore[union-attr]
                yield route, policy
                break


def _policy_of(route: ServedRoute, function: Any, policy: Policy) -> Policy | None:
    """Return the policy of *function*, which serves *route*; None: it is unmetered."""
    governing = policy_of_route(policy, route)
    of_view = getattr(route.view, OPTIONS_ATTRIBUTE, {})
    options = getattr(function, OPTIONS_ATTRIBUTE, of_view)
    if governing is None or options is None:
        return None
    try:
        own = overriding_options(options)
        return dataclasses.replace(governing, routes=None, **own)
    except ConfigError:
        # A request is then billed by its route; `decorated_views` reports the error.
        return governing


def _functions_answering_202(view: Any) -> list[Any]:
    """Return the functions of *view* that name 202, none if one calls `defer`."""
    view_class, handlers = view_class_of(view), handlers_of(view)
    members = [view] if view_class is None else [*vars(view_class).values(), *handlers]
    if any("defer" in _words(member) for member in members):
        return []
    # A route of a ViewSet is served by some of its functions.
    serving = handlers if hasattr(view, "actions") else members
    return [function for function in serving if _names_202(_words(function))]


def _names_202(words: set[object]) -> bool:
    is_202 = any(word == 202 or str(word).startswith("202 ") for word in words)
    return is_202 or not _NAMES_OF_202.isdisjoint(words)


def _words(function: Any) -> set[object]:
    """Return the names and constants in the code of *function*, inner ones included."""
    inner = inspect.unwrap(function) if callable(function) else function
    waiting = [inner.__code__] if hasattr(inner, "__code__") else []
    words: set[object] = set()
    while waiting:
        code = waiting.pop()
        words.update(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):  # a function inside
                waiting.append(constant)
            words.update(constant if isinstance(constant, tuple) else [constant])
    return words
