"""Run where they are asked for: they need what `install` installs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from openmeter_wsgi.sandbox import Sandbox
from test_sandbox_support import Api

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chromium import Chromium


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked = any("in_chromium" in argument for argument in config.args)
    return None if asked else True


@pytest.fixture(scope="session")
def _chromium() -> Iterator[Chromium]:
    from chromium import Chromium

    with Chromium() as browser:
        yield browser


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def browser(_chromium: Chromium, sandbox: Sandbox) -> Iterator[Chromium]:
    """A window as if it were new, whose console has to stay empty.

    It lets go of the sandbox before that ends: a page whose server is gone complains.
    """
    _chromium.resize(1400, 900)
    _chromium.prefer(dark=False)
    _chromium.complaints()
    yield _chromium
    said = _chromium.complaints()
    _chromium.get("about:blank")
    assert said == []


@pytest.fixture
def api(sandbox: Sandbox) -> Iterator[Api]:
    with Api(sandbox.url) as api:
        yield api


@pytest.fixture
def varied(sandbox: Sandbox, api: Api) -> Sandbox:
    """A sandbox with something of everything, and little of it: axe looks at each."""
    from shown import fill

    fill(sandbox, api, 30)
    return sandbox


@pytest.fixture
def filled(sandbox: Sandbox, api: Api) -> Sandbox:
    """A sandbox with something of everything that the page can show."""
    from shown import fill

    fill(sandbox, api, 300)
    return sandbox
