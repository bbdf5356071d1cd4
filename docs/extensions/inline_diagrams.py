"""Sphinx extension that inserts SVG pictures into the page, so they have its colours.

A picture in an `<img>` element follows the dark or light mode of the system, and not
the mode that the reader chooses with the switch of the page.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.transforms import SphinxTransform

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the transform."""
    app.add_transform(InlineDiagrams)
    return {"parallel_read_safe": True}


class InlineDiagrams(SphinxTransform):
    """Transform that replaces an SVG image by the contents of its file."""

    default_priority = 200  # before Sphinx collects the images, to copy their files

    def apply(self, **_options: Any) -> None:
        """Replace the images of the document."""
        for image in list(self.document.findall(nodes.image)):
            if image["uri"].endswith(".svg"):
                name, path = self.env.relfn2path(image["uri"], self.env.docname)
                self.env.note_dependency(name)
                image.replace_self(nodes.raw("", Path(path).read_text(), format="html"))
