"""Views of the API, each billed in a different way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.http import HttpResponse, StreamingHttpResponse
from django.views.decorators.http import require_GET
from rest_framework.decorators import api_view
from rest_framework.exceptions import NotFound
from rest_framework.response import Response
from rest_framework.throttling import ScopedRateThrottle
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

from openmeter_wsgi import add_meters, no_meter, set_meters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.http import HttpRequest
    from rest_framework.request import Request

PRODUCTS = {"1": "anvil", "2": "rocket skates"}
PAGE = b"x" * 1024


class Products(ViewSet):
    """Products; no code is needed to bill one ``api-request`` for each request."""

    def list(self, request: Request) -> Response:
        return Response(PRODUCTS)

    def retrieve(self, request: Request, pk: str) -> Response:
        """Return a product; a 404 is not billed."""
        if pk not in PRODUCTS:
            raise NotFound
        return Response({"name": PRODUCTS[pk]})


class Chat(APIView):
    """A fake language model that bills tokens in addition to the request."""

    def post(self, request: Request) -> Response:
        prompt, wanted = request.data["prompt"], request.data["max_tokens"]
        usage = {"prompt": len(prompt.split()), "completion": wanted}
        set_meters(
            request,
            [
                {"type": "tokens", "data": {"kind": kind, "tokens": tokens}}
                for kind, tokens in usage.items()
            ],
        )
        return Response({"answer": "word " * wanted, "usage": usage})


class Report(APIView):
    """Reports for customers with the feature "reports", with a rate limit."""

    required_entitlements = ("reports",)
    throttle_classes = (ScopedRateThrottle,)
    throttle_scope = "reports"

    def get(self, request: Request) -> Response:
        add_meters(request, {"reports": 1})
        return Response({"report": "all is well"})


@api_view()
def export(request: Request, pages: int) -> StreamingHttpResponse:
    """Stream pages for a credit each."""

    def stream() -> Iterator[bytes]:
        for _ in range(min(pages, 100)):
            yield PAGE
            # Bill the page only now, when the server has sent it.
            add_meters(request, {"credits": 1})

    return StreamingHttpResponse(stream(), content_type="text/plain")


@require_GET
@no_meter
def health(request: HttpRequest) -> Any:
    """Answer a load balancer; its requests are not billed."""
    return HttpResponse("ok")
