"""The API: each view is billed in another way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response, abort, request, stream_with_context
from flask_login import current_user

from openmeter_wsgi import add_meters, meter, set_meters

if TYPE_CHECKING:
    from collections.abc import Iterator

api = Blueprint("api", __name__, url_prefix="/v1")
PRODUCTS = ["anvil", "rocket skates"]


@api.before_request
def authenticate() -> tuple[dict[str, str], int] | None:
    """Whoever is unknown is answered 401, and billed nothing."""
    if not current_user.is_authenticated:
        return {"error": "unknown token"}, 401
    return None


@api.get("/products")
def products() -> list[str]:
    """Nothing to do: a request that succeeds is one ``api-request``."""
    return PRODUCTS


@api.get("/products/<int:number>")
def product(number: int) -> dict[str, str]:
    """Not found is not billed."""
    if number >= len(PRODUCTS):
        abort(404)
    return {"name": PRODUCTS[number]}


@api.post("/chat")
def chat() -> dict[str, Any]:
    """Answer as a language model would, and bill tokens on top of the request."""
    question = request.get_json()
    usage = {
        "prompt": len(question["prompt"].split()),
        "completion": question["max_tokens"],
    }
    set_meters(
        request,
        [
            {"type": "tokens", "data": {"kind": kind, "tokens": tokens}}
            for kind, tokens in usage.items()
        ],
    )
    return {"answer": "word " * usage["completion"], "usage": usage}


@api.get("/reports")
@meter(required_entitlements=["reports"], meters={"reports": 1})
def report() -> dict[str, str]:
    """For customers whose plan has the feature."""
    return {"report": "all is well"}


@api.get("/export/<int:pages>")
def export(pages: int) -> Response:
    """Stream pages, a credit each."""

    def stream() -> Iterator[bytes]:
        for _ in range(min(pages, 100)):
            yield b"x" * 1024
            # Only now has the server passed the page on: what was not sent is free.
            add_meters(request, {"credits": 1})

    return Response(stream_with_context(stream()), mimetype="text/plain")
