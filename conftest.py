"""The README's code is run as it stands."""

import os
import tempfile
from typing import Any
from unittest import mock

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

_variables = mock.patch.dict(os.environ, {"OPENMETER_API_KEY": "om_example"})


def _setup(namespace: dict[str, Any]) -> None:
    namespace["__name__"] = "__main__"
    from django.conf import settings

    if not settings.configured:
        settings.configure(SECRET_KEY="example", ROOT_URLCONF=())
    _variables.start()
    spool = tempfile.TemporaryDirectory()
    namespace.update(spool=spool, spool_dir=spool.name)


def _teardown(namespace: dict[str, Any]) -> None:
    _variables.stop()
    namespace["spool"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    pattern="README.md",
    setup=_setup,
    teardown=_teardown,
).pytest()
