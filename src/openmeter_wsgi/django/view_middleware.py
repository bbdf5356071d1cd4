"""What only Django knows of a request: its route, its user, and which view it gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.http import HttpResponse
from werkzeug.wrappers import Response

from openmeter_wsgi import log
from openmeter_wsgi.django.lost_users import serving
from openmeter_wsgi.django.route_names import route_name
from openmeter_wsgi.django.subjects import remember_request
from openmeter_wsgi.entitlements.handlers import EntitlementDenied, require_entitlements
from openmeter_wsgi.frameworks import must_ask
from openmeter_wsgi.request import REQUEST, environ_of, metered_request, set_route

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

logger = log.get_logger(__name__)


class ViewMiddleware:
    """Tells the metering around Django what happens inside of it.

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
        if environ is None or REQUEST not in environ:
            # Under ASGI, in Django's test client, or with Django's own wsgi.py.
            logger.warning(
                "%s: a request did not come through openmeter_wsgi.django."
                "get_wsgi_application, so it is not metered",
                type(self).__name__,
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
        if must_ask(environ, view) and not _has_permission_that_asks(view):
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


def _has_permission_that_asks(view: Any) -> bool:
    """Say whether a view of the REST framework asks after it has authenticated."""
    of_class = getattr(getattr(view, "cls", None), "permission_classes", ())
    own = getattr(view, "initkwargs", {}).get("permission_classes", of_class)
    return any(map(_asks, own))


def _asks(permission: Any) -> bool:
    if getattr(permission, "asks_for_entitlements", False):
        return True
    parts = (getattr(permission, name, None) for name in ("op1_class", "op2_class"))
    return any(part is not None and _asks(part) for part in parts)
