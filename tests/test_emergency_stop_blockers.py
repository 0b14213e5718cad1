"""sql/31_emergency_stop_blockers.sql: who holds a job, at any time; what the stop says of them, and how it ends them."""

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import beacon_stop
import psutil
import psycopg
import pytest

from conftest import (
    TOKEN,
    Client,
    change_function,
    count_active,
    hold_stops,
    in_thread,
    is_waiting,
    let_stops_go,
    log_lines,
    new_database,
    stops_are_held,
    wait_until,
)
from processes import suspended

STOP = "SELECT emergency_stop_job(%s)"
FORCE = "SELECT emergency_stop_job(%s, force => true)"
KEYS = ["pid", "application_name", "database_user", "state", "transaction_seconds", "query"]


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


@pytest.fixture
def locked(service):
    """The holders that a stop names, which is refused after its lock timeout; the whole DETAIL where that is no list."""

    def locked(job_id, stop=STOP):
        with pytest.raises(psycopg.errors.LockNotAvailable, match=f"job '{job_id}' is locked") as refused:
            service.execute(stop, (job_id,))
        locked.hint = refused.value.diag.message_hint
        return json.loads(refused.value.diag.message_detail)

    service.execute("SET lock_timeout = '200ms'")
    return locked


HOLDS = {
    "an open insert": "INSERT INTO executions (job_id) VALUES (%s)",
    "a locked job": "SELECT FROM jobs WHERE id = %s FOR UPDATE",
    "a shared job": "SELECT FROM jobs WHERE id = %s FOR SHARE",
    "a changed job": "UPDATE jobs SET updated_at = now() WHERE id = %s",
    "a locked execution": "SELECT FROM executions WHERE job_id = %s FOR SHARE",
    "a changed execution": "UPDATE executions SET started_at = now() WHERE job_id = %s",
    "a finished execution": "UPDATE executions SET status = 'completed' WHERE job_id = %s",
    "a change in a part of the transaction": "SAVEPOINT s; UPDATE executions SET started_at = now(); SAVEPOINT t; RELEASE s",
    "a locked table": "LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE",
    "another locked table": "LOCK TABLE executions IN SHARE MODE",
    "the locked record": "LOCK TABLE emergency_stops IN SHARE MODE",
    "a stop left open": "SELECT emergency_stop_job(%s)",
    "a batch left open": "UPDATE jobs SET created_at = now() - interval '1 day', updated_at = now() - interval '1 day';"
    " UPDATE executions SET created_at = now() - interval '1 day'; SELECT timeout_stuck_jobs()",
    "a release left open": "SELECT release_job(%s, 'on purpose', 'pending')",
}


NOT_BESIDE_OTHERS = ["a locked table", "another locked table", "a change in a part of the transaction", "a batch left open"]
NOT_BESIDE_KEY_SHARE = ["a locked table", "a locked job"]


def take(hold, name, job_id, stop):
    if name == "a release left open":
        stop(job_id)
    return hold(HOLDS[name], *([job_id] if "%s" in HOLDS[name] else []))


@pytest.mark.parametrize("name", HOLDS)
def test_exactly_the_one_who_holds_it_without_any_stop_that_waits(db, make_job, hold, blockers, stop, name):
    """Version 1.0 answered only while a stop was waiting."""
    job_id, other = make_job(running=2), make_job(running=1)
    if name not in NOT_BESIDE_OTHERS:
        hold("SELECT FROM jobs WHERE id = %s FOR UPDATE", other)
    if name not in NOT_BESIDE_KEY_SHARE:
        hold("SELECT FROM jobs WHERE id = %s FOR KEY SHARE", job_id)
    holder = take(hold, name, job_id, stop)
    holder.execute("SET application_name = 'a worker'")

    ((pid, application_name, user, state, seconds, query),) = db.execute("SELECT * FROM emergency_stop_blockers(%s)", (job_id,)).fetchall()
    assert (pid, application_name, state) == (holder.info.backend_pid, "a worker", "idle in transaction")
    assert (user, query) == (db.info.user, "SET application_name = 'a worker'")
    assert 0 <= seconds < 60
    holder.rollback()
    assert blockers(job_id) == []  # though the bystanders still hold what they have


