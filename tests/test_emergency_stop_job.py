"""sql/30_emergency_stop_job.sql: what one call does, says and leaves alone. Concurrency: test_hostile.py."""

import contextlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

import beacon_stop
import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from conftest import count_active, in_thread, is_waiting, wait_until

UTC = timezone.utc


def test_stops_the_job_and_its_active_executions_and_nothing_else(db, make_job, stop):
    other = make_job(running=2)
    job_id = make_job(pending=3, running=4, processing=5, completed=2, failed=1, cancelled=1)
    kept = "SELECT * FROM executions WHERE status NOT IN ('pending', 'running', 'processing') ORDER BY id"
    before = db.execute(kept).fetchall()

    started = datetime.now(timezone.utc).replace(microsecond=0)
    answer = stop(job_id)
    assert list(answer) == ["ok", "message", "job_id", "previous_status", "new_status", "executions_stopped", "stopped_at"]
    assert answer | {"stopped_at": None} == {
        "ok": True, "message": "Job emergency stopped", "job_id": job_id, "previous_status": "processing",
        "new_status": "failed", "executions_stopped": 12, "stopped_at": None,
    }  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", answer["stopped_at"])
    stopped_at = datetime.strptime(answer["stopped_at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    assert started <= stopped_at <= datetime.now(timezone.utc)

    status, metadata, updated_at = db.execute("SELECT status, metadata, updated_at FROM jobs WHERE id = %s", (job_id,)).fetchone()
    assert status == "failed"
    assert metadata == {"emergency_stop": True, "stopped_at": answer["stopped_at"], "stopped_by": "admin"}
    assert updated_at.replace(microsecond=0) == stopped_at
    stopped = db.execute(
        "SELECT DISTINCT status, completed_at, output FROM executions WHERE job_id = %s AND output IS NOT NULL", (job_id,)
    ).fetchall()
    assert stopped == [("failed", updated_at, {"error": "Emergency stop by admin", "emergency_stop": True})]
    assert [row for row in db.execute(kept).fetchall() if row[3] is None] == before
    assert count_active(db, job_id) == 0
    assert count_active(db, other) == 2


@pytest.mark.parametrize("status", ["processing", "failed", "completed"])
def test_stopping_twice_writes_nothing_and_locks_nothing(db, connect, make_job, stop, status):
    job_id = make_job(status=status, **({"running": 3} if status == "processing" else {"completed": 1}))
    stop(job_id)
    if status == "completed":  # what has held the row before leaves its number there
        db.execute("SELECT FROM jobs FOR UPDATE")
    before = [db.execute(f"SELECT xmin, * FROM {table} ORDER BY id").fetchall() for table in ("jobs", "executions", "emergency_stops")]
    session = connect(autocommit=False)

    def call():
        session.commit()  # which flushes what the last call has written, if it had to wait for something
        answer = session.execute("SELECT emergency_stop_job(%s)", (job_id,)).fetchone()[0]
        # With something unflushed, whoever wrote it, the answer waits for that, by a commit of its own.
        return answer if session.execute("SELECT pg_current_xact_id_if_assigned()").fetchone() == (None,) else None

    answer = wait_until(call)
    assert json.dumps(answer) == json.dumps(
        {
            "ok": True,
            "message": "Job already in terminal state",
            "job_id": job_id,
            "status": status.replace("processing", "failed"),
            "action": "none",
        }
    )
    locks = session.execute("SELECT locktype, mode FROM pg_locks WHERE pid = pg_backend_pid()").fetchall()
    assert {mode for kind, mode in locks if kind != "virtualxid"} == {"AccessShareLock"}
    session.rollback()
    assert [
        db.execute(f"SELECT xmin, * FROM {table} ORDER BY id").fetchall() for table in ("jobs", "executions", "emergency_stops")
    ] == before


def test_many_at_once_with_nothing_to_stop_change_nothing(connect, db, make_job, stop):
    job_id = make_job(running=1)
    stop(job_id)
    rows = "SELECT j.ctid, j.xmin, j.xmax, e.ctid, e.xmin, e.xmax, r.id FROM jobs j, executions e, emergency_stops r"
    before = db.execute(rows).fetchall()
    sessions = [connect() for _ in range(8)]
    call = "SELECT emergency_stop_job(%s)->>'action'"

    with ThreadPoolExecutor(8) as executor:
        answers = set(executor.map(lambda n: sessions[n % 8].execute(call, (job_id,)).fetchone(), range(800)))
    assert answers == {("none",)}
    assert db.execute(rows).fetchall() == before


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_a_job_that_ended_by_itself_is_left_as_it_is(db, make_job, stop, status):
    job_id = make_job(status=status, completed=2)

    assert stop(job_id)["status"] == status
    assert db.execute("SELECT status, metadata FROM jobs WHERE id = %s", (job_id,)).fetchone() == (status, None)
    # Version 1.0 recorded none of them. One that failed by itself is recorded, once, so that no batch restarts it.
    assert stop(job_id)["action"] == "none"
    recorded = db.execute("SELECT action, previous_status, new_status, executions_stopped FROM emergency_stops").fetchall()
    assert recorded == ([("stop", "failed", "failed", 0)] if status == "failed" else [])


@pytest.mark.parametrize("status", ["created", "pending", "processing", "paused", "a state nobody knows"])
def test_every_other_state_can_be_stopped(make_job, stop, status):
    assert stop(make_job(status=status, running=1))["previous_status"] == status


def test_a_job_without_executions_is_stopped_too(db, make_job, stop):
    job_id = make_job(status="created")

    assert stop(job_id)["executions_stopped"] == 0
    assert db.execute("SELECT status FROM jobs WHERE id = %s", (job_id,)).fetchone() == ("failed",)


def test_leftovers_of_a_job_that_has_ended_are_stopped_and_reported(db, make_job, stop):
    job_id = make_job(status="completed", running=2, completed=1)

    answer = stop(job_id, "left over")
    assert list(answer) == ["ok", "message", "job_id", "status", "action", "executions_stopped", "stopped_at", "reason"]
    assert (answer["message"], answer["status"]) == ("Job already in terminal state", "completed")
    assert (answer["action"], answer["executions_stopped"]) == ("executions_stopped", 2)
    status, metadata = db.execute("SELECT status, metadata FROM jobs WHERE id = %s", (job_id,)).fetchone()
    assert (status, metadata["emergency_stop"]) == ("completed", True)
    assert db.execute("SELECT previous_status, executions_stopped FROM emergency_stops").fetchone() == ("completed", 2)
    assert stop(job_id)["action"] == "none"


def test_an_unknown_job(stop):
    assert stop("nix") == {"error": "job not found", "job_id": "nix"}


@pytest.mark.parametrize("id", ["a/b", "100%", "ä ö", "'; DROP TABLE jobs --", "\n", "\\", "x" * 255, "𝔘" * 255, '"', "{}", " "])
def test_ids_of_any_characters(make_job, stop, id):
    make_job(id, running=1)

    assert (stop(id)["job_id"], stop(id)["action"]) == (id, "none")


def test_the_reason_is_kept_in_metadata_audit_and_answer(db, make_job, stop):
    job_id = make_job(running=1)

    assert list(stop(job_id, "it costs “too” much").items())[-1] == ("reason", "it costs “too” much")
    assert db.execute("SELECT metadata->>'reason' FROM jobs WHERE id = %s", (job_id,)).fetchone() == ("it costs “too” much",)
    assert db.execute("SELECT reason FROM emergency_stops").fetchone() == ("it costs “too” much",)


def test_a_reason_of_1000_characters_and_not_one_more(db, make_job, stop):
    job_id = make_job(running=1)

    with pytest.raises(psycopg.errors.InvalidParameterValue, match="reason has 1001 characters: expected at most 1000"):
        stop(job_id, "ä" * 1001)
    assert count_active(db, job_id) == 1
    assert stop(job_id, "ä" * 1000)["reason"] == "ä" * 1000


def test_the_record(db, make_job, service):
    job_id = make_job(running=2)
    caller = {"actor": "anna", "client": "192.0.2.1", "request_id": "r1"}
    answer = service.execute("SELECT emergency_stop_job(%s, 'why', caller => %s)", (job_id, Jsonb(caller))).fetchone()[0]

    (row,) = db.cursor(row_factory=dict_row).execute("SELECT * FROM emergency_stops").fetchall()
    stopped_at = row.pop("stopped_at")
    assert stopped_at.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ") == answer["stopped_at"]
    assert row.pop("id") and str(row.pop("client_address") or "127.0.0.1").startswith("127.0.0.1")
    assert row == {
        "action": "stop", "job_id": job_id, "previous_status": "processing", "new_status": "failed", "executions_stopped": 2,
        "sessions_ended": 0, "reason": "why", "caller": caller, "stopped_by": "admin", "database_user": "beacon_service",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (None, {}),
        ("null", {}),
        ('{"a": 1, "error": "x"}', {"a": 1}),
        ("[1, 2]", {"previous": [1, 2]}),
        ('"text"', {"previous": "text"}),
        ("7", {"previous": 7}),
    ],
)
def test_metadata_and_output_of_any_json_are_kept(db, make_job, stop, value, kept):
    job_id = make_job(running=1)
    db.execute("UPDATE jobs SET metadata = %s", (value,))
    db.execute("UPDATE executions SET output = %s", (value,))

    stop(job_id)
    metadata, output = db.execute("SELECT j.metadata, e.output FROM jobs j, executions e").fetchone()
    for column, value in (("metadata", metadata), ("output", output)):
        rest = {key: value[key] for key in value.keys() - {"emergency_stop", "error", "stopped_at", "stopped_by"}}
        assert value["emergency_stop"] is True
        assert rest == {key.replace("previous", f"previous_{column}"): old for key, old in kept.items()}
    assert output["error"] == "Emergency stop by admin"


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_an_execution_of_no_job_is_nobodys_business(db, level):
    """Where the column may be empty. Above READ COMMITTED it was taken for one of a job that is being changed, for ever."""
    db.execute("ALTER TABLE executions ALTER job_id DROP NOT NULL")
    db.execute(f"SET default_transaction_isolation = '{level}'")

    db.execute("INSERT INTO executions (status) VALUES ('failed'); UPDATE executions SET status = 'running'")
    assert db.execute("INSERT INTO executions (status) VALUES ('pending')").rowcount == 1


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_it_refuses_to_run_on_an_old_snapshot(connect, make_job, db, level):
    job_id = make_job(running=1)
    session = connect()

    with session.transaction():
        session.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        with pytest.raises(psycopg.errors.InvalidTransactionState, match=f"cannot run in a {level} transaction"), session.transaction():
            session.execute("SELECT emergency_stop_job(%s)", (job_id,))
    assert count_active(db, job_id) == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [("off", "on"), ("local", "on"), ("on", "on"), ("remote_write", "remote_write"), ("remote_apply", "remote_apply")],
)
def test_the_commit_is_flushed_and_a_stricter_setting_never_lowered(connect, make_job, before, after):
    job_id = make_job(running=1)
    session = connect(autocommit=False)
    session.execute(f"SET synchronous_commit = {before}")
    session.commit()

    session.execute("SELECT emergency_stop_job(%s)", (job_id,))
    assert session.execute("SHOW synchronous_commit").fetchone() == (after,)
    session.commit()
    assert session.execute("SHOW synchronous_commit").fetchone() == (before,), "the caller's setting is not ours to keep"


