"""System checks of the project's views, and of the path that leads to the subject.

The checks read classes and call no view. They run with the other checks of Django, such
as those of ``manage.py check`` and ``manage.py runserver``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core import checks
from django.core.exceptions import FieldDoesNotExist, ImproperlyConfigured

from openmeter_wsgi import options
from openmeter_wsgi.django.view_middleware import (
    SubjectAtPath,
    checks_entitlements,
    permissions_of,
)
from openmeter_wsgi.framework_routes import routes_of_django, view_class_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.policy import Policy

SETTING = "OPENMETER"
PERMISSION = "openmeter_wsgi.django.rest_framework.HasEntitlements"
#: Id of the error for features that OpenMeter cannot have.
WRONG_FEATURES = "openmeter.E004"


def check_views(policy: Policy) -> Iterator[checks.CheckMessage]:
    """Yield a message for each problem with entitlements in the REST framework."""
    if not apps.is_installed("rest_framework"):
        return
    if policy.required_entitlements:
        yield from _check_default_permissions()
    views = _views()
    for view in views:
        yield from _check_features(view)
    if not any(own.required_entitlements for own in _policies(policy)):
        yield from _check_permissions(views)


def check_subject(policy: Policy) -> Iterator[checks.CheckMessage]:
    """Yield a message for each path of a subject that the model of users lacks."""
    if not apps.is_installed("django.contrib.auth"):
        return
    try:
        model = get_user_model()
    except ImproperlyConfigured:  # Django's own check reports it
        return
    sources = [own.subject for own in _policies(policy)]
    for path in sorted({s.path for s in sources if isinstance(s, SubjectAtPath)}):
        root, _, names = path.partition(".user.")
        missing = _missing_attribute(model, names.split("."))
        if root == "request" and names and missing is not None:
            yield checks.Warning(
                f"subject: {path!r}: {missing}; unless something else sets it, "
                "requests have no subject and are not billed",
                hint="Correct the path. If a middleware or an authentication class "
                "sets the attribute, silence this warning.",
                id="openmeter.W006",
            )


def _policies(policy: Policy) -> list[Policy]:
    """Return the policy and the policies of its routes."""
    return [policy, *(own for _, own in policy.route_policies if own is not None)]


def _missing_attribute(model: Any, names: list[str]) -> str | None:
    """Return an error if an object on the path *names*, from *model* on, lacks a name.

    Only models are checked: None if the path leads to an object of unknown type.
    """
    for name in names:
        if hasattr(model, "__getattr__"):  # it may have any attribute
            return None
        if not hasattr(model, name):
            return f"the model {model.__name__} has no attribute {name!r}"
        try:
            field = model._meta.get_field(name)
        except FieldDoesNotExist:
            return None
        if not (field.many_to_one or field.one_to_one):
            return None
        model = field.related_model
    return None


def _check_default_permissions() -> Iterator[checks.CheckMessage]:
    """Check that views which authenticate by themselves also check entitlements."""
    named = getattr(settings, "REST_FRAMEWORK", {})
    if PERMISSION not in named.get("DEFAULT_PERMISSION_CLASSES", ()):
        yield checks.Warning(
            "required_entitlements: these features are checked before a view of the "
            "REST framework authenticates its user, so a request without a session is "
            "answered 401",
            hint=f"Add {PERMISSION!r} to DEFAULT_PERMISSION_CLASSES, after the "
            "permissions that authenticate.",
            id="openmeter.W001",
        )


def _views() -> list[Any]:
    """Return the views of the REST framework, one for each class."""
    if not getattr(settings, "ROOT_URLCONF", None):
        return []
    try:
        views = [route.view for route in routes_of_django()]
    except Exception:  # noqa: BLE001 - Django's own check reports it
        return []
    by_class = {view_class_of(view): view for view in views}
    return [
        view for cls, view in by_class.items() if hasattr(cls, "permission_classes")
    ]


def _check_features(view: Any) -> Iterator[checks.CheckMessage]:
    """Check the features that a view class names, and that a permission reads them."""
    from rest_framework.views import APIView  # type: ignore[import-untyped]

    cls = view_class_of(view)
    named = getattr(cls, "required_entitlements", None)
    if not named or not isinstance(named, str | list | tuple | set | frozenset):
        return  # such as a property, whose value is known only in a request
    try:
        options.features(named)
    except ValueError as error:
        yield checks.Error(
            f"{_name(cls)}: required_entitlements: {error}",
            hint="Name the features by their keys in OpenMeter, in a list.",
            id=WRONG_FEATURES,
        )
    may_vary = getattr(cls, "get_permissions", None) is not APIView.get_permissions
    if not may_vary and not any(map(checks_entitlements, permissions_of(view))):
        yield checks.Warning(
            f"{_name(cls)}: required_entitlements: HasEntitlements is none of its "
            "permissions, so nothing checks these features",
            hint=f"Add {PERMISSION!r} to its permission_classes. If a permission class "
            "of your own checks the features, silence this warning.",
            id="openmeter.W004",
        )


def _check_permissions(views: list[Any]) -> Iterator[checks.CheckMessage]:
    """Check that `HasEntitlements` has features to check, where the settings have none.

    A view class without features may have it as a default for all views, if another
    view class has features.
    """
    from rest_framework.views import APIView

    defaults = APIView.permission_classes
    featureless = [
        view
        for view in views
        if not getattr(view_class_of(view), "required_entitlements", None)
    ]
    for view in featureless:
        own = permissions_of(view)
        if own is not defaults and any(map(checks_entitlements, own)):
            yield _nothing_to_check(_name(view_class_of(view)), "the view class")
    if len(featureless) == len(views) and any(map(checks_entitlements, defaults)):
        yield _nothing_to_check("DEFAULT_PERMISSION_CLASSES", "any view class")


def _nothing_to_check(where: str, view_class: str) -> checks.CheckMessage:
    return checks.Warning(
        f"{where}: HasEntitlements checks nothing, as there are no "
        f"required_entitlements in {SETTING} or in {view_class}",
        hint="Name the features in one of them, or leave the permission class out. "
        "@meter(required_entitlements=[…]) works without it.",
        id="openmeter.W005",
    )


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
