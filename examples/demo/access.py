"""Entitlement checks over real HTTP: a denial, a quota and an outage of OpenMeter.

The sandbox and the application run in this process, so that grants and outages can be
changed while the application serves.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, make_server

import requests

from examples.demo.openmeter import OpenMeter
from openmeter_wsgi import OpenMeterMiddleware, Policy, check_entitlements
from openmeter_wsgi.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from wsgiref.types import StartResponse

QUOTA = 20
REQUESTS = 25
FEATURE = "api_requests"
STATIC = "exports"
TIMEOUT = 30.0
#: Seconds for which an answer is cached. After twice this time a request waits for a
#: new answer.
LIFETIME = 0.2


class Check(NamedTuple):
    """One check: its label, the expected result and the actual result."""

    label: str
    expected: str
    got: str

    @property
    def is_right(self) -> bool:
        return self.expected == self.got


def run_checks() -> list[Check]:
    """Return the results of all checks. They take about two seconds."""
    logger = logging.getLogger("openmeter_wsgi")
    silence = (
        logging.NullHandler()
    )  # the report prints the denials, so the log need not
    logger.addHandler(silence)
    try:
        with Sandbox() as sandbox:
            with OpenMeter(sandbox.url) as openmeter:
                openmeter.define([])
            sandbox.grant("acme", FEATURE, QUOTA)
            sandbox.grant("hooli", STATIC, config={"formats": ["csv"]})
            return [*_quota(sandbox), *_static(sandbox), *_outage(sandbox)]
    finally:
        logger.removeHandler(silence)


def _quota(sandbox: Sandbox) -> Iterator[Check]:
    with _application(sandbox) as (url, app):
        denial = _get(url, "hooli")
        yield Check("hooli, no entitlement", "403 no_access", _problem(denial))
        answers = [_get(url, "acme") for _ in range(REQUESTS)]
        yield Check(
            f"acme, {REQUESTS} requests, quota of {QUOTA}",
            f"{QUOTA}x 200, {REQUESTS - QUOTA}x 429, Retry-After",
            _counted(answers),
        )
        asked = sandbox.asked(customer="acme", kind="value_v2")
        yield Check(
            "  checks sent to OpenMeter",
            "1, then counted down locally",
            f"{asked}, then counted down locally",
        )
        app.flush(TIMEOUT)
        usage = sandbox.value("acme", FEATURE)["usage"]
        yield Check("  requests billed", f"{QUOTA}", f"{usage:g}")


def _static(sandbox: Sandbox) -> Iterator[Check]:
    options: Any = {"required_entitlements": [STATIC], "entitlement_meters": {}}
    with _application(sandbox, **options) as (url, _):
        for subject, expected in (
            ("hooli", '200, {"formats": ["csv"]}'),
            ("acme", "403 no_access"),
        ):
            answer = _get(url, subject)
            got = f"200, {answer.text}" if answer.ok else _problem(answer)
            label = f"{subject}, static entitlement {STATIC}"
            yield Check(label, expected, got)


def _outage(sandbox: Sandbox) -> Iterator[Check]:
    sandbox.grant("acme", FEATURE, 1_000)
    short: Any = {"allow_ttl": LIFETIME, "deny_ttl": LIFETIME, "max_stale": 0.0}
    with contextlib.ExitStack() as stack:
        urls = {}
        for mode in ("open", "closed", "stale"):
            application = _application(sandbox, fail_mode=mode, **short)
            urls[mode], _ = stack.enter_context(application)
            for subject in ("acme", "hooli"):
                _get(urls[mode], subject)  # caches the answers of both
        sandbox.faults.entitlements.set(outage=True)
        time.sleep(3 * LIFETIME)  # lets the cached answers expire
        for mode, expected in (
            ("open", "acme 200, hooli 200"),
            ("closed", "acme 503, hooli 503, Retry-After"),
            ("stale", "acme 200, hooli 403"),
        ):
            answers = {name: _get(urls[mode], name) for name in ("acme", "hooli")}
            got = ", ".join(f"{who} {a.status_code}" for who, a in answers.items())
            label = f"outage, max_stale=0, fail_mode={mode}"
            yield Check(label, expected, got + _retry_after(answers.values()))


def _problem(answer: requests.Response) -> str:
    """Return the status and the reason of a problem document (RFC 9457)."""
    is_problem = answer.headers["Content-Type"] == "application/problem+json"
    reason = answer.json()["reason"] if is_problem else "without a problem"
    return f"{answer.status_code} {reason}"


def _counted(answers: Sequence[requests.Response]) -> str:
    """Return the statuses of consecutive answers, with their number."""
    runs = [
        (status, list(run))
        for status, run in itertools.groupby(answers, lambda a: a.status_code)
    ]
    return ", ".join(f"{len(run)}x {status}{_retry_after(run)}" for status, run in runs)


def _retry_after(answers: Iterable[requests.Response]) -> str:
    """Return a note if all answers have the header Retry-After."""
    waits = [answer.headers.get("Retry-After", "") for answer in answers]
    return ", Retry-After" if all(map(str.isdecimal, waits)) else ""


def _get(url: str, subject: str) -> requests.Response:
    with requests.Session() as session:
        session.trust_env = False
        return session.get(url, headers={"X-Subject": subject}, timeout=TIMEOUT)


def _show_config(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
    """Answer with the value of the static entitlement, or null."""
    config = check_entitlements(environ).config
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(config).encode()]


class _Quiet(WSGIRequestHandler):
    def log_message(self, *args: object) -> None:
        """Write no access log."""


@contextlib.contextmanager
def _application(
    sandbox: Sandbox, **options: Any
) -> Iterator[tuple[str, OpenMeterMiddleware]]:
    """Serve an application that requires the feature and counts its quota down."""
    usual: Any = {
        "required_entitlements": [FEATURE],
        "entitlement_meters": {FEATURE: "api-request"},
    }
    policy = Policy(
        api_url=sandbox.url,
        subject="header:X-Subject",
        meter={"type": "api-request", "data": {}},
        **{**usual, **options},
    )
    app = OpenMeterMiddleware(_show_config, policy)
    with make_server("127.0.0.1", 0, app, handler_class=_Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", app
        finally:
            server.shutdown()
            thread.join()
            app.close()
