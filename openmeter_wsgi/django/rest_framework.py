"""A permission of the REST framework that checks entitlements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi.entitlements.handlers import require_entitlements
from openmeter_wsgi.frameworks import must_ask
from openmeter_wsgi.request import environ_of

if TYPE_CHECKING:
    from rest_framework.request import Request  # type: ignore[import-untyped]

    class BasePermission:
        """Stands for the REST framework's own, which has no types."""
else:
    from rest_framework.permissions import BasePermission


class HasEntitlements(BasePermission):
    """Permits requests whose customer has the entitlements that are required.

    A view names features of its own as ``required_entitlements``. To be named after
    the permissions that authenticate; who is denied gets the same problem document as
    everywhere.
    """

    #: Tells `ViewMiddleware` to leave it to this.
    asks_for_entitlements = True

    def has_permission(self, request: Request, view: Any) -> bool:
        """Return True, or end the request.

        :raises EntitlementDenied: unless the decision allows or is not enforced.
        """
        # Asked once: the browsable API asks again for each form that it shows.
        if not getattr(view, "_has_entitlements", False):
            features = tuple(getattr(view, "required_entitlements", ()))
            if features or must_ask(environ_of(request), None):
                require_entitlements(request, *features)
            view._has_entitlements = True
        return True
