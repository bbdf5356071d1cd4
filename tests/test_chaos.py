"""Processes that are killed under load lose nothing that was settled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import chaos
from openmeter_wsgi.spool.files import MAPPED, WRITTEN

if TYPE_CHECKING:
    from pathlib import Path


# After each kill a server starts anew, which takes a busy machine its time.
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("server", "victim", "form"),
    [
        ("sync", "all", MAPPED),
        ("sync", "worker", WRITTEN),
        ("gthread", "all", WRITTEN),
        ("gthread", "worker", MAPPED),
    ],
)
def test_killed_processes_lose_nothing_that_was_settled(
    server: str, victim: str, form: str, tmp_path: Path
) -> None:
    result = chaos.run(server, victim, 2, tmp_path, form=form)

    assert result.acknowledged > 0
    assert (result.lost, result.twice) == (0, 0)
    # Of each kill at most the batch that was under way comes again.
    assert result.repeated_batches <= result.kills


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", chaos.FAULTS)
def test_no_fault_loses_what_was_settled(fault: str, tmp_path: Path) -> None:
    result = chaos.run_fault("gthread", fault, 3, tmp_path)

    assert result.acknowledged > 50
    assert (result.lost, result.twice) == (0, 0)
    # Without its progress file a segment that is put back comes as a whole.
    assert result.repeats_as_it_may or fault == "cleaned"


@pytest.mark.timeout(300)
def test_two_servers_share_a_spool_and_each_gets_its_own(tmp_path: Path) -> None:
    result = chaos.run_two_servers("gthread", 3, tmp_path)

    assert result.acknowledged > 50
    assert (result.lost, result.twice, result.strayed) == (0, 0, 0)
    assert result.repeats_as_it_may
