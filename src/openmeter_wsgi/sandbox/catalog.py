"""The routes of features and subjects: create, list, read, delete."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox import documents
from openmeter_wsgi.sandbox.parameters import integer, paged
from openmeter_wsgi.sandbox.parts import parts
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.schema import KEY, Flaw, Schema, check

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.resources import Document

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
        return jsonify(paged(found, request.args))
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
