"""The routes of customers, features and subjects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox.context import context
from openmeter_wsgi.sandbox.store import subject_keys, subjects_of
from openmeter_wsgi.sandbox.validation import (
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

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.validation import Document

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
#: A feature is a running total: averages and extremes are none.
FEATURE_AGGREGATIONS = ("SUM", "COUNT", "UNIQUE_COUNT", "LATEST")

customers: Final = Blueprint("customers", __name__, url_prefix="/api/v1/customers")


@customers.post("")
def _create_customer() -> tuple[Response, int]:
    customer = _read_customer()
    _check_subjects(customer, context().customers.all())
    created = context().customers.create(customer)
    _provision_subjects(created)
    return jsonify(created), 201


@customers.get("")
def _list_customers() -> Response:
    return jsonify(paged([c for c in context().customers.all() if _matches(c)]))


@customers.get("/<customer>")
def _get_customer(customer: str) -> Response:
    # Deleted customers too, as in OpenMeter: only here.
    return jsonify(context().customers.look_up(customer))


@customers.put("/<customer>")
def _change_customer(customer: str) -> Response:
    changed = _read_customer()
    found = context().customers.get(customer)
    others = [c for c in context().customers.all() if c["id"] != found["id"]]
    _check_subjects(changed, others)
    kept = {name: found[name] for name in ("id", "createdAt")}
    updated = context().customers.update(kept | changed)
    _provision_subjects(updated)
    return jsonify(updated)


@customers.delete("/<customer>")
def _delete_customer(customer: str) -> tuple[str, int]:
    here = context()
    found = here.customers.get(customer)
    if here.entitlements.of(found):
        detail = f"conflict error: customer {found['id']} still has active entitlements"
        raise Problem(409, f"{detail}, please remove them before deleting the customer")
    here.customers.retire(found["id"])
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
    # The key of another customer may be a subject key here: both pay for that subject.
    taken = {key: other["id"] for other in others for key in subject_keys(other)}
    if owner := taken.get(customer.get("key", "")):
        detail = f"key {customer['key']} overlaps with subject of another customer"
        raise Problem(409, f"conflict error: {detail}: {owner}")
    if both := [key for key in subject_keys(customer) if key in taken]:
        detail = f"one or multiple subject keys of [{' '.join(both)}] are already"
        detail += " associated with an different customer in the namespace default"
        raise Problem(409, f"conflict error: {detail}")


def _provision_subjects(customer: Document) -> None:
    """Create the subjects that *customer* names, as OpenMeter does."""
    known = context().subjects
    metadata = {"createdBy": "subject.provisioner", "customerId": customer["id"]}
    for key in subject_keys(customer):
        if known.find(key) is None:
            known.create({"key": key, "metadata": metadata})


def _matches(customer: Document) -> bool:
    """Return True if *customer* contains the texts of the parameters."""
    wanted = request.args
    for name in ("key", "name", "primaryEmail"):
        part = wanted.get(name, "").lower()
        if part not in customer.get(name, "").lower():
            return False
    # The key of a customer is no subject key here, although its events count.
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
    return jsonify(context().features.create(feature)), 201


@features.get("")
def _list_features() -> Response:
    wanted = request.args.getlist("meterSlug")
    found = context().features.all()
    found = [f for f in found if not wanted or f.get("meterSlug") in wanted]
    # With paging parameters, a page; otherwise OpenMeter's older form, a bare list.
    if "page" in request.args:
        return jsonify(paged(found))
    offset = integer(request.args, "offset", 0, 0, 10**9)
    limit = integer(request.args, "limit", 100, 1, 1000)
    return jsonify(found[offset : offset + limit])


@features.get("/<feature>")
def _get_feature(feature: str) -> Response:
    return jsonify(context().features.get(feature))


@features.delete("/<feature>")
def _archive_feature(feature: str) -> tuple[str, int]:
    # Its entitlements stay valid.
    context().features.retire(context().features.get(feature)["id"])
    return "", 204


def _check_feature(feature: Document) -> None:
    slug = feature.get("meterSlug")
    if slug is None:
        return
    meter = context().meters.get(slug)
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
    return jsonify(context().subjects.all())


@subjects.get("/<subject>")
def _get_subject(subject: str) -> Response:
    return jsonify(context().subjects.get(subject))


@subjects.delete("/<subject>")
def _delete_subject(subject: str) -> tuple[str, int]:
    context().subjects.retire(context().subjects.get(subject)["id"])
    return "", 204


def _upsert(item: Document) -> Document:
    known = context().subjects
    shown = {k: item[k] for k in SUBJECT["properties"] if item.get(k) is not None}
    if found := known.find(item["key"]):
        return known.update(found | shown)
    return known.create({"metadata": {}} | shown)
