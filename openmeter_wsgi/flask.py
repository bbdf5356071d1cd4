"""Metering for Flask: `OpenMeter(app)`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from openmeter_wsgi.entitlements.denials import require_entitlements
from openmeter_wsgi.errors import ConfigError, missing_extra
from openmeter_wsgi.framework_base import (
    FrameworkMiddleware,
    LastingSubject,
    keep_subject,
    make_policy,
    must_ask,
)
from openmeter_wsgi.policy import read_text_options
from openmeter_wsgi.request import has_user
from openmeter_wsgi.subject import path_reader

try:
    import flask
except ModuleNotFoundError as _missing:
    raise missing_extra(_missing, "flask") from None

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask.testing import FlaskClient
    from werkzeug.test import TestResponse

    from openmeter_wsgi.option_types import Options
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.subject import FindSubject


def subject_from(source: str | Callable[[dict[str, Any]], Any]) -> FindSubject:
    """Return a function that finds the subject of a request while Flask serves it.

    :param source: a path that begins with ``g``, ``session`` or Flask-Login's
        ``current_user``, such as ``"g.jwt.sub"``, or a callable on the environ. It is
        read when the response starts, within the context of the request.
    :raises ValueError: if *source* is neither.
    """
    if callable(source):
        return LastingSubject(source)
    root, _, path = str(source).partition(".")
    has_path = path and all(path.split("."))
    if root == "current_user" and (has_path or source == root):
        return LastingSubject(_user_reader(path))
    if root in _ROOTS and has_path:
        get_root, read = _ROOTS[root], path_reader(path, root)
        return LastingSubject(lambda _: read(get_root()))
    raise ValueError(
        "expected 'header:Name', a callable on the environ, 'current_user', or a path "
        f"such as 'g.jwt.sub', 'session.customer' or 'current_user.id', got {source!r}"
    )


_ROOTS: dict[str, Callable[[], Any]] = {
    "g": lambda: flask.g,
    "session": lambda: flask.session,
}


def _user_reader(path: str) -> Callable[[dict[str, Any]], Any]:
    read = path_reader(path, "current_user") if path else _id_of

    def read_user(_: dict[str, Any]) -> object:
        # Imported here: Flask-Login may not be installed.
        from flask_login import current_user  # type: ignore[import-untyped]

        return read(current_user) if current_user.is_authenticated else None

    return read_user


def _id_of(user: Any) -> object:
    return user.get_id()


_read_current_user = _user_reader("")


def _read_user_of_flask_login(environ: dict[str, Any]) -> object:
    # A user from `set_user` wins.
    if has_user(environ) or not hasattr(flask.current_app, "login_manager"):
        return None
    return _read_current_user(environ)


#: Finds the user of Flask-Login in an application that uses it.
user_of_flask_login: FindSubject = LastingSubject(_read_user_of_flask_login)


def keep_users_that_log_out(app: flask.Flask) -> None:
    """Bill the request that logs out a user of *app* to that user."""
    try:
        from flask_login import user_logged_out
    except ImportError:
        return
    # Not weak: nothing else refers to the function.
    user_logged_out.connect(_before_log_out, sender=app, weak=False)


def _before_log_out(_: flask.Flask, **__: Any) -> None:
    keep_subject(flask.request.environ)


_WITHOUT_BODY = (204, 304)


class _ClosingClient:
    """A mixin for a test client: reads and closes each response, except streams.

    A request is billed when its response is closed, which Flask's test client leaves to
    the garbage collector.
    """

    def open(self, *args: Any, **kwargs: Any) -> TestResponse:
        """Send a request; see :class:`werkzeug.test.Client`."""
        response: TestResponse = super().open(*args, **kwargs)  # type: ignore[misc]
        has_length = response.content_length is not None
        if has_length or response.status_code in _WITHOUT_BODY:
            response.get_data()
            response.close()
        return response


def closing_client(client: type[FlaskClient] | None) -> type[FlaskClient]:
    """Return a subclass of *client*, or of Flask's own, that closes its responses."""
    # Imported here: only tests need it.
    from flask.testing import FlaskClient

    base = client or FlaskClient
    return type(base.__name__, (_ClosingClient, base), {})


_PREFIX = "OPENMETER_"
_NAME = "openmeter"


class OpenMeter:
    """Meters an application of Flask, or several from one factory.

    The options are those of :class:`Policy`: keywords win over
    ``app.config["OPENMETER_…"]``, which wins over variables. A *policy* replaces the
    configuration and the variables; keywords win over it. ``subject`` also accepts the
    sources of :func:`subject_from`; without it the user of Flask-Login is the subject,
    if the application uses Flask-Login.

    ``app.extensions["openmeter"]`` is the application's :class:`OpenMeterMiddleware`.

    :raises ConfigError: with every problem of the configuration.
    """

    def __init__(
        self,
        app: flask.Flask | None = None,
        policy: Policy | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._options: dict[str, Any] = {**options}
        self._policy = policy
        if app is not None:
            self.init_app(app)

    def init_app(self, app: flask.Flask) -> None:
        """Meter *app*, whose configuration must be complete by now."""
        if _NAME in app.extensions:
            raise ConfigError([f"app {app.name!r}: is already metered"])
        policy = _policy(app, self._policy, self._options)
        middleware = FrameworkMiddleware(app.wsgi_app, policy)
        app.wsgi_app = middleware  # type: ignore[method-assign]
        app.extensions[_NAME] = middleware
        if _requires_entitlements(policy):
            _check_before_views(app)
        keep_users_that_log_out(app)
        _close_in_tests(app)


def _policy(
    app: flask.Flask, policy: Policy | None, keywords: dict[str, Any]
) -> Policy:
    if policy is not None:
        return make_policy(
            keywords,
            policy=policy,
            read_subject=subject_from,
            default_subject=user_of_flask_login,
            default_source=app.name,
        )
    config = app.config.get_namespace(_PREFIX)
    # Text in the configuration is parsed like a variable, from which it often comes.
    texts = {_PREFIX + k.upper(): v for k, v in config.items() if isinstance(v, str)}
    read = read_text_options(texts)
    given = {name: value for name, value in config.items() if value != ""}
    return make_policy(
        {**given, **read},
        keywords,
        read_subject=subject_from,
        default_subject=user_of_flask_login,
        default_source=app.name,
    )


def _requires_entitlements(policy: Policy) -> bool:
    policies = [policy, *(own for _, own in policy.route_policies)]
    return any(own and own.required_entitlements for own in policies)


def _check_before_views(app: flask.Flask) -> None:
    """Check entitlements directly before each view is called.

    A before_request function would be too early: functions that authenticate may be
    registered after it, and those of blueprints are called after it.
    """
    dispatch = app.dispatch_request

    def check_and_dispatch(*context: Any) -> flask.typing.ResponseReturnValue:
        request = flask.request
        view = app.view_functions.get(request.endpoint or "")
        if request.routing_exception is None and must_ask(request.environ, view):
            require_entitlements(request)
        return dispatch(*context)

    app.dispatch_request = check_and_dispatch  # type: ignore[method-assign]


def _close_in_tests(app: flask.Flask) -> None:
    app.test_client_class = partial(_test_client, app.test_client_class)  # type: ignore[assignment]


def _test_client(client: Any, *args: Any, **kwargs: Any) -> Any:
    return closing_client(client)(*args, **kwargs)
