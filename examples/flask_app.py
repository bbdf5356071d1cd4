"""A Flask application that sends its usage to OpenMeter.

With a local sandbox instead of OpenMeter::

    openmeter-wsgi sandbox &
    OPENMETER_API_URL=http://127.0.0.1:8888 \
        gunicorn -c examples/gunicorn.conf.py examples.flask_app:app
    curl -H 'X-API-Key: acme-key' http://127.0.0.1:8000/products

With OpenMeter Cloud: set ``OPENMETER_API_KEY`` instead of the address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Flask, Response, abort, request, stream_with_context

from openmeter_wsgi import OpenMeterMiddleware, add_meters, set_meters, set_user

if TYPE_CHECKING:
    from collections.abc import Iterator

#: API key to customer. In your application: hashed, in a database.
CUSTOMERS = {
    "acme-key": {"sub": "acme"},
    "globex-key": {"sub": "globex"},
    "initech-key": {"sub": "initech"},
    "cafe-key": {"sub": "Zoë's Café"},
}
#: Price of a call, in credits, by model.
MODELS = {"small": 1, "large": 5}
MAX_PAGES, MAX_KIB = 100, 16 * 1024

app = Flask(__name__)
# OPENMETER_API_KEY and OPENMETER_API_URL set the key and the address of OpenMeter.
app.wsgi_app = OpenMeterMiddleware(  # type: ignore[method-assign]
    app.wsgi_app,
    meter={"type": "api-request", "data": {"region": "eu"}},
    meter_on_status_codes="200-299",
    event_source="flask-example",
    subject_path=".sub",
)


@app.before_request
def authenticate() -> tuple[dict[str, str], int] | None:
    """Set the user; an unknown caller gets 401, which is not billed."""
    customer = CUSTOMERS.get(request.headers.get("X-API-Key", ""))
    if customer is None:
        return {"error": "unknown API key"}, 401
    set_user(request, customer)
    return None


@app.get("/products")
def products() -> list[str]:
    """List the products; no code is needed to bill one ``api-request``."""
    return ["anvil", "rocket skates"]


@app.get("/products/<name>")
def product(name: str) -> dict[str, str]:
    """Return a product; a 404 is not billed."""
    if name not in products():
        abort(404)
    return {"name": name}


@app.post("/orders")
def order() -> tuple[dict[str, str], int]:
    """Accept an order; it is billed, as 201 is within 200-299."""
    return {"ordered": request.get_json()["product"]}, 201


@app.post("/chat")
def chat() -> dict[str, Any]:
    """Answer as a language model would; bill tokens by model, and credits."""
    question = request.get_json()
    model = question["model"]
    if model not in MODELS:
        abort(400)
    usage = {
        "prompt": len(question["prompt"].split()),
        "completion": question["max_tokens"],
    }
    set_meters(
        request,
        [
            {"type": "tokens", "data": {"model": model, "kind": kind, "tokens": tokens}}
            for kind, tokens in usage.items()
        ],
    )
    add_meters(request, {"credits": MODELS[model]})
    return {"answer": "word " * usage["completion"], "usage": usage}


@app.get("/export")
def export() -> Response:
    """Stream pages for a credit each; ``?break_after=2`` fails after two pages."""
    pages = min(request.args.get("pages", 3, int), MAX_PAGES)
    kib = min(request.args.get("kib", 4, int), MAX_KIB)
    break_after = request.args.get("break_after", -1, int)

    def stream() -> Iterator[bytes]:
        for number in range(pages):
            if number == break_after:
                raise RuntimeError("the database went away")
            yield b"x" * kib * 1024
            # Bill the page only now, when the server has sent it.
            add_meters(request, {"credits": 1})

    return Response(stream_with_context(stream()), mimetype="text/plain")


@app.get("/report")
def report() -> str:
    """Fail with 500, so that the credits added before are not billed."""
    add_meters(request, {"credits": 100})
    raise RuntimeError("the printer is on fire")
