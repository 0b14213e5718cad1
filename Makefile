# A stamp keeps the virtual environment up to date with pyproject.toml.
PYTHON ?= python3
STAMP := .venv/installed
SERVERS := gunicorn gevent waitress cheroot granian uwsgi
DEBIAN := nginx-light haproxy pgbouncer postgresql-15 postgresql-15-plproxy apache2 libapache2-mod-wsgi-py3

.PHONY: help run test test-servers lint clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | expand -t 12

run: $(STAMP)  ## Serve on an embedded PostgreSQL, with a runaway job to stop
	@.venv/bin/beacon-stop serve --demo

test: $(STAMP)  ## Run the whole suite
	.venv/bin/python -m pytest $(ARGS)

test-servers: $(STAMP)  ## Run the tests behind other servers, proxies and poolers (Debian, as root)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(SERVERS)
	@dpkg -s $(DEBIAN) >/dev/null 2>&1 || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(DEBIAN); }
	.venv/bin/python -m pytest tests/servers $(ARGS)

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
