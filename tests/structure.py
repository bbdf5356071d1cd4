"""Figures of the package's structure: `make structure`.

    python -m tests.structure [PACKAGE_DIRECTORY]

The figures are read from the source, and nothing is imported. Only lines of Python
files count.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "openmeter_wsgi"
#: The modules that run in a request which becomes an event.
REQUEST_PATH = (
    "middleware", "response", "request", "billing", "process", "subject", "routes",
    "events", "values", "errors", "log", "delivery.queue",
)  # fmt: skip
#: The modules outside the core: an application imports them only if it uses them.
EDGES = (
    "cli", "sandbox", "zuplo", "testing", "pytest_plugin", "flask", "django",
    "framework_base", "prometheus",
)  # fmt: skip
_CLAUSE = r"(?:what|who|whom|whose|which|whether|where|how)\b"
_BEGINS = re.compile(_CLAUSE, re.IGNORECASE)
_BEHIND_VERB = re.compile(rf"\w+ {_CLAUSE}", re.IGNORECASE)


class Module:
    """A module with its name relative to the package."""

    def __init__(self, path: Path, package: Path) -> None:
        parts = path.relative_to(package).with_suffix("").parts
        self.name = ".".join(part for part in parts if part != "__init__")
        text = path.read_text()
        self.lines = len(text.splitlines())
        self.tree = ast.parse(text)

    def is_in(self, *names: str) -> bool:
        """Return True if it is one of the modules or in one of the packages *names*."""
        return any(self.name == n or self.name.startswith(f"{n}.") for n in names)

    def first_lines(self) -> list[str]:
        """Return the first line of every docstring."""
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, kinds)]
        return [text.split("\n")[0] for text in map(ast.get_docstring, nodes) if text]

    def imported(self, package: str, names: frozenset[str]) -> set[str]:
        """Return the modules of the package that it imports, also inside functions."""
        found = set()
        for node in _at_run_time(self.tree):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            root, _, module = node.module.partition(".")
            if root == package:
                for alias in node.names:
                    submodule = f"{module}.{alias.name}".lstrip(".")
                    found.add(submodule if submodule in names else module)
        return (found & names) - {self.name}


def _at_run_time(node: ast.AST) -> list[ast.AST]:
    """Return *node* and all nodes below it, without those for type checkers only."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return []
    below = [_at_run_time(child) for child in ast.iter_child_nodes(node)]
    return [node, *(child for nodes in below for child in nodes)]


def import_depth(modules: list[Module], package: str) -> int:
    """Return the number of modules in the longest chain of imports."""
    names = frozenset(module.name for module in modules if module.name)
    graph = {m.name: m.imported(package, names) for m in modules if m.name}

    @functools.cache
    def depth(name: str) -> int:
        return 1 + max(map(depth, graph[name]), default=0)

    return max(map(depth, graph))


def public_names(modules: list[Module]) -> int:
    """Return the number of names in `__all__` of the package."""
    (top,) = (module for module in modules if not module.name)
    return sum(
        len(node.value.elts)
        for node in top.tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
        if ast.unparse(node.targets[0]) == "__all__"
    )


def options(modules: list[Module]) -> int:
    """Return the number of options of a policy."""
    classes = [
        node
        for module in modules
        if module.is_in("policy")
        for node in module.tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Options")
    ]
    return sum(isinstance(f, ast.AnnAssign) for each in classes for f in each.body)


def figures(package: Path) -> dict[str, str]:
    """Return the figures of a package, by label."""
    paths = sorted(package.rglob("*.py"))
    modules = [Module(path, package) for path in paths]
    outside = [m for m in modules if not m.is_in("sandbox", "zuplo")]
    core = [m for m in modules if not m.is_in(*EDGES)]
    path = [m for m in modules if m.name in REQUEST_PATH]
    sizes = sorted(m.lines for m in outside)
    lines = [line for module in modules for line in module.first_lines()]
    begin = sum(bool(_BEGINS.match(line)) for line in lines)
    behind = sum(bool(_BEHIND_VERB.match(line)) for line in lines)

    def size_of(some: list[Module]) -> str:
        return f"{len(some)} modules, {sum(m.lines for m in some):,} lines"

    return {
        "the package": size_of(modules),
        "outside sandbox and zuplo": size_of(outside),
        "the core": size_of(core),
        "the sandbox": size_of([m for m in modules if m.is_in("sandbox")]),
        "zuplo": size_of([m for m in modules if m.is_in("zuplo")]),
        "the request path": size_of(path),
        "modules of 150 to 600 lines": _share(
            sum(150 <= size <= 600 for size in sizes), len(sizes)
        ),
        "the largest module": f"{sizes[-1]} lines",
        "import depth": f"{import_depth(modules, package.name)} modules",
        "public names": str(public_names(modules)),
        "options": str(options(modules)),
        "docstrings that begin with what, who, which, …": _share(begin, len(lines)),
        "docstrings with such a clause behind the verb": _share(behind, len(lines)),
    }


def _share(some: int, whole: int) -> str:
    return f"{some} of {whole:,} ({some / whole:.0%})"


def main() -> None:
    """Print the figures."""
    package = Path(sys.argv[1]) if sys.argv[1:] else PACKAGE
    for label, figure in figures(package.resolve()).items():
        print(f"{label:50} {figure}")  # noqa: T201


if __name__ == "__main__":
    main()
