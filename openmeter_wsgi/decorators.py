"""Decorators of a view: how its requests are metered.

A decorator may be applied anew for each request, in a view or by a class made for it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar, Unpack

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.handlers import require_entitlements
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.exchange import ResponseCapture
from openmeter_wsgi.framework_routes import SAYS, note_decorated
from openmeter_wsgi.measures import Measure
from openmeter_wsgi.policy import view_problems
from openmeter_wsgi.request import (
    SETTLED,
    environ_of,
    leave_unmetered,
    metered_request,
    open_record,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from openmeter_wsgi.option_types import RouteOptions

logger: Final = log.get_logger(__name__)


#: Options of one view that are remembered.
MAX_KNOWN = 1_000
#: Deeper than this no option is nested, but a function may refer to itself.
_MAX_DEPTH = 12

#: By the name of the view.
_known: defaultdict[str, dict[Hashable, dict[str, Any]]] = defaultdict(dict)


def known_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the view *name* that have this content: the first of them.

    Any thread. Past `MAX_KNOWN` a view gets its own, with a warning.
    """
    of_view = _known[name]
    content = _content(options, 0)
    if (found := of_view.get(content)) is not None:
        return found
    if len(of_view) >= MAX_KNOWN:
        logger.warning(
            "%s: @meter is applied again and again, with other options each time; each "
            "time costs memory that is never given back: apply it once",
            name,
        )
        return options
    return of_view.setdefault(content, options)


class _Same:
    """Stands for an object that is equal to itself alone, and keeps it."""

    __slots__ = ("_object",)

    def __init__(self, thing: object) -> None:
        self._object = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._object is self._object

    def __hash__(self) -> int:
        return id(self._object)


def _content(value: object, depth: int) -> Hashable:
    """Return what equals the content of an equal value, and of no other one."""
    if depth > _MAX_DEPTH:
        return _Same(value)
    inner = depth + 1
    if isinstance(value, Mapping):
        return "mapping", *((key, _content(v, inner)) for key, v in value.items())
    if isinstance(value, list | tuple):
        return "sequence", *(_content(each, inner) for each in value)
    if isinstance(value, Measure):
        return "measure", *(_content(each, inner) for each in value.content)
    if isinstance(value, FunctionType):
        return _content_of_function(value, inner)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    # 1, 1.0 and True are equal, and are not the same on an invoice.
    return type(value), value


def _content_of_function(function: FunctionType, depth: int) -> Hashable:
    """Return what a function does: its code, and what it has from where it was made."""
    cells = function.__closure__ or ()
    try:
        closed_over = [cell.cell_contents for cell in cells]
    except ValueError:  # not assigned yet
        return _Same(function)
    own = [function.__defaults__, function.__kwdefaults__, *closed_over]
    return function.__code__, *(_content(each, depth) for each in own)


P = ParamSpec("P")
R = TypeVar("R")


def meter(
    **options: Unpack[RouteOptions],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let *options* govern the requests of a view, as ``routes`` would.

    What they do not name is inherited from the policy of the request. For views of
    Flask, Django, Bottle and Pyramid, and any other whose request is an argument.
    Entitlements that they require are asked for when the view is called. `duration()`
    counts from there.

    :raises ConfigError: if an option is wrong, or is one of the whole middleware.
    """
    given: dict[str, Any] = {**options}
    if problems := view_problems(given):
        raise ConfigError(problems)

    def decorate(view: Callable[P, R]) -> Callable[P, R]:
        name = f"view {getattr(view, '__qualname__', view)}"
        # What bills the view is made once for these options, and kept.
        own_options = known_options(name, given)

        def begin(args: tuple[object, ...]) -> None:
            environ = _metered_environ(args)
            if environ is None:
                logger.warning(
                    "%s: called outside a metered request, so it is not billed: "
                    "routes says None for its route, or for '*'",
                    name,
                )
                return
            _bill_as_view(environ, name, own_options)
            if required := given.get("required_entitlements"):
                require_entitlements(environ, *required)

        return _beginning(view, begin, given)

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
        record.capture = ResponseCapture(environ, billing.bodies, is_late=True)
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
    # Pyramid looks at the parameters of a view to know what it takes.
    with contextlib.suppress(ValueError, TypeError):
        begun.__signature__ = inspect.signature(view)
    setattr(begun, SAYS, says)
    note_decorated(view)
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
    options = getattr(view, SAYS, {})
    return options is None or "required_entitlements" in options


def _metered_environ(args: tuple[object, ...]) -> dict[str, Any] | None:
    """Return the environ of the request that a view is called for, if it is metered."""
    for argument in _requests(args):
        # Another decorator may hand over a mapping of its own, such as a user.
        environ = environ_of(argument)
        if metered_request(environ) is not None:
            return environ
    return None


def _requests(args: tuple[object, ...]) -> Iterator[object]:
    """Yield what may be the request of a view that is called with *args*."""
    for argument in args:
        yield argument
        # A class of Pyramid's keeps it for its methods.
        yield getattr(argument, "request", None)
    flask = sys.modules.get("flask")
    if flask is not None and flask.has_request_context():
        yield flask.request
    bottle = sys.modules.get("bottle")
    # In a thread without a request it has no environ, and after one that of the last.
    with contextlib.suppress(RuntimeError):
        environ = None if bottle is None else bottle.request.environ
        request = metered_request(environ)
        if request is not None and request.state < SETTLED:
            yield environ
