"""Django site for tests; its users are made up, so it needs no database.

The settings name it, and Django imports it after they are configured.
"""

from pathlib import Path

from django.http import FileResponse, HttpResponse, StreamingHttpResponse
from django.urls import include, path, re_path
from django.views import View
from rest_framework.authentication import BaseAuthentication, SessionAuthentication
from rest_framework.decorators import (
    api_view,
    authentication_classes,
    permission_classes,
)
from rest_framework.permissions import AllowAny, IsAuthenticated
from rest_framework.renderers import BaseRenderer, BrowsableAPIRenderer, JSONRenderer
from rest_framework.request import clone_request
from rest_framework.response import Response
from rest_framework.routers import SimpleRouter
from rest_framework.schemas.generators import BaseSchemaGenerator
from rest_framework.serializers import CharField, Serializer
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

from openmeter_wsgi import (
    add_meters,
    check_entitlements,
    meter,
    no_meter,
    require_entitlements,
    set_user,
)
from openmeter_wsgi.django import subject_from
from openmeter_wsgi.django.rest_framework import HasEntitlements


class User:
    is_authenticated = is_active = True

    def __init__(self, name):
        self.pk = name
        self.company = {"customer": f"{name}-inc"}


class Authenticate:
    """Django middleware that sets the user that the header X-User names."""

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        if name := request.headers.get("X-User"):
            request.user = User(name)
        return self.get_response(request)


class TokenAuthentication(BaseAuthentication):
    def authenticate(self, request):
        name = request.headers.get("X-Token")
        return (User(name), {"sub": name, "aud": f"{name}-inc"}) if name else None

    def authenticate_header(self, request):
        return "Token"


class Api(APIView):
    authentication_classes = (TokenAuthentication,)
    permission_classes = (IsAuthenticated,)

    def get(self, request):
        add_meters(request, {"credits": 2})
        return Response({"user": request.user.pk})


class NeedsSearches(Api):
    permission_classes = (IsAuthenticated & HasEntitlements,)


class Forms(BaseRenderer):
    """Renderer that checks permissions for its forms, as the browsable API does."""

    media_type, format, charset = "text/html", "html", "utf-8"

    def render(self, data, accepted_media_type=None, renderer_context=None):
        view, request = renderer_context["view"], renderer_context["request"]
        for _ in range(2):
            view.check_permissions(clone_request(request, "POST"))
        return "a page with 2 forms"


class Page(NeedsSearches):
    renderer_classes = (Forms,)


class Export(Api):
    permission_classes = (IsAuthenticated, HasEntitlements)
    required_entitlements = ("exports",)


class Sessions(Export):
    authentication_classes = (SessionAuthentication,)
    permission_classes = (HasEntitlements,)


class ForMethods(TokenAuthentication):
    def __init__(self, method):
        self.method = method

    def authenticate_header(self, request):
        if self.method != "GET":
            raise RuntimeError("nobody should see this")
        return f"Token method={self.method}"


class Choosing(Export):
    def post(self, request):
        return self.get(request)

    def get_authenticators(self):
        return [ForMethods(self.request.method)]


class Text(Export):
    required_entitlements = "exports"


class Misspelt(Export):
    required_entitlements = ("Create-Books", "exports")


class Products(ViewSet):
    authentication_classes = (TokenAuthentication,)
    permission_classes = (AllowAny,)

    def retrieve(self, request, pk):
        return Response({})


class BookSerializer(Serializer):
    title = CharField(required=False)


class Books(ViewSet):
    """Whoever creates a book needs a feature; whoever lists them needs none."""

    authentication_classes = (TokenAuthentication,)
    renderer_classes = (BrowsableAPIRenderer, JSONRenderer)
    required_entitlements = ("exports",)

    def get_permissions(self):
        creating = self.action == "create" or self.request.method in {"POST", "PUT"}
        return [HasEntitlements()] if creating else [AllowAny()]

    def get_serializer(self, *args, **kwargs):
        return BookSerializer(*args, **kwargs)

    def list(self, request):
        return Response(["a book"])

    def create(self, request):
        return Response("a new book", status=201)

    def update(self, request, pk):
        self.check_permissions(clone_request(request, "POST"))  # it may create one
        return Response("a book")


