import fcntl
import json
import os
import pty
import signal
import stat
import struct
import subprocess
import termios

import pytest
from click.testing import CliRunner

from openmeter_server import HANG, Answer, problem
from openmeter_wsgi.cli.spool import command
from openmeter_wsgi.sandbox import Sandbox
from openmeter_wsgi.spool.files import MAPPED, WRITTEN
from openmeter_wsgi.spool.server_directories import Server, assign
from spool_support import (
    COMMAND,
    days_ago,
    event,
    json_output,
    put,
    run,
    shipping,
    status_of,
    worker,
)
from spooling import server_dir
from test_sandbox_support import Api

DEAD = "dead-letters.jsonl"
EVIL = "\x1b[31mred\r\n\u202eforged [bold]x[/bold]"


@pytest.fixture
def spool(tmp_path):
    return tmp_path / "spool"


def bury(spool, openmeter, *events):
    """Have *events* refused for good, by a sender that accepts another one."""
    openmeter.poison = {one["subject"] for one in events}
    before = len(openmeter.ids)
    put(spool, *_between_good_ones(events, before))
    with shipping(spool, openmeter) as ship:
        for _ in events:
            ship.wait_for("is refused by OpenMeter for good")
        openmeter.wait_for(before + len(events))
        assert ship.end(signal.SIGTERM)[0] == 0
    openmeter.poison = set()


def _between_good_ones(events, start):
    """Refused events in a row would be taken for a proxy speaking, and waited for."""
    for number, one in enumerate(events, start):
        yield from (one, event(f"good-{number}", subject="good"))


def doubt(spool, openmeter, *events):
    """Have a sender killed that waits for the answer to *events*."""
    openmeter.script.append(HANG)
    put(spool, *events)
    with shipping(spool, openmeter):
        openmeter.wait_for_requests(1)
    openmeter.release()


def expire(spool, openmeter, *events):
    doubt(spool, openmeter, *events)
    with shipping(spool, openmeter, resend_window="0.000001") as ship:
        ship.wait_for("dead letters")
        ship.end(signal.SIGTERM)


def ids(documents):
    return [one["event"]["id"] for one in documents]


@pytest.mark.parametrize("form", [MAPPED, WRITTEN])
def test_the_status_tells_living_owners_from_dead_ones(spool, form):
    put(spool, event("1", time="2020-01-01T00:00:00Z"), event("2"), form=form)
    with worker(spool, form) as living:
        living.put(event("3"))

        status = status_of(spool)

    assert (status["waiting"], status["sender_alive"]) == (3, False)
    assert status["oldest_age"] > 86_400
    held = [(s["owner_alive"], s["waiting"]) for s in status["segments"]]
    assert sorted(h for h in held if h[1]) == [(False, 2), (True, 1)]
    assert status["bytes"] == sum(s["bytes"] for s in status["segments"])


def test_the_status_names_the_sender_and_what_is_in_doubt(spool, openmeter):
    openmeter.script.append(HANG)
    put(spool, event("1"), event("2"))
    with shipping(spool, openmeter) as ship:
        openmeter.wait_for_requests(1)

        status = status_of(spool)

    assert (status["sender_pid"], status["sender_alive"]) == (ship.process.pid, True)
    assert (status["in_doubt"], status["waiting"]) == (2, 2)


def test_dead_letters_are_listed_counted_and_shown_with_their_reason(spool, openmeter):
    bury(spool, openmeter, event("bad", subject="carol"))

    (letter,) = json_output(spool, "list")
    status = status_of(spool)
    shown = run(spool, "show", "bad")

    assert letter["event"] == event("bad", subject="carol")
    assert (letter["status"], "must be an object" in letter["reason"]) == (400, True)
    assert status["dead_letters_by_reason"] == {f"400: {letter['reason']}": 1}
    assert json.loads(shown.output) == letter
    assert run(spool, "show", "good-0").exit_code == 1


