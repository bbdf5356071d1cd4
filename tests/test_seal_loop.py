"""Lines that many threads put into small segments are all there, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import seal_loop
from openmeter_wsgi.spool.files import MAPPED, WRITTEN

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("form", [MAPPED, WRITTEN])
def test_no_line_is_lost_or_comes_twice(form: str, tmp_path: Path) -> None:
    result = seal_loop.run(form, 50_000, 0, tmp_path)

    assert result.events >= 50_000
    assert result.seals > 50
    assert (result.lost, result.twice, result.torn) == (0, 0, 0)


def test_the_loop_sees_what_is_lost_torn_or_there_twice() -> None:
    found = seal_loop.Found()
    lines = [seal_loop._LINE % (0, n) for n in range(10)]
    found.read(b"".join(lines[:4]))
    found.read(b"\n".join([lines[3], lines[6], lines[7], b'{"id":"0-0000']))

    # 4, 5, 8 and 9 are nowhere; 3 is in both.
    assert found.compare([10, 0]) == (4, 1)
    assert (found.seals, found.torn) == (2, 1)
