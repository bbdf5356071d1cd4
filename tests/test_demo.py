"""The demo accepts a right bill, reports a wrong one, and ends its processes."""

import contextlib
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import requests

from examples.demo import access
from examples.demo.access import Check
from examples.demo.comparison import Billed, differences
from examples.demo.expectation import Account, expect
from examples.demo.load import Answer, Kind, Request, plan
from examples.demo.report import conclude_access, make_console
from openmeter_wsgi import Policy
from openmeter_wsgi.sandbox.store import Store

ROOT = Path(__file__).parents[1]
TIMEOUT = 50
#: Runs the demo; the arguments are options of the sandbox.
WITH_SANDBOX = (
    "import sys; from examples.demo.__main__ import main; "
    "sys.exit(main(['--requests', '60'], sandbox=sys.argv[1:]))"
)
COLUMNS = "seq, id, source, type, subject, time, data, ingested_at, stored_at"
LOSE = "DELETE FROM events WHERE seq = NEW.seq"
REPEAT = (
    f"INSERT INTO events ({COLUMNS}) "
    f"SELECT NEW.seq + 1000000{COLUMNS.removeprefix('seq')} FROM events "
    "WHERE seq = NEW.seq"
)


def environ():
    return os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}


def demo(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environ(),
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT,
        check=False,
    )


@contextlib.contextmanager
def started(*arguments):
    """Run the demo within the context, and terminate it at the end."""
    command = [sys.executable, "-m", "examples.demo", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env=environ(), stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                # Not kill(): its child processes would stay.
                process.terminate()


def read_until(process, text):
    """Return the output of *process* up to the line that contains *text*."""
    printed = []
    for line in process.stdout:
        printed.append(line)
        if text in line:
            return "".join(printed)
    pytest.fail(f"{text!r} did not come after:\n{''.join(printed)}")


def addresses(printed):
    return {
        (host, int(port)) for host, port in re.findall(r"//([\d.]+):(\d+)", printed)
    }


def is_listening(address):
    with socket.socket() as client:
        return client.connect_ex(address) == 0


def test_the_billed_usage_is_the_expected_usage():
    run = demo("-m", "examples.demo", "--requests", "300")

    assert (run.returncode, run.stderr) == (0, "")
    assert "The bill is right." in run.stdout
    usage = run.stdout.partition("Usage")[2].partition("Delivery")[0]
    rows = re.findall(r"([\d,]+) +([\d,]+) +([✓✗])", usage)
    assert len(rows) == 4 * 4  # subjects by meters
    assert all(expected == billed and sign == "✓" for expected, billed, sign in rows)
    delivery = run.stdout.partition("Delivery")[2].partition("Access")[0]
    (repeated,) = re.findall(r"repeated events dropped +([\d,]+)", delivery)
    (not_billed,) = re.findall(r"requests not billed +([\d,]+)", delivery)
    assert int(repeated) > 0
    assert f"{not_billed} by their status code" in delivery


def test_entitlements_are_checked_and_right():
    run = demo("-m", "examples.demo", "--requests", "40")

    access = run.stdout.partition("\nAccess")[2].partition("✓ Access is right.")[0]
    rows = [line for line in access.splitlines() if "✓" in line]
    assert "✗" not in access
    assert len(rows) == 9
    for said in (
        "403 no_access",
        "20x 200, 5x 429, Retry-After",
        '200, {"formats": ["csv"]}',
        "acme 200, hooli 200",
        "acme 503, hooli 503, Retry-After",
        "acme 200, hooli 403",
    ):
        assert said in access


def test_wrong_access_is_named(capsys):
    checks = [
        Check("acme", "200", "200"),
        Check("  hooli", "403 no_access", "200"),
    ]

    wrong = conclude_access(make_console(), checks)

    assert wrong == ["hooli: expected 403 no_access, got 200"]
    assert "Access is wrong" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fail_mode", "entitlement_meters", "enforce"])
def test_an_option_that_is_ignored_is_found(monkeypatch, name):
    """If one of these options were ignored, the demo would report it."""
    defaults = {"fail_mode": "open", "entitlement_meters": {}, "enforce": False}

    def without_option(**options):
        return Policy(**{**options, name: defaults[name]})

    monkeypatch.setattr(access, "Policy", without_option)

    assert not all(check.is_right for check in access.run_checks())


def test_a_log_file_gets_no_animation_and_no_long_lines():
    run = demo("-m", "examples.demo", "--requests", "40")

    assert "\x1b" not in run.stdout
    assert "\r" not in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param(LOSE, "1 missing", id="lost"),
        pytest.param(REPEAT, "1 too many", id="counted twice"),
    ],
)
def test_a_server_with_one_event_too_few_or_too_many_fails_the_demo(
    tmp_path, fault, said
):
    database = tmp_path / "sandbox.sqlite"
    Store(database).close()
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.executescript(
            "CREATE TABLE faults (seq);"
            "CREATE TRIGGER once AFTER INSERT ON events "
            "WHEN NOT EXISTS (SELECT * FROM faults) "
            f"BEGIN INSERT INTO faults VALUES (NEW.seq); {fault}; END"
        )

    run = demo("-c", WITH_SANDBOX, "--database", str(database))

    assert run.returncode == 1, run.stdout
    assert "The bill is wrong:" in run.stdout
    assert said in run.stdout


