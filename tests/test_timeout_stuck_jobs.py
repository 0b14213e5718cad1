"""sql/60_timeout_stuck_jobs.sql: which jobs are stuck, what becomes of them, whom it waits for.

Races with stops: test_hostile.py.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import beacon_stop
import psycopg
import pytest

from conftest import TOKEN, Client, age, change_function, count_active, in_thread, is_waiting, url_of, wait_until

REFUSED = psycopg.errors.ObjectNotInPrerequisiteState


@pytest.fixture
def time_out(service):
    """Time out stuck jobs as the service does, but for HTTP."""

    def time_out(threshold: str = "15 minutes", max_jobs: int = 100) -> dict[str, Any]:
        return service.execute("SELECT timeout_stuck_jobs(%s, %s)", (threshold, max_jobs)).fetchone()[0]

    return time_out


def ids(answer: dict[str, Any]) -> list[str]:
    return [job["job_id"] for job in answer["timed_out_jobs"]]


def sleeps(db: psycopg.Connection, session: psycopg.Connection) -> bool:
    return db.execute("SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = %s", (session.info.backend_pid,)).fetchone()[0]


def test_fails_the_job_and_its_active_executions_and_nothing_else(db, make_job, time_out):
    job_id = make_job(metadata={"owner": "me"}, pending=1, running=2, processing=3, completed=4)
    age(db, 20, job_id)
    db.execute("UPDATE executions SET output = '{\"step\": 7}' WHERE status = 'running'")
    db.execute("UPDATE executions SET output = '[1]' WHERE status = 'pending'")
    completed = db.execute("SELECT * FROM executions WHERE status = 'completed' ORDER BY id").fetchall()

    answer = time_out()
    assert list(answer) == ["ok", "message", "timed_out_count", "timeout_threshold_minutes", "timed_out_jobs", "more"]
    assert answer == {
        "ok": True, "message": "Stuck jobs timeout completed", "timed_out_count": 1, "timeout_threshold_minutes": 15,
        "timed_out_jobs": [{"job_id": job_id, "previous_status": "processing", "executions_stopped": 6}], "more": False,
    }  # fmt: skip
    assert list(answer["timed_out_jobs"][0]) == ["job_id", "previous_status", "executions_stopped"]
    status, metadata, updated_at = db.execute("SELECT status, metadata, updated_at FROM jobs").fetchone()
    assert status == "failed"
    assert metadata == {"owner": "me", "timed_out": True, "timed_out_at": updated_at.strftime("%Y-%m-%dT%H:%M:%SZ")}
    outputs = db.execute("SELECT output, completed_at FROM executions WHERE status = 'failed' ORDER BY id").fetchall()
    assert outputs == [
        ({"previous_output": [1], "error": "Job timed out"}, updated_at),
        *[({"step": 7, "error": "Job timed out"}, updated_at)] * 2,
        *[({"error": "Job timed out"}, updated_at)] * 3,
    ]
    assert db.execute("SELECT * FROM executions WHERE status = 'completed' ORDER BY id").fetchall() == completed
    record = """
        SELECT operation, job_id, previous_status, executions_stopped, attempt, database_user, changed_at
        FROM batch_changes"""
    assert db.execute(record).fetchall() == [("timeout_stuck_jobs", job_id, "processing", 6, None, "beacon_service", updated_at)]
    assert db.execute("SELECT count(*) FROM emergency_stops").fetchone() == (0,)


def test_only_stuck_jobs_are_timed_out_and_the_second_time_none(db, make_job, stop, time_out):
    stuck = [make_job(f"stuck-{status}", status=status, running=1) for status in ("created", "pending", "processing")]
    stuck.append(make_job("stuck-empty"))
    young = [make_job("young", running=1), make_job("young-empty", status="created")]
    ended = [make_job(status=status, running=1) for status in ("completed", "failed", "cancelled")]
    stopped = make_job("stopped", running=1)
    stop(stopped)
    progressing = [make_job(f"{name}-lately", running=2, completed=1) for name in ("updated", "added", "started", "completed", "born")]
    old = [*stuck, *ended, *progressing]
    age(db, 16, *old)
    db.execute("UPDATE jobs SET updated_at = now() - interval '14 minutes' WHERE id = 'updated-lately'")
    db.execute("UPDATE jobs SET created_at = now() - interval '14 minutes' WHERE id = 'born-lately'")
    db.execute("INSERT INTO executions (job_id, status) VALUES ('added-lately', 'pending')")
    first = "(SELECT min(id) FROM executions WHERE job_id = %s)"
    db.execute(f"UPDATE executions SET started_at = now() WHERE id = {first}", ("started-lately",))
    db.execute(f"UPDATE executions SET status = 'completed', completed_at = now() WHERE id = {first}", ("completed-lately",))
    kept = "SELECT * FROM jobs j LEFT JOIN executions e ON e.job_id = j.id WHERE NOT j.id = ANY (%s) ORDER BY j.id, e.id"
    before = db.execute(kept, (stuck,)).fetchall()

    answer = time_out()
    assert sorted(ids(answer)) == sorted(stuck)
    assert {job["previous_status"] for job in answer["timed_out_jobs"]} == {"created", "pending", "processing"}
    assert db.execute(kept, (stuck,)).fetchall() == before
    assert time_out() == answer | {"timed_out_count": 0, "timed_out_jobs": []}
    assert len(young) + len(ended) + len(progressing) == 10
    assert time_out("525600 minutes")["timed_out_count"] == 0


@pytest.mark.parametrize("status", ["canceled", "succeeded", "done", "COMPLETED", "archived", "", None])
def test_a_state_that_is_not_known_is_left_alone_by_both_batches(db, make_job, time_out, status):
    """Version 1.0 timed out jobs that had ended in a state of the application's own, and then republished them."""
    make_job(running=1, completed=1)
    db.execute("ALTER TABLE jobs ALTER status DROP NOT NULL")
    db.execute("UPDATE jobs SET status = %s", (status,))
    age(db, 90 * 24 * 60, "job-1")
    everything = "SELECT * FROM jobs j JOIN executions e ON e.job_id = j.id ORDER BY e.id"
    before = db.execute(everything).fetchall()

    answer = time_out()
    assert (answer["timed_out_count"], answer["more"]) == (0, False)
    assert db.execute("SELECT repair_stuck_jobs()").fetchone()[0]["republished_count"] == 0
    assert db.execute(everything).fetchall() == before


