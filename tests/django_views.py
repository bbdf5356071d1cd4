"""Views whose decorators and features the checks of a project look at.

Imported once there are settings.
"""

from django.http import HttpResponse
from django.urls import include, path
from django.utils.decorators import method_decorator
from django.views import View
from rest_framework import status
from rest_framework.decorators import action, api_view
from rest_framework.permissions import AllowAny
from rest_framework.response import Response
from rest_framework.routers import DefaultRouter, SimpleRouter
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

from openmeter_wsgi import meter, no_meter
from openmeter_wsgi.django import get_wsgi_application
from openmeter_wsgi.django.rest_framework import HasEntitlements


def application():
    return get_wsgi_application()


class Books(ViewSet):
    @meter(meters={"of_list": 1})
    def list(self, request):
        return Response([])

    @meter(meters={"of_create": 1}, required_entitlements=["create_books"])
    def create(self, request):
        return Response({})

    @action(detail=True)
    @meter(meters={"of_action": 1})
    def cover(self, request, pk):
        return Response({})

    @meter(meters={"of_reversed_action": 1})
    @action(detail=False)
    def recent(self, request):
        return Response([])

    @meter(meters={"of_no_route": 1})
    def helper(self, request):
        return Response([])


@api_view(["GET", "POST"])
@meter(meters={"of_function": 1}, required_entitlements=["functions"])
def function(request):
    return Response({})


@meter(meters={"of_function_above": 1})
@api_view()
def function_above(request):
    return Response({})


@api_view()
@no_meter
def free(request):
    return Response({})


class Api(APIView):
    @meter(meters={"of_post": 1})
    def post(self, request):
        return Response({})


class Plain(View):
    @method_decorator(meter(meters={"of_method": 1}))
    def get(self, request):
        return HttpResponse("x")


@method_decorator(meter(meters={"of_class": 1}), name="dispatch")
class Dispatched(ViewSet):
    def list(self, request):
        return Response([])


class Reports(ViewSet):
    permission_classes = (HasEntitlements,)
    required_entitlements = ("reports",)

    def list(self, request):
        return Response([])

    def retrieve(self, request, pk):
        return Response({})


class Misspelt(ViewSet):
    permission_classes = (HasEntitlements,)
    required_entitlements = ("Create-Books",)

    @meter(reserve={"tokens": 1})
    def list(self, request):
        return Response([])


class AsText(Reports):
    required_entitlements = "reports"


router = DefaultRouter()
router.register("books", Books, basename="book")
router.register("dispatched", Dispatched, basename="dispatched")


def urls(**views):
    router = DefaultRouter()
    for name, view in views.items():
        router.register(name, view, basename=name)
    return type("Urls", (), {"urlpatterns": router.urls})


class Urls:
    urlpatterns = (
        path("api/", include(router.urls)),
        path("function", function), path("above", function_above), path("free", free),
        path("api", Api.as_view()), path("plain", Plain.as_view()),
    )  # fmt: skip


class Videos(ViewSet):
    def create(self, request):
        return Response({}, status=202)


class Video(APIView):
    @meter(on_failure="all")
    def post(self, request):
        return Response({}, status=202)


@api_view(["POST"])
@meter(on_failure="all")
def accept(request):
    return Response({}, status=status.HTTP_202_ACCEPTED)


accepting = SimpleRouter()
accepting.register("videos", Videos, basename="video")


class Accepting:
    urlpatterns = (
        *accepting.urls, path("function", accept), path("class", Video.as_view()),
        path("other", function),
    )  # fmt: skip


class Unchecked(Reports):
    permission_classes = (AllowAny,)


class Varying(Unchecked):
    def get_permissions(self):
        return [HasEntitlements()]


class Combined(Reports):
    permission_classes = (AllowAny & HasEntitlements,)


class OwnPermission(HasEntitlements):
    pass


class Own(Reports):
    permission_classes = (OwnPermission,)


class Computed(Reports):
    permission_classes = (AllowAny,)

    @property
    def required_entitlements(self):
        return ["reports"]


class Useless(ViewSet):
    permission_classes = (HasEntitlements,)

    def list(self, request):
        return Response([])
