"""The routes of customers, features and subjects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox.context import context
from openmeter_wsgi.sandbox.protocol import (
    KEY,
    PREFIX,
    Flaw,
    Problem,
    Schema,
    check,
    integer,
    paged,
    parse,
    read,
)
from openmeter_wsgi.sandbox.store import CUSTOMER, subject_keys, subjects_of

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.protocol import Document

customers = Blueprint("customers", __name__, url_prefix="/api/v1/customers")


@customers.post("")
def _create_customer() -> tuple[Response, int]:
    customer = read(request.get_data(), CUSTOMER, "CustomerCreate")
    _check_subjects(customer, context().customers.all())
    return jsonify(context().customers.create(customer)), 201


@customers.get("")
def _list_customers() -> Response:
    found = [c for c in context().customers.all() if _matches(c)]
    return jsonify(paged(found, request.args))


@customers.get("/<customer>")
def _get_customer(customer: str) -> Response:
    # A deleted one too, as OpenMeter does here and nowhere else.
    return jsonify(context().customers.look_up(customer))


@customers.delete("/<customer>")
def _delete_customer(customer: str) -> tuple[str, int]:
    here = context()
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


_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_SLUG: Schema = {"type": "string", "minLength": 1, "maxLength": 64, "pattern": KEY}
FEATURE: Schema = {
    "type": "object",
    "required": ["key", "name"],
    "properties": {
        "key": _SLUG,
        "name": {"type": "string"},
        "metadata": _TEXTS,
        "meterSlug": _SLUG,
        "meterGroupByFilters": _TEXTS,
        "advancedMeterGroupByFilters": {"type": "object"},
    },
}
SUBJECT: Schema = {
    "type": "object",
    "required": ["key"],
    "properties": {
        "key": {"type": "string"},
        "displayName": {"type": "string", "nullable": True},
        "metadata": {"type": "object", "nullable": True},
        "stripeCustomerId": {"type": "string", "nullable": True},
    },
}
#: A feature is a running total: averages and extremes are none.
FEATURE_AGGREGATIONS = ("SUM", "COUNT", "UNIQUE_COUNT", "LATEST")

features = Blueprint("features", __name__, url_prefix="/api/v1/features")


@features.post("")
def _create_feature() -> tuple[Response, int]:
    feature = read(request.get_data(), FEATURE, "FeatureCreateInputs")
    _check_feature(feature)
    return jsonify(context().features.create(feature)), 201


@features.get("")
def _list_features() -> Response:
    wanted = request.args.getlist("meterSlug")
    found = [
        f
        for f in context().features.all()
        if not wanted or f.get("meterSlug") in wanted
    ]
    # Whoever asks for a page gets one; OpenMeter's older form is a bare list.
    if "page" in request.args:
        return jsonify(paged(found, request.args))
    offset = integer(request.args, "offset", 0, 0, 10**9)
    limit = integer(request.args, "limit", 100, 1, 1000)
    return jsonify(found[offset : offset + limit])


@features.get("/<feature>")
def _get_feature(feature: str) -> Response:
    return jsonify(context().features.get(feature))


@features.delete("/<feature>")
def _delete_feature(feature: str) -> tuple[str, int]:
    context().features.delete(feature)
    return "", 204


def _check_feature(feature: Document) -> None:
    slug = feature.get("meterSlug")
    if slug is None:
        return
    meter = context().meters.get(slug)
    if meter["aggregation"] not in FEATURE_AGGREGATIONS:
        detail = f"meter {slug} has aggregation {meter['aggregation']},"
        raise Problem(400, f"{detail} which features do not support")
    for name in feature.get("meterGroupByFilters", {}):
        if name not in meter.get("groupBy", {}):
            raise Problem(400, f"meter {slug} has no group by {name}")


subjects = Blueprint("subjects", __name__, url_prefix="/api/v1/subjects")


@subjects.post("")
def _upsert_subjects() -> Response:
    items = parse(request.get_data())
    if flaw := check({"type": "array", "items": SUBJECT}, items):
        raise _refused(flaw)
    return jsonify([_upsert(item) for item in items])


@subjects.get("")
def _list_subjects() -> Response:
    return jsonify(context().subjects.all())


@subjects.get("/<subject>")
def _get_subject(subject: str) -> Response:
    return jsonify(context().subjects.get(subject))


@subjects.delete("/<subject>")
def _delete_subject(subject: str) -> tuple[str, int]:
    context().subjects.delete(subject)
    return "", 204


def _refused(flaw: Flaw) -> Problem:
    return Problem(400, f"{PREFIX}doesn't match schema: {flaw}", flaw=flaw)


def _upsert(item: Document) -> Document:
    known = context().subjects
    if found := known.find(item["key"]):
        return known.update(found | item)
    return known.create(item)
