"""One spool for several servers: each gets its own events, under its own key."""

import itertools
from collections import Counter

import pytest

from openmeter_server import HANG, OpenMeterServer
from openmeter_wsgi.errors import SpoolError
from openmeter_wsgi.spool import server_directories
from openmeter_wsgi.spool.server_directories import Server, server_directory
from spool_support import json_output, run
from spooling import PATIENCE, Process, event, segments, spool_queue, until
from test_check import found

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def spool(tmp_path):
    return tmp_path / "spool"


@pytest.fixture
def production(openmeter):
    with OpenMeterServer() as server:
        yield server


@pytest.fixture
def queue(spool, openmeter):
    """Return a function that makes queues on the one spool."""
    made = []

    def make(url, **options):
        made.append(spool_queue(spool, url, **options))
        return made[-1]

    yield make
    openmeter.heal()
    for one in made:
        one.close(PATIENCE)


def left_behind(spool, url, *ids):
    """Have a process put events for a server and die."""
    with Process(LEAVING, str(spool), url, *ids) as process:
        assert process.line() == "put"
        process.kill()


LEAVING = """
import sys
from pathlib import Path
from spooling import event, spool_queue
queue = spool_queue(Path(sys.argv[1]), sys.argv[2])
for id_ in sys.argv[3:]:
    queue.put(event(id_))
print("put", flush=True)
sys.stdin.read()
"""


# -- Each server has its own directory


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://openmeter.cloud", "http://openmeter.cloud"),
        ("https://openmeter.cloud", "https://openmeter.cloud/eu"),
        ("https://a-b.example", "https://a.b.example"),
        ("http://127.0.0.1:8888", "http://127.0.0.1:8889"),
    ],
)
def test_different_servers_have_different_directories(one, other):
    assert Server(one).directory_name != Server(other).directory_name
    assert Server(one).directory_name != Server(one, "v3").directory_name


def test_the_name_of_a_directory_is_that_of_the_server():
    name = Server("https://EU.Example.com:8443/meter/").directory_name
    assert name.startswith("eu.example.com-8443-meter-v1-")
    same = Server("https://eu.example.com:8443/meter").directory_name
    assert name == same


def test_staging_and_production_get_their_own_events_with_their_own_key(
    queue, openmeter, production
):
    one = queue(openmeter.url, api_key="staging")
    other = queue(production.url, api_key="production")
    for n in range(20):
        one.put(event(f"s{n}"))
        other.put(event(f"p{n}"))
    assert one.flush(PATIENCE)
    assert other.flush(PATIENCE)

    assert Counter(openmeter.ids) == Counter(f"s{n}" for n in range(20))
    assert Counter(production.ids) == Counter(f"p{n}" for n in range(20))
    assert one.problems == other.problems == []


# -- Events that nobody delivers


def test_events_of_an_address_without_a_process_are_named_and_kept(
    spool, queue, openmeter, caplog
):
    left_behind(spool, NOWHERE, "1", "2")
    one = queue(openmeter.url)
    one.put(event("own"))
    assert one.flush(PATIENCE)

    assert openmeter.ids == ["own"]
    lines = [r.getMessage() for r in caplog.records if NOWHERE in r.getMessage()]
    assert len(lines) == 1
    assert f"2 events wait for {NOWHERE}, and no running process" in lines[0]
    status = {one["api_url"]: one for one in json_output(spool, "status")["servers"]}
    assert (status[NOWHERE]["in_use"], status[NOWHERE]["waiting"]) == (False, 2)
    assert status[openmeter.url]["in_use"]
    assert "assign --to URL" in run(spool, "status").stderr


def test_a_check_names_them(spool, sandbox):
    left_behind(spool, NOWHERE, "1")
    findings = found("--no-dedupe-check", api_url=sandbox.url, spool_dir=spool)
    named = findings["events of other servers"]
    assert named["severity"] == "warning"
    assert f"1 events wait for {NOWHERE}" in named["found"]


# -- Assigning them


def test_assigned_events_go_to_the_running_process_of_that_server_once(
    spool, queue, openmeter
):
    one = queue(openmeter.url)
    one.put(event("own"))
    assert one.flush(PATIENCE)
    left_behind(spool, NOWHERE, "1", "2", "3")

    answer = json_output(spool, "assign", "--to", openmeter.url)

    assert answer == {"assigned": 3, "from": NOWHERE, "to": openmeter.url}
    openmeter.wait_for(4)
    assert sorted(openmeter.ids) == ["1", "2", "3", "own"]
    until(lambda: len(json_output(spool, "status")["servers"]) == 1)  # it is removed
    assert segments(spool) == [] or one.waiting == 0
    assert not openmeter.duplicates


def test_assigned_events_wait_for_a_process_that_starts_later(spool, queue, openmeter):
    left_behind(spool, NOWHERE, "1")
    assert json_output(spool, "assign", "--to", openmeter.url)["assigned"] == 1
    assert json_output(spool, "status")["waiting"] == 1

    one = queue(openmeter.url)
    one.start()
    openmeter.wait_for(1)
    assert one.flush(PATIENCE)
    assert one.waiting == 0


def test_what_may_have_arrived_stays_in_doubt_after_it_is_assigned(
    spool, queue, openmeter, production
):
    openmeter.script.append(HANG)
    with Process(LEAVING, str(spool), openmeter.url, "doubt") as process:
        assert process.line() == "put"
        openmeter.wait_for_requests(1)
        process.kill()
    openmeter.release()
    json_output(spool, "assign", "--to", production.url)
    assert json_output(spool, "status")["in_doubt"] == 1

    one = queue(production.url, resend_window=0.001)
    one.start()
    until(lambda: one.counts.dead_lettered == 1)
    assert production.ids == []
    assert [one["event"]["id"] for one in json_output(spool, "list")] == ["doubt"]


