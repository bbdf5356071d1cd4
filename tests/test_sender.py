import json
import logging
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmeter_server import Answer, problem
from openmeter_wsgi.delivery.batch import ListedBatch
from openmeter_wsgi.delivery.client import OpenMeterClient
from openmeter_wsgi.delivery.sender import (
    MAX_DELAY,
    MAX_SERVER_ERRORS,
    Sender,
)
from openmeter_wsgi.errors import Deposed, Misconfigured, Rejected, Unavailable
from openmeter_wsgi.options import ApiKey
from openmeter_wsgi.stats import Counts

NO_ANSWER = Unavailable("no answer", ambiguous=True)
BUSY = Unavailable("busy", status=503)
BROKEN = Unavailable("broken", status=500, ambiguous=True)
NO_GATEWAY = Unavailable("no gateway", status=502, ambiguous=True)
TOO_MANY = Unavailable("slow down", status=429, retry_after=7.0)
WRONG_KEY = Misconfigured("wrong key", status=401)
INVALID = Rejected("invalid", status=400)
TOO_LARGE = Rejected("too large", status=413)


class ScriptedClient:
    """Client that follows a script, then accepts all events that are not poisonous."""

    def __init__(self, script=(), poison=()):
        self.script = list(script)
        self.poison = set(poison)
        self.tried = []
        self.accepted = []

    def ingest(self, events):
        self.tried.append(list(events))
        error = self.script.pop(0) if self.script else None
        if error is None and self.poison.intersection(events):
            error = INVALID
        if error is not None:
            raise error
        self.accepted += events


class Case:
    """A sender, its collaborators, and the outcomes of the events."""

    def __init__(self, client, jitter=lambda _, most: most):
        self.client = client
        self.counts = Counts()
        self.done = []
        self.sender = Sender(client, self.counts, self.done.extend, jitter)

    def load(self, *batches):
        for batch in batches:
            self.sender.load(ListedBatch(batch))

    def run(self, attempts=100_000):
        """Attempt until nothing is left to try; return the waits."""
        delays = []
        while self.sender.busy:
            assert len(delays) < attempts
            delays.append(self.sender.attempt())
        return delays


def named(*names):
    return [name.encode() for name in names]


def numbered(count, start=0):
    return [b"event-%d" % n for n in range(start, start + count)]


def test_pauses_take_nothing_of_the_applications_random_numbers():
    before = random.getstate()
    sender = Sender(ScriptedClient([BUSY]), Counts(), lambda events: None)
    sender.load(ListedBatch(named("a")))

    assert sender.attempt() >= 0

    assert random.getstate() == before


# -- Failures that concern every event


@pytest.mark.parametrize("error", [NO_ANSWER, BUSY, NO_GATEWAY, TOO_MANY, WRONG_KEY])
def test_the_failing_batch_stays_at_the_head(error):
    case = Case(ScriptedClient([error] * 5))
    case.load(named("a", "b"), named("c"))

    case.run()

    assert case.client.tried == [named("a", "b")] * 6 + [named("c")]
    assert case.done == named("a", "b", "c")
    assert case.counts.delivered == 3
    assert case.counts.retries == 5
    assert case.counts.ambiguous == (5 if error.ambiguous else 0)


def test_the_wait_doubles_up_to_half_a_minute():
    case = Case(ScriptedClient([NO_ANSWER] * 9))
    case.load(named("a"))

    assert case.run() == [1, 2, 4, 8, 16, 30, 30, 30, 30, 0]


def test_the_wait_is_drawn_from_nothing_up_to_it():
    case = Case(ScriptedClient([NO_ANSWER] * 4), jitter=lambda least, _: least)
    case.load(named("a"))

    assert case.run() == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("asked", [31.0, 3600.0])
def test_the_server_may_ask_for_a_longer_wait(asked):
    error = Unavailable("later", status=503, retry_after=asked)
    case = Case(ScriptedClient([error, BUSY]))
    case.load(named("a"))

    assert case.run() == [asked, 2, 0]


def test_a_server_that_asks_for_no_wait_is_not_hammered():
    error = Unavailable("at once", status=503, retry_after=0.0)
    case = Case(ScriptedClient([error] * 4))
    case.load(named("a"))

    assert case.run() == [1, 2, 4, 8, 0]


