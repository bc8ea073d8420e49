# Needs GNU make and Python 3.10 or newer. Override with: make test VENV=/somewhere PYTHON=python3.12
VENV ?= .venv
PYTHON ?= python3
# What pip is given besides the project: the developers' pins, or other versions (see ci.yml).
PIP_ARGS ?= -c constraints.txt
# LOCKED=1 installs only files whose hashes stand in requirements-dev.lock; Python 3.11 or newer.
# loadgroup: tests of one group share a worker, and what they have imported and converted.
PYTEST_ARGS ?= -n 2 --dist loadgroup

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs_installed

.DEFAULT_GOAL := help
.PHONY: help setup lock audit demo bench bench-gpu test fuzz matrix soak docs lint check-format check-ruff check-mypy check-pyright format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make the virtual environment and install the project in it

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifdef LOCKED
	$(BIN)/python -m pip install --require-hashes --no-deps -r requirements-dev.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
else
	$(BIN)/python -m pip install $(PIP_ARGS) -e ".[dev]"
endif
	@touch $@

lock: setup ## write requirements-dev.lock anew: every version, with the hashes of its files
	$(BIN)/python -m pip install $(PIP_ARGS) uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-annotate \
		--custom-compile-command "make lock" \
		--extra dev --extra docs -c constraints.txt -o requirements-dev.lock pyproject.toml

audit: setup ## ask the advisory database about every version of requirements-dev.lock; needs the internet
	$(BIN)/python -m pip install $(PIP_ARGS) pip-audit
	$(BIN)/pip-audit --disable-pip --require-hashes -r requirements-dev.lock

demo: setup ## train, quantize and export a small network
	$(BIN)/python examples/digits.py

bench: setup ## measure training steps, memory and exports, in a short form
	$(BIN)/python -m benchmarks.step --kernels
	$(BIN)/python -m benchmarks.step --small --rounds 4
	$(BIN)/python -m benchmarks.step --small --memory --nets resnet18 mobilenet
	$(BIN)/python -m benchmarks.distributed
	$(BIN)/python -m benchmarks.export --only targets --rounds 1

bench-gpu: setup ## on a CUDA card: its tests, training steps and bandwidth, in ten minutes
	$(BIN)/python -m benchmarks.gpu

# One thread in each of the two workers: more threads than cores makes them wait for each other.
test: export OMP_NUM_THREADS = 1
test: export MKL_NUM_THREADS = 1
test: export OPENBLAS_NUM_THREADS = 1
test: setup ## run the tests and doctests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

fuzz: setup ## give every reader of files broken ones for a minute each
	$(BIN)/python -m reliability.fuzz

matrix: setup ## try the supported versions of other packages, an environment each; prints what passed
	$(BIN)/python -m reliability.matrix

soak: setup ## train, export and start for hours; prints what grows
	$(BIN)/python -m reliability.soak

docs: $(DOCS_STAMP) ## build the documentation into site/; its warnings and broken links are errors
	$(BIN)/python docs/build.py

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install $(PIP_ARGS) -e ".[docs]"
	@touch $@

lint: check-format check-ruff check-mypy check-pyright ## run all four checks; pre-commit runs the same

check-format: setup
	$(BIN)/ruff format --check

check-ruff: setup
	$(BIN)/ruff check

check-mypy: setup
	$(BIN)/mypy

check-pyright: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup ## format the code and mend what ruff can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## remove what builds, checks and runs leave behind; keeps the virtual environment
	rm -rf build dist site .cache qat_export lightning_logs .mypy_cache .ruff_cache .pytest_cache
	find lightning_qat exporters tests examples benchmarks reliability -name __pycache__ -prune -exec rm -rf {} +
