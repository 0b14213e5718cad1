"""sql/38_emergency_stop_faults.sql: whatever would keep the brake from working is named before it is needed."""

import statistics
import threading
import time

import beacon_stop
import psycopg
import pytest

from conftest import Client, change_function, in_thread, wait_until
from test_privileges import CALLS

FAULTS = "SELECT * FROM emergency_stop_faults()"


@pytest.fixture
def faults(service):
    """What the service's role is told."""

    def faults():
        return [fault for (fault,) in service.execute(FAULTS)]

    return faults


def test_after_the_installation_there_is_none_for_the_service_and_for_the_owner(db, faults):
    assert faults() == []
    assert db.execute(FAULTS).fetchall() == []


# What is done to the installation, what is said then, and what mends it.
FAULTY = {
    "a disabled trigger": (
        "ALTER TABLE executions DISABLE TRIGGER guard_inserted_executions",
        "trigger guard_inserted_executions on table executions is disabled",
        "ALTER TABLE executions ENABLE TRIGGER guard_inserted_executions",
    ),
    "a trigger for replicas only": (
        "ALTER TABLE jobs ENABLE REPLICA TRIGGER guard_updated_job",
        "trigger guard_updated_job on table jobs is disabled",
        "ALTER TABLE jobs ENABLE ALWAYS TRIGGER guard_updated_job",
    ),
    "a trigger that is gone": (
        "ALTER TRIGGER guard_updated_execution ON executions RENAME TO another",
        "trigger guard_updated_execution on table executions is missing",
        "ALTER TRIGGER another ON executions RENAME TO guard_updated_execution",
    ),
    "a trigger of the name that calls something else": (
        "CREATE FUNCTION another() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        "CREATE OR REPLACE TRIGGER guard_updated_job AFTER UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION another()",
        "trigger guard_updated_job on table jobs is missing",
        "CREATE OR REPLACE TRIGGER guard_updated_job AFTER UPDATE ON jobs FOR EACH ROW"
        " WHEN (OLD.status = ANY ('{completed,failed,cancelled}')) EXECUTE FUNCTION guard_updated_job()",
    ),
    "a function that finds the caller's tables": (
        "ALTER FUNCTION commit_durably() RESET search_path",
        "function commit_durably() is not the one that was installed: it was changed since",
        "ALTER FUNCTION commit_durably() SET search_path = public, pg_temp",
    ),
    "records that can be changed": (
        "ALTER TABLE emergency_stops DISABLE TRIGGER ALL",
        "trigger append_only on table emergency_stops is disabled",
        "ALTER TABLE emergency_stops ENABLE TRIGGER ALL",
    ),
    "a function that is gone": (
        "ALTER FUNCTION get_job(text) RENAME TO another",
        "function get_job(text) is missing",
        "ALTER FUNCTION another(text) RENAME TO get_job",
    ),
    "a helper that is gone": (
        "ALTER FUNCTION job_barrier(text) RENAME TO another",
        "function job_barrier(text) is missing",
        "ALTER FUNCTION another(text) RENAME TO job_barrier",
    ),
    "a function with other arguments": (
        "ALTER FUNCTION release_job(text,text,text,jsonb) RENAME TO another;CREATE FUNCTION release_job(int) RETURNS int RETURN 1",
        "function release_job(text,text,text,jsonb) is missing: the one that is there has other arguments",
        "DROP FUNCTION release_job; ALTER FUNCTION another RENAME TO release_job",
    ),
    "a function that runs as its caller": (
        "ALTER FUNCTION emergency_stop_job SECURITY INVOKER",
        "function emergency_stop_job(text,text,boolean,jsonb) is not the one that was installed: it was changed since",
        "ALTER FUNCTION emergency_stop_job SECURITY DEFINER",
    ),
    "a function that the role may not execute": (
        "REVOKE EXECUTE ON FUNCTION emergency_stop_jobs FROM beacon_service",
        "role beacon_service may not execute function emergency_stop_jobs(text[],text,jsonb,boolean,interval)",
        "GRANT EXECUTE ON FUNCTION emergency_stop_jobs TO beacon_service",
    ),
    "a state of executions that is forbidden": (
        "ALTER TABLE executions ADD CHECK (status IN ('pending', 'running', 'done'))",
        "constraint executions_status_check on table executions forbids the status failed",
        "ALTER TABLE executions DROP CONSTRAINT executions_status_check",
    ),
    "a state of jobs that is forbidden, by a function": (
        "CREATE FUNCTION is_known(text) RETURNS boolean LANGUAGE plpgsql"
        " AS $$ BEGIN RAISE 'unknown state %', $1; END $$;"
        "ALTER TABLE jobs ADD CONSTRAINT known CHECK (is_known(status))",
        "constraint known on table jobs forbids the status failed",
        "ALTER TABLE jobs DROP CONSTRAINT known",
    ),
    "a table that is gone": (
        "ALTER TABLE emergency_stops RENAME TO another",
        "table emergency_stops is missing",
        "ALTER TABLE another RENAME TO emergency_stops",
    ),
    "an index that is not valid": (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'executions_job_id_unfinished_idx'::regclass",
        "index executions_job_id_unfinished_idx is not valid",
        "UPDATE pg_index SET indisvalid = true WHERE indexrelid = 'executions_job_id_unfinished_idx'::regclass",
    ),
    "an index that is gone": (
        "ALTER INDEX executions_job_id_id_idx RENAME TO another",
        "index executions_job_id_id_idx is missing",
        "ALTER INDEX another RENAME TO executions_job_id_id_idx",
    ),
    "an index of the records that is gone": (
        "ALTER INDEX emergency_stops_job_id_id_idx RENAME TO another",
        "index emergency_stops_job_id_id_idx is missing",
        "ALTER INDEX another RENAME TO emergency_stops_job_id_id_idx",
    ),
    "an index of the name in another order": (
        "ALTER INDEX executions_job_id_id_idx RENAME TO another;CREATE INDEX executions_job_id_id_idx ON executions (job_id, id DESC)",
        "index executions_job_id_id_idx is not valid",
        "DROP INDEX executions_job_id_id_idx; ALTER INDEX another RENAME TO executions_job_id_id_idx",
    ),
    "an index of the name on another table": (
        "ALTER INDEX executions_job_id_id_idx RENAME TO another; CREATE TABLE theirs (job_id text, id bigint);"
        "CREATE INDEX executions_job_id_id_idx ON theirs (job_id, id)",
        "index executions_job_id_id_idx is missing",
        "DROP TABLE theirs; ALTER INDEX another RENAME TO executions_job_id_id_idx",
    ),
    "a column of another name": (
        "ALTER TABLE executions RENAME output TO output_data",
        "column executions.output is missing",
        "ALTER TABLE executions RENAME output_data TO output",
    ),
    "a column of another type": (
        "ALTER TABLE jobs ALTER metadata TYPE json",
        "column jobs.metadata has type json: expected jsonb",
        "ALTER TABLE jobs ALTER metadata TYPE jsonb",
    ),
    "a column that is generated": (
        "ALTER TABLE executions DROP completed_at, ADD completed_at timestamptz GENERATED ALWAYS AS (started_at) STORED",
        "column executions.completed_at is generated: expected one that can be set",
        "ALTER TABLE executions DROP completed_at, ADD completed_at timestamptz",
    ),
    "a column of the record": (
        "ALTER TABLE emergency_stops RENAME reason TO why",
        "column emergency_stops.reason is missing: expected text or character varying",
        "ALTER TABLE emergency_stops RENAME why TO reason",
    ),
    "a child": (
        "CREATE TABLE child () INHERITS (executions)",
        "executions is not an ordinary table: expected one without partitions or children",
        "DROP TABLE child",
    ),
    "a function that answers NULL": (
        "ALTER FUNCTION emergency_stop_job STRICT",
        "function emergency_stop_job(text,text,boolean,jsonb) is not the one that was installed: it was changed since",
        "ALTER FUNCTION emergency_stop_job CALLED ON NULL INPUT",
    ),
    "a trigger for some columns only": (
        """CREATE OR REPLACE TRIGGER guard_updated_job AFTER UPDATE OF id ON jobs FOR EACH ROW
        WHEN (OLD.status = ANY ('{completed,failed,cancelled}')) EXECUTE FUNCTION guard_updated_job()""",
        "trigger guard_updated_job on table jobs is disabled",
        """CREATE OR REPLACE TRIGGER guard_updated_job AFTER UPDATE ON jobs FOR EACH ROW
        WHEN (OLD.status = ANY ('{completed,failed,cancelled}')) EXECUTE FUNCTION guard_updated_job()""",
    ),
    "no foreign key": (
        "ALTER TABLE executions DROP CONSTRAINT executions_job_id_fkey",
        "warning: no foreign key leads from executions.job_id to jobs, so executions can be added for jobs that do not exist",
        "ALTER TABLE executions ADD CONSTRAINT executions_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs",
    ),
    "a list of functions that is gone": (
        "ALTER FUNCTION installed_functions() RENAME TO another",
        "the installation is not complete: the list of the functions that were installed is missing",
        "ALTER FUNCTION another() RENAME TO installed_functions",
    ),
}


