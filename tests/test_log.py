import ast
import logging
from pathlib import Path

import pytest

from openmeter_wsgi import log


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(log, "time", clock)
    return clock


@pytest.fixture
def logger(request, caplog):
    caplog.set_level(logging.DEBUG)
    logger = log.get_logger(f"openmeter_wsgi.tests.{request.node.name}")
    yield logger
    logger.filters.clear()


def test_a_line_is_written_once_a_minute_with_the_number_of_repetitions(
    logger, clock, caplog
):
    for clock.now in (0.0, 1.0, 30.0, 59.9, 60.0, 61.0, 120.0):
        logger.error("%s: away for %d s", "server", clock.now)

    assert caplog.messages == [
        "openmeter_wsgi: server: away for 0 s",
        "openmeter_wsgi: server: away for 60 s (and 3 times before)",
        "openmeter_wsgi: server: away for 120 s (and 1 times before)",
    ]


def test_a_line_that_comes_rarely_is_written_as_it_is(logger, clock, caplog):
    for clock.now in (0.0, 60.0, 500.0):
        logger.warning("away")

    assert caplog.messages == ["openmeter_wsgi: away"] * 3


def test_lines_differ_by_level_template_and_first_argument(logger, clock, caplog):
    logger.error("%s: one", "a")
    logger.error("%s: one", "b")
    logger.error("%s: two", "a")
    logger.warning("%s: one", "a")
    logger.error("%s: one", "a")

    assert len(caplog.messages) == 4


def test_further_arguments_are_figures(logger, clock, caplog):
    logger.error("%s: %d", "left", 1)
    logger.error("%s: %d", "left", 2)

    assert caplog.messages == ["openmeter_wsgi: left: 1"]


def test_debugging_is_never_thinned(logger, clock, caplog):
    logger.debug("again")
    logger.debug("again")

    assert caplog.messages == ["openmeter_wsgi: again"] * 2


@pytest.mark.parametrize("arguments", [({"a": 1},), (None,), (b"\xff",), ()])
def test_any_first_argument_will_do(logger, clock, caplog, arguments):
    template = "%s" if arguments else "nothing"
    logger.error(template, *arguments)
    logger.error(template, *arguments)

    assert len(caplog.messages) == 1


def test_what_is_remembered_is_bounded(logger, clock, caplog):
    logger.error("%s", "first")
    for number in range(log.MEMORY):
        logger.error("%s", number)
    logger.error("%s", "first")

    assert caplog.messages.count("openmeter_wsgi: first") == 2


def test_loggers_are_thinned_each_on_its_own(caplog):
    one = log.get_logger("openmeter_wsgi.tests.one")
    two = log.get_logger("openmeter_wsgi.tests.two")
    one.error("again")
    two.error("again")

    assert caplog.messages == ["openmeter_wsgi: again"] * 2
    one.filters.clear()
    two.filters.clear()


def test_no_line_of_the_package_has_the_name_of_the_package_twice():
    package = Path(log.__file__).parent
    texts = [
        f"{path.name}:{node.lineno}"
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith(log.PREFIX)
    ]

    assert [place.partition(":")[0] for place in texts] == ["log.py"], texts
