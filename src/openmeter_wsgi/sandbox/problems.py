"""OpenMeter's error bodies: ``application/problem+json``, in its two dialects."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, json, request
from werkzeug.exceptions import HTTPException

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.schema import Flaw

logger = logging.getLogger(__name__)

#: OpenMeter's ids are ``<host>/<random>-<number>``.
_RUN = f"sandbox/{secrets.token_urlsafe(7)}"
_numbers = itertools.count(1)


class Problem(Exception):
    """A request that is answered with an error.

    :param detail: None where OpenMeter leaves it out: 404, 405 and every 500.
    :param flaw: what the schema says against the body. Such answers of the v1 API
        have no ``instance``, those of v3 name the field.
    :param reason: what the page shows where *detail* says too little.
    :param position: the place of the event that is to blame in its batch, from 1.
    :param retry_after: seconds for the header of that name.
    """

    def __init__(
        self,
        status: int,
        detail: str | None = None,
        *,
        flaw: Flaw | None = None,
        reason: str | None = None,
        position: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail or HTTPStatus(status).phrase)
        self.status = status
        self.detail = detail
        self.flaw = flaw
        self.reason = reason or str(self)
        self.position = position
        self.retry_after = retry_after

    def v1(self) -> dict[str, Any]:
        """Return the body as the v1 and v2 APIs write it."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
        }
        if self.detail is not None:
            body["detail"] = self.detail
        if self.flaw is None:
            body["instance"] = _instance()
        return body

    def v3(self) -> dict[str, Any]:
        """Return the body as the v3 API writes it."""
        title = HTTPStatus(self.status).phrase
        slug = title.lower().replace(" ", "-")
        body: dict[str, Any] = {
            "type": f"https://kongapi.info/konnect/{slug}",
            "status": self.status,
            "title": title,
            "instance": _instance(),
        }
        if self.detail is not None:
            body["detail"] = self.detail
        if self.flaw is not None:
            field = self.flaw.pointer.strip("/").replace("/", ".")
            rule, reason = self.flaw.rule, self.flaw.reason
            body["detail"] = f"{title}: {field} [{rule}]: {reason}"
            body["invalid_parameters"] = [
                {"field": field, "rule": rule, "reason": reason, "source": ""}
            ]
        return body


def _instance() -> str:
    return f"urn:request:{_RUN}-{next(_numbers):06d}"


def answer(problem: Problem) -> Response:
    """Return *problem* in the dialect of the path that was asked."""
    v3 = request.path.startswith(("/api/v3/", "/v3/"))
    body = problem.v3() if v3 else problem.v1()
    response = Response(
        json.dumps(body), problem.status, content_type="application/problem+json"
    )
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(math.ceil(problem.retry_after))
    return response


def install(app: Flask) -> None:
    """Answer every error of *app* with a problem."""

    @app.errorhandler(Problem)
    def refused(problem: Problem) -> Response:
        return answer(problem)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        return answer(Problem(error.code or 500))

    @app.errorhandler(Exception)
    def fault(error: Exception) -> Response:
        logger.error("the sandbox failed at %r", request.path, exc_info=error)
        return answer(Problem(500))
