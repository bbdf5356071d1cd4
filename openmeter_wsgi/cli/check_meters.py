"""Checks of the meters and features on the server against the policies."""

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
    """The type and the data of an event that a policy sends."""

    type: str
    #: Data with a `Measure` in place of each measured value; None if it is not known.
    data: Any

    @property
    def shown(self) -> str:
        """The data as JSON, with measures as they are written in a file."""
        return json.dumps(self.data, default=lambda measure: measure.text)


def samples(situation: Situation) -> list[Sample]:
    """Return the events that the policies send, without duplicates."""
    by_content = {(one.type, one.shown): one for one in _samples(situation)}
    return list(by_content.values())


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
    text = meter.get("eventType")
    return text if isinstance(text, str) else None


#: A JSON path of plain steps, and one step.
_PATH = re.compile(r"\$(?:\.[\w-]+|\['[^'\\]+'\]|\[\d+\])+")
_STEP = re.compile(r"\.([\w-]+)|\['([^'\\]+)'\]|\[(\d+)\]")
_ABSENT = object()
#: Number of days whose usage is queried for a meter that no policy feeds.
DAYS = 7
#: Maximum number of such meters.
_MAX_QUERIED = 50


def check_meters(situation: Situation) -> Iterator[Finding]:
    """Compare the meters of the policies with those of the server."""
    try:
        meters = situation.listing.meters()
    except NoAnswer as error:
        yield unanswered("meters", error, "list meters")
        return
    sent = samples(situation)
    if not sent:
        yield ok("meters", "the policy has none")
    for sample in sent:
        counting = [meter for meter in meters if event_type(meter) == sample.type]
        if counting:
            yield from (_check_meter(sample, meter) for meter in counting)
        else:
            yield _missing_meter(sample, meters, situation.policy)
    yield note(
        "handlers",
        "types that handlers state with set_meters or add_meters are not checked",
    )
    stated = types_stated(situation)
    yield from _other_meters(
        situation, [meter for meter in meters if event_type(meter) not in stated]
    )


def _missing_meter(sample: Sample, meters: list[Document], policy: Policy) -> Finding:
    types = sorted({repr(event_type(meter)) for meter in meters})
    has = f"its meters count {', '.join(types)}" if types else "it has no meters"
    taken = {str(meter.get("slug")) for meter in meters}
    command = meter_creation(sample.type, sample.data, taken, policy)
    how = "with the command below" if command else "that fits its data"
    return Finding(
        _meter_name(sample),
        Severity.FAILURE,
        "no meter on the server counts events of this type, so they are stored and "
        f"never billed; {has}",
        f"create a meter with eventType {sample.type!r}, {how}, or use a type that a "
        "meter counts",
        command,
    )


def _meter_name(sample: Sample) -> str:
    return f"meter {sample.type!r}"


def _check_meter(sample: Sample, meter: Document) -> Finding:
    """Check that *meter* finds its value in the data of *sample*."""
    name = _meter_name(sample)
    slug, path = meter.get("slug"), meter.get("valueProperty")
    aggregation = meter.get("aggregation")
    reads = f"the meter {slug!r} reads {path}"
    if aggregation == "COUNT" or path is None:
        return ok(name, f"the meter {slug!r} counts its events")
    if sample.data is None:
        return unknown(name, f"{reads}; the data is known only when a request ends")
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        return unknown(name, f"{reads}, a path that check cannot read")
    value = _find(sample.data, path)
    if value is _ABSENT:
        return failure(
            name,
            f"{reads}, which is not in {sample.shown}: it counts nothing",
            "send the property that the meter reads (with meter={'type': ..., 'data': "
            "...} in place of meters), or let the meter read a property that is sent",
        )
    if isinstance(value, Measure):
        return ok(name, f"{reads}, which the policy measures: {value.text}")
    if aggregation != "UNIQUE_COUNT" and not _is_number(value):
        return failure(
            name,
            f"{reads}, where {value!r} is not a number: it counts nothing",
            "send a number there, or let the meter read another property",
        )
    return ok(name, f"{reads}, which the policy sets to {value!r}")


