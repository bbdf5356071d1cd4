"""Checks of the rules in ``routes`` and of the views that the application serves.

A rule and a route are two templates in the syntax of two libraries. Both are split at
the slashes into parts; they overlap if some path may match both. This is an estimate:
the pattern of a variable is not compared, and a regular expression matches everything.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.cli.findings import failure, note, warning
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.framework_routes import (
    OPTIONS_ATTRIBUTE,
    handlers_of,
    layers_of,
    served_routes,
    view_class_of,
)
from openmeter_wsgi.policy import overriding_options
from openmeter_wsgi.routes import EVERY_OTHER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.cli.findings import Finding, Situation
    from openmeter_wsgi.framework_routes import ServedRoute
    from openmeter_wsgi.middleware import OpenMeterMiddleware
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.routes import RouteRule

_ROUTES = "routes"
#: Maximum number of unmetered routes that a finding lists.
_MAX_LISTED = 20
#: Methods that frameworks add to a route by themselves.
_ADDED_METHODS = {"HEAD", "OPTIONS"}


def check_unmatched_paths(situation: Situation) -> Iterator[Finding]:
    """Report entitlements that some spelling of a path may avoid."""
    policy = situation.policy
    with_entitlements = [
        rule.text
        for rule, own in policy.route_policies
        if own and own.required_entitlements
    ]
    others_unmetered = any(
        rule.is_every_other and own is None for rule, own in policy.route_policies
    )
    if others_unmetered and with_entitlements:
        yield warning(
            _ROUTES,
            f"{with_entitlements[0]!r} requires entitlements, and '*': None lets all "
            "requests pass that no other rule matches (Policy.from_zuplo adds this "
            "rule, for paths that the routes file does not name). Bottle, Falcon and "
            "Pyramid serve some of these requests by the same view, such as "
            "/users/-5 beside the rule /users/<int:id>. Flask and Django's path() "
            "read paths as the rules do",
            "check entitlements in the view: @meter(required_entitlements=[…]). Flask, "
            "and Django without re_path, do not need this",
        )


def check_rules(middleware: OpenMeterMiddleware) -> Iterator[Finding]:
    """Report rules that match no route, and routes that match no rule."""
    routes = _routes_of(middleware)
    rules = [
        rule for rule, _ in middleware.policy.route_policies if not rule.is_every_other
    ]
    if not routes or not rules:
        return
    for rule in rules:
        if not any(_may_match(rule, route) for route in routes):
            yield warning(
                _ROUTES,
                f"{rule.text!r} matches no route of the application, so it never "
                "governs a request",
                "write it as the application's route, or leave it out",
            )
    if unmetered := list(_unmetered(middleware.policy, rules, routes)):
        listed = ", ".join(unmetered[:_MAX_LISTED])
        if (others := len(unmetered) - _MAX_LISTED) > 0:
            listed += f" and {others} more"
        yield note(
            _ROUTES,
            f"not metered by any rule: {listed}",
            "add a rule to routes for each of them that customers are to pay for",
        )


def policy_of_route(policy: Policy, route: ServedRoute) -> Policy | None:
    """Return the policy of a route, None if its requests are not metered."""
    governing: Policy | None = policy
    matching = []
    for rule, own in policy.route_policies:
        if rule.is_every_other:
            governing = own
        elif _may_match(rule, route):
            matching.append((rule, own))
    if matching:
        _, governing = min(matching, key=lambda each: _generality(each[0]))
    return governing


def _routes_of(middleware: OpenMeterMiddleware) -> list[ServedRoute]:
    """Return the routes of the application, none if there are several applications."""
    layers = layers_of(middleware.app, closures=False)
    if any(hasattr(layer, "mounts") for layer in layers):  # DispatcherMiddleware
        return []
    return served_routes(middleware.app, closures=False)


def _unmetered(
    policy: Policy, rules: list[RouteRule], routes: list[ServedRoute]
) -> Iterator[str]:
    """Yield each unmetered route that no rule matches, in the form of a rule."""
    others = {rule.text: own for rule, own in policy.route_policies}.get(
        EVERY_OTHER, policy
    )
    if others is not None and (others.static_meters or others.measured):
        return
    for route in routes:
        is_excluded = getattr(route.view, OPTIONS_ATTRIBUTE, {}) is None  # by @no_meter
        # @meter has no effect where nothing is metered.
        if is_excluded or (others is not None and any(_own_options(route.view))):
            continue
        methods = [
            method
            for method in sorted((route.methods or {""}) - _ADDED_METHODS)
            if not any(_may_match(rule, _with_method(route, method)) for rule in rules)
        ]
        if methods:
            yield f"{','.join(methods)} {route.template}".strip()


def _with_method(route: ServedRoute, method: str) -> ServedRoute:
    return route._replace(methods=frozenset({method}) if method else None)


def decorated_views(
    middleware: OpenMeterMiddleware,
) -> tuple[list[tuple[str, Policy]], list[Finding]]:
    """Return the policies of views with options of their own, and wrong options."""
    policies: list[tuple[str, Policy]] = []
    problems: list[Finding] = []
    seen = set()
    for route in served_routes(middleware.app):
        governing = policy_of_route(middleware.policy, route)
        # A router of the REST framework has several routes to one view.
        if governing is None or (id(route.view), id(governing)) in seen:
            continue
        seen.add((id(route.view), id(governing)))
        for name, options, remedy in _own_options(route.view):
            try:
                own = overriding_options(options)
                policy = dataclasses.replace(governing, routes=None, **own)
            except ConfigError as error:
                problems.append(failure(f"view {name!r}", str(error), remedy))
            else:
                policies.append((name, policy))
    return policies, list(dict.fromkeys(problems))


def _own_options(view: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the options of a view, of its class and of its functions.

    Each comes with the name of its object, and with the remedy if it is wrong.
    """
    view_class = view_class_of(view)
    for function in (view, *handlers_of(view)):
        if options := getattr(function, OPTIONS_ATTRIBUTE, None):
            named = view_class if function is view and view_class else function
            remedy = "correct its @meter: its requests are billed as those of its route"
            yield getattr(named, "__qualname__", repr(named)), options, remedy
    # `HasEntitlements` reads this attribute of a view of the REST framework.
    features = getattr(view_class, "required_entitlements", None)
    if features and isinstance(features, str | list | tuple | set | frozenset):
        options = {"meter": None, "meters": None, "required_entitlements": features}
        remedy = "correct its required_entitlements: no customer has such a feature"
        yield view_class.__qualname__, options, remedy