@pytest.mark.parametrize("setting", ["0", "7s"])
def test_the_callers_lock_timeout_is_as_it_was(connect, make_job, setting):
    job_id = make_job(running=1)
    session = connect(autocommit=False)
    session.execute(f"SET LOCAL lock_timeout = '{setting}'")

    for id in (job_id, job_id, "unknown"):
        session.execute("SELECT emergency_stop_job(%s)", (id,))
        assert session.execute("SHOW lock_timeout").fetchone() == (setting,)


@pytest.mark.parametrize("setting", ["0", "7s"])
def test_the_callers_lock_timeout_is_as_it_was_also_after_a_wait(connect, db, make_job, setting):
    job_id = make_job(running=1)
    worker, session = connect(autocommit=False), connect(autocommit=False)
    worker.execute("UPDATE executions SET output = '{}'")
    session.execute(f"SET LOCAL lock_timeout = '{setting}'")

    with in_thread(session.execute, "SELECT emergency_stop_job(%s)", (job_id,)):
        wait_until(lambda: is_waiting(db, session))
        worker.rollback()
    assert session.execute("SHOW lock_timeout").fetchone() == (setting,)


def test_a_rolled_back_stop_has_not_happened(connect, db, make_job):
    job_id = make_job(running=3)
    session = connect(autocommit=False)
    session.execute("SELECT emergency_stop_job(%s)", (job_id,))
    session.rollback()

    assert count_active(db, job_id) == 3
    assert db.execute("SELECT count(*) FROM emergency_stops").fetchone() == (0,)


