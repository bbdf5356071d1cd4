"""``openmeter-wsgi send``, to servers that take, refuse and fall silent."""

import json
import os
import signal
import subprocess
from datetime import datetime

import pytest
from click.testing import CliRunner

from openmeter_server import HANG, Answer, problem
from openmeter_wsgi import Usage
from openmeter_wsgi.cli import send as sending
from openmeter_wsgi.cli.send import InvalidEvent, command, encode_event
from openmeter_wsgi.sandbox import Sandbox
from recorded_v3 import RECORDINGS as RECORDINGS_V3
from spool_support import COMMAND, days_ago, event, put, run
from test_sandbox_support import Api


def send(server, *arguments, stdin=None, **variables):
    environ = {f"OPENMETER_{k.upper()}": str(v) for k, v in variables.items()}
    return CliRunner().invoke(
        command,
        arguments,
        input=stdin,
        env={"OPENMETER_API_URL": server.url} | environ,
    )


def said(server, *arguments, code=0, **options):
    result = send(server, "--json", *arguments, **options)
    assert result.exit_code == code, (result.output, result.exception)
    return json.loads(result.stdout)


def lines(*documents):
    return "".join(json.dumps(one) + "\n" for one in documents)


# -- A single event


def test_a_single_event_is_sent_as_the_middleware_would(openmeter):
    result = send(openmeter, "--type", "call", "--subject", "acme", event_source="shop")

    (sent,) = openmeter.taken
    assert result.exit_code == 0
    assert result.output == f"sent 1 of 1 events: {sent['id']}\n"
    assert datetime.fromisoformat(sent.pop("time")).tzinfo is not None
    assert len(sent.pop("id")) == 32
    assert sent == {
        "specversion": "1.0",
        "type": "call",
        "source": "shop",
        "subject": "acme",
        "data": {"total": 1},
    }


def test_of_events_that_kafka_may_delete_is_warned_before_they_are_sent(openmeter):
    events = [
        event(str(days), time=days_ago(days), data={"total": 1}) for days in (1, 8, 9)
    ]

    several = send(openmeter, "-", stdin=lines(*events))
    one = send(
        openmeter, "--type", "a", "--subject", "b", "--time", days_ago(8), "--dry-run"
    )
    none = send(openmeter, "-", stdin=lines(events[0]))

    assert "Warning: 2 events are older than 7 days; Kafka" in several.stderr
    assert several.stdout == "sent 3 of 3 events\n"
    assert "Warning: 1 events are older" in one.stderr
    assert none.stderr == ""


def test_a_time_in_the_future_is_sent_as_now(openmeter):
    send(openmeter, "--type", "a", "--subject", "b", "--time", "2999-01-01T00:00:00Z")

    (sent,) = openmeter.taken
    assert sent["time"] < "2999"


def test_a_single_event_takes_all_attributes(openmeter):
    whole = {
        "type": "llm", "subject": "acme", "id": "7", "source": "shop",
        "time": "2026-11-01T10:00:00Z", "data": '{"tokens": 12}',
    }  # fmt: skip
    options = [word for name, text in whole.items() for word in (f"--{name}", text)]

    send(openmeter, *options)

    assert openmeter.taken == [
        whole | {"specversion": "1.0", "data": {"tokens": 12}}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "problem_"),
    [
        ([], "Give FILE, or else --type and --subject"),
        (["-", "--type", "call"], "Give FILE, or else --type and --subject"),
        (["--type", "call"], "subject: expected text, got None"),
        (["--subject", "acme"], "type: expected text, got None"),
        (["--type", "a", "--subject", "b", "--data", "x"], "--data: expected JSON"),
        (["--type", "a", "--subject", "b", "--data", "[]"], "expected a JSON object"),
        (["--type", "a", "--subject", "b", "--time", "noon"], "expected RFC 3339"),
        (["--type", "a", "--subject", "b", "--source", "a:b c"], "URI reference"),
        (["none.jsonl"], "No such file"),
    ],
)
def test_a_wrong_call_is_told_from_a_failure(openmeter, arguments, problem_):
    result = send(openmeter, *arguments)

    assert result.exit_code == 2
    assert problem_ in " ".join(result.output.split())
    assert openmeter.requests == []


