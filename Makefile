# make demo   install into .venv and run the example on this machine
# make docs   the documentation as a site in build/site
# make package  source archive and wheel in dist/, checked
# make test   install everything the tests need and run them all, lint included, files side by side on JOBS cores
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN     = $(VENV)/bin
JOBS   ?= 3
TYPED   = build/typed

.PHONY: demo test lint docs package clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/qcompiler demo

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# mypy sees the sub-packages where an installed package has them.
lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff . ; exit 1; }
	rm -rf $(TYPED) && mkdir -p $(TYPED)/qcompiler
	ln -s $(CURDIR)/qcompiler/* $(CURDIR)/passes $(CURDIR)/schedules $(TYPED)/qcompiler/
	cd $(TYPED) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p qcompiler

# The documentation as a site in build/site; a warning is an error.
docs: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Source archive and wheel in dist/, the wheel made from the archive; both checked.
package: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --editable '.[package]'
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml setup.py targets.yaml $(wildcard qcompiler/*.py qcompiler/*/*.py passes/*.py passes/*/*.py schedules/*.py schedules/*/*.py) | $(BIN)/python
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m pip install --quiet .
	rm -f $(VENV)/.test && touch $@

$(VENV)/.test: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test,lint]'
	rm -f $(VENV)/.demo && touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
