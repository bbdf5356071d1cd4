"""The policy in the settings, its system checks, and Django's application around it.

`get_wsgi_application` wraps Django's WSGI application in the middleware, with the
policy of ``settings.OPENMETER``. `check_configuration` is the system check of that
policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from django.conf import settings
from django.core import checks, wsgi
from django.utils.module_loading import import_string

from openmeter_wsgi.django.view_checks import SETTING, check_subject, check_views
from openmeter_wsgi.django.view_middleware import (
    ViewMiddleware,
    authenticated_user,
    subject_from,
    watch_users,
)
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.framework_base import FrameworkMiddleware, make_policy
from openmeter_wsgi.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.middleware import OpenMeterMiddleware
    from openmeter_wsgi.option_types import Options

VIEW_MIDDLEWARE = "openmeter_wsgi.django.ViewMiddleware"


def policy_of_settings(**options: Unpack[Options]) -> Policy:
    """Return the policy of ``settings.OPENMETER``; *options* override the settings.

    :raises ConfigError: with every problem of the configuration.
    """
    given = getattr(settings, SETTING, {})
    policy = given if isinstance(given, Policy) else None
    if policy is None and not isinstance(given, dict):
        raise ConfigError(
            [f"{SETTING}: expected options by name, or a Policy, got {given!r}"]
        )
    urls = getattr(settings, "ROOT_URLCONF", None)
    return make_policy(
        {} if policy else given,
        options,
        policy=policy,
        read_subject=subject_from,
        default_subject=authenticated_user,
        # The package of the project: shop for shop.urls.
        default_source=urls.partition(".")[0] if isinstance(urls, str) else "",
    )


def view_middleware_problem() -> str | None:
    """Return an error if `ViewMiddleware` is not in the settings, else None."""
    if any(map(_is_view_middleware, settings.MIDDLEWARE)):
        return None
    return (
        f"MIDDLEWARE: expected {VIEW_MIDDLEWARE!r} in it; without it neither subject "
        "nor route is known, and no entitlement is checked"
    )


def _is_view_middleware(name: str) -> bool:
    try:
        middleware = import_string(name)
    except Exception:  # noqa: BLE001 - Django reports it when it loads the middleware
        return False
    return isinstance(middleware, type) and issubclass(middleware, ViewMiddleware)


def check_configuration(**_: Any) -> list[checks.CheckMessage]:
    """Return a message for each problem of the configuration.

    A missing API key is a warning here, because ``migrate`` and continuous integration
    need none. It is an error when ``wsgi.py`` is loaded.
    """
    messages = list(_check_policy())
    if problem := view_middleware_problem():
        hint = f"Put {VIEW_MIDDLEWARE!r} at the end of MIDDLEWARE."
        messages.append(checks.Error(problem, hint=hint, id="openmeter.E002"))
    return [*messages, *_check_asgi()]


def _check_policy() -> Iterator[checks.CheckMessage]:
    try:
        policy = policy_of_settings()
    except ConfigError as error:
        for problem in error.problems:
            yield _message(problem)
        if not all(map(_is_missing_key, error.problems)):
            return
        policy = policy_of_settings(dry_run=True)
    yield from check_views(policy)
    yield from check_subject(policy)


def _is_missing_key(problem: str) -> bool:
    return problem.startswith("api_key: expected a key, which ")


def _message(problem: str) -> checks.CheckMessage:
    if _is_missing_key(problem):
        hint = (
            "The application does not start without a key. To send nothing, set "
            f"{SETTING}_DRY_RUN=1."
        )
        return checks.Warning(problem, hint=hint, id="openmeter.W002")
    hint = f"Correct it in {SETTING} in the settings, or in a variable {SETTING}_…"
    return checks.Error(problem, hint=hint, id="openmeter.E001")


def _check_asgi() -> Iterator[checks.CheckMessage]:
    """Yield a message if the settings have an ASGI application."""
    asgi = getattr(settings, "ASGI_APPLICATION", None)
    if asgi is None:
        return
    problem = (
        f"ASGI_APPLICATION: requests that {asgi} serves are not metered and not "
        "checked for entitlements; OpenMeter's middleware is a WSGI middleware"
    )
    if settings.WSGI_APPLICATION is None:
        hint = "Serve the project through wsgi.py, and set WSGI_APPLICATION."
        yield checks.Error(problem, hint=hint, id="openmeter.E003")
    else:
        hint = "Serve only free requests through ASGI, such as websockets."
        yield checks.Warning(problem, hint=hint, id="openmeter.W003")


def get_wsgi_application(**options: Any) -> OpenMeterMiddleware:
    """Return Django's WSGI application, metered by ``settings.OPENMETER``.

    *options* override the settings, and the settings override variables.

    :raises ConfigError: with every problem of the configuration.
    """
    app = wsgi.get_wsgi_application()
    policy = policy_of_settings(**options)
    if problem := view_middleware_problem():
        raise ConfigError([problem])
    watch_users()
    return FrameworkMiddleware(app, policy)
