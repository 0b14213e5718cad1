"""sql/33_emergency_stop_dry_run.sql: it says what a stop would do, and nothing of it stays."""

import json
import re
import threading

import psycopg
import pytest

from conftest import change_function, count_active, in_thread, wait_until

DRY_RUN = "SELECT emergency_stop_dry_run(%s)"
HAS_LOCKS = "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = %s AND locktype <> 'virtualxid')"
TABLES = """
    SELECT (SELECT array_agg(j) FROM jobs j), (SELECT array_agg(e ORDER BY e.id) FROM executions e),
        (SELECT count(*) FROM emergency_stops)"""


@pytest.fixture
def dry_run(service):
    def dry_run(id):
        return service.execute(DRY_RUN, (id,)).fetchone()[0]

    return dry_run


def test_it_answers_what_the_stop_then_answers(make_job, dry_run, stop):
    job_id = make_job(pending=2, running=3, completed=4)

    rehearsed = dry_run(job_id)
    stopped = stop(job_id)
    assert list(rehearsed) == [*stopped, "dry_run", "took_ms"]
    assert rehearsed["dry_run"] is True
    assert 0 < rehearsed["took_ms"] < 20_000
    assert {key: rehearsed[key] for key in stopped if key != "stopped_at"} == {key: stopped[key] for key in stopped if key != "stopped_at"}
    assert rehearsed["executions_stopped"] == 5


def test_it_leaves_nothing_behind(db, make_job, connect, service_url, service, dry_run):
    job_id = make_job(metadata={"owner": "me"}, pending=2, running=3, queued=1)
    listener = connect()
    listener.execute("LISTEN emergency_stop")
    service.execute("SET lock_timeout = '3s'")
    service.execute("SET synchronous_commit = off")
    before = db.execute(TABLES).fetchone()

    assert dry_run(job_id)["left_alone"] == {"queued": 1}
    assert db.execute(TABLES).fetchone() == before
    assert not db.execute(HAS_LOCKS, (service.info.backend_pid,)).fetchone()[0]
    assert service.execute("SHOW lock_timeout").fetchone() == ("3s",)
    assert service.execute("SHOW synchronous_commit").fetchone() == ("off",)
    db.execute("NOTIFY emergency_stop, 'the last'")
    assert [notice.payload for notice in listener.notifies(timeout=5, stop_after=1)] == ["the last"]


def test_it_tells_tenths_of_milliseconds(make_job, service):
    (answer,) = service.execute("SELECT emergency_stop_dry_run(%s)::text", (make_job(running=1),)).fetchone()

    assert re.search(r', "dry_run": true, "took_ms": \d+\.\d}$', answer)


def test_the_lock_timeout_of_the_transaction_and_of_the_session_stay_as_they_are(make_job, service, dry_run):
    service.execute("SET lock_timeout = '3s'")

    with service.transaction():
        service.execute("SET LOCAL lock_timeout = '5s'")
        dry_run(make_job(running=1))
        assert service.execute("SHOW lock_timeout").fetchone() == ("5s",)
    assert service.execute("SHOW lock_timeout").fetchone() == ("3s",)


def test_in_a_transaction_it_gives_back_its_locks_at_once(db, connect, service_url, make_job):
    job_id = make_job(running=3)
    operator = connect(service_url, autocommit=False)

    operator.execute(DRY_RUN, (job_id,))
    db.execute("SET lock_timeout = '100ms'")
    db.execute("INSERT INTO executions (job_id, status) VALUES (%s, 'running')", (job_id,))
    db.execute("UPDATE executions SET status = 'completed' WHERE job_id = %s", (job_id,))
    db.execute("UPDATE jobs SET status = 'completed' WHERE id = %s", (job_id,))


def test_of_a_job_that_has_ended_it_says_so(make_job, dry_run, stop):
    ended = make_job(status="completed")
    stopped = make_job(running=1)
    stop(stopped)

    for job_id, status in ((ended, "completed"), (stopped, "failed")):
        answer = dry_run(job_id)
        assert (answer["status"], answer["action"], answer["dry_run"]) == (status, "none", True)


def test_an_unknown_job_is_not_found(dry_run):
    assert dry_run("unknown") == {"error": "job not found", "job_id": "unknown"}


def test_a_locked_job_is_named_with_its_holders_of_whom_none_is_ended(make_job, connect, service, dry_run):
    job_id = make_job(running=3)
    worker = connect(autocommit=False, application_name="a worker")
    worker.execute("UPDATE executions SET started_at = now() WHERE job_id = %s", (job_id,))
    service.execute("SET lock_timeout = '100ms'")

    with pytest.raises(psycopg.errors.LockNotAvailable, match="is locked") as error:
        dry_run(job_id)
    (holder,) = json.loads(error.value.diag.message_detail)
    assert (holder["pid"], holder["application_name"]) == (worker.info.backend_pid, "a worker")
    worker.commit()
    assert dry_run(job_id)["executions_stopped"] == 3


