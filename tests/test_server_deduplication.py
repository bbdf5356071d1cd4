"""Log lines of a starting sender: a server may count repeated events twice."""

import json
import logging

import pytest

from openmeter_wsgi import log
from openmeter_wsgi.log import PREFIX
from openmeter_wsgi.spool import stored_answers
from spooling import event, server_dir, spool_queue


@pytest.fixture
def spool(tmp_path):
    path = tmp_path / "spool"
    path.mkdir(mode=0o700)
    return path


def lines(caplog):
    """Return level and text of the log lines about deduplication."""
    return [
        (record.levelname, record.getMessage().removeprefix(PREFIX))
        for record in caplog.records
        if record.name == stored_answers.__name__
    ]


def deliver(spool, openmeter, *, times=1):
    queue = spool_queue(spool, openmeter.url)
    for n in range(times):
        queue.put(event(str(n)))
        assert queue.flush(40)
        queue.close(40)


def test_what_is_not_known_is_warned_of_once_a_process(
    spool, openmeter, caplog, monkeypatch
):
    monkeypatch.setattr(log, "REPEAT_INTERVAL", 0)
    caplog.set_level(logging.INFO)
    deliver(spool, openmeter, times=3)

    ((level, text),) = lines(caplog)
    assert level == "WARNING"
    assert text.startswith(f"it is not known if OpenMeter at {openmeter.url} dedup")
    assert "run 'openmeter-wsgi check'" in text
    assert openmeter.ids == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("deduplicates", "level", "said"),
    [(True, "INFO", "deduplicates, checked "), (False, "WARNING", "sink.dedupe")],
)
def test_what_a_check_has_found_is_said(
    spool, openmeter, caplog, deduplicates, level, said
):
    caplog.set_level(logging.INFO)
    stored_answers.save_verdict(
        spool, "http://127.0.0.1:9", deduplicates=not deduplicates
    )
    stored_answers.save_verdict(
        server_dir(spool, openmeter.url), openmeter.url, deduplicates=deduplicates
    )
    deliver(spool, openmeter)

    ((found, text),) = lines(caplog)
    assert found == level
    assert said in text
    assert (
        stored_answers.load_verdict(
            server_dir(spool, openmeter.url), openmeter.url
        ).time
        in text
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no json",
        b'{"deduplicates": true}',
        b'\xff{"deduplicates": true}',
        json.dumps(
            {"api_url": "http://other", "deduplicates": True, "time": "2026"}
        ).encode(),
    ],
)
def test_a_verdict_that_says_nothing_of_this_server_is_none(spool, caplog, content):
    (spool / stored_answers.VERDICT_NAME).write_bytes(content)
    stored_answers.log_verdict(spool, "http://here")

    ((level, text),) = lines(caplog)
    assert (level, "it is not known" in text) == ("WARNING", True)


def test_a_verdict_behind_a_link_is_none(spool, tmp_path):
    stored_answers.save_verdict(tmp_path, "http://here", deduplicates=True)
    (spool / stored_answers.VERDICT_NAME).symlink_to(
        tmp_path / stored_answers.VERDICT_NAME
    )

    assert stored_answers.load_verdict(spool, "http://here") is None


@pytest.mark.parametrize(
    ("url", "known"),
    [
        ("https://openmeter.cloud", True),
        ("https://eu.openmeter.cloud", True),
        ("https://openmeter.cloud.example", False),
        ("https://notopenmeter.cloud", False),
    ],
)
def test_openmeter_cloud_deduplicates(spool, caplog, url, known):
    caplog.set_level(logging.INFO)
    stored_answers.log_verdict(spool, url)

    ((level, text),) = lines(caplog)
    assert level == ("INFO" if known else "WARNING")
    assert url in text


def test_a_process_that_never_sends_says_nothing(spool, openmeter, caplog):
    caplog.set_level(logging.INFO)
    queue = spool_queue(spool, openmeter.url, delivery="ship")
    queue.put(event("1"))
    queue.start()
    queue.close(1)

    assert lines(caplog) == []