def test_triggers_that_do_not_fire_in_any_session_are_a_fault(db):
    db.execute("SET session_replication_role = 'replica'")
    assert db.execute(FAULTS).fetchall() == [("session_replication_role is replica: the triggers of the guard do not fire",)]


@pytest.mark.parametrize("name", FAULTY)
def test_each_fault_is_named_until_it_is_mended(db, faults, name):
    break_it, sentence, mend_it = FAULTY[name]

    db.execute(break_it)
    assert faults() == [sentence]
    db.execute(mend_it)
    assert faults() == []


def test_a_function_that_was_replaced_is_named(db, faults):
    db.execute("""
        CREATE OR REPLACE FUNCTION commit_durably() RETURNS void LANGUAGE plpgsql SET search_path = public, pg_temp
        AS $$ BEGIN END $$""")

    assert faults() == ["function commit_durably() is not the one that was installed: it was changed since"]


def test_each_function_that_the_service_calls_is_missed_where_it_may_not_call_it(db, faults):
    db.execute("REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM beacon_service")
    db.execute("GRANT EXECUTE ON FUNCTION emergency_stop_faults() TO beacon_service")

    asked_for = sorted(CALLS.keys() - {"emergency_stop_faults", "emergency_stop_blockers"})  # by the others
    assert [fault.split("(")[0] for fault in faults()] == [f"role beacon_service may not execute function {name}" for name in asked_for]


