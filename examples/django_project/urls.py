"""URLs of the API."""

from django.urls import include, path
from rest_framework.routers import SimpleRouter
from shop import views

router = SimpleRouter()
router.register("products", views.Products, basename="product")

urlpatterns = [
    path("", include(router.urls)),
    path("chat/", views.Chat.as_view()),
    path("reports/", views.Report.as_view()),
    path("export/<int:pages>/", views.export),
    path("health/", views.health),
]
