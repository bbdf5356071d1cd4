"""A local server that speaks OpenMeter's HTTP API, for development and tests."""

from openmeter_wsgi.sandbox.server import Sandbox as Sandbox
