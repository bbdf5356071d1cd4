"""The directive ``pages``: a table of contents of those named pages that are there.

A page that no such list names is in none, which ends the build.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from docutils.statemachine import StringList
from sphinx.directives.other import TocTree

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive."""
    app.add_directive("pages", PresentPages)
    return {"parallel_read_safe": True}


class PresentPages(TocTree):
    """A toctree without the entries that name no page."""

    def run(self) -> list[nodes.Node]:
        """Return what stands in place of the directive."""
        present = [name for name in self.content if name in self.env.found_docs]
        self.content = StringList(present, source=self.env.docname)
        return super().run()