@pytest.mark.parametrize("status", ["created", "pending", "processing"])
def test_a_released_job_has_as_long_as_any_other(db, make_job, stop, time_out, status):
    """Version 1.0 timed out a job that was released after more than the threshold, at once.

    The release counts even when a worker writes an old copy of the job back, with its old updated_at.
    """
    job_id = make_job(completed=1)
    stop(job_id)
    age(db, 90, job_id)
    db.execute("UPDATE emergency_stops SET stopped_at = now() - interval '90 minutes'")
    db.execute("SELECT release_job(%s, 'all clear', %s)", (job_id, status))
    assert time_out()["timed_out_count"] == 0
    age(db, 90, job_id)
    assert (time_out()["timed_out_count"], time_out(max_jobs=0)["more"]) == (0, False)

    db.execute("UPDATE emergency_stops SET stopped_at = now() - interval '16 minutes' WHERE action = 'release'")
    assert ids(time_out()) == [job_id]


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [
        ("[1]", {"previous_metadata": [1]}),
        ('"x"', {"previous_metadata": "x"}),
        ("null", {}),
        (None, {}),
        ("{}", {}),
        ('{"a": 1}', {"a": 1}),
    ],
)
def test_what_was_in_the_metadata_is_kept_whatever_it_was(db, make_job, time_out, metadata, kept):
    job_id = make_job()
    db.execute("UPDATE jobs SET metadata = %s", (metadata,))
    age(db, 20, job_id)

    time_out()
    (metadata,) = db.execute("SELECT metadata FROM jobs").fetchone()
    assert sorted(metadata) == sorted([*kept, "timed_out", "timed_out_at"])
    assert metadata | kept == metadata
    db.execute("UPDATE jobs SET metadata = '[2]'")
    db.execute("SELECT repair_stuck_jobs()")
    (metadata,) = db.execute("SELECT metadata FROM jobs").fetchone()
    assert (metadata["previous_metadata"], metadata["republish_count"]) == ([2], 1)


AGES = [70, 90, 60, 100, 80, 100]  # by which the order is neither that of the ids nor its reverse


def test_the_oldest_come_first_and_more_says_that_some_are_left(db, make_job, time_out):
    jobs = [make_job() for _ in AGES]
    for job_id, minutes in zip(jobs, AGES, strict=True):
        db.execute("BEGIN")
        age(db, minutes, job_id)
        db.execute("COMMIT")
    db.execute("UPDATE jobs SET updated_at = (SELECT updated_at FROM jobs WHERE id = %s) WHERE id = %s", (jobs[5], jobs[3]))
    by_age = [jobs[number] for number in (3, 5, 1, 4, 0, 2)]

    assert (time_out(max_jobs=0)["timed_out_count"], time_out(max_jobs=0)["more"]) == (0, True)
    answers = [time_out(max_jobs=2) for _ in range(3)]
    assert [ids(answer) for answer in answers] == [by_age[:2], by_age[2:4], by_age[4:]]
    assert [answer["more"] for answer in answers] == [True, True, False]


def test_it_ends_after_five_seconds_and_the_next_call_goes_on(db, make_job, time_out):
    """Here after 300 ms, by jobs that take 200 ms each."""
    jobs = [make_job() for _ in range(4)]
    age(db, 20, *jobs)
    db.execute("""
        CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.2); RETURN NEW; END $$;
        CREATE TRIGGER dawdle BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION dawdle()""")
    change_function(db, "timeout_stuck_jobs", "interval '5 s'", "interval '300 ms'")

    answers = [time_out(), time_out()]
    assert [len(ids(answer)) for answer in answers] == [2, 2]
    assert [answer["more"] for answer in answers] == [True, False]
    assert sorted(ids(answers[0]) + ids(answers[1])) == jobs


def test_more_does_not_mean_jobs_that_get_on(db, make_job, time_out):
    stuck, live, young = make_job(), make_job(running=1), make_job()
    age(db, 20, stuck, live, young)
    db.execute("INSERT INTO executions (job_id) VALUES (%s)", (live,))
    db.execute("UPDATE jobs SET created_at = now() WHERE id = %s", (young,))

    assert [time_out(max_jobs=number)["more"] for number in (0, 1, 0)] == [True, False, False]


