"""Run where they are asked for: they need root, and what `install` installs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked = any("servers_installed" in argument for argument in config.args)
    return None if asked else True
