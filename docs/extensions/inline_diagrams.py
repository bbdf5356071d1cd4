"""Pictures in SVG become part of the page, so that they have its colours.

As an image of its own a picture would follow the system's choice of dark or light and
not the reader's, which the page has a switch for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.transforms import SphinxTransform

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the transform."""
    app.add_transform(InlineDiagrams)
    return {"parallel_read_safe": True}


class InlineDiagrams(SphinxTransform):
    """Replaces an image by what its file holds."""

    default_priority = 200  # before images are collected, to be copied as files

    def apply(self, **_options: Any) -> None:
        """Change the document."""
        for image in list(self.document.findall(nodes.image)):
            if image["uri"].endswith(".svg"):
                name, path = self.env.relfn2path(image["uri"], self.env.docname)
                self.env.note_dependency(name)
                image.replace_self(nodes.raw("", Path(path).read_text(), format="html"))
