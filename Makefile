# SPDX-License-Identifier: GPL-2.0-or-later
# The front door: each target sets up what it needs, and is quick when all is there.

PYTHONS := $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11
BIN     := .venv/bin
KERNELS ?= 6.1
# those that take longest first, so that both jobs end together
SUITES  := $(wildcard tests/vm tests/exec tests/pure)
JOBS    ?= 2
BENCHES := $(filter-out bench/_%,$(wildcard bench/*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test check bench stress stress-suite
.PHONY: check-format check-lint check-types check-layers check-driver

help:
	@echo 'make demo     count, cost and safety shown in a throw-away VM; touches nothing else'
	@echo 'make test     all tests; those that need a VM only where one can run (KERNWEAVE_VM=1: must)'
	@echo 'make check    format, lint, types, layers, and the driver through sparse and checkpatch'
	@echo 'make bench    all benchmarks, compared with the committed results'
	@echo 'make stress   torture of every kernel in every boot mode, as far as it is not done yet;'
	@echo '              KERNEL=6.1 MODE=full ENGINE=weave SEED=1 MINUTES=2, or some of them: that one at once'
	@echo 'make stress-suite  the other long tests: many sessions, kill -9, poisoned registers'
	@echo 'JOBS=2 test files at a time (0: one after the other, in one process)'
	@echo 'PYTHON=FILE names the interpreter for .venv; KERNELS="6.1 7.2" those the driver is checked for'

demo: .venv/stamp
	@$(BIN)/python examples/demo.py

test: .venv/stamp
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(SUITES)

stress: .venv/stamp
	@PYTHONPATH=tests:tests/vm $(BIN)/python tests/stress/run_torture.py \
		--kernel='$(KERNEL)' --mode='$(MODE)' --engine='$(ENGINE)' --seed='$(SEED)' --minutes='$(MINUTES)'

stress-suite: .venv/stamp
	$(BIN)/pytest tests/stress

bench: .venv/bench-stamp
	@set -e; for file in $(BENCHES); do echo "$$file"; $(BIN)/python "$$file"; done

# `make -k check` goes on after the first part that fails
check: check-format check-lint check-types check-layers check-driver

check-format: .venv/stamp
	$(BIN)/ruff format --check

check-lint: .venv/stamp
	$(BIN)/ruff check

check-types: .venv/stamp
	$(BIN)/mypy src tests $(wildcard bench/*.py examples/*.py)

check-layers: .venv/stamp
	$(BIN)/lint-imports

check-driver: .venv/stamp
	$(BIN)/python tests/driver_gate.py $(KERNELS)

# --- the virtual environment: made once, and again when pyproject.toml changes ---

.venv/stamp: pyproject.toml
	@set -e; \
	if ! $(BIN)/python -c '' 2>/dev/null; then \
		found=; \
		for python in $(PYTHONS); do \
			if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
				found=$$python; break; \
			fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo 'error: no Python 3.11 or newer' >&2; \
			echo '  help: sudo apt-get install python3 python3-venv' >&2; exit 1; \
		fi; \
		if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
			echo "error: $$found cannot make a virtual environment" >&2; \
			echo '  help: sudo apt-get install python3-venv' >&2; exit 1; \
		fi; \
		echo "making .venv with $$("$$found" --version)"; \
		"$$found" -m venv --clear .venv; \
	fi
	@$(BIN)/python -m pip install -q --disable-pip-version-check 'pip>=25.1'
	@$(BIN)/python -m pip install -q --disable-pip-version-check --editable . --group dev
	@touch $@

.venv/bench-stamp: .venv/stamp
	@$(BIN)/python -m pip install -q --disable-pip-version-check --editable '.[bench]'
	@touch $@
