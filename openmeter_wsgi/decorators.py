"""The decorators `meter` and `no_meter` for views.

They bill a request by the options of its view in place of those of its route. A view
may be decorated anew in each request, for example a function inside another view. So
equal options are interned (`intern_options`): each set of options has one `Billing`.
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
from openmeter_wsgi.entitlements.denials import require_entitlements
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.exchange import ResponseCapture
from openmeter_wsgi.framework_routes import OPTIONS_ATTRIBUTE, note_decorated
from openmeter_wsgi.measures import Measure
from openmeter_wsgi.policy import view_problems
from openmeter_wsgi.request import (
    SETTLED,
    environ_of,
    mark_unmetered,
    metered_request,
    unsettled_record,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from openmeter_wsgi.option_types import RouteOptions

logger: Final = log.get_logger(__name__)

#: Maximum number of interned sets of options per view.
MAX_OPTION_SETS = 1_000
#: Maximum depth of nested values in a key. A function may refer to itself.
_MAX_DEPTH = 12

#: Interned options: by the name of the view, then by a key of their content.
_interned: defaultdict[str, dict[Hashable, dict[str, Any]]] = defaultdict(dict)


def intern_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the first options of the view *name* that were equal to *options*.

    With more than `MAX_OPTION_SETS` sets per view, return *options* and log a warning.
    Any thread.
    """
    of_view = _interned[name]
    content = _content_key(options, 0)
    if (interned := of_view.get(content)) is not None:
        return interned
    if len(of_view) >= MAX_OPTION_SETS:
        logger.warning(
            "%s: @meter is applied again and again with different options, and each "
            "time takes memory that is never freed; apply it once",
            name,
        )
        return options
    return of_view.setdefault(content, options)


class _ByIdentity:
    """A key that is equal only to a key of the same object."""

    __slots__ = ("_object",)

    def __init__(self, thing: object) -> None:
        self._object = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other._object is self._object

    def __hash__(self) -> int:
        return id(self._object)


def _content_key(value: object, depth: int) -> Hashable:
    """Return a hashable key. Keys are equal only if the values are equal."""
    if depth > _MAX_DEPTH:
        return _ByIdentity(value)
    inner = depth + 1
    if isinstance(value, Mapping):
        return "mapping", *((key, _content_key(v, inner)) for key, v in value.items())
    if isinstance(value, list | tuple):
        return "sequence", *(_content_key(item, inner) for item in value)
    if isinstance(value, Measure):
        return "measure", *(_content_key(item, inner) for item in value.content)
    if isinstance(value, FunctionType):
        return _function_key(value, inner)
    try:
        hash(value)
    except TypeError:
        return _ByIdentity(value)
    # With the type: 1, 1.0 and True are equal, but are billed differently.
    return type(value), value


def _function_key(function: FunctionType, depth: int) -> Hashable:
    """Return a key of a function: its code, default arguments and closure."""
    cells = function.__closure__ or ()
    try:
        closed_over = [cell.cell_contents for cell in cells]
    except ValueError:  # a variable of the closure is not assigned yet
        return _ByIdentity(function)
    values = [function.__defaults__, function.__kwdefaults__, *closed_over]
    return function.__code__, *(_content_key(item, depth) for item in values)


P = ParamSpec("P")
R = TypeVar("R")


