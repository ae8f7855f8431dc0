# Each target does its whole set-up from nothing and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test lint format clean
help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.base ## watch the carried model answer questions; writes demo/report.html
	@$(BIN)/python -m tokenpacker.demo

test: $(VENV)/.dev ## run the tests
	@$(BIN)/python -m pytest

lint: $(VENV)/.dev ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.dev ## bring the code into shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis demo

# torch comes first and alone: what is installed after it then keeps that build.
$(VENV)/.torch: constraints.txt
	@echo "setting up $(VENV) (the first time takes a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml
	@$(PIP) -e '.[evaluate]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.base

.PHONY: test-conformance
test-conformance: $(VENV)/.dev ## run transformers' own common tests on our classes
	@$(BIN)/python tests/conformance/fetch.py
	@$(BIN)/python -m pytest tests/conformance
