"""Views of the API, each billed in a different way."""

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
    """Answer an unknown caller with 401, which is not billed."""
    if not current_user.is_authenticated:
        return {"error": "unknown token"}, 401
    return None


@api.get("/products")
def products() -> list[str]:
    """List the products; no code is needed to bill one ``api-request``."""
    return PRODUCTS


@api.get("/products/<int:number>")
def product(number: int) -> dict[str, str]:
    """Return a product; a 404 is not billed."""
    if number >= len(PRODUCTS):
        abort(404)
    return {"name": PRODUCTS[number]}


@api.post("/chat")
def chat() -> dict[str, Any]:
    """Answer as a language model would; bill tokens in addition to the request."""
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
    """Return a report, only for customers with the feature "reports"."""
    return {"report": "all is well"}


@api.get("/export/<int:pages>")
def export(pages: int) -> Response:
    """Stream pages for a credit each."""

    def stream() -> Iterator[bytes]:
        for _ in range(min(pages, 100)):
            yield b"x" * 1024
            # Bill the page only now, when the server has sent it.
            add_meters(request, {"credits": 1})

    return Response(stream_with_context(stream()), mimetype="text/plain")
