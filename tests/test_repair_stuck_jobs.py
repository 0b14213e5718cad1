"""sql/70_repair_stuck_jobs.sql: which failed jobs run again, how often, who hears of it."""

import json
from typing import Any

import psycopg
import pytest

from conftest import TOKEN, Client, age, change_function, in_thread, is_waiting, wait_until


@pytest.fixture
def repair(service):
    """Republish failed jobs as the service does, but for HTTP."""

    def repair(max_age: str = "24 hours", max_jobs: int = 100) -> dict[str, Any]:
        return service.execute("SELECT repair_stuck_jobs(%s, %s)", (max_age, max_jobs)).fetchone()[0]

    return repair


def ids(answer: dict[str, Any]) -> list[str]:
    return [job["job_id"] for job in answer["republished_jobs"]]


def test_a_timed_out_job_is_republished_and_runs_again(db, make_job, repair):
    job_id = make_job(metadata={"owner": "me"}, running=2, completed=1)
    age(db, 20, job_id)
    db.execute("SELECT timeout_stuck_jobs()")
    executions = db.execute("SELECT * FROM executions ORDER BY id").fetchall()

    answer = repair()
    assert list(answer) == ["ok", "message", "republished_count", "republished_jobs", "skipped", "more"]
    assert answer == {
        "ok": True, "message": "Failed jobs republished", "republished_count": 1,
        "republished_jobs": [{"job_id": job_id, "previous_status": "failed", "attempt": 1}],
        "skipped": {"emergency_stopped": 0, "attempts_exhausted": 0, "active": 0}, "more": False,
    }  # fmt: skip
    assert (list(answer["republished_jobs"][0]), list(answer["skipped"])) == (
        ["job_id", "previous_status", "attempt"],
        ["emergency_stopped", "attempts_exhausted", "active"],
    )
    status, metadata, updated_at = db.execute("SELECT status, metadata, updated_at FROM jobs").fetchone()
    assert (status, metadata["owner"], metadata["republish_count"]) == ("pending", "me", 1)
    assert metadata["republished_at"] == updated_at.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert db.execute("SELECT * FROM executions ORDER BY id").fetchall() == executions
    record = """
        SELECT job_id, previous_status, executions_stopped, attempt, database_user, changed_at
        FROM batch_changes WHERE operation = %s"""
    assert db.execute(record, ("repair_stuck_jobs",)).fetchall() == [(job_id, "failed", None, 1, "beacon_service", updated_at)]

    db.execute("UPDATE jobs SET status = 'processing'")
    db.execute("INSERT INTO executions (job_id, status) VALUES (%s, 'running')", (job_id,))
    assert repair()["republished_count"] == 0


def test_only_jobs_that_failed_within_the_time_are_republished(db, make_job, stop, repair):
    failed = [make_job(f"failed-{number}", status="failed") for number in range(3)]
    late = make_job("late", status="failed")
    others = [make_job(status=status) for status in ("created", "pending", "processing", "completed", "cancelled", "odd")]
    stopped = [make_job(running=1), make_job(status="failed", running=1)]
    for job_id in stopped:
        stop(job_id)
    for number, job_id in enumerate(failed):
        age(db, 100 - number, job_id)
    age(db, 25 * 60, late)
    kept = "SELECT * FROM jobs WHERE id = ANY (%s) ORDER BY id"
    before = db.execute(kept, ([late, *others, *stopped],)).fetchall()

    answer = repair()
    assert ids(answer) == failed
    assert (answer["skipped"], answer["more"]) == (
        {"emergency_stopped": 2, "attempts_exhausted": 0, "active": 0},
        False,
    )
    assert db.execute(kept, ([late, *others, *stopped],)).fetchall() == before
    assert ids(repair("26 hours")) == [late]


