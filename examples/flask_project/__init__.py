"""A Flask project that sends its usage to OpenMeter, with blueprints and Flask-Login.

With a local sandbox instead of OpenMeter::

    openmeter-wsgi sandbox &
    export FLASK_OPENMETER_API_URL=http://127.0.0.1:8888
    gunicorn 'examples.flask_project:create_app()'
    curl -H 'Authorization: Bearer acme-token' http://127.0.0.1:8000/v1/products

With OpenMeter Cloud: set ``FLASK_OPENMETER_API_KEY`` instead of the address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Flask

from examples.flask_project.accounts import login_manager
from examples.flask_project.api import api
from examples.flask_project.site import site
from openmeter_wsgi.flask import OpenMeter

if TYPE_CHECKING:
    from collections.abc import Mapping

openmeter = OpenMeter(meter={"type": "api-request", "data": {"region": "eu"}})


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Return the application; *config* overrides the variables ``FLASK_…``."""
    app = Flask(__name__)
    app.config["SECRET_KEY"] = "not-secret-for-it-is-an-example"
    app.config["OPENMETER_EVENT_SOURCE"] = "flask-example"
    app.config["OPENMETER_SUBJECT"] = "current_user.company"
    app.config.from_prefixed_env()
    app.config.update(config or {})
    login_manager.init_app(app)
    openmeter.init_app(app)
    app.register_blueprint(site)
    app.register_blueprint(api)
    return app
