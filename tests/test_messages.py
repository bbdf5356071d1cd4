"""Each mistake of a beginner gets one sentence with its remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flask
import pytest

from openmeter_wsgi import ConfigError, OpenMeterMiddleware, Policy
from openmeter_wsgi.flask import OpenMeter
from spool_support import COMMAND

if TYPE_CHECKING:
    from collections.abc import Callable

WITHOUT = """
import sys
sys.modules[{module!r}] = None
import openmeter_wsgi.{extra}
"""
ON_WINDOWS = """
import sys
import openmeter_wsgi.policy, openmeter_wsgi.process
from openmeter_wsgi import OpenMeterMiddleware
sys.platform = "win32"
OpenMeterMiddleware(print, dry_run=True)
"""


def run(program: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environ, capture_output=True, text=True, check=False,
    )  # fmt: skip


def problem(make: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as refused:
        make()
    return str(refused.value)


@pytest.mark.parametrize(
    ("extra", "module"),
    [
        ("flask", "flask"), ("django", "django"), ("prometheus", "prometheus_client"),
    ],
)  # fmt: skip
def test_a_missing_extra_is_named(extra: str, module: str) -> None:
    last = run(WITHOUT.format(extra=extra, module=module)).stderr.splitlines()[-1]

    assert last == (
        f"ModuleNotFoundError: openmeter_wsgi.{extra}: {module} is not installed; run: "
        f"pip install 'openmeter_wsgi[{extra}]'"
    )


def test_windows_is_refused() -> None:
    assert run(ON_WINDOWS).stderr.splitlines()[-1] == (
        "openmeter_wsgi.errors.ConfigError: openmeter_wsgi runs on Linux, macOS and "
        "other POSIX systems, not on Windows: use WSL or a container"
    )


@pytest.mark.parametrize("app", [None, "app"])
def test_what_is_no_application_is_refused(app: Any) -> None:
    assert problem(lambda: OpenMeterMiddleware(app, dry_run=True)) == (
        f"app: expected a WSGI application (a callable), got {app!r}"
    )


@pytest.mark.parametrize("name", ["meter", "meters", "customer", "reserve", "routes"])
def test_an_error_in_json_has_an_example(name: str) -> None:
    variable = f"OPENMETER_{name.upper()}"
    text = problem(lambda: Policy.from_env({variable: "{x}", "OPENMETER_DRY_RUN": "1"}))

    assert text.startswith(f"{variable}: JSON is malformed")
    example = text.partition("; expected JSON such as ")[2].removesuffix(", got '{x}'")
    counted = ["tokens"] if name == "reserve" else []
    environ = {variable: example, "OPENMETER_DRY_RUN": "1"}
    assert Policy.from_env(environ, entitlement_meters=counted)


@pytest.mark.parametrize("name", ["spool_dir", "api_key_file"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_relative_path_is_resolved_at_the_start(
    name: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").write_text("key")
    monkeypatch.chdir(tmp_path)

    policy = Policy(dry_run=True, **{name: kind("here")})  # type: ignore[arg-type]

    assert getattr(policy, name) == str(tmp_path / "here")


@pytest.mark.parametrize("path", [3, ""])
def test_what_is_no_path_is_refused(path: Any) -> None:
    said = problem(lambda: Policy(dry_run=True, spool_dir=path))

    assert said == f"spool_dir: expected a path, got {path!r}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("o.toml", "batch_size = 7"), ("o.json", '{"batch_size": 7}'),
        ("o.JSON", '{"batch_size": 7}'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_of_any_editor_is_read(
    name: str, text: str, encoding: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, encoding=encoding)

    assert Policy.from_file(tmp_path / name, dry_run=True).batch_size == 7


@pytest.mark.parametrize("key", ['"om_key"', "'om_key'"])
def test_a_key_in_quotes_is_refused(key: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{key}\n")

    assert problem(lambda: Policy(api_key=key)).startswith(
        "api_key: expected a key without quotes around it"
    )
    said = problem(lambda: Policy(api_key_file=tmp_path / "key"))
    assert said.startswith("api_key_file ")
    assert "expected a key without quotes around it" in said
    assert "om_key" not in said


def test_flask_names_the_source_of_events_by_its_application() -> None:
    for said, expected in (({}, "shop.api"), ({"event_source": "till"}, "till")):
        app = flask.Flask("shop.api")
        OpenMeter(app, dry_run=True, **said)
        policy = app.extensions["openmeter"].policy
        assert policy.event_source == expected


def test_a_name_that_is_no_source_is_left_out() -> None:
    app = flask.Flask("my shop")
    OpenMeter(app, dry_run=True)

    assert app.extensions["openmeter"].policy.event_source == "openmeter_wsgi"


# -- The command line


def test_a_terminal_of_another_encoding_gets_escapes() -> None:
    process = subprocess.run(
        [*COMMAND, "check", "--help"], check=False, capture_output=True, text=True,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip

    assert (process.returncode, process.stderr) == (0, "")
    assert "\\u2026" in process.stdout


def test_a_full_disk_ends_a_command_with_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [*COMMAND, "--help"], check=False, stdout=full, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    assert process.returncode == 1
    assert process.stderr == (
        "openmeter-wsgi: the output cannot be written: No space left on device\n"
    )


def test_a_closed_pipe_ends_a_command_in_silence() -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [*COMMAND, "--help"], check=False, stdout=write, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    os.close(write)

    assert (process.returncode, process.stderr) == (1, "")
