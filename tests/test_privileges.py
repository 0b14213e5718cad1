"""Who may do what: the service's role everything that the service does and nothing else, PUBLIC nothing."""

import psycopg
import pytest

import beacon_stop

CALLS = [
    "SELECT emergency_stop_job('a')",
    "SELECT * FROM emergency_stop_jobs('{a}')",
    "SELECT * FROM emergency_stop_blockers('a')",
    "SELECT emergency_stop_end_blockers('a')",
    "SELECT get_job('a')",
    "SELECT * FROM list_executions('a')",
    "SELECT timeout_stuck_jobs()",
    "SELECT repair_stuck_jobs()",
]


@pytest.mark.parametrize("call", CALLS)
def test_the_service_role_may_call_what_others_may_not(connect, db, service, owner_url, call):
    service.execute(call)

    db.execute("DROP ROLE IF EXISTS beacon_stranger; CREATE ROLE beacon_stranger LOGIN PASSWORD 'stranger-in-tests'")
    stranger = connect(psycopg.conninfo.make_conninfo(owner_url, user="beacon_stranger", password="stranger-in-tests"))
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for function"):
        stranger.execute(call)
    stranger.close()
    db.execute("DROP ROLE beacon_stranger")


def test_the_service_role_has_no_right_on_any_table(db):
    rights = db.execute("""
        SELECT c.relname, p.name
        FROM pg_class c, unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'::text[]) AS p (name)
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v')
          AND has_table_privilege('beacon_service', c.oid, p.name)""").fetchall()
    assert rights == []


def test_the_service_calls_only_functions_that_readiness_asks_for(db):
    granted = db.execute("""
        SELECT p.oid::regprocedure::text FROM pg_proc p
        WHERE p.pronamespace = 'public'::regnamespace AND has_function_privilege('beacon_service', p.oid, 'EXECUTE')
        ORDER BY 1""").fetchall()
    assert [name for (name,) in granted] == sorted([*beacon_stop.FUNCTIONS, beacon_stop.GROUP_FUNCTION])


def test_every_function_is_closed_to_public_with_a_pinned_path_and_a_comment(db):
    functions = db.execute("""
        SELECT p.proname, p.proconfig, has_function_privilege('public', p.oid, 'EXECUTE'), obj_description(p.oid, 'pg_proc')
        FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace""").fetchall()
    assert len(functions) >= len(beacon_stop.FUNCTIONS)
    for name, config, public, comment in functions:
        assert "search_path=public, pg_temp" in (config or []), name
        assert not public, name
        assert comment, name


def test_a_temporary_table_does_not_take_the_place_of_the_real_one(db, make_job, service, stop):
    job_id = make_job(running=2)
    service.execute("CREATE TEMPORARY TABLE jobs (id text, status text, metadata jsonb)")
    service.execute("CREATE TEMPORARY TABLE executions (id bigint, job_id text, status text)")
    service.execute("GRANT ALL ON jobs, executions TO PUBLIC")

    assert stop(job_id)["executions_stopped"] == 2
    assert db.execute("SELECT status FROM jobs WHERE id = %s", (job_id,)).fetchone() == ("failed",)


def test_plpgsql_check_finds_nothing_where_the_server_has_it(db):
    """Runs where the server has plpgsql_check (Debian: postgresql-15-plpgsql-check); the embedded one has not."""
    if db.execute("SELECT FROM pg_available_extensions WHERE name = 'plpgsql_check'").fetchone():
        db.execute("CREATE EXTENSION plpgsql_check")
        findings = db.execute("""
            SELECT p.oid::regprocedure::text, r.* FROM pg_proc p
            LEFT JOIN (SELECT DISTINCT ON (tgfoid) * FROM pg_trigger) t ON t.tgfoid = p.oid,
            plpgsql_check_function(p.oid, COALESCE(t.tgrelid, 0), oldtable => t.tgoldtable, newtable => t.tgnewtable,
                                   all_warnings => true) r
            WHERE p.pronamespace = 'public'::regnamespace AND p.prolang = (SELECT oid FROM pg_language WHERE lanname = 'plpgsql')
              AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')""").fetchall()
        assert findings == []