def test_who_locks_the_whole_table_of_executions_is_named(make_job, connect, service, dry_run):
    """Before, the count of the executions met the lock and named nobody."""
    job_id, session = make_job(running=3), connect(autocommit=False)
    session.execute("LOCK TABLE executions IN ACCESS EXCLUSIVE MODE")
    service.execute("SET lock_timeout = '100ms'")

    with pytest.raises(psycopg.errors.LockNotAvailable, match="is locked") as error:
        dry_run(job_id)
    assert [each["pid"] for each in json.loads(error.value.diag.message_detail)] == [session.info.backend_pid]


def test_where_there_is_no_lock_timeout_it_does_not_count_for_ever(db, make_job, connect, service, dry_run):
    job_id, session = make_job(running=3), connect(autocommit=False)
    session.execute("LOCK TABLE executions IN ACCESS EXCLUSIVE MODE")
    change_function(db, "emergency_stop_job", "'10s'", "'100ms'")
    service.execute("SET statement_timeout = '5s'")

    with pytest.raises(psycopg.errors.LockNotAvailable, match="is locked"):
        dry_run(job_id)


def test_beyond_ten_thousand_active_executions_it_is_refused(db, make_job, dry_run):
    job_id = make_job(pending=10_000, completed=5)

    assert dry_run(job_id)["executions_stopped"] == 10_000
    db.execute("INSERT INTO executions (job_id, status) VALUES (%s, 'running')", (job_id,))
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="more than 10000 active executions"):
        dry_run(job_id)


def test_what_would_make_the_stop_fail_makes_it_fail(db, make_job, dry_run):
    """A constraint trigger that is deferred runs at the commit, which a dry run does not reach."""
    db.execute("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN RAISE check_violation USING MESSAGE = 'never'; END $$;
        CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON jobs DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION refuse()""")
    job_id = make_job(running=1)

    with pytest.raises(psycopg.errors.CheckViolation, match="never"):
        dry_run(job_id)


def test_in_a_read_only_transaction_it_is_refused(make_job, service):
    job_id = make_job(running=1)
    service.execute("SET default_transaction_read_only = on")

    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        service.execute(DRY_RUN, (job_id,))


def test_beside_a_flood_the_workers_go_on(db, make_job, connect, dry_run):
    job_id = make_job(running=3)
    added, over = [], threading.Event()

    def worker(session):
        while not over.is_set():
            try:
                session.execute("INSERT INTO executions (job_id, status) VALUES (%s, 'running')", (job_id,))
                added.append(1)
            except psycopg.errors.SerializationFailure:  # a stop is under way: try again
                pass

    with in_thread(worker, connect()), in_thread(worker, connect()), in_thread(worker, connect()):
        try:
            for _ in range(10):
                before = len(added)
                assert dry_run(job_id)["executions_stopped"] >= 3
                wait_until(lambda before=before: len(added) > before)
        finally:
            over.set()
    assert db.execute("SELECT count(*) FROM executions WHERE status = 'running'").fetchone() == (3 + len(added),)


def test_a_hundred_beside_stops_of_the_same_jobs_keep_none_from_being_stopped(db, make_job, connect, service_url, stop):
    jobs = [make_job(running=5) for _ in range(50)]
    operators = [connect(service_url), connect(service_url)]
    rehearsed = []

    def rehearse(session):
        for job_id in jobs:
            rehearsed.append(session.execute(DRY_RUN, (job_id,)).fetchone()[0])

    with in_thread(rehearse, operators[0]), in_thread(rehearse, operators[1]):
        stopped = [stop(job_id) for job_id in jobs]
    assert {answer["message"] for answer in stopped} == {"Job emergency stopped"}
    assert len(rehearsed) == 100
    assert all(answer.get("executions_stopped", 5) == 5 or answer["action"] == "none" for answer in rehearsed)
    assert db.execute("SELECT count(*) FROM emergency_stops").fetchone() == (50,)


def test_the_ten_thousand_are_those_of_the_job_alone_in_whatever_active_state(db, make_job, dry_run):
    """They are counted before anything is done: the trigger of the large job does not fire."""
    large, small = make_job("large", pending=4_000, running=4_000, processing=2_001), make_job(running=1)
    db.execute("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE feature_not_supported; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW WHEN (NEW.id = 'large') EXECUTE FUNCTION refuse()""")

    with pytest.raises(psycopg.errors.InvalidParameterValue, match="more than 10000 active executions"):
        dry_run(large)
    assert dry_run(small)["executions_stopped"] == 1


def test_it_is_also_refused_if_the_executions_could_not_be_counted_before(db, make_job, dry_run):
    """As beside a locked table: then only the stop that is rolled back counts them."""
    job_id = make_job(running=10_001)
    change_function(db, "emergency_stop_dry_run", "OFFSET 10000", "OFFSET 20000")

    with pytest.raises(psycopg.errors.InvalidParameterValue, match="more than 10000"):
        dry_run(job_id)
    assert count_active(db, job_id) == 10_001
