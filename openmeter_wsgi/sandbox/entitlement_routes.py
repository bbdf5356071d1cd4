"""The routes of entitlements: create, list, read, delete, grant, reset and value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox.context import current_context, question
from openmeter_wsgi.sandbox.entitlements import (
    PRESETS,
    grant_document,
    v1,
    v1_grant_document,
    v2,
)
from openmeter_wsgi.sandbox.request_validation import (
    DATE_TIME,
    FLAG,
    JSON,
    KEY,
    PREFIX,
    SLUG,
    TEXT,
    TEXTS,
    TIME,
    ULID,
    Problem,
    body_of,
    invalid,
    list_of,
    matches,
    moment,
    paged,
    parse,
    path_parameter,
    read,
    shape,
)

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.request_validation import Document, Schema

_AMOUNT: Schema = {"type": "number", "minimum": 0}
_PRIORITY: Schema = {"type": "integer", "minimum": 1, "maximum": 255}
#: The pattern of an ISO 8601 duration or a name.
_INTERVAL = (
    r"^(?:P(?:\d+(?:\.\d+)?Y)?(?:\d+(?:\.\d+)?M)?(?:\d+(?:\.\d+)?W)?(?:\d+(?:\.\d+)?D)?"
    r"(?:T(?:\d+(?:\.\d+)?H)?(?:\d+(?:\.\d+)?M)?(?:\d+(?:\.\d+)?S)?)?|DAY|WEEK|MONTH|YEAR)$"
)
_NO_INTERVAL = "doesn't match schema due to: doesn't match any schema from \"anyOf\""
_NO_START = (
    "doesn't match schema due to: doesn't match schema due to: value is not one of the"
    ' allowed values ["CURRENT_PERIOD_START","NOW"]'
)
PERIOD = shape(
    "interval",
    interval=TEXT | {"pattern": _INTERVAL, "otherwise": _NO_INTERVAL},
    anchor=TIME,
)
GRANT = shape(
    "amount effectiveAt",
    amount=_AMOUNT,
    priority=_PRIORITY,
    effectiveAt=TIME,
    minRolloverAmount={"type": "number"},
    maxRolloverAmount={"type": "number"},
    metadata=TEXTS,
    recurrence=PERIOD,
    expiration=shape(
        "duration count",
        duration=TEXT | {"enum": ["HOUR", "DAY", "WEEK", "MONTH", "YEAR"]},
        count={"type": "integer", "minimum": 1, "maximum": 1000},
    ),
    annotations={"type": "object"},
)
RESET = shape("", effectiveAt=TIME, retainAnchor=FLAG, preserveOverage=FLAG)
_COMMON: dict[str, Schema] = {
    "type": TEXT,
    "featureKey": SLUG,
    "featureId": TEXT | {"pattern": ULID},
    "metadata": TEXTS,
    "usagePeriod": PERIOD,
}
#: The schemas by the type of entitlement.
ENTITLEMENTS: dict[str, Schema] = {
    "boolean": shape("type", **_COMMON),
    "static": shape("type config", **_COMMON, config=TEXT),
    "metered": shape(
        "type usagePeriod",
        **_COMMON,
        isSoftLimit=FLAG,
        isUnlimited=FLAG,
        measureUsageFrom=TEXT
        | {"pattern": f"^(?:{'|'.join(PRESETS)})$|{DATE_TIME}", "otherwise": _NO_START},
        preserveOverageAtReset=FLAG,
        issueAfterReset=_AMOUNT,
        issueAfterResetPriority=_PRIORITY,
        issue=shape("amount", amount=_AMOUNT, priority=_PRIORITY),
        grants=list_of(GRANT),
    ),
}

routes: Final = Blueprint("entitlements", __name__, url_prefix="/api")
_V1_SUBJECT = "/v1/subjects/<subject>/entitlements"
_V1 = "/v1/customers/<customer>"
_V2 = "/v2/customers/<customer>/entitlements"
_ONE = f"{_V2}/<feature>"
_V3 = "/v3/openmeter"


@routes.post(_V2)
def _create(customer: str) -> tuple[Response, int]:
    found = _customer(customer)
    return jsonify(_created(found)), 201


@routes.post(_V1_SUBJECT)
def _create_of_subject(subject: str) -> tuple[Response, int]:
    shown = _created(_customer_of(subject))
    shown = {k: v for k, v in shown.items() if not k.startswith("customer")}
    return jsonify(shown | {"subjectKey": subject}), 201


@routes.put(f"{_ONE}/override")
def _override(customer: str, feature: str) -> tuple[Response, int]:
    payer, found = _found(customer, feature)
    return jsonify(_created(payer, instead_of=found)), 201


def _created(customer: Document, instead_of: Document | None = None) -> Document:
    asked = _read_entitlement()
    context = current_context()
    wanted = asked.get("featureId", asked.get("featureKey"))
    if wanted is None:
        raise Problem(400, "validation error: feature id or key must be set")
    feature = context.features.get(wanted)
    if instead_of is not None:
        context.entitlements.delete(instead_of)
    made = context.entitlements.create(customer, feature, asked)
    return context.entitlements.document(made)


def _read_entitlement() -> Document:
    body = parse(body_of(JSON))
    kind = body.get("type") if isinstance(body, dict) else None
    if not isinstance(kind, str) or kind not in ENTITLEMENTS:
        name = "#/components/schemas/EntitlementV2CreateInputs"
        reason = 'discriminator property "type" has invalid value'
        raise invalid(f"{PREFIX}doesn't match schema {name}: {reason}")
    return read(ENTITLEMENTS[kind])


@routes.get(_V2)
@question("entitlements")
def _list(customer: str) -> Response:
    context = current_context()
    found = context.entitlements.of(_customer(customer))
    return jsonify(paged([context.entitlements.document(e) for e in found]))


@routes.get(_ONE)
@question("entitlement")
def _get(customer: str, feature: str) -> Response:
    _, found = _found(customer, feature)
    return jsonify(current_context().entitlements.document(found))


@routes.delete(_ONE)
def _delete(customer: str, feature: str) -> tuple[str, int]:
    _, found = _found(customer, feature)
    current_context().entitlements.delete(found)
    return "", 204


@routes.post(f"{_ONE}/grants")
def _grant(customer: str, feature: str) -> tuple[Response, int]:
    asked = read(GRANT, "EntitlementGrantCreateInputV2")
    _, found = _found(customer, feature)
    context = current_context()
    made = context.entitlements.grant(found, asked)
    return jsonify(grant_document(made, context.store.clock())), 201


@routes.get(f"{_ONE}/grants")
def _grants(customer: str, feature: str) -> Response:
    _, found = _found(customer, feature)
    now = current_context().store.clock()
    made = [grant_document(g, now) for g in found.get("_", {}).get("grants", [])]
    return jsonify(paged(made))


@routes.get(f"{_V1_SUBJECT}/<feature>/grants")
def _grants_of_subject(subject: str, feature: str) -> Response:
    found = current_context().entitlements.get(_customer_of(subject), feature)
    now = current_context().store.clock()
    made = found.get("_", {}).get("grants", [])
    return jsonify([v1_grant_document(grant, now) for grant in made])


@routes.post(f"{_ONE}/reset")
def _reset(customer: str, feature: str) -> tuple[str, int]:
    asked = read(RESET, "ResetEntitlementUsageInput")
    _, found = _found(customer, feature)
    current_context().entitlements.reset(found, asked)
    return "", 204


@routes.get(f"{_V1_SUBJECT}/<feature>/value")
@question("subject_value")
def _value_of_subject(subject: str, feature: str) -> Response:
    at = _time()
    customer = _customer_of(subject)
    found = current_context().entitlements.get(customer, feature)
    return jsonify(v1(current_context().access.value(customer, found, at)))


@routes.get(f"{_V1}/entitlements/<feature>/value")
@question("value")
def _value_v1(customer: str, feature: str) -> Response:
    path_parameter("featureKey", feature, KEY)
    return jsonify(v1(_value(customer, feature)))


@routes.get(f"{_ONE}/value")
@question("value_v2")
def _value_v2(customer: str, feature: str) -> Response:
    _check_feature(feature)
    return jsonify(v2(_value(customer, feature)))


@routes.get(f"{_V1}/access")
@question("access")
def _access(customer: str) -> Response:
    context = current_context()
    found = _customer(customer)
    values = {
        entitlement["featureKey"]: v2(context.access.value(found, entitlement))
        for entitlement in context.entitlements.of(found)
    }
    return jsonify({"entitlements": values})


@routes.get(f"{_V3}/customers/<customer>/entitlement-access")
@question("access_v3")
def _access_v3(customer: str) -> Response:
    if not matches(ULID, customer):
        raise Problem(404)
    found = current_context().customers.find(customer)
    if found is None or found["id"] != customer:
        detail = f"not found error: customer with id {customer} not found"
        raise Problem(404, f"{detail} in default namespace")
    listed = []
    for entitlement in current_context().entitlements.of(found):
        value = current_context().access.value(found, entitlement)
        shown = {"feature_key": entitlement["featureKey"], "type": entitlement["type"]}
        shown |= {k: value[k] for k in ("config",) if k in value}
        listed.append(shown | {"has_access": value["hasAccess"]})
    return jsonify({"data": sorted(listed, key=lambda one: str(one["feature_key"]))})


def _value(customer: str, feature: str) -> Document:
    context = current_context()
    at = _time()
    found = _customer(customer)
    # `find` also returns None if the feature does not exist, as in OpenMeter.
    return context.access.value(found, context.entitlements.find(found, feature), at)


def _time() -> int | None:
    return moment(request.args.get("time"), "time")


def _customer(id_or_key: str) -> Document:
    if not 1 <= len(id_or_key) <= 256:
        reason = 'doesn\'t match any schema from "anyOf"'
        detail = f'parameter "customerIdOrKey" in path has an error: {reason}'
        raise invalid(detail)
    return current_context().customers.get(id_or_key)


def _customer_of(subject: str) -> Document:
    """Return the customer of *subject*; answer 404 if the subject does not exist."""
    return current_context().customers.of_subject(
        current_context().subjects.get(subject)["key"]
    )


def _found(customer: str, feature: str) -> tuple[Document, Document]:
    _check_feature(feature)
    found = _customer(customer)
    return found, current_context().entitlements.get(found, feature)


def _check_feature(feature: str) -> None:
    path_parameter("entitlementIdOrFeatureKey", feature, f"{KEY}|{ULID}")
