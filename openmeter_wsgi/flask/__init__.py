"""Metering for Flask: `OpenMeter(app)`."""

from openmeter_wsgi.flask.extension import OpenMeter as OpenMeter
from openmeter_wsgi.flask.subjects import subject_from as subject_from