def test_a_very_long_outage_does_not_overflow_the_wait():
    case = Case(ScriptedClient([NO_ANSWER] * 5_000))
    case.load(named("a"))

    assert max(case.run()) == MAX_DELAY


def test_an_attempt_that_broke_off_waits_as_well():
    case = Case(ScriptedClient())
    case.load(named("a"))

    waits = [case.sender.note_broken_attempt(ValueError("no")) for _ in range(3)]
    assert waits == [1, 2, 4]
    assert "broke off" in case.sender.outage.problem.text
    case.run()
    assert case.done == named("a")
    assert case.sender.outage.problem is None


@pytest.mark.parametrize(
    ("error", "level"), [(WRONG_KEY, logging.ERROR), (BUSY, logging.WARNING)]
)
def test_a_failure_is_said_with_its_reason(caplog, error, level):
    case = Case(ScriptedClient([error]))
    case.load(named("a"))

    case.run()

    (record,) = caplog.records
    assert record.levelno == level
    assert str(error.status) in record.getMessage()
    assert error.reason in record.getMessage()


# -- Refusals


@pytest.mark.parametrize("position", [0, 1, 49, 50, 98, 99])
def test_one_event_of_a_hundred_is_found_and_buried(caplog, position):
    events = numbered(100)
    poison = events[position]
    case = Case(ScriptedClient(poison=[poison]))
    case.load(events)

    delays = case.run()

    others = [event for event in events if event != poison]
    assert case.client.accepted == others
    assert Counter(case.done) == Counter(events)
    assert case.counts.delivered == 99
    assert case.counts.dead_lettered == 1
    assert not case.sender.has_suspects
    assert len(delays) <= 2 * 7 + 3
    (record,) = caplog.records
    assert poison.decode() in record.getMessage()
    assert "400: invalid" in record.getMessage()


def test_a_refusal_as_part_of_a_batch_counts_only_with_the_same_status():
    case = Case(ScriptedClient([TOO_LARGE, None, INVALID]))
    case.load(named("a", "b"), named("c"))

    case.run()

    assert case.client.accepted == named("a", "c", "b")
    assert case.counts.dead_lettered == 0


def test_a_batch_that_is_too_large_is_delivered_in_pieces_and_in_order():
    class SmallServer(ScriptedClient):
        def ingest(self, events):
            self.tried.append(list(events))
            if len(events) > 3:
                raise TOO_LARGE
            self.accepted += events

    events = numbered(100)
    case = Case(SmallServer())
    case.load(events)

    case.run()

    assert case.client.accepted == events
    assert case.counts.dead_lettered == 0


def test_nothing_is_buried_while_everything_is_refused(caplog):
    events = numbered(6)
    case = Case(ScriptedClient([INVALID] * 1_000, poison=[events[2]]))
    case.load(events[:4], events[4:])

    for _ in range(5):
        case.run()
        case.sender.retry_suspects()
    case.run()

    assert case.done == []
    assert case.sender.has_suspects
    assert "proxy" in caplog.text

    case.client.script.clear()
    case.sender.retry_suspects()
    case.run()
    assert Counter(case.done) == Counter(events)
    assert Counter(case.client.accepted) == Counter(events) - Counter([events[2]])
    assert case.counts.dead_lettered == 1


def test_refusals_of_everything_wait_longer_and_longer():
    case = Case(ScriptedClient([INVALID] * 1_000))
    case.load(named("a"), named("b"), named("c"), named("d"), named("e"), named("f"))

    assert case.run() == [0, 2, 4, 8, 16, 30]


def test_refusals_between_deliveries_cost_no_wait(caplog):
    case = Case(ScriptedClient(poison=named("a", "c", "e")))
    case.load(named("a"), named("b"), named("c"), named("d"), named("e"))

    assert set(case.run()) == {0}
    assert "proxy" not in caplog.text


def test_one_refused_event_is_not_reported_as_a_refusal_of_every_event():
    case = Case(ScriptedClient([INVALID] * 2))
    case.load(named("a"))
    case.run()
    assert case.sender.outage.problem.code == "unavailable"

    case.sender.retry_suspects()
    case.run()
    assert case.sender.outage.problem.code == "refused"