def test_the_list_holds_waiting_events_where_they_are_wanted(spool):
    put(spool, event("1"))

    assert json_output(spool, "list") == []
    assert ids(json_output(spool, "list", "--waiting")) == ["1"]
    assert f"no dead letters in {spool}; 1 event waits (--waiting)\n" == (
        run(spool, "list").stderr
    )
    put(spool, event("2"))
    assert "; 2 events wait (--waiting)\n" in run(spool, "list").stderr


def test_what_is_requeued_is_delivered_under_its_id_once(spool, openmeter):
    letters = [event("a", subject="x"), event("b", subject="y")]
    bury(spool, openmeter, *letters)

    one = json_output(spool, "requeue", "a")
    left = ids(json_output(spool, "list"))
    rest = json_output(spool, "requeue", "--all")

    assert (one["requeued"], left, rest["requeued"]) == (1, ["b"], 1)
    assert json_output(spool, "list") == []
    assert (server_dir(spool) / DEAD).read_bytes() == b""
    with shipping(spool, openmeter):
        openmeter.wait_for(4)
    assert [e for e in openmeter.taken if e["id"] in "ab"] == letters
    assert openmeter.duplicates == {}


def test_of_requeued_events_that_kafka_may_delete_is_warned(spool, openmeter):
    letters = [
        event(str(days), subject="x", time=days_ago(days)) for days in (6.9, 7.1, 30)
    ]
    bury(spool, openmeter, *letters)

    young = run(spool, "requeue", "6.9")
    old = run(spool, "requeue", "--all")

    assert "Warning" not in young.stderr
    assert "Warning: 2 events are older than 7 days; Kafka" in old.stderr
    assert "retention.ms" in old.stderr
    assert old.stdout == "requeued 2 dead letters\n"


def test_dead_letters_are_requeued_and_purged_beside_a_sender(spool, openmeter):
    bury(spool, openmeter, event("a", subject="x"), event("b", subject="y"))
    with shipping(spool, openmeter) as ship:
        ship.wait_for("is the sender")
        before = (server_dir(spool) / DEAD).read_bytes()

        assert json_output(spool, "requeue", "a")["requeued"] == 1
        purged = json_output(spool, "purge", "b", "--yes")

        openmeter.wait_for(3)
        assert purged == {"purged": 1, "erased": False}
        assert json_output(spool, "list") == []
        # The sender appends to the file; nobody else may write it.
        assert (server_dir(spool) / DEAD).read_bytes() == before
        ship.end(signal.SIGTERM)
    with shipping(spool, openmeter) as ship:
        ship.wait_for("is the sender")
        assert (server_dir(spool) / DEAD).read_bytes() == b""
    assert openmeter.ids == ["good-0", "good-1", "a"]


def test_a_letter_that_is_refused_again_is_a_letter_again(spool, openmeter):
    bad = event("bad", subject="carol")
    bury(spool, openmeter, bad)
    json_output(spool, "requeue", "bad")
    openmeter.poison = {"carol"}
    put(spool, event("good-2"))
    with shipping(spool, openmeter) as ship:
        ship.wait_for("is refused by OpenMeter for good")
        ship.end(signal.SIGTERM)

    assert ids(json_output(spool, "list")) == ["bad"]


