"""Pages for people, which are not billed."""

from __future__ import annotations

from flask import Blueprint, abort, request
from flask_login import login_user

from examples.flask_project.accounts import USERS
from openmeter_wsgi import no_meter

site = Blueprint("site", __name__)


@site.get("/health")
@no_meter
def health() -> str:
    """Answer a load balancer; its requests are not billed."""
    return "ok"


@site.post("/login")
@no_meter
def login() -> dict[str, str]:
    """Log a user in."""
    user = USERS.get(request.form.get("name", ""))
    if user is None or request.form.get("token") != user.token:
        abort(401)
    login_user(user)
    return {"welcome": user.id}
