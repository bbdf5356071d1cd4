import json
import os
import signal
import subprocess
from datetime import datetime

import pytest

from openmeter_server import HANG, Answer
from spool_support import COMMAND, days_ago, event, put, shipping, worker


def run(*arguments, **variables):
    return subprocess.run(
        [*COMMAND, "ship", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
        env=os.environ | {"OPENMETER_API_URL": "http://127.0.0.1:9"} | variables,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_delivers_what_dead_and_living_workers_put_until_a_signal(
    number, tmp_path, openmeter
):
    spool = tmp_path / "spool"
    put(spool, event("dead"))
    with worker(spool) as living, shipping(spool, openmeter) as ship:
        living.put(event("living"))
        openmeter.wait_for(2)

        code, log = ship.end(number)

    assert (code, sorted(openmeter.ids)) == (0, ["dead", "living"])
    assert f"this process is the sender of {spool} to {openmeter.url}" in log
    assert "2 events delivered, 0 dead letters, 0 events left" in log
    assert openmeter.duplicates == {}


@pytest.mark.parametrize(("days", "warned"), [(6.9, False), (8.6, True)])
def test_it_warns_of_events_that_kafka_may_delete(tmp_path, openmeter, days, warned):
    spool = tmp_path / "spool"
    put(spool, event("1", time=days_ago(days)), event("2", time=days_ago(0)))
    with shipping(spool, openmeter) as ship:
        openmeter.wait_for(2)

        _, log = ship.end(signal.SIGTERM)

    assert ("the oldest waiting event is 9 days old; Kafka" in log) is warned
    assert ("retention.ms" in log) is warned


def test_it_gives_up_within_the_shutdown_timeout_and_says_what_is_left(
    tmp_path, openmeter
):
    spool = tmp_path / "spool"
    put(spool, event("1"), event("2"))
    openmeter.script.append(HANG)
    with shipping(spool, openmeter, shutdown_timeout=0.1) as ship:
        openmeter.wait_for_requests(1)

        code, log = ship.end(signal.SIGTERM)

    assert code == 0
    assert "0 events delivered, 0 dead letters, 2 events left" in log
    assert "Traceback" not in log


def test_a_second_one_waits_and_takes_over_when_the_first_is_killed(
    tmp_path, openmeter
):
    spool = tmp_path / "spool"
    put(spool, event("1"))
    with shipping(spool, openmeter) as first:
        first.wait_for("is the sender")
        with shipping(spool, openmeter) as second:
            waiting = second.wait_for("takes over when it ends")
            first.process.kill()

            second.wait_for("is the sender")

            put(spool, event("2"))
            openmeter.wait_for(2)
            assert second.end(signal.SIGTERM)[0] == 0
    assert f"process {first.process.pid};" in waiting


def test_one_that_waits_for_its_turn_ends_at_once(tmp_path, openmeter):
    spool = tmp_path / "spool"
    put(spool, event("1"))
    with shipping(spool, openmeter) as first:
        first.wait_for("is the sender")
        with shipping(spool, openmeter, shutdown_timeout=60) as second:
            second.wait_for("takes over when it ends")

            assert second.end(signal.SIGTERM)[0] == 0


def test_it_waits_in_an_empty_directory_for_the_first_worker(tmp_path, openmeter):
    spool = tmp_path / "spool"
    spool.mkdir(mode=0o700)
    with shipping(spool, openmeter) as ship:
        ship.wait_for("is the sender")
        put(spool, event("1"))
        openmeter.wait_for(1)

        assert ship.end(signal.SIGTERM)[0] == 0


def test_an_answer_that_would_forge_lines_stays_one_line(tmp_path, openmeter):
    spool = tmp_path / "spool"
    put(spool, event("1"))
    openmeter.rule = lambda _: Answer(401, b"\x1b[31mno\r\n2026 forged\xe2\x80\xae")
    with shipping(spool, openmeter, shutdown_timeout=0) as ship:
        line = ship.wait_for("OpenMeter answered 401")
        _, log = ship.end(signal.SIGTERM)

    assert " ERROR openmeter_wsgi: OpenMeter answered 401" in line
    assert "forged" in line
    assert line.strip().isprintable()
    assert not {"\x1b", "\r", "\u202e"} & set(log)


def test_a_directory_that_is_none_is_one_line(tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "letter.txt").touch()
    newer = tmp_path / "newer"
    newer.mkdir(mode=0o700)
    (newer / "format").write_text("openmeter_wsgi spool 9\n")

    results = [run("--spool-dir", d) for d in (tmp_path / "none", plain, newer)]

    assert [result.returncode for result in results] == [1, 1, 1]
    said = [result.stderr for result in results]
    assert said[0] == f"Error: '{tmp_path}/none': No such file or directory\n"
    assert said[1] == f"Error: '{plain}' is not a spool: it has no file 'format'\n"
    assert said[2].startswith("Error: spool_dir: expected 'openmeter_wsgi spool 1'")
    assert [text.count("\n") for text in said] == [1, 1, 1]
    assert not (tmp_path / "none").exists()


def test_another_users_directory_is_one_line_that_says_as_whom_to_run():
    # Either the root directory is not ours, or we can give one away.
    result = run("--spool-dir", "/") if os.geteuid() else _run_on_a_foreign_one()

    assert result.returncode == 1
    assert "belongs to user" in result.stderr
    assert "; run it as user" in result.stderr
    assert result.stderr.count("\n") == 1


def _run_on_a_foreign_one():
    import tempfile

    with tempfile.TemporaryDirectory() as foreign:
        os.chown(foreign, 12345, 12345)
        return run("--spool-dir", foreign)


def test_without_a_directory_it_says_how_to_name_one():
    result = run()

    assert result.returncode == 2
    assert "Missing option '--spool-dir'" in result.stderr


def test_a_policy_that_cannot_work_is_one_line(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir(mode=0o700)
    file = tmp_path / "policy.toml"
    file.write_text("batch_sise = 1\n")

    misspelt = run("--spool-dir", spool, "--policy", file)
    missing = run("--spool-dir", spool, "--policy", tmp_path / "none.toml")
    dry = run("--spool-dir", spool, OPENMETER_DRY_RUN="true")

    assert "did you mean 'batch_size'?" in misspelt.stderr
    assert "No such file" in missing.stderr
    assert "dry_run is set" in dry.stderr
    for result in (misspelt, missing, dry):
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_its_log_can_be_json(tmp_path, openmeter):
    spool = tmp_path / "spool"
    put(spool, event("1"))
    with shipping(spool, openmeter, "--json") as ship:
        line = json.loads(ship.wait_for("is the sender"))
        openmeter.wait_for(1)
        code, log = ship.end(signal.SIGTERM)

    assert line["level"] == "INFO"
    assert line["logger"] == "openmeter_wsgi.cli.ship"
    assert line["message"].startswith(f"this process is the sender of {spool}")
    assert datetime.fromisoformat(line["time"]).tzinfo is not None
    assert code == 0
    assert {*map(type, map(json.loads, log.splitlines()))} == {dict}
