"""Whether a process knows that it is not the one that made something."""

import ctypes
import os

import pytest

from openmeter_wsgi import forks


@pytest.mark.parametrize(
    "fork", [os.fork, ctypes.CDLL(None).fork], ids=["by Python", "in C"]
)
@pytest.mark.parametrize(
    "mark_process", [forks.mark_process, forks._ProcessId], ids=["page", "process id"]
)
def test_a_mark_is_true_in_its_own_process_alone(mark_process, fork):
    mark = mark_process()

    child = fork()
    if not child:
        os._exit(7 if mark[0] else 0)

    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert mark[0]


def test_a_child_of_a_child_knows_it_too():
    mark = forks.mark_process()

    child = os.fork()
    if not child:
        grandchild = os.fork()
        if not grandchild:
            os._exit(7 if mark[0] else 0)
        _, status = os.waitpid(grandchild, 0)
        os._exit(os.waitstatus_to_exitcode(status))

    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
