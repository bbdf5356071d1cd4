"""Sphinx extension that links literals with the name of an option to its description.

A literal is linked if it is the name of an option and either ends with an equals sign
(```` ``meter=`` ````) or contains an underscore (```` ``flush_interval`` ````). A
single word such as ``meter`` may mean something else.
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
    """Register the transform."""
    app.add_transform(OptionLinks)
    return {"parallel_read_safe": True}


class OptionLinks(SphinxTransform):
    """Transform that wraps the literals with names of options in references."""

    default_priority = 700

    def apply(self, **_options: Any) -> None:
        """Link the literals of the document."""
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
                reference += nodes.inline("", "", literal)  # Sphinx shows the children


def _option(text: str) -> str | None:
    name, equals, _ = text.partition("=")
    return name if name in OPTIONS and (equals or "_" in name) else None


def _is_within_a_link(node: nodes.Node) -> bool:
    """Return True if the node is in a link, or in a title, which lists link to."""
    while (node := node.parent) is not None:
        if isinstance(node, nodes.reference | pending_xref | nodes.title):
            return True
    return False
