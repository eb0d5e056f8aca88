PYTHON ?= python3
BIN := .venv/bin

# Two processes share the tests (make test WORKERS=8: eight); each takes about 1 GB and its share of the cores.
WORKERS ?= 2
# Slow tests wait half of their time, for Slurm, for signals and for workers: twice as many processes fill the cores.
ALL_WORKERS ?= $(shell expr $(WORKERS) \* 2)
PYTEST := $(BIN)/python -m pytest --dist worksteal --durations 15 --numprocesses

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-ray test-all soak bench bench-gpu lint site package format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(BIN)/.installed ## make .venv with everything the commands and the tests need

# A stamp, written last: an interrupted install starts again.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "anomaly_lab needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,parallel,slurm,optuna,dashboard,onnx,site]'
	touch $@

demo: install ## train one network on the embedded digits, then the floors and what is best; show the table
	$(BIN)/anomaly-lab normal_class=8
	$(BIN)/anomaly-lab -m model=mean_image,pca,knn,scatter_subspace normal_class=8
	$(BIN)/anomaly-lab-report runs

test: install ## run the tests but the slow ones; real data in ANOMALY_LAB_DATA and a GPU are used where they are there
	$(PYTEST) $(WORKERS) -m 'not slow and not ray'

# Marked slow: a real Slurm, processes that are killed, signals to real processes, launchers with worker processes, full
# disks, several runs at a time to the bit, the contract of all methods but one of each kind, the notebook, a bare
# Lightning Trainer held to a run for most classes of detectors, the wheel in an environment of its own, benchmarks,
# committed results and their commands composed anew, the site and its links, stopped runs in another memory layout, replayed
# steps of all methods but one, methods trained until they detect.
test-slow: install ## run the tests that `make test` leaves out
	$(PYTEST) $(ALL_WORKERS) -m slow

# One process: a Ray and its workers are at work for each test.
test-ray: $(BIN)/.ray ## run the tests that start a real Ray, and install it for them
	$(BIN)/python -m pytest tests/test_ray.py

# A stamp of its own: 200 MB that nothing else needs.
$(BIN)/.ray: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	touch $@

# In one go: the fast tests fill the cores while slow ones wait, which is five minutes less than one after the other.
test-all: $(BIN)/.ray ## run every test, each once
	$(PYTEST) $(ALL_WORKERS)

soak: install ## kill sweeps 60 times and compare what they end with: docs/soak.md (a quarter of an hour)
	$(BIN)/python tests/soak.py --kills 60 --commands 6 --out docs/soak.json --page docs/soak.md

bench: $(BIN)/.bench ## measure speed on this CPU against other loops and packages: benchmarks/README.md (20 minutes)
	$(BIN)/python -m benchmarks cpu

bench-gpu: $(BIN)/.bench ## the same on this machine's GPU (never timed so far)
	$(BIN)/python -m benchmarks gpu

# A stamp of its own: nothing else needs the packages that are compared with.
$(BIN)/.bench: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The variable silences an advertisement of mkdocs-material's makers.
site: install ## build the site into build/site; a link that leads nowhere fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --config-file site/mkdocs.yml

package: install ## build the wheel and the source distribution into dist/, and check what a package index would show
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

format: install ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; data and runs stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