@pytest.mark.parametrize("threshold", ["0", "-1 minute", "525601 minutes", "1 year", None])
@pytest.mark.parametrize("function", ["timeout_stuck_jobs", "repair_stuck_jobs"])
def test_spans_of_time_that_make_no_sense_are_refused(shared_service, function, threshold):
    with pytest.raises(
        psycopg.errors.InvalidParameterValue,
        match=r"(threshold|max_age) is .*: expected more than 0, at most (525600|8760)",
    ):
        shared_service.execute(f"SELECT {function}(%s)", (threshold,))


@pytest.mark.parametrize("max_jobs", [-1, 1_001, None])
@pytest.mark.parametrize("function", ["timeout_stuck_jobs", "repair_stuck_jobs"])
def test_numbers_of_jobs_that_make_no_sense_are_refused(shared_service, function, max_jobs):
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"max_jobs is .*: expected 0 to 1000"):
        shared_service.execute(f"SELECT {function}(max_jobs => %s)", (max_jobs,))


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("function", ["timeout_stuck_jobs", "repair_stuck_jobs"])
def test_an_old_snapshot_is_refused(shared_service, function, level):
    with pytest.raises(psycopg.errors.InvalidTransactionState, match=f"{function} cannot run in a {level} transaction"):
        shared_service.execute(f"BEGIN ISOLATION LEVEL {level}; SELECT {function}()")
    shared_service.rollback()


@pytest.mark.parametrize("function", ["timeout_stuck_jobs", "repair_stuck_jobs"])
def test_the_lock_timeout_is_afterwards_what_it_was(service, db, make_job, function):
    age(db, 20, make_job(), make_job(status="failed"))
    service.execute("SET lock_timeout = '1234ms'")

    assert service.execute(f"SELECT {function}(), current_setting('lock_timeout')").fetchone()[1] == "1234ms"


@pytest.mark.parametrize("asynchronous", ["off", "local"])
@pytest.mark.parametrize("changed", [True, False])
def test_what_is_acknowledged_is_flushed(service, db, make_job, changed, asynchronous):
    age(db, 20 if changed else 0, make_job())
    service.execute("SELECT set_config('synchronous_commit', %s, false)", (asynchronous,))

    for function in ("timeout_stuck_jobs", "repair_stuck_jobs"):
        setting = service.execute(f"SELECT {function}(), current_setting('synchronous_commit')").fetchone()[1]
        assert setting == ("on" if changed else asynchronous), function


@pytest.mark.parametrize("function", ["timeout_stuck_jobs", "repair_stuck_jobs"])
def test_a_read_only_transaction_is_refused(shared_service, function):
    """Also with nothing to do: on a standby, jobs may not yet be what they are on the primary."""
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction, match=f"{function} cannot run in a read-only transaction"):
        shared_service.execute(f"BEGIN READ ONLY; SELECT {function}()")
    shared_service.rollback()


@pytest.mark.parametrize("table", ["jobs", "executions"])
@pytest.mark.parametrize("function", ["timeout_stuck_jobs", "repair_stuck_jobs"])
def test_rows_that_are_hidden_from_the_owner_are_an_error(service, db, make_job, function, table):
    """Version 1.0 answered that there was nothing to do."""
    age(db, 20, make_job(running=1), make_job(status="failed"))
    db.execute(f"""
        CREATE ROLE hidden_from;
        DO $$ DECLARE v_object text; BEGIN
            GRANT CREATE, USAGE ON SCHEMA public TO hidden_from;
            FOR v_object IN SELECT format('%I', tablename) FROM pg_tables WHERE schemaname = 'public' LOOP
                EXECUTE format('ALTER TABLE %s OWNER TO hidden_from', v_object);
            END LOOP;
            FOR v_object IN SELECT oid::regprocedure FROM pg_proc WHERE pronamespace = 'public'::regnamespace LOOP
                EXECUTE format('ALTER FUNCTION %s OWNER TO hidden_from', v_object);
            END LOOP;
        END $$;
        ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY""")
    service.execute("SET row_security = on")
    try:
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
            service.execute(f"SELECT {function}()")
    finally:
        db.execute("REASSIGN OWNED BY hidden_from TO CURRENT_USER; DROP OWNED BY hidden_from; DROP ROLE hidden_from")


@pytest.mark.parametrize("setting", ["plpgsql.extra_errors = 'all'", "timezone = 'Asia/Tokyo'"])
def test_settings_of_the_database_change_nothing(connect, db, make_job, setting):
    age(db, 20, make_job(running=2), make_job(running=2))
    db.execute(f"ALTER DATABASE {db.info.dbname} SET {setting}")

    session = connect()
    assert len(ids(session.execute("SELECT timeout_stuck_jobs()").fetchone()[0])) == 2
    assert session.execute("SELECT repair_stuck_jobs()").fetchone()[0]["republished_count"] == 2


