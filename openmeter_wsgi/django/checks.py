"""What ``manage.py check`` says of a configuration that cannot work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.conf import settings
from django.core import checks

from openmeter_wsgi.django.configuration import (
    SETTING,
    VIEW_MIDDLEWARE,
    policy_of_settings,
    view_middleware_problem,
)
from openmeter_wsgi.errors import ConfigError

if TYPE_CHECKING:
    from openmeter_wsgi.policy import Policy

_PERMISSION = "openmeter_wsgi.django.rest_framework.HasEntitlements"


def check_configuration(**_: Any) -> list[checks.CheckMessage]:
    """Return a message for each problem of the configuration."""
    found: list[checks.CheckMessage] = []
    try:
        found += _rest_framework(policy_of_settings())
    except ConfigError as error:
        hint = (
            f"See {SETTING} in the settings, and the variables {SETTING}_…; where "
            f"nothing is to be sent, {SETTING}_DRY_RUN=1 needs no key."
        )
        for said in error.problems:
            found.append(checks.Error(said, hint=hint, id="openmeter.E001"))
    if problem := view_middleware_problem():
        hint = f"Put {VIEW_MIDDLEWARE!r} at the end of MIDDLEWARE."
        found.append(checks.Error(problem, hint=hint, id="openmeter.E002"))
    return found


def _rest_framework(policy: Policy) -> list[checks.CheckMessage]:
    if not policy.required_entitlements or not apps.is_installed("rest_framework"):
        return []
    named = getattr(settings, "REST_FRAMEWORK", {})
    if _PERMISSION in named.get("DEFAULT_PERMISSION_CLASSES", ()):
        return []
    return [
        checks.Warning(
            "required_entitlements: views of the REST framework authenticate after "
            "they would be asked for, so whoever has no session is answered 401",
            hint=f"Add {_PERMISSION!r} to DEFAULT_PERMISSION_CLASSES, after the "
            "permissions that authenticate.",
            id="openmeter.W001",
        )
    ]