def test_nothing_that_a_running_process_uses_is_assigned(spool, queue, openmeter):
    openmeter.down()
    one = queue(openmeter.url)
    one.put(event("1"))
    one.start()
    until(lambda: json_output(spool, "status")["servers"][0]["sender_alive"])

    result = run(spool, "assign", "--to", NOWHERE)
    assert result.exit_code == 1
    assert "no events wait for an address" in result.output
    with pytest.raises(SpoolError, match="a running process uses it"):
        server_directories.assign(
            server_directory(spool, Server(openmeter.url)), Server(NOWHERE)
        )


def test_of_several_addresses_one_must_be_named(spool):
    left_behind(spool, NOWHERE, "1")
    left_behind(spool, "http://127.0.0.1:8", "2")
    target = "http://127.0.0.1:7"

    result = run(spool, "assign", "--to", target)
    assert result.exit_code == 2
    assert NOWHERE in result.output
    named = json_output(spool, "assign", "--to", target, "--from", NOWHERE)
    assert named["assigned"] == 1
    again = json_output(spool, "assign", "--to", target, "--from", "http://127.0.0.1:8")
    assert again["assigned"] == 1
    assert json_output(spool, "status")["waiting"] == 2


def test_what_is_no_address_is_refused(spool):
    left_behind(spool, NOWHERE, "1")
    result = run(spool, "assign", "--to", "production")
    assert result.exit_code == 2
    assert "expected a URL such as https://openmeter.cloud" in result.output


def test_a_kill_while_events_are_assigned_loses_and_doubles_none(spool):
    left_behind(spool, NOWHERE, *map(str, range(50)))
    for moved in (1, 4, 9):
        with Process(ASSIGNING, str(spool)) as process:
            for _ in range(moved):
                process.line()
            process.kill()
        documents = json_output(spool, "list", "--waiting")
        assert Counter(one["event"]["id"] for one in documents) == Counter(
            map(str, range(50))
        )


ASSIGNING = """
import itertools, sys
from pathlib import Path
from openmeter_wsgi.spool import server_directories
root = Path(sys.argv[1])
for n in itertools.count():
    (orphan,) = server_directories.orphans(root)
    target = server_directories.Server(f"http://127.0.0.1:{n % 2 + 1}")
    server_directories.assign(orphan.directory, target)
    print("assigned", flush=True)
"""


# -- Two keys for one server


def two_keys(queue):
    return [one for one in queue.problems if one.code == "two_keys"]


def test_two_running_processes_with_different_keys_both_say_so(
    spool, queue, openmeter, caplog
):
    with Process(KEYED, str(spool), openmeter.url, "om_other") as process:
        assert process.line() == "put"
        one = queue(openmeter.url, api_key="om_mine")
        one.put(event("mine"))
        until(lambda: two_keys(one))
        process.process.stdin.write(b"\n")
        process.process.stdin.flush()
        assert process.line() == "two_keys"
        texts = {r.getMessage() for r in caplog.records if r.levelname == "ERROR"}
        assert any("with another api_key" in text for text in texts)
        process.kill()
    for path in spool.rglob("*"):
        assert path.is_dir() or b"om_" not in path.read_bytes()


KEYED = """
import sys, time
from pathlib import Path
from spooling import event, spool_queue
queue = spool_queue(Path(sys.argv[1]), sys.argv[2], api_key=sys.argv[3])
queue.put(event("other"))
print("put", flush=True)
sys.stdin.readline()
while not (found := [p.code for p in queue.problems if p.code == "two_keys"]):
    time.sleep(0.01)
print(found[0], flush=True)
sys.stdin.read()
"""


def test_the_new_key_of_a_process_after_a_dead_one_is_a_rotation(
    spool, queue, openmeter
):
    with Process(KEYED, str(spool), openmeter.url, "om_old") as process:
        assert process.line() == "put"
        until(lambda: _is_marked(spool))
        process.kill()
    one = queue(openmeter.url, api_key="om_new")
    one.put(event("mine"))
    assert one.flush(PATIENCE)
    until(lambda: one._keys._due_at and _is_marked(spool, least=1))
    one.put(event("mine too"))
    assert one.flush(PATIENCE)
    assert not two_keys(one)


def test_a_key_that_is_replaced_in_its_file_is_no_second_one(
    spool, queue, openmeter, tmp_path, caplog
):
    """The sender reads it again after a 401, and the others when they see its key."""
    file = tmp_path / "key"
    file.write_text("om_old")
    options = {"api_key": None, "api_key_file": str(file)}
    one, other = queue(openmeter.url, **options), queue(openmeter.url, **options)
    one.put(event("1"))
    until(lambda: one._keys._mark)
    other.put(event("2"))
    until(lambda: other._keys._mark)
    file.write_text("om_new")
    assert one._policy.key.renew()  # as after a 401
    until(lambda: one._keys._key_text == "om_new")

    n = itertools.count(3)
    until(lambda: other.put(event(str(next(n)))) or other._keys._key_text == "om_new")
    assert not two_keys(other)
    until(lambda: not two_keys(one))


def _is_marked(spool, least=1):
    return sum(path.read_bytes() != b"" for path in spool.rglob("*.lock")) >= least


def test_two_middlewares_of_one_process_with_different_keys_say_so(queue, openmeter):
    one = queue(openmeter.url, api_key="om_one")
    other = queue(openmeter.url, api_key="om_other")
    one.put(event("1"))
    until(lambda: one._writer.owner is not None)
    other.put(event("2"))
    until(lambda: two_keys(one) or two_keys(other))