LOCKS = {
    "an open insert": "INSERT INTO executions (job_id, created_at) VALUES (%(id)s, now() - interval '1 hour')",
    "a locked execution": "SELECT FROM executions WHERE job_id = %(id)s LIMIT 1 FOR UPDATE",
    "a locked job": "SELECT FROM jobs WHERE id = %(id)s FOR UPDATE",
    "a shared job": "SELECT FROM jobs WHERE id = %(id)s FOR SHARE",
    "an open stop": "SELECT emergency_stop_job(%(id)s)",
    "an open batch": "SELECT timeout_stuck_jobs(max_jobs => 1)",
}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_job_that_someone_else_has_locked_is_left_for_the_next_call(connect, db, make_job, time_out, lock):
    first, second = make_job(running=2), make_job(running=2)
    age(db, 30, first)
    age(db, 20, second)
    other = connect(autocommit=False)
    other.execute(LOCKS[lock], {"id": first})
    before = db.execute("SELECT * FROM executions WHERE job_id = %s ORDER BY id", (first,)).fetchall()

    answer = time_out()
    assert (ids(answer), answer["more"]) == ([second], True)
    assert db.execute("SELECT * FROM executions WHERE job_id = %s ORDER BY id", (first,)).fetchall() == before
    other.rollback()
    answer = time_out()
    assert (ids(answer), answer["more"]) == ([first], False)


RELEASE = """
    INSERT INTO emergency_stops (action, job_id, previous_status, new_status, executions_stopped, stopped_at)
    VALUES ('release', %(id)s, 'failed', 'processing', 0, now())"""
PROGRESS = {
    "an execution added": "INSERT INTO executions (job_id, status) VALUES (%(id)s, 'completed')",
    "an execution completed": "UPDATE executions SET status = 'completed', completed_at = now() WHERE id = 1",
    "an execution started": "UPDATE executions SET status = 'running', started_at = now() WHERE id = 1",
    "the job added anew": "UPDATE jobs SET created_at = now() WHERE id = %(id)s",
    "the job updated": "UPDATE jobs SET updated_at = now() WHERE id = %(id)s",
    "the job completed": "UPDATE jobs SET status = 'completed' WHERE id = %(id)s",
    "the job failed": "UPDATE jobs SET status = 'failed' WHERE id = %(id)s",
    "the job cancelled": "UPDATE jobs SET status = 'cancelled' WHERE id = %(id)s",
    "the job in a state of the application's own": "UPDATE jobs SET status = 'archived' WHERE id = %(id)s",
    "the job gone": "DELETE FROM executions WHERE job_id = %(id)s; DELETE FROM jobs WHERE id = %(id)s",
    "the job released": f"SELECT FROM jobs WHERE id = %(id)s FOR UPDATE; {RELEASE}",
}


@pytest.mark.parametrize("progress", PROGRESS)
def test_a_job_that_gets_on_at_the_last_moment_is_spared_and_let_go_of(connect, db, make_job, progress):
    """Its progress commits while the batch queues for it."""
    spared, stuck = make_job(pending=1, running=1), make_job(running=1)
    age(db, 30, spared)
    age(db, 20, stuck)
    change_function(db, "timeout_stuck_jobs", "'100ms'", "'10s'")  # so that it is sure to wait until the worker commits
    worker, batch = connect(autocommit=False, cursor_factory=psycopg.ClientCursor), connect(autocommit=False)
    worker.execute(PROGRESS[progress], {"id": spared})

    with in_thread(lambda: batch.execute("SELECT timeout_stuck_jobs()").fetchone()[0]) as answer:
        wait_until(lambda: is_waiting(db, batch))
        worker.commit()
    assert (ids(answer.result), answer.result["more"]) == ([stuck], False)
    assert batch.execute("SELECT count(*) FROM executions WHERE status = 'failed'").fetchone() == (1,)
    db.execute("SET lock_timeout = '1s'")
    db.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (spared,))  # the batch, still open, does not hold it
    db.execute("SELECT FROM executions WHERE job_id = %s FOR UPDATE", (spared,))
    assert db.execute("SELECT pg_try_advisory_lock(job_barrier(%s))", (spared,)).fetchone() == (True,)
    batch.commit()


def test_it_queues_for_a_moment_for_its_first_job_only(connect, db, make_job, time_out):
    """Else a flood of short transactions, of which one or another always holds the job, would keep it for ever."""
    first, second, third = (make_job(running=1) for _ in range(3))
    for minutes, job_id in ((30, third), (25, second), (20, first)):
        age(db, minutes, job_id)
    change_function(db, "timeout_stuck_jobs", "'100ms'", "'10s'")
    worker, other, batch = connect(autocommit=False), connect(autocommit=False), connect()
    worker.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (third,))
    other.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (second,))

    with in_thread(lambda: batch.execute("SELECT timeout_stuck_jobs()").fetchone()[0]) as answer:
        wait_until(lambda: is_waiting(db, batch))
        worker.commit()
    assert (ids(answer.result), answer.result["more"]) == ([third, first], True)


def test_hundreds_of_locked_jobs_keep_nobody_from_younger_ones(connect, db, make_job, time_out):
    db.execute("INSERT INTO jobs (id) SELECT 'locked-' || n FROM generate_series(1, 200) n")
    db.execute("UPDATE jobs SET created_at = now() - interval '2 hours', updated_at = now() - interval '2 hours'")
    free = make_job(running=1)
    age(db, 20, free)
    connect(autocommit=False).execute("SELECT FROM jobs WHERE id LIKE 'locked-%' FOR UPDATE")

    answer = time_out()
    assert (ids(answer), answer["more"]) == ([free], True)


