"""Code that Flask and Django share: the policy and the subject."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from openmeter_wsgi.decorators import checks_own_entitlements
from openmeter_wsgi.entitlements.handlers import quota_headers
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
    """Subjects that were read while a framework served a request, by reader."""

    #: Read when the response started; None before.
    found: dict[object, Any] | None
    #: Read before the view logged out the user.
    kept: dict[object, Any]


class FrameworkMiddleware(OpenMeterMiddleware):
    """The middleware around a framework that authenticates users itself.

    It reads the subject when the response starts, while the framework still serves the
    request. The package of the framework checks entitlements.
    """

    _checks_entitlements_first = False

    def __init__(self, app: WSGIApplication, policy: Policy) -> None:
        super().__init__(_StartingResponse(app), policy)


class _StartingResponse:
    """The application of a framework; reads the subject when the response starts."""

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(
        self, environ: dict[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        # Also of an unmetered request, to show that it passed the middleware.
        request = record_of(environ)
        if request.billing is None:
            return self._app(environ, start_response)

        def start(
            status: str, headers: list[tuple[str, str]], exc_info: Any = None
        ) -> Callable[[bytes], object]:
            _remember_subject(environ, request, status)
            told = _with_quota(request, headers)
            if exc_info is None:
                return start_response(status, told)
            return start_response(status, told, exc_info)

        return self._app(environ, start)


def _remember_subject(
    environ: dict[str, Any], request: RequestRecord, status: str
) -> None:
    billing: Billing = request.billing  # type: ignore[assignment] # perhaps the view's
    is_unmetered = request.usage is not None and request.usage.is_unmetered
    # No user is loaded from a database for a request that is not billed.
    kept = {} if request.remembered is None else request.remembered.kept
    is_billed = billing.bills(status) and not is_unmetered
    request.remembered = RememberedSubjects({} if is_billed else None, kept)
    if is_billed:
        billing.subjects.find(environ)


def keep_subject(environ: dict[str, Any] | None) -> None:
    """Keep the subject before a view logs out or deletes its user.

    It is billed unless there is another subject when the response starts.
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
    told = {name.lower() for name, _ in headers}  # a denial has them already
    quota = quota_headers(request.decision.quota)
    return [*headers, *(each for each in quota if each[0].lower() not in told)]


class LastingSubject:
    """Reads a subject while the framework serves the request, and keeps it.

    The subject that is read when the response starts is used at its end.
    """

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
            # Anonymous users have an empty name.
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
    """Return the policy of variables and *options*, of which the later ones win.

    A *policy* takes the place of the variables.

    *read_subject* returns what finds a subject of the framework's own, and raises
    ValueError if it is none. *default_source* is the name of the application.

    :raises ConfigError: with every problem of the configuration.
    """
    given: dict[str, Any] = {} if policy else read_text_options(os.environ)
    for each in options:
        given |= each
    problems: list[str] = []
    given = _with_subject(given, "", read_subject, problems)
    if given.get("subject") is None and not (policy and policy.subject):
        given["subject"] = default_subject
    source = given.get("event_source", policy.event_source if policy else None)
    if source in {None, DEFAULT_SOURCE} and source_problem(default_source) is None:
        given["event_source"] = default_source
    if isinstance(routes := given.get("routes"), dict):
        given["routes"] = {
            rule: _with_subject(own, f"routes[{rule!r}]: ", read_subject, problems)
            if isinstance(own, dict)
            else own
            for rule, own in routes.items()
        }
    try:
        made = dataclasses.replace(policy, **given) if policy else Policy(**given)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return made


def _with_subject(
    options: Mapping[str, Any],
    where: str,
    read_subject: Callable[[Any], FindSubject],
    problems: list[str],
) -> dict[str, Any]:
    """Return *options* with the framework's own form of a subject read."""
    subject = options.get("subject")
    if subject is None or (isinstance(subject, str) and subject.startswith("header:")):
        return dict(options)
    try:
        return {**options, "subject": read_subject(subject)}
    except ValueError as error:
        problems.append(f"{where}subject: {error}")
        return {**options, "subject": None}
