"""A permission class of the REST framework that checks entitlements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi.entitlements.handlers import require_entitlements
from openmeter_wsgi.frameworks import must_ask
from openmeter_wsgi.request import environ_of

if TYPE_CHECKING:
    from rest_framework.request import Request  # type: ignore[import-untyped]

    class BasePermission:
        """Stands in for the REST framework's class, which has no types."""
else:
    from rest_framework.permissions import BasePermission


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
        if _is_only_shown(request, view):
            return True
        features = tuple(getattr(view, "required_entitlements", None) or ())
        # One decision per request, though some views check their permissions twice.
        if getattr(view, "_entitled_to", None) != features:
            # The function that the route names: its decorators may say what to check.
            match = getattr(request, "resolver_match", None)
            called = getattr(match, "func", None)
            if features or must_ask(environ_of(request), called):
                require_entitlements(request, *features)
            view._entitled_to = features
        return True


def _is_only_shown(request: Request, view: Any) -> bool:
    """Return True if the permission decides only what a response tells of *view*.

    The browsable API shows a form for each permitted method, the answer to OPTIONS
    names the permitted methods, and a schema names the permitted views. Each of them
    clones the request and checks the permissions of the clone; nothing that the
    permission answers denies or serves a request. A view that is still being served
    may also check a clone, such as a PUT that creates an object. That check counts.
    """
    http_request = getattr(request, "_request", None)
    # Only `clone_request` sets the method; other requests hand on Django's.
    if http_request is None or "method" not in vars(request):
        return False
    return (
        hasattr(view, "response")
        or http_request.method == "OPTIONS"
        or request.parser_context.get("view") is not view
    )
