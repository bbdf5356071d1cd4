"""The middleware: where the parts meet."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, Self

from openmeter_wsgi import substitution
from openmeter_wsgi.health import MAX_AGE, Health
from openmeter_wsgi.serving import Serving

if TYPE_CHECKING:
    from collections.abc import Callable
    from wsgiref.types import WSGIApplication

    from openmeter_wsgi.metering import Metering
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.stats import Stats
    from openmeter_wsgi.substitution import Substitute


class OpenMeterMiddleware(Serving):
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
        # Here and in `exchange`, as this is most of the package: options, delivery, the
        # client, entitlements. A request finds all of it imported.
        from openmeter_wsgi.metering import Metering
        from openmeter_wsgi.policy import Policy

        self.app = app
        if policy is None:
            policy = Policy.from_env(**options)
        elif options:
            policy = dataclasses.replace(policy, **options)
        self.policy = policy
        self._watch = None
        if (substitute := substitution.present(self)) is None:
            self._metering = Metering(policy)
        else:
            self.exchange(substitute)

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
        # Here, as it takes a tenth of the whole import and few applications need it.
        from openmeter_wsgi.zuplo import options_of

        return cls(app, **{**options_of(policies, routes, os.environ), **options})

    def metering(self) -> Metering:
        """Return the metering of the process that asks.

        After a fork, or where gevent has replaced threads, it is another one, with an
        empty queue: what the parent queued stays the parent's.
        """
        if not self._metering.guard.is_current():
            self._metering = self._metering.successor()
        return self._metering

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

    def health(self, *, max_age: float = MAX_AGE) -> Health:
        """Return what is wrong in this process now. Waits for nothing.

        :param max_age: seconds that the oldest event may wait.
        """
        return self.metering().health(max_age)

    def follow(self, begin: Callable[[Metering], None]) -> None:
        """Have *begin* called in each process that settles a request, with its first.

        For what has to be done once in a process that serves: there a thread may be
        started, which a server that forks later would not take along.
        """
        self.metering().follow(begin)

    def exchange(self, substitute: Substitute | None) -> Callable[[], None]:
        """Let *substitute* meter (see `substitution`), or its own metering again.

        Returns what takes that back. For tests; between two requests.
        """
        from openmeter_wsgi.metering import Metering

        before: Any = getattr(self, "_metering", None)
        watch_before = self._watch
        if substitute is not None:
            self._metering = substitute.metering(self.policy)
            self._watch = substitute.watch
        else:
            self._metering = Metering.later(self.policy)
            self._watch = None

        def restore() -> None:
            self._metering = before
            self._watch = watch_before

        return restore

    def __del__(self) -> None:
        # A test suite makes hundreds of applications, and closes none.
        if (metering := getattr(self, "_metering", None)) is not None:
            metering.queue.release()

    def _renew(self) -> Metering:
        """Return the metering for the requests of this process from now on."""
        metering = self.metering()
        metering.guard.confirm()
        return metering
