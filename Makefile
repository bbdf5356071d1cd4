# Commands for a checkout. They use the virtual environment .venv, which they create.
#   make demo          send requests to an application, and check their usage in a sandbox
#   make demo KEEP=1   the same, and keep them running
#   make test          lint, types, import contracts, documentation, tests
#   make test-load     the tests that load the machine: deploys, kill -9, state machines
#   make test-tools    the tests of the demo, the benchmarks and other tools of a checkout
#   make structure     figures of the package: modules, lines, imports, names
#   make docs          build only the documentation, in build/docs
#   make test-servers  uWSGI, gevent, Redis, Apache, a full disk: as root, on Debian
#   make test-django   the Django tests with Django 4.2, 5.2 and the newest
#   make jobs          Celery and RQ on a real Redis, and the SDKs of language models
#   make jobs LONG=1   the same, and the long form of tests/test_usage_machine.py
#   make test-pythons  the core tests with the newest Python, and with the lowest versions
#                      of the dependencies: as root, on Debian
#   make test-page     the sandbox's page and the documentation in Chromium: as root, on
#                      Debian
#   make screenshot    the documentation's picture of the sandbox's page
#   make chaos         kill -9 under load, and ten million events through small segments:
#                      count lost and repeated events
#   make overshoot     overshoot of a quota under load (REDIS=redis://…), and with usage
#                      that is visible after 90 s; wrong decisions of a new process. It
#                      takes about ten minutes
#   make bench         cost of a metered request compared with a bare one, of delivery,
#                      waiting events and the start; plots of growth in build/bench
#   make bench PLOTS=docs/images   the same, with the plots of the documentation
#   make bench PEERS=1 the same, and a comparison with other packages from PyPI
#   make guard         fail if a request or the import exceeds its budget of instructions
#   make dist          wheel and sdist
#   make dist REPOSITORY=https://…/blob/main  the same, with links to the repository
#   make release-check the same; then install the wheel in an empty environment, and run
#                      the quickstart with it

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := cli,django,flask,jobs,jsonpath,prometheus,redis,sandbox

.PHONY: demo test lint types contract structure docs unit test-load test-tools test-servers test-django test-pythons jobs test-page screenshot chaos overshoot bench guard dist release-check clean

# The demo needs fewer packages, which are installed if the environment does not exist.
DEMO_INSTALLED := $(if $(wildcard $(INSTALLED)),$(INSTALLED),$(VENV)/.installed-demo)

demo: $(DEMO_INSTALLED)
	$(BIN)/python -m examples.demo $(if $(KEEP),--keep)

# Tests of tools of the checkout, not of the package.
TOOLS := $(addprefix tests/test_,benchmarks.py chaos.py demo.py overshoot.py \
	public_types.py seal_loop.py structure.py)

test: lint types contract docs unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

contract: $(INSTALLED)
	$(BIN)/lint-imports

structure:
	$(PYTHON) -m tests.structure

# All pages each time: Sphinx repeats the warnings of a page only if it reads it again.
docs: $(INSTALLED)
	$(BIN)/sphinx-build --builder html --fail-on-warning --keep-going --fresh-env \
		--write-all --quiet docs build/docs

# Pages run in one process, as the code blocks of a page build on each other.
unit: $(INSTALLED)
	$(BIN)/python -X dev -m pytest --numprocesses 3 --dist worksteal \
		-m 'not load' tests $(addprefix --ignore ,$(TOOLS))
	$(BIN)/python -X dev -m pytest README.md docs

test-load: $(INSTALLED)
	$(BIN)/python -X dev -m pytest --numprocesses 2 --dist worksteal -m load tests

test-tools: $(INSTALLED)
	$(BIN)/python -X dev -m pytest --numprocesses 2 --dist worksteal $(TOOLS)

# Needs root and Debian: first installs uWSGI, gevent, Redis and Apache.
test-servers: $(INSTALLED)
	tests/servers_installed/install $(VENV)
	$(BIN)/python -X dev -m pytest tests/servers_installed

test-django:
	tests/django_versions.sh $(PYTHON) $(NEWEST_PYTHON)

# First installs Celery, RQ and the SDKs. If Redis is missing, it needs root and Debian.
jobs: $(INSTALLED)
	tests/jobs_installed/install $(VENV)
	$(BIN)/python -X dev -m pytest tests/jobs_installed
ifdef LONG
	$(BIN)/python -X dev -m pytest --hypothesis-profile long tests/test_usage_machine.py
endif

# Needs root and Debian, unless NEWEST_PYTHON names a newer Python.
test-pythons:
	tests/pythons.sh $(PYTHON) $(NEWEST_PYTHON)

# Needs root and Debian: first installs Chromium.
test-page: docs
	tests/in_chromium/install $(VENV)
	$(BIN)/python -X dev -m pytest tests/in_chromium

screenshot: $(INSTALLED)
	tests/in_chromium/install $(VENV)
	cd tests/in_chromium && PYTHONPATH=.. ../../$(BIN)/python -m screenshot ../../docs/_static/sandbox.png

chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos --kills 200
	$(BIN)/python -m tests.seal_loop --seconds 60

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.instructions
	$(BIN)/python -m tests.benchmarks.request_cost $(if $(PEERS),--peers)
ifdef PEERS
	command -v wrk || apt-get install --quiet=2 --yes --no-install-recommends wrk
	$(BIN)/python -m tests.benchmarks.served_cost
endif
	$(BIN)/python -m tests.benchmarks.entitlements
	for each in start memory delivery latency socket_cost routing; do \
		$(BIN)/python -m tests.benchmarks.$$each --json build/bench/$$each.json || exit 1; \
	done
	$(BIN)/python -m tests.benchmarks.growth --json build/bench/growth.json \
		--plots $(or $(PLOTS),build/bench)

overshoot: $(INSTALLED)
	$(BIN)/python -m tests.overshoot $(if $(REDIS),--redis $(REDIS))
	$(BIN)/python -m tests.overshoot_lag
	$(BIN)/python -m tests.overshoot_cold_start

# If valgrind is missing, it needs root and Debian to install it.
guard: $(INSTALLED)
	command -v valgrind || apt-get install --quiet=2 --yes --no-install-recommends valgrind
	$(BIN)/python -m tests.benchmarks.instructions --guard
	$(BIN)/python -m tests.benchmarks.start --guard

# The README is also the page on PyPI, where relative links to files would be broken.
# REPOSITORY is the address of the repository's files.
dist: $(INSTALLED)
	rm -rf dist build/source
	mkdir -p build/source
	tar --create --exclude-vcs --exclude ./build --exclude ./$(VENV) . \
		| tar --extract --directory build/source
	$(BIN)/python -m tests.packaging.absolute_links build/source/README.md $(REPOSITORY)
	$(BIN)/python -m build --quiet --outdir dist build/source

release-check: dist
	$(BIN)/twine check --strict dist/*
	tests/packaging/release-check $(PYTHON) dist

clean:
	rm -rf $(VENV) build dist

$(VENV)/.installed-demo: setup.cfg pyproject.toml constraints.txt
	@echo "Installing the packages of the demo into $(VENV):"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check 'pip >= 25.1'
	$(BIN)/pip install --disable-pip-version-check --progress-bar on \
		--constraint constraints.txt --editable '.[sandbox]' --group demo
	touch $@

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check 'pip >= 25.1'
	$(BIN)/pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[$(EXTRAS)]' \
		--group test --group check --group docs
	touch $@