@pytest.mark.parametrize("name", HOLDS)
def test_a_locked_job_is_told_who_holds_it_after_one_lock_timeout_and_nothing_has_changed(db, make_job, hold, locked, stop, name):
    job_id = make_job(running=2)
    holder = take(hold, name, job_id, stop)
    records = db.execute("SELECT count(*) FROM emergency_stops").fetchone()

    started = time.monotonic()
    (blocker,) = locked(job_id)
    assert 0.15 < time.monotonic() - started < 1.3
    assert list(blocker) == KEYS
    assert (blocker["pid"], blocker["state"], blocker["query"]) == (
        holder.info.backend_pid,
        "idle in transaction",
        HOLDS[name].replace("%s", "$1"),
    )
    assert blocker["transaction_seconds"] >= 0.2
    assert "force => true" in locked.hint
    holder.rollback()
    assert db.execute("SELECT count(*) FROM emergency_stops").fetchone() == records


def test_it_changes_nothing_and_holds_nothing(db, service, make_job, hold):
    job_id = make_job(running=3)
    hold(HOLDS["a changed execution"], job_id)
    before = db.execute("SELECT j.*, e.* FROM jobs j JOIN executions e ON e.job_id = j.id ORDER BY e.id").fetchall()

    with service.transaction():
        assert len(service.execute("SELECT * FROM emergency_stop_blockers(%s)", (job_id,)).fetchall()) == 1
        db.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE NOWAIT", (job_id,))
    assert db.execute("SELECT j.*, e.* FROM jobs j JOIN executions e ON e.job_id = j.id ORDER BY e.id").fetchall() == before


def test_40_workers_that_hold_one_row_each_are_all_named_after_one_lock_timeout_and_ended_within_two(db, hold, make_job, locked, service):
    """Version 1.0 named one of them after 4 s, and force took 15 s."""
    job_id = make_job(running=60)
    take_one = "SELECT FROM executions WHERE job_id = %s AND status = 'running' LIMIT 1 FOR UPDATE SKIP LOCKED"
    workers = [hold(take_one, job_id) for _ in range(40)]

    assert [one["pid"] for one in locked(job_id)] == pids(*workers)
    answer = service.execute(FORCE, (job_id,)).fetchone()[0]
    assert (answer["executions_stopped"], answer["sessions_ended"]) == (60, 40)
    assert db.execute("SELECT sessions_ended FROM emergency_stops").fetchall() == [(40,)]
    assert [is_alive(worker) for worker in workers] == [False] * 40


def test_who_came_while_the_stop_waited_is_named_as_well_and_not_ended(db, make_job, hold, locked, service):
    job_id = make_job(running=1)
    service.execute("SET lock_timeout = '600ms'")
    early = hold("SELECT FROM jobs WHERE id = %s FOR UPDATE", job_id)

    with in_thread(lambda: locked(job_id)) as named:
        wait_until(lambda: is_waiting(db, service))
        late = hold("SELECT FROM executions WHERE job_id = %s FOR UPDATE", job_id)
    assert [one["pid"] for one in named.result] == pids(early, late)
    assert "those who have held it all that time" in locked.hint
    late.rollback()

    with in_thread(lambda: service.execute(FORCE, (job_id,)).fetchone()[0]) as stop:
        wait_until(lambda: is_waiting(db, service))
        late.execute("SELECT FROM executions WHERE job_id = %s FOR UPDATE", (job_id,))
        wait_until(lambda: not is_alive(early))
        late.rollback()
    assert (stop.result["sessions_ended"], is_alive(late)) == (1, True)


def test_of_several_who_may_hold_a_row_only_those_who_have_for_long_enough_count(db, connect, make_job, hold, service):
    """A row that was locked in a part of a transaction, which is over, does not tell whose it is."""
    job_id, _ = make_job(running=1), make_job(running=2)
    service.execute("SET lock_timeout = '500ms'")
    holder = hold("SELECT FROM executions WHERE id = 3 FOR UPDATE; SAVEPOINT s")
    holder.execute("UPDATE executions SET output = '{}' WHERE job_id = %s", (job_id,))
    holder.execute("RELEASE s")

    with in_thread(lambda: service.execute(FORCE, (job_id,)).fetchone()[0]) as stop:
        wait_until(lambda: is_waiting(db, service))
        younger = hold("UPDATE executions SET output = '{}' WHERE id = 2")
    assert stop.result["sessions_ended"] == 1
    assert (is_alive(holder), is_alive(younger)) == (False, True)