def test_the_notification(connect, db, make_job, stop):
    job_id = make_job(running=2)
    listener = connect()
    listener.execute("LISTEN emergency_stop")
    answer = stop(job_id)
    stop(job_id)  # nothing to tell

    db.execute("NOTIFY emergency_stop, 'the last'")
    notification, last = listener.notifies(timeout=10, stop_after=2)
    assert last.payload == "the last"
    assert json.loads(notification.payload) == {"job_id": job_id, "stopped_at": answer["stopped_at"], "executions_stopped": 2}


def test_the_cost_does_not_depend_on_the_size_of_the_tables(db, make_job):
    """The plan of every statement on executions goes by the job's active executions."""
    job_id = make_job(running=42)
    make_job("big", completed=20_000)
    db.execute("INSERT INTO executions (job_id, status) SELECT %s, 'completed' FROM generate_series(1, 20000)", (job_id,))
    db.execute("VACUUM ANALYZE executions")
    read = (
        "SELECT sum(idx_blks_read + idx_blks_hit + heap_blks_read + heap_blks_hit) FROM pg_statio_user_tables WHERE relname = 'executions'"
    )
    db.execute("SELECT pg_stat_force_next_flush()" if db.info.server_version >= 150000 else "SELECT")
    before = db.execute(read).fetchone()[0]

    db.execute("SELECT emergency_stop_job(%s)", (job_id,))
    db.execute("SELECT pg_stat_force_next_flush()" if db.info.server_version >= 150000 else "SELECT")
    assert db.execute(read).fetchone()[0] - before < 1_000


