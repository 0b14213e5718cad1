# A stamp keeps the virtual environment up to date with pyproject.toml.
PYTHON ?= python3
STAMP := .venv/installed

.PHONY: help run test lint clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | expand -t 12

run: $(STAMP)  ## Serve on an embedded PostgreSQL, with a runaway job to stop
	@.venv/bin/beacon-stop serve --demo

test: $(STAMP)  ## Run the whole suite
	.venv/bin/python -m pytest $(ARGS)

lint: $(STAMP)  ## Check style and types
	.venv/bin/python -m pip install --quiet ruff mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:  ## Remove what the other targets made
	rm -rf .venv .beacon .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[embedded,test]'
	touch $@
