"""Users that a view logs out or deletes: who is billed is read just before.

Not when each view begins: that would load a user, and mark the session as read, for
requests that are not billed.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.db.models.signals import pre_delete

from openmeter_wsgi.frameworks import keep_subject
from openmeter_wsgi.request import environ_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.http import HttpRequest

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
