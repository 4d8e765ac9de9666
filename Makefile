# Everything a fresh clone needs: `make demo` and `make test` set up .venv themselves, once.
#
# torch: the package index gives a CUDA build of several GB on Linux. For the CPU build:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Another interpreter (CPython 3.11 or 3.12): make setup PYTHON=/path/to/python3.11

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?=
TORCH_INDEX ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=

# Two processes run the tests of one that computes with one thread; those that start processes follow one another.
PARALLEL := -n 2 --dist loadgroup
EVERYTHING := -m '' --hypothesis-profile everything

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.setup-done

.PHONY: help setup demo test test-all lint format protos clean distclean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make .venv with everything in it; again when pyproject.toml or constraints.txt change.

$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  python=; \
	  for candidate in $(or $(PYTHON),python3.11 python3 python3.12); do \
	    if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then \
	      python="$$candidate"; break; \
	    fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "make setup: no CPython 3.11 or 3.12 found; install one (Debian 12: apt-get install python3-venv)" \
	      "or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "make setup: $$python cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; \
	    exit 1; \
	  fi; \
	  echo "making .venv with $$("$$python" --version)"; \
	  "$$python" -m venv --clear .venv; \
	fi
	@echo "installing torch"
	@$(PIP) install -q -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@echo "installing isthmus[dev] (about 1.8 GB in all; some minutes)"
	@$(PIP) install -q -c constraints.txt -e '.[dev]'
	@$(PIP) check
	@touch $@

demo: setup  ## Fine-tune the default model over a coordinator and three devices. DEMO_ARGS="--steps 20"
	@echo "isthmus demo $(DEMO_ARGS)"
	@$(BIN)/isthmus demo $(DEMO_ARGS)

test: setup  ## Run the tests and checks of every change. PYTEST_ARGS="tests/split -k lora"
	@echo "pytest $(PARALLEL) $(PYTEST_ARGS)"
	@$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-all: setup  ## The same with all combinations and examples; takes several times as long.
	@echo "pytest $(PARALLEL) $(EVERYTHING) $(PYTEST_ARGS)"
	@$(BIN)/python -m pytest $(PARALLEL) $(EVERYTHING) $(PYTEST_ARGS)

lint: setup  ## ruff, mypy --strict, and which package may import which.
	@echo "ruff check"; $(BIN)/ruff check .
	@echo "ruff format --check"; $(BIN)/ruff format --check .
	@echo "mypy"; $(BIN)/mypy
	@echo "lint-imports"; $(BIN)/lint-imports

format: setup  ## Let ruff format the code and mend what it can.
	@echo "ruff"; $(BIN)/ruff check --fix .; $(BIN)/ruff format .

protos: setup  ## Generate the Python code of protos/v1/*.proto again.
	@echo "generating protos/v1"; $(BIN)/python scripts/generate_protos.py

clean:  ## Remove caches, build outputs and the demo's folder; .venv stays.
	@echo "removing caches, build outputs, isthmus-demo"
	@rm -rf build dist isthmus-demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv too.
	@echo "removing .venv"
	@rm -rf .venv *.egg-info
