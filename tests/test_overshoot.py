"""A quota holds under real servers; see :mod:`overshoot`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import overshoot

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.timeout(150)
def test_four_workers_serve_a_quota_and_no_more(tmp_path: Path) -> None:
    found = overshoot.measure([tmp_path], **overshoot.COUNTED)

    assert overshoot.QUOTA <= found.served <= overshoot.QUOTA + overshoot.CLIENTS
    assert found.billed == found.served
