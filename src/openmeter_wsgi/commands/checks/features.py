"""The features that requests must have, beside those on the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmeter_wsgi.commands.asking import NoAnswer
from openmeter_wsgi.commands.checks.feeding import event_type, types_stated
from openmeter_wsgi.commands.checks.findings import (
    MARK,
    failure,
    ok,
    unanswered,
    warning,
)
from openmeter_wsgi.commands.opening import open_listing
from openmeter_wsgi.entitlements.making import question_client
from openmeter_wsgi.errors import DeliveryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.asking import Document
    from openmeter_wsgi.commands.checks.findings import Finding, Situation
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.questions import QuestionClient

_QUESTIONS = "entitlements"


def look_at_features(situation: Situation) -> Iterator[Finding]:
    """Say of each feature whether OpenMeter can be asked for it, and the reverse."""
    needed = _needed(situation)
    policy = situation.policy
    if needed:
        yield from _look_at_questions(policy, needed)
    try:
        with open_listing(
            policy, policy.entitlements_url, policy.questions_key
        ) as listing:
            features = listing.features()
            meters = {str(one.get("slug")): one for one in listing.meters()}
    except NoAnswer as error:
        if needed:
            yield unanswered("features", error, "list features")
        return
    there = {str(one.get("key")): one for one in features}
    keys = {str(one.get("id")): str(one.get("key")) for one in features}
    for feature in needed:
        if feature not in there and (key := keys.get(feature)):
            yield _an_id(feature, key)
        else:
            yield _look_at_one(feature, there.get(feature), meters, situation)
    yield from _others(there, needed)


def _needed(situation: Situation) -> list[str]:
    required = [
        feature
        for _, policy in situation.policies()
        for feature in (*policy.required_entitlements, *policy.entitlement_meters)
    ]
    return list(dict.fromkeys(required))


def _look_at_questions(policy: Policy, features: list[str]) -> Iterator[Finding]:
    """Ask for a customer who does not exist, as a request would ask."""
    url = policy.entitlements_url or policy.api_url
    client = question_client(policy, policy.request_timeout)
    try:
        client.probe(features)
    except DeliveryError as error:
        yield failure(
            _QUESTIONS,
            f"{url} is asked who may, and says {_said(error)}",
            "give entitlements_api_key a key that may ask, and entitlements_url the "
            "address of a server that answers",
        )
    else:
        yield from _look_at_lookups(client, url)
    finally:
        client.close()


def _look_at_lookups(client: QuestionClient, url: str) -> Iterator[Finding]:
    """Look for the customer of a subject, as is done where no key is like it."""
    try:
        if client.can_look_up(MARK):
            client.lookup(MARK, 1)
    except DeliveryError as error:
        yield failure(
            _QUESTIONS,
            f"{url} is asked for the customer of a subject, and says {_said(error)}: "
            "fail_mode decides on each subject that is not the key of a customer",
            "give entitlements_api_key a key that may list customers",
        )
    else:
        yield ok(_QUESTIONS, f"{url} answers who may")


def _said(error: DeliveryError) -> str:
    answered = "does not answer" if error.status is None else error.status
    return f"{answered}: {error.reason}"


def _an_id(feature: str, key: str) -> Finding:
    return failure(
        _name(feature),
        "this is the id of a feature; write its key: OpenMeter denies every customer",
        f"write {key!r}",
    )


def _look_at_one(
    feature: str,
    found: Document | None,
    meters: dict[str, Document],
    situation: Situation,
) -> Finding:
    name = _name(feature)
    if found is None:
        return failure(
            name,
            "OpenMeter has no feature of this key: it denies every customer",
            f"create the feature {feature!r}, or name here what it is called there",
        )
    meter = meters.get(str(found.get("meterSlug")))
    if meter is None:
        return ok(name, "there, and not measured by a meter")
    return _quota(name, feature, meter, situation)


def _quota(name: str, feature: str, meter: Document, situation: Situation) -> Finding:
    """Say whether what the policies send uses the quota up."""
    counted = situation.policy.entitlement_meters.get(feature)
    kind = event_type(meter)
    counts_down = getattr(counted, "type", kind)
    if counts_down != kind:
        return failure(
            name,
            f"{counts_down!r} is counted down here, and {kind!r} by OpenMeter",
            f"set entitlement_meters to {{{feature!r}: {kind!r}}}",
        )
    if kind not in types_stated(situation):
        return warning(
            name,
            f"its meter {meter.get('slug')!r} counts {kind!r}, which no policy sends: "
            "its quota is never used up",
            f"name {kind!r} in meters, unless handlers or another service send it",
        )
    return ok(name, f"there; {kind!r} uses its quota up")


def _others(there: dict[str, Document], needed: list[str]) -> Iterator[Finding]:
    if others := sorted(map(repr, there.keys() - {*needed})):
        yield ok("other features", f"required by no policy: {', '.join(others)}")


def _name(feature: str) -> str:
    return f"feature {feature!r}"
