"""Balances as time goes on: periods, resets, expiry, and usage that is not seen yet."""

from datetime import UTC, datetime

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from openmeter_wsgi.sandbox import Sandbox
from openmeter_wsgi.sandbox.balance import Recurrence, parse_interval
from openmeter_wsgi.sandbox.request_validation import rfc3339
from test_sandbox_support import Api, event

PATH = "/api/v2/customers/acme/entitlements/calls"
HOUR = 3600


class Clock:
    """A clock that only a test moves."""

    def __init__(self, text: str = "2026-03-10T12:00:00Z") -> None:
        self.now = datetime.fromisoformat(text).timestamp()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sandbox(clock):
    with Sandbox(clock=clock) as sandbox:
        yield sandbox


@pytest.fixture
def api(sandbox):
    with Api(sandbox.url) as api:
        api.meter("calls", "SUM", "$.n")
        yield api


def entitle(api, **asked):
    api.post("/api/v1/customers", json={"name": "A", "key": "acme"})
    feature = {"key": "calls", "name": "C", "meterSlug": "calls"}
    api.post("/api/v1/features", json=feature)
    asked = {"type": "metered", "featureKey": "calls"} | asked
    asked = {"usagePeriod": {"interval": "DAY"}} | asked
    answer = api.post("/api/v2/customers/acme/entitlements", json=asked)
    assert answer.status_code == 201, answer.text
    return answer.json()


def use(api, amount, **changes):
    use.number += 1
    made = event(use.number, subject="acme", data={"n": amount}, time=..., **changes)
    assert api.ingest(made).status_code == 204


use.number = 0


