"""The routes of entitlements: create, list, read, delete, grant, reset, values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox.context import context, question
from openmeter_wsgi.sandbox.entitlements import document, v1, v2
from openmeter_wsgi.sandbox.protocol import (
    KEY,
    Problem,
    check,
    matches,
    moment,
    paged,
    read,
)

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.protocol import Document, Schema

ULID = "^[0-7][0-9A-HJKMNP-TV-Za-hjkmnp-tv-z]{25}$"
_ID: Schema = {"type": "string", "pattern": ULID}
#: The key of a feature.
FEATURE_KEY: Schema = {
    "type": "string",
    "minLength": 1,
    "maxLength": 64,
    "pattern": KEY,
}
#: A customer, by id or by key.
CUSTOMER: Schema = {"type": "string", "minLength": 1, "maxLength": 256}
_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_TIME: Schema = {"type": "string", "format": "date-time"}
_AMOUNT: Schema = {"type": "number", "minimum": 0}
_PRIORITY: Schema = {"type": "integer", "minimum": 1, "maximum": 255}
_FLAG: Schema = {"type": "boolean"}
PERIOD: Schema = {
    "type": "object",
    "required": ["interval"],
    "properties": {"interval": {"type": "string"}, "anchor": _TIME},
}
GRANT: Schema = {
    "type": "object",
    "required": ["amount", "effectiveAt"],
    "properties": {
        "amount": _AMOUNT,
        "priority": _PRIORITY,
        "effectiveAt": _TIME,
        "minRolloverAmount": {"type": "number"},
        "maxRolloverAmount": {"type": "number"},
        "metadata": _TEXTS,
        "recurrence": PERIOD,
        "expiration": {
            "type": "object",
            "required": ["duration", "count"],
            "properties": {
                "duration": {
                    "type": "string",
                    "enum": ["HOUR", "DAY", "WEEK", "MONTH", "YEAR"],
                },
                "count": {"type": "integer", "minimum": 1, "maximum": 1000},
            },
        },
        "annotations": {"type": "object"},
    },
}
RESET: Schema = {
    "type": "object",
    "properties": {
        "effectiveAt": _TIME,
        "retainAnchor": _FLAG,
        "preserveOverage": _FLAG,
    },
}

_COMMON: dict[str, Schema] = {
    "type": {"type": "string"},
    "featureKey": FEATURE_KEY,
    "featureId": _ID,
    "metadata": _TEXTS,
    "usagePeriod": PERIOD,
}

#: By the kind of entitlement.
ENTITLEMENTS: dict[str, Schema] = {
    "boolean": {"type": "object", "required": ["type"], "properties": _COMMON},
    "static": {
        "type": "object",
        "required": ["type", "config"],
        "properties": _COMMON | {"config": {"type": "string"}},
    },
    "metered": {
        "type": "object",
        "required": ["type", "usagePeriod"],
        "properties": _COMMON
        | {
            "isSoftLimit": _FLAG,
            "isUnlimited": _FLAG,
            "measureUsageFrom": {"type": "string"},
            "preserveOverageAtReset": _FLAG,
            "issueAfterReset": _AMOUNT,
            "issueAfterResetPriority": _PRIORITY,
            "issue": {
                "type": "object",
                "required": ["amount"],
                "properties": {"amount": _AMOUNT, "priority": _PRIORITY},
            },
            "grants": {"type": "array", "items": GRANT},
        },
    },
}
#: What every kind must at least be for its own schema to be chosen.
KIND: Schema = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": {"type": "string", "enum": list(ENTITLEMENTS)}},
}

routes = Blueprint("entitlements", __name__, url_prefix="/api")
_V1_SUBJECT = "/v1/subjects/<subject>/entitlements"
_V1 = "/v1/customers/<customer>"
_V2 = "/v2/customers/<customer>/entitlements"
_ONE = f"{_V2}/<feature>"


@routes.post(_V2)
def _create(customer: str) -> tuple[Response, int]:
    found = _customer(customer)
    return jsonify(_created(found, v2=True)), 201


@routes.post(_V1_SUBJECT)
def _create_of_subject(subject: str) -> tuple[Response, int]:
    shown = _created(_customer_of(subject), v2=False)
    shown = {k: v for k, v in shown.items() if not k.startswith("customer")}
    return jsonify(shown | {"subjectKey": subject}), 201


def _created(customer: Document, *, v2: bool) -> Document:
    body = request.get_data()
    kind = read(body, KIND, "EntitlementV2CreateInputs")["type"]
    suffix = "V2" if v2 and kind == "metered" else ""
    name = f"Entitlement{kind.title()}{suffix}CreateInputs"
    asked = read(body, ENTITLEMENTS[kind], name)
    here = context()
    wanted = asked.get("featureId", asked.get("featureKey"))
    if wanted is None:
        raise Problem(400, "validation error: feature ID or key is required")
    feature = here.features.find(wanted)
    if feature is None:
        raise Problem(404, f"feature not found: {wanted}")
    return here.entitlements.document(
        here.entitlements.create(customer, feature, asked)
    )


@routes.get(_V2)
@question("entitlements")
def _list(customer: str) -> Response:
    here = context()
    found = here.entitlements.of(_customer(customer))
    return jsonify(paged([here.entitlements.document(e) for e in found], request.args))


@routes.get(_ONE)
@question("entitlement")
def _get(customer: str, feature: str) -> Response:
    _, found = _found(customer, feature)
    return jsonify(context().entitlements.document(found))


@routes.delete(_ONE)
def _delete(customer: str, feature: str) -> tuple[str, int]:
    _, found = _found(customer, feature)
    context().entitlements.delete(found)
    return "", 204


@routes.post(f"{_ONE}/grants")
def _grant(customer: str, feature: str) -> tuple[Response, int]:
    _, found = _found(customer, feature)
    asked = read(request.get_data(), GRANT, "EntitlementGrantCreateInputV2")
    here = context()
    made = here.entitlements.grant(found, asked)
    return jsonify(document(made, here.store.clock())), 201


@routes.get(f"{_ONE}/grants")
def _grants(customer: str, feature: str) -> Response:
    _, found = _found(customer, feature)
    now = context().store.clock()
    made = [document(g, now) for g in found.get("_", {}).get("grants", [])]
    return jsonify(paged(made, request.args))


@routes.post(f"{_ONE}/reset")
def _reset(customer: str, feature: str) -> tuple[str, int]:
    _, found = _found(customer, feature)
    asked = read(request.get_data(), RESET, "ResetEntitlementUsageInput")
    context().entitlements.reset(found, asked)
    return "", 204


@routes.get(f"{_V1_SUBJECT}/<feature>/value")
@question("subject_value")
def _value_of_subject(subject: str, feature: str) -> Response:
    customer = _customer_of(subject)
    found = context().entitlements.get(customer, feature)
    return jsonify(v1(context().access.value(customer, found, _time())))


@routes.get(f"{_V1}/entitlements/<feature>/value")
@question("value")
def _value_v1(customer: str, feature: str) -> Response:
    _check_feature(feature, ulid=False)
    return jsonify(v1(_value(customer, feature)))


@routes.get(f"{_ONE}/value")
@question("value_v2")
def _value_v2(customer: str, feature: str) -> Response:
    _check_feature(feature, ulid=True)
    return jsonify(v2(_value(customer, feature)))


@routes.get(f"{_V1}/access")
@question("access")
def _access(customer: str) -> Response:
    here = context()
    found = _customer(customer)
    values = {
        entitlement["featureKey"]: v2(here.access.value(found, entitlement))
        for entitlement in here.entitlements.of(found)
    }
    return jsonify({"entitlements": values})


def _value(customer: str, feature: str) -> Document:
    here = context()
    at = _time()
    found = _customer(customer)
    # None also where no such feature exists: OpenMeter does not tell these apart here.
    return here.access.value(found, here.entitlements.find(found, feature), at)


def _time() -> int | None:
    return moment(request.args.get("time"), "time")


def _customer(id_or_key: str) -> Document:
    if flaw := check(CUSTOMER, id_or_key):
        raise _refused("customerIdOrKey", flaw.reason)
    return context().customers.get(id_or_key)


def _customer_of(subject: str) -> Document:
    """Return who pays for *subject*, which has to exist as an entity of its own."""
    found = context().subjects.find(subject)
    if found is None:
        raise Problem(404, f"subject not found: {subject}")
    return context().customers.of_subject(found["key"])


def _found(customer: str, feature: str) -> tuple[Document, Document]:
    found = _customer(customer)
    return found, context().entitlements.get(found, feature)


def _check_feature(feature: str, *, ulid: bool) -> None:
    flaw = check(FEATURE_KEY, feature)
    if flaw is not None and not (ulid and matches(ULID, feature)):
        name = "entitlementIdOrFeatureKey" if ulid else "featureKey"
        raise _refused(name, flaw.reason)


def _refused(name: str, reason: str) -> Problem:
    return Problem(400, f'parameter "{name}" in path has an error: {reason}')