@pytest.mark.parametrize(("hold_it", "is_ended"), [("pg_advisory_xact_lock_shared", False), ("pg_advisory_lock_shared", True)])
def test_a_transaction_that_began_between_the_looks_at_sessions_and_at_locks_is_not_of_unknown_age(
    db, connect, make_job, service, hold_it, is_ended
):
    """Its session still looked idle, without a transaction: force ended it as one whose age nobody knows."""
    job_id = make_job(running=1)
    holder = connect(autocommit=False)
    holder.execute(f"SELECT {hold_it}(job_barrier(%s))", (job_id,))
    if is_ended:
        holder.commit()  # it keeps that lock
    change_function(db, "holders_of_job", "p.since, a.xact_start,", "p.since,")
    change_function(db, "holders_of_job", "'idle', 'active'", "'idle', 'active', 'idle in transaction'")

    service.execute("SET lock_timeout = '100ms'")
    if is_ended:
        assert service.execute(FORCE, (job_id,)).fetchone()[0]["sessions_ended"] == 1
    else:
        with pytest.raises(psycopg.errors.LockNotAvailable) as refused:
            service.execute(FORCE, (job_id,))
        assert "None of them has held it for that long" in refused.value.diag.message_hint
    assert is_alive(holder) is not is_ended


def test_a_stranger_is_not_ended_for_one_who_took_the_row_while_the_stop_waited(db, make_job, hold, locked, service):
    """Of those who may hold the row only the stranger had begun before: he was taken for the holder for certain."""
    job_id, other_id = make_job(running=1), make_job(running=1)
    stranger = hold("UPDATE jobs SET updated_at = now() WHERE id = %s", other_id)
    first = hold("SELECT FROM executions WHERE job_id = %s FOR UPDATE", job_id)
    service.execute("SET lock_timeout = '600ms'")

    with in_thread(lambda: locked(job_id, FORCE)) as stop:
        wait_until(lambda: is_waiting(db, service))
        later = hold("SAVEPOINT s")
        later.execute("UPDATE jobs SET updated_at = now() WHERE id = %s", (job_id,))
        later.execute("RELEASE s")
        first.rollback()
    assert later.info.backend_pid in {one["pid"] for one in stop.result["blocked_by"]}
    assert (is_alive(stranger), is_alive(later)) == (True, True)


def test_where_several_may_hold_a_row_all_are_named_and_none_is_ended(make_job, hold, locked):
    job_id, other_id = make_job(running=1), make_job(running=1)
    bystander = hold("UPDATE executions SET output = '{}' WHERE job_id = %s", other_id)
    holder = hold("SELECT pg_current_xact_id(); SAVEPOINT s")
    holder.execute("UPDATE executions SET output = '{}' WHERE job_id = %s", (job_id,))
    holder.execute("RELEASE s")

    detail = locked(job_id, FORCE)
    assert [one["pid"] for one in detail["not_ended"]] == pids(holder, bystander)
    assert (is_alive(holder), is_alive(bystander)) == (True, True)


def test_sharers_of_one_row_are_all_named(make_job, hold, locked):
    job_id = make_job(running=1)
    workers = [hold(HOLDS["a locked execution"], job_id) for _ in range(3)]
    hold("SELECT FROM executions WHERE job_id = %s FOR KEY SHARE", job_id)

    assert [one["pid"] for one in locked(job_id)] == pids(*workers)


def test_a_session_without_a_transaction_that_holds_the_barrier_is_named_and_ended(db, connect, make_job, locked, service):
    """Version 1.0 answered 503, named nobody, and force did nothing."""
    job_id = make_job(running=1)
    session = connect()
    session.execute("SELECT pg_advisory_lock(job_barrier(%s))", (job_id,))

    (blocker,) = locked(job_id)
    assert (blocker["pid"], blocker["state"], blocker["transaction_seconds"]) == (session.info.backend_pid, "idle", None)
    assert service.execute(FORCE, (job_id,)).fetchone()[0]["sessions_ended"] == 1
    assert not is_alive(session)


