"""One request through the application: what the server gets for its response."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.handlers import EntitlementDenied
from openmeter_wsgi.entitlements.refusal import Refusal, telling_quota
from openmeter_wsgi.environ import ENDED, METERS, STATED
from openmeter_wsgi.observation import Observation
from openmeter_wsgi.settlement import (
    UNSTARTED,
    ListSettlement,
    ObservedSettlement,
    Settlement,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_wsgi.billing import Billing
    from openmeter_wsgi.metering import Metering

logger = log.get_logger(__name__)

_FILE_WRAPPER = "wsgi.file_wrapper"
#: What settled the last response: to change a class costs more than to guess it, and
#: a wrong guess is mended by `wrap`.
_usual: type[Settlement] = Settlement


class Serving:
    """A WSGI application that settles what another one answers.

    A subclass makes what is metered with, and says what the process has to do with it.
    """

    app: WSGIApplication
    #: Whether required entitlements are asked for before the application is called;
    #: otherwise it asks, once it knows who is calling.
    _asks_first = True
    _metering: Metering
    #: What sees responses in a test before its client does.
    _watch: Callable[[Iterable[bytes]], Iterable[bytes]] | None

    def __call__(  # noqa: C901 - in one piece: a call would cost every request
        self, environ: dict[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve one request (PEP 3333)."""
        metering = self._metering
        if not metering.is_own[0]:
            metering = self._renew()
        billing = metering.plain
        app, kind = self.app, _usual
        if billing is None:
            billing = metering.gated
            if billing is None or not self._asks_first or not billing.passes(environ):
                billing = self._governing(metering, environ)
                if billing is None:
                    return self.app(environ, start_response)
                if self._asks_first and (refusal := _refusal(billing, environ)):
                    return refusal(environ, start_response)
            if billing.tells_quota:
                start_response = telling_quota(environ, start_response)
            if billing.bodies is not None:
                kind = ObservedSettlement
            elif self._watch is not None:
                kind = Settlement
        cell = [billing, None]
        if environ.setdefault(METERS, cell) is not cell and not _renewed(environ, cell):
            self._say_that_it_is_nested()
            return self.app(environ, start_response)
        settlement = kind()
        settlement.billing = billing
        settlement.cell = cell
        settlement.environ = environ
        settlement.server_start = start_response
        settlement.progress = UNSTARTED
        if billing.bodies is not None:
            settlement.observation = Observation(environ, billing.bodies)
        files = None
        if _FILE_WRAPPER in environ:
            files = environ[_FILE_WRAPPER]
            if not isinstance(files, type):
                files = environ[_FILE_WRAPPER] = _WrappedFiles(files)
        try:
            iterable = app(environ, settlement.start_response)
        except EntitlementDenied as denied:
            # Of an application, or a framework, that does not answer it itself.
            iterable = denied.answer(
                environ,
                settlement.start_response,
                is_started=hasattr(settlement, "status"),
            )
        except BaseException:
            settlement.fail()
            settlement.settle()
            raise
        if type(iterable) is list and type(settlement) is ListSettlement:
            settlement.iterable = iterable
            return settlement
        response = _response(settlement, iterable, files)
        return response if self._watch is None else self._watch(response)

    def _renew(self) -> Metering:
        """Return the metering of this process, which was forked meanwhile."""
        raise NotImplementedError

    def _governing(self, metering: Metering, environ: dict[str, Any]) -> Billing | None:
        """Return what bills a request, None if it is not metered here."""
        if METERS in environ and environ[METERS][STATED] is not ENDED:
            self._say_that_it_is_nested()
            return None
        routes = metering.routes
        return metering.billing if routes is None else routes.find(environ)

    def _say_that_it_is_nested(self) -> None:
        logger.warning(
            "%s: the application is wrapped twice; the outer middleware meters",
            type(self).__name__,
        )


def _refusal(billing: Billing, environ: dict[str, Any]) -> Refusal | None:
    """Return what answers in place of the application, None if it may."""
    if not billing.must_ask(environ):
        return None
    decision = billing.gate.admit(environ)
    if decision.allowed or not billing.policy.enforce:
        return None
    billing.refuse(environ)
    return Refusal(decision, billing.policy)


def _renewed(environ: dict[str, Any], cell: list[Any]) -> bool:
    """Give *environ* another cell, if it has one of a request that has ended."""
    has_ended: bool = environ[METERS][STATED] is ENDED
    if has_ended:
        environ[METERS] = cell
    return has_ended


def _response(
    settlement: Settlement, iterable: Iterable[bytes], files: Any
) -> Iterable[bytes]:
    """Return what the server gets for what the application has returned."""
    global _usual  # noqa: PLW0603 - a guess that any thread may make
    if files is not None and isinstance(iterable, files):
        return settlement.wrap_file(iterable)
    response = settlement.wrap(iterable)
    if not isinstance(response, ObservedSettlement):
        _usual = type(response)
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
