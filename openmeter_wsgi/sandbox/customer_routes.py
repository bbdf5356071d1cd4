"""The routes of customers, features and subjects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox.context import current_context
from openmeter_wsgi.sandbox.request_validation import (
    JSON,
    METADATA,
    PREFIX,
    SLUG,
    TEXT,
    TEXTS,
    Problem,
    body_of,
    check,
    integer,
    invalid,
    list_of,
    paged,
    parse,
    read,
    shape,
    text,
)
from openmeter_wsgi.sandbox.store import subject_keys, subjects_of

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.request_validation import Document

CUSTOMER = shape(
    "name",
    name=text(256),
    description=TEXT | {"maxLength": 1024},
    metadata=METADATA,
    key=text(256),
    usageAttribution=shape("subjectKeys", subjectKeys=list_of(text())),
    primaryEmail=TEXT,
    currency=TEXT | {"pattern": "^[A-Z]{3}$"},
    billingAddress={"type": "object"},
)
FEATURE = shape(
    "key name",
    key=SLUG,
    name=TEXT,
    metadata=TEXTS,
    meterSlug=SLUG,
    meterGroupByFilters=TEXTS,
    advancedMeterGroupByFilters={"type": "object"},
)
SUBJECT = shape(
    "key",
    key=TEXT,
    displayName=TEXT | {"nullable": True},
    metadata={"type": "object", "nullable": True},
    stripeCustomerId=TEXT | {"nullable": True},
)
#: The aggregations of meters that a feature can have.
FEATURE_AGGREGATIONS = ("SUM", "COUNT", "UNIQUE_COUNT", "LATEST")

customers: Final = Blueprint("customers", __name__, url_prefix="/api/v1/customers")


@customers.post("")
def _create_customer() -> tuple[Response, int]:
    customer = _read_customer()
    _check_subjects(customer, current_context().customers.all())
    created = current_context().customers.create(customer)
    _provision_subjects(created)
    return jsonify(created), 201


@customers.get("")
def _list_customers() -> Response:
    return jsonify(paged([c for c in current_context().customers.all() if _matches(c)]))


@customers.get("/<customer>")
def _get_customer(customer: str) -> Response:
    # As in OpenMeter, only this route also returns deleted customers.
    return jsonify(current_context().customers.look_up(customer))


@customers.put("/<customer>")
def _change_customer(customer: str) -> Response:
    changed = _read_customer()
    found = current_context().customers.get(customer)
    others = [c for c in current_context().customers.all() if c["id"] != found["id"]]
    _check_subjects(changed, others)
    kept = {name: found[name] for name in ("id", "createdAt")}
    updated = current_context().customers.update(kept | changed)
    _provision_subjects(updated)
    return jsonify(updated)


@customers.delete("/<customer>")
def _delete_customer(customer: str) -> tuple[str, int]:
    context = current_context()
    found = context.customers.get(customer)
    if context.entitlements.of(found):
        detail = f"conflict error: customer {found['id']} still has active entitlements"
        raise Problem(409, f"{detail}, please remove them before deleting the customer")
    context.customers.retire(found["id"])
    return "", 204


def _read_customer() -> Document:
    customer = read(CUSTOMER, "CustomerCreate")
    if not subject_keys(customer):
        customer.pop("usageAttribution", None)
    return customer


def _check_subjects(customer: Document, others: list[Document]) -> None:
    if not subjects_of(customer):
        detail = "either key or usageAttribution.subjectKeys must be provided"
        before = "validation error: error creating customer: validation error: "
        raise Problem(400, f"{before}validation error: {detail}")
    # Another customer's key may be a subject key of this one: both pay for it.
    taken = {key: other["id"] for other in others for key in subject_keys(other)}
    if owner := taken.get(customer.get("key", "")):
        detail = f"key {customer['key']} overlaps with subject of another customer"
        raise Problem(409, f"conflict error: {detail}: {owner}")
    if both := [key for key in subject_keys(customer) if key in taken]:
        detail = f"one or multiple subject keys of [{' '.join(both)}] are already"
        detail += " associated with an different customer in the namespace default"
        raise Problem(409, f"conflict error: {detail}")


def _provision_subjects(customer: Document) -> None:
    """Create the missing subjects of *customer*, as OpenMeter does."""
    stored = current_context().subjects
    metadata = {"createdBy": "subject.provisioner", "customerId": customer["id"]}
    for key in subject_keys(customer):
        if stored.find(key) is None:
            stored.create({"key": key, "metadata": metadata})


def _matches(customer: Document) -> bool:
    """Return True if *customer* matches the filters of the request."""
    wanted = request.args
    for name in ("key", "name", "primaryEmail"):
        part = wanted.get(name, "").lower()
        if part not in customer.get(name, "").lower():
            return False
    # This filter ignores the customer's own key, although it pays for that subject.
    subject = wanted.get("subject", "").lower()
    return not subject or any(subject in one.lower() for one in subject_keys(customer))


features: Final = Blueprint("features", __name__, url_prefix="/api/v1/features")


@features.post("")
def _create_feature() -> tuple[Response, int]:
    feature = read(FEATURE, "FeatureCreateInputs")
    if "advancedMeterGroupByFilters" in feature:
        raise Problem(501, "the sandbox offers only meterGroupByFilters")
    if filters := feature.get("meterGroupByFilters"):
        equal = {name: {"$eq": value} for name, value in filters.items()}
        feature["advancedMeterGroupByFilters"] = equal
    _check_feature(feature)
    return jsonify(current_context().features.create(feature)), 201


@features.get("")
def _list_features() -> Response:
    wanted = request.args.getlist("meterSlug")
    found = current_context().features.all()
    found = [f for f in found if not wanted or f.get("meterSlug") in wanted]
    # OpenMeter returns a page if there is a parameter `page`, else a list.
    if "page" in request.args:
        return jsonify(paged(found))
    offset = integer(request.args, "offset", 0, 0, 10**9)
    limit = integer(request.args, "limit", 100, 1, 1000)
    return jsonify(found[offset : offset + limit])


@features.get("/<feature>")
def _get_feature(feature: str) -> Response:
    return jsonify(current_context().features.get(feature))


@features.delete("/<feature>")
def _archive_feature(feature: str) -> tuple[str, int]:
    # Entitlements to the feature stay valid.
    current_context().features.retire(current_context().features.get(feature)["id"])
    return "", 204


def _check_feature(feature: Document) -> None:
    slug = feature.get("meterSlug")
    if slug is None:
        return
    meter = current_context().meters.get(slug)
    if meter["aggregation"] not in FEATURE_AGGREGATIONS:
        detail = f"meter {slug}'s aggregation is {meter['aggregation']} but features"
        allowed = ", ".join(FEATURE_AGGREGATIONS)
        raise Problem(400, f"{detail} can only be created for {allowed}")
    groups = meter.get("groupBy", {})
    if unknown := feature.get("meterGroupByFilters", {}).keys() - groups.keys():
        detail = f"invalid filters for feature: map[{' '.join(sorted(unknown))}]"
        raise Problem(400, f"{detail}, available columns: [{' '.join(groups)}]")


subjects: Final = Blueprint("subjects", __name__, url_prefix="/api/v1/subjects")


@subjects.post("")
def _upsert_subjects() -> Response:
    items = parse(body_of(JSON))
    if flaw := check({"type": "array", "items": SUBJECT}, items):
        raise invalid(f"{PREFIX}doesn't match schema: {flaw}", flaw)
    return jsonify([_upsert(item) for item in items])


@subjects.get("")
def _list_subjects() -> Response:
    return jsonify(current_context().subjects.all())


@subjects.get("/<subject>")
def _get_subject(subject: str) -> Response:
    return jsonify(current_context().subjects.get(subject))


@subjects.delete("/<subject>")
def _delete_subject(subject: str) -> tuple[str, int]:
    current_context().subjects.retire(current_context().subjects.get(subject)["id"])
    return "", 204


def _upsert(item: Document) -> Document:
    stored = current_context().subjects
    shown = {k: item[k] for k in SUBJECT["properties"] if item.get(k) is not None}
    if found := stored.find(item["key"]):
        return stored.update(found | shown)
    return stored.create({"metadata": {}} | shown)
