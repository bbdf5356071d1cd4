"""Tests of the unchanged files in examples/deploy that need more than Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from test_mod_wsgi import apache_directory, readable_copy, user

import openmeter_wsgi
from deployed import (
    BODY,
    DEPLOY,
    REQUESTS,
    free_address,
    gunicorn,
    make_state_directory,
    serving,
    settings,
    shipper,
)
from installed import InstalledServer, assert_billed_once
from openmeter_server import problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_server import OpenMeterServer, Request

UNITS = ("app.service", "openmeter-ship.service", "waitress.service")


def test_gunicorns_gevent_workers_deliver_what_still_waits_when_it_is_stopped(
    openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    env = settings(openmeter, WORKER_CLASS="gevent")
    env["OPENMETER_FLUSH_INTERVAL"] = "3600"

    with gunicorn(tmp_path / "log", env) as server:
        names = server.load(REQUESTS, BODY)
        server.stop()

    assert_billed_once(openmeter, names)


@pytest.mark.parametrize(
    "uwsgi", [str(Path(sys.executable).with_name("uwsgi")), "/usr/bin/uwsgi_python3"],
    ids=["todays", "debians"],
)  # fmt: skip
def test_uwsgi_delivers_while_it_is_idle_and_at_its_end(
    uwsgi: str, openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    env = settings(openmeter)
    # Debian's uWSGI runs Debian's Python, which ignores an editable install.
    package = str(Path(openmeter_wsgi.__file__).parents[1])
    path = [env["PYTHONPATH"], package, sysconfig.get_path("platlib")]
    env["PYTHONPATH"] = os.pathsep.join(path)
    command = [uwsgi, "--ini", str(DEPLOY / "uwsgi.ini")]

    with serving(command, free_address(), tmp_path / "log", env) as server:
        names = server.load(REQUESTS, BODY)
        openmeter.wait_for(len(names))
        server.get("/", subject="last")
        server.stop()

    assert_billed_once(openmeter, names | {"last"})


HOST = """
ServerRoot {directory}
ServerName localhost
Listen {host}:{port}
PidFile {directory}/pid
ErrorLog {directory}/errors
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule wsgi_module /usr/lib/apache2/modules/mod_wsgi.so
User {user}
Group #{group}
WSGISocketPrefix {directory}/wsgi
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with apache_directory() as made:
        yield made


def test_mod_wsgi_delivers_from_a_spool_of_its_user(
    openmeter: OpenMeterServer, directory: Path
) -> None:
    host, port = free_address()
    owner = user()
    code = readable_copy(directory / "code", DEPLOY / "wsgi.py")
    site = (DEPLOY / "apache.conf").read_text()
    site = site.replace("python-home=/srv/app/.venv ", "").replace(
        "/srv/app", str(code)
    )
    site = re.sub(
        r"user=\S+ group=\S+", f"user={owner.pw_name} group=#{owner.pw_gid}", site
    )
    configuration = directory / "apache.conf"
    configuration.write_text(
        HOST.format(
            directory=directory, host=host, port=port,
            user=owner.pw_name, group=owner.pw_gid,
        ) + site
    )  # fmt: skip
    env = settings(openmeter, OPENMETER_SPOOL_DIR=str(directory / "spool"))
    command = ["/usr/sbin/apache2", "-f", str(configuration), "-DFOREGROUND"]

    with InstalledServer(command, (host, port), directory / "errors", env) as server:
        names = server.load(REQUESTS, BODY)
        openmeter.wait_for(len(names))
        server.stop()

    assert_billed_once(openmeter, names)


@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_nothing_wrong_with_a_unit(name: str, tmp_path: Path) -> None:
    for unit in UNITS:
        text = (DEPLOY / unit).read_text()
        (tmp_path / unit).write_text(text.replace("/srv/app/.venv", sys.prefix))

    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    complaints = [line for line in done.stderr.splitlines() if str(tmp_path) in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


@pytest.fixture
def compose() -> Any:
    """The contents of the compose file."""
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def one_event_a_request(request: Request) -> Any:
    """Answer as a collector that accepts only single events."""
    return problem(400, "invalid event") if request.is_array else None


def test_the_containers_deliver_to_a_collector(
    compose: Any, openmeter: OpenMeterServer, tmp_path: Path
) -> None:
    """Run the commands of the containers, with their variables, on this machine."""
    app, ship = (compose["services"][name] for name in ("app", "ship"))
    spool = make_state_directory(tmp_path / "spool")
    openmeter.rule = one_event_a_request
    changed = settings(openmeter, OPENMETER_SPOOL_DIR=str(spool))
    log = tmp_path / "ship.log"
    command = [os.path.join(sys.exec_prefix, "bin", ship["command"][0])]

    with shipper([*command, *ship["command"][1:]], log, ship["environment"] | changed):
        with gunicorn(tmp_path / "log", app["environment"] | changed) as server:
            names = server.load(REQUESTS, BODY)
            server.stop()
        openmeter.wait_for(len(names))

    assert_billed_once(openmeter, names)
    assert not any(request.is_array for request in openmeter.requests)
    assert f"{REQUESTS} events delivered, 0 dead letters" in log.read_text()


def test_the_containers_share_the_image_the_server_and_a_volume(compose: Any) -> None:
    app, ship = (compose["services"][name] for name in ("app", "ship"))
    spool = re.search(r"OPENMETER_SPOOL_DIR=(\S+)", (DEPLOY / "Dockerfile").read_text())

    assert spool is not None
    assert app["build"] == ship["build"]
    assert app["volumes"] == ship["volumes"] == [f"spool:{spool[1]}"]
    assert "spool" in compose["volumes"]
    only_app = app["environment"].items() - ship["environment"].items()
    assert only_app == {("OPENMETER_DELIVERY", "ship")}
    collector = compose["services"]["collector"]
    read = yaml.safe_load((DEPLOY / "collector.yaml").read_text())
    port = read["input"]["http_server"]["address"].rpartition(":")[2]
    assert ship["environment"]["OPENMETER_API_URL"] == f"http://collector:{port}"
    assert read["buffer"]["sqlite"]["path"].startswith("/var/lib/collector/")
    assert "collector:/var/lib/collector" in collector["volumes"]
