"""Who is metered, as Django knows it: a path that begins at the request."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.frameworks import LastingSubject
from openmeter_wsgi.request import has_user
from openmeter_wsgi.subject import path_reader

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.http import HttpRequest

    from openmeter_wsgi.subject import FindSubject

_REQUEST = "openmeter_wsgi.django_request"
_ROOT = "request"


def remember_request(request: HttpRequest, environ: dict[str, Any]) -> None:
    """Let subjects be read from *request*."""
    # Weakly: the request holds its environ, and both are to go when it ends.
    environ[_REQUEST] = weakref.ref(request)


def subject_from(source: str | Callable[[dict[str, Any]], Any]) -> FindSubject:
    """Return what finds the subject of a request while Django serves it.

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
    read = path_reader(path)
    return LastingSubject(lambda environ: read(_request_of(environ)))


def _request_of(environ: dict[str, Any]) -> HttpRequest | None:
    reference = environ.get(_REQUEST)
    return None if reference is None else reference()


_read_primary_key = path_reader("user.pk")


def _read_authenticated_user(environ: dict[str, Any]) -> object:
    # What `set_user` was given is nearer to what is meant.
    return None if has_user(environ) else _read_primary_key(_request_of(environ))


#: Finds the primary key of the user that Django or its REST framework authenticated.
authenticated_user: FindSubject = LastingSubject(_read_authenticated_user)