def meter(
    **options: Unpack[RouteOptions],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Meter the requests of a view by *options*, the same as of a route in ``routes``.

    Options that are not given are inherited from the policy of the route. Works with
    Flask, Django, Bottle and Pyramid, and with any view that gets the request as an
    argument. When the view is called, required entitlements are checked, and the time
    of :func:`duration` starts.

    :raises ConfigError: if an option is invalid, or applies only to the whole
        middleware.
    """
    given: dict[str, Any] = {**options}
    if problems := view_problems(given):
        raise ConfigError(problems)

    def decorate(view: Callable[P, R]) -> Callable[P, R]:
        name = f"view {getattr(view, '__qualname__', view)}"
        # Interned: the billing is stored by the identity of these options.
        own_options = intern_options(name, given)

        def begin(args: tuple[object, ...]) -> None:
            environ = _metered_environ(args)
            if environ is None:
                logger.warning(
                    "%s: called outside a metered request, so it is not billed, and "
                    "its entitlements are not checked: the request did not come "
                    "through the middleware, or routes has None for its route or '*'",
                    name,
                )
                return
            _bill_as_view(environ, name, own_options)
            if required := given.get("required_entitlements"):
                require_entitlements(environ, *required)

        return _wrap_view(view, begin, given)

    return decorate


def _bill_as_view(
    environ: dict[str, Any], name: str, options: Mapping[str, Any]
) -> None:
    """Bill a request by the *options* of its view, and else by those of its route."""
    record = unsettled_record(environ, "meter")
    if record is None or record.billing is None:
        return
    billing = record.billing = record.billing.variant(name, options)
    if record.usage is not None:
        record.usage.is_unmetered = False
    if billing.body_readers is None:
        return
    if record.capture is None:
        record.capture = ResponseCapture(environ, billing.body_readers, is_late=True)
    else:
        record.capture.add_readers(billing.body_readers)


def no_meter(view: Callable[P, R]) -> Callable[P, R]:
    """Exclude the requests of a view from metering: they are counted, not billed."""

    def begin(args: tuple[object, ...]) -> None:
        if (environ := _metered_environ(args)) is not None:
            mark_unmetered(environ)

    return _wrap_view(view, begin, None)


def _wrap_view(
    view: Callable[P, R],
    begin: Callable[[tuple[object, ...]], None],
    options: dict[str, Any] | None,
) -> Callable[P, R]:
    """Return a view that calls *begin*, then *view*. It is async if *view* is async."""

    @functools.wraps(view)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        begin(args)
        return view(*args, **kwargs)

    @functools.wraps(view)
    async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
        begin(args)
        return await view(*args, **kwargs)  # type: ignore[misc]

    # A framework awaits the result of a view only if the view itself is async.
    wrapper: Any = awaited if _is_async(view) else called
    # Pyramid inspects the parameters of a view.
    with contextlib.suppress(ValueError, TypeError):
        wrapper.__signature__ = inspect.signature(view)
    setattr(wrapper, OPTIONS_ATTRIBUTE, options)
    note_decorated(view)
    typed_wrapper: Callable[P, R] = wrapper
    return typed_wrapper


def _is_async(view: object) -> bool:
    # asgiref also knows functions that Django marks as async without `async def`.
    asgiref = sys.modules.get("asgiref.sync")
    is_coroutine_function: Callable[[object], bool] = (
        inspect.iscoroutinefunction if asgiref is None else asgiref.iscoroutinefunction
    )
    return is_coroutine_function(view)


def checks_own_entitlements(view: object) -> bool:
    """Return True if a view checks its own entitlements, or is not metered.

    The entitlements of the policy are not checked before such a view is called.
    """
    options = getattr(view, OPTIONS_ATTRIBUTE, {})
    return options is None or "required_entitlements" in options


def _metered_environ(args: tuple[object, ...]) -> dict[str, Any] | None:
    """Return the environ of the metered request, found by the *args* of a view."""
    for argument in _requests(args):
        # An argument may be a dictionary that is no environ, such as a user.
        environ = environ_of(argument)
        if metered_request(environ) is not None:
            return environ
    return None


def _requests(args: tuple[object, ...]) -> Iterator[object]:
    """Yield all objects that may be the request of a view called with *args*."""
    for argument in args:
        yield argument
        # View classes of Pyramid store the request in an attribute.
        yield getattr(argument, "request", None)
    flask = sys.modules.get("flask")
    if flask is not None and flask.has_request_context():
        yield flask.request
    bottle = sys.modules.get("bottle")
    # Outside a request, Bottle has no environ, or that of the last request.
    with contextlib.suppress(RuntimeError):
        environ = None if bottle is None else bottle.request.environ
        request = metered_request(environ)
        if request is not None and request.state < SETTLED:
            yield environ
