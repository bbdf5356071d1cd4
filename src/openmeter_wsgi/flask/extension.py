"""The extension: one line meters an application of Flask."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import flask

from openmeter_wsgi.entitlements.handlers import require_entitlements
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.flask.subjects import (
    keep_users_that_log_out,
    subject_from,
    user_of_flask_login,
)
from openmeter_wsgi.frameworks import FrameworkMiddleware, make_policy, must_ask
from openmeter_wsgi.policy import read_text_options

if TYPE_CHECKING:
    from openmeter_wsgi.policy import Policy

_PREFIX = "OPENMETER_"
_NAME = "openmeter"


class OpenMeter:
    """Meters an application of Flask, or several from one factory.

    Options are those of :class:`Policy`: keywords go before
    ``app.config["OPENMETER_…"]``, which goes before variables. ``subject`` also takes
    what :func:`subject_from` does; without it Flask-Login's user is the subject, where
    that is in use.

    ``app.extensions["openmeter"]`` is the application's :class:`OpenMeterMiddleware`.

    :raises ConfigError: with every problem of the configuration.
    """

    def __init__(self, app: flask.Flask | None = None, **options: Any) -> None:
        self._options = options
        if app is not None:
            self.init_app(app)

    def init_app(self, app: flask.Flask) -> None:
        """Meter *app*, whose configuration must be complete by now."""
        if _NAME in app.extensions:
            raise ConfigError([f"app {app.name!r}: is metered already"])
        policy = _policy(app, self._options)
        middleware = FrameworkMiddleware(app.wsgi_app, policy)
        app.wsgi_app = middleware  # type: ignore[method-assign]
        app.extensions[_NAME] = middleware
        if _requires_anything(policy):
            _ask_before_views(app)
        keep_users_that_log_out(app)
        _settle_in_tests(app)


def _policy(app: flask.Flask, keywords: dict[str, Any]) -> Policy:
    config = app.config.get_namespace(_PREFIX)
    # Text is often a variable that went through the configuration.
    texts = {_PREFIX + k.upper(): v for k, v in config.items() if isinstance(v, str)}
    read = read_text_options(texts)
    given = {name: value for name, value in config.items() if value != ""}
    return make_policy(
        {**given, **read},
        keywords,
        read_subject=subject_from,
        default_subject=user_of_flask_login,
    )


def _requires_anything(policy: Policy) -> bool:
    policies = [policy, *(own for _, own in policy.of_routes)]
    return any(own and own.required_entitlements for own in policies)


def _ask_before_views(app: flask.Flask) -> None:
    """Let entitlements be asked for when a view is about to be called.

    Not in a before_request function: those of the application, which authenticate,
    may be registered later, and those of blueprints are called later.
    """
    dispatch = app.dispatch_request

    def ask_and_dispatch(*context: Any) -> flask.typing.ResponseReturnValue:
        request = flask.request
        view = app.view_functions.get(request.endpoint or "")
        if request.routing_exception is None and must_ask(request.environ, view):
            require_entitlements(request)
        return dispatch(*context)

    app.dispatch_request = ask_and_dispatch  # type: ignore[method-assign]


def _settle_in_tests(app: flask.Flask) -> None:
    app.test_client_class = partial(_test_client, app.test_client_class)  # type: ignore[assignment]


def _test_client(own: Any, *args: Any, **kwargs: Any) -> Any:
    # Only tests pay for what tests need.
    from openmeter_wsgi.flask.testing import settling

    return settling(own)(*args, **kwargs)
