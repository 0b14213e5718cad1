# A stamp keeps the virtual environment up to date with pyproject.toml.
PYTHON ?= python3
STAMP := .venv/installed

.PHONY: help run test test-debian test-servers mutants bench lint clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | expand -t 14

run: $(STAMP)  ## Serve on an embedded PostgreSQL, with a runaway job to stop
	@.venv/bin/beacon-stop serve --demo

test: $(STAMP)  ## Run the whole suite
	.venv/bin/python tests/side_by_side.py tests $(ARGS)

test-debian: $(STAMP) .venv/debian  ## Run the whole suite on Debian's PostgreSQL 15 (as root)
	BEACON_TEST_POSTGRES=/usr/lib/postgresql/15/bin .venv/bin/python tests/side_by_side.py tests $(ARGS)

test-servers: $(STAMP) .venv/debian  ## Run it behind WSGI servers, proxies, poolers, standbys and shards (Debian, as root)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-cache-dir gunicorn gevent waitress cheroot granian uwsgi
	.venv/bin/python tests/side_by_side.py tests/servers $(ARGS)

mutants: $(STAMP)  ## Break the code on purpose, and print what no test notices (hours; ARGS='--sample 50')
	@.venv/bin/python tests/mutants.py $(ARGS)

bench: .venv/debian-bench  ## Measure speed against its limits and its peers (Debian, as root; under ten minutes)
	@/usr/bin/python3 -m venv .venv/bench/python  # Debian's own, which is built to be fast, whatever PYTHON is
	@.venv/bench/python/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[embedded,test]' \
		granian bjoern cheroot fastapi 'uvicorn[standard]' asyncpg flask sqlalchemy psycopg2-binary gunicorn
	@.venv/bench/python/bin/python tests/bench/bench.py $(ARGS)

lint: $(STAMP)  ## Check style and types
	.venv/bin/python -m pip install --quiet ruff mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:  ## Remove what the other targets made
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache tests/.ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[embedded,test]'
	touch $@

# Debian's packages that these need; RUNLEVEL keeps their services from being started.
.venv/debian: PACKAGES = nginx-light haproxy pgbouncer apache2 libapache2-mod-wsgi-py3 postgresql-15-plproxy postgresql-15-plpgsql-check \
	gcc python3-dev
.venv/debian-bench: PACKAGES = wrk valgrind golang-go golang-github-gin-gonic-gin-dev golang-github-jackc-pgx-v4-dev gcc python3-dev python3-venv libev-dev \
	$(shell command -v npm >/dev/null || echo npm)
.venv/debian .venv/debian-bench: Makefile | $(STAMP)
	apt-get update -qq
	RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql-15 $(PACKAGES)
	touch $@
