"""The README's code is run as it stands."""

import os
from unittest import mock

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

_variables = mock.patch.dict(os.environ, {"OPENMETER_API_KEY": "om_example"})


def _setup(namespace: dict[str, object]) -> None:
    namespace["__name__"] = "__main__"
    from django.conf import settings

    if not settings.configured:
        settings.configure(SECRET_KEY="example", ROOT_URLCONF=())
    _variables.start()


def _teardown(namespace: dict[str, object]) -> None:
    _variables.stop()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    pattern="README.md",
    setup=_setup,
    teardown=_teardown,
).pytest()
