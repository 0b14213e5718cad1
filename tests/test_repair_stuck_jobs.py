"""sql/70_repair_stuck_jobs.sql: which failed jobs run again, how often, who hears of it."""

import json
from typing import Any

import psycopg
import pytest
from conftest import TOKEN, Client, age, in_thread, is_waiting, wait_until


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
        "skipped": {"emergency_stopped": 0, "attempts_exhausted": 0}, "more": False,
    }  # fmt: skip
    assert (list(answer["republished_jobs"][0]), list(answer["skipped"])) == (
        ["job_id", "previous_status", "attempt"],
        ["emergency_stopped", "attempts_exhausted"],
    )
    status, metadata, updated_at = db.execute("SELECT status, metadata, updated_at FROM jobs").fetchone()
    assert (status, metadata["owner"], metadata["republish_count"]) == ("pending", "me", 1)
    assert metadata["republished_at"] == updated_at.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert db.execute("SELECT * FROM executions ORDER BY id").fetchall() == executions
    record = (
        "SELECT job_id, previous_status, executions_stopped, attempt, database_user, changed_at FROM batch_changes WHERE operation = %s"
    )
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
    assert (answer["skipped"], answer["more"]) == ({"emergency_stopped": 2, "attempts_exhausted": 0}, False)
    assert db.execute(kept, ([late, *others, *stopped],)).fetchall() == before
    assert ids(repair("26 hours")) == [late]


def test_the_first_to_fail_come_first_and_more_says_that_some_are_left(db, make_job, repair):
    jobs = [make_job(status="failed") for _ in range(5)]
    for number, job_id in enumerate(jobs):
        age(db, 100 - number, job_id)

    assert (repair(max_jobs=0)["republished_count"], repair(max_jobs=0)["more"]) == (0, True)
    answers = [repair(max_jobs=2) for _ in range(3)]
    assert [ids(answer) for answer in answers] == [jobs[:2], jobs[2:4], jobs[4:]]
    assert [answer["more"] for answer in answers] == [True, True, False]


@pytest.mark.parametrize(
    "overwritten", [None, "{}", '{"republish_count": 0}', '{"republish_count": -7.5}', '{"republish_count": "x"}', "[1]", "null"]
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


LOCKS = {
    "a locked job": "SELECT FROM jobs WHERE id = %(id)s FOR UPDATE",
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


def test_what_happens_to_jobs_while_a_batch_is_at_work_on_others(connect, db, make_job):
    """A slow batch gets to the second job after it was republished and failed again, to the third after it was stopped."""
    first, third = make_job(status="failed"), make_job(status="failed", running=1)
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

    with in_thread(lambda: slow.execute("SELECT repair_stuck_jobs()").fetchone()[0]) as answer:
        wait_until(lambda: is_waiting(db, slow))
        assert quick.execute("SELECT emergency_stop_job(%s)", (third,)).fetchone()[0]["action"] == "executions_stopped"
        assert ids(quick.execute("SELECT repair_stuck_jobs()").fetchone()[0]) == [second]
        quick.execute("UPDATE jobs SET status = 'failed', metadata = '{}' WHERE id = %s", (second,))
        db.execute("SELECT pg_advisory_unlock(42)")
    assert ids(answer.result) == [first]
    assert db.execute("SELECT max(attempt), count(*) FROM batch_changes WHERE job_id = %s", (second,)).fetchone() == (3, 1)
    assert db.execute("SELECT status FROM jobs WHERE id = %s", (third,)).fetchone() == ("failed",)


def test_the_route(client, make_job, db, capsys):
    job_id = make_job(status="failed")
    age(db, 120, job_id)
    call = {"HTTP_X_ADMIN_TOKEN": TOKEN}

    answer = client("POST", "/admin/repair-stuck-jobs", query="max_age_hours=1", **call)
    assert (answer.status, answer.json["republished_count"]) == (200, 0)
    answer = client("POST", "/admin/repair-stuck-jobs", **call)
    assert (answer.status, ids(answer.json)) == (200, [job_id])
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["outcome"], line["jobs"]) for line in lines] == [
        ("repair_stuck_jobs", "completed", 0),
        ("repair_stuck_jobs", "completed", 1),
    ]


def test_a_table_that_is_locked_is_said_to_be(make_app, connect, make_job):
    make_job(status="failed")
    connect(autocommit=False).execute("LOCK TABLE jobs")

    answer = Client(make_app(lock_timeout="100ms"))("POST", "/admin/repair-stuck-jobs", HTTP_X_ADMIN_TOKEN=TOKEN)
    assert (answer.status, answer.json) == (503, {"error": "tables are locked"})


def test_the_record_is_append_only(db, service, make_job, repair):
    make_job(status="failed")
    repair()
    db.execute("GRANT ALL ON batch_changes TO beacon_service")

    for change in ("UPDATE batch_changes SET changed_by = 'nobody'", "DELETE FROM batch_changes", "TRUNCATE batch_changes"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
            service.execute(change)
