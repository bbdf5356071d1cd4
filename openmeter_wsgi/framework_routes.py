"""Lists the routes of an application and their views, for known frameworks.

Known are Flask, Bottle, Falcon, Pyramid and Django. Used by ``openmeter-wsgi check``
and to warn of decorators that have no effect.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from openmeter_wsgi import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

logger: Final = log.get_logger(__name__)

#: Name of the attribute that stores the options of a decorated view, None for
#: `no_meter`. Other decorators copy the attribute (``functools.wraps``).
OPTIONS_ATTRIBUTE = "openmeter_wsgi_options"
#: Decorated functions and the functions that they wrap.
_decorated: weakref.WeakSet[Any] = weakref.WeakSet()
#: Attributes in which middleware and frameworks store the wrapped application.
_WRAPPED_ATTRIBUTES = (
    "wsgi_app", "app", "application", "_app", "wrapped", "wrapped_app", "__wrapped__",
    "__self__", "func",
)  # fmt: skip
#: Maximum number of nested applications that are searched.
_MAX_LAYERS = 100


def note_decorated(view: Any) -> None:
    """Remember *view* and the functions that it wraps as decorated."""
    while view is not None:
        with contextlib.suppress(TypeError):  # an object without weak references
            _decorated.add(view)
        view = getattr(view, "__wrapped__", None)


class ServedRoute(NamedTuple):
    """One route of an application."""

    #: In the syntax of the framework: ``/users/<int:id>``, ``/users/{id}``.
    template: str
    #: HTTP methods, None for all.
    methods: frozenset[str] | None
    #: The view function or class, None if unknown.
    view: Any


def layers_of(app: Any, *, closures: bool = True) -> Iterator[Any]:
    """Yield *app* and the applications that it wraps, the outermost first.

    With *closures*, also all callables in the closures of functions.
    """
    to_visit = [app]
    seen: set[int] = set()
    while to_visit and len(seen) < _MAX_LAYERS:
        layer = to_visit.pop(0)
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        yield layer
        to_visit += _attributes(layer)
        if closures:
            to_visit += _closed_over(layer)


def _attributes(layer: Any) -> Iterator[Any]:
    attributes = getattr(layer, "__dict__", {})
    for name in _WRAPPED_ATTRIBUTES:
        value = attributes.get(name) if name in attributes else _slot(layer, name)
        if callable(value):
            yield value


def _slot(layer: Any, name: str) -> Any:
    if name in {"__self__", "func"} or name in getattr(type(layer), "__slots__", ()):
        return getattr(layer, name, None)
    return None


def _closed_over(layer: Any) -> Iterator[Any]:
    for cell in getattr(layer, "__closure__", None) or ():
        try:
            contents = cell.cell_contents
        except ValueError:  # the variable is not assigned yet
            continue
        if callable(contents):
            yield contents


def served_routes(app: Any, *, closures: bool = True) -> list[ServedRoute]:
    """Return the routes of *app*, an empty list if its framework is unknown."""
    served: list[ServedRoute] = []
    for layer in layers_of(app, closures=closures):
        for module, name, routes in _FRAMEWORKS:
            kind = getattr(sys.modules.get(module), name, None)
            if kind is not None and isinstance(layer, kind):
                served += routes(layer)
    return served


def _of_flask(app: Any) -> Iterator[ServedRoute]:
    for rule in app.url_map.iter_rules():
        view = app.view_functions.get(rule.endpoint)
        yield ServedRoute(str(rule.rule), frozenset(rule.methods or ()) or None, view)


def _of_bottle(app: Any) -> Iterator[ServedRoute]:
    for route in app.routes:
        is_any = route.method in {"ANY", "PROXY"}
        methods = None if is_any else frozenset({route.method})
        yield ServedRoute(str(route.rule), methods, route.callback)


def _of_falcon(app: Any) -> Iterator[ServedRoute]:
    from falcon import inspect  # installed, because *app* is a Falcon application

    for route in inspect.inspect_routes(app):
        # Falcon's internal responders answer 405 and OPTIONS.
        names = (method.method for method in route.methods if not method.internal)
        methods = frozenset((*names, "OPTIONS"))
        yield ServedRoute(route.path, methods, None)


def _of_pyramid(app: Any) -> Iterator[ServedRoute]:
    for route in app.routes_mapper.get_routes():
        yield ServedRoute("/" + route.pattern.lstrip("/"), None, None)


def routes_of_django(_: Any = None) -> Iterator[ServedRoute]:
    """Yield the routes of the Django project in this process."""
    from django.urls import get_resolver

    to_visit: list[tuple[str, Any]] = [
        ("", pattern) for pattern in get_resolver().url_patterns
    ]
    while to_visit:
        prefix, pattern = to_visit.pop(0)
        template = f"{prefix}{pattern.pattern}"
        if hasattr(pattern, "url_patterns"):
            to_visit += [(template, included) for included in pattern.url_patterns]
        else:
            yield ServedRoute(f"/{template}", None, pattern.callback)


#: The methods of HTTP after which the functions of a view class are named.
_METHODS = ("get", "post", "put", "patch", "delete", "head", "options")


def view_class_of(view: Any) -> Any:
    """Return the class of a class-based view of Flask or Django, None for others."""
    # The REST framework calls it `cls`.
    return getattr(view, "view_class", None) or getattr(view, "cls", None)


def handlers_of(view: Any) -> list[Any]:
    """Return the functions of a view class that serve the requests of *view*."""
    names = dict.fromkeys(_actions(view).values() or _METHODS)
    handlers = (_handler(view, name) for name in names)
    return [handler for handler in handlers if handler is not None]


def handler_of(view: Any, method: str) -> Any:
    """Return the function of a view class that serves *method*.

    None if there is no such function, or *view* has no class.
    """
    if view_class_of(view) is None:
        return None
    name = method.lower()
    handler = _handler(view, _actions(view).get(name, name))
    return handler_of(view, "get") if handler is None and name == "head" else handler


def _actions(view: Any) -> dict[str, str]:
    """Return the functions of a ViewSet by method, such as ``{"get": "list"}``."""
    actions = getattr(view, "actions", None)
    return actions if isinstance(actions, dict) else {}


def _handler(view: Any, name: str) -> Any:
    handler = getattr(view_class_of(view), name, None)
    if getattr(handler, "__module__", None) == "rest_framework.decorators":
        # `@api_view` makes a class whose methods call the function.
        return next(_closed_over(handler), handler)
    return handler


_FRAMEWORKS: tuple[tuple[str, str, Callable[[Any], Iterable[ServedRoute]]], ...] = (
    ("flask", "Flask", _of_flask),
    ("bottle", "Bottle", _of_bottle),
    ("falcon", "App", _of_falcon),
    ("pyramid.router", "Router", _of_pyramid),
    ("django.core.handlers.wsgi", "WSGIHandler", routes_of_django),
)


def misplaced_decorators(app: Any) -> list[tuple[str, str]]:
    """Return (route template, view name) of each decorator that has no effect.

    A framework's decorator such as ``@app.get`` registers the function below it. A
    function that `meter` returns above it is never called.
    """
    routes = served_routes(app)
    effective = {
        id(_innermost(r.view)) for r in routes if hasattr(r.view, OPTIONS_ATTRIBUTE)
    }
    return [
        (route.template, getattr(route.view, "__qualname__", repr(route.view)))
        for route in routes
        if _is_decorated_elsewhere(route.view)
        and id(_innermost(route.view)) not in effective
    ]


def _is_decorated_elsewhere(view: Any) -> bool:
    try:
        return not hasattr(view, OPTIONS_ATTRIBUTE) and view in _decorated
    except TypeError:  # an object without weak references
        return False


def _innermost(view: Any) -> Any:
    while (inner := getattr(view, "__wrapped__", None)) is not None:
        view = inner
    return view


def warn_of_misplaced_decorators(app: Any) -> None:
    """Log a warning for each view whose decorator has no effect."""
    for template, name in misplaced_decorators(app):
        logger.warning(
            "view %s: @meter or @no_meter above the decorator that registers the view "
            "for %s has no effect; put it directly above the function",
            name, template,
        )  # fmt: skip
