"""sql/10_tables.sql, 15_helpers.sql: tables as people have them, and the functions on them."""

from typing import Any, NamedTuple

import beacon_stop
import psycopg
import pytest

from conftest import age, readme_block, url_of
from test_install import everything, install


@pytest.fixture
def bare_url(bare_database, server_url):
    return url_of(bare_database, server_url)


@pytest.fixture
def bare(bare_url):
    """A session in a database where nothing is installed."""
    with psycopg.connect(bare_url, autocommit=True, options="-c statement_timeout=20s") as session:
        yield session


EXISTING = """
    CREATE TABLE jobs (
        id varchar(64) PRIMARY KEY, tenant int NOT NULL DEFAULT 7, status varchar(20), metadata jsonb,
        created_at timestamp NOT NULL DEFAULT now());
    CREATE TABLE executions (
        id serial PRIMARY KEY, job_id varchar(64), status varchar(20), worker text,
        created_at timestamp, started_at timestamp, completed_at timestamp);
    INSERT INTO jobs (id, status) SELECT 'job-' || n, 'processing' FROM generate_series(1, 3) n;
    INSERT INTO executions (job_id, status, worker)
        SELECT 'job-' || n % 3 + 1, 'running', 'w' FROM generate_series(1, 30) n;
"""


def test_existing_tables_keep_their_columns_and_rows(bare, bare_url):
    bare.execute(EXISTING)
    before = bare.execute("SELECT id, tenant, status, metadata, created_at FROM jobs ORDER BY 1").fetchall()
    executions = bare.execute("SELECT id, job_id, status, worker, created_at FROM executions ORDER BY 1").fetchall()

    said, _ = install(bare_url)
    beacon_stop.init_db(bare_url)
    assert {"table jobs: found", "column jobs.updated_at: added", "column executions.output: added"} < set(said)
    assert bare.execute("SELECT id, tenant, status, metadata, created_at FROM jobs ORDER BY 1").fetchall() == before
    assert bare.execute("SELECT id, job_id, status, worker, created_at FROM executions ORDER BY 1").fetchall() == executions
    assert bare.execute("SELECT count(*) FROM executions WHERE output IS NULL").fetchone() == (30,)
    assert bare.execute("SELECT count(*) FROM jobs WHERE updated_at IS NULL").fetchone() == (3,), "nobody knows when they changed"

    stopped = bare.execute("SELECT emergency_stop_job('job-1')").fetchone()[0]
    assert (stopped["previous_status"], stopped["executions_stopped"]) == ("processing", 10)
    job = bare.execute("SELECT get_job('job-1')").fetchone()[0]["job"]
    assert (job["status"], job["metadata"]["emergency_stop"]) == ("failed", True)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        bare.execute("INSERT INTO executions (job_id, status) VALUES ('job-1', 'pending')")
    bare.execute("INSERT INTO executions (status) VALUES ('pending')")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        bare.execute("UPDATE executions SET job_id = 'job-1' WHERE job_id IS NULL")
    bare.execute("UPDATE jobs SET created_at = now() - interval '1 hour'")
    bare.execute("UPDATE executions SET created_at = now() - interval '1 hour'")
    assert bare.execute("SELECT timeout_stuck_jobs()").fetchone()[0]["timed_out_count"] == 2
    assert bare.execute("SELECT repair_stuck_jobs()").fetchone()[0]["republished_count"] == 2


class Ids(NamedTuple):
    """Types of jobs.id, executions.job_id, executions.id; ids of each in their order; one that the type cannot hold."""

    job_type: str
    job_id_type: str
    id_type: str
    jobs: tuple[Any, Any]
    ids: tuple[Any, ...]
    not_an_id: str | None