def test_batches_keep_no_connection_from_stops(make_app, connect, db, make_job, monkeypatch):
    """Four batches that wait, since the table is locked, beside a stop of a job that has ended."""
    monkeypatch.setattr(beacon_stop, "POOL_TIMEOUT", 0.5)
    job_id = make_job(status="failed")
    client = Client(make_app(admin_pool=2, lock_timeout="1s"))
    client.stop(job_id)
    connect(autocommit=False).execute("LOCK TABLE batch_changes")

    with ThreadPoolExecutor(4) as callers:
        batches = [callers.submit(client, "POST", "/admin/timeout-stuck-jobs", HTTP_X_ADMIN_TOKEN=TOKEN) for _ in range(4)]
        wait_until(lambda: db.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() == (1,))
        assert client.stop(job_id).json["action"] == "none"
        assert not any(call.done() for call in batches)
    assert {call.result().status for call in batches} == {503}
    assert {call.result().json["error"] for call in batches} == {"tables are locked", "another batch is at work"}


def test_a_job_without_any_time_is_not_stuck(db, make_job, time_out):
    """As in tables that got their columns from us: nobody knows when these jobs changed."""
    make_job("no time", running=1)
    make_job("no time of executions", running=1)
    db.execute("ALTER TABLE jobs ALTER created_at DROP NOT NULL, ALTER updated_at DROP NOT NULL")
    db.execute("ALTER TABLE executions ALTER created_at DROP NOT NULL")
    known = [make_job("no update", completed=1), make_job("no creation", running=1)]
    age(db, 20, "no time of executions", *known)
    db.execute("UPDATE jobs SET created_at = NULL WHERE id IN ('no time', 'no creation')")
    db.execute("UPDATE jobs SET updated_at = NULL WHERE id IN ('no time', 'no update')")
    db.execute("UPDATE executions SET created_at = NULL WHERE job_id IN ('no time', 'no time of executions', 'no update')")

    assert sorted(ids(time_out())) == sorted(known)


@pytest.mark.parametrize("timezone", ["Asia/Tokyo", "America/New_York"])
def test_columns_without_a_time_zone_mean_the_installers(bare_database, server_url, timezone):
    with psycopg.connect(url_of(bare_database, server_url), autocommit=True) as db:
        db.execute(
            "CREATE TABLE jobs (id text PRIMARY KEY, status text DEFAULT 'processing',"
            " created_at timestamp DEFAULT now(), updated_at timestamp DEFAULT now())"
        )
        db.execute("CREATE TABLE executions (id int, job_id text, status text, created_at timestamp DEFAULT now())")
        beacon_stop.init_db(url_of(bare_database, server_url))
        db.execute("INSERT INTO jobs (id) VALUES ('live'), ('stuck'), ('failed')")
        db.execute(
            "UPDATE jobs SET created_at = now() - interval '20 minutes', updated_at = now() - interval '20 minutes' WHERE id = 'stuck'"
        )
        db.execute("UPDATE jobs SET status = 'failed', updated_at = now() - interval '2 hours' WHERE id = 'failed'")

        db.execute("SELECT set_config('timezone', %s, false)", (timezone,))
        assert db.execute("SELECT repair_stuck_jobs('1 hour')").fetchone()[0]["republished_count"] == 0
        assert ids(db.execute("SELECT timeout_stuck_jobs()").fetchone()[0]) == ["stuck"]


ID_TYPES = {
    "text": ("b", "a"),
    "varchar": ("b", "a"),
    "uuid": ("7f3c0f7e-0000-4000-8000-00000000000b", "7f3c0f7e-0000-4000-8000-00000000000a"),
    "bigint": ("9000000000", "11"),
    "integer": ("9", "11"),
}


@pytest.mark.parametrize("type", ID_TYPES)
def test_both_batches_with_ids_of_each_type(bare_database, server_url, type):
    """The ids are text in the answers, in the records and in what workers hear. The first job is not first by id."""
    url = url_of(bare_database, server_url)
    first, second = ID_TYPES[type]
    with psycopg.connect(url, autocommit=True) as db:
        db.execute(f"""
            CREATE TABLE jobs (
                id {type} PRIMARY KEY, status text, metadata jsonb, created_at timestamptz, updated_at timestamptz);
            CREATE TABLE executions (
                id {type} PRIMARY KEY, job_id {type} REFERENCES jobs, status text, created_at timestamptz)""")
        beacon_stop.init_db(url)
        for minutes, job_id in ((30, first), (20, second)):
            db.execute(
                "WITH job AS (INSERT INTO jobs"
                f" VALUES ('{job_id}', 'processing', NULL, now() - %(age)s, now() - %(age)s) RETURNING id)"
                " INSERT INTO executions SELECT id, id, 'running', now() - %(age)s FROM job",
                {"age": timedelta(minutes=minutes)},
            )
        db.execute("LISTEN job_republished")

        (answer,) = db.execute("SELECT timeout_stuck_jobs()").fetchone()
        assert answer["timed_out_jobs"] == [
            {"job_id": job_id, "previous_status": "processing", "executions_stopped": 1} for job_id in (first, second)
        ]
        (answer,) = db.execute("SELECT repair_stuck_jobs()").fetchone()
        assert sorted(job["job_id"] for job in answer["republished_jobs"]) == sorted((first, second))
        assert {job["attempt"] for job in answer["republished_jobs"]} == {1}
        heard = [json.loads(notification.payload)["job_id"] for notification in db.notifies(timeout=5, stop_after=2)]
        assert sorted(heard) == sorted((first, second))
        assert db.execute("SELECT array_agg(DISTINCT job_id ORDER BY job_id) FROM batch_changes").fetchone() == (sorted((first, second)),)
        db.execute("UPDATE jobs SET status = 'failed', metadata = NULL")
        for attempt in (2, 3):
            (answer,) = db.execute("SELECT repair_stuck_jobs()").fetchone()
            assert [job["attempt"] for job in answer["republished_jobs"]] == [attempt] * 2
            db.execute("UPDATE jobs SET status = 'failed', metadata = NULL")
        assert db.execute("SELECT emergency_stop_job(%s)", (first,)).fetchone()[0]["action"] == "none"
        (answer,) = db.execute("SELECT repair_stuck_jobs()").fetchone()
        assert answer["skipped"] == {"emergency_stopped": 1, "attempts_exhausted": 1, "active": 0}
        db.execute("UPDATE jobs SET status = 'processing', updated_at = created_at; UPDATE executions SET completed_at = created_at")
        db.execute("UPDATE jobs SET created_at = now() WHERE id = %s", (first,))
        assert ids(db.execute("SELECT timeout_stuck_jobs()").fetchone()[0]) == [second]


