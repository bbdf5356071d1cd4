"""Compare a wheel with an earlier one: public names, entry points, data files.

    python -m tests.packaging.compare BEFORE.whl AFTER.whl

The exit status is 1 if the new wheel lacks something. Both wheels are imported without
installing them, by the Python that runs this program. It must have the dependencies of
all extras.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

#: The public modules.
MODULES = (
    "openmeter_wsgi", "openmeter_wsgi.django", "openmeter_wsgi.django.rest_framework",
    "openmeter_wsgi.flask", "openmeter_wsgi.prometheus", "openmeter_wsgi.sandbox",
    "openmeter_wsgi.testing", "openmeter_wsgi.zuplo",
)  # fmt: skip
_NAMES = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
from django.conf import settings
settings.configure(SECRET_KEY="compare")
found = {}
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert sys.argv[1] in module.__file__, module.__file__
    found[name] = [
        each for each in dir(module)
        if not each.startswith("_")
        and getattr(getattr(module, each), "__module__", "").startswith(name)
    ]
print(json.dumps(found))
"""


def contents(wheel: Path) -> dict[str, set[str]]:
    """Return the public names, entry points and data files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (points,) = (name for name in names if name.endswith("entry_points.txt"))
        lines = archive.read(points).decode().splitlines()
    done = subprocess.run(
        [sys.executable, "-I", "-c", _NAMES, str(wheel.resolve()), *MODULES],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{wheel}: {done.stderr}")
    return {
        "public names": {
            f"{module}.{name}"
            for module, found in json.loads(done.stdout).items()
            for name in found
        },
        "entry points": {line.partition(" ")[0] for line in lines if "=" in line},
        "data files": {
            name
            for name in names
            if not name.endswith(".py") and "dist-info" not in name
        },
    }


def main() -> int:
    """Print the new and the missing names; return 1 if a name is missing."""
    before, after = (contents(Path(name)) for name in sys.argv[1:])
    is_complete = True
    for kind, names in before.items():
        print(f"{kind}: {len(names)} before, {len(after[kind])} after")
        for name in sorted(after[kind] - names):
            print(f"  new: {name}")
        for name in sorted(names - after[kind]):
            print(f"  missing: {name}")
            is_complete = False
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
