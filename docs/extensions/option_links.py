"""Literals that name an option of a policy lead to it.

```` ``flush_interval=`` ```` and ```` ``flush_interval`` ````: a single word such as
``meter`` only with its equals sign, since it may mean something else.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

from openmeter_wsgi import Policy

if TYPE_CHECKING:
    from sphinx.application import Sphinx

OPTIONS = frozenset(field.name for field in dataclasses.fields(Policy) if field.init)


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the transform."""
    app.add_transform(OptionLinks)
    return {"parallel_read_safe": True}


class OptionLinks(SphinxTransform):
    """Wraps such a literal in a reference."""

    default_priority = 700

    def apply(self, **_options: Any) -> None:
        """Change the document."""
        for literal in list(self.document.findall(nodes.literal)):
            name = _option(literal.astext())
            if name and not _is_within_a_link(literal):
                reference = pending_xref(
                    "",
                    refdomain="doc",
                    reftype="myst",
                    reftarget="options",
                    reftargetid=name,
                    refdoc=self.env.docname,
                    refexplicit=True,
                    refwarn=True,
                )
                literal.replace_self(reference)
                reference += nodes.inline("", "", literal)  # its children are shown


def _option(text: str) -> str | None:
    name, equals, _ = text.partition("=")
    return name if name in OPTIONS and (equals or "_" in name) else None


def _is_within_a_link(node: nodes.Node) -> bool:
    """Say whether it leads somewhere already, as a title does from the list of them."""
    while (node := node.parent) is not None:
        if isinstance(node, nodes.reference | pending_xref | nodes.title):
            return True
    return False
