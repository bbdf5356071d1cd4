"""A permission class of the REST framework that checks entitlements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rest_framework.settings import api_settings  # type: ignore[import-untyped]

from openmeter_wsgi import log
from openmeter_wsgi.decorators import checks_own_entitlements
from openmeter_wsgi.django.view_middleware import checks_entitlements
from openmeter_wsgi.entitlements.denials import require_entitlements
from openmeter_wsgi.framework_base import must_ask
from openmeter_wsgi.framework_routes import handler_of
from openmeter_wsgi.request import billing_of, environ_of, is_options, method_of

if TYPE_CHECKING:
    from rest_framework.request import Request  # type: ignore[import-untyped]

    class BasePermission:
        """Stands in for the REST framework's class, which has no types."""
else:
    from rest_framework.permissions import BasePermission

logger: Final = log.get_logger(__name__)

#: Attributes of views that generate schemas: of the REST framework and drf-yasg.
_OF_SCHEMAS = ("schema_generator", "generator_class")


class HasEntitlements(BasePermission):
    """Permission for requests whose customer has the required entitlements.

    It checks the features in the attribute ``required_entitlements`` of the view; of a
    view without them, the features that the settings require. It belongs after the
    permissions that authenticate. A denied request gets the same problem document as
    in any other view.
    """

    #: Tells `ViewMiddleware` not to check the entitlements of the settings.
    asks_for_entitlements = True

    def has_permission(self, request: Request, view: Any) -> bool:
        """Return True, or end the request.

        :raises EntitlementDenied: unless the decision allows or is not enforced.
        """
        if _is_preview(request, view):
            return True
        features = _features_of(view)
        # One decision per request: a view may check its permissions several times.
        if getattr(view, "_entitled_to", None) != features:
            match = getattr(request, "resolver_match", None)
            function = getattr(match, "func", None)  # of `as_view`
            if features or must_ask(environ_of(request), function):
                require_entitlements(request, *features)
            else:
                _warn_if_nothing_is_checked(request, view, function)
            view._entitled_to = features
        return True


def _features_of(view: Any) -> tuple[str, ...]:
    """Return the features that a view names, an empty tuple for those of the policy."""
    named = getattr(view, "required_entitlements", None) or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _warn_if_nothing_is_checked(request: Request, view: Any, function: Any) -> None:
    """Log a warning if neither the view nor its policy requires a feature."""
    environ = environ_of(request)
    billing = billing_of(environ)
    if environ is None or billing is None or is_options(environ):
        return  # such a request needs no entitlement
    if billing.requires_entitlements:
        return
    if checks_own_entitlements(handler_of(function, method_of(environ))):
        return  # its @meter has features, or it has @no_meter
    # As a default for all views, the permission class needs features in some of them.
    if not any(map(checks_entitlements, api_settings.DEFAULT_PERMISSION_CLASSES)):
        logger.warning(
            "%s: HasEntitlements checks nothing, since neither the view class nor the "
            "policy names a feature: set required_entitlements in one of them, or "
            "leave the permission class out",
            f"view {type(view).__name__}",
        )


def _is_preview(request: Request, view: Any) -> bool:
    """Return True if the check decides only what a response shows of *view*.

    The browsable API shows a form for each permitted method. The response to OPTIONS
    lists the fields of each permitted method, and a schema lists the permitted views.
    They clone the request with another method and check the permissions of the clone.
    These checks deny and serve nothing, so they are no decisions on entitlements.

    A view may also check a clone before it does the work of another method, such as a
    PUT that creates an object. This is no preview.
    """
    http_request = getattr(request, "_request", None)
    # Only a clone stores the method itself.
    if http_request is None or "method" not in vars(request):
        return False
    # Rendering begins when the view has its response.
    if hasattr(view, "response") or http_request.method == "OPTIONS":
        return True
    served = request.parser_context.get("view")
    return served is not view and any(hasattr(served, name) for name in _OF_SCHEMAS)
