"""The application itself: is it metered, and once?"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.commands.checks.findings import failure, ok, warning
from openmeter_wsgi.middleware import OpenMeterMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.checks.findings import Finding

_NAME = "application"
#: Where middleware and frameworks keep what they wrap.
_ATTRIBUTES = (
    "wsgi_app", "app", "application", "_app", "wrapped", "wrapped_app", "__wrapped__",
    "__self__", "func",
)  # fmt: skip
#: Deeper than this nobody wraps.
_MAX_DEPTH = 100


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
    found: list[OpenMeterMiddleware] = []
    waiting = [app]
    seen: set[int] = set()
    while waiting and len(seen) < _MAX_DEPTH:
        layer = waiting.pop(0)
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        if isinstance(layer, OpenMeterMiddleware):
            found.append(layer)
        waiting += _inner(layer)
    return found


def _inner(layer: Any) -> Iterator[Any]:
    """Yield what may be the application that a layer calls."""
    own = getattr(layer, "__dict__", {})
    for name in _ATTRIBUTES:
        value = own.get(name) if name in own else _slot(layer, name)
        if callable(value):
            yield value
    for cell in getattr(layer, "__closure__", None) or ():
        contents = _contents(cell)
        if callable(contents):
            yield contents


def _slot(layer: Any, name: str) -> Any:
    if name in {"__self__", "func"} or name in getattr(type(layer), "__slots__", ()):
        return getattr(layer, name, None)
    return None


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


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