def test_a_wrong_configuration_is_told_from_a_failure(openmeter):
    result = send(openmeter, "--type", "a", "--subject", "b", batch_size="many")

    assert result.exit_code == 2
    assert "OPENMETER_BATCH_SIZE" in result.output


# -- A file


def test_a_file_is_sent_in_batches_and_stdin_too(openmeter):
    events = [event(str(n)) for n in range(5)]

    found = said(openmeter, "-", stdin=lines(*events), batch_size=2)

    assert found == {
        "valid": 5, "sent": 5, "invalid": [], "refused": [], "waits": None,
        "error": None,
    }  # fmt: skip
    assert [len(request.events) for request in openmeter.requests] == [2, 2, 1]
    assert [one.pop("time")[-1] for one in openmeter.taken] == ["Z"] * 5
    assert openmeter.taken == events


def test_what_spool_export_writes_is_sent(openmeter, tmp_path):
    put(tmp_path / "spool", event("a"), event("b"))
    file = str(tmp_path / "events.jsonl")
    assert run(tmp_path / "spool", "export", file).exit_code == 0

    said(openmeter, file)

    assert openmeter.ids == ["a", "b"]


def test_a_file_that_is_sent_again_is_not_billed_again():
    text = lines(event("a"), event("b"))
    with Sandbox() as sandbox, Api(sandbox.url) as api:
        said(sandbox, "-", stdin=text)
        said(sandbox, "-", stdin=text)

        assert len(api.events()) == 2


@pytest.mark.parametrize(
    ("line", "problem_"),
    [
        ("{", "expected JSON"),
        ("[1]", "expected an event, a JSON object, got [1]"),
        (event("1", subject=None), "subject: expected text, got None"),
        (event("1", type=""), "type: expected text, got ''"),
        (event(None), "id: expected text, by which OpenMeter drops repetitions"),
        (event("1", data=[1]), "expected a JSON object, got [1]"),
        (event("1", time="2026-11-01"), "expected RFC 3339"),
        (event("1", specversion="0.3"), "specversion: expected '1.0', got '0.3'"),
        (event("1", datacontenttype="text/xml"), "expected 'application/json'"),
        (event("1", plan="gold"), "plan: OpenMeter does not keep this attribute"),
    ],
)
def test_nothing_is_sent_if_a_line_is_invalid(openmeter, line, problem_):
    line = line if isinstance(line, str) else json.dumps(line)
    text = f"{json.dumps(event('good'))}\n\n{line}\n"

    found = said(openmeter, "-", stdin=text, code=3)

    (flaw,) = found["invalid"]
    assert (flaw["line"], found["sent"], found["valid"]) == (3, 0, 1)
    assert problem_ in flaw["problem"]
    assert openmeter.requests == []


def test_the_valid_lines_are_sent_if_that_is_wanted(openmeter):
    text = "{\n" + lines(event("good"))

    result = send(openmeter, "-", "--skip-invalid", stdin=text)

    assert result.exit_code == 3
    assert openmeter.ids == ["good"]
    assert result.stderr.startswith("line 1: expected JSON")
    assert result.stdout == "sent 1 of 2 events: good\n"


def test_events_without_an_id_get_one_if_that_is_wanted(openmeter):
    said(openmeter, "-", "--new-ids", stdin=lines(event(None), event("b"), event(None)))

    assert len({*openmeter.ids}) == 3
    assert openmeter.ids[1] == "b"


def test_a_dry_run_checks_and_sends_nothing(openmeter):
    text = lines(event("a")) + "{\n"

    result = send(openmeter, "-", "--dry-run", stdin=text)

    assert result.exit_code == 3
    assert result.stdout == "1 valid, 1 invalid; nothing was sent\n"
    assert openmeter.requests == []


