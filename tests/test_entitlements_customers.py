"""The cache of the customers that subjects belong to."""

from openmeter_wsgi.entitlements.cache import Lifetimes
from openmeter_wsgi.entitlements.customers import CustomerCache

LIFETIMES = Lifetimes(allow=60.0, deny=5.0, max_stale=600.0)


def cache(size=10, now=None):
    now = [100.0] if now is None else now
    return CustomerCache(LIFETIMES, size=size, clock=lambda: now[0])


def test_a_lookup_holds_as_long_as_an_answer_of_its_kind():
    now = [100.0]
    found = cache(now=now)
    found.put("s", "acme", 100.0)
    found.put("nobody", None, 100.0)

    now[0] = 104.9
    assert found.fresh("s").customer == "acme"
    assert found.fresh("nobody").customer is None
    now[0] = 105.0
    assert found.fresh("s").customer == "acme"
    assert found.fresh("nobody") is None
    now[0] = 160.0
    assert found.fresh("s") is None


def test_the_account_of_a_subject_outlives_the_lookup():
    now = [100.0]
    found = cache(now=now)
    found.put("s", "acme", 100.0)
    found.put("nobody", None, 100.0)
    now[0] = 1_000.0

    assert [found.account(name) for name in ("s", "nobody", "new")] == [
        "acme", "nobody", "new",
    ]  # fmt: skip


def test_of_too_many_the_oldest_lookup_goes():
    found = cache(size=2)
    for name in ("a", "b", "a", "c"):
        found.put(name, "acme", 100.0)

    assert [name for name in "abc" if found.fresh(name)] == ["a", "c"]


def test_a_customer_is_forgotten_with_all_its_subjects():
    found = cache()
    for subject, customer in (("a", "acme"), ("b", "acme"), ("c", "other")):
        found.put(subject, customer, 100.0)

    assert sorted(found.forget("acme")) == ["a", "b"]

    assert [name for name in "abc" if found.fresh(name)] == ["c"]
    assert found.forget("c") == ["c"]


def test_a_lookup_that_began_before_something_was_forgotten_is_not_kept():
    now = [100.0]
    found = cache(now=now)
    found.forget("s")

    found.put("s", "acme", 99.0)
    assert found.fresh("s") is None
    found.put("s", "acme", 100.5)
    assert found.fresh("s").customer == "acme"


def test_a_dropped_lookup_is_gone_and_others_stay():
    found = cache()
    found.put("a", "acme", 100.0)
    found.put("b", "acme", 100.0)

    found.drop("a")
    found.drop("unheard of")

    assert found.fresh("a") is None
    assert found.fresh("b")
