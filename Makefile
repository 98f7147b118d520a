# Needs Python >= 3.11, make and git. One stamp per extra inside .venv; a changed pyproject.toml renews it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRA := $(VENV)/.installed-
INCLUDES_test := wandb
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
INCLUDES_dev := test wandb

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-compat test-harness test-gpu lint check fix docs check-release

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(EXTRA)test  ## create .venv and install the package with its test tools

demo: $(EXTRA)wandb  ## train gates on the embedded model, then evaluate them against heuristics
	$(BIN)/python train.py
	$(BIN)/python eval.py

test: $(EXTRA)test  ## run the default tests: CPU, offline
	$(BIN)/python -m pytest $(PARALLEL)

test-compat:  ## run the family identities on the oldest and newest transformers and torch
	$(PYTHON) scripts/test_compat.py

test-harness:  ## run the adapters of lm-evaluation-harness and lmms-eval in environments of their own
	$(PYTHON) scripts/test_harness.py

test-gpu: $(EXTRA)test  ## run the tests that need CUDA
	$(BIN)/python -m pytest -m gpu

lint: $(EXTRA)dev  ## check format, style, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

check: lint  ## everything that CI runs: lint, then the tests
	$(BIN)/python -m pytest $(PARALLEL)

fix: $(EXTRA)dev  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(EXTRA)docs  ## build the documentation into build/site
	$(BIN)/mkdocs build --strict --quiet

check-release: $(BIN)/pip  ## build wheel and sdist, install them elsewhere, run the demo there, resolve the extras
	$(BIN)/python scripts/check_release.py

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: retention needs Python 3.11 or newer and $(PYTHON) is not; pass another, as in make PYTHON=python3.11 setup" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(EXTRA)%: pyproject.toml | $(BIN)/pip
	@echo "installing retention[$*] into $(VENV), some minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	@touch $(addprefix $(EXTRA),$* $(INCLUDES_$*))
