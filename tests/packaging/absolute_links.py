"""Make the links of a README work outside of its repository, as on PyPI.

``python -m tests.packaging.absolute_links README.md [ADDRESS]`` rewrites the file. Its
links to files of the repository get the prefix ADDRESS (https://…/blob/main); pictures
get it with /raw/ instead of /blob/, where the same sites have the file itself. Without
ADDRESS, links become plain text and pictures are removed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)")


def absolute(text: str, address: str) -> str:
    """Return *text* with the prefix *address* in its links to repository files."""

    def replace(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if address:
            site = address.rstrip("/")
            if picture:
                site = site.replace("/blob/", "/raw/")
            return f"{picture}[{words}]({site}/{target})"
        return "" if picture else words

    return _LINK.sub(replace, text)


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    readme.write_text(absolute(readme.read_text(), "".join(sys.argv[2:])))
