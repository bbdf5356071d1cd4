"""Questions wait in line: first come, first served, and none is asked twice."""

import functools
import gc
import math
import sys
import threading
import tracemalloc
from collections import deque

import pytest

from entitling import YES, ask, metered, middleware, wait_for
from openmeter_wsgi.entitlements.cache import (
    CACHE_SIZE,
    AnswerCache,
    CachedAnswer,
    Lifetimes,
)
from openmeter_wsgi.entitlements.client import UNKNOWN_CUSTOMER
from openmeter_wsgi.entitlements.customers import CustomerCache
from openmeter_wsgi.entitlements.lookup import BackgroundLookup, SharedResult
from openmeter_wsgi.entitlements.questions import MAX_QUEUE, Question
from openmeter_wsgi.options import question_rate
from openmeter_wsgi.quota.store import StoreAway
from servers import TIMEOUT
from test_entitlements import body, header, ok


def question(name):
    return Question(name, ("searches",))


class Tokens:
    """A bucket that is filled by hand."""

    def __init__(self):
        self.left = 0
        self.asked_for = threading.Semaphore(0)

    def take(self, reserve):
        if self.left > reserve:
            self.left -= 1
            return 0.0
        self.asked_for.release()
        return 0.001


class Answering:
    """Records the customers of the questions, in the order of the answers."""

    def __init__(self):
        self.order = []

    def __call__(self, client, question, answered, wait_for_token):
        self.order.append(question.customer)


class NoConnection:
    def close(self):
        pass


@pytest.fixture
def tokens():
    return Tokens()


@pytest.fixture
def answering():
    return Answering()


@pytest.fixture
def make_lookup(tokens, answering):
    made = []

    def make(**options):
        usual = {
            "new_client": NoConnection, "ask_openmeter": answering,
            "take_token": tokens.take, "timeout": TIMEOUT, "rate": 1_000.0,
            "tokens_kept_back": 0.0,
        }  # fmt: skip
        made.append(BackgroundLookup(**usual | options))
        return made[-1]

    yield make
    for lookup in made:
        lookup.close()


def enlist(lookup, names, *, is_known=False):
    """Queue a question for each of *names*, from separate threads, in this order."""
    found, started = {}, []
    for name in names:

        def work(name=name):
            found[name] = lookup.ask(question(name), is_known=is_known)

        started.append(threading.Thread(target=work))
        started[-1].start()
        wait_for(functools.partial(is_in_line, lookup, question(name)))
    return started, found


def is_in_line(lookup, question):
    pending = lookup._pending.get(question)
    return pending is not None and pending.queue is not None


def test_the_first_in_line_is_asked_for_first(make_lookup, tokens, answering):
    lookup = make_lookup()
    names = [f"customer-{n}" for n in range(20)]

    waiting, found = enlist(lookup, names)

    assert answering.order == []
    for number in range(1, len(names) + 1):
        tokens.left += 1
        wait_for(lambda number=number: len(answering.order) == number)
    for thread in waiting:
        thread.join(TIMEOUT)
    assert answering.order == names
    assert set(found.values()) == {None}


def test_a_customer_that_is_known_does_not_wait_behind_those_that_are_not(
    make_lookup, tokens, answering
):
    lookup = make_lookup(tokens_kept_back=5.0)
    waiting, _ = enlist(lookup, [f"new-{n}" for n in range(10)])
    known, _ = enlist(lookup, ["known"], is_known=True)

    tokens.left = 1

    known[0].join(TIMEOUT)
    assert answering.order == ["known"]
    tokens.left = 100
    for thread in waiting:
        thread.join(TIMEOUT)


def test_all_who_wait_for_a_customer_are_answered_together(
    make_lookup, tokens, answering
):
    lookup = make_lookup()
    waiting, _ = enlist(lookup, ["acme", "other"])
    others = [
        threading.Thread(target=lookup.ask, args=(question("acme"),)) for _ in range(9)
    ]
    for thread in others:
        thread.start()

    tokens.left = 1

    for thread in [waiting[0], *others]:
        thread.join(TIMEOUT)
    assert answering.order == ["acme"]
    tokens.left = 1
    waiting[1].join(TIMEOUT)


def test_a_question_stays_in_line_when_its_request_has_given_up(
    make_lookup, tokens, answering
):
    lookup = make_lookup(timeout=0.01)

    assert lookup.ask(question("acme")) >= 1.0
    assert lookup.ask(question("acme")) >= 1.0
    tokens.left = 5

    wait_for(lambda: not lookup._pending)
    assert answering.order == ["acme"]


