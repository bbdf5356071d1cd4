"""Names, links and commands in the documentation exist, and all options are named."""

import ast
import functools
import re
from pathlib import Path

import pytest

import openmeter_wsgi
from documented import OPTIONS, ROOT, problems_of
from openmeter_wsgi.options import REMOVED
from tests import options_page
from tests.packaging.absolute_links import absolute

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Code blocks and comments.
_FENCE = re.compile(r"^```.*?^```$|^<!--.*?-->$", re.M | re.S)
#: Settings of other software, which pages may name as well.
FOREIGN = {
    "preload_app",
    "processes",
    "stream_options",
    "threads",
    "worker_class",
    "workers",
}
_LITERAL = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def literals(page: Path) -> list[str]:
    """Return the inline code of a page."""
    text = _FENCE.sub("", page.read_text())
    return [" ".join(literal.split()) for literal in _LITERAL.findall(text)]


def is_there(target: Path, anchor: str) -> bool:
    """Return True if the file exists and contains the heading."""
    if not anchor or not target.exists():
        return target.exists()
    text = target.read_text()
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.M)
    slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
    return anchor in slugs or any(
        f"({anchor})=" in path.read_text() for path in target.parent.glob("*.md")
    )


@functools.cache
def parameters() -> set[str]:
    """Return the names of all that can be given to our own functions."""
    modules = (ROOT / "openmeter_wsgi").rglob("*.py")
    return {
        node.arg
        for module in modules
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.arg)
    }


@pytest.fixture(params=PAGES, ids=lambda page: page.stem)
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_a_keyword_in_the_text_is_an_option_or_a_parameter(page: Path) -> None:
    keywords = re.compile(r"(?:\w+\(|@meter\()?([a-z][a-z_]*)=")
    named = {found[1] for text in literals(page) if (found := keywords.match(text))}

    # The page on upgrading names removed options.
    before = REMOVED.keys() if page.stem == "upgrading" else set()
    assert named <= OPTIONS | parameters() | FOREIGN | before


def test_a_variable_in_the_text_sets_an_option(page: Path) -> None:
    named = re.findall(r"\bOPENMETER_([A-Z_]+[A-Z])\b", page.read_text())

    assert {name.lower() for name in named} <= OPTIONS


def test_a_command_in_the_text_exists(page: Path) -> None:
    commands = [
        text
        for text in literals(page)
        if re.match(r"(openmeter-wsgi|make) [a-z]", text)
    ]

    assert [problem for text in commands for problem in problems_of(text)] == []


def test_a_file_and_a_heading_that_are_linked_to_exist(page: Path) -> None:
    text = _LITERAL.sub("", _FENCE.sub("", page.read_text()))
    linked = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text)

    missing = [
        f"{name}#{anchor}"
        for name, anchor in linked
        if not is_there(page.parent / name if name else page, anchor)
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (
            "https://example.org/blob/v1/",
            "[Flask](https://example.org/blob/v1/docs/flask.md#a), [b](https://c) "
            "![d](https://example.org/raw/v1/e.png)",
        ),
        ("", "Flask, [b](https://c) "),
    ],
)
def test_links_of_the_readme_work_outside_of_the_repository(address, expected):
    text = "[Flask](docs/flask.md#a), [b](https://c) ![d](e.png)"

    assert absolute(text, address) == expected


def test_the_page_on_the_api_has_all_that_is_public() -> None:
    public = set(openmeter_wsgi.__all__)
    text = (ROOT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"^\.\. auto\w+:: (\w+)", text, re.M))

    assert documented == public - {"__version__"}
    assert [name for name in public if not hasattr(openmeter_wsgi, name)] == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("openmeter-wsgi chek", "no command 'chek'"),
        ("openmeter-wsgi check --jsn", "No such option"),
        ("openmeter-wsgi spool sow 1", "no command 'sow'"),
        ("OPENMETER_API_URL=x openmeter-wsgi spool list --wating", "No such option"),
        ("cd x && openmeter-wsgi ship --dir x", "No such option"),
        ("make demmo KEEP=1", "no target 'demmo'"),
        ("pip install 'openmeter_wsgi[clii]'", "no extra 'clii'"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str, problem: str) -> None:
    assert problem in "".join(problems_of(command))


@pytest.mark.parametrize(
    "command",
    [
        "openmeter-wsgi check --config openmeter.toml --json | jq . > out.json",
        "openmeter-wsgi --help",
        "openmeter-wsgi spool …",
        "openmeter-wsgi spool --spool-dir DIR requeue --all",
        "openmeter-wsgi import zuplo a.json --routes b.json > c.toml",
        "make demo KEEP=1",
        "pip install 'openmeter_wsgi[sandbox]' gunicorn",
        "curl http://127.0.0.1:8888/",
    ],
)
def test_a_command_that_exists_is_none(command: str) -> None:
    assert list(problems_of(command)) == []


def test_the_page_of_options_has_what_the_code_has() -> None:
    written = options_page.PAGE.read_text().partition(options_page.MARKER)[2]

    assert written == f"\n{options_page.reference()}", (
        "write the page anew: python -m tests.options_page"
    )
