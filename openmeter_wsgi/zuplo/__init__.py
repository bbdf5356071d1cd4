"""Conversion of Zuplo's configuration files to options.

``policies.json`` holds the policies, ``routes.oas.json`` the routes that they govern.
Nothing here runs during a request.

::

    policies.json ──► read_policies ──┐
                                      ├──► translate ──► options per route, or TOML
    routes.oas.json ► read_routes ────┘
"""

from openmeter_wsgi.zuplo.openapi import read_routes as read_routes
from openmeter_wsgi.zuplo.policies import ZuploPolicy as ZuploPolicy
from openmeter_wsgi.zuplo.policies import hide_values as hide_values
from openmeter_wsgi.zuplo.policies import load_document as load_document
from openmeter_wsgi.zuplo.policies import read_policies as read_policies
from openmeter_wsgi.zuplo.policies import variables_in as variables_in
from openmeter_wsgi.zuplo.translation import Translation as Translation
from openmeter_wsgi.zuplo.translation import options_of as options_of
from openmeter_wsgi.zuplo.translation import to_toml as to_toml
from openmeter_wsgi.zuplo.translation import translate as translate