def test_nobody_waits_whose_turn_is_further_than_the_timeout(make_lookup):
    lookup = make_lookup(rate=10.0, timeout=0.05)

    waits = [lookup.ask(question(f"customer-{n}")) for n in range(50)]

    # Later questions do not wait; each gets the length of the queue as its wait.
    assert waits[1:] == sorted(waits[1:])
    assert waits[-1] == pytest.approx(4.9, rel=0.3)


def test_the_line_has_an_end(make_lookup, tokens):
    lookup = make_lookup(rate=1.0, timeout=0.001)
    for n in range(MAX_QUEUE + 100):
        lookup.ask(question(f"customer-{n}"))

    assert len(lookup._pending) <= MAX_QUEUE + 1
    assert lookup.ask(question("one-more")) > 100
    tokens.left = 10
    assert (lookup.ask(question("known"), is_known=True) or 0) <= 1


def test_closing_ends_every_wait(make_lookup):
    lookup = make_lookup()
    waiting, found = enlist(lookup, ["a", "b", "c"])

    lookup.close()

    for thread in waiting:
        thread.join(TIMEOUT)
    assert found == dict.fromkeys("abc")
    assert not lookup._pending


def test_a_question_that_nobody_waits_for_goes_behind(make_lookup, tokens, answering):
    lookup = make_lookup()
    lookup.refresh(question("first"))  # its thread waits for a token with it
    assert tokens.asked_for.acquire(timeout=TIMEOUT)
    lookup.refresh(question("behind"))
    waiting, _ = enlist(lookup, ["urgent"], is_known=True)
    again = threading.Thread(target=lookup.ask, args=(question("behind"),))

    tokens.left = 1
    wait_for(lambda: len(answering.order) == 1)
    tokens.left = 1
    waiting[0].join(TIMEOUT)
    again.start()
    tokens.left = 1
    again.join(TIMEOUT)

    assert answering.order == ["first", "urgent", "behind"]


def test_what_another_process_has_asked_is_not_asked(make_lookup, answering):
    shared = deque([SharedResult(is_answered=True, is_known=True)])
    lookup = make_lookup(load_shared=lambda question, since: shared.popleft())

    assert lookup.ask(question("acme")) is None

    assert answering.order == []
    assert not lookup._pending


def test_a_connection_is_closed_after_an_unexpected_error(make_lookup, tokens):
    closed = threading.Event()

    class Client:
        def close(self):
            closed.set()

    def fail(*_):
        raise ZeroDivisionError

    lookup = make_lookup(new_client=Client, ask_openmeter=fail)
    tokens.left = 1

    assert lookup.ask(question("acme")) is None

    assert closed.is_set()


def test_an_error_of_the_token_bucket_does_not_stop_the_queue(
    make_lookup, answering, caplog
):
    outcomes = deque([StoreAway("locked")])

    def take_token(_kept_back):
        if outcomes:
            raise outcomes.popleft()
        return 0.0

    lookup = make_lookup(take_token=take_token)

    assert lookup.ask(question("acme")) is None
    assert lookup.ask(question("other")) is None

    assert answering.order == ["other"]
    assert not lookup._pending
    assert "customer 'acme' is not asked about" in caplog.text


# -- With a server


@pytest.fixture
def make(openmeter, entitled, middlewares):
    def make(**options):
        middlewares.append(middleware(openmeter, ok, **options))
        return middlewares[-1]

    return make


@pytest.mark.parametrize(
    ("mode", "statuses"),
    [("open", {"200 OK"}), ("closed", {"503 Service Unavailable"})],
)
def test_a_line_that_is_too_long_is_told_as_busy(make, entitled, mode, statuses):
    app = make(question_rate=0.02, fail_mode=mode)
    ask(app, "takes-the-only-token")
    app.process().entitlements._lookup._timeout = 0.05  # of the wait alone
    names = [f"customer-{n}" for n in range(5)]

    responses = [ask(app, name) for name in names]

    assert {response.status for response in responses} == statuses
    counted = app.stats().let_through if mode == "open" else app.stats().denied
    assert counted["busy"] == 5
    if mode == "closed":
        assert {body(response)["reason"] for response in responses} == {"busy"}
        waits = [int(header(response, "Retry-After")) for response in responses]
        assert waits == sorted(waits)
        assert waits[-1] > 20