def test_an_id_too_long_for_a_notification_is_stopped_all_the_same(db, connect, make_job, stop):
    db.execute("ALTER TABLE jobs DROP CONSTRAINT jobs_id_check")  # as in a table from before the installation
    listener = connect()
    listener.execute("LISTEN emergency_stop")

    assert stop(make_job("x" * 8_000, running=1))["executions_stopped"] == 1
    stop(make_job("a"))
    assert [json.loads(notice.payload)["job_id"] for notice in listener.notifies(timeout=10, stop_after=1)] == ["a"]


def test_the_longest_payload_that_postgresql_takes_is_told_and_a_longer_one_does_no_harm(connect, db):
    listener = connect()
    listener.execute("LISTEN emergency_stop")

    for length in (7_999, 8_000):  # with the quotation marks
        db.execute("SELECT notify_workers('emergency_stop', to_json(repeat('x', %s)))", (length - 2,))
    db.execute("NOTIFY emergency_stop, 'the last'")
    assert [len(notice.payload) for notice in listener.notifies(timeout=10, stop_after=2)] == [7_999, len("the last")]


def test_an_insert_for_one_job_that_goes_on_is_admitted_at_the_first_look(db, make_job):
    """Every insert pays for it. What looks at several jobs costs several times as much."""
    one, other = make_job(), make_job()
    db.execute("""
        CREATE OR REPLACE FUNCTION admit_execution(job_id text) RETURNS void LANGUAGE plpgsql
        AS $$ BEGIN RAISE feature_not_supported; END $$""")

    db.execute("INSERT INTO executions (job_id) VALUES (%(one)s), (%(one)s), (%(one)s)", {"one": one})
    assert count_active(db, one) == 3
    with pytest.raises(psycopg.errors.FeatureNotSupported):
        db.execute("INSERT INTO executions (job_id) VALUES (%s), (%s)", (one, other))


def test_a_reason_of_the_users_own_in_the_metadata_is_kept(db, make_job, stop, service):
    """Version 1.0 dropped it where there was a `stopped_by`. What the last stop has left is not carried over to the next."""
    own = make_job(metadata={"stopped_by": "somebody", "reason": "their own"})
    stop(own)
    assert db.execute("SELECT metadata->>'reason' FROM jobs WHERE id = %s", (own,)).fetchone() == ("their own",)

    again = make_job()
    stop(again, "the first time")
    db.execute("SELECT release_job(%s, 'mended', 'processing')", (again,))
    stop(again)
    assert db.execute("SELECT metadata ? 'reason' FROM jobs WHERE id = %s", (again,)).fetchone() == (False,)


