"""The WSGI environ: the keys of this package, and how to get at it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

#: A metered request's cell: a list of what is at `BILLING` and at `STATED`. A list, as
#: what an application passes on may be a copy of the environ.
METERS = "openmeter_wsgi.meters"
#: What bills the request, and asks for entitlements in its handler.
BILLING = 0
#: None until a handler states usage, then its :class:`RunTimeMeters`; `MADE` once its
#: events are fixed, `ENDED` once it is settled.
STATED = 1
MADE: Any = object()
ENDED: Any = object()
#: Who is calling: what :func:`set_subject` and :func:`set_user` were given, each under
#: its own name. One key, as every request is asked for it.
CALLER = "openmeter_wsgi.caller"
SUBJECT = "subject"
USER = "user"
#: The template of the address, such as ``/users/<id>``: see :func:`set_route`.
ROUTE = "openmeter_wsgi.route"
#: The :class:`Decision` that was made last for this request.
DECISION = "openmeter_wsgi.decision"
#: What this request has reserved, by feature.
RESERVED = "openmeter_wsgi.reserved"
#: OPTIONS in every case: to look a method up costs a request less than to change it.
OPTIONS = frozenset(
    map("".join, itertools.product("Oo", "Pp", "Tt", "Ii", "Oo", "Nn", "Ss"))
)


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


def billing_of(environ: Mapping[str, Any] | None) -> Any:
    """Return what bills the request of *environ*, None if it is not metered."""
    cell = None if environ is None else environ.get(METERS)
    return None if cell is None else cell[BILLING]


def has_user(environ: Mapping[str, Any]) -> bool:
    """Say whether :func:`set_user` said whose request this is."""
    return USER in environ.get(CALLER, ())


def method_of(environ: Mapping[str, Any]) -> str:
    """Return the method of a request in capitals.

    Most frameworks read it so, and many servers hand it on as the client has sent it.
    """
    return str(environ.get("REQUEST_METHOD", "")).upper()


def is_options(environ: Mapping[str, Any]) -> bool:
    """Say whether this is a request that browsers make by themselves (CORS)."""
    return environ.get("REQUEST_METHOD") in OPTIONS