def test_a_deadlock_with_a_worker_costs_the_batch_one_job_and_the_worker_nothing(connect, db, make_job):
    """The worker locks the job first, and the batch an execution. A server may look for deadlocks early."""
    held, free = make_job(running=2), make_job(running=1)
    age(db, 30, held)
    age(db, 20, free)
    first, second = (id for (id,) in db.execute("SELECT id FROM executions WHERE job_id = %s ORDER BY id", (held,)))
    change_function(db, "timeout_stuck_jobs", "'100ms'", "'10s'")
    worker, other, batch = connect(autocommit=False), connect(autocommit=False), connect()
    worker.execute("SET deadlock_timeout = '15s'")
    batch.execute("SET deadlock_timeout = '1ms'")  # so that the batch is the one that is chosen
    worker.execute("UPDATE jobs SET metadata = '{}' WHERE id = %s", (held,))
    other.execute("SELECT FROM executions WHERE id = %s FOR UPDATE", (second,))

    with in_thread(lambda: batch.execute("SELECT timeout_stuck_jobs()").fetchone()[0]) as answer:
        wait_until(lambda: is_waiting(db, batch))
        with in_thread(worker.execute, "UPDATE executions SET output = '{}' WHERE id = %s", (first,)):
            wait_until(lambda: is_waiting(db, worker))
            other.commit()
    assert (ids(answer.result), answer.result["more"]) == ([free], True)
    worker.commit()


def test_a_worker_that_would_wait_for_a_slow_batch_is_told_to_try_again(connect, db, make_job):
    """It may hold rows that the batch needs next, as here, and lets go of them."""
    first, second = make_job(running=1), make_job(running=1)
    age(db, 30, first)
    age(db, 20, second)
    db.execute(f"""
        CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NEW; END $$;
        CREATE TRIGGER dawdle BEFORE UPDATE ON jobs FOR EACH ROW WHEN (OLD.id = '{first}') EXECUTE FUNCTION dawdle()""")
    worker, batch = connect(autocommit=False), connect()
    worker.execute("UPDATE executions SET output = '{}' WHERE job_id = %s", (second,))

    with in_thread(lambda: batch.execute("SELECT timeout_stuck_jobs()").fetchone()[0]) as answer:
        wait_until(lambda: sleeps(db, batch))
        with pytest.raises(psycopg.errors.SerializationFailure, match="is under way"):
            worker.execute("INSERT INTO executions (job_id) VALUES (%s)", (first,))
    assert (ids(answer.result), answer.result["more"]) == ([first, second], False)


TRIGGERS = {
    "a new execution for each that fails, three times each": """
        BEGIN
            IF NEW.status = 'failed' AND OLD.status <> 'failed'
               AND (SELECT count(*) FROM executions WHERE job_id = NEW.job_id) < 8 THEN
                INSERT INTO executions (job_id) VALUES (NEW.job_id);
            END IF;
            RETURN NULL;
        END""",
    "always a new execution": "BEGIN INSERT INTO executions (job_id) VALUES (NEW.job_id); RETURN NULL; END",
}


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_what_triggers_of_the_application_start_is_failed_as_well_or_nothing_is(db, make_job, time_out, trigger, deferred):
    """Version 1.0 left those executions active, in a job that had failed."""
    job_id, other = make_job(running=2), make_job()
    age(db, 30, job_id, other)
    db.execute(f"CREATE FUNCTION start() RETURNS trigger LANGUAGE plpgsql AS $${TRIGGERS[trigger]}$$")
    db.execute(
        "CREATE CONSTRAINT TRIGGER start AFTER UPDATE ON executions"
        f" {'DEFERRABLE INITIALLY DEFERRED' if deferred else ''} FOR EACH ROW EXECUTE FUNCTION start()"
    )

    answer = time_out()
    if trigger == "always a new execution":
        assert (ids(answer), answer["more"]) == ([other], True)
        assert db.execute("SELECT array_agg(status) FROM executions").fetchone() == (["running"] * 2,)
    else:
        assert (ids(answer), answer["more"]) == ([job_id, other], False)
        assert answer["timed_out_jobs"][0]["executions_stopped"] == 8
        assert count_active(db, job_id) == 0


