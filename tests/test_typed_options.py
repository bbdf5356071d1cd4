"""The typed options are those of a policy."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import openmeter_wsgi
from openmeter_wsgi import Options, Policy, RouteOptions
from openmeter_wsgi.policy import PER_ROUTE

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "typing" / "program.py"
WRONG = {
    number
    for number, line in enumerate(PROGRAM.read_text().splitlines(), 1)
    if "# wrong" in line
}
#: Options that take more than the field of a policy holds.
READ = {
    "api_key_file", "entitlement_meters", "required_entitlements", "routes",
    "spool_dir",
}  # fmt: skip
FIELDS = {field.name for field in dataclasses.fields(Policy) if field.init}


def test_the_typed_options_are_those_of_a_policy() -> None:
    assert get_type_hints(Options).keys() == FIELDS


def test_the_typed_options_of_a_route_are_those_of_a_route() -> None:
    assert get_type_hints(RouteOptions).keys() == PER_ROUTE


@pytest.mark.parametrize("name", sorted(FIELDS - READ))
def test_an_option_takes_what_its_field_holds(name: str) -> None:
    assert get_type_hints(Options)[name] == get_type_hints(Policy)[name]


def test_all_public_names_are_there() -> None:
    assert set(openmeter_wsgi.__all__) <= set(dir(openmeter_wsgi))
    assert all(getattr(openmeter_wsgi, name) for name in openmeter_wsgi.__all__)


def environment() -> dict[str, str]:
    # pyright asks the first python of PATH what is installed.
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


def run_checker(*command: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200,
        check=False,
    ).stdout  # fmt: skip


def test_more_than_ten_mistakes_are_prepared() -> None:
    assert len(WRONG) > 10