def test_a_prepared_transaction_is_named_by_its_gid_and_ends_nobody(db, make_job, hold, locked, service):
    job_id = make_job(running=2)
    bystander = hold("SELECT FROM executions")
    worker = hold(HOLDS["a changed execution"], job_id)
    worker.execute("PREPARE TRANSACTION 'left over'")
    worker.execute("COMMIT")
    try:
        for stop in (STOP, FORCE):
            detail = locked(job_id, stop)
            (blocker,) = detail["not_ended"] if stop == FORCE else detail
            assert (blocker["pid"], blocker["application_name"], blocker["state"]) == (0, "left over", "prepared transaction")
            assert blocker["transaction_seconds"] >= 0.2
            assert "ROLLBACK PREPARED" in locked.hint  # also before force was tried
        assert [is_alive(session) for session in (bystander, worker)] == [True, True]
        assert count_active(db, job_id) == 2
    finally:
        db.execute("ROLLBACK PREPARED 'left over'")
    assert service.execute(STOP, (job_id,)).fetchone()[0]["executions_stopped"] == 2


def test_those_who_merely_wait_are_not_named(db, connect, make_job, hold, blockers):
    job_id = make_job(running=2)
    holder = hold(HOLDS["a locked job"], job_id)
    first, second, worker = connect(), connect(), connect()

    with ExitStack() as stack:
        for session, statement in (
            (worker, "UPDATE jobs SET updated_at = now() WHERE id = %s"), (first, STOP), (second, STOP),
        ):  # fmt: skip
            stack.enter_context(in_thread(session.execute, statement, (job_id,)))
            wait_until(lambda session=session: is_waiting(db, session))
        assert blockers(job_id) == pids(holder)
        holder.rollback()


def test_who_waits_for_a_whole_table_is_in_the_way_as_well(db, connect, make_job, hold, blockers):
    job_id = make_job(running=1)
    reader, changer = hold("SELECT FROM jobs"), connect()

    with in_thread(changer.execute, "ALTER TABLE jobs ADD note text"):
        wait_until(lambda: is_waiting(db, changer))
        assert blockers(job_id) == pids(changer)
        reader.rollback()


def test_a_lock_with_the_same_key_in_another_database_is_none(server_url, make_job, blockers, db):
    """A database that was cloned from the same template has the same keys. Force could have ended sessions of the other one."""
    job_id = make_job(running=1)
    (key,) = db.execute("SELECT job_barrier(%s)", (job_id,)).fetchone()

    with psycopg.connect(server_url, dbname="postgres") as elsewhere:
        elsewhere.execute("SELECT pg_advisory_xact_lock_shared(%s)", (key,))
        assert blockers(job_id) == []


def test_force_ends_those_who_hold_it_in_whatever_way_and_no_others(service, db, connect, make_job, hold):
    job_id, other = make_job(running=3), make_job(running=1)
    service.execute("SET lock_timeout = '500ms'")
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
        connect(),
    ]
    waiter = connect()

    notices: list[str | None] = []
    service.add_notice_handler(lambda notice: notices.append(notice.message_primary))

    with in_thread(waiter.execute, "UPDATE executions SET output = '{}' WHERE id = 2"):
        wait_until(lambda: is_waiting(db, waiter))
        answer = service.execute("SELECT emergency_stop_job(%s, 'now', true)", (job_id,)).fetchone()[0]
    assert notices == []
    assert list(answer)[-2:] == ["reason", "sessions_ended"]
    assert (answer["executions_stopped"], answer["sessions_ended"]) == (3, 4)
    assert [is_alive(session) for session in holders] == [False] * 4
    assert [is_alive(session) for session in (*bystanders, waiter)] == [True] * 5
    assert count_active(db, job_id) == 0
    assert db.execute("SELECT executions_stopped, sessions_ended FROM emergency_stops").fetchall() == [(3, 4)]


def test_force_spares_transactions_younger_than_the_lock_timeout(service, db, connect, make_job, hold):
    """It has not held up the stop for that long. The one who has is ended, and then the stop waits for the other one."""
    job_id = make_job(running=2)
    old = hold("UPDATE executions SET output = '{}' WHERE id = 1")
    young = connect(autocommit=False)
    young.execute("SET lock_timeout = 0")
    young.commit()
    service.execute("SET lock_timeout = '1500ms'")

    with in_thread(lambda: service.execute(FORCE, (job_id,)).fetchone()[0]) as stop:
        wait_until(lambda: is_waiting(db, service))
        wait_until(lambda: try_to_take(young), 1.5)
        wait_until(lambda: not is_alive(old))
        young.commit()
    assert (stop.result["sessions_ended"], stop.result["executions_stopped"]) == (1, 2)


