"""All commands together: exit codes, documentation, completion."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import get_completion_class
from click.testing import CliRunner

from openmeter_wsgi import cli
from openmeter_wsgi.version import VERSION
from spool_support import COMMAND

PAGE = Path(__file__).parents[1] / "docs" / "command-line.md"
TEXT = PAGE.read_text()
GROUP = cli._group()
EXAMPLES = re.findall(r"^\$ (.*)$", TEXT, re.M)


def leaves(command=GROUP, path=()):
    """Yield every command that does something, by the words that call it."""
    context = click.Context(command)
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        if isinstance(inner, click.Group):
            yield from leaves(inner, (*path, name))
        else:
            yield " ".join((*path, name)), inner


COMMANDS = dict(leaves())


def codes_in(text):
    return [int(code) for code in re.findall(r"^ *(\d)  \S", text or "", re.M)]


def documented():
    """Return the commands of the page's table, and the exit codes it gives them."""
    rows = re.findall(r"^\| \[`([a-z ]+)`\].*\| ([\d ]+) \|$", TEXT, re.M)
    return {name: [int(code) for code in codes.split()] for name, codes in rows}


def test_the_page_names_every_command_with_its_exit_codes():
    assert documented() == {
        name: codes_in(command.epilog) for name, command in COMMANDS.items()
    }


def test_the_page_explains_every_exit_code():
    explained = dict(re.findall(r"^\| (\d) \| (.+) \|$", TEXT, re.M))

    assert {*map(int, explained)} == {
        code for command in COMMANDS.values() for code in codes_in(command.epilog)
    }
    for code, meaning in re.findall(r"^  (\d)  (.*)$", GROUP.epilog, re.M):
        assert explained[code].startswith(meaning.partition(";")[0])


def test_the_page_has_an_example_of_every_command():
    called = " ".join(EXAMPLES)
    for name in COMMANDS:
        first, _, second = name.partition(" ")
        options = r"( -\S+ \S+)*? " if second else ""
        assert re.search(f"openmeter-wsgi {first}{options}{second}", called), name


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_of_the_page_can_be_typed(example):
    words = shlex.split(re.split(r" [<>] |\)", example.replace('eval "$(', ""))[0])
    command, context = GROUP, click.Context(GROUP)
    assert words.pop(0) == "openmeter-wsgi"
    while isinstance(command, click.Group):
        _, words, _ = command.make_parser(context).parse_args(words)
        command = command.get_command(context, words.pop(0))
        context = click.Context(command, parent=context)

    _, left, _ = command.make_parser(context).parse_args(words)

    assert left == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_in_its_help_how_it_ends(name):
    result = CliRunner().invoke(GROUP, [*name.split(), "--help"])

    shown = result.output.partition("Exit codes:")[2]
    assert result.exit_code == 0
    assert codes_in(shown) == codes_in(COMMANDS[name].epilog)
    assert codes_in(shown)[:3] == [0, 1, 2]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_speaks_json(name):
    flags = [flag for param in COMMANDS[name].params for flag in param.opts]
    assert "--json" in flags


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_usage_ends_with_2_and_no_stack(name):
    result = CliRunner().invoke(GROUP, [*name.split(), "--no-such-option"])

    assert result.exit_code == 2
    assert "No such option" in result.stderr
    assert "--no-such-option" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["send", "--type", "a", "--subject", "b"],
        ["usage"],
        ["check"],
        ["ship", "--spool-dir", "{empty}"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_configuration_that_cannot_work_ends_with_2_everywhere(tmp_path, arguments):
    words = [word.format(empty=tmp_path) for word in arguments]

    result = CliRunner().invoke(GROUP, words, env={"OPENMETER_API_URL": "nowhere"})

    assert result.exit_code == 2
    assert "expected a URL" in result.output


def test_the_version_is_told():
    assert CliRunner().invoke(GROUP, ["--version"]).output == f"{VERSION}\n"


@pytest.mark.parametrize("name", list(cli.REMOVED))
def test_a_removed_command_says_what_to_write(name):
    result = CliRunner().invoke(GROUP, [name, "--anything"])

    assert result.exit_code == 2
    assert f"{name!r} is no longer a command: write" in result.output
    assert cli.REMOVED[name] in result.output


# -- Completion


@pytest.fixture
def completed(monkeypatch):
    """A function that completes *words* for a shell."""

    def ask(shell, *words):
        incomplete, number = words[-1], str(len(words) - 1)
        monkeypatch.setenv("COMP_WORDS", " ".join(words))
        monkeypatch.setenv("COMP_CWORD", incomplete if shell == "fish" else number)
        kind = get_completion_class(shell)
        return kind(GROUP, {}, "openmeter-wsgi", "_OPENMETER_WSGI_COMPLETE").complete()

    return ask


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_options_are_completed(completed, shell):
    commands = completed(shell, "openmeter-wsgi", "s")
    options = completed(shell, "openmeter-wsgi", "send", "--skip")

    found = {name for name in cli.COMMANDS if re.search(rf"\b{name}\b", commands)}
    assert found >= {"send", "ship", "spool", "sandbox"}
    assert "--skip-invalid" in options


def test_bash_completes_with_the_script(tmp_path):
    program = tmp_path / "openmeter-wsgi"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    program.chmod(0o755)
    script = """
        eval "$(_OPENMETER_WSGI_COMPLETE=bash_source openmeter-wsgi)"
        COMP_WORDS=(openmeter-wsgi us) COMP_CWORD=1
        _openmeter_wsgi_completion openmeter-wsgi us openmeter-wsgi
        echo "${COMPREPLY[@]}"
    """
    process = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=40,
        check=True,
    )

    assert process.stdout == "usage\n"


def test_completing_a_command_imports_none_of_them():
    check = (
        "import sys; from openmeter_wsgi.cli import _group; import click;"
        "group = _group();"
        "found = group.shell_complete(click.Context(group), 's');"
        "assert {one.value for one in found} >= {'send', 'sandbox'};"
        "assert 'openmeter_wsgi.cli.send' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=40)