@pytest.mark.parametrize("table", ["jobs", "executions"])
@pytest.mark.parametrize("returned", ["NULL", "OLD"])
def test_a_job_that_triggers_of_the_application_keep_from_failing_is_left(db, make_job, time_out, table, returned):
    kept, other = make_job("kept", running=2), make_job("other", running=1)
    age(db, 30, kept, other)
    job_id = "OLD.id" if table == "jobs" else "OLD.job_id"
    db.execute(f"""
        CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            RETURN CASE WHEN {job_id} = 'kept' THEN {returned} ELSE NEW END; END $$;
        CREATE TRIGGER keep BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION keep()""")

    answer = time_out()
    assert (ids(answer), answer["more"]) == ([other], True)
    assert count_active(db, kept) == 2
    assert db.execute("SELECT count(*) FROM batch_changes").fetchone() == (1,)


def test_no_execution_starts_while_or_after_a_job_is_timed_out(connect, db, make_job):
    job_id = make_job(running=1)
    age(db, 20, job_id)
    batch, worker = connect(autocommit=False), connect()
    batch.execute("SELECT timeout_stuck_jobs()")

    insert = ("INSERT INTO executions (job_id) VALUES (%s)", (job_id,))
    with pytest.raises(REFUSED, match="no execution of it may start"), in_thread(worker.execute, *insert):
        wait_until(lambda: is_waiting(db, worker))
        batch.commit()
    assert count_active(db, job_id) == 0
    with pytest.raises(REFUSED):
        worker.execute("UPDATE executions SET status = 'running' WHERE job_id = %s", (job_id,))


def test_a_stop_that_waits_for_a_batch_is_told_of_it(connect, db, make_job, service):
    job_id = make_job(running=1)
    age(db, 20, job_id)
    batch, stopper = connect(autocommit=False), connect()
    batch.execute("SELECT timeout_stuck_jobs()")

    with in_thread(lambda: stopper.execute("SELECT emergency_stop_job(%s)", (job_id,)).fetchone()[0]) as stop:
        wait_until(lambda: is_waiting(db, stopper))
        blockers = service.execute("SELECT pid FROM emergency_stop_blockers(%s)", (job_id,)).fetchall()
        with in_thread(batch.execute, "SELECT pg_sleep(0.5)"):  # at work, which a stop in its place would not be named for
            wait_until(
                lambda: db.execute("SELECT state FROM pg_stat_activity WHERE pid = %s", (batch.info.backend_pid,)).fetchone() == ("active",)
            )
            blockers += service.execute("SELECT pid FROM emergency_stop_blockers(%s)", (job_id,)).fetchall()
        batch.rollback()
    assert blockers == [(batch.info.backend_pid,)] * 2
    assert stop.result["message"] == "Job emergency stopped"


def test_it_reads_stuck_jobs_and_not_the_tables(connect, db, make_job):
    """100 stuck jobs beside a runaway's 100,000 executions, 5,000 of their own, 20,000 ended jobs, 4,000 that go on.

    The statistics are of the time of the runaway: hardly another job has executions.
    """
    db.execute("SET session_replication_role = replica")
    db.execute("INSERT INTO executions (job_id, status) SELECT 'ended-1', 'completed' FROM generate_series(1, 90000) n")
    db.execute("ANALYZE executions")
    stuck = [make_job(running=2) for _ in range(100)]
    db.execute("SET session_replication_role = replica")
    db.execute("INSERT INTO executions (job_id, status) SELECT 'job-' || n % 100 + 1, 'completed' FROM generate_series(1, 5000) n")
    age(db, 20, *stuck)
    db.execute("INSERT INTO jobs (id, status) SELECT 'ended-' || n, 'completed' FROM generate_series(1, 20000) n")
    db.execute("INSERT INTO jobs (id, status) SELECT 'live-' || n, 'processing' FROM generate_series(1, 1000) n")
    db.execute("INSERT INTO executions (job_id, status) SELECT 'live-' || n % 1000 + 1, 'running' FROM generate_series(1, 10000) n")
    db.execute("UPDATE jobs SET updated_at = now() - interval '1 hour', created_at = updated_at WHERE id NOT LIKE 'job-%'")
    db.execute("INSERT INTO jobs (id, status) SELECT 'young-' || n, 'processing' FROM generate_series(1, 3000) n")
    db.execute("ANALYZE jobs")
    reads = """
        SELECT relname, COALESCE(seq_tup_read, 0), COALESCE(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables
        WHERE relname IN ('jobs', 'executions') ORDER BY 1 DESC"""

    batch = connect(autocommit=False)
    answer = batch.execute("SELECT timeout_stuck_jobs()").fetchone()[0]
    ((_, seq_jobs, jobs), (_, seq_executions, executions)) = batch.execute(reads).fetchall()
    assert (answer["timed_out_count"], answer["more"]) == (100, False)
    assert (seq_jobs, seq_executions) == (0, 0)
    assert jobs < 2_000
    assert executions < 30_000


def test_of_a_job_that_goes_on_its_latest_executions_are_read_and_not_its_history(connect, db, make_job):
    job_id = make_job(completed=5_000)
    age(db, 60, job_id)
    db.execute("INSERT INTO executions (job_id, status) VALUES (%s, 'completed')", (job_id,))
    db.execute("ANALYZE executions")

    batch = connect(autocommit=False)
    assert batch.execute("SELECT timeout_stuck_jobs()").fetchone()[0]["timed_out_count"] == 0
    reads = "SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'executions'"
    assert batch.execute(reads).fetchone() == (0, 1)


