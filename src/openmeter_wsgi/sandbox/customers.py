"""The customers: who pays, under which subjects, and the routes of their API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox import documents
from openmeter_wsgi.sandbox.listing import subjects_of
from openmeter_wsgi.sandbox.parameters import paged
from openmeter_wsgi.sandbox.parts import parts
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.resources import Resources

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.resources import Document
    from openmeter_wsgi.sandbox.schema import Schema
    from openmeter_wsgi.sandbox.store import Store

_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_SUBJECT_KEYS: Schema = {
    "type": "array",
    "items": {"type": "string", "minLength": 1},
}
CUSTOMER: Schema = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 256},
        "description": {"type": "string", "maxLength": 1024},
        "metadata": _TEXTS | {"nullable": True},
        "key": {"type": "string", "minLength": 1, "maxLength": 256},
        "usageAttribution": {
            "type": "object",
            "required": ["subjectKeys"],
            "properties": {"subjectKeys": _SUBJECT_KEYS},
        },
        "primaryEmail": {"type": "string"},
        "currency": {"type": "string", "pattern": "^[A-Z]{3}$"},
        "billingAddress": {"type": "object"},
    },
}


class Customers(Resources):
    """All customers; those that were deleted are remembered by their id."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, "customer", key="key")
        self._deleted = Resources(store, "deleted customer", key="key")

    def look_up(self, id_or_key: str) -> Document:
        """Return the one with this id, deleted or not, or this key; or answer 404."""
        found = self.find(id_or_key) or self._deleted.find(id_or_key)
        if found is None:
            detail = f"customer with id or key {id_or_key} not found"
            raise Problem(404, f"{detail} in default namespace")
        return found

    def get(self, id_or_key: str) -> Document:
        """Return what `look_up` does, or answer 412 if it is deleted."""
        found = self.look_up(id_or_key)
        if "deletedAt" in found:
            detail = f"customer is deleted [namespace=default customer.id={id_or_key}]"
            raise Problem(412, detail)
        return found

    def of_subject(self, subject: str) -> Document:
        """Return the one that pays for *subject*, or answer 404."""
        found = [one for one in self.all() if subject in subjects_of(one)]
        if not found:
            raise Problem(404, f"customer with subject key {subject} not found")
        # A key wins against the subjects that another customer names.
        return min(found, key=lambda one: one.get("key") != subject)


routes = Blueprint("customers", __name__, url_prefix="/api/v1/customers")


@routes.post("")
def _create_customer() -> tuple[Response, int]:
    customer = documents.read(request.get_data(), CUSTOMER, "CustomerCreate")
    _check_subjects(customer, parts().customers.all())
    return jsonify(parts().customers.create(customer)), 201


@routes.get("")
def _list_customers() -> Response:
    found = [c for c in parts().customers.all() if _matches(c)]
    return jsonify(paged(found, request.args))


@routes.get("/<customer>")
def _get_customer(customer: str) -> Response:
    # A deleted one too, as OpenMeter does here and nowhere else.
    return jsonify(parts().customers.look_up(customer))


@routes.delete("/<customer>")
def _delete_customer(customer: str) -> tuple[str, int]:
    here = parts()
    found = here.customers.get(customer)
    if here.entitlements.of(found):
        detail = f"customer {found['id']} still has active entitlements"
        raise Problem(409, f"{detail}, please remove them before deleting the customer")
    here.customers.retire(found["id"])
    return "", 204


def _check_subjects(customer: Document, others: list[Document]) -> None:
    mine = subjects_of(customer)
    if not mine:
        raise Problem(
            400, "validation error: either key or usageAttribution.subjectKeys required"
        )
    taken = {subject for other in others for subject in subjects_of(other)}
    if both := sorted(taken.intersection(mine)):
        raise Problem(409, f"subject keys are already in use: {', '.join(both)}")


def _matches(customer: Document) -> bool:
    """Return whether the parameters choose *customer*, by parts of its texts."""
    wanted = request.args
    for name in ("key", "name", "primaryEmail"):
        part = wanted.get(name, "").lower()
        if part not in customer.get(name, "").lower():
            return False
    subject = wanted.get("subject", "").lower()
    return any(subject in one.lower() for one in subjects_of(customer))
