"""``python -m openmeter_wsgi``: the command line without its script."""

from openmeter_wsgi.cli import main

main()
