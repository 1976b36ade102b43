# `make demo` and `make test` work alone on a fresh clone with Python 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: demo test test-all check bench docs help clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'fedlora needs Python 3.11 or newer: make PYTHON=python3.11')"
	@echo "Installing fedlora and its libraries into $(VENV): once, 2 to 10 minutes by the network, about 2 GB with torch for the CPU"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,faiss]'
	touch $@

demo: $(STAMP) ## set up, then run the quick start: federated LoRA on the bundled model and data
	@echo "Running the quick start: about a minute on two cores"
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

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,faiss,docs]'
	touch $@

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS_STAMP) ## set up, then write the documentation as a site to site/
	$(BIN)/python docs/generators/configuration_reference.py
	$(BIN)/python docs/generators/station_drawing.py
	$(BIN)/mkdocs build --strict --quiet

clean: ## remove the environment and build products; runs/ holds results and stays
	rm -rf $(VENV) build site *.egg-info
