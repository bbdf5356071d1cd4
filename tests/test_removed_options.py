"""Each removed option is refused, with its replacement in the message."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from openmeter_wsgi import ConfigError, OpenMeterMiddleware, Policy, meter
from openmeter_wsgi.options import REMOVED

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = sorted(REMOVED)


def problems(make: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refused:
        make()
    return refused.value.problems


def said(name: str) -> str:
    return f"{name}: is no longer an option: {REMOVED[name]}"


@pytest.mark.parametrize("name", NAMES)
def test_as_a_keyword(name: str) -> None:
    options = {name: "x", "dry_run": True}

    assert problems(lambda: Policy(**options)) == (said(name),)
    assert problems(lambda: OpenMeterMiddleware(print, **options)) == (said(name),)
    assert problems(lambda: meter(**{name: "x"})) == (said(name),)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_variable(name: str) -> None:
    variable = f"OPENMETER_{name.upper()}"
    environ = {variable: "x", "OPENMETER_DRY_RUN": "true"}

    assert problems(lambda: Policy.from_env(environ)) == (f"{variable}: {said(name)}",)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text(f"dry_run = true\n{name} = 'x'\n")

    assert problems(lambda: Policy.from_file(file)) == (said(name),)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_route(name: str) -> None:
    routes = {"/a": {name: "x"}}

    assert problems(lambda: Policy(dry_run=True, routes=routes)) == (
        f"routes['/a']: {said(name)}",
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_page_on_upgrading_names_it(name: str) -> None:
    page = Path(__file__).parents[1] / "docs" / "upgrading.md"

    assert f"`{name}" in page.read_text()