def _find(data: Any, path: str) -> Any:
    for named, quoted, index in _STEP.findall(path):
        try:
            data = data[int(index)] if index else data[named or quoted]
        except (LookupError, TypeError):
            return _ABSENT
    return data


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _other_meters(situation: Situation, meters: list[Document]) -> Iterator[Finding]:
    """Report the meters that no policy feeds, by their usage of the last days."""
    with_usage: list[Document] = []
    without_usage: list[Document] = []
    try:
        for meter in meters[:_MAX_QUERIED]:
            has_usage = _has_usage(situation, meter)
            (with_usage if has_usage else without_usage).append(meter)
    except NoAnswer as error:
        yield unanswered("other meters", error, "query meters")
        return
    if without_usage:
        yield warning(
            "meters without usage",
            f"no policy feeds {_listed(without_usage)}, and nothing else has for "
            f"{DAYS} days",
            "nothing to do if a handler states the type with add_meters or set_meters, "
            "which this command cannot see; otherwise name the type in meters",
        )
    if with_usage:
        names = _listed(with_usage)
        yield ok("other meters", f"fed by handlers or other services: {names}")


def _has_usage(situation: Situation, meter: Document) -> bool:
    today = datetime.datetime.now(datetime.UTC).replace(
        hour=0, minute=0, second=0, microsecond=0
    )
    since = (today - datetime.timedelta(days=DAYS)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return bool(
        situation.listing.usage(str(meter.get("slug")), UsageQuery(since=since))
    )


def _listed(meters: list[Document]) -> str:
    return ", ".join(
        f"{meter.get('slug')!r} (event type {event_type(meter)!r})" for meter in meters
    )


_ENTITLEMENTS = "entitlements"
_VISIBILITY = "visibility of usage"


def check_features(situation: Situation) -> Iterator[Finding]:
    """Compare the features of the policies with those of the server."""
    needed = _needed(situation)
    policy = situation.policy
    if needed:
        yield from _check_access(policy, needed)
    if policy.entitlement_meters:
        yield from _check_visibility(policy)
    try:
        with open_listing(
            policy, policy.entitlements_url, policy.entitlements_key
        ) as listing:
            features = listing.features()
            meters = {str(meter.get("slug")): meter for meter in listing.meters()}
    except NoAnswer as error:
        if needed:
            yield unanswered("features", error, "list features")
        return
    by_key = {str(feature.get("key")): feature for feature in features}
    keys = {str(feature.get("id")): str(feature.get("key")) for feature in features}
    for name in needed:
        if name not in by_key and (key := keys.get(name)):
            yield _id_for_key(name, key)
        else:
            yield _check_feature(name, by_key.get(name), meters, situation)
    if others := sorted(map(repr, by_key.keys() - {*needed})):
        yield ok("other features", f"required by no policy: {', '.join(others)}")


def _needed(situation: Situation) -> list[str]:
    required = [
        feature
        for _, policy in situation.policies()
        for feature in (*policy.required_entitlements, *policy.entitlement_meters)
    ]
    return list(dict.fromkeys(required))


def _check_access(policy: Policy, features: list[str]) -> Iterator[Finding]:
    """Ask for the access of a customer who does not exist, as a request would."""
    url = policy.entitlements_url or policy.api_url
    client = question_client(policy, policy.request_timeout)
    try:
        client.probe(features)
    except DeliveryError as error:
        yield failure(
            _ENTITLEMENTS,
            f"{url} is asked for the access of a customer: {_answer(error)}",
            "give entitlements_api_key a key that may query entitlements, and "
            "entitlements_url the address of a server that answers",
        )
    else:
        yield from _check_lookups(client, url)
    finally:
        client.close()


def _check_visibility(policy: Policy) -> Iterator[Finding]:
    """Ask for an event that does not exist, as the countdown of a quota does."""
    events = event_list(policy, policy.request_timeout)
    try:
        events.listed([MARK])
    except DeliveryError as error:
        yield warning(
            _VISIBILITY,
            f"OpenMeter is asked for its list of events: {_answer(error)}; "
            f"usage counts as visible visibility_lag={policy.visibility_lag:g} s after "
            "its delivery, and a quota may be overshot if that takes longer",
            "give entitlements_api_key a key that may list events",
        )
    else:
        yield ok(_VISIBILITY, "the list of events shows up to when usage is visible")
    finally:
        events.close()


def _check_lookups(client: EntitlementClient, url: str) -> Iterator[Finding]:
    """Ask for the customer of a subject that is not the key of a customer."""
    try:
        if client.can_look_up(MARK):
            client.lookup(MARK, 1)
    except DeliveryError as error:
        yield failure(
            _ENTITLEMENTS,
            f"{url} is asked for the customer of a subject: {_answer(error)}; "
            "fail_mode decides on each subject that is not the key of a customer",
            "give entitlements_api_key a key that may list customers",
        )
    else:
        yield ok(_ENTITLEMENTS, f"{url} answers questions about access")


def _answer(error: DeliveryError) -> str:
    answer = "no answer" if error.status is None else f"it answers {error.status}"
    return f"{answer}: {error.reason}"


def _id_for_key(feature: str, key: str) -> Finding:
    return failure(
        _feature_name(feature),
        "this is the id of a feature, not its key: OpenMeter denies every customer",
        f"write {key!r}",
    )


def _check_feature(
    feature: str,
    found: Document | None,
    meters: dict[str, Document],
    situation: Situation,
) -> Finding:
    name = _feature_name(feature)
    if found is None:
        return _missing_feature(name, feature, meters, situation)
    meter = meters.get(str(found.get("meterSlug")))
    if meter is None:
        return ok(name, "it exists, without a meter")
    return _check_quota(name, feature, meter, situation)


def _missing_feature(
    name: str, feature: str, meters: dict[str, Document], situation: Situation
) -> Finding:
    policy = situation.policy
    counted = policy.entitlement_meters.get(feature)
    kind = getattr(counted, "type", None)
    if kind is None and feature in types_stated(situation) and feature not in meters:
        kind = feature
    on_server = list(meters.values())
    # True if the finding of the missing meter has a command that creates it.
    is_meter_created = all(event_type(meter) != kind for meter in on_server) and any(
        sample.type == kind and sample.data is not None for sample in samples(situation)
    )
    command = feature_creation(
        feature, kind, on_server, policy, is_meter_created=is_meter_created
    )
    how = " with the command below" if command else " after its meter,"
    return Finding(
        name,
        Severity.FAILURE,
        "OpenMeter has no feature of this key: it denies every customer",
        f"create the feature {feature!r}{how} or use the key of an existing one; "
        "each customer also needs an entitlement to it",
        command,
    )


#: Aggregations whose value grows by each event, independent of other events.
_COUNTED_DOWN = ("SUM", "COUNT")


def _check_quota(
    name: str, feature: str, meter: Document, situation: Situation
) -> Finding:
    """Check that the events of the policies use up the quota of a feature."""
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
            f"its meter {meter.get('slug')!r} is of {meter.get('aggregation')}: the "
            "usage of a request cannot be counted down",
            "leave it out of entitlement_meters, or use a meter of SUM or COUNT",
        )
    if kind not in types_stated(situation):
        return warning(
            name,
            f"its meter {meter.get('slug')!r} counts {kind!r}, which no policy sends: "
            "its quota is never used up",
            f"add {kind!r} to meters, unless handlers or another service send it",
        )
    return ok(name, f"it exists; {kind!r} uses up its quota")


def _feature_name(feature: str) -> str:
    return f"feature {feature!r}"
