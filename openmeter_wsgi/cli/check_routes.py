"""Checks of the rules in ``routes`` against the application's routes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from openmeter_wsgi.cli.findings import warning
from openmeter_wsgi.framework_routes import layers_of, served_routes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.cli.findings import Finding, Situation
    from openmeter_wsgi.framework_routes import ServedRoute
    from openmeter_wsgi.middleware import OpenMeterMiddleware
    from openmeter_wsgi.routes import RouteRule

_NAME = "routes"
#: A variable in a template of any framework, and one that takes slashes, too.
_VARIABLE = re.compile(r"<[^<>]*>|\{[^{}]*\}")
_TAKES_SLASHES = re.compile(r"path|:re:|:filter|\*")
#: What stands in a regular expression and in no path.
_REGULAR = re.compile(r"[()\\^$]")
#: A part of a template that takes any text, and one that takes several parts.
_ONE, _MANY = "\0", "\1"


def look_at_unmatched(situation: Situation) -> Iterator[Finding]:
    """Say where a path that no rule matches evades a question of entitlements."""
    policy = situation.policy
    asking = [
        rule.text for rule, own in policy.of_routes if own and own.required_entitlements
    ]
    unmetered = any(
        rule.is_every_other and own is None for rule, own in policy.of_routes
    )
    if unmetered and asking:
        yield warning(
            _NAME,
            f"{asking[0]!r} requires entitlements, and '*': None lets requests pass "
            "that no other rule matches: also a path that the framework serves by the "
            "same view and reads in another way than the rule",
            "let the view itself ask: @meter(required_entitlements=[…])",
        )


def look_at_rules(middleware: OpenMeterMiddleware) -> Iterator[Finding]:
    """Name each rule that no request of the application can match."""
    layers = layers_of(middleware.app, closures=False)
    if any(hasattr(layer, "mounts") for layer in layers):
        return  # of one application among several
    routes = served_routes(middleware.app, closures=False)
    for rule, _ in middleware.policy.of_routes if routes else ():
        if not (rule.is_every_other or any(_may_match(rule, each) for each in routes)):
            yield warning(
                _NAME,
                f"{rule.text!r} matches no route of the application, so it never "
                "governs a request",
                "write it as the application's route, or leave it out",
            )


def _may_match(rule: RouteRule, route: ServedRoute) -> bool:
    methods = {"GET" if method == "HEAD" else method for method in rule.methods}
    if methods and route.methods is not None and methods.isdisjoint(route.methods):
        return False
    return _overlap(_parts(rule.path), _parts(route.template))


def _parts(template: str) -> list[str]:
    """Return a template part by part: a text, `_ONE` or `_MANY`."""
    marked = _VARIABLE.sub(
        lambda found: _MANY if _TAKES_SLASHES.search(found[0]) else _ONE, template
    )
    return [_part(part) for part in marked.strip("/").split("/")]


def _part(text: str) -> str:
    if _MANY in text or text.startswith("*") or _REGULAR.search(text):
        return _MANY
    return _ONE if _ONE in text else text


def _overlap(left: list[str], right: list[str]) -> bool:
    """Say whether some path may match both."""
    if not left or not right:
        return left == right
    if _MANY in {left[0], right[0]}:
        several, other = (left, right) if left[0] == _MANY else (right, left)
        return any(_overlap(several[1:], other[n:]) for n in range(1, len(other) + 1))
    if left[0] != right[0] and _ONE not in {left[0], right[0]}:
        return False
    return _overlap(left[1:], right[1:])
