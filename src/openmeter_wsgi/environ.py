"""The WSGI environ: the keys of this package, and how to get at it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import MutableMapping

#: A list: empty until a handler states usage, then its :class:`RunTimeMeters`.
#: After the settlement: what counts usage that came too late.
METERS = "openmeter_wsgi.meters"
#: What :func:`set_subject` was given.
SUBJECT = "openmeter_wsgi.subject"
#: What :func:`set_user` was given.
USER = "openmeter_wsgi.user"


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
