"""The application for ``wsgi.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core import wsgi

from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.frameworks import FrameworkMiddleware

if TYPE_CHECKING:
    from openmeter_wsgi.middleware import OpenMeterMiddleware


def get_wsgi_application(**options: Any) -> OpenMeterMiddleware:
    """Return Django's WSGI application, metered as ``settings.OPENMETER`` says.

    *options* go before the settings, and those before variables.

    :raises ConfigError: with every problem of the configuration.
    """
    app = wsgi.get_wsgi_application()
    # Not at the top: there are settings only now.
    from openmeter_wsgi.django.configuration import (
        policy_of_settings,
        view_middleware_problem,
    )
    from openmeter_wsgi.django.lost_users import watch_users

    policy = policy_of_settings(**options)
    if problem := view_middleware_problem():
        raise ConfigError([problem])
    watch_users()
    return FrameworkMiddleware(app, policy)
