"""Usage outside a request goes the way of the middleware's events, to the letter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from billing import bill
from openmeter_wsgi import MeterValueError, Usage, set_meters
from openmeter_wsgi.testing import OpenMeter
from servers import TIMEOUT, environment
from spooling import spool_policy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from openmeter_server import OpenMeterServer
    from openmeter_wsgi.sandbox import Sandbox
    from test_sandbox_support import Api

MANY = [{"type": "llm", "data": {"n": n}} for n in (1, 2)]


@pytest.fixture
def usage(openmeter: OpenMeterServer) -> Iterator[Usage]:
    made = Usage(api_url=openmeter.url, event_source="shop")
    yield made
    made.close()


def sent(usage: Usage, openmeter: OpenMeterServer) -> list[dict[str, Any]]:
    assert usage.flush(TIMEOUT)
    taken: list[dict[str, Any]] = openmeter.taken
    return taken


def test_an_event_is_as_the_middleware_would_send_it(
    usage: Usage, openmeter: OpenMeterServer
) -> None:
    meters = [{"calls": 2}, *MANY]
    usage.record("acme", meters)
    ours = sent(usage, openmeter)[:]
    theirs = bill(openmeter, lambda request: set_meters(request, meters))[len(ours) :]

    def shape(events: list[dict[str, Any]]) -> list[Any]:
        own = {"id", "time", "source"}
        return [
            ({k: v for k, v in e.items() if k not in own}, e["id"].partition(":")[2])
            for e in events
        ]

    assert shape(ours) == shape(theirs)
    assert {event["source"] for event in ours} == {"shop"}
    assert [event["id"].partition(":")[2] for event in ours] == [
        "calls", "llm", "llm:2",
    ]  # fmt: skip


def test_a_document_may_say_its_own_id_subject_and_time(
    usage: Usage, openmeter: OpenMeterServer
) -> None:
    own = {"id": "7", "subject": "globex", "time": "2026-01-02T03:04:05Z"}
    usage.record("acme", {"type": "llm", "data": {}, **own})

    (event,) = sent(usage, openmeter)
    assert {name: event[name] for name in own} == own


@pytest.mark.parametrize(
    "meters",
    [
        None, "calls", 5, [1], {"calls": -1}, {"calls": "1"}, {"calls": float("nan")},
        {"": 1}, {"type": "a", "value": 1}, {"type": "a", "data": [1]},
        {"type": "a", "time": "now"}, {"calls": 10**70},
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_as_in_a_handler(
    usage: Usage, openmeter: OpenMeterServer, meters: Any
) -> None:
    def handler(request: Any) -> None:
        with pytest.raises(MeterValueError) as refused:
            set_meters(request, meters)
        problems.append(str(refused.value))

    problems: list[str] = []
    bill(openmeter, handler)
    with pytest.raises(MeterValueError) as refused:
        usage.record("acme", meters)

    assert [str(refused.value)] == problems
    assert sent(usage, openmeter) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"subject": ""}, "subject: expected"),
        ({"subject": None}, "subject: expected"),
        ({"subject": "a\0"}, "subject: "),
        ({"key": ""}, "key: expected"),
        ({"key": 17}, "key: expected"),
        ({"meters": {"a" * 1_000_000: 1}}, "too large"),
    ],
)
def test_a_bad_subject_key_or_size_is_named_and_nothing_is_billed(
    usage: Usage, openmeter: OpenMeterServer, arguments: Any, problem: str
) -> None:
    with pytest.raises(MeterValueError, match=problem):
        usage.record(**{"subject": "acme", "meters": {"calls": 1}} | arguments)
    usage.record("acme", {"calls": 0})

    assert usage.stats().events == 0
    assert sent(usage, openmeter) == []


def test_a_repetition_under_its_key_is_the_same_event_and_the_first_amount_counts(
    sandbox: Sandbox, api: Api
) -> None:
    api.meter("tokens", "SUM", "$.total", eventType="tokens")
    usage = Usage(api_url=sandbox.url)
    for subject, tokens, key in (
        ("acme", 150, "job-17"), ("acme", 999, "job-17"),
        ("globex", 1, "job-17"), ("acme", 5, "job-18"), ("acme", 7, None),
        ("acme", 7, None),
    ):  # fmt: skip
        usage.record(subject, {"tokens": tokens}, key=key)
    usage.close()

    rows = api.rows("tokens", groupBy="subject")
    assert {row["subject"]: row["value"] for row in rows} == {
        "acme": 150 + 5 + 7 + 7, "globex": 1,
    }  # fmt: skip


def test_threads_and_a_fork_bill_each_for_themselves(
    usage: Usage, openmeter: OpenMeterServer
) -> None:
    usage.record("parent", {"calls": 1})
    if not (child := os.fork()):
        usage.record("child", {"calls": 1})
        usage.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

    def many(subject: str) -> None:
        for _ in range(50):
            usage.record(subject, {"calls": 1})

    threads = [threading.Thread(target=many, args=[f"t{n}"]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    events = sent(usage, openmeter)
    assert len({event["id"] for event in events}) == len(events) == 1 + 1 + 4 * 50
    assert usage.stats().events == usage.stats().delivered == 201


SCRIPT = """
import os, sys
from openmeter_wsgi import Usage
usage = Usage(api_url=sys.argv[1], spool_dir=sys.argv[2] or None)
usage.record("acme", {"calls": 1}, key="k")
if sys.argv[2]:
    os.kill(os.getpid(), 9)
"""


def run(*arguments: str) -> int:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", SCRIPT, *arguments],
        env=environment(), timeout=TIMEOUT, check=False,
    ).returncode  # fmt: skip


def test_a_script_sends_at_its_exit(openmeter: OpenMeterServer) -> None:
    assert run(openmeter.url, "") == 0

    assert [event["subject"] for event in openmeter.taken] == ["acme"]


def test_with_a_spool_an_event_survives_kill_9_once_it_is_recorded(
    openmeter: OpenMeterServer, quick_path: Path
) -> None:
    spool = quick_path / "spool"
    assert run(openmeter.url, str(spool)) == -signal.SIGKILL

    usage = Usage(spool_policy(spool, openmeter.url))
    usage.record("acme", {"calls": 1}, key="k")
    usage.record("acme", {"others": 1}, key="k")
    taken = sent(usage, openmeter)
    usage.close()
    assert len({event["id"] for event in taken}) == 2
    assert {event["type"] for event in taken} == {"calls", "others"}


def test_a_test_sees_what_a_job_records(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Usage(api_url="http://127.0.0.1:1")
    with OpenMeter() as openmeter:
        for usage in (before, Usage(meters={"never": 1})):
            usage.record("acme", {"calls": 3})
        openmeter.assert_metered("calls", subject="acme", total=6, times=2)
        openmeter.assert_not_metered("never")
    assert before.health().ok
