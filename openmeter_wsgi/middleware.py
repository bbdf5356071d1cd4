"""`OpenMeterMiddleware`: the WSGI middleware that wraps an application.

For each request, on the server's thread, `__call__` selects the `Billing` that applies,
checks entitlements if the policy requires any, calls the application, and returns its
iterable in a `Response`. The `Response` settles the request when the server closes it:
it puts the events to bill into the queue. A background thread sends them.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any, Final, Unpack

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.denials import (
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
    adopt_record,
)
from openmeter_wsgi.response import (
    FILE_WRAPPER,
    Response,
    SizedResponse,
    is_iterable,
    is_wrapped_file,
    settle_failed,
    settle_when_closed,
    track_wrapped_files,
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
    """WSGI middleware that bills the responses of *app* (PEP 3333).

    Keyword *options* are those of :class:`Policy`. With a *policy*, they override its
    options. Without one, options that are not given are read from environment
    variables (``OPENMETER_API_KEY``, …).

    The constructor starts no thread and opens no socket. Any thread may call the
    middleware, in this process and in processes forked from it.

    :raises ConfigError: listing all problems of the configuration.
    """

    #: True if entitlements are checked before the application is called. Subclasses
    #: for frameworks set False and check them after authentication.
    _checks_entitlements_first = True

    def __init__(
        self,
        app: WSGIApplication,
        policy: Policy | None = None,
        **options: Unpack[Options],
    ) -> None:
        # Not imported at the top: these two modules import most of the package.
        from openmeter_wsgi.policy import Policy
        from openmeter_wsgi.process import Process, register_middleware

        if sys.platform == "win32":
            raise ConfigError([NOT_ON_WINDOWS])
        if not callable(app):
            raise ConfigError(
                [f"app: expected a WSGI application (a callable), got {app!r}"]
            )
        self.app = app
        if policy is None:
            policy = Policy.from_env(**options)
        elif options:
            changes: dict[str, Any] = {**options}
            policy = dataclasses.replace(policy, **changes)
        self.policy = policy
        self._process_factory = register_middleware(self)
        # False while `openmeter_wsgi.testing` replaces the process.
        is_real = self._process_factory is Process
        if is_real:
            _prepare_spool(policy)
        self._process = self._process_factory(policy)
        if is_real:
            self._process.warn_of_billed_errors()
        self._check_decorators_later()

    # One long function: each further call would cost every request.
    def __call__(  # noqa: C901
        self, environ: dict[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve one request (PEP 3333)."""
        process = self._process
        if not process.guard.is_confirmed():
            process = self._confirmed_process()
        billing: Billing | None = process.billing
        if process.routes is not None:
            billing = process.routes.find(environ)
        if billing is None:
            return self.app(environ, start_response)
        if REQUEST in environ:
            request = adopt_record(environ, billing, start_response)
            if request is None:
                self._warn_of_nesting()
                return self.app(environ, start_response)
        else:
            # `new_record`, inlined to save a call per request.
            request = environ[REQUEST] = RequestRecord()
            request.billing = billing
            request.state = OPEN
            request.server_start = start_response
            request.status = request.server_write = request.capture = None
            request.caller = request.usage = request.route = None
            request.decision = request.reserved = request.remembered = None
        if billing.requires_entitlements and self._checks_entitlements_first:
            denied_response = _denied_response(billing, environ, request)
            if denied_response is not None:
                return denied_response(environ, start_response)
        if billing.body_readers is not None:
            request.capture = ResponseCapture(environ, billing.body_readers)
        file_wrapper = track_wrapped_files(environ) if FILE_WRAPPER in environ else None
        try:
            iterable = self.app(environ, request.start_response)
        except EntitlementDenied as denied:
            # Neither the application nor its framework caught the exception.
            iterable = denied.answer(
                environ, request.start_response, is_started=request.status is not None
            )
        except BaseException:
            settle_failed(environ, request)
            raise
        # Below, `process.wrap` is None except in tests.
        if file_wrapper is not None and is_wrapped_file(file_wrapper, iterable):
            file = settle_when_closed(environ, request, iterable)
            return file if process.wrap is None else process.wrap(file)
        response: Response
        if type(iterable) is list or hasattr(iterable, "__len__"):
            response = SizedResponse()
        elif is_iterable(iterable):
            response = Response()
        else:
            # gunicorn's ALREADY_HANDLED, for example: the application took the socket.
            billing.count_handed_over(environ, request)
            return iterable
        response.environ = environ
        response.request = request
        response.iterable = iterable
        return response if process.wrap is None else process.wrap(response)

    def _warn_of_nesting(self) -> None:
        logger.warning(
            "%s: the application is wrapped twice; only the outer middleware bills",
            type(self).__name__,
        )

    def process(self) -> Process:
        """Return the `Process` of the calling process.

        A new one is made after a fork, and after gevent has patched `threading`.
        """
        process = self._process
        if not process.guard.is_valid():
            process = process.successor(self._process_factory, self.policy)
            self._process = process
        return process

    def _confirmed_process(self) -> Process:
        """Return the `Process` of this process, and mark its guard as confirmed."""
        process = self.process()
        process.guard.confirm()
        return process

    def flush(self, timeout: float | None = None) -> bool:
        """Send the queued events; return True if none is left at the end. Any thread.

        :param timeout: maximum wait in seconds; None waits until OpenMeter answers.
        """
        return self.process().transport.flush(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Send the queued events, stop delivery, and log the number of events left.

        Called when the process exits. A later request restarts delivery.

        :param timeout: maximum wait in seconds; default: ``shutdown_timeout``.
        """
        self.process().close(timeout)

    def invalidate(self, subject: str, feature: str | None = None) -> None:
        """Remove the cached entitlements of *subject*: OpenMeter is asked again.

        Call it from a webhook: a purchase, grant or revocation then takes effect at
        once in this process.

        :param feature: key of the feature to remove; None removes all features.
        """
        self.process().invalidate(subject, feature)

    def stats(self) -> Stats:
        """Return the counts of this process."""
        return self.process().stats()

    def health(self, *, max_age: float = MAX_AGE) -> Health:
        """Return the current problems of this process, without waiting.

        :param max_age: maximum age of the oldest queued event, in seconds.
        """
        return self.process().health(max_age)

    def on_first_request(self, hook: FirstRequestHook) -> None:
        """Call *hook* once in each process, when the process settles its first request.

        A hook may start threads. Threads started before a server forks do not exist in
        its workers.
        """
        self.process().on_first_request(hook)

    def replace_process(self, new_process: NewProcess) -> Callable[[], None]:
        """Make each `Process` with *new_process*; return a function that undoes this.

        `openmeter_wsgi.process.replaced` calls it between two requests, for tests.
        """
        previous = self._process, self._process_factory
        self._process_factory = new_process
        self._process = new_process(self.policy)
        self._check_decorators_later()

        def restore() -> None:
            self._process, self._process_factory = previous

        return restore

    def __del__(self) -> None:
        # Stop the threads: a test suite makes hundreds of applications, closes none.
        if (process := getattr(self, "_process", None)) is not None:
            process.release()

    def _check_decorators_later(self) -> None:
        """Check for misplaced decorators at the first request, when all views exist."""
        app = self.app
        self._process.on_first_request(lambda _: _warn_of_misplaced_decorators(app))


def _warn_of_misplaced_decorators(app: WSGIApplication) -> None:
    # If the module was never imported, the application uses no decorator.
    framework_routes = sys.modules.get("openmeter_wsgi.framework_routes")
    if framework_routes is not None:
        framework_routes.warn_of_misplaced_decorators(app)


def _prepare_spool(policy: Policy) -> None:
    if policy.spool_dir is not None and not policy.dry_run:
        from openmeter_wsgi.spool import server_directories

        server = server_directories.server_of_policy(policy)
        server_directories.prepare_server_directory(policy.spool_dir, server)


def _warn_of_unknown_subject() -> None:
    logger.warning(
        "a request without a subject was answered 401 before it reached the "
        "application; if the application calls set_user or set_subject, check "
        "entitlements after authentication: use openmeter_wsgi.flask.OpenMeter, "
        "openmeter_wsgi.django, or require_entitlements in the view"
    )


def _denied_response(
    billing: Billing, environ: dict[str, Any], request: RequestRecord
) -> DeniedResponse | None:
    """Return the response to a denied request, or None if the request is allowed."""
    # The cache is asked first. It returns True only if it holds a fresh answer that
    # allows the request, the common case. Otherwise the gate decides.
    if not billing.gate.is_allowed_by_cache(
        environ, request
    ) and billing.needs_decision(environ):
        decision = billing.gate.admit(environ)
        if not decision.allowed and billing.policy.enforce:
            billing.count_denied(environ)
            request.mark_settled()
            (denial, *_) = decision.denied
            if denial.reason == "no_subject" and billing.policy.subject is None:
                _warn_of_unknown_subject()
            return DeniedResponse(decision, billing.policy)
    if billing.adds_quota_headers and request.server_start is not None:
        request.server_start = with_quota(request.decision, request.server_start)
    return None
