"""Test helpers: the events that an application would send, without OpenMeter.

With pytest use the fixture ``openmeter``. Elsewhere::

    with OpenMeter() as openmeter:
        client.get("/search")
        openmeter.assert_metered("searches", subject="acme", total=1)
"""

from openmeter_wsgi.testing.assertions import OpenMeter as OpenMeter
from openmeter_wsgi.testing.collecting import Event as Event
