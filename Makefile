# Every target sets up .venv by itself, so each works on a fresh machine that has Python 3.11-3.13 and make.
PYTHON ?= python3
BACKBONE ?= opt
PIP_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.offramp-ready

.PHONY: demo test test-research lint check records calibrated compare ablation analysis bench loads pages clean docs

demo: $(READY)  ## train and time exits on a tiny model; writes runs/demo/report.json (BACKBONE=opt or t5)
	$(BIN)/offramp demo --backbone $(BACKBONE)

# One worker a core; a worker takes tests from another that still has many.
PYTEST := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal
RESEARCH_TESTS := tests/research tests/benchmarks tests/examples

test: $(READY)  ## the tests of what is installed, without a network
	$(PYTEST) $(RESEARCH_TESTS:%=--ignore=%)

test-research: $(READY)  ## the tests of comparison, analysis, benchmarks, compiled code and the photo example
	$(PYTEST) $(RESEARCH_TESTS)

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test test-research

records: $(READY)  ## run both demos, keep their reports in records/, refill the pages' tables
	$(BIN)/offramp demo --backbone opt
	$(BIN)/offramp demo --backbone t5
	cp runs/demo/report-opt.json benchmarks/records/demo-opt.json
	cp runs/demo/report-t5.json benchmarks/records/demo-t5.json
	$(BIN)/python -m benchmarks.readme && $(BIN)/python -m benchmarks.plots

calibrated: $(READY)  ## what calibration promises and keeps; rewrites benchmarks/records/calibrated.json and violations.json
	$(BIN)/python -m benchmarks.calibrated
	$(BIN)/python -m benchmarks.readme && $(BIN)/python -m benchmarks.plots

compare: $(READY)  ## objectives and policies at equal quality; rewrites benchmarks/records/compare.json and docs/defaults.md
	$(BIN)/python -m benchmarks.compare
	$(BIN)/python -m benchmarks.readme && $(BIN)/python -m benchmarks.plots

ablation: $(READY)  ## the adversary against none, on two cores; rewrites benchmarks/records/ablation.json and docs/defaults.md
	$(BIN)/python -m benchmarks.ablation --shard 0/2 & $(BIN)/python -m benchmarks.ablation --shard 1/2; wait
	$(BIN)/python -m benchmarks.readme && $(BIN)/python -m benchmarks.plots

analysis: $(READY)  ## quality at every depth, overthinking; rewrites benchmarks/records/analysis.json
	$(BIN)/python -m benchmarks.analysis

bench: $(READY)  ## predicted and measured speed, and peers; 12 GB, a quiet machine; after `make records`
	$(BIN)/python -m benchmarks.bench
	$(BIN)/python -m benchmarks.readme && $(BIN)/python -m benchmarks.plots

loads: $(READY)  ## the batch engine under loads like those of use; rewrites benchmarks/records/loads.json and a part of engine.json
	$(BIN)/python -m benchmarks.loads.guesses --t5 runs/demo/t5
	$(BIN)/python -m benchmarks.loads.memory
	$(BIN)/python -m benchmarks.loads.arrivals
	$(BIN)/python -m benchmarks.readme && $(BIN)/python -m benchmarks.plots

pages: $(READY)  ## docs/report-opt.html and report-t5.html, with screenshots where Chromium is there; after `make records`
	$(BIN)/python -m benchmarks.pages

docs: $(READY)  ## the documentation as a site in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## everything that make and the tools left behind; other folders under runs/ stay
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache runs/demo
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp instead of the folder: a venv whose install failed half-way is set up again.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -e '.[dev]'
	touch $@