def test_a_stop_that_has_ended_sessions_in_vain_says_so(make_app, capsys, db, connect, make_job, hold):
    """It had said that nothing was changed, and nobody ever knew who had ended the session."""
    young = connect(autocommit=False)
    young.execute("SET lock_timeout = 0")
    young.commit()
    client = Client(make_app(lock_timeout="1s"))

    half_way = "SELECT FROM pg_stat_activity WHERE query LIKE %s AND xact_start < clock_timestamp() - interval '500 ms'"
    for number in range(5):  # on a busy machine the young one may miss each moment, and the stop goes through
        job_id = make_job(running=2)
        old = hold("UPDATE executions SET output = '{}' WHERE id = %s", 2 * number + 1)
        with in_thread(client.stop, job_id, b'{"force": true}') as stop:
            wait_until(lambda: db.execute(half_way, ("SELECT emergency_stop_job(%",)).fetchall())
            wait_until(lambda taken=2 * number + 2: try_to_take(young, taken), 2)
        if stop.result.status == 503:
            break
    assert (is_alive(old), is_alive(young)) == (False, True)
    assert stop.result.status == 503
    assert list(stop.result.json) == ["error", "job_id", "blocked_by", "sessions_ended", "hint"]
    assert [one["pid"] for one in stop.result.json["blocked_by"]] == pids(young)
    assert stop.result.json["sessions_ended"] == log_lines(capsys)[-1]["sessions_ended"] == 1
    assert "Sessions were ended: 1. Nothing else was changed." in stop.result.json["hint"]
    (several,) = db.execute("SELECT summary FROM emergency_stop_jobs(%s)", ([job_id],)).fetchone()
    assert list(several) == ["error", "job_id", "blocked_by"]
    db.execute("ALTER FUNCTION emergency_stop_job(text, text, boolean, jsonb) RENAME TO original")
    db.execute("""
        CREATE FUNCTION emergency_stop_job(id text, reason text, force boolean, caller jsonb) RETURNS json LANGUAGE plpgsql AS
        $$ BEGIN PERFORM end_or_name_holders(id, '1s', false, NULL, 3); END $$""")
    (several,) = db.execute("SELECT summary FROM emergency_stop_jobs(%s)", ([job_id],)).fetchone()
    assert (list(several), several["sessions_ended"]) == (["error", "job_id", "blocked_by", "sessions_ended"], 3)


def test_a_session_that_does_not_end_is_not_counted_as_ended(db, make_job, hold, service):
    job_id = make_job(running=1)
    holder = hold("UPDATE executions SET output = '{}'")
    service.execute("SET lock_timeout = '200ms'")

    with suspended(psutil.Process(holder.info.backend_pid)):
        with pytest.raises(psycopg.errors.LockNotAvailable) as locked:
            service.execute(FORCE, (job_id,))
        assert [one["pid"] for one in json.loads(locked.value.diag.message_detail)] == pids(holder)
        assert "These have not ended yet, or came after them" in locked.value.diag.message_hint
        assert locked.value.diag.message_hint.endswith("Nothing was changed.")


def test_what_a_trigger_of_the_record_waits_for_is_told(db, make_job, connect, service):
    job_id = make_job(running=1)
    db.execute("""
        CREATE TABLE ledger ();
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO ledger DEFAULT VALUES;
            RETURN NEW;
        END $$;
        CREATE TRIGGER note AFTER INSERT ON emergency_stops FOR EACH ROW EXECUTE FUNCTION note()""")
    other = connect(autocommit=False)
    other.execute("LOCK TABLE ledger IN EXCLUSIVE MODE")
    service.execute("SET lock_timeout = '200ms'")

    with pytest.raises(psycopg.errors.LockNotAvailable, match=r"could not be stopped in 00:00:00\.2: canceling") as locked:
        service.execute(STOP, (job_id,))
    assert "Look at what the triggers of jobs, executions and emergency_stops wait for" in locked.value.diag.message_hint


