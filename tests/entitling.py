"""What OpenMeter says of entitlements, over real HTTP, and requests that need them."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import requests

from openmeter_server import Answer, OpenMeterServer, problem
from openmeter_wsgi import OpenMeterMiddleware
from openmeter_wsgi.sandbox import Sandbox
from servers import Consumer, make_environ
from spooling import threads, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openmeter_server import Request

QUESTION = "openmeter_wsgi.question"
YES: dict[str, Any] = {"hasAccess": True}
NO: dict[str, Any] = {"hasAccess": False}


def close_all(middlewares: list[OpenMeterMiddleware]) -> None:
    """Close them when nothing is being asked: a later answer would begin anew."""
    until(lambda: not threads(QUESTION))
    for each in middlewares:
        each.close(40)


@contextlib.contextmanager
def sandbox_with_meter(feature: str) -> Iterator[Sandbox]:
    """Yield a sandbox with a meter that sums the ``total`` of its events."""
    meter = {
        "slug": feature, "eventType": feature, "aggregation": "SUM",
        "valueProperty": "$.total",
    }  # fmt: skip
    with Sandbox() as sandbox:
        made = requests.post(f"{sandbox.url}/api/v1/meters", json=meter, timeout=40)
        made.raise_for_status()
        yield sandbox


def metered(balance: float, *, granted: float = 100, soft: bool = False) -> Any:
    """The value of a metered entitlement."""
    return {
        "hasAccess": soft or balance > 0,
        "balance": max(balance, 0),
        "usage": granted - balance,
        "overage": max(-balance, 0),
        "totalAvailableGrantAmount": granted,
    }


def document(value: Any, status: int = 200) -> Answer:
    return Answer(
        status, json.dumps(value).encode(), {"Content-Type": "application/json"}, False
    )


class Entitled:
    """The rule of a server that knows some customers and their entitlements."""

    def __init__(self, server: OpenMeterServer) -> None:
        #: By customer, then by feature.
        self.values: dict[str, dict[str, Any]] = {}
        #: The entitlement itself, by customer and feature.
        self.terms: dict[tuple[str, str], Any] = {}
        #: What every question gets in place of an answer.
        self.instead: Answer | None = None
        #: The same for the questions of single customers, or of their features.
        self.refused: dict[str | tuple[str, str], Answer] = {}
        #: The questions for values, by customer and feature (``access`` for all).
        self.asked: Counter[tuple[str, str]] = Counter()
        self.asked_terms: Counter[tuple[str, str]] = Counter()
        #: The questions for the customer of a subject.
        self.lookups = 0
        server.rule = self

    def __call__(self, request: Request) -> Answer | None:
        if request.method != "GET":
            return None
        if request.target.startswith("/api/v2/events?"):
            return problem(404)
        if request.target.startswith("/api/v1/customers?subject="):
            self.lookups += 1
            page = {"items": [], "page": 1, "pageSize": 100, "totalCount": 0}
            return self.instead or document(page)
        parts = [unquote(part) for part in request.target.split("?")[0].split("/")]
        customer, what, feature = (*parts[4:], "", "")[:3]
        is_terms = len(parts) == 7
        (self.asked_terms if is_terms else self.asked)[customer, feature or what] += 1
        for refusal in (self.instead, self.refused.get((customer, feature)),
                        self.refused.get(customer)):  # fmt: skip
            if refusal is not None:
                return refusal
        return self._answer(customer, what, feature, is_terms=is_terms)

    def _answer(
        self, customer: str, what: str, feature: str, *, is_terms: bool
    ) -> Answer:
        if (values := self.values.get(customer)) is None:
            return problem(404, f"customer with id or key {customer} not found")
        if what == "access":
            return document({"entitlements": values})
        if is_terms:
            terms = self.terms.get((customer, feature))
            return document(terms) if terms else problem(404, "entitlement not found")
        return document(values.get(feature, NO))

    @property
    def questions(self) -> int:
        return self.asked.total()


#: Options that make each event almost 1,000 bytes large.
LARGE = {"meters": None, "meter": {"type": "files", "data": {"text": "x" * 800}}}


def middleware(server: OpenMeterServer, app: Any, **options: Any) -> Any:
    """Return an application behind a middleware that asks *server*."""
    usual = {
        "required_entitlements": ["searches"],
        "meters": {"api_requests": 1},
        "flush_interval": 60,
        "shutdown_timeout": 0,
        # No test fails because the machine is busy.
        "entitlement_timeout": 30,
    }
    return OpenMeterMiddleware(app, **{"api_url": server.url, **usual, **options})


def ask(app: Any, subject: str | None = "acme", **entries: Any) -> Consumer:
    """Serve one request of *subject*."""
    environ = make_environ(**entries)
    if subject is None:
        del environ["REMOTE_USER"]
    else:
        environ["REMOTE_USER"] = subject
    consumer = Consumer()
    consumer.serve(app, environ)
    return consumer


def wait_for(condition: Callable[[], object], timeout: float = 40.0) -> None:
    """Wait for what only time brings about."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        threading.Event().wait(0.01)
