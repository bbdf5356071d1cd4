"""The Django middleware, which connects each request to the metering around Django.

`ViewMiddleware` stores the route of the view, and the request itself, where subjects
are read from. It checks the entitlements of the policy before the view is called, and
answers denied requests. `watch_users` connects to signals of Django, so that a user
whom a view logs out or deletes is billed for that request.
"""

from __future__ import annotations

import contextlib
import functools
import re
import weakref
from contextvars import ContextVar
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from django.apps import apps
from django.conf import settings
from django.contrib.admindocs import utils as patterns
from django.db.models.signals import pre_delete
from django.http import HttpResponse
from django.urls import get_resolver
from django.urls.resolvers import LocalePrefixPattern
from django.utils import translation
from werkzeug.wrappers import Response

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.denials import EntitlementDenied, require_entitlements
from openmeter_wsgi.framework_base import LastingSubject, keep_subject, must_ask
from openmeter_wsgi.request import (
    REQUEST,
    billing_of,
    environ_of,
    has_user,
    metered_request,
    set_route,
)
from openmeter_wsgi.subject import MissingPath, path_reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

    from openmeter_wsgi.subject import FindSubject

logger: Final = log.get_logger(__name__)


#: Key of the environ for the request of Django.
_REQUEST = "openmeter_wsgi.django_request"
#: First name of each path to a subject.
_ROOT = "request"


def store_request(request: HttpRequest, environ: dict[str, Any]) -> None:
    """Store *request* in its environ, so that subjects can be read from it."""
    # A weak reference: the request refers to its environ, and a cycle would delay the
    # release of both.
    environ[_REQUEST] = weakref.ref(request)


def subject_from(source: str | Callable[[dict[str, Any]], Any]) -> FindSubject:
    """Return a function that finds the subject of a request in Django.

    *source* is a path that begins with ``request``, such as ``"request.user.pk"`` or
    ``"request.auth.sub"``, or a callable that takes the environ. The subject is read
    when the response starts, after every middleware.

    :raises ValueError: if *source* is neither.
    """
    if callable(source):
        return LastingSubject(source)
    root, _, path = str(source).partition(".")
    if root != _ROOT or not all(path.split(".")):
        raise ValueError(
            "expected 'header:Name', a callable on the environ, or a path such as "
            f"'request.user.pk', got {source!r}"
        )
    return SubjectAtPath(root, path)


class SubjectAtPath(LastingSubject):
    """Reads the subject at a path that begins at the request."""

    __slots__ = ("path",)

    def __init__(self, root: str, path: str) -> None:
        read = path_reader(path, root)
        super().__init__(lambda environ: read(_request_of(environ)))
        #: The whole path, such as ``request.user.pk``.
        self.path: str = f"{root}.{path}"


def _request_of(environ: dict[str, Any]) -> HttpRequest | None:
    reference = environ.get(_REQUEST)
    return None if reference is None else reference()


_read_primary_key = path_reader("user.pk")


def _read_authenticated_user(environ: dict[str, Any]) -> object:
    # A call of `set_user` is more explicit.
    if has_user(environ):
        return None
    primary_key = _read_primary_key(_request_of(environ))
    return None if isinstance(primary_key, MissingPath) else primary_key


#: Finds the primary key of the user that Django or its REST framework authenticated.
authenticated_user: FindSubject = LastingSubject(_read_authenticated_user)


class ViewMiddleware:
    """Django middleware for the route, the user and the entitlements of a request.

    It belongs at the end of ``MIDDLEWARE``, after the middleware that authenticates.
    The entitlements that the policy requires are checked before the view is called. A
    view of the REST framework authenticates later, by itself; there the permission
    class :class:`HasEntitlements` checks them.
    """

    sync_capable = True
    async_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        """Serve one request."""
        environ: Any = environ_of(request)
        if hasattr(request, "scope"):
            logger.error(
                "a request came through ASGI; it is served, but not metered and not "
                "checked for entitlements, as OpenMeter's middleware is a WSGI "
                "middleware; serve the project through wsgi.py"
            )
        elif environ is None or REQUEST not in environ:
            # It came from Django's test client, or wsgi.py calls Django's function.
            logger.warning(
                "a request did not come through openmeter_wsgi.django."
                "get_wsgi_application; it is served, but not metered; call that "
                "function in wsgi.py"
            )
        else:
            store_request(request, environ)
        with _as_current(request):
            return self._get_response(request)

    def process_view(
        self, request: HttpRequest, view: Any, *_: Any
    ) -> HttpResponseBase | None:
        """Store the route; return a response if the customer is denied access."""
        environ = environ_of(request)
        if metered_request(environ) is None:
            return None
        if (name := route_name(request)) is not None:
            set_route(request, name)
        if must_ask(environ, view) and not any(
            map(checks_entitlements, permissions_of(view) or ())
        ):
            try:
                require_entitlements(request)
            except EntitlementDenied as denied:
                return response_to_denied(request, denied)
        return None

    def process_exception(
        self, request: HttpRequest, exception: Exception
    ) -> HttpResponseBase | None:
        """Return a response if `require_entitlements` has ended the request."""
        if isinstance(exception, EntitlementDenied):
            return response_to_denied(request, exception)
        return None


def response_to_denied(request: HttpRequest, denied: EntitlementDenied) -> HttpResponse:
    """Return the answer to a denied request as a response of Django."""
    environ: Any = environ_of(request)
    answer = Response.from_app(denied, environ)
    response = HttpResponse(answer.get_data(), status=answer.status_code)
    for name, value in answer.headers:
        if name.lower() == "set-cookie":
            response.cookies.load(value)
        else:
            response.headers[name] = value
    billing = billing_of(environ)
    is_ours = billing is not None and billing.policy.denied_response is None
    is_unauthorized = response.status_code == HTTPStatus.UNAUTHORIZED
    if is_ours and is_unauthorized and (challenge := _challenge(request)):
        response.headers["WWW-Authenticate"] = challenge
    return response