def test_a_job_that_failed_by_itself_and_was_stopped_then_is_not_republished(db, make_job, stop, repair):
    """The operator was told that it is stopped. Version 1.0 republished it."""
    job_id = make_job(status="failed")
    assert stop(job_id, "it must not run again")["action"] == "none"
    before = db.execute("SELECT * FROM jobs").fetchall()

    answer = repair()
    assert (answer["republished_count"], answer["more"]) == (0, False)
    assert answer["skipped"] == {"emergency_stopped": 1, "attempts_exhausted": 0, "active": 0}
    assert db.execute("SELECT * FROM jobs").fetchall() == before


@pytest.mark.parametrize("status", ["failed", "processing"])
def test_a_job_that_fails_after_its_release_is_republished(db, make_job, stop, repair, status):
    job_id = make_job(status=status)
    stop(job_id)
    assert repair()["skipped"]["emergency_stopped"] == 1
    db.execute("SELECT release_job(%s, 'all clear', 'processing')", (job_id,))
    db.execute("UPDATE jobs SET status = 'failed'")

    assert ids(repair()) == [job_id]


@pytest.mark.parametrize("status", ["pending", "running", "processing"])
def test_a_failed_job_with_active_executions_is_left_until_they_have_ended(db, make_job, repair, status):
    """Version 1.0 republished it beside them, so that the same work ran twice."""
    job_id = make_job(status="failed", completed=1, **{status: 2})

    answer = repair()
    assert (answer["republished_count"], answer["more"]) == (0, False)
    assert answer["skipped"] == {"emergency_stopped": 0, "attempts_exhausted": 0, "active": 1}
    db.execute(
        "UPDATE executions SET status = 'failed' WHERE id = (SELECT min(id) FROM executions WHERE status = %s)",
        (status,),
    )
    assert repair()["skipped"]["active"] == 1
    db.execute("UPDATE executions SET status = 'completed'")
    assert ids(repair()) == [job_id]