def test_executions_in_states_of_the_applications_own_are_left_alone_and_told(db, make_job, stop):
    """Version 1.0: ok, and not a word."""
    job_id = make_job(pending=10, queued=10, retrying=1, RUNNING=2, completed=3)
    left = {"queued": 10, "retrying": 1, "RUNNING": 2}

    answer = stop(job_id)
    assert (answer["executions_stopped"], answer["left_alone"]) == (10, left)
    answer = stop(job_id)
    assert (answer["action"], answer["left_alone"]) == ("none", left)
    assert db.execute("SELECT count(*) FROM executions WHERE status = 'queued' AND output IS NULL").fetchone() == (10,)


@pytest.mark.parametrize("timezone", ["Asia/Tokyo", "America/New_York"])
def test_columns_without_a_time_zone_are_the_installers_whatever_the_session_says(bare_database, server_url, connect, timezone):
    """Version 1.0: 9 hours off."""
    url = make_conninfo(server_url, dbname=bare_database.info.dbname)
    db, session = connect(url), connect(url)
    db.execute("""
        CREATE TABLE jobs (id serial PRIMARY KEY, status text, updated_at timestamp);
        CREATE TABLE executions (id serial PRIMARY KEY, job_id int REFERENCES jobs, status text, completed_at timestamp)""")
    beacon_stop.init_db(url)
    db.execute("INSERT INTO jobs (status) VALUES ('processing'); INSERT INTO executions (job_id, status) VALUES (1, 'running')")
    session.execute(f"SET timezone = '{timezone}'")

    session.execute("SELECT emergency_stop_job('1')")
    off = "SELECT abs(extract(epoch FROM (SELECT completed_at FROM executions) - now()::timestamp)) < 60"
    assert db.execute(off).fetchone() == (True,)
    shown = session.execute("SELECT get_job('1')").fetchone()[0]["job"]["updated_at"]
    updated_at = datetime.fromisoformat(shown.replace("Z", "+00:00"))
    assert abs((datetime.now(tz=UTC) - updated_at).total_seconds()) < 60


def test_extra_checks_of_plpgsql_are_no_errors(connect, db, make_job):
    """plpgsql.extra_errors set for the database. Version 1.0: every INSERT of several rows failed."""
    job_id = make_job(running=2)
    db.execute(f"ALTER DATABASE {db.info.dbname} SET plpgsql.extra_errors = 'all'")
    session = connect()

    session.execute("INSERT INTO executions (job_id) SELECT %s FROM generate_series(1, 3)", (job_id,))
    session.execute("UPDATE executions SET status = 'running' WHERE job_id = %s", (job_id,))
    assert session.execute("SELECT emergency_stop_job(%s)", (job_id,)).fetchone()[0]["executions_stopped"] == 5
    assert session.execute("SELECT emergency_stop_job(%s)", (job_id,)).fetchone()[0]["action"] == "none"


def test_row_level_security_is_an_error_not_a_silent_nothing(db, connect, make_job, owner_url):
    """An owner of tables and functions who is no superuser, and FORCE ROW LEVEL SECURITY. Version 1.0: ok, 0 stopped."""
    job_id = make_job(running=2)
    with contextlib.suppress(psycopg.errors.DuplicateObject):
        db.execute("CREATE ROLE beacon_weak_owner")
    db.execute("GRANT ALL ON SCHEMA public TO beacon_weak_owner")
    for function in db.execute("SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace").fetchall():
        db.execute(f"ALTER FUNCTION {function[0]} OWNER TO beacon_weak_owner")
    for table in ("jobs", "executions", "emergency_stops", "batch_changes"):
        db.execute(f"ALTER TABLE {table} OWNER TO beacon_weak_owner")

    for table in ("jobs", "executions"):
        db.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY; ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        for function in ("emergency_stop_job", "emergency_stop_dry_run"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
                connect().execute(f"SELECT {function}(%s)", (job_id,))
        db.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    assert connect().execute("SELECT emergency_stop_job(%s)", (job_id,)).fetchone()[0]["executions_stopped"] == 2


@pytest.mark.parametrize("caller", ['"anna"', "[1]", "7"])
def test_a_caller_that_is_no_object_is_refused(service, make_job, caller):
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="expected an object"):
        service.execute("SELECT emergency_stop_job(%s, caller => %s::jsonb)", (make_job(), caller))