def test_an_event_refused_alone_waits_for_another_one_to_be_accepted():
    case = Case(ScriptedClient(poison=named("bad")))
    case.load(named("bad"))
    case.run()
    assert case.done == []
    assert case.sender.has_suspects

    case.load(named("good"))
    case.run()

    assert case.done == named("good", "bad")
    assert case.counts.dead_lettered == 1
    assert case.client.tried == [named("bad"), named("good"), named("bad")]


def test_an_event_that_was_refused_by_mistake_is_delivered():
    case = Case(ScriptedClient([INVALID]))
    case.load(named("a"), named("b"))

    case.run()

    assert case.client.accepted == named("b", "a")
    assert case.counts.dead_lettered == 0


def test_a_suspect_is_not_buried_for_what_was_accepted_before_it_was_one():
    case = Case(ScriptedClient(poison=named("bad")))
    case.load(named("good"), named("bad"))
    case.run()
    assert case.counts.dead_lettered == 0

    case.sender.retry_suspects()
    case.run()

    assert case.counts.dead_lettered == 0
    assert case.sender.has_suspects


def test_of_a_long_event_the_log_names_subject_and_id(caplog):
    long = json.dumps(
        {"data": {"text": "x" * 100_000}, "subject": "alice", "id": "the-id"}
    ).encode()
    longer = long.replace(b"the-id", b"another-id")
    case = Case(ScriptedClient(poison=[long, longer]))
    case.load([long, longer, b"good"])

    case.run()

    messages = [r.getMessage() for r in caplog.records if "for good" in r.msg]
    assert len(messages) == 2
    assert all("alice" in message for message in messages)
    assert "the-id" in messages[0]
    assert "another-id" in messages[1]
    assert len(caplog.text) < 20_000


# -- The tenth server error


def poisoned(poison, error):
    class Server(ScriptedClient):
        def ingest(self, events):
            self.tried.append(list(events))
            if poison.intersection(events):
                raise error
            self.accepted += events

    return Server()


def test_the_tenth_server_error_in_a_row_splits_the_batch():
    events = numbered(4)
    case = Case(poisoned({events[3]}, NO_GATEWAY))
    case.load(events)

    case.run()

    tried = case.client.tried
    assert tried[:MAX_SERVER_ERRORS] == [events] * MAX_SERVER_ERRORS
    assert tried[MAX_SERVER_ERRORS] == events[:2]
    assert case.client.accepted == events[:3]


def test_the_parts_of_a_batch_that_was_split_in_an_outage_wait_as_long_as_it_did():
    case = Case(ScriptedClient([NO_GATEWAY] * 2 * MAX_SERVER_ERRORS))
    case.load(numbered(4))

    delays = case.run()

    in_outage = delays[: 2 * MAX_SERVER_ERRORS]
    assert [delay for delay in in_outage[6:] if delay] == [MAX_DELAY] * 12


@pytest.mark.parametrize("other", [NO_ANSWER, TOO_MANY, WRONG_KEY])
def test_any_other_answer_begins_the_count_anew(other):
    script = [NO_GATEWAY] * 9 + [other] + [NO_GATEWAY] * 9
    case = Case(ScriptedClient(script))
    case.load(numbered(4))

    case.run()

    assert case.client.tried == [numbered(4)] * 20


# -- Answers with 500


@pytest.mark.parametrize("position", [0, 1, 63, 126, 127])
def test_a_500_for_one_event_delays_no_other(position):
    events = numbered(128)
    evil = events[position]
    case = Case(poisoned({evil}, BROKEN))
    case.load(events)

    delays = case.run()

    assert Counter(case.done) == Counter(events) - Counter([evil])
    assert case.sender.has_suspects
    # The first answer, and that to the first event alone: all others follow at once.
    assert sum(delays) <= 1 + 2
    assert len(delays) <= 3 * 7 + 2


def test_two_events_that_get_a_500_delay_the_others_by_a_few_attempts():
    events = numbered(128)
    case = Case(poisoned({events[0], events[90]}, BROKEN))
    case.load(events)

    delays = case.run()

    left = Counter([events[0], events[90]])
    assert Counter(case.done) == Counter(events) - left
    assert case.sender.has_suspects
    assert case.counts.dead_lettered == 0
    assert len(delays) <= 2 * MAX_SERVER_ERRORS + 2 * 8 + 8