@pytest.mark.parametrize("table", ["jobs", "executions", "emergency_stops", "batch_changes"])
def test_each_table_that_is_gone_is_named(db, faults, table):
    db.execute(f"ALTER TABLE {table} RENAME TO another")

    assert f"table {table} is missing" in faults()


def test_indexes_that_only_batches_need_are_no_fault(db, faults):
    db.execute("DROP INDEX jobs_updated_at_ongoing_idx, jobs_updated_at_failed_idx, batch_changes_job_id_idx")

    assert faults() == []


def test_an_index_that_has_the_name_of_a_trigger_is_not_taken_for_it(db, faults):
    db.execute("CREATE TABLE theirs (id int); CREATE INDEX guard_inserted_executions ON theirs (id)")

    assert faults() == []


def test_constraints_that_let_a_status_become_failed_are_none(db, faults):
    not_enforced = "CHECK (status <> 'failed') NOT ENFORCED" if db.info.server_version >= 180000 else "CHECK (true)"
    db.execute(f"""
        ALTER TABLE executions ADD CHECK (status IN ('pending', 'running', 'failed')), ADD CHECK (length(status) < 20),
            ADD CHECK (status = 'pending' OR created_at IS NOT NULL), ADD CHECK (created_at > '2000-01-01');
        ALTER TABLE jobs ADD CHECK (NULLIF(status, 'failed') <> 'odd'), ADD {not_enforced};
        CREATE TABLE theirs (status text CHECK (status <> 'failed'))""")

    assert faults() == []


