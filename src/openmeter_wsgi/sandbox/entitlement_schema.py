"""What OpenMeter takes as an entitlement, as a grant and as a reset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmeter_wsgi.sandbox.schema import KEY

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.schema import Schema

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