#: A variable in a template of any framework.
_VARIABLE = re.compile(r"<[^<>]*>|\{[^{}]*\}")
#: The mark of a variable that also matches slashes.
_TAKES_SLASHES = re.compile(r"path|:re:|:filter|\*")
#: Characters of a regular expression that no path contains.
_REGULAR = re.compile(r"[()\\^$]")
#: A part of a template that matches any text, and one that matches several parts.
_ANY_PART, _ANY_PARTS = "\0", "\1"


def _may_match(rule: RouteRule, route: ServedRoute) -> bool:
    """Return True if some request may match both *rule* and *route*."""
    methods = {"GET" if method == "HEAD" else method for method in rule.methods}
    if methods and route.methods is not None and methods.isdisjoint(route.methods):
        return False
    return _overlap(_parts(rule.path), _parts(route.template))


def _generality(rule: RouteRule) -> tuple[int, int, bool]:
    """Return a sort key of *rule*; the most specific rule is the smallest."""
    parts = _parts(rule.path)
    return parts.count(_ANY_PARTS), parts.count(_ANY_PART), not rule.methods


def _parts(template: str) -> list[str]:
    """Return the parts of a template: texts, `_ANY_PART` and `_ANY_PARTS`."""
    marked = _VARIABLE.sub(
        lambda variable: (
            _ANY_PARTS if _TAKES_SLASHES.search(variable[0]) else _ANY_PART
        ),
        template,
    )
    return [_part(part) for part in marked.strip("/").split("/")]


def _part(text: str) -> str:
    if _ANY_PARTS in text or text.startswith("*") or _REGULAR.search(text):
        return _ANY_PARTS
    return _ANY_PART if _ANY_PART in text else text


def _overlap(left: list[str], right: list[str]) -> bool:
    """Return True if a path can match both."""
    if not left or not right:
        return left == right
    if _ANY_PARTS in {left[0], right[0]}:
        several, other = (left, right) if left[0] == _ANY_PARTS else (right, left)
        return any(_overlap(several[1:], other[n:]) for n in range(1, len(other) + 1))
    if left[0] != right[0] and _ANY_PART not in {left[0], right[0]}:
        return False
    return _overlap(left[1:], right[1:])
