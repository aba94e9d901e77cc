# make demo · test · check · bench · docs · clean. Each makes its own environment in .venv first; the second call is quick.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for name in python3.11 python3; do \
	command -v $$name >/dev/null 2>&1 && $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$name; break; }; done)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
PYTEST_ARGS ?=
BENCH ?=

.PHONY: help demo test check lint types imports docs wheel bench clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo    train the starter recipe, offline, and show where its report is'
	@echo 'make test    the whole test suite'
	@echo 'make check   style, types, import contracts, tests, documentation, package'
	@echo 'make docs    the documentation, into docs/_build/html'
	@echo 'make bench   list the benchmarks; make bench BENCH=name runs one'
	@echo 'make clean   remove what these commands made, .venv included'

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'graftlm needs Python 3.11 or newer: neither python3.11 nor python3 is one.' \
		'Install it, or name it: make PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# One stamp for each set of extras; a bigger set holds the smaller ones.
$(VENV)/.run $(VENV)/.test $(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
$(VENV)/.run:
	@echo 'Installing graftlm and what it needs into $(VENV) (a few minutes the first time)'
	$(INSTALL) .
	@touch $@
$(VENV)/.test:
	@echo 'Installing graftlm and what its tests need into $(VENV) (a few minutes the first time)'
	$(INSTALL) '.[test]'
	@touch $@ $(VENV)/.run
$(VENV)/.dev:
	@echo 'Installing graftlm and its tools into $(VENV) (a few minutes the first time)'
	$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.test $(VENV)/.run

demo: $(VENV)/.run
	$(BIN)/graftlm demo
	@echo 'The report: $(CURDIR)/runs/demo/report.html'

# worksteal keeps the order: the tests of a file share their fixtures
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

check: lint types imports test docs wheel

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	@echo 'The documentation: $(CURDIR)/docs/_build/html/index.html'

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel --outdir dist
	$(BIN)/python -m zipfile --list $(lastword $(sort $(wildcard dist/graftlm-*.whl)))

bench: $(VENV)/.test
ifeq ($(BENCH),)
	@echo 'Benchmarks; each README says what is measured and how long it takes. make bench BENCH=name BENCH_ARGS=... runs one.'
	@for folder in benchmarks/*/; do echo "  $$(basename $$folder)"; done
else
	$(BIN)/python benchmarks/$(BENCH)/run.py $(BENCH_ARGS)
endif

clean:
	rm -rf $(VENV) build dist docs/_build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
