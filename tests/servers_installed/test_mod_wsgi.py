"""Apache's mod_wsgi, which runs Python in daemon processes of another user."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import sysconfig
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import openmeter_wsgi
from installed import HERE, InstalledServer, assert_billed_once, variables

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_server import OpenMeterServer

#: All direct and indirect dependencies of openmeter_wsgi.
_PACKAGES = (
    "certifi", "charset_normalizer", "idna", "markupsafe", "msgspec", "requests",
    "urllib3", "werkzeug",
)  # fmt: skip
_CONFIGURATION = """
ServerRoot {directory}
ServerName localhost
Listen {host}:{port}
PidFile {directory}/pid
ErrorLog {directory}/errors
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule wsgi_module {modules}/mod_wsgi.so
User {user}
Group #{group}
WSGISocketPrefix {directory}/wsgi
WSGIDaemonProcess metered processes=2 threads=4 python-path={path}
WSGIProcessGroup metered
WSGIApplicationGroup %{{GLOBAL}}
WSGIScriptAlias / {app}
<Directory />
    Require all granted
</Directory>
"""


@contextmanager
def apache_directory() -> Iterator[Path]:
    """Make a directory that belongs to the user of Apache's processes."""
    with tempfile.TemporaryDirectory() as made:
        owner = user()
        os.chown(made, owner.pw_uid, owner.pw_gid)
        yield Path(made)


@pytest.fixture
def directory() -> Iterator[Path]:
    with apache_directory() as made:
        yield made


def user() -> pwd.struct_passwd:
    return pwd.getpwuid(os.getuid()) if os.getuid() else pwd.getpwnam("www-data")


def readable_copy(code: Path, app: Path) -> Path:
    """Copy the application and its packages: Apache's user cannot read the checkout."""
    packages = Path(sysconfig.get_path("platlib"))
    for name in _PACKAGES:
        shutil.copytree(packages / name, code / name)
    shutil.copytree(Path(openmeter_wsgi.__file__).parent, code / "openmeter_wsgi")
    shutil.copy(app, code)
    for path in (code, *code.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return code


def apache(directory: Path, env: dict[str, str]) -> InstalledServer:
    with socket.create_server(("127.0.0.1", 0)) as free:
        host, port = free.getsockname()
    code = readable_copy(directory / "code", HERE / "installed_app.py")
    configuration = directory / "apache.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            directory=directory,
            host=host,
            port=port,
            modules="/usr/lib/apache2/modules",
            user=user().pw_name,
            group=user().pw_gid,
            path=code,
            app=code / "installed_app.py",
        )
    )
    command = ["/usr/sbin/apache2", "-f", str(configuration), "-DFOREGROUND"]
    return InstalledServer(command, (host, port), directory / "errors", env)


@pytest.mark.parametrize("queue", ["memory", "spool"])
def test_mod_wsgi_delivers_everything(
    queue: str, openmeter: OpenMeterServer, directory: Path
) -> None:
    spool = {"OPENMETER_SPOOL_DIR": str(directory / "spool")}
    env = variables(openmeter, **(spool if queue == "spool" else {}))

    with apache(directory, env) as server:
        names = server.load()
        openmeter.wait_for(len(names))
        server.stop()

    assert_billed_once(openmeter, names)