class Schema(Api):
    """Tells, as a schema does, which views the user may call."""

    schema_generator = BaseSchemaGenerator()

    def get(self, request):
        generator = self.schema_generator
        view = generator.create_view(Export.as_view(), "GET", request)
        return Response(generator.has_view_permissions("api/export", "GET", view))


class Facade(Api):
    """Does the work of another view, if the user may call that one."""

    def get(self, request):
        Export().check_permissions(clone_request(request, "POST"))
        return Response("exported")


def plain(request):
    return HttpResponse("ok")


def failing(request):
    raise RuntimeError("the printer is on fire")


def stream(request):
    def pages():
        for _ in range(3):
            yield b"page"
            add_meters(request, {"pages": 1})

    return StreamingHttpResponse(pages())


def file(request):
    return FileResponse(Path(__file__).open("rb"))


async def asynchronous(request):
    return HttpResponse("ok")


def partner(request):
    set_user(request, {"sub": "globex"})
    return HttpResponse("ok")


def deciding(request):
    if not check_entitlements(request, "searches").allowed:
        require_entitlements(request, "searches")
    return HttpResponse("all of it")


def misspelt(request):
    require_entitlements(request, "Create-Books")
    return HttpResponse("a new book")


class ClassBased(View):
    @meter(meters={"reports": 1}, subject=subject_from("request.user.company.customer"))
    def get(self, request):
        return HttpResponse("ok")

    @meter(required_entitlements=["exports"])
    def post(self, request):
        return HttpResponse("ok")

    @no_meter
    def delete(self, request):
        return HttpResponse("ok")


class Decorated(ViewSet):
    authentication_classes = (TokenAuthentication,)
    permission_classes = (AllowAny,)

    @meter(required_entitlements=["exports"])
    def create(self, request):
        return Response({})

    @no_meter
    def list(self, request):
        return Response([])


class DecoratedWithPermission(Decorated):
    permission_classes = (IsAuthenticated, HasEntitlements)

    def retrieve(self, request, pk):
        return Response({})


@api_view()
@authentication_classes([TokenAuthentication])
@permission_classes([AllowAny])
def function(request):
    return Response({})


@api_view()
@authentication_classes([TokenAuthentication])
@permission_classes([AllowAny])
@meter(required_entitlements=["exports"])
def function_that_exports(request):
    return Response({})


@api_view()
@permission_classes([AllowAny])
@no_meter
def free_function(request):
    return Response({})


router = SimpleRouter()
router.register("products", Products, basename="product")
router.register("books", Books, basename="book")
router.register("decorated", Decorated, basename="decorated")
router.register("permitted", DecoratedWithPermission, basename="permitted")
urlpatterns = [
    path("plain", plain),
    path("failing", failing),
    path("stream", stream),
    path("file", file),
    path("asynchronous", asynchronous),
    path("partner", partner),
    path("deciding", deciding),
    path("misspelt", misspelt),
    path("report", ClassBased.as_view()),
    path("things/<slug:name>/", lambda request, **_: plain(request)),
    path("free", no_meter(plain)),
    path("export", meter(required_entitlements=["exports"])(plain)),
    path("api/token", Api.as_view()),
    path("api/entitled", NeedsSearches.as_view()),
    path("api/page", Page.as_view()),
    path("api/export", Export.as_view()),
    path("api/misspelt", Misspelt.as_view()),
    path("api/text", Text.as_view()),
    path("api/sessions", Sessions.as_view()),
    path("api/choosing", Choosing.as_view()),
    path("api/facade", Facade.as_view()),
    path("api/schema", Schema.as_view()),
    path("api/open", Api.as_view(permission_classes=(HasEntitlements,))),
    path("api/function", function),
    path("api/function/exports", function_that_exports),
    path("api/function/free", free_function),
    path("api/v1/", include(router.urls)),
    re_path(
        r"^legacy/(?P<year>\d{4})/(\w+)/$", lambda request, *_, **__: plain(request)
    ),
]
