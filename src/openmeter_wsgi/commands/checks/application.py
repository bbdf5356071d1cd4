"""The application itself: is it metered, and once?"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.commands.checks.findings import failure, ok, warning
from openmeter_wsgi.middleware import OpenMeterMiddleware
from openmeter_wsgi.served_routes import layers_of, misplaced_decorators

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.checks.findings import Finding

_NAME = "application"


class NoApplication(Exception):
    """There is no WSGI application where one was named."""


def load_application(name: str) -> Any:
    """Return the application that *name* says, as ``module:app`` or ``module:make()``.

    A module is looked for in the working directory, too, as servers do.

    :raises NoApplication: saying why there is none.
    """
    module_name, _, path = name.partition(":")
    made = path.endswith("()")
    path = path.removesuffix("()") or "application"
    sys.path.insert(0, os.getcwd())
    try:
        # What it prints must not be taken for what is found.
        with contextlib.redirect_stdout(sys.stderr):
            found: Any = importlib.import_module(module_name)
            for attribute in path.split("."):
                found = getattr(found, attribute)
            found = found() if made else found
    except (Exception, SystemExit) as error:
        # The application's own code may fail in any way.
        raise NoApplication(f"{name!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise NoApplication(f"{name!r}: expected a WSGI application, got {found!r}")
    return found


def middlewares(app: Any) -> list[OpenMeterMiddleware]:
    """Return every middleware of ours around *app*, the outermost first."""
    return [one for one in layers_of(app) if isinstance(one, OpenMeterMiddleware)]


def look_at_layers(name: str, found: list[OpenMeterMiddleware]) -> Iterator[Finding]:
    """Say whether an application is metered, and once."""
    if not found:
        yield failure(
            _NAME,
            f"{name} is not wrapped in OpenMeterMiddleware: nothing is billed",
            "wrap it, and name what the server serves: the outermost application",
        )
        return
    if len(found) == 1:
        yield ok(_NAME, f"{name} is metered, once")
        return
    outer, *inner = found
    said = f"{name} is wrapped {len(found)} times; the outermost alone bills"
    remedy = "remove the others; the options of single routes belong into routes"
    if all(each.policy == outer.policy for each in inner):
        yield warning(_NAME, said, remedy)
    else:
        yield failure(
            _NAME, f"{said}, and what the inner policy says is never billed", remedy
        )


def look_at_views(app: Any) -> Iterator[Finding]:
    """Say which views are metered otherwise than their decorator says."""
    for template, name in misplaced_decorators(app):
        yield failure(
            f"view {name}",
            f"its @meter or @no_meter stands above the decorator that registers it for "
            f"{template}, and has no effect",
            "put it below, next to the function",
        )