def test_each_customer_in_line_is_asked_for_once(make, entitled):
    names = [f"customer-{n}" for n in range(80)]
    entitled.values = {name: {"searches": YES} for name in names}
    app = make(question_rate=30, entitlement_timeout=1.5, fail_mode="closed")
    passed = set()

    def until_it_passes(name):
        while ask(app, name).status != "200 OK":
            threading.Event().wait(0.05)
        passed.add(name)

    threads = [threading.Thread(target=until_it_passes, args=(n,)) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)

    assert passed == {*names}
    assert entitled.asked == {(name, "searches"): 1 for name in names}


def test_who_is_over_quota_is_not_let_through_by_a_cold_start(make, entitled):
    names = [f"customer-{n}" for n in range(40)]
    entitled.values = {name: {"searches": metered(0)} for name in names}
    app = make(question_rate=1_000, fail_mode="open")
    statuses = []
    threads = [
        threading.Thread(target=lambda n=n: statuses.append(ask(app, n).status))
        for n in names
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)

    assert statuses == ["429 Too Many Requests"] * len(names)


def test_what_can_be_no_customer_takes_no_place_in_line(make, entitled):
    app = make(question_rate=0.05, entitlement_timeout=0.05)
    for n in range(200):
        assert ask(app, "x" * 300 + str(n)).status == "403 Forbidden"

    assert entitled.questions == 0
    assert not app.process().entitlements._answers


@pytest.mark.parametrize(
    ("url", "rate"),
    [
        ("https://openmeter.cloud", 25), ("https://eu.openmeter.cloud", 25),
        ("https://eu.api.konghq.com", 25), ("http://127.0.0.1:8888", 200),
        ("https://openmeter.example.com", 200),
    ],
)  # fmt: skip
def test_the_rate_of_questions_depends_on_whose_server_it_is(url, rate):
    assert question_rate(None, url=url) == rate
    assert question_rate(7.0, url=url) == 7.0


def test_a_flood_of_made_up_names_takes_no_more_than_some_mebibytes():
    """All that is kept of names that are no customers, each at its bound."""
    lifetimes = Lifetimes(60.0, 5.0, 600.0)
    share = 10  # of the bound of the caches, as it takes less time
    answers = AnswerCache(CACHE_SIZE // share)
    found = CustomerCache(lifetimes, size=CACHE_SIZE // share)
    lookup = BackgroundLookup(
        new_client=NoConnection, ask_openmeter=Answering(), take_token=lambda _: 100.0,
        timeout=0.0, rate=25.0, tokens_kept_back=0.0,
    )  # fmt: skip

    def remember(name, at):
        known = CachedAnswer(
            "searches", UNKNOWN_CUSTOMER, None, asked_at=at, terms_at=-math.inf,
            lifetimes=lifetimes,
        )  # fmt: skip
        answers.put(name, "searches", known)
        found.put(name, None, at)

    names = [f"{n:036}" for n in range(MAX_QUEUE + 100)]
    in_caches = memory_of(lambda: [remember(name, float(n))
                                   for n, name in enumerate(names)])  # fmt: skip
    in_line = memory_of(lambda: [lookup.ask(question(name)) for name in names])
    lookup.close()

    # The names themselves are in each once more.
    of_names = (CACHE_SIZE + MAX_QUEUE) * sys.getsizeof(names[0])
    assert in_caches * share + in_line + of_names < 8 * 1024**2


def memory_of(work):
    """Return the bytes that *work* has left behind."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    work()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return grown


def test_a_flood_of_made_up_names_does_not_fill_the_line_of_known_customers(
    make, entitled
):
    entitled.values["acme"] = {"searches": YES}
    app = make(fail_mode="closed", question_rate=20)
    assert ask(app, "acme").status == "200 OK"
    entitlements = app.process().entitlements
    entitlements._lookup._timeout = 0.0  # nobody waits for the answer about a name
    for n in range(3_000):
        assert not entitlements.decide(f"name-{n}", ("searches",), "closed").allowed
    assert len(entitlements._lookup._pending) <= MAX_QUEUE + 8
    entitlements.cached_answer("acme", "searches").fresh_until = 0.0
    asked = entitled.asked["acme", "searches"]

    assert ask(app, "acme").status == "200 OK"

    wait_for(lambda: entitled.asked["acme", "searches"] > asked)
