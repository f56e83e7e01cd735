# `make` lists what there is to do. Every target works in a fresh clone.

PYTHON ?= python3
# The release taken where the environment has no torch. One that is there is never replaced.
TORCH ?= 2.13.0
BOOKS ?=
MODEL ?= src/turboattention/bundled/model

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
READY_DEV := $(VENV)/ready-dev
PIN := $(VENV)/torch-pin.txt

TORCH_HERE = $(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))'
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check

# $(call install,EXTRA): the package in place, with all it can use and EXTRA, around the torch that is there.
define install
@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP_INSTALL) torch==$(TORCH)
@$(TORCH_HERE) > $(PIN)
@echo "Installing turboattention[all,$(1)] around $$(cat $(PIN))"
@$(PIP_INSTALL) --quiet --constraint $(PIN) --editable '.[all,$(1)]'
@$(TORCH_HERE) | diff $(PIN) -
@touch $@
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test coverage lint lint-code lint-format lint-types lint-imports format model clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml | $(BIN)/python
	$(call install,test)

$(READY_DEV): pyproject.toml $(READY)
	$(call install,dev)

setup: $(READY) ## create .venv with the package and what its tests need

demo: $(READY) ## the bundled model over a long text, full precision beside the quantized cache
	$(BIN)/turboattention doctor
	$(BIN)/turboattention generate --demo --compare --max-new-tokens 32

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -q --durations=10

coverage: $(READY) ## run the tests and list the lines that none of them reaches
	$(BIN)/python -m pytest -q --cov=src

lint: lint-code lint-format lint-types lint-imports ## every static check, the same as pre-commit and CI

lint-code: $(READY_DEV)
	$(BIN)/ruff check

lint-format: $(READY_DEV)
	$(BIN)/ruff format --check

lint-types: $(READY_DEV)
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

lint-imports: $(READY_DEV)
	$(BIN)/lint-imports

format: $(READY_DEV) ## format the code and mend what can be mended safely
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

model: $(READY) ## train the bundled model anew: make model BOOKS=folder-with-train.txt
	@test -n "$(BOOKS)" || { echo 'BOOKS: expected a folder with train.txt, as in make model BOOKS=books'; exit 2; }
	$(BIN)/python training/train.py --books '$(BOOKS)' --out '$(MODEL)'

clean: ## remove what builds, tests and linters left behind; .venv stays
	rm -rf build dist htmlcov .coverage .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