UUIDS = tuple(f"{n:08x}-0000-4000-8000-00000000000a" for n in range(1, 8))
NUMBERS = (-5, 0, 1, 2, 9, 10, 11)
TEXTS = ("", "1", "10", "9", "A", "a/b %", "\u00e9")
KINDS = {
    "text": Ids("text", "text", "text COLLATE \"C\"", ("a/b", "b"), TEXTS, None),
    "text and varchar": Ids("text", "varchar(20)", "varchar(20) COLLATE \"C\"", ("a", "b"), TEXTS, "x" * 21),
    "varchar and text": Ids("varchar(20)", "text", "bigint", ("a", "b"), NUMBERS, "9223372036854775808"),
    "uuid": Ids("uuid", "uuid", "uuid", UUIDS[:2], UUIDS, "not-a-uuid"),
    "bigint": Ids("bigint", "bigint", "bigint", (7, 8), NUMBERS, "1.5"),
    "bigint and integer": Ids("bigint", "integer", "integer", (7, 8), NUMBERS, "2147483648"),
    "integer and bigint": Ids("integer", "bigint", "smallint", (7, 8), NUMBERS, "32768"),
    "integer": Ids("integer", "integer", "uuid", (-7, 8), UUIDS, ""),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request, bare, bare_url):
    """Tables with ids of each kind, in which a job has seven active executions and another job has one."""
    kind = KINDS[request.param]
    bare.execute(f"CREATE TABLE jobs (id {kind.job_type} PRIMARY KEY, status text)")
    bare.execute(f"CREATE TABLE executions (job_id {kind.job_id_type} REFERENCES jobs, id {kind.id_type} PRIMARY KEY, status text)")
    install(bare_url)
    for job in kind.jobs:
        bare.execute("INSERT INTO jobs (id, status) VALUES (%s, 'processing')", (str(job),))
    for id in reversed(kind.ids):
        bare.execute("INSERT INTO executions (id, job_id, status) VALUES (%s, %s, 'running')", (str(id), str(kind.jobs[0])))
    return kind


def test_stop_and_guard_with_ids_of_each_type(bare, kind):
    """Version 1.0 took text and varchar only."""
    stopped, other = map(str, kind.jobs)

    answer = bare.execute("SELECT emergency_stop_job(%s)", (stopped,)).fetchone()[0]
    assert (answer["message"], answer["job_id"], answer["executions_stopped"]) == ("Job emergency stopped", stopped, 7)
    assert bare.execute(
        "SELECT count(*) FROM executions WHERE status = 'failed' AND output @> '{\"emergency_stop\": true}'"
    ).fetchone() == (7,)
    assert bare.execute("SELECT job_id FROM emergency_stops").fetchall() == [(stopped,)]
    assert bare.execute("SELECT emergency_stop_job(%s)->>'action'", (stopped,)).fetchone() == ("none",)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        bare.execute("UPDATE executions SET status = 'running' WHERE id = %s", (str(kind.ids[0]),))
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        bare.execute("UPDATE jobs SET status = 'pending' WHERE id = %s", (stopped,))
    bare.execute("DELETE FROM executions")
    add = "INSERT INTO executions (id, job_id, status) VALUES (%s, %s, 'pending')"
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        bare.execute(add, (str(kind.ids[0]), stopped))
    bare.execute(add, (str(kind.ids[0]), other))
    assert bare.execute("SELECT release_job(%s, 'mended', 'pending')->>'ok'", (stopped,)).fetchone() == ("true",)
    bare.execute(add, (str(kind.ids[1]), stopped))


def test_batches_with_ids_of_each_type(bare, kind):
    bare.execute("UPDATE jobs SET created_at = now() - interval '1 hour', updated_at = now() - interval '1 hour'")
    bare.execute("UPDATE executions SET created_at = now() - interval '1 hour'")

    assert bare.execute("SELECT timeout_stuck_jobs()").fetchone()[0]["timed_out_count"] == 2
    assert bare.execute("SELECT repair_stuck_jobs()").fetchone()[0]["republished_count"] == 2


def test_what_a_type_cannot_hold_is_not_found(bare, kind):
    asked = "x" * 300 if kind.job_type.startswith(("text", "varchar")) else "no such id"

    for function in ("emergency_stop_job", "get_job"):
        assert bare.execute(f"SELECT {function}(%s)", (asked,)).fetchone()[0] == {
            "error": "job not found",
            "job_id": asked,
        }
    assert bare.execute("SELECT count(*) FROM list_executions(%s)", (asked,)).fetchone() == (0,)


