"""Checks of the server's meters and features against the policies."""

from __future__ import annotations

import datetime
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from openmeter_wsgi.cli.api_client import NoAnswer, UsageQuery
from openmeter_wsgi.cli.arguments import open_listing
from openmeter_wsgi.cli.findings import MARK, failure, ok, unanswered, unknown, warning
from openmeter_wsgi.entitlements.service import question_client
from openmeter_wsgi.errors import DeliveryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.cli.api_client import Document
    from openmeter_wsgi.cli.findings import Finding, Situation
    from openmeter_wsgi.entitlements.client import EntitlementClient
    from openmeter_wsgi.policy import Policy


class Sample(NamedTuple):
    """An event that a policy states."""

    type: str
    #: With 1 for what is known only at the end; None where nothing is known of it.
    data: Any


def samples(situation: Situation) -> list[Sample]:
    """Return what the policies state, each once."""
    found = list(_samples(situation))
    return [one for n, one in enumerate(found) if one not in found[:n]]


def _samples(situation: Situation) -> Iterator[Sample]:
    for _, policy in situation.policies():
        for meter in policy.static_meters:
            yield Sample(meter.type, msgspec.json.decode(meter.data))
        for measured in policy.measured:
            yield Sample(measured.type, measured.example(policy.value_property))


def types_stated(situation: Situation) -> set[str]:
    """Return every event type that a policy names, whoever says how much of it."""
    counted = situation.policy.entitlement_meters.values()
    return {
        *(sample.type for sample in samples(situation)),
        *(meter.type for meter in counted),
    }


def event_type(meter: Document) -> str | None:
    """Return the type of events that a meter on the server counts."""
    said = meter.get("eventType")
    return said if isinstance(said, str) else None


_PATH = re.compile(r"\$(?:\.[\w-]+|\['[^'\\]+'\]|\[\d+\])+")
_STEP = re.compile(r"\.([\w-]+)|\['([^'\\]+)'\]|\[(\d+)\]")
_NOWHERE = object()
#: Of a meter that no policy feeds is asked whether anybody has, for so many days.
DAYS = 7
#: More of them than this are not asked for.
_MAX_ASKED = 50


def look_at_meters(situation: Situation) -> Iterator[Finding]:
    """Say which meters of the policies OpenMeter counts, and which it has besides."""
    try:
        there = situation.listing.meters()
    except NoAnswer as error:
        yield unanswered("meters", error, "list meters")
        return
    sent = samples(situation)
    if not sent:
        yield ok("meters", "the policy states none; what handlers state is not known")
    for sample in sent:
        counting = [one for one in there if event_type(one) == sample.type]
        yield from _look_at_sample(sample, counting, there)
    stated = types_stated(situation)
    yield from _unfed(
        situation, [one for one in there if event_type(one) not in stated]
    )


def _look_at_sample(
    sample: Sample, counting: list[Document], there: list[Document]
) -> Iterator[Finding]:
    name = f"meter {sample.type!r}"
    if not counting:
        types = sorted({repr(event_type(one)) for one in there})
        yield failure(
            name,
            "no meter on the server counts events of this type: they are stored and "
            f"never billed; there are meters for {', '.join(types) or 'nothing'}",
            f"create a meter with eventType {sample.type!r}, or name the type here as "
            "it is called there",
        )
    for one in counting:
        yield _value(name, sample, one)


def _value(name: str, sample: Sample, counting: Document) -> Finding:
    slug, path = counting.get("slug"), counting.get("valueProperty")
    how = counting.get("aggregation")
    reads = f"the meter {slug!r} reads {path}"
    if how == "COUNT" or path is None:
        return ok(name, f"the meter {slug!r} counts its events")
    if sample.data is None:
        return unknown(name, f"{reads}; what is in the data is known only at the end")
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        return unknown(name, f"{reads}, which is not read here")
    value = _find(sample.data, path)
    if value is _NOWHERE:
        return failure(
            name,
            f"{reads}, which is not in {json.dumps(sample.data)}: it counts nothing",
            "send the property that the meter reads (value_property for numbers by "
            "type), or have the meter read what is sent",
        )
    if how != "UNIQUE_COUNT" and not _is_number(value):
        return failure(
            name,
            f"{reads}, where {value!r} is no number: it counts nothing",
            "send a number there, or have the meter read another property",
        )
    return ok(name, f"{reads}: {value!r}")


def _find(data: Any, path: str) -> Any:
    for named, quoted, index in _STEP.findall(path):
        try:
            data = data[int(index)] if index else data[named or quoted]
        except (LookupError, TypeError):
            return _NOWHERE
    return data


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _unfed(situation: Situation, others: list[Document]) -> Iterator[Finding]:
    """Say of the meters that no policy feeds whether handlers or others feed them."""
    fed: list[Document] = []
    unfed: list[Document] = []
    try:
        for meter in others[:_MAX_ASKED]:
            (fed if _has_usage(situation, meter) else unfed).append(meter)
    except NoAnswer as error:
        yield unanswered("other meters", error, "query meters")
        return
    if unfed:
        yield warning(
            "meters without usage",
            f"no policy feeds {_named(unfed)}, and nothing else has for {DAYS} days: "
            "they bill nothing",
            "name the type in meters, or state it in a handler with set_meters; delete "
            "the meter if it is not needed",
        )
    if fed:
        yield ok("other meters", f"fed by handlers or other services: {_named(fed)}")


def _has_usage(situation: Situation, meter: Document) -> bool:
    today = datetime.datetime.now(datetime.UTC).replace(
        hour=0, minute=0, second=0, microsecond=0
    )
    since = (today - datetime.timedelta(days=DAYS)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return bool(
        situation.listing.usage(str(meter.get("slug")), UsageQuery(since=since))
    )


def _named(meters: list[Document]) -> str:
    return ", ".join(f"{one.get('slug')!r} ({event_type(one)!r})" for one in meters)


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
            yield _look_at_feature(feature, there.get(feature), meters, situation)
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


def _look_at_lookups(client: EntitlementClient, url: str) -> Iterator[Finding]:
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


def _look_at_feature(
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


#: A meter of these grows by each event alone, whatever others say.
_COUNTED_DOWN = ("SUM", "COUNT")


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
    if counted is not None and meter.get("aggregation") not in _COUNTED_DOWN:
        return warning(
            name,
            f"its meter {meter.get('slug')!r} is of {meter.get('aggregation')}: what "
            "a request uses of it cannot be counted down",
            "leave it out of entitlement_meters, or use a meter of SUM or COUNT",
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
