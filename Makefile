# `make demo` and `make test` work alone on a fresh clone with Python 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all check bench help clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'fedlora needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,faiss]'
	touch $@

demo: $(STAMP) ## set up, then run the quick start: federated LoRA on the bundled model and data
	$(BIN)/fedlora run quickstart --overwrite

test: $(STAMP) ## set up, then run the tests
	$(BIN)/python -m pytest -q

test-all: $(STAMP) ## the tests, slow ones included
	$(BIN)/python -m pytest -q -m "slow or not slow"

check: $(STAMP) ## lint and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## run the benchmarks
	$(BIN)/python -m benchmarks

clean: ## remove the environment and build products; runs/ holds results and stays
	rm -rf $(VENV) build *.egg-info
