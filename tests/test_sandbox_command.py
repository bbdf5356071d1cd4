import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import requests

from openmeter_wsgi.sandbox import Sandbox
from servers import TIMEOUT
from test_sandbox_support import Api, event

COMMAND = [sys.executable, "-X", "dev", "-W", "error", "-m", "openmeter_wsgi"]
LINE = re.compile(r"OpenMeter sandbox listens on (http://\S+)\n")


@contextmanager
def running(*options):
    arguments = [*COMMAND, "sandbox", "--port", "0", *options]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            yield process, LINE.fullmatch(line)[1]
        finally:
            process.kill()


def run(*arguments, **options):
    options |= {"capture_output": True, "text": True, "timeout": TIMEOUT}
    return subprocess.run([*COMMAND, *arguments], check=False, **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_success_while_a_connection_is_open(number):
    with running() as (process, url), Api(url) as api:
        assert api.ingest(event()).status_code == 204

        process.send_signal(number)

        out, err = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, out, err) == (0, "", "")


def test_the_options_reach_the_sandbox(tmp_path):
    database = tmp_path / "usage.sqlite"
    options = ["--database", str(database), "--no-dedupe", "--fail-rate", "0.01"]
    with running(*options) as (_, url), Api(url) as api:
        overview = api.overview()

    assert overview["faults"]["ingest"]["failRate"] == 0.01
    assert overview["dedupe"] is False
    assert database.exists()


def test_the_address_can_be_json():
    arguments = [*COMMAND, "sandbox", "--port", "0", "--json"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        url = json.loads(process.stdout.readline())["url"]
        with Api(url) as api:
            assert api.ingest(event()).status_code == 204
        process.kill()


def test_the_removed_option_latency_names_its_replacement():
    refused = run("sandbox", "--latency", "2")

    assert refused.returncode == 2
    assert "is no longer an option: write --fault ingest:latency=2" in refused.stderr


def test_faults_can_be_there_from_the_start():
    faults = ["entitlements:outage", "ingest:retry-after=5", "both:latency=0.01"]
    faults += ["entitlements:denied", "ingest:refused-type=x", "ingest:claim"]
    options = [word for fault in faults for word in ("--fault", fault)]
    with running(*options, "--visible-after", "2.5") as (_, url), Api(url) as api:
        overview = api.overview()

    ingest, entitlements = overview["faults"].values()
    assert (ingest["outage"], ingest["retryAfter"], ingest["latency"]) == (
        False, 5, 0.01,
    )  # fmt: skip
    assert (entitlements["outage"], entitlements["retryAfter"]) == (True, None)
    assert (entitlements["latency"], entitlements["denied"]) == (0.01, 401)
    assert (ingest["refusedType"], ingest["claim"]) == ("x", True)
    assert overview["visibleAfter"] == 2.5


def test_a_port_in_use_is_one_line_that_says_how_to_choose_another():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        result = run("sandbox", "--port", str(port))

    assert result.returncode == 1
    assert result.stderr == (
        f"Error: port {port} is in use; choose another with --port (0: any free port)\n"
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:0"),
        (["--database", "/nowhere/x.sqlite"], "--database /nowhere/x.sqlite: unable"),
        (["--database", __file__], "file is not a database"),
        (["--fail-rate", "2"], "2.0 is not in the range"),
        (["--fault", "outage"], "'outage': expected ingest|entitlements|both:"),
        (["--fault", "both:hang"], "'both:hang': it needs a value"),
        (["--fault", "both:hang=long"], "could not convert string to float: 'long'"),
        (["--fault", "both:hang=700"], "hang: expected a number from 0 to 600"),
        (["--fault", "both:outage=1"], "outage has no value"),
        (["--fault", "both:forget"], "expected ingest|entitlements|both:"),
        (["--fault", "both:denied=402"], "denied: expected 401 or 403, got 402"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_without_a_traceback(options, reason):
    result = run("sandbox", "--port", "0", *options)

    assert result.returncode > 0
    assert reason in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("package", ["click", "rich", "flask"])
def test_a_missing_extra_is_one_line_that_says_what_to_install(package, tmp_path):
    broken = tmp_path / f"{package}.py"
    broken.write_text(f"raise ModuleNotFoundError('no', name={package!r})")

    result = run("sandbox", env=os.environ | {"PYTHONPATH": str(tmp_path)})

    assert result.returncode == 1
    assert result.stderr == (
        f"openmeter-wsgi: {package} is not installed; "
        "run: pip install 'openmeter_wsgi[sandbox]'\n"
    )


def test_the_help_names_the_commands_without_importing_flask(tmp_path):
    (tmp_path / "flask.py").write_text("raise SystemError('imported')")

    listed = run("--help", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    unknown = run("nothing")

    assert "sandbox" in listed.stdout
    assert (listed.returncode, unknown.returncode) == (0, 2)


def stored(sandbox):
    with sandbox.store.reading() as connection:
        return connection.execute("SELECT count(*) FROM events").fetchone()[0]


def test_closing_finishes_the_request_under_way_and_leaves_no_thread():
    sandbox = Sandbox(latency=30)
    with Api(sandbox.url) as api:
        answers = []
        request = threading.Thread(target=lambda: answers.append(api.ingest(event())))
        request.start()
        while not stored(sandbox):
            request.join(0.01)

        sandbox.close()
        sandbox.close()
        request.join()

    assert [answer.status_code for answer in answers] == [204]
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("openmeter_wsgi.sandbox")]


def test_a_closed_sandbox_does_not_answer():
    with Sandbox() as sandbox:
        url = sandbox.url

    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=TIMEOUT)


def test_it_listens_on_ipv6_where_there_is_one():
    try:
        sandbox = Sandbox(host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    with sandbox, Api(sandbox.url) as api:
        assert api.ingest(event()).status_code == 204


def test_many_threads_write_and_read_at_once():
    with Sandbox() as sandbox:

        def work(worker: int) -> None:
            with Api(sandbox.url) as api:
                for number in range(20):
                    api.ingest([event(f"{worker}-{number}-{n}") for n in range(10)])
                    api.value("calls")

        with Api(sandbox.url) as api:
            api.meter("calls", "COUNT")
            workers = [threading.Thread(target=work, args=(n,)) for n in range(8)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

            assert api.value("calls") == 1600
