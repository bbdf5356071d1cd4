"""The sandbox: a server of its own on this machine."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from openmeter_wsgi.sandbox.app import create_app, create_parts
from openmeter_wsgi.sandbox.faults import Faults
from openmeter_wsgi.sandbox.granting import Granting
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.serving import Server, listen
from openmeter_wsgi.sandbox.store import Store

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from openmeter_wsgi.sandbox.questions import Question

#: How long `Sandbox.close` waits for requests that are being answered.
CLOSE_TIMEOUT = 5.0


class Sandbox:
    """A server that speaks OpenMeter's API, quirks included, on this machine.

    It serves from threads of its own as soon as it is constructed, until `close`::

        with Sandbox() as sandbox:
            requests.post(f"{sandbox.url}/api/v1/events", json=event)

    :param port: 0 chooses a free one, which `url` then names.
    :param database: the SQLite file to keep everything in; None keeps it for as long
        as the sandbox lives.
    :param dedupe: whether an event whose source and id were seen before is dropped,
        as OpenMeter does where deduplication is switched on.
    :param fail_rate: the share of ingest requests that is answered with 500, half of
        them after the events were stored.
    :param latency: seconds by which answers to ingest requests are late. These two
        and more, for questions about entitlements too: `faults`.
    :param visible_after: seconds from an event's arrival until meters and balances
        count it: OpenMeter takes 2 to 3. ``store.visible_after`` changes it.
    :param clock: returns now in Unix seconds.
    :raises OSError: if the address cannot be listened on.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        database: str | Path | None = None,
        dedupe: bool = True,
        fail_rate: float = 0.0,
        latency: float = 0.0,
        visible_after: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.faults = Faults()
        self.faults.ingest.set(fail_rate=fail_rate, latency=latency)
        with listen(host, port) as listener:
            self.store = Store(
                database, dedupe=dedupe, visible_after=visible_after, clock=clock
            )
            self._parts = create_parts(self.store, self.faults)
            app = create_app(self._parts, host=host)
            self._server = Server(listener, host, app)
        self._granting = Granting(self._parts)
        self.host = host
        self.port = self._server.port
        self._closed = False
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.05},
            name="openmeter_wsgi.sandbox",
            daemon=True,
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """The address of the page, and the base of the API's."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def questions(self) -> Counter[Question]:
        """How often what was asked about entitlements, since the start."""
        return self._parts.questions.counts()

    def asked(self, **which: str | None) -> int:
        """Return how often was asked, by ``kind``, ``customer`` and ``feature``."""
        return self._parts.questions.count(**which)

    def wait_asked(
        self, count: int = 1, *, timeout: float = 5.0, **which: str | None
    ) -> bool:
        """Return whether *count* such questions have come, within *timeout* seconds.

        A question is counted when it arrives, also if its answer is late.
        """
        return self._parts.questions.wait(count, timeout, **which)

    def forget_questions(self) -> None:
        """Count questions anew."""
        self._parts.questions.clear()

    def grant(
        self,
        customer: str,
        feature: str,
        amount: float | None = None,
        *,
        soft: bool = False,
        period: str = "MONTH",
        config: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Give *customer* access to *feature*, and return the entitlement.

        With an *amount*, or a *soft* limit, it is metered, with a *config* static, else
        boolean. Customer and feature are created where there are none, the feature for
        the meter of its name. A second amount is added; another kind replaces. Usage
        counts that arrives from now on.

        :param amount: what every usage period allows, 0 included.
        :param soft: whether there is access beyond the amount.
        :param period: DAY, WEEK, MONTH, YEAR or an ISO 8601 duration.
        :raises ValueError: if there is no meter to measure the feature by.
        """
        with _told():
            found = self._granting.grant(
                customer, feature, amount, soft=soft, period=period, config=config
            )
            return self._parts.entitlements.document(found)

    def revoke(self, customer: str, feature: str) -> None:
        """Take the access to *feature* from *customer*.

        :raises ValueError: if there is none.
        """
        with _told():
            self._granting.revoke(customer, feature)

    def reset(self, customer: str, feature: str) -> None:
        """Begin a new usage period, now: usage is zero, the amount granted anew.

        :raises ValueError: if there is no metered entitlement.
        """
        with _told():
            self._granting.reset(customer, feature)

    def delete_customer(self, customer: str) -> None:
        """Delete *customer* and its entitlements.

        :raises ValueError: if there is none.
        """
        with _told():
            self._granting.forget(customer)

    def value(self, customer: str, feature: str) -> dict[str, Any]:
        """Return the value of *customer*'s entitlement to *feature*.

        It holds all that the API answers, and ``hasAccess`` also where it is false and
        the v2 API leaves it out. Not counted as a question, and without faults.

        :raises ValueError: if there is no such customer.
        """
        with _told():
            return self._granting.value(customer, feature)

    def close(self) -> None:
        """Finish the requests under way, then close everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.faults.stop()
        self._server.shutdown()
        self._thread.join()
        self._server.end_connections(CLOSE_TIMEOUT)
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Tell a caller in Python what a client would be answered."""
    try:
        yield
    except Problem as problem:
        raise ValueError(problem.reason) from None