def test_in_an_outage_that_is_told_by_500_two_parts_of_the_batch_are_tried_in_turn():
    events = numbered(4)
    case = Case(ScriptedClient([BROKEN] * 6))
    case.load(events, named("behind"))

    delays = case.run()

    one, others = events[:1], events[1:]
    assert case.client.tried[:7] == [events, *[one, others] * 3]
    assert case.client.tried[7:] == [one, named("behind")]
    assert Counter(case.done) == Counter([*events, *named("behind")])
    assert delays[:6] == [1, 2, 2, 4, 4, 8]


def test_what_gets_a_500_alone_is_buried_after_ten_others_were_accepted_in_between():
    evil = b"evil"
    case = Case(poisoned({evil}, BROKEN))
    case.load([evil, b"good"])
    case.run()

    for n in range(MAX_SERVER_ERRORS):
        assert case.counts.dead_lettered == 0
        assert case.sender.has_suspects
        case.sender.retry_suspects()  # as after a pause: no other was accepted since
        case.run()
        case.load(numbered(1, n))
        assert case.run() == [0] * 2

    assert case.counts.dead_lettered == 1
    assert not case.sender.has_suspects
    assert case.counts.delivered == MAX_SERVER_ERRORS + 1


@given(st.lists(st.integers(0, MAX_SERVER_ERRORS - 1), min_size=1, max_size=12))
def test_an_event_with_fewer_500s_than_ten_is_never_buried(failures):
    """Kafka's queue may be full at this moment, and have room at the next."""
    left = dict(zip(numbered(len(failures)), failures, strict=True))

    class Server(ScriptedClient):
        def ingest(self, events):
            for event in events:
                if left[event]:
                    left[event] -= 1
                    raise BROKEN
            self.accepted += events

    case = Case(Server())
    case.load(list(left))
    case.run()
    for _ in range(MAX_SERVER_ERRORS):
        case.sender.retry_suspects()
        case.run()

    assert case.counts.dead_lettered == 0
    assert Counter(case.done) == Counter(case.client.accepted) == Counter(list(left))


def test_an_event_that_breaks_the_server_is_buried_once_others_are_accepted(
    openmeter, caplog
):
    """With a real client and a real server."""
    subjects = ["a", "b", "c", "evil", "e", "f", "g", "h"]
    openmeter.rule = lambda r: problem(500) if "evil" in r.subjects else None
    client = OpenMeterClient(
        url=openmeter.url,
        flavor="v1",
        key=ApiKey.from_options(None, None),
        timeout=40,
    )
    case = Case(client, jitter=lambda least, _: least)
    case.load([json.dumps({"id": s, "subject": s}).encode() for s in subjects])

    delays = case.run()
    held = [r for r in openmeter.requests if "evil" in r.ids]
    for n in range(MAX_SERVER_ERRORS):
        case.load([json.dumps({"id": f"{n}", "subject": "x"}).encode()])
        case.run()
    client.close()

    assert set(delays) == {0}
    assert openmeter.ids[:7] == ["a", "b", "c", "e", "f", "g", "h"]
    assert len(openmeter.ids) == 7 + MAX_SERVER_ERRORS
    assert not openmeter.duplicates
    # Whole, without the first, in halves, alone, and once more after the others.
    assert [len(r.ids) for r in held] == [8, 7, 3, 2, 1, 1]
    assert case.counts.dead_lettered == 1
    assert '"id": "evil"' in caplog.text
    assert "500: Internal Server Error" in caplog.text


# -- Arbitrary answers

ERRORS = st.sampled_from(
    [None, NO_ANSWER, BUSY, BROKEN, TOO_MANY, WRONG_KEY, INVALID, TOO_LARGE]
)
PASSING = st.sampled_from([NO_ANSWER, TOO_MANY, WRONG_KEY, BUSY])
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def batches(sizes):
    start = 0
    for size in sizes:
        yield numbered(size, start)
        start += size


def check_head_is_kept(client, answers):
    """Nothing behind a failing head is tried, unless it gets a 500, or fails often."""
    in_a_row = 0
    for tried, following, error in zip(
        client.tried, client.tried[1:], answers, strict=False
    ):
        if error is None or isinstance(error, Rejected):
            in_a_row = 0
            continue
        in_a_row += error.status is not None and error.status >= 500
        if error is not BROKEN and in_a_row < MAX_SERVER_ERRORS:
            assert following == tried


