"""sql/31_emergency_stop_blockers.sql and 32_emergency_stop_end_blockers.sql, and what HTTP makes of them: 503, blocked_by, force."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import psutil
import psycopg
import pytest
from conftest import Client, count_active, in_thread, is_waiting, wait_until

import beacon_stop

STOP = "SELECT emergency_stop_job(%s)"


def pids(*sessions: psycopg.Connection) -> list[int]:
    return sorted(session.info.backend_pid for session in sessions)


def is_alive(session: psycopg.Connection) -> bool:
    try:
        session.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


@pytest.fixture
def hold(connect):
    """A session in whose open transaction a statement has run."""

    def hold(statement, *parameters):
        session = connect(autocommit=False)
        session.execute(statement, parameters)
        return session

    return hold


@pytest.fixture
def blockers(service):
    def blockers(job_id):
        return [row[0] for row in service.execute("SELECT pid FROM emergency_stop_blockers(%s)", (job_id,))]

    return blockers


HOLDS = {
    "an open insert": "INSERT INTO executions (job_id) VALUES (%s)",
    "a locked job": "SELECT FROM jobs WHERE id = %s FOR UPDATE",
    "a changed job": "UPDATE jobs SET updated_at = now() WHERE id = %s",
    "a locked execution": "SELECT FROM executions WHERE job_id = %s FOR SHARE",
    "a changed execution": "UPDATE executions SET started_at = now() WHERE job_id = %s",
    "a finished execution": "UPDATE executions SET status = 'completed' WHERE job_id = %s",
    "a locked table": "LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE",
    "another locked table": "LOCK TABLE executions IN SHARE MODE",
    "a stop left open": "SELECT emergency_stop_job(%s)",
}


@pytest.mark.parametrize("name", HOLDS)
def test_exactly_the_one_who_holds_it_up(db, connect, make_job, hold, blockers, name):
    job_id, other = make_job(running=2), make_job(running=1)
    bystander = hold(HOLDS["an open insert"] if "LOCK TABLE" not in HOLDS[name] else "SELECT %s", other)
    holder = hold(HOLDS[name], *([job_id] if "%s" in HOLDS[name] else []))
    holder.execute("SET application_name = 'a worker'")
    stopper = connect(application_name="an operator")
    assert blockers(job_id) == []

    with in_thread(stopper.execute, STOP, (job_id,)):
        # Between two ways to wait there is a moment in which it waits for nobody.
        rows = wait_until(lambda: db.execute("SELECT * FROM emergency_stop_blockers(%s)", (job_id,)).fetchall())
        holder.rollback()
    ((pid, application_name, state, seconds),) = rows
    assert (pid, application_name, state) == (holder.info.backend_pid, "a worker", "idle in transaction")
    assert 0 < seconds < 60
    assert blockers(job_id) == []
    assert is_alive(bystander)


def test_several_at_once_and_none_of_those_who_merely_wait(db, connect, make_job, hold, blockers):
    job_id, other = make_job(running=2), make_job(running=1)
    holders = [hold(HOLDS["an open insert"], job_id) for _ in range(3)]
    hold(HOLDS["an open insert"], other)
    first, second, inserter = connect(), connect(), connect()

    with in_thread(first.execute, STOP, (job_id,)):
        wait_until(lambda: is_waiting(db, first))
        with in_thread(second.execute, STOP, (job_id,)), ExitStack() as refused:
            wait_until(lambda: is_waiting(db, second))
            refused.enter_context(pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState))
            refused.enter_context(in_thread(inserter.execute, HOLDS["an open insert"], (job_id,)))
            wait_until(lambda: is_waiting(db, inserter))
            assert blockers(job_id) == pids(*holders)
            holders.pop().rollback()
            assert blockers(job_id) == pids(*holders)
            for holder in holders:
                holder.rollback()


def test_those_who_queue_for_the_row_before_the_stop_merely_wait(db, connect, make_job, hold, blockers):
    job_id = make_job(running=1)
    holder = hold(HOLDS["a locked job"], job_id)
    workers, stopper = [connect(autocommit=False) for _ in range(3)], connect()
    change = "UPDATE jobs SET updated_at = now() WHERE id = %s"

    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(in_thread(lambda worker=worker: (worker.execute(change, (job_id,)), worker.rollback())))
            wait_until(lambda worker=worker: is_waiting(db, worker))
        stack.enter_context(in_thread(stopper.execute, STOP, (job_id,)))
        wait_until(lambda: is_waiting(db, stopper))
        assert blockers(job_id) == pids(holder)
        holder.rollback()


def test_ending_them_ends_no_others(db, connect, make_job, hold, service):
    job_id, other = make_job(running=2), make_job(running=1)
    holders = [hold(HOLDS["an open insert"], job_id) for _ in range(2)]
    bystanders = [hold(HOLDS["an open insert"], other), hold("SELECT FROM jobs")]
    stopper = connect()

    with in_thread(lambda: stopper.execute(STOP, (job_id,)).fetchone()[0]) as stop:
        wait_until(lambda: is_waiting(db, stopper))
        ended = service.execute("SELECT emergency_stop_end_blockers(%s)", (job_id,)).fetchone()[0]
    assert ended == {"job_id": job_id, "sessions_ended": 2, "not_ended": []}
    assert stop.result["executions_stopped"] == 2
    assert [is_alive(session) for session in holders] == [False, False]
    assert [is_alive(session) for session in bystanders] == [True, True]
    assert service.execute("SELECT emergency_stop_end_blockers(%s)", (job_id,)).fetchone()[0]["sessions_ended"] == 0


@pytest.fixture
def weak_owner(db):
    """The functions belong to a role that may neither see nor end the sessions of others."""
    db.execute("DROP ROLE IF EXISTS beacon_weak_owner")
    db.execute("CREATE ROLE beacon_weak_owner")
    db.execute("GRANT CREATE ON SCHEMA public TO beacon_weak_owner")
    for function in ("emergency_stop_blockers(text)", "emergency_stop_end_blockers(text)"):
        db.execute(f"ALTER FUNCTION {function} OWNER TO beacon_weak_owner")
    yield
    db.execute("ALTER FUNCTION emergency_stop_blockers(text) OWNER TO CURRENT_USER")
    db.execute("ALTER FUNCTION emergency_stop_end_blockers(text) OWNER TO CURRENT_USER")
    db.execute("DROP OWNED BY beacon_weak_owner")
    db.execute("DROP ROLE beacon_weak_owner")


def test_a_session_that_may_not_be_ended_is_named_and_none_is_ended(db, make_job, hold, make_app, weak_owner):
    job_id = make_job(running=1)
    holders = [hold(HOLDS["an open insert"], job_id) for _ in range(2)]
    client = Client(make_app(lock_timeout="400ms"))

    answer = client.stop(job_id, b'{"force": true}')
    assert answer.status == 503
    assert [one["pid"] for one in answer.json["not_ended"]] == pids(*holders)
    assert [one["pid"] for one in answer.json["blocked_by"]] == pids(*holders)
    assert [is_alive(session) for session in holders] == [True, True]
    assert count_active(db, job_id) == 1


# --- Over HTTP ---


@pytest.mark.parametrize("name", HOLDS)
def test_a_locked_job_is_answered_with_who_holds_it_and_nothing_has_changed(make_app, db, make_job, hold, name):
    """After the lock timeout, and a second look of the same length. Naive: it waits for as long as they hold it."""
    client = Client(make_app(lock_timeout="500ms"))
    job_id = make_job(running=2)
    holder = hold(HOLDS[name], *([job_id] if "%s" in HOLDS[name] else []))

    started = time.monotonic()
    answer = client.stop(job_id)
    assert time.monotonic() - started < 6
    assert (answer.status, answer.headers["Retry-After"], list(answer.json)) == (503, "2", ["error", "job_id", "blocked_by"])
    assert (answer.json["error"], answer.json["job_id"]) == ("job is locked", job_id)
    (blocker,) = answer.json["blocked_by"]
    assert list(blocker) == ["pid", "application_name", "state", "transaction_seconds"]
    assert (blocker["pid"], blocker["state"]) == (holder.info.backend_pid, "idle in transaction")
    assert blocker["transaction_seconds"] >= 0.5
    holder.rollback()
    assert count_active(db, job_id) == 2
    assert db.execute("SELECT count(*) FROM emergency_stops").fetchone() == (0,)
    assert client.stop(job_id).json["executions_stopped"] == 2


def test_force_ends_those_who_hold_it_in_whatever_way_and_no_others(client, db, connect, make_job, hold):
    job_id, other = make_job(running=3), make_job(running=1)
    holders = [
        hold(HOLDS["an open insert"], job_id),
        hold("UPDATE executions SET output = '{}' WHERE id = 1"),
        hold("SELECT FROM executions WHERE id = 2 FOR UPDATE"),
        hold(HOLDS["a changed job"], job_id),
    ]
    bystanders = [
        hold(HOLDS["an open insert"], other),
        hold("SELECT FROM executions"),
        hold("SELECT FROM jobs WHERE id = %s FOR KEY SHARE", job_id),
    ]
    waiter = connect()

    with in_thread(waiter.execute, "UPDATE executions SET output = '{}' WHERE id = 2"):
        wait_until(lambda: is_waiting(db, waiter))
        started = time.monotonic()
        answer = client.stop(job_id, b'{"force": true, "reason": "now"}')
        assert time.monotonic() - started < 8
    assert answer.status == 200
    assert list(answer.json)[-2:] == ["reason", "sessions_ended"]
    assert (answer.json["executions_stopped"], answer.json["sessions_ended"]) == (3, 4)
    assert [is_alive(session) for session in holders] == [False] * 4
    assert [is_alive(session) for session in (*bystanders, waiter)] == [True] * 4
    assert count_active(db, job_id) == 0
    assert db.execute("SELECT executions_stopped FROM emergency_stops").fetchall() == [(3,)]


def test_force_spares_transactions_younger_than_the_lock_timeout(make_app, db, connect, make_job, hold):
    """Workers who come and go at the moment of the force are not in the way."""
    client = Client(make_app(lock_timeout="1s"))
    job_id = make_job(running=1)
    old = hold(HOLDS["an open insert"], job_id)
    with ThreadPoolExecutor(1) as executor:
        stop = executor.submit(client.stop, job_id, b'{"force": true}')
        time.sleep(0.9)  # shortly before the first attempt of the stop is given up, when workers get through again
        young = connect(autocommit=False)
        young.execute("SET lock_timeout = 0")
        young.execute(HOLDS["an open insert"], (job_id,))
        time.sleep(0.3)
        young.commit()
        answer = stop.result()
    assert (answer.status, answer.json["sessions_ended"], answer.json["executions_stopped"]) == (200, 1, 2)
    assert not is_alive(old)


def test_force_ends_nobody_once_another_is_in_the_way_or_has_the_session(db, connect, service, make_job, hold):
    """Between the look and the end sessions change, and behind a pooler whose transaction they hold."""
    job_id = make_job(running=1)
    holder = hold(HOLDS["a locked job"], job_id)
    (pid,) = pids(holder)
    stopper = connect()

    def end(*seen: int, seconds: float) -> list[tuple[str]]:
        return service.execute(beacon_stop.END_BLOCKERS, (job_id, list(seen), seconds, job_id)).fetchall()

    with in_thread(stopper.execute, STOP, (job_id,)):
        wait_until(lambda: is_waiting(db, stopper))
        assert end(seconds=0.0) == end(pid + 1, seconds=0.0) == end(pid, seconds=60.0) == []
        assert is_alive(holder)
        assert len(end(pid, seconds=0.001)) == 1
    assert not is_alive(holder)
    assert count_active(db, job_id) == 0


def test_a_session_that_takes_its_time_to_end_is_counted_once(make_app, make_job, hold):
    job_id = make_job(running=2)
    client = Client(make_app(lock_timeout="1s"))
    backend = psutil.Process(hold(HOLDS["a locked job"], job_id).info.backend_pid)

    with in_thread(client.stop, job_id, b'{"force": true}') as stop:
        backend.suspend()
        time.sleep(1.5)  # in the middle of the second attempt
        backend.resume()
    assert (stop.result.status, stop.result.json["sessions_ended"]) == (200, 1)


def test_many_who_force_one_job_leave_connections_to_other_jobs(make_app, make_job, hold):
    job_id, other = make_job(running=1), make_job(running=1)
    client = Client(make_app(lock_timeout="1s", admin_pool=3))
    hold(HOLDS["a locked job"], job_id)

    with ThreadPoolExecutor(8) as executor:
        forced = [executor.submit(client.stop, job_id, b'{"force": true}') for _ in range(8)]
        time.sleep(0.3)
        assert client.stop(other).json["executions_stopped"] == 1
        assert not any(call.done() for call in forced)
    assert {call.result().status for call in forced} == {200}
    assert [call.result().json["sessions_ended"] for call in forced if "sessions_ended" in call.result().json] == [1]


def test_a_locked_audit_is_told_as_any_other_lock(service, db, make_job, hold):
    job_id = make_job(running=1)
    hold("LOCK TABLE emergency_stops")
    service.execute("SET lock_timeout = '200ms'")

    with pytest.raises(psycopg.errors.LockNotAvailable, match=f"job '{job_id}' is locked"):
        service.execute(STOP, (job_id,))
    assert count_active(db, job_id) == 1


def test_force_where_nobody_is_in_the_way_changes_nothing(client, make_job):
    answer = client.stop(make_job(running=1), b'{"force": true}')

    assert answer.status == 200
    assert "sessions_ended" not in answer.json


def test_many_callers_of_a_locked_job_leave_connections_to_other_jobs(client, db, make_job, hold):
    locked, free = make_job(running=1), make_job(running=1)
    holder = hold(HOLDS["a locked job"], locked)

    with ThreadPoolExecutor(20) as executor:
        calls = [executor.submit(client.stop, locked) for _ in range(20)]
        time.sleep(0.2)
        started = time.monotonic()
        assert client.stop(free).status == 200
        assert time.monotonic() - started < 5
        answers = [call.result() for call in calls]
    assert {answer.status for answer in answers} == {503}
    assert [[one["pid"] for one in answer.json["blocked_by"]] for answer in answers] == [pids(holder)] * 20


def test_a_stop_from_psql_gives_up_after_the_sessions_lock_timeout_and_says_so(connect, make_job, hold):
    job_id = make_job(running=1)
    hold(HOLDS["a locked job"], job_id)
    session = connect()
    session.execute("SET lock_timeout = '300ms'")

    with pytest.raises(psycopg.errors.LockNotAvailable) as refused:
        session.execute(STOP, (job_id,))
    assert refused.value.diag.message_primary == f"job '{job_id}' is locked"
    assert "emergency_stop_blockers" in refused.value.diag.message_hint
