# Every target works from a fresh clone; the first run of each installs what it needs into $(VENV).

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# Installed sets are stamped with the hash of what they were made from, so that a second run costs nothing.
HASH := $(shell cat pyproject.toml | cksum | cut -d' ' -f1)
RUNTIME := $(VENV)/.installed-runtime-$(HASH)
DEVELOPMENT := $(VENV)/.installed-development-$(HASH)

.DEFAULT_GOAL := help
.PHONY: help venv demo test sim bench bench-nbd lint clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(DEVELOPMENT) ## make the virtual environment with everything for development

demo: $(RUNTIME) ## migrate a disk under load between two processes, and verify every byte (ARGS="--json")
	@$(BIN)/silo demo $(ARGS)

test: $(DEVELOPMENT) ## run the tests; as root on Debian, first install the programs that they talk to
	@scripts/install-interop
	$(BIN)/pytest -n auto --dist worksteal $(ARGS)

sim: $(DEVELOPMENT) ## run the simulations over many seeds (SEEDS=1000), or over one (SEED=17)
	SILO_SIM_SEEDS=$(or $(SEEDS),1000) SILO_SIM_SEED=$(SEED) $(BIN)/pytest -n auto --dist worksteal -m sim $(ARGS)

bench: $(DEVELOPMENT) ## measure everything against the programs that do the same; prints tables
	@scripts/install-interop
	$(BIN)/python -m benchmarks $(ARGS)

bench-nbd: $(DEVELOPMENT) ## measure the NBD server against nbdkit and qemu-nbd
	@scripts/install-interop
	$(BIN)/python -m benchmarks.nbd $(ARGS)

lint: $(DEVELOPMENT) ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## remove the virtual environment, caches and what the demo left
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist demo-output bench-output
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: Silo needs Python 3.11 or later" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version) is too old: Silo needs 3.11 or later (make PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments (Debian package python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): | $(BIN)/python
	$(BIN)/python -m pip install -q -e .
	@rm -f $(VENV)/.installed-runtime-*
	@touch $@

$(DEVELOPMENT): | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[test,dev]'
	@rm -f $(VENV)/.installed-*
	@touch $@ $(RUNTIME)
