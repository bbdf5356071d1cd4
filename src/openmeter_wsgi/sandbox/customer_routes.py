"""The routes of customers: create, list, read, delete."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox import documents
from openmeter_wsgi.sandbox.customers import CUSTOMER
from openmeter_wsgi.sandbox.listing import subject_keys, subjects_of
from openmeter_wsgi.sandbox.parameters import paged
from openmeter_wsgi.sandbox.parts import parts
from openmeter_wsgi.sandbox.problems import Problem

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.resources import Document

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
    if not subjects_of(customer):
        detail = "either key or usageAttribution.subjectKeys must be provided"
        raise Problem(400, f"validation error: {detail}")
    # The key of another customer may be a subject key: both pay for that subject.
    taken = {key: other["id"] for other in others for key in subject_keys(other)}
    if owner := taken.get(customer.get("key", "")):
        detail = f"key {customer['key']} overlaps with subject of another customer"
        raise Problem(409, f"conflict error: {detail}: {owner}")
    if both := [key for key in subject_keys(customer) if key in taken]:
        detail = f"one or multiple subject keys of [{' '.join(both)}] are already"
        detail += " associated with an different customer in the namespace default"
        raise Problem(409, f"conflict error: {detail}")


def _matches(customer: Document) -> bool:
    """Return whether the parameters choose *customer*, by parts of its texts."""
    wanted = request.args
    for name in ("key", "name", "primaryEmail"):
        part = wanted.get(name, "").lower()
        if part not in customer.get(name, "").lower():
            return False
    # The key of a customer is no subject key here, although its events count.
    subject = wanted.get("subject", "").lower()
    return not subject or any(subject in one.lower() for one in subject_keys(customer))
