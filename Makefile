# `make demo` and `make test` need Python 3.11 or newer and nothing else of ours.

PYTHON ?= python3
VENV ?= .venv
# What `make pytest` and `make chaos` hand to pytest: make pytest ARGS="tests/unit -k lock"
ARGS ?=

BIN = $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint types pytest check chaos format clean

help:
	@echo "make demo     migrate an example database, and look at the lock while it happens"
	@echo "make test     lint, types and every test, on SQLite and a real PostgreSQL"
	@echo "make lint     ruff, rules and format"
	@echo "make types    mypy, strict"
	@echo "make pytest   some of the tests, one at a time (ARGS=...)"
	@echo "make chaos    the chaos tests in their long form, with a table of figures (20 minutes)"
	@echo "make format   let ruff put right what it can"
	@echo "make clean    remove the virtual environment and what the tools left"

demo: $(VENV)/.installed
	@PATH="$(abspath $(BIN)):$$PATH" sh examples/demo.sh

# Most tests wait for processes and servers, so four at once cost a machine little; what measures a
# time that is promised (mark `alone`) comes after them, one by one, and has a second and a third
# try: a machine that stalls spoils one measurement, a promise that is broken spoils each.
test: lint types $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 4 --dist worksteal -m "not alone"
	$(BIN)/python -m pytest -m alone --reruns 2

check: test

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev
	$(BIN)/mypy

pytest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

chaos: $(VENV)/.installed-dev
	MSR_TEST_CHAOS=long MSR_TEST_START=script $(BIN)/python -m pytest tests/chaos $(ARGS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: an environment is made once, and filled again when pyproject.toml changes.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is not: name one, as in 'make test PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: install its venv module (on Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'  # the first that knows --group
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --quiet -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --quiet -e '.[all]' --group dev
	@touch $(VENV)/.installed $@