def test_the_output_of_a_server_that_does_not_start_is_shown():
    run = demo("-c", WITH_SANDBOX, "--visible-after", "never")

    assert run.returncode == 1
    assert "sandbox ended before it listened" in run.stdout
    assert "'never' is not a valid float" in run.stdout


@pytest.mark.parametrize(
    "arguments", [("--requests", "0"), ("--requests", "x"), ("--fail-rate", "0.9")]
)
def test_options_are_checked_before_anything_is_started(arguments):
    run = demo("-m", "examples.demo", *arguments)

    assert run.returncode == 2
    assert "expected a" in run.stderr


def test_left_running_it_serves_until_it_is_interrupted():
    with started("--requests", "40", "--keep") as process:
        printed = read_until(process, "The usage of acme")
        printed += process.stdout.readline()
        url = re.search(r"(http://\S+/products)", printed)[1]
        answer = requests.get(url, headers={"X-API-Key": "acme-key"}, timeout=TIMEOUT)
        process.send_signal(signal.SIGINT)
        status = process.wait(TIMEOUT)

    assert "The bill is right." in printed
    assert answer.json() == ["anvil", "rocket skates"]
    assert status == 0
    assert len(addresses(printed)) == 2
    assert not any(map(is_listening, addresses(printed)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_under_load_it_leaves_nothing_running(number):
    with started("--requests", "1000000") as process:
        printed = read_until(process, "Flask on gunicorn")
        listening = [is_listening(address) for address in addresses(printed)]
        process.send_signal(number)
        status = process.wait(TIMEOUT)

    assert listening == [True, True]
    assert status == 130
    assert not any(map(is_listening, addresses(printed)))


def test_the_same_seed_draws_the_same_requests_of_every_kind():
    assert plan(200, seed=7) == plan(200, seed=7)
    assert plan(200, seed=7) != plan(200, seed=8)
    assert {request.kind for request in plan(len(Kind), seed=7)} == set(Kind)


CHAT = Request(Kind.CHAT, "acme", "/chat", {"model": "large"})
CHAT_ANSWER = Answer(200, b'{"usage": {"prompt": 3, "completion": 4}}')


def test_the_expected_usage_follows_from_the_answers():
    expected = expect([(CHAT, CHAT_ANSWER)])

    assert expected.events == 4
    assert expected.usage == {
        Account("acme", "api_requests"): 1,
        Account("acme", "credits"): 5,
        Account("acme", "tokens", "large"): 7,
    }


@pytest.mark.parametrize(
    ("request_", "answer", "said"),
    [
        (CHAT, Answer(503, b""), "language model: expected status 200, got 503"),
        (CHAT, Answer(200, b"", whole=False), "language model: the answer broke off"),
        (
            Request(Kind.STREAM, "acme", "/export", page_bytes=2, pages=2),
            Answer(200, b"xx"),
            "stream to its end: 2 bytes came of /export",
        ),
    ],
)
def test_an_unexpected_answer_is_a_difference(request_, answer, said):
    expected = expect([(request_, answer)])

    assert differences(expected, Billed(Counter(), [], {})) == [said]


def stored(*ids, flaw=None):
    events = [{"event": {"source": "s", "id": one}} for one in ids]
    return [one | {"validationError": flaw} if flaw else one for one in events]


def test_each_kind_of_mismatch_is_named():
    expected = expect([(CHAT, CHAT_ANSWER)])
    usage = Counter(expected.usage)
    right = Billed(usage, stored("1", "2", "3", "4"), {})

    less = usage - Counter({Account("acme", "tokens", "large"): 3})
    missing = Billed(less, stored("1", "2", "3"), {})
    foreign = Billed(usage | Counter({Account("eve", "credits"): 1}), right.events, {})
    twice = Billed(usage, stored("1", "2", "3", "3"), {})
    flawed = Billed(usage, stored("1", "2", "3", "4", flaw="no meter"), {})

    assert differences(expected, right) == []
    assert differences(expected, missing) == [
        "usage of acme tokens large: expected 7, billed 4",
        "events: expected 4, found 3: 1 missing",
    ]
    assert differences(expected, foreign) == [
        "usage of eve credits: expected 0, billed 1"
    ]
    assert differences(expected, twice) == ["event 3: stored 2 times"]
    assert differences(expected, flawed)[0] == "event 1: no meter"


def test_the_counts_of_the_workers_must_agree():
    expected = expect([(CHAT, CHAT_ANSWER)])
    counts = {
        "settled": 1, "delivered": 3, "waiting": 1, "dead_lettered": 0,
        "not_metered": {}, "dropped": {},
    }  # fmt: skip
    found = Billed(
        Counter(expected.usage), stored("1", "2", "3", "4"), {}, workers=[counts]
    )

    assert differences(expected, found) == [
        "events delivered, by the workers' count: expected 4, got 3",
        "events left waiting, by the workers' count: expected 0, got 1",
    ]
    silent = Billed(found.usage, found.events, {}, workers=[])
    assert len(differences(expected, silent)) == 2
