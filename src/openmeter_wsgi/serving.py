"""One request through the application: what the server gets for its response."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi.observation import Observation
from openmeter_wsgi.settlement import (
    UNKNOWN,
    UNSTARTED,
    ObservedSettlement,
    Settlement,
    SizedSettlement,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_wsgi.billing import Billing
    from openmeter_wsgi.metering import Metering
    from openmeter_wsgi.meters import RunTimeMeters

_FILE_WRAPPER = "wsgi.file_wrapper"
#: What settled the last response: to change a class costs more than to guess it, and
#: a wrong guess is mended by `wrap`.
_usual: type[Settlement] = Settlement


def serve(
    app: WSGIApplication,
    metering: Metering,
    billing: Billing,
    environ: dict[str, Any],
    start_response: StartResponse,
    stated: list[RunTimeMeters],
) -> Iterable[bytes]:
    """Serve a request, and settle it at its end under the policy of *billing*."""
    global _usual  # noqa: PLW0603 - a guess that any thread may make
    if billing.bodies is None:
        settlement = _usual()
    else:
        settlement = ObservedSettlement()
        settlement.observation = Observation(environ, billing.bodies)
    settlement.metering = metering
    settlement.billing = billing
    settlement.environ = environ
    settlement.server_start = start_response
    settlement.stated = stated
    settlement.iterable = UNKNOWN
    settlement.status = None
    settlement.outcome = UNSTARTED
    settlement.events = None
    files = environ.get(_FILE_WRAPPER)
    if files is not None and not isinstance(files, type):
        files = environ[_FILE_WRAPPER] = _WrappedFiles(files)
    try:
        iterable = app(environ, settlement.start_response)
    except BaseException:
        settlement.fail()
        settlement.settle()
        raise
    if type(iterable) is list and type(settlement) is SizedSettlement:
        settlement.iterable = iterable
        return settlement
    if files is not None and isinstance(iterable, files):  # type: ignore[arg-type]
        return settlement.wrap_file(iterable)
    response = settlement.wrap(iterable)
    _usual = SizedSettlement if type(response) is SizedSettlement else Settlement
    return response


class _WrappedFiles:
    """A server's file wrapper that is a function, remembering what it made.

    uWSGI's returns the file itself, which nothing else tells from an iterable of
    the application's own. Held by the environ, so it holds nothing of the request.
    """

    __slots__ = ("_made", "_wrapper")

    def __init__(self, wrapper: Callable[..., object]) -> None:
        self._wrapper = wrapper
        self._made: object = None

    def __call__(self, file: object, *block_size: int) -> object:
        self._made = self._wrapper(file, *block_size)
        return self._made

    def __instancecheck__(self, iterable: object) -> bool:
        """Let isinstance() ask this as it asks a wrapper that is a class."""
        return iterable is not None and iterable is self._made
