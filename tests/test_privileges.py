"""Who may do what: the service's role everything that the service does and nothing else, PUBLIC nothing."""

from typing import Any

import beacon_stop
import psycopg
import pytest

from conftest import url_of

# What the service calls. Workers call confirm_stopped; all else is the owner's.
CALLS = {
    "emergency_stop_job": "SELECT emergency_stop_job('a')",
    "emergency_stop_jobs": "SELECT * FROM emergency_stop_jobs('{a}')",
    "emergency_stop_blockers": "SELECT * FROM emergency_stop_blockers('a')",
    "emergency_stop_dry_run": "SELECT emergency_stop_dry_run('a')",
    "emergency_stop_status": "SELECT emergency_stop_status('a')",
    "emergency_stop_faults": "SELECT emergency_stop_faults()",
    "release_job": "SELECT release_job('a', 'mended', 'pending')",
    "runaway_jobs": "SELECT runaway_jobs()",
    "get_job": "SELECT get_job('a')",
    "list_executions": "SELECT * FROM list_executions('a')",
    "timeout_stuck_jobs": "SELECT timeout_stuck_jobs()",
    "repair_stuck_jobs": "SELECT repair_stuck_jobs()",
}

FUNCTIONS = """
    SELECT p.proname AS name, p.oid::regprocedure::text AS signature, p.proconfig AS config, p.prosecdef AS is_definer,
           has_function_privilege('public', p.oid, 'EXECUTE') AS is_public,
           has_function_privilege('beacon_service', p.oid, 'EXECUTE') AS is_service,
           p.prorettype = 'trigger'::regtype AS is_trigger, obj_description(p.oid, 'pg_proc') AS comment
    FROM pg_proc p
    WHERE p.pronamespace = 'public'::regnamespace
    ORDER BY 1"""


@pytest.fixture
def functions(db: psycopg.Connection) -> list[Any]:
    with db.cursor(row_factory=psycopg.rows.namedtuple_row) as cursor:
        return cursor.execute(FUNCTIONS).fetchall()


@pytest.fixture
def stranger(db: psycopg.Connection, connect: Any, owner_url: str) -> psycopg.Connection:
    """A session of a role to which nothing was granted."""
    db.execute("DROP ROLE IF EXISTS beacon_stranger; CREATE ROLE beacon_stranger LOGIN PASSWORD 'stranger-in-tests'")
    return connect(psycopg.conninfo.make_conninfo(owner_url, user="beacon_stranger", password="stranger-in-tests"))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_service_role_may_call_what_others_may_not(service, stranger, call):
    service.execute(call)

    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for function"):
        stranger.execute(call)


def test_the_service_role_has_no_right_on_any_table(db):
    rights = db.execute("""
        SELECT c.relname, p.name
        FROM pg_class c, unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'::text[]) AS p (name)
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v')
          AND has_table_privilege('beacon_service', c.oid, p.name)""").fetchall()
    assert rights == []


def test_the_service_role_may_call_nothing_else(functions):
    assert {f.name for f in functions if f.is_service} == set(CALLS)


def test_every_function_is_closed_to_public_with_a_pinned_path(functions):
    assert len(functions) > len(CALLS)
    for function in functions:
        assert "search_path=public, pg_temp" in (function.config or []), function.signature
        assert not function.is_public, function.signature


def test_what_others_call_has_a_comment(functions):
    assert {f.name for f in functions if f.comment} >= {*CALLS, "confirm_stopped"}


def test_an_owner_who_is_no_superuser_leaves_nothing_open_to_public_first_and_again(bare_database, server_url):
    """One statement closes all functions. It must not need more rights than the owner has, nor miss a function."""
    bare_database.execute("DROP ROLE IF EXISTS beacon_owner")
    bare_database.execute("CREATE ROLE beacon_owner LOGIN PASSWORD 'owner-in-tests'")
    bare_database.execute("GRANT CREATE, USAGE ON SCHEMA public TO beacon_owner")
    bare_database.commit()
    owner_url = url_of(bare_database, server_url, user="beacon_owner", password="owner-in-tests")
    open_functions = """
        SELECT p.oid::regprocedure::text FROM pg_proc p
        WHERE p.pronamespace = 'public'::regnamespace AND has_function_privilege('public', p.oid, 'EXECUTE')"""

    beacon_stop.init_db(owner_url)
    assert bare_database.execute(open_functions).fetchall() == []
    count = "SELECT count(*) FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace"
    assert bare_database.execute(count).fetchone()[0] > len(CALLS)
    for name in ("installed_functions()", "job_barrier(text)", "get_job(text)"):
        bare_database.execute(f"GRANT EXECUTE ON FUNCTION {name} TO PUBLIC")
    bare_database.commit()

    beacon_stop.init_db(owner_url)
    assert bare_database.execute(open_functions).fetchall() == []


def test_what_others_call_and_what_guards_runs_with_its_owners_rights_and_nothing_else_does(functions):
    """A helper with its owner's rights would be one more door. The records' trigger has to see who really writes."""
    expected = {*CALLS, "confirm_stopped", "admit_execution", *(f.name for f in functions if f.is_trigger)} - {"keep_append_only"}
    assert {f.name for f in functions if f.is_definer} == expected


def test_rows_that_are_hidden_from_the_owner_are_an_error_not_unknown(db, connect, make_job):
    """Version 1.0 said that there is no such job, and that it had stopped none of its executions."""
    make_job("a", running=1)
    hide_rows(db)
    holder = connect(autocommit=False)
    holder.execute("UPDATE jobs SET updated_at = now()")  # so that there are rows to be looked at for who holds them

    for call in [*CALLS.values(), "SELECT confirm_stopped('{1}')"]:
        if "faults" not in call:  # which reads no row
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
                db.execute(call)


def test_a_job_that_is_hidden_from_the_guard_takes_no_execution(db, make_job):
    job_id = make_job(completed=1)
    hide_rows(db)

    for start in ("INSERT INTO executions (job_id) VALUES (%s)", "UPDATE executions SET status = 'running' WHERE job_id = %s"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
            db.execute(start, (job_id,))


def hide_rows(db: psycopg.Connection) -> None:
    """Make an ordinary role the owner of all, from whom the tables hide every row."""
    db.execute("DROP ROLE IF EXISTS beacon_owner")
    db.execute("CREATE ROLE beacon_owner")
    db.execute("GRANT CREATE, USAGE ON SCHEMA public TO beacon_owner")
    for kind, query in {
        "TABLE": "SELECT quote_ident(tablename) FROM pg_tables WHERE schemaname = 'public'",
        "FUNCTION": "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace",
    }.items():
        for (name,) in db.execute(query).fetchall():
            db.execute(f"ALTER {kind} {name} OWNER TO beacon_owner")
    for table in ("jobs", "executions"):
        db.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")


def test_no_two_functions_have_the_same_name(functions):
    """Else a call with fewer arguments could become ambiguous, as between two versions."""
    names = [f.name for f in functions]
    assert sorted(set(names)) == names


def test_a_temporary_table_does_not_take_the_place_of_the_real_one(db, make_job, service, stop):
    job_id = make_job(running=2)
    service.execute("CREATE TEMPORARY TABLE jobs (id text, status text, metadata jsonb)")
    service.execute("CREATE TEMPORARY TABLE executions (id bigint, job_id text, status text)")
    service.execute("GRANT ALL ON jobs, executions TO PUBLIC")

    assert stop(job_id)["executions_stopped"] == 2
    assert db.execute("SELECT status FROM jobs WHERE id = %s", (job_id,)).fetchone() == ("failed",)
