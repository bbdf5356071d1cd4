"""Whether a process knows that it is not the one that made something.

What forks is a function that runs in an interpreter of its own: where another thread
wants to run, a child of a fork in C may wait for it forever.
"""

import os

import pytest

from openmeter_wsgi import forks
from test_fork import FORKS, finish, start_code, wait_for

MARKS = {"page": forks._new_mark, "process id": forks._ProcessId}


def run(case, *arguments):
    call = f"import sys, test_forks; test_forks.{case.__name__}(*sys.argv[1:])"
    finish(start_code(call, *arguments))


def fork_once(mark, fork):
    made = MARKS[mark]()
    assert not made[0]
    made[0] = 1
    child = FORKS[fork]()
    if not child:
        os._exit(7 if made[0] else 0)
    wait_for(child)
    assert made[0]


@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_is_true_in_its_own_process_alone(mark, fork):
    run(fork_once, mark, fork)


def fork_twice():
    guard = forks.ProcessGuard()
    guard.confirm()
    child = os.fork()
    if not child:
        grandchild = os.fork()
        if not grandchild:
            os._exit(7 if guard.is_current() else 0)
        wait_for(grandchild)
        os._exit(0)
    wait_for(child)


def test_a_child_of_a_child_knows_it_too():
    run(fork_twice)


def test_what_was_made_before_threads_were_replaced_is_not_used_after(monkeypatch):
    guard = forks.ProcessGuard()
    assert guard.is_current()

    monkeypatch.setattr(forks, "threads_are_greenlets", lambda: True)

    assert not guard.is_current()
