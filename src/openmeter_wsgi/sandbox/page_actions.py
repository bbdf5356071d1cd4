"""What the page can do besides looking: faults, visibility, and access by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox import documents
from openmeter_wsgi.sandbox.granting import Granting
from openmeter_wsgi.sandbox.parts import parts
from openmeter_wsgi.sandbox.schema import KEY

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.resources import Document
    from openmeter_wsgi.sandbox.schema import Schema

_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 256}
_WHICH: Schema = {
    "type": "object",
    "required": ["customer", "feature"],
    "additionalProperties": False,
    "properties": {"customer": _NAME, "feature": _NAME},
}
_GRANT: Schema = _WHICH | {
    "properties": {
        "customer": _NAME,
        "feature": {**_NAME, "maxLength": 64, "pattern": KEY},
        "amount": {"type": "number", "minimum": 0, "nullable": True},
        "soft": {"type": "boolean"},
        "period": _NAME,
    },
}
_VISIBILITY: Schema = {
    "type": "object",
    "required": ["visibleAfter"],
    "properties": {"visibleAfter": {"type": "number", "minimum": 0, "maximum": 3600}},
}


routes = Blueprint("page_actions", __name__, url_prefix="/sandbox/api")


def _read(schema: Schema) -> Document:
    return documents.read(request.get_data(), schema, "Sandbox")


@routes.put("/faults")
def _set_faults() -> Response:
    faults = parts().faults
    faults.update(documents.parse(request.get_data()))
    return jsonify(faults.document())


@routes.put("/visibility")
def _set_visibility() -> Response:
    store = parts().store
    store.visible_after = _read(_VISIBILITY)["visibleAfter"]
    return jsonify({"visibleAfter": store.visible_after})


@routes.post("/grant")
def _grant() -> tuple[Response, int]:
    made = Granting(parts()).grant(**_read(_GRANT))
    return jsonify(parts().entitlements.document(made)), 201


@routes.post("/revoke")
def _revoke() -> tuple[str, int]:
    Granting(parts()).revoke(**_read(_WHICH))
    return "", 204


@routes.post("/reset")
def _reset() -> tuple[str, int]:
    Granting(parts()).reset(**_read(_WHICH))
    return "", 204
