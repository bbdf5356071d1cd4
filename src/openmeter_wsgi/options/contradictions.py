"""What is wrong between options that are each right."""

from __future__ import annotations

from typing import Any, TypeAlias

from openmeter_wsgi.options.billing import DEFAULT_SOURCE
from openmeter_wsgi.options.entitlement_values import unaddressable

#: Its options are read, and nothing of it is known here.
Policy: TypeAlias = Any


def contradictions(policy: Policy) -> list[str]:
    """Return a sentence for each contradiction."""
    return [*_sources(policy), *_places(policy), *_quotas(policy), *_ids(policy)]


def _sources(policy: Policy) -> list[str]:
    if policy.trusted_request_id_header and policy.event_source == DEFAULT_SOURCE:
        return [
            "event_source: expected a name of this service's own, got the default: "
            "with trusted_request_id_header two services behind one proxy would "
            "share ids"
        ]
    return []


def _places(policy: Policy) -> list[str]:
    problems = []
    if policy.delivery == "ship" and policy.spool_dir is None:
        problems.append("spool_dir: expected a directory for delivery='ship'")
    if policy.required_entitlements and policy.api_flavor == "konnect":
        problems.append(
            "required_entitlements: Kong Konnect answers no questions about single "
            "entitlements; set entitlements_url to an OpenMeter server that does, and "
            "api_flavor to its own"
        )
    return problems


def _quotas(policy: Policy) -> list[str]:
    if not isinstance(policy.reserve, dict):
        return []
    counted = policy.entitlement_meters
    return [
        f"reserve: {feature!r} is not in entitlement_meters, so nothing counts it"
        for feature in policy.reserve
        if feature not in counted
    ]


def _ids(policy: Policy) -> list[str]:
    if policy.entitlements_path != "v1":
        return []
    named = {*policy.required_entitlements, *policy.entitlement_meters}
    return [
        f"required_entitlements: {feature!r} is an id, which OpenMeter's v1 does not "
        "take; write the key of the feature, or ask by entitlements_path='v2'"
        for feature in unaddressable(sorted(named))
    ]
