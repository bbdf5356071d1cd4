"""Sample program for type checkers; each line with an error has a comment "wrong".

`tests/test_typed_options.py` checks it with mypy and pyright. It is never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import flask

from openmeter_wsgi import (
    OpenMeterMiddleware,
    Options,
    Policy,
    RouteOptions,
    bytes_sent,
    meter,
    set_meters,
)
from openmeter_wsgi.flask import OpenMeter

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse


def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    set_meters(environ, {"tokens": 3})
    start_response("200 OK", [])
    return []


# -- Right


def subject(environ: dict[str, Any]) -> str | None:
    return environ.get("HTTP_X_CUSTOMER")


search: RouteOptions = {"meters": {"searches": 1, "bytes": bytes_sent()}}
options: Options = {"api_key": "key", "routes": {"/search": search, "*": None}}
options["subject"] = subject
options["spool_dir"] = Path("/var/spool/shop")
OpenMeterMiddleware(app, **options)
OpenMeterMiddleware(
    app,
    Policy(required_entitlements=["searches"], batch_size=100),
    meter={"type": "calls", "data": {"path": "$route", "n": 1}},
    meter_on_status_codes=[200, "3xx"],
)
Policy.from_env(entitlement_meters=["tokens"], reserve={"tokens": 10})
Policy.from_file("openmeter.toml", flush_interval=2)
OpenMeter(flask.Flask(__name__), subject="current_user.id")


@meter(meters={"exports": 1}, required_entitlements=["exports"])
def export(count: int) -> str:
    return "x" * count


export(3).upper()

# -- Wrong

OpenMeterMiddleware(app, batch_sise=100)  # wrong: no option of this name
OpenMeterMiddleware(app, batch_size="100")  # wrong: text
OpenMeterMiddleware(app, on_abort="some")  # wrong: none of the choices
OpenMeterMiddleware(app, routes={"/a": {"metre": {}}})  # wrong: in a route
OpenMeterMiddleware(app, routes={"/a": {"api_key": "k"}})  # wrong: not of a route
OpenMeterMiddleware(app, subject=lambda: "acme")  # wrong: takes no environ
OpenMeterMiddleware(None)  # wrong: no application
OpenMeterMiddleware(app, unmatched=None)  # wrong: an option of an earlier version
Policy(meters={"calls": [1]})  # wrong: no number
Policy.from_env(dry_run="yes")  # wrong: text
OpenMeter(flask.Flask(__name__), flush_intervall=1)  # wrong: no option of this name
meter(api_key="k")(export)  # wrong: not of a view
meter(meters={"exports": 1})(export)("3")  # wrong: the view takes a number
