"""Tests of an application of one's own: what it would bill, without OpenMeter.

With pytest the fixture ``openmeter`` is there by itself. Elsewhere::

    with OpenMeter() as openmeter:
        client.get("/search")
        openmeter.assert_metered("searches", subject="acme", total=1)
"""

from openmeter_wsgi.testing.assertions import OpenMeter as OpenMeter
from openmeter_wsgi.testing.collecting import Event as Event
