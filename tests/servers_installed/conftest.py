"""Collect these tests only on request: they need root and the script `install`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_requested = any("servers_installed" in argument for argument in config.args)
    return None if is_requested else True
