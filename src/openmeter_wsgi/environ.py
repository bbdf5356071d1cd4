"""The WSGI environ: the keys of this package, and how to get at it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

#: A list: empty until a handler states usage, then its :class:`RunTimeMeters`.
#: After the settlement: what counts usage that came too late.
METERS = "openmeter_wsgi.meters"
#: What :func:`set_subject` was given.
SUBJECT = "openmeter_wsgi.subject"
#: What :func:`set_user` was given.
USER = "openmeter_wsgi.user"
#: The template of the address, such as ``/users/<id>``: see :func:`set_route`.
ROUTE = "openmeter_wsgi.route"
#: What bills this request, and asks for entitlements in its handler.
BILLING = "openmeter_wsgi.billing"
#: The :class:`Decision` that was made last for this request.
DECISION = "openmeter_wsgi.decision"
#: What this request has reserved, by feature.
RESERVED = "openmeter_wsgi.reserved"


def environ_of(request: object) -> MutableMapping[str, Any] | None:
    """Return the environ that *request* is or carries, None where it has none.

    Flask, Django, Bottle and Pyramid keep it as ``.environ``, Falcon as ``.env``.
    """
    if isinstance(request, dict):
        return request
    for name in ("environ", "env"):
        environ = getattr(request, name, None)
        if isinstance(environ, dict):
            return environ
    return None


def is_options(environ: Mapping[str, Any]) -> bool:
    """Say whether this is a request that browsers make by themselves (CORS)."""
    return environ.get("REQUEST_METHOD") == "OPTIONS"
