"""Who is metered, as Flask knows it: a path through what its views have at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flask

from openmeter_wsgi.frameworks import LastingSubject, keep_subject
from openmeter_wsgi.request import has_user
from openmeter_wsgi.subject import path_reader

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.subject import FindSubject


def subject_from(source: str | Callable[[dict[str, Any]], Any]) -> FindSubject:
    """Return what finds the subject of a request while Flask serves it.

    *source* is a path that begins with ``g``, ``session`` or ``current_user``
    (Flask-Login's), such as ``"g.jwt.sub"``; or a callable on the environ. It is read
    when the response starts, and may use all that a view may.

    :raises ValueError: if it is neither.
    """
    if callable(source):
        return LastingSubject(source)
    root, _, path = str(source).partition(".")
    names_something = path and all(path.split("."))
    if root == "current_user" and (names_something or source == root):
        return LastingSubject(_user_reader(path))
    if root in _ROOTS and names_something:
        of, read = _ROOTS[root], path_reader(path)
        return LastingSubject(lambda _: read(of()))
    raise ValueError(
        "expected 'header:Name', a callable on the environ, 'current_user', or a path "
        f"such as 'g.jwt.sub', 'session.customer' or 'current_user.id', got {source!r}"
    )


_ROOTS: dict[str, Callable[[], Any]] = {
    "g": lambda: flask.g,
    "session": lambda: flask.session,
}


def _user_reader(path: str) -> Callable[[dict[str, Any]], Any]:
    read = path_reader(path) if path else lambda user: user.get_id()

    def read_user(_: dict[str, Any]) -> object:
        # Here, and not at the top: Flask-Login may be absent.
        from flask_login import current_user  # type: ignore[import-untyped]

        return read(current_user) if current_user.is_authenticated else None

    return read_user


_read_current_user = _user_reader("")


def _read_user_of_flask_login(environ: dict[str, Any]) -> object:
    # What `set_user` was given is nearer to what is meant.
    if has_user(environ) or not hasattr(flask.current_app, "login_manager"):
        return None
    return _read_current_user(environ)


#: Finds the user of Flask-Login, where the application has it.
user_of_flask_login: FindSubject = LastingSubject(_read_user_of_flask_login)


def keep_users_that_log_out(app: flask.Flask) -> None:
    """Have the user whom a view of *app* logs out billed for that request."""
    try:
        from flask_login import user_logged_out
    except ImportError:
        return
    # Not weakly: nothing else keeps it.
    user_logged_out.connect(_before_log_out, sender=app, weak=False)


def _before_log_out(_: flask.Flask, **__: Any) -> None:
    keep_subject(flask.request.environ)
