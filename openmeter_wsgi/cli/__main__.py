"""``python -m openmeter_wsgi.cli``: the command line without its script."""

from openmeter_wsgi.cli import main

main()