def test_a_job_and_its_executions_listed_with_ids_of_each_type(bare, kind):
    job = str(kind.jobs[0])
    ids = [str(id) for id in kind.ids]

    assert bare.execute("SELECT get_job(%s)->'job'->>'id'", (job,)).fetchone() == (job,)
    rows = bare.execute("SELECT id, execution FROM list_executions(%s)", (job,)).fetchall()
    assert [id for id, _ in rows] == ids
    assert [execution["id"] for _, execution in rows] == list(kind.ids), "a number as a number, all else as text"
    assert {execution["job_id"] for _, execution in rows} == {job}
    for place, after in enumerate(ids):
        page = bare.execute("SELECT id FROM list_executions(%s, after => %s, max_rows => 2)", (job, after)).fetchall()
        assert [id for (id,) in page] == ids[place + 1 : place + 3]
    if kind.not_an_id is not None:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"^after is .*: expected the id of an execution, of type "):
            bare.execute("SELECT FROM list_executions(%s, after => %s)", (job, kind.not_an_id))


@pytest.mark.parametrize("asked", ["A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "{a0eebc999c0b4ef8bb6d6bb9bd380a11}"])
def test_an_id_is_answered_as_it_was_asked_for_and_kept_as_it_is(bare, bare_url, asked):
    bare.execute("CREATE TABLE jobs (id uuid PRIMARY KEY, status text)")
    install(bare_url)
    bare.execute("INSERT INTO jobs (id, status) VALUES (%s, 'pending')", (asked,))
    bare.execute("INSERT INTO executions (job_id) VALUES (%s)", (asked,))

    assert bare.execute("SELECT emergency_stop_job(%s)", (asked,)).fetchone()[0]["job_id"] == asked
    assert bare.execute("SELECT emergency_stop_job(%s)->>'action'", (asked.lower(),)).fetchone() == ("none",)
    assert bare.execute("SELECT get_job(%s)->'job'->>'id'", (asked,)).fetchone() == (asked,)
    assert bare.execute("SELECT execution->>'job_id' FROM list_executions(%s)", (asked,)).fetchone() == (asked,)
    assert bare.execute("SELECT job_id FROM emergency_stops").fetchone() == ("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",)


RUNNER = """
    CREATE TABLE jobs (
        id serial PRIMARY KEY, name varchar(200) NOT NULL, status varchar(50) NOT NULL DEFAULT 'pending',
        created_at timestamp DEFAULT current_timestamp, updated_at timestamp DEFAULT current_timestamp,
        CHECK (status IN ('created', 'pending', 'processing', 'completed', 'failed', 'cancelled')));
    CREATE TABLE executions (
        id serial PRIMARY KEY, job_id integer NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        input_data jsonb, output_data jsonb, status varchar(50) NOT NULL DEFAULT 'pending',
        created_at timestamp DEFAULT current_timestamp, started_at timestamp, completed_at timestamp,
        CHECK (status IN ('pending', 'running', 'processing', 'completed', 'failed', 'cancelled')));
    INSERT INTO jobs (name, status) VALUES ('a', 'processing'), ('b', 'pending');
    INSERT INTO executions (job_id, status, output_data) SELECT 1, 'running', '{"n": 1}' FROM generate_series(1, 42);
"""


def test_the_tables_of_the_public_runner(bare, bare_url):
    """Version 1.0 refused them: column jobs.id has type integer: expected text or character varying."""
    bare.execute(RUNNER)

    said, warned = install(bare_url)
    assert {"column jobs.metadata: added", "column executions.output: added"} < set(said)
    assert warned == []
    assert bare.execute("SELECT emergency_stop_job('1')").fetchone()[0]["executions_stopped"] == 42
    assert bare.execute("SELECT DISTINCT status, output->'emergency_stop', output_data FROM executions").fetchall() == [
        ("failed", True, {"n": 1})
    ]
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        bare.execute("INSERT INTO executions (job_id) VALUES (1)")
    bare.execute("INSERT INTO executions (job_id) VALUES (2)")
    assert [id for (id,) in bare.execute("SELECT id FROM list_executions('1', after => '40')")] == ["41", "42"]


def test_the_functions_follow_a_type_that_has_changed(bare, bare_url):
    bare.execute(RUNNER)
    install(bare_url)
    bare.execute("ALTER TABLE jobs ALTER id TYPE bigint; ALTER TABLE executions ALTER id TYPE bigint")

    said, _ = install(bare_url)
    assert {"function to_job_id(text): dropped", "function to_execution_id(text): dropped"} < set(said)
    assert install(bare_url)[0][-2] == "columns, indexes, triggers: all there already"
    bare.execute("INSERT INTO jobs (id, name) VALUES (5000000000, 'c'); UPDATE executions SET id = 5000000000 WHERE id = 1")
    assert bare.execute("SELECT emergency_stop_job('5000000000')->>'previous_status'").fetchone() == ("pending",)
    bare.execute("SELECT emergency_stop_job('1')")
    assert bare.execute("SELECT confirm_stopped('{5000000000}')").fetchone() == (1,)
    assert bare.execute("SELECT id FROM list_executions('1', after => '4999999999')").fetchone() == ("5000000000",)


def test_columns_without_a_time_zone_are_shown_in_that_of_the_installation(bare, bare_url):
    """Version 1.0 took the session's: 9 hours off for a service whose role has Asia/Tokyo."""
    bare.execute(RUNNER + "UPDATE jobs SET created_at = '2025-09-29 23:48:00'; UPDATE executions SET created_at = '2025-09-29 23:48:00'")

    said, _ = install(bare_url, PGOPTIONS="-c TimeZone=UTC")
    assert "columns without a time zone are taken to be in UTC, the TimeZone of this session" in said
    bare.execute("SET timezone = 'Asia/Tokyo'")
    assert bare.execute("SELECT get_job('1')->'job'->>'created_at'").fetchone() == ("2025-09-29T23:48:00.000000Z",)
    assert bare.execute("SELECT execution->>'created_at' FROM list_executions('1')").fetchone() == ("2025-09-29T23:48:00.000000Z",)
    bare.execute("SELECT emergency_stop_job('1')")
    late = "SELECT abs(extract(epoch FROM completed_at - now() AT TIME ZONE 'UTC')) < 60 FROM executions LIMIT 1"
    assert bare.execute(late).fetchone() == (True,)


def test_the_strictest_checks_of_plpgsql_change_nothing(bare, bare_url):
    """Version 1.0's guard failed each INSERT of several rows where the database had plpgsql.extra_errors = 'all'."""
    bare.execute(RUNNER)
    bare.execute(f"ALTER DATABASE {bare.info.dbname} SET plpgsql.extra_errors = 'all'")

    install(bare_url)
    with psycopg.connect(bare_url, autocommit=True) as strict:
        strict.execute("INSERT INTO executions (job_id) VALUES (1), (2), (2)")
        assert strict.execute("SELECT emergency_stop_job('1')").fetchone()[0]["executions_stopped"] == 43
        assert strict.execute("SELECT get_job('1')->>'status'").fetchone() == ("failed",)
        assert strict.execute("SELECT count(*) FROM list_executions('1')").fetchone() == (43,)


def test_new_executions_take_the_type_of_the_jobs_that_are_there(bare, bare_url):
    bare.execute('CREATE TABLE jobs (id varchar(40) COLLATE "C" PRIMARY KEY, status text)')

    install(bare_url)
    column = """
        SELECT data_type, collation_name FROM information_schema.columns
        WHERE table_name = 'executions' AND column_name = 'job_id'"""
    assert bare.execute(column).fetchone() == ("character varying", "C")
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        bare.execute("INSERT INTO executions (job_id) VALUES ('nix')")


def test_the_indexes_that_the_readme_makes_beforehand_are_those_that_are_needed(db, owner_url):
    made = "SELECT indexname, indexdef FROM pg_indexes WHERE indexname ~ '^(jobs|executions)_.*_idx$' ORDER BY 1"
    before = db.execute(made).fetchall()
    statements = [statement for statement in readme_block("sql", "CREATE INDEX CONCURRENTLY").split(";") if statement.strip()]

    for name, _ in before:
        db.execute(f"DROP INDEX {name}")
    for statement in statements:
        db.execute(statement)
    assert db.execute(made).fetchall() == before
    assert len(before) == 4
    assert install(owner_url)[0][-1] == "columns, indexes, triggers: all there already"


ANY_ID = "expected text or character varying or uuid or bigint or integer"
# As a nondeterministic collation of ICU, without which PostgreSQL may have been built.
LOOSE = """
    CREATE COLLATION loose FROM "C";
    UPDATE pg_collation SET collisdeterministic = false WHERE collname = 'loose'"""
REFUSED = {
    "a numeric job id": (
        "CREATE TABLE jobs (id numeric PRIMARY KEY, status text)",
        f"column jobs.id has type numeric: {ANY_ID}",
    ),
    "a padded job id": (
        "CREATE TABLE jobs (id char(8) PRIMARY KEY, status text)",
        f"column jobs.id has type character: {ANY_ID}",
    ),
    "a numeric execution id": (
        "CREATE TABLE executions (id numeric, job_id text, status text)",
        f"column executions.id has type numeric: {ANY_ID} or smallint",
    ),
    "job ids that do not compare": (
        "CREATE TABLE jobs (id uuid PRIMARY KEY, status text);CREATE TABLE executions (id bigint, job_id text, status text)",
        "column executions.job_id has type text: expected one that compares with jobs.id, which has type uuid",
    ),
    "executions alone whose job ids do not compare": (
        "CREATE TABLE executions (id bigint, job_id bigint, status text)",
        "column executions.job_id has type bigint: expected one that compares with jobs.id, which has type text",
    ),
    "two collations of job ids": (
        'CREATE TABLE jobs (id text COLLATE "C" PRIMARY KEY, status text);CREATE TABLE executions (id bigint, job_id text, status text)',
        'column executions.job_id has the collation "default": expected that of jobs.id, "C"',
    ),
    "executions alone in another collation": (
        'CREATE TABLE executions (id bigint, job_id text COLLATE "C", status text)',
        'column executions.job_id has the collation "C": expected that of jobs.id, "default"',
    ),
    "ids of which others are equal": (
        f"{LOOSE}; CREATE TABLE jobs (id text COLLATE loose PRIMARY KEY, status text)",
        "column jobs.id has the nondeterministic collation loose: expected one in which only the same text is equal",
    ),
    "no id": ("CREATE TABLE jobs (status text)", f"column jobs.id is missing: {ANY_ID}"),
    "no job id": (
        "CREATE TABLE executions (id bigint, status text)",
        f"column executions.job_id is missing: {ANY_ID} or smallint",
    ),
    "text metadata": (
        "CREATE TABLE jobs (id text PRIMARY KEY, status text, metadata text)",
        "column jobs.metadata has type text: expected jsonb",
    ),
    "an enum status": (
        "CREATE TYPE state AS ENUM ('failed'); CREATE TABLE jobs (id text PRIMARY KEY, status state)",
        "column jobs.status has type state: expected text or character varying",
    ),
    "no status": (
        "CREATE TABLE jobs (id text PRIMARY KEY)",
        "column jobs.status is missing: expected text or character varying",
    ),
    "a status too short": (
        "CREATE TABLE jobs (id text PRIMARY KEY, status varchar(5))",
        "column jobs.status is varchar(5): expected room for at least 7 characters",
    ),
    "an id that is not unique": (
        "CREATE TABLE jobs (id text, status text)",
        "column jobs.id is not unique: expected a primary key or a unique index on it alone",
    ),
    "an id that is unique in part, or only together with another column": (
        "CREATE TABLE jobs (name text UNIQUE, id text, status text);"
        "CREATE TABLE executions (id bigint PRIMARY KEY, job_id text, status text);"
        "CREATE INDEX ON jobs (id); CREATE UNIQUE INDEX ON jobs (id, status);"
        "CREATE UNIQUE INDEX half_made ON jobs (id);"
        "CREATE UNIQUE INDEX ON jobs (id) WHERE status = 'pending';"
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'half_made'::regclass",
        "column jobs.id is not unique: expected a primary key or a unique index on it alone",
    ),
    "a generated status": (
        "CREATE TABLE jobs (id text PRIMARY KEY, status text GENERATED ALWAYS AS ('x') STORED)",
        "column jobs.status is generated: expected one that can be set",
    ),
    "a view": (
        "CREATE VIEW jobs AS SELECT 'a' AS id",
        "jobs is not an ordinary table: expected one without partitions or children",
    ),
    "partitions": (
        "CREATE TABLE executions (id bigint, job_id text, status text) PARTITION BY HASH (job_id)",
        "executions is not an ordinary table: expected one without partitions or children",
    ),
    "a column with the name of a variable": (
        "CREATE TABLE executions (id bigint, job_id text, status text, v_version int, v_barrier text)",
        "column executions.v_barrier has the name of a variable of these functions: expected another name",
    ),
    "children": (
        "CREATE TABLE jobs (id text PRIMARY KEY, status text); CREATE TABLE more () INHERITS (jobs)",
        "jobs is not an ordinary table: expected one without partitions or children",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_work_is_refused_with_its_column_and_left_alone(bare, bare_url, name):
    statements, message = REFUSED[name]
    bare.execute(statements)
    before = everything(bare)

    with pytest.raises(psycopg.Error) as refused:
        beacon_stop.init_db(bare_url)
    assert refused.value.diag.message_primary == message
    assert everything(bare) == before


def test_everything_that_is_in_the_way_is_listed(bare, bare_url):
    bare.execute("""
        CREATE TABLE jobs (id numeric PRIMARY KEY, status int, metadata text, created_at date, updated_at date);
        CREATE TABLE executions (
            id numeric, job_id text, status int, output text, created_at date, started_at date, completed_at date)""")

    with pytest.raises(psycopg.errors.InvalidTableDefinition) as refused:
        beacon_stop.init_db(bare_url)
    detail = refused.value.diag.message_detail.split("\n")
    assert refused.value.diag.message_primary == detail[0]
    assert sorted(line.split(":")[0].split(" has ")[0] for line in detail) == sorted(
        f"column {column}"
        for column in (
            "jobs.id", "jobs.status", "jobs.metadata", "jobs.created_at", "jobs.updated_at",
            "executions.id", "executions.job_id", "executions.status", "executions.output",
            "executions.created_at", "executions.started_at", "executions.completed_at",
        )
    )  # fmt: skip


@pytest.mark.parametrize("status", ["varchar(7)", "varchar"])
def test_a_status_that_just_works_is_taken(bare, bare_url, status):
    bare.execute(f"CREATE TABLE jobs (id varchar(3) PRIMARY KEY, status {status})")
    bare.execute(f"CREATE TABLE executions (id varchar(3), job_id varchar(3) REFERENCES jobs, status {status})")

    install(bare_url)
    bare.execute("INSERT INTO jobs (id, status) VALUES ('a', 'pending')")
    bare.execute("INSERT INTO executions (id, job_id, status) VALUES (1, 'a', 'running')")
    assert bare.execute("SELECT emergency_stop_job('a')").fetchone()[0]["executions_stopped"] == 1


STOP = "INSERT INTO emergency_stops (job_id, previous_status, stopped_at, executions_stopped{}) VALUES ('a', 'b', now(), "
CHANGE = "INSERT INTO batch_changes (operation, job_id, previous_status, changed_at, {}) VALUES ("
BOUNDS = {
    "INSERT INTO jobs (id) VALUES (repeat('x', {}))": (["1", "255"], ["0", "256"]),
    STOP.format("") + "{})": (["0"], ["-1"]),
    STOP.format(", sessions_ended") + "0, {})": (["DEFAULT", "0"], ["-1"]),
    STOP.format(", reason") + "0, repeat('x', {}))": (["1000"], ["1001"]),
    STOP.format(", action") + "0, {})": (["'stop'", "'release'"], ["'other'"]),
    STOP.format(", caller") + "0, {})": (["'{}'"], ["'[]'"]),
    CHANGE.format("executions_stopped") + "'timeout_stuck_jobs', 'a', 'b', now(), {})": (["0"], ["-1", "NULL"]),
    CHANGE.format("attempt") + "'repair_stuck_jobs', 'a', 'b', now(), {})": (["1"], ["0", "NULL"]),
    CHANGE.format("attempt") + "{}, 'a', 'b', now(), 1)": (["'repair_stuck_jobs'"], ["'other'"]),
}


def test_new_tables_take_what_is_within_their_bounds_and_nothing_else(db):
    for statement, (within, beyond) in BOUNDS.items():
        for value in within:
            db.execute(statement.replace("{}", value, 1))
        for value in beyond:
            with pytest.raises(psycopg.errors.CheckViolation):
                db.execute(statement.replace("{}", value, 1))
    assert db.execute("SELECT DISTINCT sessions_ended FROM emergency_stops").fetchall() == [(0,)]


def test_init_db_command_says_what_the_database_refused(bare, bare_url, capsys, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", bare_url)

    assert beacon_stop.main(["init-db"]) == 0
    bare.execute("DROP TABLE executions, jobs CASCADE; CREATE TABLE jobs (id numeric PRIMARY KEY, status text)")
    assert beacon_stop.main(["init-db"]) != 0
    assert "column jobs.id has type numeric: expected text" in capsys.readouterr().err


def test_the_records_are_append_only_for_all_but_their_owner(db, service, stop, make_job):
    stop(make_job(running=1))
    db.execute("GRANT ALL ON emergency_stops TO beacon_service")

    assert service.execute("SELECT count(*) FROM emergency_stops").fetchone() == (1,)
    for change in (
        "UPDATE emergency_stops SET stopped_by = 'nobody'",
        "DELETE FROM emergency_stops",
        "TRUNCATE emergency_stops",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
            service.execute(change)
    assert db.execute("SELECT stopped_by FROM emergency_stops").fetchone() == ("admin",)
    db.execute("DELETE FROM emergency_stops")  # the owner may: an audit has to end some day


def test_default_privileges_do_not_open_the_records(bare, bare_url, installed):
    bare.execute("ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO beacon_service, PUBLIC")
    bare.execute("ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO beacon_service, PUBLIC")

    install(bare_url)
    rights = bare.execute("""
        SELECT c.relname, r.role, p.name
        FROM pg_class c, unnest('{public,beacon_service}'::text[]) AS r (role),
             unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER,USAGE}'::text[]) AS p (name)
        WHERE c.relname ~ '^(emergency_stops|batch_changes)(_id_seq)?$' AND CASE c.relkind
            WHEN 'r' THEN p.name <> 'USAGE' AND has_table_privilege(r.role, c.oid, p.name)
            ELSE p.name IN ('SELECT', 'UPDATE', 'USAGE') AND has_sequence_privilege(r.role, c.oid, p.name) END
        ORDER BY 1""").fetchall()
    assert rights == [("batch_changes", "beacon_service", "SELECT"), ("emergency_stops", "beacon_service", "SELECT")]


def test_no_column_of_the_application_s_own_is_taken_for_a_parameter(db, service, make_job, stop):
    """One named mark, or barrier, made every stop fail, and no fault was named."""
    names = db.execute("""
        SELECT DISTINCT quote_ident(a.name)
        FROM pg_proc p, unnest(p.proargnames) AS a (name)
        WHERE p.pronamespace = 'public'::regnamespace AND a.name <> 'xmax'""").fetchall()
    for table in ("jobs", "executions", "emergency_stops"):
        for (name,) in names:
            db.execute(f"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {name} int")
    job_id, failed, stuck = make_job(running=2), make_job(status="failed"), make_job(running=1)
    age(db, 60, stuck)

    assert len(names) > 50
    for question in ("emergency_stop_dry_run(%s)", "emergency_stop_status(%s)", "get_job(%s)"):
        assert service.execute(f"SELECT {question}", (job_id,)).fetchone()[0].get("error") is None
    assert service.execute("SELECT timeout_stuck_jobs()").fetchone()[0]["timed_out_count"] == 1
    assert service.execute("SELECT repair_stuck_jobs()").fetchone()[0]["republished_count"] == 2
    assert [job["job_id"] for job in service.execute("SELECT runaway_jobs()").fetchone()[0]["jobs"]] == [job_id]
    assert stop(job_id)["executions_stopped"] == 2
    assert stop(failed)["executions_stopped"] == 0
    (stopped,) = db.execute("SELECT array_agg(id) FROM executions WHERE job_id = %s", (job_id,)).fetchone()
    assert db.execute("SELECT confirm_stopped(%s)", (stopped,)).fetchone() == (2,)
    assert service.execute("SELECT release_job(%s, 'fixed', 'pending')", (job_id,)).fetchone()[0]["ok"]
    assert service.execute("SELECT count(*) FROM list_executions(%s)", (job_id,)).fetchone() == (2,)
    assert service.execute("SELECT summary FROM emergency_stop_jobs(%s)", ([job_id],)).fetchone()[0]["ok"]
    assert service.execute("SELECT count(*) FROM emergency_stop_blockers(%s)", (job_id,)).fetchone() == (0,)
    assert service.execute("SELECT * FROM emergency_stop_faults()").fetchall() == []


@pytest.mark.parametrize("collation", ["POSIX", "C", "loose"])
def test_states_in_a_collation_of_their_own_are_taken(bare, bare_url, collation):
    """The texts of the warnings took the collation over, and could not be put together."""
    bare.execute(EXISTING)
    bare.execute(LOOSE)
    for table in ("jobs", "executions"):
        bare.execute(f'ALTER TABLE {table} ALTER status TYPE text COLLATE "{collation}"')

    install(bare_url)
    assert bare.execute("SELECT emergency_stop_job('job-1')").fetchone()[0]["executions_stopped"] == 10
