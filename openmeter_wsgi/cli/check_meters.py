"""Checks of the server's meters and features against the policies."""

from __future__ import annotations

import datetime
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from openmeter_wsgi.cli.api_client import NoAnswer, UsageQuery
from openmeter_wsgi.cli.common import open_listing
from openmeter_wsgi.cli.creation_commands import (
    data_of_measure,
    feature_creation,
    meter_creation,
)
from openmeter_wsgi.cli.findings import (
    MARK,
    Finding,
    Severity,
    failure,
    note,
    ok,
    unanswered,
    unknown,
    warning,
)
from openmeter_wsgi.entitlements.service import question_client
from openmeter_wsgi.entitlements.visibility_probes import event_list
from openmeter_wsgi.errors import DeliveryError
from openmeter_wsgi.measures import Measure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.cli.api_client import Document
    from openmeter_wsgi.cli.findings import Situation
    from openmeter_wsgi.entitlements.client import EntitlementClient
    from openmeter_wsgi.policy import Policy


class Sample(NamedTuple):
    """An event that a policy states."""

    type: str
    #: With the measures that are in it; None if nothing is known of it.
    data: Any

    @property
    def shown(self) -> str:
        """Its data as JSON, with measures as they are written in a file."""
        return json.dumps(self.data, default=lambda measure: measure.text)


def samples(situation: Situation) -> list[Sample]:
    """Return the events that the policies name, each once."""
    found = {(one.type, one.shown): one for one in _samples(situation)}
    return list(found.values())


def _samples(situation: Situation) -> Iterator[Sample]:
    for _, policy in situation.policies():
        for meter in policy.static_meters:
            yield Sample(meter.type, msgspec.json.decode(meter.data))
        for measured in policy.measured:
            data = measured.data()
            if isinstance(data, Measure):
                data = data_of_measure(data)
            yield Sample(measured.type, data)


def types_stated(situation: Situation) -> set[str]:
    """Return every event type that a policy names."""
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
    """Compare the meters of the policies with those of the server."""
    try:
        there = situation.listing.meters()
    except NoAnswer as error:
        yield unanswered("meters", error, "list meters")
        return
    sent = samples(situation)
    if not sent:
        yield ok("meters", "the policy states none")
    for sample in sent:
        counting = [one for one in there if event_type(one) == sample.type]
        if counting:
            yield from (_value(sample, one) for one in counting)
        else:
            yield _missing(sample, there, situation.policy)
    yield _of_handlers()
    stated = types_stated(situation)
    yield from _unfed(
        situation, [one for one in there if event_type(one) not in stated]
    )


def _of_handlers() -> Finding:
    return note(
        "handlers",
        "types that handlers state with set_meters or add_meters are not checked",
    )


def _missing(sample: Sample, there: list[Document], policy: Policy) -> Finding:
    types = sorted({repr(event_type(one)) for one in there})
    has = f"its meters count {', '.join(types)}" if types else "it has no meters"
    taken = {str(one.get("slug")) for one in there}
    command = meter_creation(sample.type, sample.data, taken, policy)
    how = "as this command does" if command else "for what is in its data"
    return Finding(
        _meter_name(sample),
        Severity.FAILURE,
        "no meter on the server counts events of this type, so they are stored and "
        f"never billed; {has}",
        f"create a meter with eventType {sample.type!r}, {how}, or name the type here "
        "as it is called there",
        command,
    )


def _meter_name(sample: Sample) -> str:
    return f"meter {sample.type!r}"


def _value(sample: Sample, counting: Document) -> Finding:
    name = _meter_name(sample)
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
            f"{reads}, which is not in {sample.shown}: it counts nothing",
            "send the property that the meter reads (by meter={'type': ..., 'data': "
            "...} in place of meters), or have the meter read what is sent",
        )
    if isinstance(value, Measure):
        return ok(name, f"{reads}, which the policy measures: {value.text}")
    if how != "UNIQUE_COUNT" and not _is_number(value):
        return failure(
            name,
            f"{reads}, where {value!r} is no number: it counts nothing",
            "send a number there, or have the meter read another property",
        )
    return ok(name, f"{reads}, which the policy sets to {value!r}")


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
    """Tell meters that no policy feeds apart by their usage of the last days."""
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
    return ", ".join(
        f"{one.get('slug')!r} (event type {event_type(one)!r})" for one in meters
    )


_QUESTIONS = "entitlements"
_VISIBILITY = "visibility of usage"


def look_at_features(situation: Situation) -> Iterator[Finding]:
    """Compare the features of the policies with those of the server."""
    needed = _needed(situation)
    policy = situation.policy
    if needed:
        yield from _look_at_questions(policy, needed)
    if policy.entitlement_meters:
        yield from _look_at_visibility(policy)
    try:
        with open_listing(
            policy, policy.entitlements_url, policy.entitlements_key
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
    """Ask about a customer who does not exist, as a request would."""
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


def _look_at_visibility(policy: Policy) -> Iterator[Finding]:
    """Ask for an event that is not there, as is done while a quota is counted down."""
    events = event_list(policy, policy.request_timeout)
    try:
        events.listed([MARK])
    except DeliveryError as error:
        yield warning(
            _VISIBILITY,
            f"OpenMeter is asked for its list of events, and says {_said(error)}: "
            f"usage counts as visible visibility_lag={policy.visibility_lag:g} s after "
            "its delivery, and a quota may be overshot where that takes longer",
            "give entitlements_api_key a key that may list events",
        )
    else:
        yield ok(_VISIBILITY, "the list of events says how far usage is visible")
    finally:
        events.close()


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
        return _missing_feature(name, feature, meters, situation)
    meter = meters.get(str(found.get("meterSlug")))
    if meter is None:
        return ok(name, "there, and not measured by a meter")
    return _quota(name, feature, meter, situation)


def _missing_feature(
    name: str, feature: str, meters: dict[str, Document], situation: Situation
) -> Finding:
    policy = situation.policy
    counted = policy.entitlement_meters.get(feature)
    kind = getattr(counted, "type", None)
    if kind is None and feature in types_stated(situation) and feature not in meters:
        kind = feature
    there = list(meters.values())
    is_told = all(event_type(one) != kind for one in there) and any(
        one.type == kind and one.data is not None for one in samples(situation)
    )
    command = feature_creation(feature, kind, there, policy, is_told=is_told)
    how = ", as this command does," if command else " after its meter,"
    return Finding(
        name,
        Severity.FAILURE,
        "OpenMeter has no feature of this key: it denies every customer",
        f"create the feature {feature!r}{how} or name here what it is called there; "
        "each customer also needs an entitlement to it",
        command,
    )


#: A meter of these grows by each event alone, whatever others say.
_COUNTED_DOWN = ("SUM", "COUNT")


def _quota(name: str, feature: str, meter: Document, situation: Situation) -> Finding:
    """Check that the events of the policies use the quota of a feature."""
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
