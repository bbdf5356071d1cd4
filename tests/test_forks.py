"""Detection of a fork: a process notices that it did not make an object itself.

The forking functions run in a new interpreter. With other threads, the child of a fork
in C may wait for one of them forever.
"""

import os

import pytest

from openmeter_wsgi import process
from openmeter_wsgi.process import ProcessGuard
from test_fork import FORKS, finish, start_code, wait_for


def without_page():
    """Return a guard as a kernel makes it that empties no page in a child."""
    guard = ProcessGuard()
    guard._page = None
    return guard


GUARDS = {"page": ProcessGuard, "process id": without_page}


def run(case, *arguments):
    call = f"import sys, test_forks; test_forks.{case.__name__}(*sys.argv[1:])"
    finish(start_code(call, *arguments))


def fork_once(guard, fork):
    made = GUARDS[guard]()
    assert made.is_valid()
    assert not made.is_confirmed()
    made.confirm()
    child = FORKS[fork]()
    if not child:
        os._exit(7 if made.is_confirmed() or made.is_valid() else 0)
    wait_for(child)
    assert made.is_confirmed()


@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_is_current_in_its_own_process_alone(guard, fork):
    run(fork_once, guard, fork)


def fork_twice():
    made = ProcessGuard()
    made.confirm()
    child = os.fork()
    if not child:
        grandchild = os.fork()
        if not grandchild:
            os._exit(7 if made.is_confirmed() else 0)
        wait_for(grandchild)
        os._exit(0)
    wait_for(child)


def test_a_child_of_a_child_knows_it_too():
    run(fork_twice)


def test_what_was_made_before_threads_were_replaced_is_not_used_after(monkeypatch):
    guard = ProcessGuard()
    assert guard.is_valid()

    monkeypatch.setattr(process, "threads_are_greenlets", lambda: True)

    assert not guard.is_valid()
