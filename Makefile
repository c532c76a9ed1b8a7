# Needs Python >= 3.10 and git. Every target sets up its own virtual environment first.
PYTHON ?= python3
VENV   ?= .venv
DATA   ?=
CONFIG ?= 3d_fullres
DEVICE ?= auto
OUTPUT ?= demo_output
PYTEST ?=
MINUTES ?= 10

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz faults lint docs clean-demo

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'
	@echo
	@echo "  make demo DATA=/path/to/Dataset123_Name CONFIG=2d DEVICE=cuda OUTPUT=demo_output"
	@echo "  make test PYTEST='-m \"not integration\"'"

demo: $(VENV)/.installed ## Plan, pretrain, train, predict, evaluate and report, on phantoms or on DATA=<nnU-Net raw dataset folder>
	@$(BIN)/python examples/demo.py --data "$(DATA)" --configuration $(CONFIG) --device $(DEVICE) --output "$(OUTPUT)"

test: lint ## Lint, type check and run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST)

fuzz: $(VENV)/.installed-test ## Random wrong files for every reader, for MINUTES=10, and docs/reliability.md
	PYTHONPATH=benchmarks $(BIN)/python -m reliability.fuzz --minutes $(MINUTES)
	PYTHONPATH=benchmarks $(BIN)/python -m reliability.page

faults: $(VENV)/.installed-test ## Runs that are killed, stopped or starved (half an hour), and docs/reliability.md
	PYTHONPATH=benchmarks $(BIN)/python -m reliability.faults
	PYTHONPATH=benchmarks $(BIN)/python -m reliability.page

lint: $(VENV)/.installed-test ## Lint and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples
	$(BIN)/mypy benchmarks

docs: $(VENV)/.installed-docs ## Build the documentation into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean-demo: ## Delete everything that the demo made
	rm -rf -- "$(OUTPUT)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10; run make with PYTHON=/path/to/python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(wildcard startup/*.*) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(wildcard startup/*.*) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml $(wildcard startup/*.*) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[docs]'
	@touch $@