def test_of_many_problems_the_first_are_shown(openmeter):
    result = send(openmeter, "-", stdin="{\n" * 30)

    complaints = result.stderr.splitlines()
    assert (len(complaints), complaints[-1]) == (21, "… and 10 more")


def test_a_refused_event_is_named_and_the_others_are_taken(openmeter):
    openmeter.poison = {"carol"}
    events = [event("a"), event("b", subject="carol"), event("c")]

    found = said(openmeter, "-", stdin=lines(*events), code=3)

    (refusal,) = found["refused"]
    assert refusal["id"] == "b"
    assert "400: request body has an error" in refusal["reason"]
    assert sorted(openmeter.ids) == ["a", "c"]


# -- A server that is away


def test_an_attempt_without_an_answer_is_repeated_with_the_same_events(
    openmeter, monkeypatch
):
    monkeypatch.setattr(sending, "_FIRST_DELAY", 0.01)
    openmeter.script += [Answer(503), Answer(429, headers={"Retry-After": "0"})]

    found = said(openmeter, "-", stdin=lines(event("a")))

    assert found["sent"] == 1
    assert len({request.body for request in openmeter.requests}) == 1
    assert len(openmeter.requests) == 3


def test_it_gives_up_when_the_time_is_over_and_says_what_is_left(openmeter):
    openmeter.rule = lambda request: (
        None if request.ids == ["a"] else problem(503, "no room")
    )

    result = send(
        openmeter, "-", "--retry-for", "0",
        stdin=lines(event("a"), event("b"), event("c")), batch_size=1,
    )  # fmt: skip

    assert result.exit_code == 1
    assert result.stdout == "sent 1 of 3 events\n"
    assert result.stderr.startswith(
        "Error: OpenMeter answers 503: no room; not sent: 2. Send the same events again"
    )


@pytest.mark.parametrize(
    ("answer", "told"),
    [(problem(401, "who?"), "answers 401: who?"), (None, "connection refused")],
)
def test_a_wrong_key_or_address_is_one_line_that_names_it(openmeter, answer, told):
    if answer is None:
        openmeter.down()
    openmeter.rule = lambda request: answer

    result = send(openmeter, "--type", "a", "--subject", "b", "--retry-for", "0")

    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert told in result.stderr


