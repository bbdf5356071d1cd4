"""What is wrong between options that are each right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from openmeter_wsgi.api_key import is_konnect
from openmeter_wsgi.options.billing import DEFAULT_SOURCE
from openmeter_wsgi.options.entitlement_values import unaddressable

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Its options are read, and nothing of it is known here.
Policy: TypeAlias = Any


def contradictions(policy: Policy) -> list[str]:
    """Return a sentence for each contradiction."""
    return [
        *_sources(policy),
        *_places(policy),
        *_versions(policy),
        *_quotas(policy),
        *_ids(policy),
    ]


def _sources(policy: Policy) -> list[str]:
    if policy.trusted_request_id_header and policy.event_source == DEFAULT_SOURCE:
        return [
            "event_source: expected a name of this service's own, got the default: "
            "with trusted_request_id_header two services behind one proxy would "
            "share ids"
        ]
    return []


def _places(policy: Policy) -> list[str]:
    if policy.delivery == "ship" and policy.spool_dir is None:
        return ["spool_dir: expected a directory for delivery='ship'"]
    return []


def _versions(policy: Policy) -> list[str]:
    """Compare the options with what the version of the API can do."""
    if policy.api_flavor == "v3":
        return list(_not_in_v3(policy))
    return [
        f"api_flavor: expected 'v3' for {url}, as Kong Konnect has version 3 only, "
        "got 'v1'"
        for url in (policy.api_url, policy.entitlements_url)
        if url is not None and is_konnect(url)
    ]


def _not_in_v3(policy: Policy) -> Iterator[str]:
    if policy.entitlement_meters:
        yield (
            "entitlement_meters: expected none with api_flavor='v3', which tells no "
            f"balance that could be counted down, got {[*policy.entitlement_meters]}; "
            "leave it out, or set api_flavor='v1' where the server has version 1"
        )
    if policy.usage_headers:
        yield (
            "usage_headers: expected False with api_flavor='v3', which tells no limit "
            "and no balance, got True"
        )
    if policy.entitlements_path != "v2":
        yield (
            "entitlements_path: expected none with api_flavor='v3', which has one path "
            f"only, got {policy.entitlements_path!r}"
        )


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
    if policy.api_flavor == "v3":
        version, other = "version 3", ""
    elif policy.entitlements_path == "v1":
        version, other = "v1", ", or ask by entitlements_path='v2'"
    else:
        return []
    named = {*policy.required_entitlements, *policy.entitlement_meters}
    return [
        f"required_entitlements: {feature!r} is an id, which OpenMeter's {version} "
        f"does not take; write the key of the feature{other}"
        for feature in unaddressable(sorted(named))
    ]
