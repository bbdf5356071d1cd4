"""A spool that version 0.1.0 has written is read on.

``fixtures/spool_0_1_0`` is what three killed processes left. The first had delivered 22
events, had one refused, and had sent five without an answer. The second had put ten
events by `write`, the third 150 through two mapped segments.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from openmeter_wsgi import OpenMeterMiddleware
from servers import Consumer, make_environ

FIXTURE = Path(__file__).parent / "fixtures" / "spool_0_1_0"
WAITING = {f"written{n}" for n in range(10)} | {f"mapped{n}" for n in range(150)}
UNANSWERED = {f"unanswered{n}" for n in range(5)}
YEARS = 1e9


@pytest.fixture
def spool(tmp_path):
    """A copy: version control keeps no permissions."""
    directory = tmp_path / "spool"
    directory.mkdir(mode=0o700)
    for file in FIXTURE.iterdir():
        shutil.copyfile(file, directory / file.name)
        (directory / file.name).chmod(0o600)
    return directory


def deliver(spool, url, **options):
    """Serve a request and deliver all, and return the problems of dead letters."""

    def app(environ, start_response):
        start_response("200 OK", [])
        return [b"ok"]

    middleware = OpenMeterMiddleware(
        app, spool_dir=str(spool), api_url=url, api_key="secret",
        meters={"requests": 1}, **options,
    )  # fmt: skip
    try:
        environ = make_environ(REMOTE_USER="own")
        response = middleware(environ, Consumer().start_response)
        list(response)
        response.close()
        assert middleware.flush(40)
        return middleware.stats()
    finally:
        middleware.close(40)


def taken(openmeter):
    """Count the deliveries of each event of the fixture, by its id."""
    return Counter(
        event["id"]
        for request in openmeter.requests
        for event in ([request.payload] if not request.is_array else request.payload)
        if event["subject"] != "own"
    )


def dead_letters(spool):
    lines = (spool / "dead-letters.jsonl").read_text().splitlines()
    return {json.loads(line)["event"]["id"] for line in lines}


def test_what_waits_is_delivered_once_and_what_was_delivered_never_again(
    spool, openmeter
):
    stats = deliver(spool, openmeter.url, resend_window=YEARS)

    assert taken(openmeter) == dict.fromkeys(WAITING | UNANSWERED, 1)
    assert dead_letters(spool) == {"refused0"}
    assert stats.dropped == {}
    assert list(spool.glob("17959206*")) == []  # every segment of it is done with


def test_what_was_sent_without_an_answer_is_not_sent_again_after_the_window(
    spool, openmeter
):
    deliver(spool, openmeter.url, resend_window=0.001)

    assert taken(openmeter) == dict.fromkeys(WAITING, 1)
    assert dead_letters(spool) == {"refused0"} | UNANSWERED