def test_that_sessions_were_ended_for_a_job_that_had_ended_by_itself_is_recorded(db, make_job, hold, service):
    job_id = make_job(status="completed", completed=1)
    holder = hold("UPDATE jobs SET updated_at = now() WHERE id = %s", job_id)
    service.execute("SET lock_timeout = '200ms'")

    answer = service.execute("SELECT emergency_stop_job(%s, force => true, reason => 'why')", (job_id,)).fetchone()[0]
    assert (answer["action"], answer["sessions_ended"], is_alive(holder)) == ("none", 1, False)
    recorded = "SELECT action, previous_status, new_status, executions_stopped, sessions_ended, reason FROM emergency_stops"
    assert db.execute(recorded).fetchall() == [("stop", "completed", "completed", 0, 1, "why")]
    assert db.execute("SELECT status, metadata FROM jobs").fetchall() == [("completed", None)]


def test_transactions_that_hold_a_job_in_turn_leave_nobody_to_be_named(db, make_job):
    """It is locked all the same. It had been told as an error of the database's, without a DETAIL."""
    job_id = make_job(running=1)
    with pytest.raises(psycopg.errors.LockNotAvailable, match=f"job '{job_id}' is locked") as locked:
        db.execute("SELECT end_or_name_holders(%s, '1s', false, '')", (job_id,))
    assert locked.value.diag.message_detail == "[]"
    assert "in turn: send the call again. Nothing was changed." in locked.value.diag.message_hint


def test_a_stopped_job_stays_stopped_beside_an_insert_that_starts_nothing(db, make_job, stop, hold, service):
    """It was "locked", since whoever inserts an execution holds the barrier."""
    job_id = make_job(running=1)
    stop(job_id)
    hold("INSERT INTO executions (job_id, status) VALUES (%s, 'completed')", job_id)

    assert service.execute(STOP, (job_id,)).fetchone()[0]["action"] == "none"


def try_to_take(session: psycopg.Connection, id: int = 2) -> bool:
    """Get this execution in one of the moments in which the stop lets go of what it has locked."""
    session.rollback()
    return bool(session.execute("SELECT id FROM executions WHERE id = %s FOR UPDATE SKIP LOCKED", (id,)).fetchone())


@pytest.fixture
def weak_owner(db):
    """The functions belong to a role that may neither see nor end the sessions of others."""
    with contextlib.suppress(psycopg.errors.DuplicateObject):
        db.execute("CREATE ROLE beacon_weak_owner")
    db.execute("GRANT ALL ON SCHEMA public TO beacon_weak_owner")
    functions = db.execute("SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace").fetchall()
    for function in functions:
        db.execute(f"ALTER FUNCTION {function[0]} OWNER TO beacon_weak_owner")
    for table in ("jobs", "executions", "emergency_stops", "batch_changes"):
        db.execute(f"ALTER TABLE {table} OWNER TO beacon_weak_owner")


def test_a_session_that_may_not_be_ended_is_named_and_none_is_ended(db, make_job, hold, locked, weak_owner):
    job_id = make_job(running=1)
    holders = [hold(HOLDS["an open insert"], job_id) for _ in range(2)]

    detail = locked(job_id, FORCE)
    assert [one["pid"] for one in detail["not_ended"]] == [one["pid"] for one in detail["blocked_by"]] == pids(*holders)
    assert [is_alive(session) for session in holders] == [True, True]
    assert count_active(db, job_id) == 1


def test_a_session_that_takes_its_time_to_end_is_waited_for_and_counted_once(service, db, make_job, hold):
    job_id = make_job(running=2)
    backend = psutil.Process(hold(HOLDS["a locked job"], job_id).info.backend_pid)
    service.execute("SET lock_timeout = '300ms'")
    waits = "SELECT wait_event = 'BackendTermination' FROM pg_stat_activity WHERE pid = %s"

    with in_thread(lambda: service.execute(FORCE, (job_id,)).fetchone()[0]) as stop, suspended(backend):
        wait_until(lambda: db.execute(waits, (service.info.backend_pid,)).fetchone() == (True,))
    assert stop.result["sessions_ended"] == 1


def test_force_where_nobody_is_in_the_way_changes_nothing(service, make_job):
    answer = service.execute(FORCE, (make_job(running=1),)).fetchone()[0]

    assert answer["message"] == "Job emergency stopped"
    assert "sessions_ended" not in answer


def test_a_lock_timeout_of_0_means_10_seconds(connect, db, make_job, hold):
    """Here one second."""
    change_function(db, "emergency_stop_job", "'10s'", "'1s'")
    job_id = make_job(running=1)
    hold(HOLDS["a locked job"], job_id)
    session = connect()
    assert session.execute("SHOW lock_timeout").fetchone() == ("0",)

    started = time.monotonic()
    with pytest.raises(psycopg.errors.LockNotAvailable):
        session.execute(STOP, (job_id,))
    assert 0.95 < time.monotonic() - started < 5


