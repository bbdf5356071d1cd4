"""A view that says of itself how it is metered, where it stands."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.handlers import require_entitlements
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.exchange import ResponseCapture
from openmeter_wsgi.policy import view_problems
from openmeter_wsgi.request import (
    environ_of,
    leave_unmetered,
    metered_request,
    open_record,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = log.get_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


#: What a decorated view says of itself: its options, None if it is not metered.
#: Decorators around it hand it on (``functools.wraps``).
_SAYS = "openmeter_wsgi_options"


def meter(**options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let *options* govern the requests of a view, as ``routes`` would.

    What they do not name is inherited from the policy of the request. For views of
    Flask and Django, and any other whose request is among its arguments. Entitlements
    that they require are asked for when the view is called. `duration()` counts from
    there.

    :raises ConfigError: if an option is wrong, or is one of the whole middleware.
    """
    if problems := view_problems(options):
        raise ConfigError(problems)

    def decorate(view: Callable[P, R]) -> Callable[P, R]:
        name = f"view {getattr(view, '__qualname__', view)}"

        def begin(args: tuple[object, ...]) -> None:
            environ = _metered_environ(args)
            if environ is None:
                logger.warning(
                    "%s: called outside a metered request, so it is not billed (see "
                    "routes and unmatched)",
                    name,
                )
                return
            _bill_as_view(environ, name, options)
            if required := options.get("required_entitlements"):
                require_entitlements(environ, *required)

        return _beginning(view, begin, options)

    return decorate


def _bill_as_view(
    environ: dict[str, Any], name: str, options: Mapping[str, Any]
) -> None:
    """Let a view's own *options* govern a request, on top of what its route says."""
    record = open_record(environ, "meter")
    if record is None or record.billing is None:
        return
    billing = record.billing = record.billing.variant(name, options)
    if record.usage is not None:
        record.usage.is_unmetered = False
    if billing.bodies is None:
        return
    if record.capture is None:
        record.capture = ResponseCapture(environ, billing.bodies)
    else:
        record.capture.look_at(billing.bodies)


def no_meter(view: Callable[P, R]) -> Callable[P, R]:
    """Let the requests of a view not be metered."""

    def begin(args: tuple[object, ...]) -> None:
        if (environ := _metered_environ(args)) is not None:
            leave_unmetered(environ)

    return _beginning(view, begin, None)


def _beginning(
    view: Callable[P, R],
    begin: Callable[[tuple[object, ...]], None],
    says: dict[str, Any] | None,
) -> Callable[P, R]:
    """Return *view* with *begin* before it: awaited, if that is to be awaited."""

    @functools.wraps(view)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        begin(args)
        return view(*args, **kwargs)

    @functools.wraps(view)
    async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
        begin(args)
        return await view(*args, **kwargs)  # type: ignore[misc]

    # A framework looks at a view to know whether it has to await what that returns.
    begun: Any = awaited if _is_awaited(view) else called
    setattr(begun, _SAYS, says)
    wrapped: Callable[P, R] = begun
    return wrapped


def _is_awaited(view: object) -> bool:
    # Django marks a function that only hands on to one with `async def`.
    asgiref = sys.modules.get("asgiref.sync")
    is_coroutine_function: Callable[[object], bool] = (
        inspect.iscoroutinefunction if asgiref is None else asgiref.iscoroutinefunction
    )
    return is_coroutine_function(view)


def asks_itself(view: object) -> bool:
    """Say whether a view sees to its entitlements, or is not metered at all.

    If so, what its policy requires is not asked for before it is called.
    """
    options = getattr(view, _SAYS, {})
    return options is None or "required_entitlements" in options


def _metered_environ(args: tuple[object, ...]) -> dict[str, Any] | None:
    """Return the environ of the request that a view is called for, if it is metered."""
    flask = sys.modules.get("flask")
    if flask is not None and flask.has_request_context():
        args = (*args, flask.request)
    for argument in args:
        # Another decorator may hand over a mapping of its own, such as a user.
        environ = environ_of(argument)
        if metered_request(environ) is not None:
            return environ
    return None
