"""The Django middleware: route, user and view of a request."""

from __future__ import annotations

import contextlib
import functools
import re
import weakref
from contextvars import ContextVar
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
from openmeter_wsgi.entitlements.handlers import EntitlementDenied, require_entitlements
from openmeter_wsgi.frameworks import LastingSubject, keep_subject, must_ask
from openmeter_wsgi.request import (
    REQUEST,
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


_REQUEST = "openmeter_wsgi.django_request"
_ROOT = "request"


def remember_request(request: HttpRequest, environ: dict[str, Any]) -> None:
    """Let subjects be read from *request*."""
    # Weakly: the request holds its environ, and both are to go when it ends.
    environ[_REQUEST] = weakref.ref(request)


def subject_from(source: str | Callable[[dict[str, Any]], Any]) -> FindSubject:
    """Return a function that finds the subject of a request in Django.

    *source* is a path that begins with ``request``, such as ``"request.user.pk"`` or
    ``"request.auth.sub"``; or a callable on the environ. It is read when the response
    starts, after every middleware.

    :raises ValueError: if it is neither.
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
        self.path = f"{root}.{path}"


def _request_of(environ: dict[str, Any]) -> HttpRequest | None:
    reference = environ.get(_REQUEST)
    return None if reference is None else reference()


_read_primary_key = path_reader("user.pk")


def _read_authenticated_user(environ: dict[str, Any]) -> object:
    # What `set_user` was given is nearer to what is meant.
    if has_user(environ):
        return None
    found = _read_primary_key(_request_of(environ))
    return None if isinstance(found, MissingPath) else found


#: Finds the primary key of the user that Django or its REST framework authenticated.
authenticated_user: FindSubject = LastingSubject(_read_authenticated_user)


class ViewMiddleware:
    """Passes route, user and view of a request to the metering around Django.

    To be named in ``MIDDLEWARE`` after what authenticates. Entitlements that the
    policy requires are asked for before the view is called; a view of the REST
    framework, which authenticates by itself, asks by its permission
    :class:`HasEntitlements`.
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
                "a request came through ASGI; it is served, not "
                "metered and not checked for entitlements, since this is a WSGI "
                "middleware: serve the project through wsgi.py"
            )
        elif environ is None or REQUEST not in environ:
            # From Django's test client, or with Django's own function in wsgi.py.
            logger.warning(
                "a request did not come through openmeter_wsgi.django."
                "get_wsgi_application; it is served and not metered: let wsgi.py call "
                "that function"
            )
        else:
            remember_request(request, environ)
        with serving(request):
            return self._get_response(request)

    def process_view(
        self, request: HttpRequest, view: Any, *_: Any
    ) -> HttpResponseBase | None:
        """Note the route, and refuse the request if its customer may not."""
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
                return refused(request, denied)
        return None

    def process_exception(
        self, request: HttpRequest, exception: Exception
    ) -> HttpResponseBase | None:
        """Answer a view that ended the request by `require_entitlements`."""
        if isinstance(exception, EntitlementDenied):
            return refused(request, exception)
        return None


def refused(request: HttpRequest, denied: EntitlementDenied) -> HttpResponse:
    """Return the answer to a denied request as a response of Django's."""
    environ: Any = environ_of(request)
    answer = Response.from_app(denied, environ)
    response = HttpResponse(answer.get_data(), status=answer.status_code)
    for name, value in answer.headers:
        if name.lower() == "set-cookie":
            response.cookies.load(value)
        else:
            response.headers[name] = value
    return response


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
    """Return the template of a resolved request's address, with the site's mount."""
    match = request.resolver_match
    if match is None:
        return None
    route = match.route or ""
    if settings.USE_I18N:
        urlconf = getattr(request, "urlconf", None) or settings.ROOT_URLCONF
        route = _untranslated(urlconf, translation.get_language(), route)
    # Django has decoded the mount.
    mount: str = request.META["SCRIPT_NAME"].rstrip("/")
    return mount + template_of(route)


@functools.lru_cache(maxsize=10_000)
def template_of(route: str | None) -> str:
    """Return the route of a resolved view as one reads it: ``/users/<int:pk>/``.

    Regular expressions, which routers of the REST framework make, lose their grammar.
    """
    text = route or ""
    if not _IS_PLAIN.fullmatch(text):
        text = patterns.remove_non_capturing_groups(text)
        text = patterns.replace_named_groups(text)
        text = patterns.replace_unnamed_groups(text)
        text = patterns.replace_metacharacters(text)
    return "/" + text.lstrip("/")


#: Templates of `django.urls.path` that nobody would mean as a regular expression.
_IS_PLAIN = re.compile(r"(?:[^^$()\\<>]|<[^()<>]*>)*")


@functools.lru_cache(maxsize=10_000)
def _untranslated(urlconf: Any, language: str | None, route: str) -> str:  # noqa: ARG001
    """Return *route* without the prefix of `i18n_patterns` and without translations.

    *language* is the active one, in which *route* is said.
    """
    resolver = get_resolver(urlconf)
    said = list(_routes(resolver.url_patterns, "", with_prefix=True))
    with translation.override(None):
        plain = list(_routes(resolver.url_patterns, "", with_prefix=False))
    return dict(zip(reversed(said), reversed(plain), strict=True)).get(route, route)


def _routes(urls: Iterable[Any], before: str, *, with_prefix: bool) -> Iterator[str]:
    """Yield the routes below *before*, joined as Django joins them."""
    for url in urls:
        is_prefix = isinstance(url.pattern, LocalePrefixPattern)
        own = "" if is_prefix and not with_prefix else str(url.pattern)
        route = before + (own.removeprefix("^") if before else own)
        if hasattr(url, "url_patterns"):
            yield from _routes(url.url_patterns, route, with_prefix=with_prefix)
        else:
            yield route


_request: ContextVar[HttpRequest | None] = ContextVar("request", default=None)


@contextlib.contextmanager
def serving(request: HttpRequest) -> Iterator[None]:
    """Note that *request* is the one that is served in this context."""
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)


def watch_users() -> None:
    """Have subjects kept where a user is lost. May be called again."""
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
    request = _request.get()
    user = getattr(request, "user", None)
    if request is not None and user is not None and user.pk == instance.pk:
        keep_subject(environ_of(request))