ERRORS = {
    "data_exception": "1 / (length(status) - length('failed')) > 0",
    "integrity_constraint_violation": "status::their_state IS NOT NULL",
    "syntax_error_or_access_rule_violation": "is_known(status)",
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_constraint_that_fails_with_an_error_forbids_a_status_as_well(db, faults, error):
    db.execute("""
        CREATE DOMAIN their_state AS text CHECK (VALUE <> 'failed');
        CREATE FUNCTION is_known(text) RETURNS boolean LANGUAGE plpgsql
            AS 'BEGIN RETURN EXISTS (SELECT FROM no_such_table); END'""")
    check = f"CHECK ({ERRORS[error]})"
    db.execute(f"""
        ALTER TABLE jobs ADD CONSTRAINT z {check}, ADD CONSTRAINT a {check};
        ALTER TABLE executions ADD CONSTRAINT m {check}""")

    assert faults() == [
        f"constraint {name} on table {table} forbids the status failed"
        for name, table in (("a", "jobs"), ("m", "executions"), ("z", "jobs"))
    ]


def test_foreign_keys_that_lead_elsewhere_do_not_count(db, faults):
    """From another table, from another column, to another table."""
    db.execute("""
        CREATE TABLE theirs (
            id text PRIMARY KEY, c2 int, c3 int, c4 int, c5 int, c6 int, c7 int, job_id text REFERENCES jobs);
        ALTER TABLE executions DROP CONSTRAINT executions_job_id_fkey, ADD other text REFERENCES jobs,
            ADD FOREIGN KEY (job_id) REFERENCES theirs""")

    assert [fault[:27] for fault in faults()] == ["warning: no foreign key lea"]


def test_a_role_that_calls_for_another_is_asked_for_as_that_one(db, service, faults):
    db.execute("DO $$ BEGIN CREATE ROLE beacon_caller; EXCEPTION WHEN duplicate_object THEN END $$")
    db.execute("GRANT beacon_caller TO beacon_service")
    db.execute("GRANT EXECUTE ON FUNCTION emergency_stop_faults() TO beacon_caller")
    try:
        service.execute("SET ROLE beacon_caller")
        assert "role beacon_caller may not execute function get_job(text)" in faults()
    finally:
        service.execute("RESET ROLE")
        db.execute("DROP OWNED BY beacon_caller; DROP ROLE beacon_caller")


def test_a_read_only_database_is_named(service, faults):
    service.execute("SET default_transaction_read_only = on")

    assert faults() == ["this database is read-only: nothing can be stopped here"]


def test_a_standby_is_named_as_one_and_not_as_read_only_besides(db, service, faults):
    change_function(db, "emergency_stop_faults", "pg_is_in_recovery()", "true")  # as it is on one
    service.execute("SET default_transaction_read_only = on")

    told = [fault for fault in faults() if not fault.startswith("function emergency_stop_faults()")]  # it was changed
    assert told == ["this server is a standby: nothing can be stopped here, only on the primary"]


@pytest.fixture
def weak_owner(db):
    """The functions belong to a role that is no superuser; it has its rights on the tables, and no others."""
    db.execute("DO $$ BEGIN CREATE ROLE beacon_weak_owner; EXCEPTION WHEN duplicate_object THEN END $$")
    db.execute("GRANT CREATE, USAGE ON SCHEMA public TO beacon_weak_owner;GRANT ALL ON ALL TABLES IN SCHEMA public TO beacon_weak_owner")
    db.execute("""
        DO $$
        DECLARE f regprocedure;
        BEGIN
            FOR f IN SELECT p.oid FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace LOOP
                EXECUTE format('ALTER FUNCTION %s OWNER TO beacon_weak_owner', f);
            END LOOP;
        END
        $$""")
    yield "beacon_weak_owner"
    db.execute("REASSIGN OWNED BY beacon_weak_owner TO CURRENT_USER; DROP OWNED BY beacon_weak_owner;DROP ROLE beacon_weak_owner")


def test_an_owner_who_may_not_end_or_see_sessions_is_a_warning(db, faults, weak_owner):
    ends, sees = faults()
    assert ends.startswith("warning: role beacon_weak_owner, which owns the functions, may not end the sessions of other roles")
    assert sees.startswith("warning: role beacon_weak_owner, which owns the functions, may not see what the sessions of other roles do")

    db.execute("ALTER FUNCTION emergency_stop_job RENAME TO another")
    assert faults() == ["function emergency_stop_job(text,text,boolean,jsonb) is missing", ends, sees]
    db.execute("ALTER FUNCTION another RENAME TO emergency_stop_job")
    db.execute(ends.split(": ")[-1])
    db.execute(sees.split(": ")[-1])
    assert faults() == []


def test_a_helper_of_another_owner_is_named(db, faults, weak_owner):
    """As after an upgrade by a superuser of what another role has installed."""
    db.execute("ALTER FUNCTION fail_job OWNER TO CURRENT_USER; GRANT pg_signal_backend, pg_read_all_stats TO beacon_weak_owner")

    (fault,) = faults()
    assert fault.startswith("role beacon_weak_owner, which owns emergency_stop_job, may not execute function fail_job(")


def test_what_a_superuser_installs_over_it_again_is_still_known(db, owner_url, faults, weak_owner):
    db.execute("GRANT pg_signal_backend, pg_read_all_stats TO beacon_weak_owner")
    for table in (
        "emergency_stops",
        "batch_changes",
    ):  # to which installing leaves nobody but its owner the right to add rows
        db.execute(f"ALTER TABLE {table} OWNER TO beacon_weak_owner")
    beacon_stop.init_db(owner_url)
    assert faults() == []

    db.execute("ALTER FUNCTION emergency_stop_job RENAME TO another")
    assert faults() == ["function emergency_stop_job(text,text,boolean,jsonb) is missing"]
    db.execute("ALTER FUNCTION another RENAME TO emergency_stop_job")


@pytest.mark.parametrize(
    ("right", "told"),
    [
        ("SELECT ON jobs", "read table jobs"),
        ("UPDATE ON jobs", "update table jobs"),
        ("SELECT ON executions", "read table executions"),
        ("UPDATE ON executions", "update table executions"),
        ("SELECT ON emergency_stops", "read table emergency_stops"),
        ("INSERT ON emergency_stops", "add rows to table emergency_stops"),
    ],
)
def test_an_owner_without_rights_on_the_tables_is_named(db, faults, weak_owner, right, told):
    before = faults()
    db.execute(f"REVOKE {right} FROM beacon_weak_owner")

    assert [fault for fault in faults() if fault not in before] == [f"role beacon_weak_owner, which owns the functions, may not {told}"]


@pytest.mark.parametrize("table", ["jobs", "executions", "emergency_stops"])
def test_row_level_security_that_hides_rows_from_the_owner_is_named(db, faults, weak_owner, table):
    sentence = f"row-level security on table {table} hides rows from role beacon_weak_owner, which owns the functions"
    db.execute("CREATE TABLE theirs (id int); ALTER TABLE theirs ENABLE ROW LEVEL SECURITY")
    assert sentence not in faults()
    db.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    assert sentence in faults()

    db.execute(f"ALTER TABLE {table} OWNER TO beacon_weak_owner")
    assert sentence not in faults()
    db.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    assert sentence in faults()
    for right in ("BYPASSRLS", "SUPERUSER"):
        db.execute(f"ALTER ROLE beacon_weak_owner {right}")
        assert sentence not in faults()
        db.execute(f"ALTER ROLE beacon_weak_owner NO{right}")


def test_a_state_of_executions_that_no_stop_knows_is_a_warning(db, make_job, faults):
    make_job(pending=5, running=5, processing=5, completed=5, failed=5, cancelled=5, queued=5)
    make_job(status="archived"), make_job(status="archived")
    db.execute("ALTER TABLE executions ADD worker text DEFAULT 'w'")
    db.execute("CREATE SCHEMA theirs; CREATE TABLE theirs.executions AS SELECT 'odd' AS status FROM generate_series(1, 5)")
    db.execute("ANALYZE jobs, executions, theirs.executions")

    assert faults() == ["warning: executions have the status 'queued', which is none of the six that a stop knows: it leaves them alone"]


def test_it_waits_for_nobody_and_holds_up_nobody(db, connect, make_job, service, faults):
    job_id = make_job(running=1)
    holder = connect(autocommit=False)
    holder.execute("LOCK TABLE jobs, executions, emergency_stops IN ACCESS EXCLUSIVE MODE")
    service.execute("SET statement_timeout = '2s'")

    assert faults() == []
    holder.rollback()
    service.execute("BEGIN")
    faults()
    tables = """
        SELECT count(*) FROM pg_locks
        WHERE pid = %s AND relation = ANY ('{jobs,executions,emergency_stops}'::regclass[])"""
    assert db.execute(tables, (service.info.backend_pid,)).fetchone() == (0,)
    service.execute("COMMIT")
    assert db.execute("SELECT emergency_stop_job(%s)", (job_id,)).fetchone()[0]["executions_stopped"] == 1


def test_it_takes_a_few_milliseconds(service, faults):
    times = []
    for _ in range(30):
        began = time.perf_counter()
        faults()
        times.append(time.perf_counter() - began)

    assert statistics.median(times) < 0.02  # 3 ms on a quiet machine


def test_checks_beside_it_do_not_disturb_a_stop(db, make_job, connect, service_url, stop):
    jobs = [make_job(running=42) for _ in range(20)]
    over = []

    def check(session):
        while not over:
            assert session.execute(FAULTS).fetchall() == []

    with in_thread(check, connect(service_url)), in_thread(check, connect(service_url)):
        try:
            answers = [stop(job_id) for job_id in jobs]
        finally:
            over.append(True)
    assert [answer["executions_stopped"] for answer in answers] == [42] * 20


def test_readiness_keeps_no_lock_that_a_stop_waits_for(db, connect, service_url, make_job):
    """What it asks, in a transaction that stays open: each lock that it takes, if only for a moment, is still there."""
    job_id = make_job(running=42)
    check, operator = connect(service_url, autocommit=False), connect(service_url)
    assert check.execute(FAULTS).fetchall() == []

    locks = db.execute("SELECT locktype, mode, relation::regclass::text FROM pg_locks WHERE pid = %s", (check.info.backend_pid,)).fetchall()
    assert [lock for lock in locks if lock[0] in ("advisory", "transactionid", "tuple")] == []
    assert {mode for kind, mode, _ in locks if kind == "relation"} == {"AccessShareLock"}
    assert not {"jobs", "executions", "emergency_stops", "batch_changes"} & {name for _, _, name in locks}
    operator.execute("SET lock_timeout = '1ms'")
    (answer,) = operator.execute("SELECT emergency_stop_job(%s)", (job_id,)).fetchone()
    assert answer["executions_stopped"] == 42


def test_hundreds_of_readiness_checks_beside_stops_with_a_tiny_lock_timeout(make_app, make_job):
    client = Client(make_app(lock_timeout="20ms"))
    jobs = [make_job(running=2) for _ in range(40)]
    statuses, over = [], threading.Event()

    def check():
        while not over.is_set() or len(statuses) < 200:
            statuses.append(client("GET", "/health/ready").status)

    with in_thread(check), in_thread(check):
        try:
            wait_until(lambda: len(statuses) >= 10)
            answers = [client.stop(job_id) for job_id in jobs]
        finally:
            over.set()
    assert [(answer.status, answer.json["executions_stopped"]) for answer in answers] == [(200, 2)] * 40
    assert len(statuses) >= 200
    assert set(statuses) == {200}


def test_installing_again_does_away_with_changed_functions(db, owner_url, faults):
    db.execute("ALTER FUNCTION get_job(text) SECURITY INVOKER")
    assert len(faults()) == 1

    beacon_stop.init_db(owner_url)
    assert faults() == []


def test_functions_of_the_application_s_are_its_own(db, owner_url, faults):
    create = """
        CREATE OR REPLACE FUNCTION their_own() RETURNS int LANGUAGE sql SET search_path = public, pg_temp
        AS 'SELECT {}'"""
    db.execute(create.format(1))
    beacon_stop.init_db(owner_url)

    db.execute(create.format(2))
    assert faults() == []


def test_strangers_may_not_ask(db, connect, owner_url):
    db.execute("DROP ROLE IF EXISTS beacon_stranger; CREATE ROLE beacon_stranger LOGIN PASSWORD 'stranger-in-tests'")
    stranger = connect(psycopg.conninfo.make_conninfo(owner_url, user="beacon_stranger", password="stranger-in-tests"))

    for call in ("emergency_stop_faults()", "emergency_stop_status('a')", "emergency_stop_dry_run('a')",
                 "runaway_jobs()", "release_job('a', 'b', 'c')", "confirm_stopped('{1}')"):  # fmt: skip
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for function"):
            stranger.execute(f"SELECT {call}")
    stranger.close()
    db.execute("DROP ROLE beacon_stranger")


@pytest.mark.parametrize(
    ("table", "trigger", "definition"),
    [
        ("jobs", "guard_updated_job", "AFTER INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION guard_updated_job()"),
        (
            "executions",
            "guard_inserted_executions",
            "AFTER INSERT ON executions REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT WHEN (false)"
            " EXECUTE FUNCTION guard_inserted_executions()",
        ),
    ],
)
def test_a_trigger_that_is_there_but_does_not_fire_is_a_fault_until_it_is_installed_again(db, owner_url, table, trigger, definition):
    db.execute(f"DROP TRIGGER {trigger} ON {table}; CREATE TRIGGER {trigger} {definition}")

    faults = [fault for (fault,) in db.execute("SELECT * FROM emergency_stop_faults()")]
    assert faults == [f"trigger {trigger} on table {table} is missing"]
    beacon_stop.init_db(owner_url)
    assert db.execute("SELECT * FROM emergency_stop_faults()").fetchall() == []


def test_a_foreign_key_to_states_without_failed_is_named(db, faults):
    db.execute("""
        CREATE TABLE states (status text PRIMARY KEY);
        INSERT INTO states VALUES ('created'), ('pending'), ('processing');
        ALTER TABLE jobs ADD CONSTRAINT known FOREIGN KEY (status) REFERENCES states""")

    assert faults() == ["constraint known on table jobs forbids the status failed"]
    db.execute("INSERT INTO states VALUES ('failed')")
    assert faults() == []


def test_another_type_of_an_id_than_at_the_installation_is_named(db, faults):
    """Before, jobs that the old type cannot hold were not found, and nobody was told why."""
    db.execute("ALTER TABLE executions ALTER id TYPE int")

    assert "column executions.id has another type than it had at the installation: install again" in faults()


def test_a_table_that_a_crash_would_empty_is_warned_of(db, faults):
    db.execute("ALTER TABLE executions SET UNLOGGED")

    assert faults() == ["warning: table executions is unlogged: a crash of the server empties it"]


def test_a_column_with_the_name_of_a_variable_is_named(db, faults):
    """Every stop would fail, with "column reference v_id is ambiguous"."""
    db.execute("ALTER TABLE jobs ADD v_id int, ADD v_version int")

    assert faults() == ["column jobs.v_id has the name of a variable of these functions: expected another name"]


def test_a_foreign_key_of_several_columns_leads_to_jobs_too(db, faults):
    db.execute("""
        ALTER TABLE jobs ADD COLUMN tenant int NOT NULL DEFAULT 1, ADD UNIQUE (tenant, id);
        ALTER TABLE executions ADD COLUMN tenant int NOT NULL DEFAULT 1, DROP CONSTRAINT executions_job_id_fkey,
            ADD FOREIGN KEY (tenant, job_id) REFERENCES jobs (tenant, id)""")

    assert faults() == []


def test_a_database_that_quotes_all_names_has_no_fault(db, service, faults):
    """Before, all triggers were missing there."""
    service.execute("SET quote_all_identifiers = on")

    assert faults() == []