def test_each_job_is_counted_under_one_reason_only(db, make_job, stop, repair):
    stopped, _, active = (make_job(status="failed", metadata={"republish_count": 3 - number // 2}) for number in range(3))
    stop(stopped)
    db.execute("SET session_replication_role = replica")
    db.execute("INSERT INTO executions (job_id) SELECT id FROM jobs")
    db.execute("SET session_replication_role = origin")

    assert repair()["skipped"] == {"emergency_stopped": 1, "attempts_exhausted": 1, "active": 1}
    assert active == "job-3"


AGES = [70, 90, 60, 100, 80, 100]  # by which the order is neither that of the ids nor its reverse


def test_the_first_to_fail_come_first_and_more_says_that_some_are_left(db, make_job, repair):
    jobs = [make_job(status="failed") for _ in AGES]
    for job_id, minutes in zip(jobs, AGES, strict=True):
        age(db, minutes, job_id)
    db.execute("UPDATE jobs SET updated_at = (SELECT updated_at FROM jobs WHERE id = %s) WHERE id = %s", (jobs[5], jobs[3]))
    by_age = [jobs[number] for number in (3, 5, 1, 4, 0, 2)]

    assert (repair(max_jobs=0)["republished_count"], repair(max_jobs=0)["more"]) == (0, True)
    answers = [repair(max_jobs=2) for _ in range(3)]
    assert [ids(answer) for answer in answers] == [by_age[:2], by_age[2:4], by_age[4:]]
    assert [answer["more"] for answer in answers] == [True, True, False]


@pytest.mark.parametrize(
    "overwritten",
    [None, "{}", '{"republish_count": 0}', '{"republish_count": -7.5}', '{"republish_count": "x"}', "[1]", "null"],
)
def test_a_job_that_keeps_failing_is_republished_three_times(db, make_job, repair, overwritten):
    """Also when its worker writes metadata of its own."""
    job_id = make_job(status="failed")

    attempts = []
    for _ in range(5):
        answer = repair()
        attempts += [job["attempt"] for job in answer["republished_jobs"]]
        db.execute("UPDATE jobs SET status = 'failed', metadata = COALESCE(%s, metadata)", (overwritten,))
    assert attempts == [1, 2, 3]
    assert (answer["republished_count"], answer["skipped"]["attempts_exhausted"], answer["more"]) == (0, 1, False)
    assert db.execute("SELECT array_agg(attempt ORDER BY id) FROM batch_changes WHERE job_id = %s", (job_id,)).fetchone() == ([1, 2, 3],)


@pytest.mark.parametrize(("count", "attempts"), [(2, [3]), (3, []), (4, []), (10**30, [])])
def test_a_count_in_the_metadata_counts(db, make_job, repair, count, attempts):
    make_job(status="failed", metadata={"republish_count": count})

    answer = repair()
    assert [job["attempt"] for job in answer["republished_jobs"]] == attempts
    assert answer["skipped"]["attempts_exhausted"] == 1 - len(attempts)


def test_a_listener_hears_of_each(connect, make_job, repair):
    listener = connect()
    listener.execute("LISTEN job_republished")
    jobs = [make_job(status="failed") for _ in range(3)]

    repair()
    heard = [json.loads(notification.payload) for notification in listener.notifies(timeout=5, stop_after=3)]
    assert sorted(payload["job_id"] for payload in heard) == jobs
    assert [list(payload) for payload in heard] == [["job_id", "republished_at", "attempt"]] * 3


def test_an_id_too_long_for_a_notification_keeps_nothing_from_being_done(db, service, make_job, repair):
    db.execute("ALTER TABLE jobs DROP CONSTRAINT jobs_id_check")
    failed, runaway = make_job("f" * 8_000, status="failed"), make_job("r" * 8_000, running=1)

    assert ids(repair()) == [failed]
    assert service.execute("SELECT emergency_stop_job(%s)", (runaway,)).fetchone()[0]["executions_stopped"] == 1


@pytest.mark.parametrize("returned", ["NULL", "OLD"])
def test_a_job_that_a_trigger_of_the_application_keeps_failed_is_left(connect, db, make_job, repair, returned):
    make_job("kept", status="failed")
    other = make_job("other", status="failed")
    db.execute(f"""
        CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            RETURN CASE WHEN OLD.id = 'kept' THEN {returned} ELSE NEW END; END $$;
        CREATE TRIGGER keep BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION keep()""")
    listener = connect()
    listener.execute("LISTEN job_republished")

    answer = repair()
    assert (ids(answer), answer["more"]) == ([other], True)
    (heard,) = listener.notifies(timeout=5, stop_after=1)
    assert json.loads(heard.payload)["job_id"] == other
    assert db.execute("SELECT count(*) FROM batch_changes").fetchone() == (1,)


LOCKS = {
    "a locked job": "SELECT FROM jobs WHERE id = %(id)s FOR UPDATE",
    "a shared job": "SELECT FROM jobs WHERE id = %(id)s FOR SHARE",
    "a barrier taken alone": "SELECT pg_advisory_xact_lock(job_barrier(%(id)s))",
    "a barrier shared": "SELECT pg_advisory_xact_lock_shared(job_barrier(%(id)s))",
    "an open batch": "SELECT repair_stuck_jobs(max_jobs => 1)",
    "a failing worker": "UPDATE jobs SET metadata = '{\"late\": true}' WHERE id = %(id)s",
}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_job_that_someone_else_has_locked_is_left_for_the_next_call(connect, db, make_job, repair, lock):
    first, second = make_job(status="failed"), make_job(status="failed")
    age(db, 30, first)
    age(db, 20, second)
    other = connect(autocommit=False)
    other.execute(LOCKS[lock], {"id": first})

    answer = repair()
    assert (ids(answer), answer["more"]) == ([second], True)
    other.rollback()
    answer = repair()
    assert (ids(answer), answer["more"]) == ([first], False)


def test_jobs_that_are_not_to_be_had_cost_no_lock(connect, db, make_job):
    db.execute("INSERT INTO jobs (id, status) SELECT 'locked-' || n, 'failed' FROM generate_series(1, 50) n")
    free = make_job(status="failed")
    connect(autocommit=False).execute("UPDATE jobs SET metadata = '{}' WHERE id LIKE 'locked-%'")
    batch = connect(autocommit=False)

    assert ids(batch.execute("SELECT repair_stuck_jobs()").fetchone()[0]) == [free]
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = %s AND mode = 'ExclusiveLock'"
    assert db.execute(locks, (batch.info.backend_pid,)).fetchone() == (1,)


def test_a_stop_that_comes_while_a_job_is_republished_stops_it(connect, db, make_job):
    """Without the barrier it would take the job for ended, and answer so."""
    job_id = make_job(status="failed")
    batch, stopper = connect(autocommit=False), connect()
    batch.execute("SELECT repair_stuck_jobs()")

    with in_thread(lambda: stopper.execute("SELECT emergency_stop_job(%s)", (job_id,)).fetchone()[0]) as stop:
        wait_until(lambda: is_waiting(db, stopper))
        batch.commit()
    assert (stop.result["message"], stop.result["previous_status"]) == ("Job emergency stopped", "pending")


def test_a_stop_that_waits_for_a_batch_is_told_of_it(connect, db, make_job, service):
    job_id = make_job(status="failed")
    batch = connect(autocommit=False)
    batch.execute("SELECT repair_stuck_jobs()")

    blockers = "SELECT pid FROM emergency_stop_blockers(%s)"
    assert service.execute(blockers, (job_id,)).fetchall() == [(batch.info.backend_pid,)]
    with in_thread(batch.execute, "SELECT pg_sleep(0.5)"):  # at work, which a stop in its place would not be named for
        wait_until(
            lambda: db.execute("SELECT state FROM pg_stat_activity WHERE pid = %s", (batch.info.backend_pid,)).fetchone() == ("active",)
        )
        assert service.execute(blockers, (job_id,)).fetchall() == [(batch.info.backend_pid,)]


MEANWHILE = {
    "republished, and failed again":
        "SELECT repair_stuck_jobs(); UPDATE jobs SET status = 'failed', metadata = '{}' WHERE id = 'job-2'",
    "stopped with executions": "SELECT emergency_stop_job('job-2')",
    "stopped without executions":
        "UPDATE executions SET status = 'failed' WHERE job_id = 'job-2'; SELECT emergency_stop_job('job-2')",
    "completed": "UPDATE jobs SET status = 'completed' WHERE id = 'job-2'",
    "cancelled": "UPDATE jobs SET status = 'cancelled' WHERE id = 'job-2'",
    "pending": "UPDATE jobs SET status = 'pending' WHERE id = 'job-2'",
    "in a state of the application's own": "UPDATE jobs SET status = 'archived' WHERE id = 'job-2'",
    "gone": "DELETE FROM executions WHERE job_id = 'job-2'; DELETE FROM jobs WHERE id = 'job-2'",
    "restarted, and failed with an execution active":
        "UPDATE jobs SET status = 'pending' WHERE id = 'job-2'; INSERT INTO executions (job_id) VALUES ('job-2');"
        "UPDATE jobs SET status = 'failed' WHERE id = 'job-2'",
}  # fmt: skip


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_what_happens_to_a_job_while_a_batch_is_at_work_on_another(connect, db, make_job, meanwhile):
    """A slow batch gets to the second job after something has happened to it."""
    first = make_job(status="failed")
    second = make_job(status="failed", metadata={"republish_count": 2})
    age(db, 30, first)
    slow, quick = connect(), connect()
    db.execute(f"""
        CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pg_advisory_lock(42), pg_advisory_unlock(42);
            RETURN NEW;
        END $$;
        CREATE TRIGGER dawdle BEFORE UPDATE ON jobs FOR EACH ROW WHEN (OLD.id = '{first}') EXECUTE FUNCTION dawdle()""")
    db.execute("SELECT pg_advisory_lock(42)")
    look = "SELECT * FROM jobs WHERE id = %s"

    with in_thread(lambda: slow.execute("SELECT repair_stuck_jobs()").fetchone()[0]) as answer:
        wait_until(lambda: is_waiting(db, slow))
        quick.execute(MEANWHILE[meanwhile])
        before = db.execute(look, (second,)).fetchall()
        db.execute("SELECT pg_advisory_unlock(42)")
    assert (ids(answer.result), answer.result["more"]) == ([first], False)
    assert db.execute(look, (second,)).fetchall() == before


def test_the_route(client, make_job, db, capsys):
    job_id = make_job(status="failed")
    age(db, 120, job_id)
    call = {"HTTP_X_ADMIN_TOKEN": TOKEN}

    answer = client("POST", "/admin/repair-stuck-jobs", query="max_age_hours=1", **call)
    assert (answer.status, answer.json["republished_count"]) == (200, 0)
    answer = client("POST", "/admin/repair-stuck-jobs", **call)
    assert (answer.status, ids(answer.json)) == (200, [job_id])
    lines: list[dict[str, Any]] = []  # of the log, which no answer waits for
    wait_until(lambda: lines.extend(json.loads(line) for line in capsys.readouterr().err.splitlines()) or len(lines) >= 2)
    assert [(line["event"], line["outcome"], line["jobs"]) for line in lines] == [
        ("repair_stuck_jobs", "completed", 0),
        ("repair_stuck_jobs", "completed", 1),
    ]


def test_a_table_that_is_locked_is_said_to_be(make_app, connect, make_job):
    make_job(status="failed")
    connect(autocommit=False).execute("LOCK TABLE jobs")

    answer = Client(make_app(lock_timeout="100ms"))("POST", "/admin/repair-stuck-jobs", HTTP_X_ADMIN_TOKEN=TOKEN)
    assert (answer.status, answer.json["error"]) == (503, "tables are locked")


def test_the_record_is_append_only(db, service, make_job, repair):
    make_job(status="failed")
    repair()
    db.execute("GRANT ALL ON batch_changes TO beacon_service")

    for change in (
        "UPDATE batch_changes SET changed_by = 'nobody'",
        "DELETE FROM batch_changes",
        "TRUNCATE batch_changes",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
            service.execute(change)


def test_the_first_to_fail_come_first_whatever_the_plan(db, service, make_job, repair):
    jobs = [make_job(status="failed") for _ in AGES]
    for job_id, minutes in zip(jobs, AGES, strict=True):
        age(db, minutes, job_id)
    service.execute("SET enable_indexscan = off; SET enable_bitmapscan = off")

    assert ids(repair()) == [jobs[number] for number in (3, 5, 1, 4, 0, 2)]


def test_a_job_that_may_not_be_set_back_keeps_no_other_from_it(db, make_job, repair):
    """Before, one job that a unique index forbids made every call fail."""
    jobs = [make_job(f"{name}", status="failed") for name in ("a", "b", "c")]
    make_job("works already", status="processing")
    db.execute("ALTER TABLE jobs ADD COLUMN tenant text")
    db.execute("UPDATE jobs SET tenant = CASE WHEN id IN ('b', 'works already') THEN 'one' ELSE id END")
    db.execute("CREATE UNIQUE INDEX ON jobs (tenant) WHERE status IN ('pending', 'processing')")

    answer = repair()
    assert (sorted(ids(answer)), answer["more"]) == ([jobs[0], jobs[2]], True)


def test_it_ends_after_five_seconds_and_says_that_some_are_left(db, make_job, repair):
    make_job(status="failed")
    change_function(db, "repair_stuck_jobs", "interval '5 s'", "interval '-1 s'")

    answer = repair()
    assert (ids(answer), answer["more"]) == ([], True)