def test_an_interruption_says_what_is_left(openmeter, tmp_path):
    openmeter.script += [Answer(204), HANG]
    file = tmp_path / "events.jsonl"
    file.write_text(lines(event("a"), event("b")))
    variables = {"OPENMETER_API_URL": openmeter.url, "OPENMETER_BATCH_SIZE": "1"}
    with subprocess.Popen(
        [*COMMAND, "send", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    ) as process:
        openmeter.wait_for_requests(2)

        process.send_signal(signal.SIGINT)

        out, err = process.communicate(timeout=40)
    assert (process.returncode, out) == (1, "sent 1 of 2 events\n")
    assert err.startswith("Error: interrupted; not sent: 1.")


def test_a_key_never_shows(openmeter):
    openmeter.rule = lambda request: problem(401, request.headers["Authorization"])

    result = send(openmeter, "--type", "a", "--subject", "b", api_key="om_secret")

    assert result.exit_code == 1
    assert "om_secret" not in result.output


def test_the_installed_command_sends(openmeter):
    process = subprocess.run(
        [*COMMAND, "send", "--type", "call", "--subject", "acme"],
        env=os.environ | {"OPENMETER_API_URL": openmeter.url},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )

    assert (process.returncode, process.stderr) == (0, "")
    assert openmeter.subjects == ["acme"]


# -- Events that version 3 refuses

#: Of these the attribute that is wrong is filled in, or left out.
MENDED = {"missing.id", "missing.source", "missing.specversion", "data.nullvalue"}
REFUSED_BY_V3 = {
    name.removeprefix("ingest."): recording
    for name, recording in RECORDINGS_V3.items()
    if name.startswith("ingest.")
}


def _attribute(name):
    kind, _, rest = name.partition(".")
    if kind in {"missing", "empty", "number"}:
        return rest
    return "subscription" if kind == "extension" else kind


@pytest.mark.parametrize("name", REFUSED_BY_V3)
def test_what_v3_refuses_is_refused_before_it_is_sent_or_mended(name):
    """For a wrong source or specversion, its message is only "Bad Request"."""
    recording = REFUSED_BY_V3[name]
    assert recording.status == 400

    if name in MENDED:
        encoded = encode_event(recording.sent, source="shop", new_id="new")
        assert json.loads(encoded)["specversion"] == "1.0"
        assert None not in json.loads(encoded)["data"].values()
    else:
        with pytest.raises(InvalidEvent, match=_attribute(name)):
            encode_event(recording.sent, source="shop")


# -- A key, and the spool


def single(*more):
    return ["--type", "tokens", "--subject", "acme", *more]


def test_a_key_makes_the_event_that_a_job_would_record_under_it(openmeter):
    usage = Usage(api_url=openmeter.url)
    usage.record("acme", {"tokens": 1}, key="job-17")
    usage.close()
    for _ in range(2):
        send(openmeter, *single("--key", "job-17"))
    send(openmeter, *single("--key", "job-18"))

    ids = [sent["id"] for sent in openmeter.taken]
    assert ids[0] == ids[1] == ids[2] != ids[3]


@pytest.mark.parametrize(
    ("arguments", "problem_"),
    [
        (single("--key", "k", "--id", "7"), "Give --id or --key, not both"),
        (single("--key", ""), "--key: expected text that is not empty"),
        (["-", "--key", "k"], "Give FILE, or else --type and --subject"),
        (["--subject", "acme", "--key", "k"], "type: expected text"),
    ],
)
def test_a_key_that_cannot_be_used_is_named(openmeter, arguments, problem_):
    result = send(openmeter, *arguments)

    assert (result.exit_code, openmeter.taken) == (2, [])
    assert problem_ in result.stderr


def test_with_a_spool_it_sends_through_it_and_tells_what_was_refused(
    openmeter, tmp_path
):
    openmeter.poison = {"carol"}
    spool = tmp_path / "spool"
    for name in ("bad", "worse"):
        documents = [event("good"), event(name, subject="carol")]
        told = said(
            openmeter, "-", stdin=lines(*documents), spool_dir=spool, code=3,
            flush_interval=0.05,
        )  # fmt: skip

        assert (told["sent"], told["waits"], told["error"]) == (1, None, None)
        assert [one["id"] for one in told["refused"]] == [name]
    assert {sent["id"] for sent in openmeter.taken} == {"good"}


def test_with_a_spool_nothing_is_lost_while_openmeter_is_away(openmeter, tmp_path):
    spool = tmp_path / "spool"
    openmeter.down()
    first = send(openmeter, *single("--retry-for", "0.1"), spool_dir=spool)
    openmeter.up()
    second = send(
        openmeter, *single("--key", "k"), spool_dir=spool, flush_interval=0.05
    )

    assert (first.exit_code, second.exit_code) == (0, 0)
    assert first.stdout.startswith("wrote 1 of 1 events: ")
    assert f"the events wait in '{spool}'; the next process" in first.stderr
    assert second.stdout.startswith("sent 1 of 1 events: ")
    assert second.stderr == ""
    assert len(openmeter.taken) == 2


def test_a_spool_that_is_none_is_a_bad_configuration(openmeter, tmp_path):
    (tmp_path / "file").write_text("")

    result = send(openmeter, *single(), spool_dir=tmp_path / "file")

    assert result.exit_code == 2
    assert "spool_dir" in result.stderr
