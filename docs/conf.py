"""How the documentation is built: `make docs`. Nothing is fetched from anywhere."""

import sys
from pathlib import Path

from openmeter_wsgi import __version__

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "openmeter_wsgi"
author = "the authors of openmeter_wsgi"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "inline_diagrams",
    "option_links",
]
exclude_patterns = ["extensions"]

myst_enable_extensions = ["colon_fence"]
#: Headings of these levels can be linked to, as on GitHub.
myst_heading_anchors = 3

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True  # the value of os.environ is nobody's business
default_role = "py:obj"  # a single backquote in a docstring names code
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "openmeter_wsgi"
html_static_path = ["static"]
html_css_files = ["diagrams.css", "columns.css"]
html_js_files = ["access.js"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