def value(api, **parameters):
    answer = api.get(f"{PATH}/value", params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def balance(api):
    found = value(api)
    return found["balance"], found["usage"], found["overage"]


def test_usage_becomes_visible_some_seconds_after_it_was_received(clock):
    with Sandbox(clock=clock, visible_after=3.0) as sandbox, Api(sandbox.url) as api:
        api.meter("calls", "SUM", "$.n")
        entitle(api, issueAfterReset=10)
        use(api, 4)
        # The time of an event does not matter, only its arrival.
        clock.now += 2
        old = rfc3339(clock.now - 60 * 10)
        api.ingest(event("late", subject="acme", data={"n": 1}, time=old))

        seen = []
        for step in (0, 0.9, 0.2, 1.8, 0.2):
            clock.now += step
            usage = value(api)["usage"]
            assert (api.value("calls") or 0) - usage in (0, 1)
            seen.append((round(clock.now % 60, 1), usage, api.value("calls")))

        assert seen == [
            (2, 0, None), (2.9, 0, None), (3.1, 4, 4), (4.9, 4, 4), (5.1, 4, 5),
        ]  # fmt: skip


def test_the_lag_can_be_changed_while_the_sandbox_runs(sandbox, api, clock):
    def look():
        seen.append((balance(api)[1], api.value("calls"), len(api.events())))

    seen = []
    entitle(api, issueAfterReset=10)
    use(api, 4)
    sandbox.store.visible_after = 60.0  # visible usage stays visible
    look()
    use(api, 1)
    look()
    clock.now += 30
    sandbox.store.visible_after = 29.0  # the waiting usage follows at once
    look()
    sandbox.store.visible_after = 120.0
    use(api, 2)
    look()
    clock.now += 119
    look()
    clock.now += 1
    look()

    assert seen == [
        (4, 4, 1), (4, 4, 1), (5, 5, 2), (5, 5, 2), (5, 5, 2), (7, 7, 3),
    ]  # fmt: skip


def test_a_shorter_lag_overtakes_nothing(sandbox, api, clock):
    api.put("/sandbox/api/visibility", json={"visibleAfter": 60})
    use(api, 1)
    clock.now += 10
    api.put("/sandbox/api/visibility", json={"visibleAfter": 5})
    use(api, 1)
    stored = [listed["storedAt"][-6:] for listed in api.events()]
    clock.now += 5
    stored += [listed["storedAt"][-6:] for listed in api.events()]

    assert stored == ["00:10Z", "00:15Z", "00:10Z"]


def test_the_last_minute_of_a_period_is_answered_for_the_next(api, clock):
    entitle(api, issueAfterReset=5, usagePeriod={"interval": "PT1H"})
    use(api, 5)
    clock.now += HOUR - 61
    before = balance(api)
    clock.now += 1
    use(api, 2)
    answers = [before, balance(api)]
    clock.now += 60
    answers.append(balance(api))

    assert answers == [(0, 5, 0), (5, 0, 0), (5, 0, 0)]


def test_a_new_period_grants_anew_and_forgets_what_was_overdrawn(api, clock):
    entitle(api, issueAfterReset=10)
    use(api, 15)
    over = balance(api)
    clock.now += 24 * HOUR

    assert over == (0, 15, 5)
    assert balance(api) == (10, 0, 0)
    use(api, 1)
    assert balance(api) == (9, 1, 0)


def test_overage_is_owed_in_the_next_period_where_it_is_preserved(api, clock):
    entitle(api, issueAfterReset=10, preserveOverageAtReset=True)
    use(api, 13)
    clock.now += 24 * HOUR

    assert balance(api) == (7, 0, 0)
    use(api, 8)
    assert balance(api) == (0, 8, 1)


def test_a_reset_overrides_whether_overage_is_preserved(api, clock):
    entitle(api, issueAfterReset=10)
    use(api, 13)
    clock.now += 120

    api.post(f"{PATH}/reset", json={"preserveOverage": True})

    assert balance(api) == (7, 0, 0)


def test_a_grant_made_by_hand_rolls_over_with_what_is_left_of_it(api, clock):
    entitle(api)
    now = rfc3339(clock.now)
    for more in ({}, {"minRolloverAmount": 4}, {"maxRolloverAmount": 1}):
        grant = {"amount": 10, "effectiveAt": now} | more
        assert api.post(f"{PATH}/grants", json=grant).status_code == 201
    use(api, 18)
    clock.now += 24 * HOUR

    # Nothing is left of the first; of the second 2, but 4 at least; the third is cut.
    assert sorted(value(api)["grantBalances"].values()) == [0, 1, 4]


def test_a_grant_expires_and_a_recurring_one_is_renewed(api, clock):
    entitle(api, usagePeriod={"interval": "MONTH"})
    grant = {"amount": 10, "effectiveAt": rfc3339(clock.now)}
    expiring = grant | {"expiration": {"duration": "HOUR", "count": 2}}
    api.post(f"{PATH}/grants", json=expiring)
    recurring = grant | {"amount": 3, "recurrence": {"interval": "PT1H"}, "priority": 9}
    answer = api.post(f"{PATH}/grants", json=recurring).json()
    assert answer["nextRecurrence"] == rfc3339(clock.now + HOUR)
    use(api, 12)

    seen = [balance(api)]
    for _ in range(2):
        clock.now += HOUR
        seen.append(balance(api))
    use(api, 1)

    assert seen == [(1, 12, 0), (3, 12, 0), (3, 12, 0)]
    assert balance(api) == (2, 13, 0)
    # The used part of an expired grant still counts as granted.
    assert value(api)["totalAvailableGrantAmount"] == 15


def test_a_grant_of_the_future_counts_from_then_on_and_covers_what_was_owed(api, clock):
    entitle(api)
    use(api, 4)
    later = {"amount": 10, "effectiveAt": rfc3339(clock.now + HOUR)}
    api.post(f"{PATH}/grants", json=later)

    assert balance(api) == (0, 4, 4)
    clock.now += HOUR
    assert balance(api) == (6, 4, 0)


def test_a_reset_begins_a_period_and_moves_the_anchor_unless_it_is_retained(api, clock):
    entitle(api, issueAfterReset=10)
    first = api.get(PATH).json()["currentUsagePeriod"]
    use(api, 4)
    clock.now += 5 * HOUR

    assert api.post(f"{PATH}/reset", json={"retainAnchor": True}).status_code == 204
    assert balance(api) == (10, 0, 0)
    retained = api.get(PATH).json()["currentUsagePeriod"]
    clock.now += HOUR
    assert api.post(f"{PATH}/reset", json={}).status_code == 204
    moved = api.get(PATH).json()

    assert first == {"from": "2026-03-10T12:00:00Z", "to": "2026-03-11T12:00:00Z"}
    assert retained == {"from": "2026-03-10T17:00:00Z", "to": "2026-03-11T12:00:00Z"}
    assert moved["currentUsagePeriod"] == {
        "from": "2026-03-10T18:00:00Z", "to": "2026-03-11T18:00:00Z",
    }  # fmt: skip
    assert moved["lastReset"] == "2026-03-10T18:00:00Z"
    # Usage from before the reset that arrives after it belongs to the old period.
    old = "2026-03-10T17:59:00Z"
    api.ingest(event("late", subject="acme", data={"n": 1}, time=old))
    assert balance(api) == (10, 0, 0)


def test_the_api_knows_minutes(api, clock):
    clock.now += 30
    entitle(api, issueAfterReset=10)
    early = rfc3339(clock.now - 20)
    api.ingest(event("early", subject="acme", data={"n": 1}, time=early))

    assert api.get(PATH).json()["measureUsageFrom"] == "2026-03-10T12:00:00Z"
    assert balance(api) == (9, 1, 0)
    assert api.post(f"{PATH}/reset", json={}).status_code == 400
    clock.now += 60
    use(api, 2)
    assert api.post(f"{PATH}/reset", json={}).status_code == 204
    # The reset is dated to the start of its minute, whose usage stays.
    assert balance(api) == (8, 2, 0)


def test_events_of_the_future_count_when_their_minute_comes(api, clock):
    entitle(api, issueAfterReset=10)
    soon = rfc3339(clock.now + 90)
    api.ingest(event("soon", subject="acme", data={"n": 1}, time=soon))

    assert balance(api) == (10, 0, 0)
    clock.now += 60
    assert balance(api) == (9, 1, 0)


@pytest.mark.parametrize(
    ("asked", "usage"),
    [("NOW", 1), ("CURRENT_PERIOD_START", 3), ("2026-03-10T11:00:00Z", 3),
     ("2026-03-01T00:00:00Z", 3), (None, 1)],
)  # fmt: skip
def test_usage_is_measured_from_where_it_was_asked_to_be(api, clock, asked, usage):
    old = rfc3339(clock.now - HOUR)
    api.ingest(event("old", subject="acme", data={"n": 2}, time=old))
    period = {"interval": "MONTH", "anchor": "2020-01-01T00:00:00Z"}
    chosen = {"measureUsageFrom": asked} if asked else {}

    entitle(api, usagePeriod=period, **chosen)
    use(api, 1)

    assert value(api)["usage"] == usage


@pytest.mark.parametrize(
    ("interval", "shown"),
    [("DAY", ("DAY", "P1D")), ("P1D", ("DAY", "P1D")), ("WEEK", ("WEEK", "P1W")),
     ("P1Y", ("YEAR", "P1Y")), ("PT36H", ("PT36H", "PT36H"))],
)  # fmt: skip
def test_the_interval_is_shown_by_name_and_as_a_duration(api, interval, shown):
    period = entitle(api, usagePeriod={"interval": interval})["usagePeriod"]

    assert (period["interval"], period["intervalISO"]) == shown


def seconds(text):
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


@pytest.mark.parametrize(
    ("anchor", "interval", "moment", "start", "end"),
    [
        ("2026-01-31", "MONTH", "2026-02-10", "2026-01-31", "2026-02-28"),
        ("2026-01-31", "MONTH", "2026-03-30", "2026-02-28", "2026-03-31"),
        ("2024-02-29", "YEAR", "2027-03-01", "2027-02-28", "2028-02-29"),
        ("2026-01-01", "P1M1D", "2026-02-03", "2026-02-02", "2026-03-03"),
        ("2026-01-10", "WEEK", "2025-12-31", "2025-12-27", "2026-01-03"),
    ],
)
def test_periods_follow_the_calendar(anchor, interval, moment, start, end):
    recurrence = Recurrence(seconds(anchor), parse_interval(interval))

    found = recurrence.start(seconds(moment)), recurrence.end(seconds(moment))

    assert found == (seconds(start), seconds(end))


@given(
    anchor=st.integers(0, 4 * 10**9),
    moment=st.integers(0, 4 * 10**9),
    interval=st.sampled_from(["DAY", "WEEK", "MONTH", "YEAR", "PT1H", "P3M2DT5M"]),
)
@settings(deadline=None)
def test_every_moment_lies_in_exactly_one_period(anchor, moment, interval):
    recurrence = Recurrence(anchor, parse_interval(interval))

    start, end = recurrence.start(moment), recurrence.end(moment)

    assert start <= moment < end
    assert recurrence.start(end) == end
    assert recurrence.end(start) == end
    assert recurrence.start(start - 1) < start
    assert recurrence.between(start, end) == [end]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.integers(0, 20)),
        st.tuples(st.just("grant"), st.integers(1, 20)),
        st.tuples(st.just("reset"), st.just(0)),
        st.tuples(st.just("wait"), st.integers(0, 40 * HOUR)),
    ),
    max_size=12,
)