_KILLED = """
import resource, signal, sys
from openmeter_wsgi.cli import main

sys.dont_write_bytecode = True
# The kernel kills a process that writes past the limit.
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""


@pytest.mark.parametrize(
    ("limit", "marks", "copies"),
    [(0, 0, 1), (4_000, 5_000, 2), (4_000, 0, 1)],
    ids=["segment", "mark", "erasure"],
)
def test_a_requeue_killed_in_the_middle_of_a_write_loses_nothing(
    limit, marks, copies, spool, openmeter
):
    long = event("b", subject="y", data={"text": "x" * 6_000})
    bury(spool, openmeter, event("a", subject="x"), long)
    (server_dir(spool) / "dead-letters.settled.jsonl").write_bytes(b"\n" * marks)

    killed = subprocess.run(
        [COMMAND[0], "-c", _KILLED, str(limit), "spool", "--spool-dir", spool,
         "requeue", "a"],
        check=False,
    )  # fmt: skip

    assert killed.returncode == -signal.SIGXFSZ
    assert sorted(ids(json_output(spool, "list", "--waiting"))) == ["a"] * copies + [
        "b"
    ]
    assert json_output(spool, "requeue", "--all")["requeued"] >= 1
    with shipping(spool, openmeter):
        openmeter.wait_for(4)
    assert sorted(openmeter.ids) == ["a", "b", "good-0", "good-1"]


def test_a_requeue_without_room_leaves_the_letters(spool, openmeter):
    bury(spool, openmeter, event("a", subject="x"))
    full = {"max_spool_bytes": str(16 * 1024**2)}
    filler = server_dir(spool) / f"1700000000000-{'0' * 24}-00000001.written"
    with filler.open("wb") as file:
        file.truncate(16 * 1024**2)

    result = run(spool, "requeue", "--all", **full)

    assert result.exit_code == 1
    assert "max_spool_bytes is 16777216" in result.output
    assert ids(json_output(spool, "list")) == ["a"]


def test_marks_and_letters_that_were_cut_short_are_passed_over(spool, openmeter):
    bury(spool, openmeter, event("a", subject="x"))
    with (server_dir(spool) / DEAD).open("ab") as file:
        file.write(b'{"event": {"id"\n')
    (server_dir(spool) / "dead-letters.settled.jsonl").write_bytes(b"[12, ")

    assert ids(json_output(spool, "list")) == ["a"]
    assert json_output(spool, "purge", "--all", "--yes") == {
        "purged": 1,
        "erased": True,
    }
    assert json_output(spool, "list") == []


def test_purge_wants_a_yes_and_a_choice(spool, openmeter):
    bury(spool, openmeter, event("a", subject="x"), event("b", subject="y"))

    codes = [
        run(spool, "purge", *arguments).exit_code
        for arguments in (["--all"], ["--yes"], ["a", "--all", "--yes"], ["c", "--yes"])
    ]

    assert codes == [2, 2, 2, 1]
    assert json_output(spool, "purge", "a", "--yes") == {"purged": 1, "erased": True}
    assert ids(json_output(spool, "list")) == ["b"]
    assert b'"a"' not in (server_dir(spool) / DEAD).read_bytes()


def test_only_one_command_changes_dead_letters_at_a_time(spool, openmeter):
    bury(spool, openmeter, event("a", subject="x"))
    holder = subprocess.Popen(
        [COMMAND[0], "-c", _HOLD, str(server_dir(spool) / "dead-letters.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        holder.stdout.readline()

        result = run(spool, "requeue", "--all")

        holder.kill()
    assert result.exit_code == 1
    assert "another requeue or purge is running" in result.output
    assert ids(json_output(spool, "list")) == ["a"]


_HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print(flush=True)
    sys.stdin.read()
"""


def test_what_may_have_arrived_is_requeued_on_demand_only(spool, openmeter):
    expire(spool, openmeter, event("a"), event("b"))

    assert status_of(spool)["dead_letters_by_reason"] == {"expired": 2}
    assert json_output(spool, "requeue", "--all") == {
        "requeued": 0, "old": 0, "expired": 2, "no_event": 0,
    }  # fmt: skip
    assert json_output(spool, "requeue", "a", "--expired")["requeued"] == 1
    assert ids(json_output(spool, "list", "--waiting")) == ["b", "a"]


@pytest.mark.parametrize("flavor", ["v1", "v3"])
def test_verify_says_of_expired_letters_and_doubts_which_arrived(
    spool, openmeter, flavor
):
    expire(spool, openmeter, event("arrived"), event("arrived-not"))
    openmeter.requests.clear()
    doubt(spool, openmeter, event("doubt"))
    with Sandbox() as sandbox, Api(sandbox.url) as api:
        api.ingest([event("arrived"), event("doubt"), event("arrived-not", source="x")])

        assign(server_dir(spool), Server(sandbox.url, flavor))
        where = {"api_url": sandbox.url, "api_flavor": flavor}
        result = run(spool, "verify", "--json", **where)
        plain = run(spool, "verify", **where)

    found = {
        one["id"]: (one["state"], one["arrived"]) for one in json.loads(result.stdout)
    }
    assert found == {
        "doubt": ("in doubt", True),
        "arrived": ("expired", True),
        "arrived-not": ("expired", False),
    }
    assert (result.exit_code, plain.exit_code) == (3, 3)
    assert "expired\tarrived-not\ttest\tcustomer\tnot listed\n" in plain.stdout


