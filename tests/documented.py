"""Checks of the code blocks in the documentation: run, compare, parse, look up."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import re
import shlex
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from cloudevents.http import from_json
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from openmeter_wsgi import Policy, cli

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sybil.example import Example
    from sybil.typing import Parser

ROOT = Path(__file__).parents[1]
OPTIONS = frozenset(Policy.__dataclass_fields__)
EXTRAS = importlib.metadata.metadata("openmeter_wsgi").get_all("Provides-Extra", [])
TARGETS = frozenset(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))

_python = PythonEvaluator()


def parsers() -> list[Parser]:
    """Return the Sybil parsers of the code blocks, each with its check."""
    return [
        CodeBlockParser("python", run_python),
        CodeBlockParser("output", compare_output),
        CodeBlockParser("console", check_commands),
        CodeBlockParser("toml", read_toml),
        CodeBlockParser("json", read_json),
        SkipParser(),
    ]


def run_python(example: Example) -> str | None:
    """Run the block and keep its output for a following ``output`` block."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        problem = _python(example)
    example.namespace["printed"] = printed.getvalue()
    return problem


def compare_output(example: Example) -> str | None:
    """Compare the block with the output of the Python block before it."""
    printed = example.namespace.pop("printed", None)
    expected = str(example.parsed)
    if printed == expected:
        return None
    return f"expected:\n{expected}\ngot:\n{printed}"


def read_toml(example: Example) -> str | None:
    """Check that the block is a valid policy, if it contains options."""
    return _policy_problem(tomllib.loads(str(example.parsed)))


def read_json(example: Example) -> str | None:
    """Check that the block is a valid Zuplo policy, a policy of ours, or events."""
    text = example.namespace["shown_json"] = str(example.parsed)
    document = msgspec.json.decode(text)
    if isinstance(document, dict) and "handler" in document:
        Policy.from_zuplo(text)
        return None
    for each in document if isinstance(document, list) else [document]:
        if isinstance(each, dict) and "specversion" in each:
            from_json(msgspec.json.encode(each))
        elif problem := _policy_problem(each):
            return problem
    return None


def _policy_problem(document: object) -> str | None:
    """Return the error of an invalid policy; a document without options is fine."""
    if not isinstance(document, dict) or OPTIONS.isdisjoint(document):
        return None
    try:
        Policy(**{"api_url": "http://127.0.0.1:8888", **document})
    except ValueError as error:
        return str(error)
    return None


# -- Commands


def check_commands(example: Example) -> str | None:
    """Return the problems of the commands in a block of a shell session."""
    typed = list(_typed(str(example.parsed).splitlines()))
    if not typed:
        return "expected at least one line that begins with '$ '"
    return "\n".join(problem for line in typed for problem in problems_of(line)) or None


def _typed(lines: Iterable[str]) -> Iterator[str]:
    """Yield the commands of a session: lines after a prompt, with continuations."""
    command = None
    for line in lines:
        if command is not None:
            command += line + "\n"
        elif line.startswith("$ "):
            command = line[2:] + "\n"
        if command is not None and not command.endswith("\\\n"):
            with contextlib.suppress(ValueError):  # a quotation is still open
                shlex.split(command)
                yield command
                command = None
    if command is not None:
        yield command


def problems_of(command: str) -> Iterator[str]:
    """Yield the unknown targets, commands, options and extras in a line of shell."""
    for words in _simple_commands(command.replace("\\\n", " ")):
        name, *arguments = words
        if name == "make":
            targets = [word for word in arguments if "=" not in word]
            yield from (f"make: no target {t!r}" for t in targets if t not in TARGETS)
        elif name == "openmeter-wsgi":
            yield from _command_problems(arguments)
        elif arguments[:1] == ["install"]:
            yield from _extra_problems(arguments)


def _simple_commands(line: str) -> Iterator[list[str]]:
    """Split a line into its commands, as the shell does, without leading variables."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>()")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word and set(word) <= set(";|&<>()"):
            if words:
                yield words
            words = []
        elif word not in {"…", "..."} and (words or not re.match(r"[A-Z_]+=", word)):
            words.append(word)


def _command_problems(arguments: Iterable[str]) -> Iterator[str]:
    command: click.Command = cli._group()
    context = click.Context(command, info_name="openmeter-wsgi")
    rest = list(arguments)
    try:
        while True:
            _, rest, _ = command.make_parser(context).parse_args(rest)
            if not rest or not isinstance(command, click.Group):
                return
            name, *rest = rest
            found = command.get_command(context, name)
            if found is None:
                yield f"{context.command_path}: no command {name!r}"
                return
            command = found
            context = click.Context(command, parent=context, info_name=name)
    except click.UsageError as error:
        yield error.format_message()


def _extra_problems(arguments: Iterable[str]) -> Iterator[str]:
    for word in arguments:
        if found := re.search(r"openmeter_wsgi\[([a-z,]+)\]", word):
            for extra in found[1].split(","):
                if extra not in EXTRAS:
                    yield f"openmeter_wsgi: no extra {extra!r}"