@given(SIZES, st.lists(ERRORS, max_size=60), st.sets(st.integers(0, 44)))
@settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_event_is_ever_lost_or_doubled(sizes, script, poison):
    events = numbered(sum(sizes))
    client = ScriptedClient(script, poison=[b"event-%d" % n for n in poison])
    case = Case(client)
    case.load(*batches(sizes))

    delays = case.run()

    accepted, done = Counter(client.accepted), Counter(case.done)
    buried = done - accepted
    pending = Counter(events) - done
    assert max(accepted.values(), default=1) == 1
    assert max(done.values(), default=1) == 1
    assert not accepted - done
    assert set(done) <= set(events)
    assert case.counts.delivered == accepted.total()
    assert case.counts.dead_lettered == buried.total()
    assert bool(pending) == case.sender.has_suspects
    assert not buried or accepted
    assert all(0 <= delay <= MAX_DELAY for delay in delays)
    assert len(client.tried) == len(delays)
    check_head_is_kept(client, script)


@given(SIZES, st.lists(PASSING, max_size=9), st.sets(st.integers(0, 44)), st.data())
@settings(deadline=None, max_examples=300)
def test_only_what_is_truly_refused_is_buried(sizes, outages, poison, data):
    """However short outages are scattered among consistent refusals."""

    class Server(ScriptedClient):
        def ingest(self, events):
            if self.script and data.draw(st.booleans()):
                self.tried.append(list(events))
                raise self.script.pop()
            script, self.script = self.script, []
            try:
                super().ingest(events)
            finally:
                self.script = script

    events = numbered(sum(sizes))
    bad = [event for n, event in enumerate(events) if n in poison]
    good = [event for n, event in enumerate(events) if n not in poison]
    client = Server(outages, poison=bad)
    case = Case(client)
    case.load(*batches(sizes))
    case.run()

    assert client.accepted == good
    assert set(case.done) - set(good) <= set(bad)

    case.load([b"one more"])
    case.run()
    assert client.accepted == [*good, b"one more"]
    assert Counter(case.done) == Counter([*events, b"one more"])
    assert case.counts.dead_lettered == len(bad)


@given(SIZES, st.lists(ERRORS, max_size=60))
@settings(deadline=None, max_examples=300)
def test_what_is_pending_is_delivered_once_the_server_is_well(sizes, script):
    client = ScriptedClient(script)
    case = Case(client)
    case.load(*batches(sizes))
    case.run()
    client.script.clear()

    case.load([b"one more"])
    case.sender.retry_suspects()
    case.run()

    assert not case.sender.has_suspects
    assert len(case.done) == sum(sizes) + 1
    assert len(client.accepted) + case.counts.dead_lettered == sum(sizes) + 1


def test_a_status_of_success_that_is_no_success_is_held(openmeter):
    """OpenMeter never answers with an HTML page, so the events are kept."""
    page = {"Content-Type": "text/html"}
    openmeter.script.append(Answer(200, b"<html>", page, takes=False))
    client = OpenMeterClient(
        url=openmeter.url,
        flavor="v1",
        key=ApiKey.from_options(None, None),
        timeout=40,
    )
    case = Case(client)
    case.load([b'{"id": "a", "subject": "a"}'])

    case.run()
    client.close()

    assert openmeter.ids == ["a"]
    assert case.counts.retries == 1


class DeposedClient(ScriptedClient):
    """Accepts events, then learns that another sender has taken the place."""

    def ingest(self, events):
        super().ingest(events)
        raise Deposed("the place of the sender was given up")


def deposed(_):
    raise Deposed("the place of the sender was given up")


@pytest.mark.parametrize(
    ("client", "done"),
    [(DeposedClient(), lambda events: None), (ScriptedClient(), deposed)],
    ids=["by the client", "by the source"],
)
def test_a_sender_that_lost_its_place_says_nothing_false_of_the_server(
    client, done, caplog
):
    sender = Sender(client, Counts(), done, jitter=lambda _, most: most)
    sender.load(ListedBatch(named("a")))

    assert sender.attempt() > 0

    assert "another process" in caplog.text
    assert "did not answer" not in caplog.text
    assert sender.outage.problem is None
