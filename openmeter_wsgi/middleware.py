"""`OpenMeterMiddleware`: wraps an application and passes on each response."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any, Final, Unpack

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.handlers import (
    DeniedResponse,
    EntitlementDenied,
    with_quota,
)
from openmeter_wsgi.errors import NOT_ON_WINDOWS, ConfigError
from openmeter_wsgi.exchange import ResponseCapture
from openmeter_wsgi.request import (
    OPEN,
    REQUEST,
    RequestRecord,
    begin_again,
)
from openmeter_wsgi.response import (
    FILE_WRAPPER,
    Response,
    SizedResponse,
    fail,
    give_file,
    is_file,
    is_iterable,
    remember_files,
)
from openmeter_wsgi.stats import MAX_AGE, Health

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_wsgi.billing import Billing
    from openmeter_wsgi.option_types import Options
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.process import FirstRequestHook, NewProcess, Process
    from openmeter_wsgi.stats import Stats

logger: Final = log.get_logger(__name__)


class OpenMeterMiddleware:
    """A WSGI application that bills the responses of another one.

    *options* are those of :class:`Policy`; given with a *policy*, they change it.
    Without a policy, missing options are read from variables (``OPENMETER_API_KEY``,
    …).

    The constructor starts no thread and opens no socket. Any thread may call the
    middleware, in this process and in those forked from it.

    :raises ConfigError: with every problem of the configuration.
    """

    #: True if entitlements are checked before the application is called. Subclasses
    #: for frameworks set False and check them later, when the caller is known.
    _asks_first = True

    def __init__(
        self,
        app: WSGIApplication,
        policy: Policy | None = None,
        **options: Unpack[Options],
    ) -> None:
        # Imported here because this is most of the package. No request imports it.
        from openmeter_wsgi.policy import Policy
        from openmeter_wsgi.process import Process, new_process_for

        if sys.platform == "win32":
            raise ConfigError([NOT_ON_WINDOWS])
        if not callable(app):
            raise ConfigError(
                [f"app: expected a WSGI application, which can be called, got {app!r}"]
            )
        self.app = app
        if policy is None:
            policy = Policy.from_env(**options)
        elif options:
            changes: dict[str, Any] = {**options}
            policy = dataclasses.replace(policy, **changes)
        self.policy = policy
        self._new_process = new_process_for(self)
        if self._new_process is Process:
            _prepare_spool(policy)
        self._process = self._new_process(policy)
        if self._new_process is Process:
            self._process.say_what_errors_are_billed()
        self._look_at_views()

    # One function: each call would slow down every request.
    def __call__(  # noqa: C901
        self, environ: dict[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve one request (PEP 3333)."""
        process = self._process
        if not process.guard.is_current():
            process = self._confirmed_process()
        billing: Billing | None = process.billing
        if process.routes is not None:
            billing = process.routes.find(environ)
        if billing is None:
            return self.app(environ, start_response)
        if REQUEST in environ:
            request = begin_again(environ, billing, start_response)
            if request is None:
                self._say_that_it_is_nested()
                return self.app(environ, start_response)
        else:
            # `new_record`, inlined: a call would cost each request.
            request = environ[REQUEST] = RequestRecord()
            request.billing = billing
            request.state = OPEN
            request.server_start = start_response
            request.status = request.server_write = request.capture = None
            request.caller = request.usage = request.route = None
            request.decision = request.reserved = request.remembered = None
        if billing.asks and self._asks_first:
            refusal = _refusal(billing, environ, request)
            if refusal is not None:
                return refusal(environ, start_response)
        if billing.bodies is not None:
            request.capture = ResponseCapture(environ, billing.bodies)
        files = remember_files(environ) if FILE_WRAPPER in environ else None
        try:
            iterable = self.app(environ, request.start_response)
        except EntitlementDenied as denied:
            # The application, or its framework, did not answer it.
            iterable = denied.answer(
                environ, request.start_response, is_started=request.status is not None
            )
        except BaseException:
            fail(environ, request)
            raise
        if files is not None and is_file(files, iterable):
            file = give_file(environ, request, iterable)
            return file if process.watch is None else process.watch(file)
        response: Response
        if type(iterable) is list or hasattr(iterable, "__len__"):
            response = SizedResponse()
        elif is_iterable(iterable):
            response = Response()
        else:
            # Such as gunicorn's ALREADY_HANDLED: the application took the socket.
            billing.hand_over(environ, request)
            return iterable
        response.environ = environ
        response.request = request
        response.iterable = iterable
        return response if process.watch is None else process.watch(response)

    def _say_that_it_is_nested(self) -> None:
        logger.warning(
            "%s: the application is wrapped twice; the outer middleware meters",
            type(self).__name__,
        )

    def process(self) -> Process:
        """Return the `Process` of the calling process.

        It is made anew after a fork, and after gevent has replaced threads. Events that
        the parent queued stay with the parent.
        """
        process = self._process
        if not process.guard.fits():
            process = process.successor(self._new_process, self.policy)
            self._process = process
        return process

    def _confirmed_process(self) -> Process:
        """Return the `Process` for the requests of this process, and confirm it."""
        process = self.process()
        process.guard.confirm()
        return process

    def flush(self, timeout: float | None = None) -> bool:
        """Send the waiting events; return True if all are done within *timeout*.

        Without a timeout it waits until OpenMeter answers.
        """
        return self.process().transport.flush(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Send the waiting events, stop delivery, and log the events that are left.

        *timeout* defaults to ``shutdown_timeout``. The exit of the process calls it. It
        may be called again; a later request starts delivery again.
        """
        self.process().close(timeout)

    def invalidate(self, subject: str, feature: str | None = None) -> None:
        """Forget the cached answers about *subject*: its next request asks OpenMeter.

        Call it from a webhook, so that a purchase, grant or revocation takes effect at
        once in this process.
        """
        self.process().invalidate(subject, feature)

    def stats(self) -> Stats:
        """Return the counts of this process."""
        return self.process().stats()

    def health(self, *, max_age: float = MAX_AGE) -> Health:
        """Return the current problems of this process, without waiting.

        :param max_age: seconds that the oldest event may wait.
        """
        return self.process().health(max_age)

    def on_first_request(self, hook: FirstRequestHook) -> None:
        """Call *hook* in each process, with the first request that it settles.

        A hook may start a thread there: threads started earlier do not survive the
        forks of a server.
        """
        self.process().on_first_request(hook)

    def replace_process(self, new_process: NewProcess) -> Callable[[], None]:
        """Use *new_process* to make every `Process`; return a function that undoes it.

        Called by `openmeter_wsgi.process.replaced`, between two requests.
        """
        before = self._process, self._new_process
        self._new_process = new_process
        self._process = new_process(self.policy)
        self._look_at_views()

        def restore() -> None:
            self._process, self._new_process = before

        return restore

    def __del__(self) -> None:
        # A test suite makes hundreds of applications and closes none of them.
        if (process := getattr(self, "_process", None)) is not None:
            process.release()

    def _look_at_views(self) -> None:
        """Warn of misplaced decorators with the first request, when all views exist."""
        app = self.app
        self._process.on_first_request(lambda _: _warn_of_misplaced_decorators(app))


def _warn_of_misplaced_decorators(app: WSGIApplication) -> None:
    # Not imported means that no decorator is in use.
    routes = sys.modules.get("openmeter_wsgi.framework_routes")
    if routes is not None:
        routes.warn_of_misplaced_decorators(app)


def _prepare_spool(policy: Policy) -> None:
    if policy.spool_dir is not None and not policy.dry_run:
        from openmeter_wsgi.spool import server_directories

        server = server_directories.server_of_policy(policy)
        server_directories.prepare_server_directory(policy.spool_dir, server)


def _warn_of_unknown_subject() -> None:
    logger.warning(
        "a request was answered 401 before it reached the application, "
        "as no subject was known; where the application calls set_user or set_subject, "
        "use openmeter_wsgi.flask.OpenMeter, openmeter_wsgi.django, or "
        "require_entitlements in the view, which ask after authentication"
    )


def _refusal(
    billing: Billing, environ: dict[str, Any], request: RequestRecord
) -> DeniedResponse | None:
    """Return the response to a denied request, None if it is allowed."""
    # The cache answers most requests, so it is asked first.
    if not billing.gate.passes(environ, request) and billing.must_ask(environ):
        decision = billing.gate.admit(environ)
        if not decision.allowed and billing.policy.enforce:
            billing.refuse(environ)
            request.end()
            (denial, *_) = decision.denied
            if denial.reason == "no_subject" and billing.policy.subject is None:
                _warn_of_unknown_subject()
            return DeniedResponse(decision, billing.policy)
    if billing.tells_quota and request.server_start is not None:
        request.server_start = with_quota(request.decision, request.server_start)
    return None
