"""Type checkers know the type of every public name."""

from __future__ import annotations

import json

from test_typed_options import run_checker


def test_every_public_name_has_a_type() -> None:
    said = run_checker(
        "pyright", "--outputjson", "--ignoreexternal", "--verifytypes=openmeter_wsgi"
    )
    found = json.loads(said)["typeCompleteness"]

    incomplete = [each["name"] for each in found["symbols"] if not each["isTypeKnown"]]
    assert incomplete == []
    assert found["completenessScore"] == 1