@pytest.mark.parametrize(
    "answer",
    [problem(401), Answer(200, b"<html>"), Answer(200, b"{}x"), Answer(200, b"[1]")],
    ids=["401", "page", "broken", "other"],
)
@pytest.mark.parametrize("flavor", ["v1", "v3"])
def test_verify_takes_nothing_else_for_an_answer(answer, spool, openmeter, flavor):
    doubt(spool, openmeter, event("a"))
    assign(server_dir(spool), Server(openmeter.url, flavor))
    openmeter.rule = lambda _: answer

    result = run(
        spool, "verify", api_url=openmeter.url, api_key="om_secret", api_flavor=flavor
    )

    assert result.exit_code == 1
    path = {"v1": "/api/v1/events", "v3": "/api/v3/openmeter/events"}[flavor]
    assert result.output.startswith(f"Error: {openmeter.url}{path}")
    assert openmeter.requests[-1].headers["Authorization"] == "Bearer om_secret"
    assert "om_secret" not in result.output


def test_the_export_holds_dead_and_waiting_events(spool, openmeter, tmp_path):
    bury(spool, openmeter, event("dead", subject="x"))
    put(spool, event("waiting"))
    file = tmp_path / "export.jsonl"

    counts = json_output(spool, "export", str(file))
    again = run(spool, "export", str(file))

    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(one["state"], one["event"]["id"]) for one in lines] == [
        ("dead", "dead"), ("waiting", "waiting"),
    ]  # fmt: skip
    assert (counts["dead"], counts["waiting"]) == (1, 1)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (again.exit_code, "File exists" in again.output) == (1, True)


@pytest.mark.parametrize("arguments", [["list", "--waiting"], ["show", EVIL]], ids=str)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_nothing_from_a_request_steers_the_terminal(arguments, more, spool):
    put(spool, event(EVIL))

    bytes_ = on_a_terminal(spool, *arguments, *more)

    text = bytes_.decode().replace("\r\n", "\n")
    assert "\x1b[31m" not in text
    assert "\u202e" not in text
    assert "[31mred" in text
    assert "[bold]" in text


def on_a_terminal(spool, *arguments):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 200, 0, 0))
    with subprocess.Popen(
        [*COMMAND, "spool", "--spool-dir", str(spool), *arguments],
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "200"},
    ) as process:
        os.close(theirs)
        text = b""
        try:
            while more := os.read(ours, 65_536):
                text += more
        except OSError:  # how a terminal ends on Linux
            pass
    os.close(ours)
    assert process.returncode == 0, text
    return text


def test_the_commands_leave_no_trace_in_a_spool(spool):
    put(spool, event("1"))
    before = sorted(os.listdir(spool))

    for arguments in (["status"], ["list", "--waiting"], ["show", "1"], ["verify"]):
        run(spool, *arguments, api_url="http://127.0.0.1:9")

    assert sorted(os.listdir(spool)) == before


def test_every_subcommand_says_how_it_ends_without_a_directory():
    for name in ("status", "list", "show", "requeue", "purge", "export", "verify"):
        told = CliRunner().invoke(command, [name, "--help"]).output

        assert "Exit codes:\n    0  done\n    1  it could not be done" in told
        assert "--json" in told
    assert "    3  OpenMeter does not list some of them" in told


def test_a_subcommand_says_what_is_missing_or_no_spool(tmp_path):
    missing = CliRunner().invoke(command, ["status"])
    empty = run(tmp_path, "status")
    none = run(tmp_path / "none", "status")

    assert (missing.exit_code, empty.exit_code, none.exit_code) == (2, 1, 1)
    assert "Missing option '--spool-dir'" in missing.output
    assert "is not a spool" in empty.output
    assert "No such file or directory" in none.output
    assert os.listdir(tmp_path) == []
