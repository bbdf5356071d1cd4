"""Views of the API, each billed in another way."""

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
    """Nothing to do: a request that succeeds is one ``api-request``."""

    def list(self, request: Request) -> Response:
        return Response(PRODUCTS)

    def retrieve(self, request: Request, pk: str) -> Response:
        """Not found is not billed."""
        if pk not in PRODUCTS:
            raise NotFound
        return Response({"name": PRODUCTS[pk]})


class Chat(APIView):
    """Answers as a language model would, and bills tokens on top of the request."""

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
    """For customers whose plan has the feature, and not too often."""

    required_entitlements = ("reports",)
    throttle_classes = (ScopedRateThrottle,)
    throttle_scope = "reports"

    def get(self, request: Request) -> Response:
        add_meters(request, {"reports": 1})
        return Response({"report": "all is well"})


@api_view()
def export(request: Request, pages: int) -> StreamingHttpResponse:
    """Stream pages, a credit each."""

    def stream() -> Iterator[bytes]:
        for _ in range(min(pages, 100)):
            yield PAGE
            # Only now has the server passed the page on: what was not sent is free.
            add_meters(request, {"credits": 1})

    return StreamingHttpResponse(stream(), content_type="text/plain")


@require_GET
@no_meter
def health(request: HttpRequest) -> Any:
    """What a load balancer asks is nobody's usage."""
    return HttpResponse("ok")
