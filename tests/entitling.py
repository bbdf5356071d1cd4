"""Fake OpenMeter answers about entitlements, and requests that need entitlements."""

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
    """Close all middlewares once none of them asks OpenMeter any more."""
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
    """Return the value of a metered entitlement, as OpenMeter answers it."""
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
    """The rule of an `OpenMeterServer` that has some customers with entitlements."""

    def __init__(self, server: OpenMeterServer) -> None:
        #: Entitlement values, by customer, then by feature.
        self.values: dict[str, dict[str, Any]] = {}
        #: Entitlements, by customer and feature.
        self.terms: dict[tuple[str, str], Any] = {}
        #: The answer to every question, if set.
        self.instead: Answer | None = None
        #: Answers to all questions about a customer, or about one of its features.
        self.refused: dict[str | tuple[str, str], Answer] = {}
        #: Number of questions for a value, by customer and feature (``access``: all).
        self.asked: Counter[tuple[str, str]] = Counter()
        self.asked_terms: Counter[tuple[str, str]] = Counter()
        #: Number of questions for the customer of a subject.
        self.lookups = 0
        #: Customers whose subject keys contain every subject, in all pages together.
        self.similar = 0
        server.rule = self

    def __call__(self, request: Request) -> Answer | None:
        if request.method != "GET":
            return None
        if request.target.startswith("/api/v2/events?"):
            return problem(404)
        if request.target.startswith("/api/v1/customers?subject="):
            self.lookups += 1
            other = {"id": "0", "usageAttribution": {"subjectKeys": []}}
            page = {"items": [other] * min(self.similar, 100), "page": 1,
                    "pageSize": 100, "totalCount": self.similar}  # fmt: skip
            return self.instead or document(page)
        parts = [unquote(part) for part in request.target.split("?")[0].split("/")]
        customer, kind, feature = (*parts[4:], "", "")[:3]
        is_terms = len(parts) == 7
        (self.asked_terms if is_terms else self.asked)[customer, feature or kind] += 1
        for refusal in (self.instead, self.refused.get((customer, feature)),
                        self.refused.get(customer)):  # fmt: skip
            if refusal is not None:
                return refusal
        return self._answer(customer, kind, feature, is_terms=is_terms)

    def _answer(
        self, customer: str, kind: str, feature: str, *, is_terms: bool
    ) -> Answer:
        if (values := self.values.get(customer)) is None:
            return problem(404, f"customer with id or key {customer} not found")
        if kind == "access":
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
        # Long, so that a busy machine fails no test.
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
    """Wait until *condition* is true, and fail after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not true after {timeout} s"
        threading.Event().wait(0.01)