def test_a_full_notification_queue_does_not_keep_a_stop_from_committing(folder):
    """A listener that stays in a transaction keeps the queue from being emptied. Version 1.0: no stop committed."""
    with beacon_stop.embedded_postgres(folder) as url, psycopg.connect(url, autocommit=True) as db:
        db.execute("ALTER SYSTEM SET max_notify_queue_pages = 64")
    with beacon_stop.embedded_postgres(folder) as url:
        beacon_stop.init_db(url)
        with psycopg.connect(url, autocommit=True) as db, psycopg.connect(url, autocommit=True) as listener:
            db.execute("INSERT INTO jobs (id, status) VALUES ('a', 'processing')")
            for statement in ("LISTEN emergency_stop", "BEGIN", "SELECT 1"):
                listener.execute(statement)
            with pytest.raises(psycopg.errors.ProgramLimitExceeded):
                for _ in range(100):
                    db.execute("SELECT pg_notify('emergency_stop', repeat('x', 7000) || n) FROM generate_series(1, 10) AS n")
            warnings = []
            db.add_notice_handler(lambda diagnostic: warnings.append(diagnostic.message_primary))

            assert db.execute("SELECT emergency_stop_job('a')").fetchone()[0]["ok"]
    assert any("nobody was notified" in warning for warning in warnings)


@pytest.mark.parametrize("is_local", [False, True])
def test_no_function_leaves_a_setting_behind_in_its_session(db, service, make_job, is_local):
    """What is set for one transaction must not be what the next caller of a pooled session works with."""
    going, locked, ended = make_job("going", running=2), make_job("locked", running=1), make_job("ended", status="failed")
    make_job("stuck", running=1)
    db.execute("UPDATE jobs SET created_at = now() - interval '1 hour', updated_at = now() - interval '1 hour' WHERE id = 'stuck'")
    db.execute("UPDATE executions SET created_at = now() - interval '1 hour' WHERE job_id = 'stuck'")
    service.execute("SET lock_timeout = '123ms'; SET synchronous_commit = off; SET client_min_messages = notice")

    def settings():
        names = "SELECT name, setting FROM pg_settings WHERE source = 'session' ORDER BY name"
        own = "SELECT current_setting('beacon_stop.stopping', true), current_setting('beacon_stop.releasing', true)"
        return service.execute(names).fetchall(), [value or "" for value in service.execute(own).fetchone()]

    before = settings()
    for call in (
        "emergency_stop_dry_run('going')",
        "emergency_stop_status('going')",
        "timeout_stuck_jobs('30 minutes')",
        "repair_stuck_jobs()",
        "emergency_stop_job('going')",
        "emergency_stop_job('going')",
        "emergency_stop_job('ended', 'x')",
        "emergency_stop_job('nix')",
        "release_job('going', 'all clear', 'processing')",
        "release_job('stuck', 'it has no stop', 'processing')",
    ):
        with service.transaction():
            if is_local:
                service.execute("SET LOCAL lock_timeout = '321ms'")
            answer, lock_timeout = service.execute(f"SELECT {call}, current_setting('lock_timeout')").fetchone()
            assert lock_timeout == ("321ms" if is_local else "123ms"), call
        assert settings() == before, call
        assert answer.get("timed_out_count", 1) == answer.get("republished_count", 1) == 1 or call == "repair_stuck_jobs()"
    service.execute("SELECT * FROM emergency_stop_jobs(%s)", ([going, ended],)).fetchall()
    with db.transaction():
        db.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (locked,))
        with pytest.raises(psycopg.errors.LockNotAvailable):
            service.execute("SELECT emergency_stop_job(%s)", (locked,))
        assert settings() == before
        service.execute("SELECT emergency_stop_job(%s, force => true)", ("ended",))
    assert settings() == before


@pytest.mark.parametrize("status", ["completed", "cancelled"])
def test_a_job_that_ended_by_itself_is_not_locked_either(connect, db, make_job, status):
    job_id, session = make_job(status=status, completed=1), connect(autocommit=False)

    assert session.execute("SELECT emergency_stop_job(%s)", (job_id,)).fetchone()[0]["action"] == "none"
    db.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE NOWAIT", (job_id,))
    assert db.execute("SELECT pg_try_advisory_lock(job_barrier(%s))", (job_id,)).fetchone() == (True,)


