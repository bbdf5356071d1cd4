"""The decorators `meter` and `no_meter` of views.

A decorator may be applied again for each request, inside a view or a class.
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


#: The most sets of options that are remembered of one view.
MAX_KNOWN = 1_000
#: No option is nested deeper, but a function may refer to itself.
_MAX_DEPTH = 12

#: By the name of the view.
_known: defaultdict[str, dict[Hashable, dict[str, Any]]] = defaultdict(dict)


def known_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the first options of the view *name* with the same content.

    Any thread. Beyond `MAX_KNOWN` it returns *options* themselves, with a warning.
    """
    of_view = _known[name]
    content = _content(options, 0)
    if (found := of_view.get(content)) is not None:
        return found
    if len(of_view) >= MAX_KNOWN:
        logger.warning(
            "%s: @meter is applied again and again with other options; each time takes "
            "memory that is never freed: apply it once",
            name,
        )
        return options
    return of_view.setdefault(content, options)


class _Same:
    """Keeps an object, and is equal only to a `_Same` of that object."""

    __slots__ = ("_object",)

    def __init__(self, thing: object) -> None:
        self._object = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._object is self._object

    def __hash__(self) -> int:
        return id(self._object)


def _content(value: object, depth: int) -> Hashable:
    """Return a hashable key, equal for equal values only."""
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
    # 1, 1.0 and True are equal, but differ on an invoice.
    return type(value), value


def _content_of_function(function: FunctionType, depth: int) -> Hashable:
    """Return a key of the code of a function, its defaults and its closure."""
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
    """Meter the requests of a view by *options*, as those of a route in ``routes``.

    The view inherits the options that it does not name from the policy of the request.
    It works for Flask, Django, Bottle and Pyramid, and for all views that get a request
    as an argument. Required entitlements are checked when the view is called, and
    `duration()` counts from there.

    :raises ConfigError: if an option is wrong, or is one of the whole middleware.
    """
    given: dict[str, Any] = {**options}
    if problems := view_problems(given):
        raise ConfigError(problems)

    def decorate(view: Callable[P, R]) -> Callable[P, R]:
        name = f"view {getattr(view, '__qualname__', view)}"
        # The billing of the view is made once for these options, and kept.
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
    """Bill a request by its view's *options*, on top of those of its route."""
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
        record.capture.add_readers(billing.bodies)


def no_meter(view: Callable[P, R]) -> Callable[P, R]:
    """Leave the requests of a view unmetered."""

    def begin(args: tuple[object, ...]) -> None:
        if (environ := _metered_environ(args)) is not None:
            leave_unmetered(environ)

    return _beginning(view, begin, None)


def _beginning(
    view: Callable[P, R],
    begin: Callable[[tuple[object, ...]], None],
    says: dict[str, Any] | None,
) -> Callable[P, R]:
    """Return *view* with a call of *begin* before it; async if *view* is async."""

    @functools.wraps(view)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        begin(args)
        return view(*args, **kwargs)

    @functools.wraps(view)
    async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
        begin(args)
        return await view(*args, **kwargs)  # type: ignore[misc]

    # A framework awaits the result of a view only if the view itself is async.
    begun: Any = awaited if _is_awaited(view) else called
    # Pyramid reads the parameters of a view.
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
    """Return True if a view checks its own entitlements, or is not metered.

    Then the entitlements of its policy are not checked before it is called.
    """
    options = getattr(view, SAYS, {})
    return options is None or "required_entitlements" in options


def _metered_environ(args: tuple[object, ...]) -> dict[str, Any] | None:
    """Return the environ of the metered request of a view, None if there is none."""
    for argument in _requests(args):
        # Another decorator may pass a mapping of its own, such as a user.
        environ = environ_of(argument)
        if metered_request(environ) is not None:
            return environ
    return None


def _requests(args: tuple[object, ...]) -> Iterator[object]:
    """Yield objects that may be the request of a view that is called with *args*."""
    for argument in args:
        yield argument
        # A view class of Pyramid keeps it in an attribute.
        yield getattr(argument, "request", None)
    flask = sys.modules.get("flask")
    if flask is not None and flask.has_request_context():
        yield flask.request
    bottle = sys.modules.get("bottle")
    # Outside a request it has no environ, or that of the last request.
    with contextlib.suppress(RuntimeError):
        environ = None if bottle is None else bottle.request.environ
        request = metered_request(environ)
        if request is not None and request.state < SETTLED:
            yield environ