def _challenge(request: HttpRequest) -> str | None:
    """Return the header WWW-Authenticate of a view of the REST framework, if any."""
    match = request.resolver_match
    of_class: Any = getattr(getattr(match, "func", None), "cls", None)
    if match is None or not hasattr(of_class, "get_authenticate_header"):
        return None
    try:
        # The instance that serves the request is not known here.
        view = of_class(**getattr(match.func, "initkwargs", {}))
        view.setup(request, *match.args, **match.kwargs)
        challenge = view.get_authenticate_header(request)
    except Exception as error:  # noqa: BLE001 - the user's code, on our path
        logger.warning(
            "view %s: get_authenticate_header raised %r; the answer 401 has "
            "WWW-Authenticate: Bearer",
            getattr(of_class, "__name__", of_class), error,
        )  # fmt: skip
        return None
    return challenge if isinstance(challenge, str) else None


def permissions_of(view: Any) -> Any:
    """Return the permission classes of a view, None outside the REST framework."""
    of_class = getattr(getattr(view, "cls", None), "permission_classes", None)
    return getattr(view, "initkwargs", {}).get("permission_classes", of_class)


def checks_entitlements(permission: Any) -> bool:
    """Return True for `HasEntitlements`, also combined by ``&`` or ``|``."""
    if getattr(permission, "asks_for_entitlements", False):
        return True
    parts = (getattr(permission, name, None) for name in ("op1_class", "op2_class"))
    return any(part is not None and checks_entitlements(part) for part in parts)


def route_name(request: HttpRequest) -> str | None:
    """Return the template of a request's path, after the mount of the site.

    None if the path is not resolved.
    """
    match = request.resolver_match
    if match is None:
        return None
    route = match.route or ""
    if settings.USE_I18N:
        urlconf = getattr(request, "urlconf", None) or settings.ROOT_URLCONF
        route = _untranslated(urlconf, translation.get_language(), route)
    # In META the mount is decoded, in the environ it is not.
    mount: str = request.META["SCRIPT_NAME"].rstrip("/")
    return mount + template_of(route)


@functools.lru_cache(maxsize=10_000)
def template_of(route: str | None) -> str:
    """Return a route of Django in readable form, such as ``/users/<int:pk>/``.

    A regular expression is simplified. Routers of the REST framework make them.
    """
    text = route or ""
    if not _PLAIN_ROUTE.fullmatch(text):
        text = patterns.remove_non_capturing_groups(text)
        text = patterns.replace_named_groups(text)
        text = patterns.replace_unnamed_groups(text)
        text = patterns.replace_metacharacters(text)
    return "/" + text.lstrip("/")


#: Matches routes of `django.urls.path` that are no regular expressions.
_PLAIN_ROUTE = re.compile(r"(?:[^^$()\\<>]|<[^()<>]*>)*")


@functools.lru_cache(maxsize=10_000)
def _untranslated(urlconf: Any, language: str | None, route: str) -> str:  # noqa: ARG001
    """Return *route* without the prefix of `i18n_patterns` and without translations.

    *language* is the active language, in which *route* is written.
    """
    resolver = get_resolver(urlconf)
    translated = list(_routes(resolver.url_patterns, "", with_prefix=True))
    with translation.override(None):
        plain = list(_routes(resolver.url_patterns, "", with_prefix=False))
    # Reversed: of equal routes the first one wins, as in Django.
    by_route = dict(zip(reversed(translated), reversed(plain), strict=True))
    return by_route.get(route, route)


def _routes(urls: Iterable[Any], parent: str, *, with_prefix: bool) -> Iterator[str]:
    """Yield the routes below *parent*, joined as Django joins them."""
    for url in urls:
        is_prefix = isinstance(url.pattern, LocalePrefixPattern)
        own = "" if is_prefix and not with_prefix else str(url.pattern)
        route = parent + (own.removeprefix("^") if parent else own)
        if hasattr(url, "url_patterns"):
            yield from _routes(url.url_patterns, route, with_prefix=with_prefix)
        else:
            yield route


#: The request that is served. Django's signal before a deletion does not name it.
_current_request: ContextVar[HttpRequest | None] = ContextVar("request", default=None)


@contextlib.contextmanager
def _as_current(request: HttpRequest) -> Iterator[None]:
    token = _current_request.set(request)
    try:
        yield
    finally:
        _current_request.reset(token)


def watch_users() -> None:
    """Keep the subject of a request when its view logs out or deletes the user.

    May be called several times.
    """
    if not apps.is_installed("django.contrib.auth"):
        return
    from django.contrib.auth import get_user_model, user_logged_out

    user_logged_out.connect(_before_log_out, dispatch_uid="openmeter_wsgi")
    pre_delete.connect(
        _before_deletion, sender=get_user_model(), dispatch_uid="openmeter_wsgi"
    )


def _before_log_out(sender: Any, request: HttpRequest, **_: Any) -> None:  # noqa: ARG001
    keep_subject(environ_of(request))


def _before_deletion(sender: Any, instance: Any, **_: Any) -> None:  # noqa: ARG001
    request = _current_request.get()
    user = getattr(request, "user", None)
    if request is not None and user is not None and user.pk == instance.pk:
        keep_subject(environ_of(request))