def test_a_job_that_has_the_mark_but_has_not_ended_is_stopped(db, make_job, stop):
    """As a worker may have copied it from the metadata of another one."""
    job_id = make_job(metadata={"emergency_stop": True})

    assert stop(job_id)["message"] == "Job emergency stopped"
    assert db.execute("SELECT status FROM jobs").fetchone() == ("failed",)


# --- What a stop locks before it changes anything, if the first attempt has failed ---


@pytest.mark.parametrize("job_first", [True, False])
def test_the_job_and_its_active_executions_are_locked_and_nothing_else(connect, db, make_job, job_first):
    job_id, other = make_job(pending=1, running=1, processing=1, completed=1), make_job(running=1)
    stopper = connect(autocommit=False)
    free = "SELECT status FROM executions WHERE job_id = %s FOR SHARE SKIP LOCKED"

    stopper.execute("SELECT lock_rows(%s, '1 s', %s)", (job_id, job_first))
    assert db.execute(free, (job_id,)).fetchall() == [("completed",)]
    assert db.execute(free, (other,)).fetchall() == [("running",)]
    assert db.execute("SELECT id FROM jobs FOR SHARE SKIP LOCKED").fetchall() == [(other,)]


def test_a_row_that_is_let_go_while_it_is_waited_for_is_locked(connect, db, make_job):
    job_id = make_job()
    holder, stopper = connect(autocommit=False), connect(autocommit=False)
    holder.execute("SELECT FROM jobs FOR UPDATE")

    with in_thread(stopper.execute, "SELECT lock_job_row(%s, '10 s', lock_table => false)", (job_id,)):
        wait_until(lambda: is_waiting(db, stopper))
        holder.rollback()
    assert db.execute("SELECT FROM jobs FOR SHARE SKIP LOCKED").fetchall() == []
    assert db.execute("SELECT FROM pg_locks WHERE mode = 'ExclusiveLock' AND relation = 'jobs'::regclass").fetchall() == []


def test_while_an_execution_is_waited_for_the_table_is_not_locked(connect, db, make_job):
    """Even where sessions share the job's row: all jobs would wait with this one."""
    job_id = make_job(running=1)
    sharer, holder, stopper = connect(autocommit=False), connect(autocommit=False), connect(autocommit=False)
    sharer.execute("SELECT FROM jobs FOR SHARE")
    holder.execute("SELECT FROM executions FOR UPDATE")

    with in_thread(stopper.execute, "SELECT lock_rows(%s, '10 s', job_first => true)", (job_id,)):
        wait_until(lambda: is_waiting(db, stopper))
        assert db.execute("SELECT FROM pg_locks WHERE mode = 'ExclusiveLock' AND relation = 'jobs'::regclass").fetchall() == []
        sharer.rollback()
        holder.rollback()


def test_no_wait_for_a_row_lasts_longer_than_it_is_given(connect, db, make_job):
    job_id, holder = make_job(running=1), connect(autocommit=False)
    holder.execute("SELECT FROM jobs, executions FOR UPDATE")
    started = time.monotonic()

    for wait in (
        "lock_job_row(%s, '100 ms', false)",
        "lock_job_row(%s, '100 ms', true)",
        "lock_rows(%s, '100 ms', true)",
        "lock_rows(%s, '100 ms', false)",
    ):
        with pytest.raises(psycopg.errors.LockNotAvailable):
            db.execute(f"SELECT {wait}", (job_id,))
    assert time.monotonic() - started < 3
    for none in ("0", "-1 ms"):
        with pytest.raises(psycopg.errors.LockNotAvailable, match="is over"):
            db.execute("SELECT limit_lock_wait(%s)", (none,))  # lock_timeout = 0 would wait for ever
    holder.rollback()


@pytest.mark.parametrize("status", ["pending", "running", "processing"])
def test_an_execution_that_others_hold_is_waited_for_in_each_active_state(connect, db, make_job, status):
    job_id, holder = make_job(**{status: 1}), connect(autocommit=False)
    holder.execute("SELECT FROM executions FOR UPDATE")

    with pytest.raises(psycopg.errors.LockNotAvailable):
        db.execute("SELECT lock_rows(%s, '100 ms', false)", (job_id,))
    holder.rollback()
