"""The request path is plain Python: an editor follows it from the call to the queue."""

import re
from pathlib import Path

import pytest

import openmeter_wsgi

PACKAGE = Path(openmeter_wsgi.__file__).parent
REQUEST_PATH = [
    "middleware.py", "response.py", "request.py", "billing.py", "process.py",
    "subject.py", "routes.py", "events.py", "errors.py", "log.py",
]  # fmt: skip
TRICKS = {
    "a class that is changed": r"__class__\s*=",
    "the state of an iterator": r"__(setstate|length_hint)__",
    "a private member of the standard library": r"\b(logger|logging|threading)\._[a-z]",
}


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("module", REQUEST_PATH)
def test_no_module_of_the_request_path_uses(module, trick):
    text = (PACKAGE / module).read_text()

    assert not re.search(TRICKS[trick], text)


@pytest.mark.parametrize("module", REQUEST_PATH)
def test_no_iterator_of_the_request_path_is_pickled(module):
    text = (PACKAGE / module).read_text()

    assert not re.search(r"\.__reduce__\(", text)
