#!/usr/bin/env bash
# Run the core tests with the lowest versions that setup.cfg declares, under the oldest
# Python, and with the newest versions under the newest Python. (The oldest Python with
# the versions of constraints.txt is what `make test` runs.)
#   tests/pythons.sh PYTHON [NEWEST_PYTHON]
# If no newer Python is given or found, the one of Debian unstable is installed into a
# separate directory, which needs root and Debian.
set -euo pipefail
cd "$(dirname "$0")/.."
oldest=$1
newest=${2:-$(command -v python3.15 || command -v python3.14 || true)}
extras='cli,django,flask,jobs,jsonpath,prometheus,redis,sandbox'
work=build/pythons
mkdir -p "$work"
# The core tests need only these. Other tools of the group "test" would need newer
# versions than the lowest.
tools=(pytest pytest-randomly pytest-timeout pytest-xdist hypothesis flask-login
    djangorestframework trustme waitress gunicorn sybil pyyaml
    "$(grep --ignore-case '^cloudevents==' constraints.txt)")
# Only the core modules: some others import packages that are not installed here.
mapfile -t modules < <(sed -n '/^CORE = {/,/^}/p' tests/conftest.py \
    | grep --only-matching '"[a-z_]*"' | sed 's|"\(.*\)"|tests/test_\1.py|')
core=(-X dev -m pytest -m core --numprocesses 2 --dist worksteal "${modules[@]}")

echo "The lowest versions, $("$oldest" --version):"
lowest=$work/lowest
"$oldest" -m venv "$lowest"
"$lowest/bin/pip" install --quiet --disable-pip-version-check uv
"$lowest/bin/uv" pip compile --quiet --python "$lowest/bin/python" \
    --resolution lowest-direct --all-extras setup.cfg --output-file "$work/lowest.txt"
"$lowest/bin/uv" pip install --quiet --python "$lowest/bin/python" \
    --constraint "$work/lowest.txt" --editable ".[$extras]" "${tools[@]}"
"$lowest/bin/python" "${core[@]}"

if [[ -n $newest ]]; then
    echo "The newest versions, $("$newest" --version):"
    "$newest" -m venv "$work/newest"
    "$work/newest/bin/pip" install --quiet --disable-pip-version-check \
        --editable ".[$extras]" "${tools[@]}"
    "$work/newest/bin/python" "${core[@]}"
    exit
fi

export DEBIAN_FRONTEND=noninteractive
command -v debootstrap >/dev/null || {
    apt-get update --quiet=2
    apt-get install --quiet=2 --yes --no-install-recommends debootstrap
}
root=$PWD/$work/unstable
rm -rf "$root"
debootstrap --variant=minbase --include=ca-certificates,python3.14,python3.14-venv \
    sid "$root" >"$work/debootstrap.log" || { tail "$work/debootstrap.log"; exit 1; }
cp /etc/resolv.conf /etc/hosts "$root/etc/"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
mkdir "$root/src"
tar --create --exclude-vcs --exclude ./build --exclude './.venv*' . \
    | tar --extract --directory "$root/src"
mkdir --parents "$root/src/build"
cat >"$root/src/build/pythons.sh" <<SCRIPT
set -euo pipefail
cd /src
python3.14 -m venv /venv
/venv/bin/pip install --quiet --disable-pip-version-check \\
    --editable '.[$extras]' ${tools[@]@Q}
exec /venv/bin/python ${core[@]@Q}
SCRIPT
echo "The newest versions, $(chroot "$root" python3.14 --version) of Debian unstable:"
# In a separate mount namespace, whose mounts end with it.
unshare --mount --fork bash -euc '
mount --bind "$0" "$0"  # makes the root directory a mount point
for each in proc dev sys; do mount --rbind "/$each" "$0/$each"; done
exec chroot "$0" env HOME=/root LANG=C.UTF-8 bash /src/build/pythons.sh
' "$root"
