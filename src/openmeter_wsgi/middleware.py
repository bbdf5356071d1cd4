"""The middleware: where the parts meet."""

from __future__ import annotations

import dataclasses
import os
import weakref
from typing import TYPE_CHECKING, Any, Self

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.refusal import Refusal, quota_headers
from openmeter_wsgi.environ import BILLING, METERS
from openmeter_wsgi.metering import Metering
from openmeter_wsgi.policy import Policy
from openmeter_wsgi.settlement import settlement_of
from openmeter_wsgi.zuplo import options_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_wsgi.entitlements.decision import Decision
    from openmeter_wsgi.meters import RunTimeMeters
    from openmeter_wsgi.stats import Stats

logger = log.get_logger(__name__)

_FILE_WRAPPER = "wsgi.file_wrapper"


class OpenMeterMiddleware:
    """A WSGI application that bills what another one delivers.

    *policy* or *options* say what is billed, to whom and where to (see
    :class:`Policy`); with both, the options change the policy. Without a policy,
    what the options leave out is read from variables (``OPENMETER_API_KEY``, …).

    Making one starts no thread and opens no socket. Any thread may call it, and any
    process that is forked from this one.

    :raises ConfigError: with every problem of the configuration.
    """

    def __init__(
        self, app: WSGIApplication, policy: Policy | None = None, **options: Any
    ) -> None:
        self.app = app
        if policy is None:
            policy = Policy.from_env(**options)
        elif options:
            policy = dataclasses.replace(policy, **options)
        self.policy = policy
        self._metering = Metering(policy)
        # Not enough alone: a fork made in C, such as uWSGI's, calls no hook. So
        # every request compares the process id as well.
        renew = weakref.WeakMethod(self._renew)
        os.register_at_fork(after_in_child=lambda: (method := renew()) and method())

    @classmethod
    def from_zuplo(
        cls,
        app: WSGIApplication,
        policies: str | os.PathLike[str],
        *,
        routes: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """Make one from Zuplo's ``policies.json`` and ``routes.oas.json``, as they are.

        *options* change what they say. With routes, what none of them names is not
        metered.

        :raises ConfigError: with every problem, each with its place in the file.
        """
        return cls(app, **{**options_of(policies, routes, os.environ), **options})

    def __call__(
        self, environ: dict[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve one request (PEP 3333)."""
        if type(environ.get(METERS)) is list:
            return self._pass_through(environ, start_response)
        metering = self.metering()
        billing = metering.billing_for(environ)
        if billing is None:
            return self.app(environ, start_response)
        stated: list[RunTimeMeters] = []
        environ[METERS] = stated
        environ[BILLING] = billing
        if billing.must_ask(environ):
            decision = billing.gate.admit(environ)
            if not decision.allowed and billing.policy.enforce:
                billing.refuse(environ)
                return Refusal(decision, billing.policy)(environ, start_response)
            start_response = _told(decision, billing.policy, start_response)
        settlement = settlement_of(metering, billing, environ, start_response, stated)
        wrapper: Any = environ.get(_FILE_WRAPPER)
        if wrapper is not None and not isinstance(wrapper, type):
            wrapper = environ[_FILE_WRAPPER] = _WrappedFiles(wrapper)
        try:
            iterable = self.app(environ, settlement.start_response)
        except BaseException:
            settlement.fail()
            settlement.settle()
            raise
        if wrapper is not None and isinstance(iterable, wrapper):
            return settlement.wrap_file(iterable)
        return settlement.wrap(iterable)

    def metering(self) -> Metering:
        """Return the metering of the process that asks."""
        metering = self._metering
        if metering.pid != os.getpid():
            return self._renew()
        return metering

    def flush(self, timeout: float | None = None) -> bool:
        """Send what waits now; say whether all of it is done within *timeout*.

        Without a timeout it waits as long as OpenMeter is away.
        """
        return self.metering().queue.flush(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Send what waits, stop, and say in the log what is left.

        *timeout* is ``shutdown_timeout`` by default. Called at exit by itself; may
        be called again. A later request starts delivery anew.
        """
        self.metering().close(timeout)

    def invalidate(self, subject: str, feature: str | None = None) -> None:
        """Forget what OpenMeter said of *subject*: its next request asks.

        For webhooks: what was bought, granted or revoked shows at once, in the
        process that is told.
        """
        self.metering().invalidate(subject, feature)

    def stats(self) -> Stats:
        """Return the counts of this process."""
        return self.metering().stats()

    def _renew(self) -> Metering:
        """Leave the parent's queue to the parent, and start with an empty one."""
        if self._metering.pid != os.getpid():
            self._metering = self._metering.successor()
        return self._metering

    def _pass_through(
        self, environ: dict[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        logger.warning(
            "%s: the application is wrapped twice; the outer middleware meters",
            type(self).__name__,
        )
        return self.app(environ, start_response)


def _told(
    decision: Decision, policy: Policy, start_response: StartResponse
) -> StartResponse:
    """Return a start_response that tells of the quota, if the policy wants that."""
    headers = quota_headers(decision.quota) if policy.usage_headers else []
    if not headers:
        return start_response

    def start(
        status: str, given: list[tuple[str, str]], *exc_info: Any
    ) -> Callable[[bytes], object]:
        return start_response(status, [*given, *headers], *exc_info)

    return start


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
