"""Django's settings: what they say of metering, and what is wrong in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.utils.module_loading import import_string

from openmeter_wsgi.django.subjects import authenticated_user, subject_from
from openmeter_wsgi.django.view_middleware import ViewMiddleware
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.frameworks import make_policy

if TYPE_CHECKING:
    from openmeter_wsgi.policy import Policy

SETTING = "OPENMETER"
VIEW_MIDDLEWARE = "openmeter_wsgi.django.ViewMiddleware"


def policy_of_settings(**options: Any) -> Policy:
    """Return the policy of ``settings.OPENMETER``; *options* go before it.

    :raises ConfigError: with every problem of the configuration.
    """
    said = getattr(settings, SETTING, {})
    if not isinstance(said, dict):
        raise ConfigError([f"{SETTING}: expected options by name, got {said!r}"])
    return make_policy(
        said, options, read_subject=subject_from, default_subject=authenticated_user
    )


def view_middleware_problem() -> str | None:
    """Say that our middleware is missing, None if it is there."""
    if any(_is_class(name, ViewMiddleware) for name in settings.MIDDLEWARE):
        return None
    return (
        f"MIDDLEWARE: expected {VIEW_MIDDLEWARE!r} among them, without which neither "
        "subject nor route is known and no entitlement is asked for"
    )


def _is_class(name: str, expected: type) -> bool:
    try:
        found = import_string(name)
    except Exception:  # noqa: BLE001 - Django itself says what is wrong, and better
        return False
    return isinstance(found, type) and issubclass(found, expected)