# --- Over HTTP ---


def test_over_http_a_locked_job_is_a_503_that_names_the_holders_and_says_how_to_end_them(make_app, db, make_job, hold):
    client = Client(make_app(lock_timeout="500ms"))
    job_id = make_job(running=2)
    holders = [hold(HOLDS["a shared job"], job_id), hold(HOLDS["a shared job"], job_id)]

    started = time.monotonic()
    answer = client.stop(job_id)
    assert time.monotonic() - started < 0.95, "one lock timeout, not two"
    assert (answer.status, list(answer.json)) == (503, ["error", "job_id", "blocked_by", "hint"])
    assert int(answer.headers["Retry-After"]) > 0
    assert (answer.json["error"], answer.json["job_id"]) == ("job is locked", job_id)
    assert [list(one) for one in answer.json["blocked_by"]] == [KEYS, KEYS]
    assert [one["pid"] for one in answer.json["blocked_by"]] == pids(*holders)
    assert '"force": true' in answer.json["hint"]
    assert count_active(db, job_id) == 2
    answer = client.stop(job_id, b'{"force": true}')
    assert (answer.status, answer.json["sessions_ended"]) == (200, 2)


def test_over_http_who_may_not_be_ended_is_told(db, make_job, hold, make_app, weak_owner):
    job_id = make_job(running=1)
    holder = hold(HOLDS["an open insert"], job_id)

    answer = Client(make_app(lock_timeout="300ms")).stop(job_id, b'{"force": true}')
    assert answer.status == 503
    assert [one["pid"] for one in answer.json["not_ended"]] == pids(holder)
    assert is_alive(holder)


def test_many_callers_of_a_locked_job_leave_connections_to_other_jobs(make_app, db, make_job, hold):
    client = Client(make_app(lock_timeout="1s"))
    locked, free = make_job(running=1), make_job(running=1)
    holder = hold(HOLDS["a locked job"], locked)

    with ThreadPoolExecutor(20) as executor:
        calls = [executor.submit(client.stop, locked) for _ in range(20)]
        wait_until(lambda: db.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()[0])
        assert client.stop(free).status == 200
        assert not any(call.done() for call in calls)
        answers = [call.result() for call in calls]
    assert {answer.status for answer in answers} == {503}
    assert [[one["pid"] for one in answer.json["blocked_by"]] for answer in answers] == [pids(holder)] * 20


def test_many_who_force_one_job_leave_connections_to_other_jobs(make_app, db, make_job, hold):
    job_id, other = make_job(running=1), make_job(running=1)
    client = Client(make_app(lock_timeout="1s", admin_pool=3))
    hold(HOLDS["a locked job"], job_id)

    with ThreadPoolExecutor(8) as executor:
        forced = [executor.submit(client.stop, job_id, b'{"force": true}') for _ in range(8)]
        wait_until(lambda: db.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()[0])
        assert client.stop(other).json["executions_stopped"] == 1
        assert not any(call.done() for call in forced)
    assert {call.result().status for call in forced} == {200}
    assert [call.result().json["sessions_ended"] for call in forced if "sessions_ended" in call.result().json] == [1]


