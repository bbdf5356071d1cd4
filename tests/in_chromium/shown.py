"""Contents of the sandbox for tests and pictures of its page."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.request_validation import rfc3339
from test_sandbox_support import event

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox import Sandbox
    from test_sandbox_support import Api

SUBJECTS = (
    "acme", "hooli", "initech", "umbrella", "stark", "wayne", "tyrell", "cyberdyne",
    "wonka", "oscorp",
)  # fmt: skip
ROUTES = ("/v1/search", "/v1/items", "/v1/export")
#: Age of the oldest event in seconds: the plot shows 15 minutes.
PAST = 880


def fill(sandbox: Sandbox, api: Api, events: int) -> None:
    """Add meters, *events* events, invalid events of each kind, and entitlements."""
    _define(api)
    sent = list(make_events(events))
    for start in range(0, events, 1000):
        assert api.ingest(sent[start : start + 1000]).status_code == 204
    api.ingest(sent[:3])
    api.ingest([event("fine"), event("without a subject", subject="")])
    api.ingest(event("image", type="image.generated", data={"pixels": 5}))
    api.ingest(event("no tokens", type="completion", data={"model": "small"}))
    api.ingest(event("old", time="1970-01-01T00:00:00Z"))
    api.ingest(b"nonsense")
    sandbox.grant("acme", "requests", 500)
    sandbox.grant("hooli", "tokens", 1_000_000)
    sandbox.grant("initech", "sso")
    sandbox.grant("umbrella", "seats", config={"seats": 3})


def _define(api: Api) -> None:
    request: dict[str, Any] = {"eventType": "request"}
    groups = {"route": "$.route", "status": "$.status"}
    api.meter("requests", "COUNT", name="Requests", groupBy=groups, **request)
    api.meter(
        "tokens",
        "SUM",
        "$.tokens",
        name="Tokens",
        eventType="completion",
        groupBy={"model": "$.model"},
    )
    api.meter("seconds", "AVG", "$.seconds", name="Latency", **request)


def make_events(count: int, prefix: str = "01") -> Any:
    """Yield events of the last 15 minutes, always the same except for their times."""
    draw = random.Random(1)
    now = time.time()
    for number in range(count):
        kind = "completion" if number % 3 == 0 else "request"
        data = {
            "model": draw.choice(["small", "large"]),
            "tokens": draw.randint(50, 2000),
        }
        if kind == "request":
            status = draw.choice(["200", "200", "404"])
            seconds = round(draw.random(), 3)
            data = {"route": draw.choice(ROUTES), "status": status, "seconds": seconds}
        yield event(
            id=f"{prefix}{number:06x}:{kind}",
            type=kind,
            subject=draw.choices(SUBJECTS, [30, 20, 15, 10, 8, 7, 5, 4, 2, 1])[0],
            time=rfc3339(int(now - draw.betavariate(1.2, 1.5) * PAST)),
            data=data,
        )
