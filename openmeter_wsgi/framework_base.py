"""Code for Flask and Django: middleware, policy, and subjects of authenticated users.

A framework knows its user only while it serves a request, but a request is billed when
its response is closed. So `FrameworkMiddleware` reads the subject when the response
starts, and `LastingSubject` keeps it until the end. A view that logs out its user keeps
the subject with `keep_subject` before.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from openmeter_wsgi.decorators import checks_own_entitlements
from openmeter_wsgi.entitlements.denials import quota_headers
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.framework_routes import handler_of
from openmeter_wsgi.middleware import OpenMeterMiddleware
from openmeter_wsgi.policy import DEFAULT_SOURCE, Policy, read_text_options
from openmeter_wsgi.request import (
    REQUEST,
    RequestRecord,
    billing_of,
    metered_request,
    method_of,
    record_of,
)
from openmeter_wsgi.subject import MissingPath
from openmeter_wsgi.values import source_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_wsgi.billing import Billing
    from openmeter_wsgi.subject import FindSubject


class RememberedSubjects(NamedTuple):
    """The subjects of a request, by the `LastingSubject` that read them."""

    #: Subjects read when the response starts; None before.
    found: dict[object, Any] | None
    #: Subjects kept before a view logs out the user.
    kept: dict[object, Any]


class FrameworkMiddleware(OpenMeterMiddleware):
    """The middleware around a framework that authenticates users itself.

    It does not check entitlements: the code for the framework does, before the view.
    """

    _checks_entitlements_first = False

    def __init__(self, app: WSGIApplication, policy: Policy) -> None:
        super().__init__(_StartingResponse(app), policy)


class _StartingResponse:
    """Wraps a framework's application; reads the subject when a response starts."""

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(
        self, environ: dict[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        # Created for an unmetered request, too: it marks the environ as seen.
        request = record_of(environ)
        if request.billing is None:
            return self._app(environ, start_response)

        def start(
            status: str, headers: list[tuple[str, str]], exc_info: Any = None
        ) -> Callable[[bytes], object]:
            _remember_subject(environ, request, status)
            headers = _with_quota(request, headers)
            if exc_info is None:
                return start_response(status, headers)
            return start_response(status, headers, exc_info)

        return self._app(environ, start)


def _remember_subject(
    environ: dict[str, Any], request: RequestRecord, status: str
) -> None:
    # Read again: a decorator of the view may have replaced it.
    billing: Billing = request.billing  # type: ignore[assignment]
    is_unmetered = request.usage is not None and request.usage.is_unmetered
    # For a request that is not billed, no user is loaded from a database.
    kept = {} if request.remembered is None else request.remembered.kept
    is_billed = billing.bills(status) and not is_unmetered
    request.remembered = RememberedSubjects({} if is_billed else None, kept)
    if is_billed:
        billing.subjects.find(environ)


def keep_subject(environ: dict[str, Any] | None) -> None:
    """Read the subject before a view logs out or deletes its user.

    This subject is billed if there is no other one when the response starts.
    """
    request = metered_request(environ)
    if environ is None or request is None or request.billing is None:
        return
    if request.remembered is not None and request.remembered.found is not None:
        return
    kept: dict[object, Any] = {}
    request.remembered = RememberedSubjects(kept, {})
    try:
        request.billing.subjects.find(environ)
    finally:
        request.remembered = RememberedSubjects(None, kept)


def _with_quota(
    request: RequestRecord, headers: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Return *headers* with RateLimit headers, if the policy wants them."""
    billing: Billing = request.billing  # type: ignore[assignment]
    if request.decision is None or not billing.policy.usage_headers:
        return headers
    names = {name.lower() for name, _ in headers}  # a denial has them already
    quota = quota_headers(request.decision.quota)
    return [*headers, *(header for header in quota if header[0].lower() not in names)]


class LastingSubject:
    """Finds a subject while the framework serves the request, for use at its end."""

    __slots__ = ("_read",)

    def __init__(self, read: Callable[[dict[str, Any]], Any]) -> None:
        self._read = read

    def __call__(self, environ: dict[str, Any]) -> Any:
        """Return the subject, None if there is none."""
        request: RequestRecord | None = environ.get(REQUEST)
        remembered = None if request is None else request.remembered
        if remembered is None or remembered.found is None:
            return self._read(environ)
        if self not in remembered.found:
            found = self._read(environ)
            # The name of an anonymous user is empty.
            if found is None or found == "" or isinstance(found, MissingPath):
                found = remembered.kept.get(self, found)
            remembered.found[self] = found
        return remembered.found[self]


def must_ask(environ: dict[str, Any] | None, view: object) -> bool:
    """Return True if entitlements must be checked before *view* is called."""
    billing = billing_of(environ)
    if environ is None or billing is None or not billing.needs_decision(environ):
        return False
    handler = handler_of(view, method_of(environ))
    return not (checks_own_entitlements(view) or checks_own_entitlements(handler))


def make_policy(
    *options: Mapping[str, Any],
    policy: Policy | None = None,
    read_subject: Callable[[Any], FindSubject],
    default_subject: FindSubject,
    default_source: str,
) -> Policy:
    """Return the policy of variables and *options*; later mappings win.

    :param policy: used in place of the variables.
    :param read_subject: parses a subject in the framework's own form and returns the
        function that finds it; raises ValueError if it is invalid.
    :param default_source: the name of the application.
    :raises ConfigError: with every problem of the configuration.
    """
    given: dict[str, Any] = {} if policy else read_text_options(os.environ)
    for mapping in options:
        given |= mapping
    problems: list[str] = []
    given = _parse_subject(given, "", read_subject, problems)
    if given.get("subject") is None and not (policy and policy.subject):
        given["subject"] = default_subject
    source = given.get("event_source", policy.event_source if policy else None)
    if source in {None, DEFAULT_SOURCE} and source_problem(default_source) is None:
        given["event_source"] = default_source
    if isinstance(routes := given.get("routes"), dict):
        given["routes"] = {
            rule: _parse_subject(own, f"routes[{rule!r}]: ", read_subject, problems)
            if isinstance(own, dict)
            else own
            for rule, own in routes.items()
        }
    try:
        result = dataclasses.replace(policy, **given) if policy else Policy(**given)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return result


def _parse_subject(
    options: Mapping[str, Any],
    where: str,
    read_subject: Callable[[Any], FindSubject],
    problems: list[str],
) -> dict[str, Any]:
    """Return *options* with a subject in the framework's own form parsed."""
    subject = options.get("subject")
    if subject is None or (isinstance(subject, str) and subject.startswith("header:")):
        return dict(options)
    try:
        return {**options, "subject": read_subject(subject)}
    except ValueError as error:
        problems.append(f"{where}subject: {error}")
        return {**options, "subject": None}
