"""Users, and their login: programs send a token, people use a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask_login import LoginManager, UserMixin

if TYPE_CHECKING:
    from flask import Request

login_manager = LoginManager()


class User(UserMixin):
    """A user, whose usage is billed to its company."""

    def __init__(self, name: str, company: str, token: str) -> None:
        self.id = name
        self.company = company
        self.token = token


#: In your application: in a database, with hashed tokens.
USERS = {
    user.id: user
    for user in (
        User("wile", "acme", "acme-token"),
        User("bugs", "acme", "carrot-token"),
        User("hank", "globex", "globex-token"),
    )
}


@login_manager.user_loader
def by_name(name: str) -> User | None:
    return USERS.get(name)


@login_manager.request_loader
def by_token(request: Request) -> User | None:
    authorization = request.authorization
    given = authorization.token if authorization is not None else None
    return next((user for user in USERS.values() if user.token == given), None)
