"""tests/worker.py, the example of a worker: it misses no stop, drops its work, confirms that, and needs few rights."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

import worker
from conftest import SERVICE_PASSWORD, in_thread, readme_block, url_of, wait_until

STOP = "SELECT emergency_stop_job(%s)"
LISTENS = "SELECT 1 FROM pg_stat_activity WHERE usename = 'a_worker' AND query LIKE 'LISTEN%%'"
END_ALL = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'a_worker'"


def end_all(db: psycopg.Connection) -> None:
    wait_until(lambda: not db.execute(END_ALL).fetchall())  # with a timeout, pg_terminate_backend looks every 100 ms only


@pytest.fixture
def worker_url(db: psycopg.Connection, database: Any, server_url: str) -> Iterator[str]:
    """A role with the rights that sql/README.md gives to workers, and nothing else."""
    create_role, grants = readme_block("sql", "CREATE ROLE workers").split(";", 1)
    with suppress(psycopg.errors.DuplicateObject):  # roles are the server's, and this one may be from an earlier test
        db.execute(create_role)
    db.execute(grants)
    db.execute("DROP ROLE IF EXISTS a_worker")
    db.execute(f"CREATE ROLE a_worker LOGIN PASSWORD '{SERVICE_PASSWORD}' IN ROLE workers")
    yield url_of(database, server_url, user="a_worker", password=SERVICE_PASSWORD)
    end_all(db)
    db.execute("DROP ROLE a_worker")


@pytest.fixture
def start_watch(db, worker_url, monkeypatch) -> Iterator[Callable[..., worker.StopWatch]]:
    """A watch that listens; its thread ends with the test."""
    before = set(threading.enumerate())

    def start_watch(poll_seconds: float = 3600) -> worker.StopWatch:
        watch = worker.StopWatch(worker_url, poll_seconds)
        wait_until(lambda: db.execute(LISTENS).fetchone())
        return watch

    yield start_watch

    def end(*_: Any, **__: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(worker, "psycopg", SimpleNamespace(connect=end, Error=psycopg.Error))
    monkeypatch.setattr(worker, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic))
    threads = set(threading.enumerate()) - before
    end_all(db)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "it would go on in the tests that follow"


def execution_of(db: psycopg.Connection, job_id: str) -> int:
    return db.execute("SELECT min(id) FROM executions WHERE job_id = %s", (job_id,)).fetchone()[0]


def confirmation(db: psycopg.Connection, job_id: str) -> Any:
    return db.execute("SELECT emergency_stop_status(%s) -> 'confirmation'", (job_id,)).fetchone()[0]


pytestmark = pytest.mark.filterwarnings("ignore:(?s).*SystemExit")  # how the watch's thread ends here


def test_a_worker_hears_of_a_stop_in_a_moment(db, make_job, start_watch):
    watch, job_id, other = start_watch(), make_job(running=1), make_job(running=1)

    with watch.job(job_id) as stopped, watch.job(other) as untouched:
        assert not stopped.is_set()
        db.execute(STOP, (job_id,))
        assert stopped.wait(10)
        assert not untouched.is_set()
    assert watch.blocks == {}


def test_a_stop_before_the_block_is_known(db, make_job, start_watch):
    watch, job_id, done = start_watch(), make_job(running=1), []
    db.execute(STOP, (job_id,))

    assert worker.work(watch, job_id, execution_of(db, job_id), [lambda: done.append(1)]) is False
    assert done == []


def test_a_stop_while_it_is_not_connected_is_not_missed(db, make_job, start_watch):
    watch, job_id, other = start_watch(), make_job(running=1), make_job(running=1)

    with watch.job(job_id) as stopped, watch.job(other) as untouched:
        db.execute("ALTER ROLE a_worker CONNECTION LIMIT 0")
        try:
            end_all(db)
            db.execute(STOP, (job_id,))
            time.sleep(0.3)
            assert not stopped.is_set()
        finally:
            db.execute("ALTER ROLE a_worker CONNECTION LIMIT -1")
        assert stopped.wait(10)
        assert not untouched.is_set()


def test_polling_finds_what_no_notification_tells(db, make_job, start_watch):
    watch, job_id = start_watch(poll_seconds=0.2), make_job(running=1)

    with watch.job(job_id) as stopped:
        db.execute("UPDATE jobs SET status = 'cancelled' WHERE id = %s", (job_id,))
        assert stopped.wait(10)


def test_polling_goes_on_beside_a_stream_of_notifications_for_others(db, make_job, start_watch):
    watch, job_id = start_watch(poll_seconds=0.5), make_job(running=1)

    with watch.job(job_id) as stopped:
        db.execute("UPDATE jobs SET status = 'cancelled' WHERE id = %s", (job_id,))
        deadline = time.monotonic() + 10
        while not stopped.wait(0.05) and time.monotonic() < deadline:
            db.execute("""NOTIFY emergency_stop, '{"job_id": "another"}'""")
        assert stopped.is_set()


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "hello",
        "null",
        "[]",
        "7",
        "{}",
        '{"job_id": 7}',
        '{"job_id": ["a"]}',
        '{"job_id": null}',
        "[" * 7_000,
        "NaN",
    ],
)
def test_a_foreign_notification_does_no_harm(db, make_job, start_watch, payload):
    watch, job_id = start_watch(), make_job(running=1)

    with watch.job(job_id) as stopped:
        db.execute("SELECT pg_notify('emergency_stop', %s)", (payload,))
        db.execute(STOP, (job_id,))
        assert stopped.wait(10)


def test_a_notification_is_not_believed(db, make_job, start_watch):
    watch, job_id, other = start_watch(), make_job(running=1), make_job(running=1)

    with watch.job(job_id) as untouched, watch.job(other) as stopped:
        db.execute("SELECT pg_notify('emergency_stop', json_build_object('job_id', %s::text)::text)", (job_id,))
        db.execute(STOP, (other,))
        assert stopped.wait(10)
        assert not untouched.is_set()


def test_two_blocks_on_one_job_are_both_told(db, make_job, start_watch):
    watch, job_id = start_watch(), make_job(running=2)

    with watch.job(job_id) as first:
        with watch.job(job_id) as second, watch.job(job_id):
            pass
        with watch.job(job_id) as third:
            db.execute(STOP, (job_id,))
            assert first.wait(10) and third.wait(10)
    assert not second.is_set(), "it had ended before"
    assert watch.blocks == {}


@pytest.mark.parametrize("status", ["created", "pending", "processing", "queued", "RUNNING", "canceled"])
def test_a_state_of_the_applications_own_is_not_the_end(db, make_job, start_watch, status):
    watch, job_id = start_watch(poll_seconds=0.05), make_job(status=status)
    look, looks = watch.look, []
    watch.look = lambda *asked: (look(*asked), looks.append(asked))

    with watch.job(job_id) as stopped:
        wait_until(lambda: len(looks) > 2)
        assert not stopped.is_set()


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_a_job_that_has_ended_is_the_end(make_job, start_watch, status):
    watch, job_id = start_watch(), make_job(status=status)

    with watch.job(job_id) as stopped:
        assert stopped.is_set()


def test_metadata_that_python_cannot_read_does_no_harm(db, make_job, start_watch):
    watch, job_id = start_watch(poll_seconds=0.05), make_job(running=1)
    db.execute("UPDATE jobs SET metadata = (repeat('[', 3000) || repeat(']', 3000))::jsonb WHERE id = %s", (job_id,))

    with watch.job(job_id) as stopped:
        assert not stopped.wait(0.3)
        db.execute(STOP, (job_id,))
        assert stopped.wait(10)


def test_a_job_that_is_gone_is_the_end(start_watch):
    with start_watch().job("never heard of") as stopped:
        assert stopped.is_set()


def test_what_it_drops_it_confirms(db, make_job, start_watch):
    watch, job_id, done = start_watch(), make_job(), []
    db.execute("INSERT INTO executions (job_id, status, started_at) VALUES (%s, 'running', now())", (job_id,))
    steps = [
        lambda: done.append(1),
        lambda: db.execute(STOP, (job_id,)),
        lambda: wait_until(lambda: all(event.is_set() for event in watch.blocks[job_id])),
        lambda: done.append(2),
    ]

    assert worker.work(watch, job_id, execution_of(db, job_id), steps) is False
    assert done == [1]
    assert confirmation(db, job_id) == {"in_hand": 1, "confirmed": 1, "outstanding": []}


def test_a_report_that_is_refused_after_a_stop_and_a_release_is_dropped_and_confirmed(db, make_job, start_watch):
    watch, job_id = start_watch(), make_job()
    db.execute("INSERT INTO executions (job_id, status, started_at) VALUES (%s, 'running', now())", (job_id,))
    execution_id = execution_of(db, job_id)

    def report() -> None:
        with watch.lock:  # it hears of the stop no sooner than that
            db.execute(STOP, (job_id,))
            db.execute("SELECT release_job(%s, 'go on', 'pending')", (job_id,))
            db.execute("UPDATE executions SET status = 'completed' WHERE id = %s", (execution_id,))

    assert worker.work(watch, job_id, execution_id, [report]) is False
    query = "SELECT status, output ? 'confirmed_at' FROM executions WHERE id = %s"
    assert db.execute(query, (execution_id,)).fetchone() == ("failed", True)


def test_another_error_of_the_same_class_is_not_taken_for_a_stop(db, connect, make_job, start_watch):
    watch, job_id = start_watch(), make_job(running=1)

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        worker.work(watch, job_id, execution_of(db, job_id), [lambda: connect().execute("SELECT lastval()")])


def test_work_that_nobody_stops_is_done(db, make_job, start_watch):
    watch, job_id, done = start_watch(), make_job(running=1), []

    assert worker.work(watch, job_id, execution_of(db, job_id), [lambda: done.append(1), lambda: done.append(2)]) is True
    assert done == [1, 2]


def test_a_confirmation_waits_for_the_database(db, make_job, start_watch):
    watch, job_id = start_watch(poll_seconds=0.2), make_job()
    db.execute("INSERT INTO executions (job_id, status, started_at) VALUES (%s, 'running', now())", (job_id,))
    db.execute(STOP, (job_id,))
    db.execute("ALTER ROLE a_worker CONNECTION LIMIT 0")
    try:
        end_all(db)
        assert watch.confirm(execution_of(db, job_id)) is False
    finally:
        db.execute("ALTER ROLE a_worker CONNECTION LIMIT -1")

    wait_until(lambda: confirmation(db, job_id)["confirmed"] == 1)
    wait_until(lambda: watch.unconfirmed == [])


def test_a_worker_may_do_nothing_else(db, connect, worker_url):
    session = connect(worker_url)
    for statement in (
        "SELECT emergency_stop_job('a')",
        "SELECT release_job('a', 'b', 'pending')",
        "SELECT emergency_stop_status('a')",
        "SELECT * FROM list_executions('a')",
        "SELECT timeout_stuck_jobs()",
        "SELECT FROM jobs",
        "SELECT FROM executions",
        "SELECT FROM emergency_stops",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute(statement)


def test_many_threads_share_a_watch(db, make_job, start_watch):
    watch, jobs = start_watch(), [make_job(running=1) for _ in range(10)]
    told = []

    def wait_for_the_end(job_id: str) -> None:
        with watch.job(job_id) as stopped:
            told.append(stopped.wait(20))

    with (
        in_thread(lambda: [wait_for_the_end(job_id) for job_id in jobs]),
        in_thread(lambda: [wait_for_the_end(job_id) for job_id in jobs]),
    ):
        for job_id in jobs:
            db.execute(STOP, (job_id,))
    assert told == [True] * 20
