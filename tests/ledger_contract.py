"""Tests of a ledger for every kind of store: the base class of their test classes."""

from __future__ import annotations

import threading

import pytest

from entitling import wait_for
from openmeter_wsgi.quota.account import NotReserved, Reservation
from openmeter_wsgi.quota.ledger import Ledger, LocalQuota
from openmeter_wsgi.quota.visibility_mark import FixedLag

LAG = 5.0
START = 1_000_000.0


class Clock:
    """A wall clock that moves only when a test sets it."""

    def __init__(self):
        self.now = START

    def __call__(self):
        return self.now


def end(ledger):
    """Close a ledger and its store."""
    ledger.close()
    ledger._store.close()


class LedgerContract:
    """Tests with the fixture `new_store`, a function: each call is a new process."""

    shares_answers = True

    @pytest.fixture
    def clock(self):
        return Clock()

    @pytest.fixture
    def new_ledger(self, new_store, clock):
        made = []

        def new(*, delivered_until=clock, **options):
            visible = FixedLag(delivered_until, LAG, clock)
            defaults = {"origin": "spool", "clock": clock,
                        "visible_until": visible.until}  # fmt: skip
            made.append(Ledger(new_store(), **(defaults | options)))
            return made[-1]

        yield new
        for ledger in made:
            ledger.close()

    def test_no_more_is_reserved_than_is_left(self, new_ledger):
        account = new_ledger().account("acme")
        account.answered(3.0, START)

        taken = [account.reserve(1.0) for _ in range(3)]
        assert all(isinstance(one, Reservation) for one in taken)
        assert account.reserve(1.0) == NotReserved(held_back=True, available=0.0)

        for one in taken:
            one.settle(1.0)
        assert account.available() == 0.0

    def test_what_is_settled_is_gone_and_what_is_in_flight_may_come_back(
        self, new_ledger, clock
    ):
        account = new_ledger().account("acme")
        account.answered(1.0, START)
        reservation = account.reserve(1.0)
        assert account.reserve(1.0).held_back

        reservation.settle(1.0)
        clock.now += 0.3
        assert not account.reserve(1.0).held_back

    def test_a_released_reservation_can_be_had_again(self, new_ledger):
        account = new_ledger().account("acme")
        account.answered(1.0, START)
        account.reserve(1.0).settle(0.0)
        assert isinstance(account.reserve(1.0), Reservation)

    def test_near_the_limit_others_have_at_once_what_a_request_did_not_use(
        self, new_ledger
    ):
        ledgers = [new_ledger(), new_ledger()]
        one, other = (LocalQuota(ledger, {"tokens": None}) for ledger in ledgers)
        one.answered("acme", "tokens", 10.0, START)
        used = one.reserve("acme", "tokens", 10.0)
        used.settle(3.0)

        # The clock stands still, so no chunk counts as idle.
        wait_for(lambda: not ledgers[0].account("acme\0tokens").lease.free)

        assert isinstance(other.reserve("acme", "tokens", 7.0), Reservation)
        assert other.reserve("acme", "tokens", 1.0) == NotReserved(True, 0.0)
        one.close()
        other.close()

    def test_near_the_limit_no_answer_leases_for_a_request_that_may_never_come(
        self, new_ledger, clock
    ):
        ledgers = [new_ledger(), new_ledger()]
        one, other = (LocalQuota(ledger, {"tokens": None}) for ledger in ledgers)
        one.answered("acme", "tokens", 10.0, START)
        one.reserve("acme", "tokens", 4.0).settle(4.0)  # the account is in use
        clock.now += 0.1
        one.answered("acme", "tokens", 10.0, clock.now)

        wait_for(lambda: not ledgers[0].account("acme\0tokens").lease.free)

        assert isinstance(other.reserve("acme", "tokens", 6.0), Reservation)
        one.close()
        other.close()

    def test_a_reservation_is_settled_once(self, new_ledger):
        account = new_ledger().account("acme")
        account.answered(10.0, START)
        reservation = account.reserve(4.0)
        for _ in range(3):
            reservation.settle(1.0)
        assert account.available() == 9.0

    def test_threads_that_settle_at_a_time_settle_once(self, new_ledger):
        account = new_ledger().account("acme")
        account.answered(10_000.0, START)
        reservations = [account.reserve(1.0) for _ in range(1_000)]

        def settle():
            for one in reservations:
                one.settle(1.0)

        threads = [threading.Thread(target=settle) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert account.available() == 9_000.0

    def test_more_than_was_reserved_is_a_debt_that_others_see(self, new_ledger, clock):
        ours, others = new_ledger(), new_ledger()
        account = ours.account("acme")
        account.answered(10.0, START)
        account.reserve(1.0).settle(8.0)
        for _ in range(2):
            clock.now += 1
            ours.maintain()
        assert others.account("acme").reserve(3.0).available == 2.0

    def test_what_was_never_reserved_is_spent_too(self, new_ledger, clock):
        ours, others = new_ledger(), new_ledger()
        account = ours.account("acme")
        account.answered(10.0, START)
        account.spend(4.0)
        clock.now += 1
        ours.maintain()
        assert others.account("acme").reserve(10.0).available == 6.0

    def test_reserving_nothing_takes_nothing_and_needs_something(self, new_ledger):
        account = new_ledger().account("acme")
        account.answered(1.0, START)
        assert isinstance(account.reserve(0.0), Reservation)
        assert isinstance(account.reserve(1.0), Reservation)
        assert account.reserve(0.0) == NotReserved(held_back=True, available=0.0)

    @pytest.mark.parametrize("balance", [0.0, -5.0])
    def test_of_an_exhausted_balance_nothing_is_had(self, new_ledger, balance):
        account = new_ledger().account("acme")
        account.answered(balance, START)
        for amount in (0.0, 1.0):
            assert account.reserve(amount) == NotReserved(
                held_back=False, available=0.0
            )

    def test_without_an_answer_nobody_is_refused(self, new_ledger):
        account = new_ledger().account("acme")
        for amount in (0.0, 1.0, 1e9):
            assert isinstance(account.reserve(amount), Reservation)

    def test_tenths_add_up(self, new_ledger, clock):
        ledger = new_ledger()
        account = ledger.account("acme")
        account.answered(1.0, START)
        for _ in range(10):
            account.reserve(0.1).settle(0.1)
            clock.now += 1
            ledger.maintain()
        assert account.reserve(0.1) == NotReserved(held_back=False, available=0.0)

    # -- Answers

    def test_the_newest_answer_counts_whoever_has_it(self, new_ledger):
        ours, others = (new_ledger().account("acme") for _ in range(2))
        ours.answered(10.0, START)
        others.answered(5.0, START - 1)
        assert others.reserve(6.0) is not None
        assert isinstance(others.reserve(1.0), Reservation)
        others.answered(100.0, START + 1)
        assert isinstance(ours.reserve(50.0), Reservation)

    def test_a_new_answer_shows_a_grant_and_an_edit_at_once(self, new_ledger):
        account = new_ledger().account("acme")
        account.answered(0.0, START)
        assert not account.reserve(1.0).held_back
        account.answered(1_000.0, START + 1)
        assert isinstance(account.reserve(1.0), Reservation)
        account.answered(0.0, START + 2)
        assert isinstance(account.reserve(1.0), NotReserved)

    def test_an_answer_covers_what_was_delivered_and_visible(self, new_ledger, clock):
        ledger = new_ledger()
        account = ledger.account("acme")
        account.answered(10.0, START)
        account.reserve(10.0).settle(10.0)
        for _ in range(8):
            clock.now += 1
            ledger.maintain()
        account.answered(3.0, clock.now)
        assert isinstance(account.reserve(3.0), Reservation)

    def test_what_an_answer_may_not_know_yet_is_subtracted(self, new_ledger, clock):
        ledger = new_ledger()
        account = ledger.account("acme")
        account.answered(10.0, START)
        account.reserve(4.0).settle(4.0)
        clock.now += LAG - 1
        ledger.maintain()
        account.answered(10.0, clock.now)
        assert account.reserve(7.0) == NotReserved(held_back=False, available=6.0)

    def test_what_was_delivered_late_is_covered_late(self, new_ledger, clock):
        # An outage: the usage is spent at once and delivered 60 seconds later.
        delivered_until = START
        ledger = new_ledger(delivered_until=lambda: delivered_until)
        account = ledger.account("acme")
        account.answered(10.0, START)
        account.reserve(10.0).settle(10.0)
        clock.now += 60
        ledger.maintain()
        delivered_until = clock.now
        clock.now += 1
        ledger.maintain()
        account.answered(10.0, clock.now)  # delivered a second ago: not visible yet
        assert isinstance(account.reserve(1.0), NotReserved)
        clock.now += LAG
        ledger.maintain()
        account.answered(10.0, clock.now)
        assert isinstance(account.reserve(1.0), Reservation)

    def test_a_mark_covers_nothing_of_an_answer_asked_for_before_it(
        self, new_ledger, clock
    ):
        visible_until = START
        ledger = new_ledger(visible_until=lambda: visible_until)
        account = ledger.account("acme")
        account.answered(10.0, START)
        account.reserve(10.0).settle(10.0)
        clock.now += 30
        ledger.maintain()
        asked_at = clock.now  # the usage becomes visible before the answer arrives
        clock.now += 1
        visible_until = clock.now
        ledger.maintain()
        account.answered(10.0, asked_at)
        assert isinstance(account.reserve(1.0), NotReserved)
        clock.now += 1
        account.answered(3.0, clock.now)
        assert isinstance(account.reserve(3.0), Reservation)

    def test_usage_of_an_earlier_period_does_not_count_against_a_new_one(
        self, new_ledger, clock
    ):
        ledger = new_ledger(visible_until=lambda: 0.0)  # nothing is ever visible
        account = ledger.account("acme")
        account.answered(10.0, START)
        account.reserve(10.0).settle(10.0)
        clock.now += 60
        period_start = clock.now
        account.spend(3.0)
        clock.now += 1
        ledger.maintain()
        account.answered(10.0, clock.now)
        assert isinstance(account.reserve(1.0), NotReserved)
        account.answered(10.0, clock.now + 1, since=period_start)
        assert account.reserve(10.0).available == 7.0

    # -- Others

    def test_what_lies_idle_comes_back(self, new_ledger, clock):
        ours, others = new_ledger(), new_ledger()
        account = ours.account("acme")
        account.answered(1_000.0, START)
        account.reserve(1.0).settle(1.0)
        assert others.account("acme").reserve(999.0).held_back
        ours.maintain()
        clock.now += 0.5
        ours.maintain()
        assert isinstance(others.account("acme").reserve(999.0), Reservation)

    def test_near_the_limit_nobody_holds_more_than_the_request(self, new_ledger):
        ours, others = (new_ledger().account("acme") for _ in range(2))
        ours.answered(7.0, START)
        assert isinstance(ours.reserve(1.0), Reservation)
        assert isinstance(others.reserve(6.0), Reservation)

    def test_far_from_the_limit_the_store_is_asked_seldom(self, new_store, clock):
        store = new_store()
        asked = 0

        class Counting:
            def exchange(self, *arguments):
                nonlocal asked
                asked += 1
                return store.exchange(*arguments)

            def __getattr__(self, name):
                return getattr(store, name)

        ledger = Ledger(Counting(), origin="o", visible_until=clock, clock=clock)
        account = ledger.account("acme")
        account.answered(1_000.0, START)
        for _ in range(1_000):
            account.reserve(1.0).settle(1.0)
        assert asked < 100
        for _ in range(100):  # "nothing left" is cached
            assert isinstance(account.reserve(1.0), NotReserved)
        assert asked < 100
        ledger.close()

    def test_what_a_closed_ledger_held_in_flight_counts_as_spent(
        self, new_ledger, clock
    ):
        ours, others = new_ledger(), new_ledger()
        account = ours.account("acme")
        account.answered(10.0, START)
        account.reserve(3.0)
        account.reserve(2.0).settle(2.0)
        ours.close()
        account = others.account("acme")
        assert account.reserve(6.0) == NotReserved(held_back=False, available=5.0)

    def test_the_dead_leave_what_they_held_as_spent(self, new_ledger, clock, crash):
        ours, others = new_ledger(), new_ledger()
        account = ours.account("acme")
        account.answered(10.0, START)
        account.reserve(10.0)
        other = others.account("acme")
        assert other.reserve(1.0).held_back
        crash(ours)
        others.maintain()
        clock.now += 1
        assert not other.reserve(1.0).held_back

        for _ in range(8):
            clock.now += 1
            others.maintain()
        other.answered(10.0, clock.now)
        assert isinstance(other.reserve(10.0), Reservation)

    def test_what_died_with_a_process_is_not_waited_for(self, new_ledger, clock, crash):
        never = 0.0
        ours = new_ledger(delivered_until=lambda: never)
        others = new_ledger()
        for ledger in (ours, others):  # as without a spool
            ledger._origin = ledger._token
        account = ours.account("acme")
        account.answered(10.0, START)
        account.reserve(10.0).settle(10.0)
        clock.now += 1
        ours.maintain()
        other = others.account("acme")
        assert other.reserve(1.0) == NotReserved(held_back=False, available=0.0)
        crash(ours)
        others.maintain()
        clock.now += LAG + 1
        others.maintain()
        other.answered(10.0, clock.now)
        assert isinstance(other.reserve(10.0), Reservation)

    def test_accounts_beyond_the_bound_give_back_what_they_had(self, new_ledger, clock):
        ours, others = new_ledger(max_accounts=2), new_ledger()
        for name in "abcd":
            account = ours.account(name)
            account.answered(100.0, START)
            account.reserve(1.0).settle(1.0)
        ours.maintain()
        assert isinstance(others.account("a").reserve(99.0), Reservation)
        assert isinstance(others.account("d").reserve(99.0), NotReserved)
        assert ours.account("a") is not None
        assert ours.account("d") is account

    # -- Answers that are shared

    def test_a_document_is_shared_until_a_newer_one_is(self, new_store):
        one, other = new_store(), new_store()
        one.share("acme", b"{}", START)
        found = (b"{}", START) if self.shares_answers else None
        assert other.shared(["acme", "nobody"]) == [found, None]
        one.share("acme", b'{"a":1}', START + 1)
        found = (b'{"a":1}', START + 1) if self.shares_answers else None
        assert other.shared(["acme"]) == [found]
        other.unshare(["acme", "nobody"])
        assert one.shared(["acme"]) == [None]

    # -- Questions

    def test_questions_are_asked_at_a_rate_by_all_together(self, new_store, clock):
        one, other = new_store(), new_store()
        for _ in range(5):
            assert one.take_token(10.0) == 0.0
            assert other.take_token(10.0) == 0.0
        assert one.take_token(10.0) == pytest.approx(0.1)
        clock.now += 0.1
        assert other.take_token(10.0) == 0.0
        assert one.take_token(10.0) > 0

    def test_a_first_question_leaves_some_for_others(self, new_store):
        store = new_store()
        first = [store.take_token(10.0, reserve=5.0) for _ in range(6)]
        assert first == [0.0] * 5 + [pytest.approx(0.1)]
        assert [store.take_token(10.0) for _ in range(5)] == [0.0] * 5
        assert store.take_token(10.0) > 0

    def test_a_slow_rate_allows_one_question_all_the_same(self, new_store):
        store = new_store()
        assert store.take_token(0.5, reserve=3.0) == 0.0
        assert store.take_token(0.5) == pytest.approx(2.0)