def left_over(steps, amount, soft):
    """The balance, by the definition: grants less usage since the last reset.

    What was granted by hand stays until it is used up, what recurs does not.
    """
    recurring, extra, used, owed, clock = amount, [], 0, 0, 0
    for step, number in steps:
        before = clock
        clock += number if step == "wait" else 0
        if step == "reset" or clock // (24 * HOUR) > before // (24 * HOUR):
            recurring, used, owed = amount, 0, 0
        if step == "use":
            used, owed = used + number, owed + number
        if step == "grant":
            extra.append(number)
        pots = [recurring, *extra]
        for index, pot in enumerate(pots):
            pots[index], owed = pot - min(pot, owed), owed - min(pot, owed)
        recurring, *extra = pots
    left = recurring + sum(extra)
    return {
        "hasAccess": soft or left > 0, "balance": left, "usage": used, "overage": owed,
    }  # fmt: skip


@given(steps=STEPS, amount=st.integers(0, 30), soft=st.booleans())
@example(  # granted and reset within the second at which grants of a minute begin
    steps=[("use", 1), ("wait", 8_220), ("grant", 1), ("reset", 0)],
    amount=0,
    soft=False,
)
@settings(deadline=None, max_examples=40)
def test_the_balance_is_what_was_granted_less_what_was_used(steps, amount, soft):
    clock = Clock()
    start = clock.now
    with Sandbox(clock=clock) as sandbox, Api(sandbox.url) as api:
        api.meter("calls", "SUM", "$.n")
        sandbox.grant("acme", "calls", amount, soft=soft, period="DAY")
        for done, (step, number) in enumerate(steps, 1):
            if step == "use":
                use(api, number)
            elif step == "grant":
                sandbox.grant("acme", "calls", number, soft=soft, period="DAY")
            elif step == "reset":
                sandbox.reset("acme", "calls")
            else:
                clock.now += number
                # In the last minute of a period the answer is that of the next one.
                assume((clock.now - start) % (24 * HOUR) < 24 * HOUR - 60)
            found = sandbox.value("acme", "calls")
            expected = left_over(steps[:done], amount, soft)
            assert {name: found[name] for name in expected} == expected
            assert found["balance"] >= 0
            assert sum(found["grantBalances"].values()) == found["balance"]
