"""What the edges of frameworks share: who is calling is known only inside them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.entitlements.refusal import quota_headers
from openmeter_wsgi.environ import DECISION, METERS, STATED, billing_of
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.meters import RunTimeMeters
from openmeter_wsgi.middleware import OpenMeterMiddleware
from openmeter_wsgi.policy import Policy, read_text_options
from openmeter_wsgi.views import asks_itself

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, MutableMapping
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_wsgi.billing import Billing
    from openmeter_wsgi.subject import FindSubject

#: Whether a request came through the middleware, metered or not.
CAME_THROUGH = "openmeter_wsgi.came_through"
#: Subjects that were read when the response started, by what read them.
_REMEMBERED = "openmeter_wsgi.remembered_subjects"
#: Subjects that were read before the view lost them, by what read them.
_KEPT = "openmeter_wsgi.kept_subjects"


class FrameworkMiddleware(OpenMeterMiddleware):
    """A middleware around a framework, which authenticates inside of it.

    The subject is read when the response starts, while the framework still serves the
    request, and entitlements are asked for by the framework's edge.
    """

    _asks_first = False

    def __init__(self, app: WSGIApplication, policy: Policy) -> None:
        super().__init__(_StartingResponse(app), policy)


class _StartingResponse:
    """A WSGI application that sees to what only its framework knows."""

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(
        self, environ: dict[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        environ[CAME_THROUGH] = True
        if METERS not in environ:
            return self._app(environ, start_response)

        def start(
            status: str, headers: list[tuple[str, str]], *exc_info: Any
        ) -> Callable[[bytes], object]:
            _remember_subject(environ, status)
            return start_response(status, _with_quota(environ, headers), *exc_info)

        return self._app(environ, start)


def _remember_subject(environ: dict[str, Any], status: str) -> None:
    billing: Billing = billing_of(environ)  # a decorated view's, by now
    environ.pop(_REMEMBERED, None)
    # A user is not loaded from a database for what is not billed.
    if billing.bills(status) and not _is_unmetered(environ):
        environ[_REMEMBERED] = {}
        billing.find_subject(environ)


def keep_subject(environ: MutableMapping[str, Any] | None) -> None:
    """Keep who is billed, as the view is about to log out its user, or to delete it.

    Unless there is another one when the response starts, it is that one.
    """
    billing: Billing | None = billing_of(environ)
    if environ is None or billing is None or _REMEMBERED in environ:
        return
    kept: dict[object, Any] = {}
    environ[_REMEMBERED] = kept
    try:
        billing.find_subject(environ)  # type: ignore[arg-type]
    finally:
        del environ[_REMEMBERED]
    environ[_KEPT] = kept


def _is_unmetered(environ: dict[str, Any]) -> bool:
    stated = environ[METERS][STATED]
    return isinstance(stated, RunTimeMeters) and stated.governed_by is None


def _with_quota(
    environ: dict[str, Any], headers: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Return *headers* with what is known of the quota, if the policy wants that."""
    billing: Billing = billing_of(environ)
    decision = environ.get(DECISION)
    if decision is None or not billing.policy.usage_headers:
        return headers
    told = {name.lower() for name, _ in headers}  # by a refusal
    quota = quota_headers(decision.quota)
    return [*headers, *(each for each in quota if each[0].lower() not in told)]


class LastingSubject:
    """A subject that can be read only while the framework serves the request.

    What is read when the response starts holds to its end.
    """

    __slots__ = ("_read",)

    def __init__(self, read: Callable[[dict[str, Any]], Any]) -> None:
        self._read = read

    def __call__(self, environ: dict[str, Any]) -> Any:
        """Return the subject, None if there is none."""
        remembered = environ.get(_REMEMBERED)
        if remembered is None:
            return self._read(environ)
        if self not in remembered:
            found = self._read(environ)
            # Anonymous users have an empty name.
            if (found is None or found == "") and _KEPT in environ:
                found = environ[_KEPT].get(self)
            remembered[self] = found
        return remembered[self]


def must_ask(environ: MutableMapping[str, Any] | None, view: object) -> bool:
    """Say whether *view* may be called for this request only after a decision."""
    billing: Billing | None = billing_of(environ)
    if environ is None or billing is None or asks_itself(view):
        return False
    return billing.must_ask(environ)  # type: ignore[arg-type]


def make_policy(
    *options: Mapping[str, Any],
    read_subject: Callable[[Any], FindSubject],
    default_subject: FindSubject,
) -> Policy:
    """Return the policy of variables and *options*, of which the later ones win.

    *read_subject* returns what finds a subject of the framework's own, and raises
    ValueError if it is none.

    :raises ConfigError: with every problem of the configuration.
    """
    given: dict[str, Any] = read_text_options(os.environ)
    for each in options:
        given |= each
    problems: list[str] = []
    given = _with_subject(given, "", read_subject, problems)
    if given.get("subject") is None:
        given["subject"] = default_subject
    if isinstance(routes := given.get("routes"), dict):
        given["routes"] = {
            rule: _with_subject(own, f"routes[{rule!r}]: ", read_subject, problems)
            if isinstance(own, dict)
            else own
            for rule, own in routes.items()
        }
    try:
        policy = Policy(**given)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return policy


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
