#!/usr/bin/env bash
# Run the Django tests with each supported version of Django, each in its own virtual
# environment.
#   tests/django_versions.sh PYTHON [NEWEST_PYTHON]
# The newest Django may need a newer Python: NEWEST_PYTHON, or the newest on the path.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
newest=${2:-}
for candidate in python3.14 python3.13 python3.12; do
    [[ -n $newest ]] && break
    "$candidate" -c '' 2>/dev/null && newest=$candidate
done
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
# Without the packages whose versions depend on that of Django.
grep -viE '^(django|djangorestframework|django-stubs.*)==' constraints.txt >"$constraints"

try() {
    local name=$1 python=$2 django=$3 env=.venv-django-$1
    [[ -d $env ]] || "$python" -m venv "$env"
    "$env/bin/pip" install --quiet --disable-pip-version-check 'pip >= 25.1'
    "$env/bin/pip" install --quiet --disable-pip-version-check \
        --constraint "$constraints" --group test "$django" \
        --editable '.[cli,django,flask,jsonpath,prometheus,redis,sandbox]'
    "$env/bin/python" -c 'import django, platform
print("Django", django.__version__, "on Python", platform.python_version())'
    "$env/bin/python" -X dev -m pytest tests/test_django.py tests/test_django_check.py
    "$env/bin/python" -X dev -m pytest tests/test_example_projects.py -k django
}

try 4.2 "$python" 'django~=4.2.0'
try 5.2 "$python" 'django~=5.2.0'
try newest "${newest:-$python}" 'django'
