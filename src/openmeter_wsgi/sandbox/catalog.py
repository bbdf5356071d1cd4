"""The routes of customers, features and subjects: create, list, read, delete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox import documents
from openmeter_wsgi.sandbox.listing import subjects_of
from openmeter_wsgi.sandbox.parameters import integer, page
from openmeter_wsgi.sandbox.parts import parts
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.schema import KEY, Flaw, Schema, check

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.resources import Document

_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_SLUG: Schema = {"type": "string", "minLength": 1, "maxLength": 64, "pattern": KEY}
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


customers = Blueprint("customers", __name__, url_prefix="/api/v1/customers")


@customers.post("")
def _create_customer() -> tuple[Response, int]:
    customer = documents.read(request.get_data(), CUSTOMER, "CustomerCreate")
    _check_subjects(customer, parts().customers.all())
    return jsonify(parts().customers.create(customer)), 201


@customers.get("")
def _list_customers() -> Response:
    return jsonify(_page([c for c in parts().customers.all() if _matches(c)]))


@customers.get("/<customer>")
def _get_customer(customer: str) -> Response:
    found = parts().customers.find(customer)
    if found is None:
        detail = f"customer with id or key {customer} not found in default namespace"
        raise Problem(404, detail)
    return jsonify(found)


@customers.delete("/<customer>")
def _delete_customer(customer: str) -> tuple[str, int]:
    parts().customers.delete(customer)
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


def _page(items: list[Document]) -> dict[str, Any]:
    number, size = page(request.args)
    return {
        "totalCount": len(items),
        "page": number,
        "pageSize": size,
        "items": items[(number - 1) * size : number * size],
    }


features = Blueprint("features", __name__, url_prefix="/api/v1/features")


@features.post("")
def _create_feature() -> tuple[Response, int]:
    feature = documents.read(request.get_data(), FEATURE, "FeatureCreateInputs")
    _check_feature(feature)
    return jsonify(parts().features.create(feature)), 201


@features.get("")
def _list_features() -> Response:
    wanted = request.args.getlist("meterSlug")
    found = [
        f for f in parts().features.all() if not wanted or f.get("meterSlug") in wanted
    ]
    # Whoever asks for a page gets one; OpenMeter's older form is a bare list.
    if "page" in request.args:
        return jsonify(_page(found))
    offset = integer(request.args, "offset", 0, 0, 10**9)
    limit = integer(request.args, "limit", 100, 1, 1000)
    return jsonify(found[offset : offset + limit])


@features.get("/<feature>")
def _get_feature(feature: str) -> Response:
    return jsonify(parts().features.get(feature))


@features.delete("/<feature>")
def _delete_feature(feature: str) -> tuple[str, int]:
    parts().features.delete(feature)
    return "", 204


def _check_feature(feature: Document) -> None:
    slug = feature.get("meterSlug")
    if slug is None:
        return
    meter = parts().meters.get(slug)
    if meter["aggregation"] not in FEATURE_AGGREGATIONS:
        detail = f"meter {slug} has aggregation {meter['aggregation']},"
        raise Problem(400, f"{detail} which features do not support")
    for name in feature.get("meterGroupByFilters", {}):
        if name not in meter.get("groupBy", {}):
            raise Problem(400, f"meter {slug} has no group by {name}")


subjects = Blueprint("subjects", __name__, url_prefix="/api/v1/subjects")


@subjects.post("")
def _upsert_subjects() -> Response:
    items = documents.parse(request.get_data())
    if flaw := check({"type": "array", "items": SUBJECT}, items):
        raise _refused(flaw)
    return jsonify([_upsert(item) for item in items])


@subjects.get("")
def _list_subjects() -> Response:
    return jsonify(parts().subjects.all())


@subjects.get("/<subject>")
def _get_subject(subject: str) -> Response:
    return jsonify(parts().subjects.get(subject))


@subjects.delete("/<subject>")
def _delete_subject(subject: str) -> tuple[str, int]:
    parts().subjects.delete(subject)
    return "", 204


def _refused(flaw: Flaw) -> Problem:
    return Problem(400, f"{documents.PREFIX}doesn't match schema: {flaw}", flaw=flaw)


def _upsert(item: Document) -> Document:
    known = parts().subjects
    if found := known.find(item["key"]):
        return known.update(found | item)
    return known.create(item)