# --- Over HTTP ---


def test_the_route(client, db, make_job, capsys):
    job_id = make_job(running=3)
    age(db, 16, job_id)
    call = {"HTTP_X_ADMIN_TOKEN": TOKEN}

    answer = client("POST", "/admin/timeout-stuck-jobs", query="threshold_minutes=17", **call)
    assert (answer.status, answer.json["timed_out_count"], answer.json["timeout_threshold_minutes"]) == (200, 0, 17)
    answer = client("POST", "/admin/timeout-stuck-jobs", b"{}", **call)
    assert (answer.status, answer.json["timeout_threshold_minutes"]) == (200, 15)
    assert answer.json["timed_out_jobs"] == [{"job_id": job_id, "previous_status": "processing", "executions_stopped": 3}]
    lines: list[dict[str, Any]] = []  # of the log, which no answer waits for
    wait_until(lambda: lines.extend(json.loads(line) for line in capsys.readouterr().err.splitlines()) or len(lines) >= 2)
    assert [(line["event"], line["outcome"], line["jobs"], line["executions_stopped"] or 0) for line in lines] == [
        ("timeout_stuck_jobs", "completed", 0, 0),
        ("timeout_stuck_jobs", "completed", 1, 3),
    ]


ROUTES = {
    "/admin/timeout-stuck-jobs": ("threshold_minutes", 525_600),
    "/admin/repair-stuck-jobs": ("max_age_hours", 8_760),
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "", "x", "+5", "5 ", "1e3", "525601", "9" * 30, "15&{}=15", "\u0661"])
def test_query_values_that_cannot_be_used(shared_client, path, value):
    name, highest = ROUTES[path]
    query = f"{name}={value.format(name)}".encode().decode("latin-1")

    answer = shared_client("POST", path, query=query, HTTP_X_ADMIN_TOKEN=TOKEN)
    assert answer.status == 400
    assert re.fullmatch(
        rf"{name} (cannot be used: expected a whole number from 1 to {highest}|is given 2 times: expected once)",
        answer.json["error"],
    )


@pytest.mark.parametrize("path", ROUTES)
def test_the_routes_are_guarded_like_the_stop(shared_client, make_app, path):
    token = {"HTTP_X_ADMIN_TOKEN": TOKEN}

    assert shared_client("POST", path).status == 403
    assert shared_client("POST", path, HTTP_X_ADMIN_TOKEN="wrong").status == 403
    assert (shared_client("GET", path, **token).status, shared_client("GET", path, **token).headers["Allow"]) == (
        405,
        "POST",
    )
    assert shared_client("POST", path, b"[]", **token).json == {"error": "body is not a JSON object: expected one such as {} or no body"}
    assert shared_client("POST", path, b"{}", query=f"{ROUTES[path][0]}={ROUTES[path][1]}", **token).status == 200


def test_the_oldest_come_first_whatever_the_plan_and_first_of_all_those_never_updated(db, service, make_job, time_out):
    jobs = [make_job() for _ in AGES]
    for job_id, minutes in zip(jobs, AGES, strict=True):
        age(db, minutes, job_id)
    db.execute("ALTER TABLE jobs ALTER updated_at DROP NOT NULL")
    db.execute("UPDATE jobs SET updated_at = NULL WHERE id = %s", (jobs[4],))
    service.execute("SET enable_indexscan = off; SET enable_bitmapscan = off")

    assert ids(time_out()) == [jobs[number] for number in (4, 3, 5, 1, 0, 2)]


@pytest.mark.parametrize(
    "body, said",
    [
        ("RAISE 'not this one'", "not this one"),
        ("PERFORM of_another_schema()", "function of_another_schema() does not exist"),
        ("INSERT INTO executions (job_id) VALUES ('ended')", "job 'ended' is failed: no execution of it may start"),
    ],
)
def test_a_job_that_a_trigger_does_not_let_fail_keeps_no_other_from_it(db, service, make_job, time_out, body, said):
    """Before, one such job made every call fail."""
    jobs = [make_job(f"{name}", running=1) for name in ("a", "b", "c")]
    make_job("ended", status="failed")
    age(db, 60, *jobs)
    db.execute(f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN NEW; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW WHEN (OLD.id = 'b') EXECUTE FUNCTION refuse()""")
    warned = []
    service.add_notice_handler(lambda diagnostic: warned.append(diagnostic.message_primary))

    answer = time_out()
    assert (sorted(ids(answer)), answer["more"]) == ([jobs[0], jobs[2]], True)
    assert warned == [f"job 'b' is not timed out: {said}"]
    assert count_active(db, "b") == 1


def test_beside_a_trigger_of_the_application_s_the_history_of_a_job_is_not_read(connect, db, make_job):
    """Marks of stops need not be counted. Common triggers, such as those that set a time, made each time-out count them."""
    job_id = make_job(running=1, completed=3_000)
    db.execute("""
        CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
        CREATE TRIGGER touch BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION touch()""")
    age(db, 60, job_id)
    db.execute("VACUUM ANALYZE executions")
    session = connect(autocommit=False)
    session.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
    reads = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'executions'"

    assert session.execute("SELECT timeout_stuck_jobs()").fetchone()[0]["timed_out_count"] == 1
    (read,) = session.execute(reads).fetchone()
    assert read < 2 * 3_001 + 100, "twice to see that nothing was done lately, and not once more"