def test_a_prepared_transaction_is_named_by_its_gid_and_keeps_force_from_ending_anybody(folder):
    """PostgreSQL keeps none unless it is told so, and then only after a restart: hence a server of its own."""
    with beacon_stop.embedded_postgres(folder) as url, psycopg.connect(url, autocommit=True) as db:
        db.execute("ALTER SYSTEM SET max_prepared_transactions = 5")
    with beacon_stop.embedded_postgres(folder) as url:
        beacon_stop.init_db(url)
        with psycopg.connect(url, autocommit=True) as db, closing(psycopg.connect(url)) as worker:
            db.execute("INSERT INTO jobs (id, status) VALUES ('a', 'processing')")
            db.execute("INSERT INTO executions (job_id, status) SELECT 'a', 'running' FROM generate_series(1, 3)")
            db.execute("SET lock_timeout = '300ms'")
            for gid, statement in {
                "changed": "UPDATE executions SET output = '{}' WHERE id = 1",
                "shared": "SELECT FROM executions WHERE id = 2 FOR SHARE",
                "inserted": "INSERT INTO executions (job_id) VALUES ('a')",
                "beside": "INSERT INTO jobs (id) VALUES ('b')",
            }.items():
                db.execute(f"BEGIN; {statement}; PREPARE TRANSACTION '{gid}'")
            worker.execute("SELECT FROM executions WHERE id = 3 FOR UPDATE")

            found = db.execute("SELECT * FROM emergency_stop_blockers('a') WHERE pid = 0").fetchall()
            assert [row[:4] for row in found] == [(0, gid, "postgres", "prepared transaction") for gid in ("changed", "inserted", "shared")]
            app = beacon_stop.create_app({"DATABASE_URL": url, "ADMIN_TOKEN": TOKEN}, lock_timeout="300ms")
            told = Client(app).stop("a")
            app.close()
            assert (told.status, len(told.json["blocked_by"])) == (503, 4)
            assert "ROLLBACK PREPARED" in told.json["hint"]  # before: to send force, which ends no such transaction
            assert all(0 <= seconds < 60 and query is None for *_, seconds, query in found)
            with pytest.raises(psycopg.errors.LockNotAvailable, match="job 'a' is locked") as refused:
                db.execute(FORCE, ("a",))
            detail = json.loads(refused.value.diag.message_detail)
            assert [one["application_name"] for one in detail["not_ended"]] == ["changed", "inserted", "shared"]
            assert [one["pid"] for one in detail["blocked_by"]] == [0, 0, 0, worker.info.backend_pid]
            assert is_alive(worker)

            for gid in ("changed", "inserted", "shared"):
                db.execute(f"ROLLBACK PREPARED '{gid}'")
            answer = db.execute(FORCE, ("a",)).fetchone()[0]
            assert (answer["executions_stopped"], answer["sessions_ended"]) == (3, 1)
            db.execute("ROLLBACK PREPARED 'beside'")


def test_a_table_that_is_locked_in_a_cloned_database_is_another_one(server_url, installed, make_job, blockers):
    """Tables of databases that were cloned from the same template have the same numbers."""
    job_id = make_job(running=1)

    with new_database(server_url, installed.template_dbname) as clone:
        clone.execute("LOCK TABLE jobs, executions IN ACCESS EXCLUSIVE MODE")
        assert blockers(job_id) == []
        clone.rollback()


def test_nobody_is_in_their_own_way(make_job, hold):
    """Else force would end the session that asks for the stop."""
    job_id = make_job(running=2)
    session = hold(HOLDS["a changed execution"], job_id)
    session.execute(HOLDS["an open insert"], (job_id,))
    session.execute(HOLDS["another locked table"])

    assert session.execute("SELECT * FROM emergency_stop_blockers(%s)", (job_id,)).fetchall() == []


def test_a_stop_that_takes_longer_than_the_lock_timeout_is_named_as_what_the_others_wait_for(make_app, db, connect, make_job):
    """Of a large job. Before, the second caller got a 500, and was told to look at the triggers."""
    job_id = make_job(running=2)
    hold_stops(db)
    with in_thread(connect().execute, STOP, (job_id,)) as first:
        try:
            wait_until(lambda: stops_are_held(db))
            answer = Client(make_app(lock_timeout="300ms")).stop(job_id)
        finally:
            let_stops_go(db)
    assert first.result.fetchone()[0]["executions_stopped"] == 2
    assert (answer.status, answer.json["error"], answer.json["blocked_by"]) == (503, "job is locked", [])
    assert "Another stop of this job" in answer.json["hint"]


@pytest.mark.parametrize("force", [False, True])
def test_force_is_not_proposed_where_it_would_end_nobody(connect, db, make_job, force):
    """Those who hold a job one after the other are all younger than the wait."""
    job_id, holder = make_job(running=1), connect(autocommit=False)
    holder.execute("UPDATE executions SET output = '{}' WHERE job_id = %s", (job_id,))

    with pytest.raises(psycopg.errors.LockNotAvailable) as locked:
        db.execute("SELECT end_or_name_holders(%s, '10 s', %s, NULL)", (job_id, force))
    assert [each["pid"] for each in json.loads(locked.value.diag.message_detail)] == [holder.info.backend_pid]
    assert "None of them has held it for that long" in locked.value.diag.message_hint
    holder.rollback()
