"""sql/32_emergency_stop_jobs.sql, and the calls over HTTP that share a transaction by it."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import beacon_stop
import psycopg
import pytest
from psycopg.types.json import Jsonb

from conftest import (
    TOKEN,
    Client,
    change_function,
    count_active,
    hold_stops,
    in_thread,
    is_waiting,
    let_stops_go,
    stops_are_held,
    wait_until,
)

STOP_JOBS = "SELECT id, summary FROM emergency_stop_jobs(%s, %s)"

GROUP_SESSION = "FROM pg_stat_activity WHERE application_name = 'beacon-stop group' AND datname = current_database()"

# --- In SQL ---


def test_each_gets_the_answer_and_the_record_that_it_would_get_alone(db, service, make_job, stop):
    """One reason for all. Version 1.0: array['incident 7'] was the reason of the first of 70 jobs only."""
    running, ended, leftovers = make_job("a", running=3), make_job("b", status="completed"), make_job("d", status="failed", running=2)
    other = make_job(running=1)

    rows = service.execute(STOP_JOBS, ([leftovers, "c", ended, running], "incident 7")).fetchall()
    assert [id for id, _ in rows] == ["d", "c", "b", "a"]
    late, unknown, none, stopped = (summary for _, summary in rows)
    assert (stopped["message"], stopped["executions_stopped"], stopped["reason"]) == ("Job emergency stopped", 3, "incident 7")
    assert none == stop(ended)
    assert unknown == stop("c") == {"error": "job not found", "job_id": "c"}
    assert (late["action"], late["executions_stopped"], late["reason"]) == ("executions_stopped", 2, "incident 7")
    records = db.execute("SELECT job_id, executions_stopped, reason FROM emergency_stops ORDER BY job_id").fetchall()
    assert records == [("a", 3, "incident 7"), ("d", 2, "incident 7")]
    assert [count_active(db, id) for id in (running, leftovers, other)] == [0, 0, 1]


def test_no_ids_and_the_same_id_twice(service, make_job):
    job_id = make_job(running=1)

    assert service.execute(STOP_JOBS, ([], None)).fetchall() == []
    assert service.execute(STOP_JOBS, (None, None)).fetchall() == []
    first, second = service.execute("SELECT summary FROM emergency_stop_jobs(%s)", ([job_id, job_id],)).fetchall()
    assert (first[0]["executions_stopped"], second[0]["action"]) == (1, "none")


@pytest.mark.parametrize("caller", [{"actor": "anna"}, [{"actor": "anna"}, {"actor": "ben"}]])
def test_one_caller_for_all_or_one_for_each(db, service, make_job, caller):
    jobs = [make_job("b", running=1), make_job("a", running=1)]

    service.execute("SELECT * FROM emergency_stop_jobs(%s, caller => %s)", (jobs, Jsonb(caller)))
    actors = dict(db.execute("SELECT job_id, caller->>'actor' FROM emergency_stops").fetchall())
    assert actors == {"b": "anna", "a": "ben" if isinstance(caller, list) else "anna"}


def test_a_locked_job_is_left_out_and_told_and_the_others_are_stopped(db, connect, service, make_job):
    jobs = [make_job(id, running=2) for id in ("a", "b", "c")]
    worker = connect(autocommit=False)
    worker.execute("UPDATE executions SET output = '{}' WHERE job_id = 'b'")
    service.execute("SET lock_timeout = '5s'")

    started = time.monotonic()
    rows = dict(service.execute(STOP_JOBS, (jobs, None)).fetchall())
    assert time.monotonic() - started < 2
    assert [rows[id].get("error") for id in jobs] == [None, "job is locked", None]
    assert list(rows["b"]) == ["error", "job_id", "blocked_by"]
    assert [holder["pid"] for holder in rows["b"]["blocked_by"]] == [worker.info.backend_pid]
    assert [count_active(db, id) for id in jobs] == [0, 2, 0]
    assert db.execute("SELECT array_agg(job_id ORDER BY job_id) FROM emergency_stops").fetchone() == (["a", "c"],)
    assert service.execute("SHOW lock_timeout").fetchone() == ("5s",)

    with service.transaction():
        service.execute(STOP_JOBS, (["b"], None))
        assert db.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() == (0,)  # its barrier is let go of
        service.execute(STOP_JOBS, ([make_job(running=1)], None))
        assert service.execute("SHOW lock_timeout").fetchone() == ("5s",)  # of the commit, too
    worker.rollback()


def test_a_job_of_a_call_that_is_still_at_work_on_another_one_is_being_stopped_and_not_held(db, connect, make_job):
    """The call was named as a session that holds the job. With force it was ended, which undid its other stops."""
    make_job("a", running=1), make_job("b", running=1), make_job("c", running=1)
    several, by_hand = connect(autocommit=False), connect()
    by_hand.execute("SET lock_timeout = '100ms'")
    blockers = "SELECT pid FROM emergency_stop_blockers('a')"
    hold_stops(db)
    db.execute("""
        CREATE OR REPLACE TRIGGER wait_to_go_on AFTER UPDATE ON executions FOR EACH ROW WHEN (NEW.job_id = 'b')
        EXECUTE FUNCTION wait_to_go_on()""")

    with in_thread(several.execute, STOP_JOBS, (["a", "b"], None)):
        try:
            wait_until(lambda: stops_are_held(db))
            assert db.execute(blockers).fetchall() == []
            for force in (False, True):
                with pytest.raises(psycopg.errors.LockNotAvailable) as locked:
                    by_hand.execute("SELECT emergency_stop_job('a', force => %s)", (force,))
                assert (locked.value.diag.message_detail, "Ask again" in locked.value.diag.message_hint) == ("[]", True)
        finally:
            let_stops_go(db)
    assert db.execute(blockers).fetchall() == [(several.info.backend_pid,)]
    several.execute("SELECT emergency_stop_job('c')")  # in the same transaction, as by itself
    with in_thread(several.execute, "SELECT pg_sleep(0.5)"):  # at work, but not on the stops
        wait_until(lambda: stops_are_held(db))
        assert db.execute(blockers).fetchall() == [(several.info.backend_pid,)]
        assert db.execute("SELECT pid FROM emergency_stop_blockers('c')").fetchall() == [(several.info.backend_pid,)]
    several.commit()
    assert count_active(db, "a") + count_active(db, "b") == 0


def test_a_call_inside_of_another_one_leaves_that_ones_settings_as_they_are(db, make_job):
    """The outer one would take every holder for one who has held a job for long enough."""
    job_id = make_job(running=1)
    settings = "SELECT current_setting('beacon_stop.is_several'), current_setting('beacon_stop.waited')"

    with db.transaction():
        db.execute("SELECT set_config('beacon_stop.is_several', 'on', true), set_config('beacon_stop.waited', '7 s', true)")
        db.execute("SELECT emergency_stop_jobs(%s, force => true)", ([job_id],))
        assert db.execute(settings).fetchone() == ("on", "7 s")
    assert count_active(db, job_id) == 0


def test_patience_is_how_long_each_is_waited_for(db, connect, service, make_job):
    job_id = make_job(running=1)
    worker = connect(autocommit=False)
    worker.execute("UPDATE executions SET output = '{}' WHERE job_id = %s", (job_id,))

    patient = "SELECT summary FROM emergency_stop_jobs(%s, patience => '10 s')"
    with in_thread(lambda: service.execute(patient, ([job_id],)).fetchone()[0]) as stop:
        wait_until(lambda: is_waiting(db, service))
        worker.rollback()
    assert stop.result["executions_stopped"] == 1


def test_force_ends_those_whose_transactions_are_older_than_the_lock_timeout_and_no_younger_one(db, connect, service, make_job):
    old_job, young_job = make_job(running=1), make_job(running=1)
    old, young = connect(autocommit=False), connect(autocommit=False)
    service.execute("SET lock_timeout = '400ms'")
    change = "UPDATE executions SET output = '{}' WHERE job_id = %s"
    old.execute(change, (old_job,))
    query = "SELECT bool_and(transaction_seconds > 0.5) FROM emergency_stop_blockers(%s)"
    wait_until(lambda: db.execute(query, (old_job,)).fetchone()[0])
    (unforced,) = service.execute("SELECT summary FROM emergency_stop_jobs(%s)", ([old_job],)).fetchone()
    assert [holder["pid"] for holder in unforced["blocked_by"]] == [old.info.backend_pid]
    young.execute(change, (young_job,))

    stop = "SELECT summary FROM emergency_stop_jobs(%s, force => true)"
    (first,), (second,) = service.execute(stop, ([old_job, young_job],)).fetchall()
    assert (first["executions_stopped"], first["sessions_ended"]) == (1, 1)
    assert [holder["pid"] for holder in second["blocked_by"]] == [young.info.backend_pid]
    young.rollback()


def test_where_there_is_no_lock_timeout_force_ends_those_who_have_held_a_job_for_ten_seconds(db, connect, service, make_job):
    job_id, worker = make_job(running=1), connect(autocommit=False)
    worker.execute("UPDATE executions SET output = '{}' WHERE job_id = %s", (job_id,))
    stop = "SELECT summary FROM emergency_stop_jobs(%s, force => true)"

    change_function(db, "holders_of_job", "p.since, a.xact_start,", "clock_timestamp() - interval '9 s',")
    (younger,) = service.execute(stop, ([job_id],)).fetchone()
    assert [holder["pid"] for holder in younger["blocked_by"]] == [worker.info.backend_pid]
    change_function(db, "holders_of_job", "interval '9 s'", "interval '11 s'")
    (older,) = service.execute(stop, ([job_id],)).fetchone()
    assert (older["executions_stopped"], older["sessions_ended"]) == (1, 1)


def test_force_ends_the_old_holder_of_a_job_whose_workers_come_and_go(make_app, connect, db, make_job):
    """A first version of this did nothing if one of the holders was young, as each worker's transaction is."""
    job_id = make_job(running=1)
    client = Client(make_app(lock_timeout="500ms"))
    old, worker, ended = connect(autocommit=False), connect(autocommit=False), threading.Event()

    def work():
        while not ended.is_set():
            try:
                worker.execute("INSERT INTO executions (job_id, status) VALUES (%s, 'running')", (job_id,))
                ended.wait(0.02)
                worker.commit()
            except (psycopg.errors.SerializationFailure, psycopg.errors.ObjectNotInPrerequisiteState):
                worker.rollback()

    old.execute("SELECT FROM executions WHERE job_id = %s FOR UPDATE", (job_id,))
    with in_thread(work):
        try:
            wait_until(lambda: count_active(db, job_id) > 3)
            body = json.dumps({"job_ids": [job_id], "force": True}).encode()
            answer = client("POST", "/admin/emergency-stop", body, HTTP_X_ADMIN_TOKEN=TOKEN)
        finally:
            ended.set()
    (result,) = answer.json["results"]
    assert (answer.json["stopped"], result["message"], result["sessions_ended"]) == (1, "Job emergency stopped", 1)
    with pytest.raises(psycopg.OperationalError):
        old.execute("SELECT 1")
    assert count_active(db, job_id) == 0


def test_two_calls_over_the_same_jobs_in_opposite_orders(connect, db, make_job):
    jobs = [make_job(running=2) for _ in range(50)]
    first, second = connect(), connect()

    with in_thread(lambda: first.execute(STOP_JOBS, (jobs, None)).fetchall()) as there:
        back = second.execute(STOP_JOBS, (jobs[::-1], None)).fetchall()
    stopped = [summary for _, summary in [*there.result, *back] if summary.get("message") == "Job emergency stopped"]
    assert len(stopped) == 50 and sum(summary["executions_stopped"] for summary in stopped) == 100
    assert db.execute("SELECT count(*), count(DISTINCT job_id) FROM emergency_stops").fetchone() == (50, 50)


def test_jobs_are_stopped_in_the_order_of_their_ids_whatever_the_order_of_the_call(db, service, make_job):
    """So that of two calls the later one follows the other, and they hold nothing that the other one waits for."""
    jobs = [make_job(running=1) for _ in range(12)]

    service.execute(STOP_JOBS, (jobs[::-1], None))
    assert [job_id for (job_id,) in db.execute("SELECT job_id FROM emergency_stops ORDER BY id")] == sorted(jobs)


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_what_emergency_stop_job_refuses_is_refused_for_all(db, service, make_job, isolation):
    jobs = [make_job(running=1), make_job(running=1)]

    with pytest.raises(psycopg.errors.InvalidParameterValue):
        service.execute(STOP_JOBS, (jobs, "x" * 1001))
    refusal = f"^emergency_stop_jobs cannot run in a {isolation} transaction"
    with pytest.raises(psycopg.errors.InvalidTransactionState, match=refusal), service.transaction():
        service.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}")
        service.execute(STOP_JOBS, (jobs, None))
    assert [count_active(db, id) for id in jobs] == [1, 1]


@pytest.mark.parametrize("force", [False, True])
def test_the_settings_of_the_session_stay_as_they_are(service, make_job, force):
    """The next caller of a pooled session would otherwise work with those of this call."""
    settings = """
        SELECT current_setting('lock_timeout'), current_setting('beacon_stop.waited'), current_setting('beacon_stop.is_several')"""
    service.execute("SET lock_timeout = '3s'; SET beacon_stop.waited = '7s'; SET beacon_stop.is_several = off")

    with service.transaction():
        service.execute("SET LOCAL lock_timeout = '5s'")
        service.execute("SELECT * FROM emergency_stop_jobs(%s, force => %s)", ([make_job(running=1)], force)).fetchall()
        assert service.execute("SHOW lock_timeout").fetchone() == ("5s",)
    assert service.execute(settings).fetchone() == ("3s", "7s", "off")


def test_the_commit_is_durable(service, make_job):
    service.execute("SET synchronous_commit = off")
    with service.transaction():
        service.execute(STOP_JOBS, ([make_job(running=1), make_job(running=1)], None))
        assert service.execute("SHOW synchronous_commit").fetchone() == ("on",)


# --- Over HTTP ---


def client_of(app):
    """Whose stops can share transactions from now on."""
    client = Client(app)
    client.stop("nix")  # connects
    wait_until(lambda: app.group.can_group)
    return client


@pytest.fixture
def client(make_app):
    return client_of(make_app())


@pytest.fixture
def slow(db):
    """Stops of jobs whose id begins with `slow-` take half a second, those that begin with `bad-` fail."""
    db.execute("""
        CREATE FUNCTION hold_up() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.id LIKE 'bad-%' THEN
                RAISE feature_not_supported;
            END IF;
            PERFORM pg_sleep(0.5);
            RETURN NEW;
        END $$;
        CREATE TRIGGER hold_up BEFORE UPDATE ON jobs FOR EACH ROW WHEN (NEW.id ~ '^(slow|bad)-') EXECUTE FUNCTION hold_up()""")


@pytest.fixture
def seen(db):
    """A table of the transactions that have stopped jobs, and of whose sessions they were."""
    db.execute("""
        CREATE TABLE seen (job_id text, name text, transaction bigint);
        GRANT INSERT ON seen TO PUBLIC;
        CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO seen VALUES (NEW.id, current_setting('application_name'), txid_current());
            RETURN NEW;
        END $$;
        CREATE TRIGGER see BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION see()""")


def sleeps(db, count=1):
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
    return db.execute(query).fetchone()[0] >= count


@contextmanager
def stops_at_work(client, db, *ids):
    """Run a block while stops of slow jobs are at work, the first by itself, the second in a group."""
    with ThreadPoolExecutor(len(ids)) as executor:
        answers = SimpleNamespace(futures=[])
        for number, id in enumerate(ids, 1):
            answers.futures.append(executor.submit(client.stop, id))
            wait_until(lambda number=number: sleeps(db, number))
        yield answers
        answers.all = [future.result() for future in answers.futures]


def stop_all(client, ids):
    with ThreadPoolExecutor(len(ids)) as executor:
        return list(executor.map(client.stop, ids))


def stop_several(client, ids):
    """One call for several; its answer, and how long it took."""
    started = time.monotonic()
    answer = client("POST", "/admin/emergency-stop", json.dumps({"job_ids": ids}).encode(), HTTP_X_ADMIN_TOKEN=TOKEN)
    return answer, time.monotonic() - started


def test_two_calls_for_the_same_jobs_in_opposite_orders_at_once(make_app, connect, db, make_job):
    """A job that a worker holds keeps both of them at work at the same time."""
    client = Client(make_app(lock_timeout="4s"))
    jobs = [make_job(running=2) for _ in range(50)]
    worker = connect(autocommit=False)
    worker.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (jobs[25],))

    with ThreadPoolExecutor(2) as operators:
        calls = [operators.submit(stop_several, client, ids) for ids in (jobs, jobs[::-1])]
        others = "SELECT count(*) FROM emergency_stops"
        wait_until(lambda: db.execute(others).fetchone() == (49,))
        waiting = """
            SELECT count(*) FROM pg_stat_activity
            WHERE query LIKE '%FROM emergency_stop_jobs(%' AND datname = current_database() AND wait_event_type = 'Lock'"""
        wait_until(lambda: db.execute(waiting).fetchone() == (2,))
        assert not any(call.done() for call in calls)
        worker.rollback()
        (there, there_took), (back, back_took) = [call.result() for call in calls]
    assert (there.status, back.status) == (200, 200)
    assert max(there_took, back_took) < 4 + 1
    assert [result["job_id"] for result in there.json["results"]] == jobs
    assert [result["job_id"] for result in back.json["results"]] == jobs[::-1]
    for answer in (there.json, back.json):
        messages = [result["message"] for result in answer["results"]]
        assert answer["stopped"] == messages.count("Job emergency stopped")
        assert answer["already_terminal"] == messages.count("Job already in terminal state")
        assert answer["stopped"] + answer["already_terminal"] == 50
        assert (answer["not_found"], answer["locked"]) == (0, 0)
    stopped = [result for answer in (there, back) for result in answer.json["results"] if "executions_stopped" in result]
    assert sorted(result["job_id"] for result in stopped) == sorted(jobs)
    assert {result["executions_stopped"] for result in stopped} == {2}
    assert db.execute("SELECT count(*), count(DISTINCT job_id) FROM emergency_stops").fetchone() == (50, 50)
    assert [count_active(db, job_id) for job_id in jobs] == [0] * 50


def test_a_stop_that_is_alone_is_in_no_group(client, db, make_job, seen):
    assert client.stop(make_job(running=1)).json["executions_stopped"] == 1
    assert db.execute("SELECT name FROM seen").fetchall() == [("beacon-stop admin",)]


def test_stops_that_come_together_share_transactions(client, db, make_job, slow, seen, monkeypatch):
    monkeypatch.setattr(beacon_stop, "GROUP_SIZE", 3)
    first = make_job("slow-1", running=1)
    others = [make_job(f"job-{number}", running=2) for number in range(40)]

    with stops_at_work(client, db, first) as at_work, ThreadPoolExecutor(41) as executor:
        unknown = executor.submit(client.stop, "nix")
        answers = list(executor.map(client.stop, others, [b'{"reason": "one for all"}'] * 40))
    assert {answer.status for answer in [*answers, *at_work.all]} == {200}
    assert [answer.json["job_id"] for answer in answers] == others
    assert [answer.json["reason"] for answer in answers] == ["one for all"] * 40
    assert {answer.json["executions_stopped"] for answer in answers} == {2}
    keys = ["ok", "message", "job_id", "previous_status", "new_status", "executions_stopped", "stopped_at", "reason"]
    assert all(list(answer.json) == keys for answer in answers)
    assert (unknown.result().status, unknown.result().json) == (404, {"error": "job not found", "job_id": "nix"})
    transactions, largest = db.execute("""
        SELECT count(*), max(t.stops) FROM (
            SELECT count(*) AS stops FROM seen WHERE name = 'beacon-stop group' GROUP BY transaction
        ) AS t""").fetchone()
    assert transactions < 40
    assert 1 < largest <= 3
    assert db.execute("SELECT count(*), count(DISTINCT job_id) FROM emergency_stops").fetchone() == (41, 41)


def test_a_locked_job_holds_up_none_of_those_beside_it(make_app, connect, db, make_job, slow):
    client = client_of(make_app(lock_timeout="30s"))
    locked = make_job("a-locked", running=1)
    others = [make_job(f"job-{number}", running=1) for number in range(12)]
    worker = connect(autocommit=False)
    worker.execute("UPDATE executions SET output = '{}' WHERE job_id = 'a-locked'")

    with stops_at_work(client, db, make_job("slow-1", running=1)), ThreadPoolExecutor(1) as executor:
        held_up = executor.submit(client.stop, locked)
        answers = stop_all(client, others)
        assert {answer.status for answer in answers} == {200}
        assert not held_up.done()
        worker.rollback()
        assert held_up.result().json["executions_stopped"] == 1


def test_a_stop_that_takes_its_time_goes_by_itself_and_so_do_those_beside_it(client, db, make_job, slow, seen):
    first, second = make_job("slow-1", running=1), make_job("slow-2", running=1)
    others = [make_job(f"job-{number}", running=1) for number in range(6)]

    with stops_at_work(client, db, first, second) as at_work:
        answers = stop_all(client, others)
    assert [answer.json["executions_stopped"] for answer in [*at_work.all, *answers]] == [1] * 8
    assert db.execute("SELECT count(*) FROM emergency_stops").fetchone() == (8,)
    assert db.execute("SELECT name FROM seen WHERE job_id = %s", (second,)).fetchall() == [("beacon-stop admin",)]


def test_an_error_of_one_is_no_error_of_the_others(client, db, make_job, slow):
    first, bad = make_job("slow-1", running=1), make_job("bad-1", running=1)
    others = [make_job(f"job-{number}", running=1) for number in range(6)]

    with stops_at_work(client, db, first):
        answers = stop_all(client, [*others, bad])
    assert [answer.status for answer in answers] == [200] * 6 + [500]
    assert [count_active(db, id) for id in (*others, bad)] == [0] * 6 + [1]


@pytest.mark.parametrize(("pause", "session"), [(60.0, "beacon-stop admin"), (0.1, "beacon-stop group")])
def test_after_an_error_there_are_no_groups_for_a_while(client, db, make_job, slow, seen, monkeypatch, pause, session):
    monkeypatch.setattr(beacon_stop, "GROUP_PAUSE", pause)
    last = make_job(running=1)

    with stops_at_work(client, db, make_job("slow-1", running=1)):
        assert client.stop(make_job("bad-1", running=1)).status == 500
        time.sleep(0.2)
        assert client.stop(last).status == 200
    assert db.execute("SELECT name FROM seen WHERE job_id = %s", (last,)).fetchall() == [(session,)]


def test_a_group_whose_session_is_ended_is_stopped_nevertheless(client, db, make_job, slow):
    first, second, third = (make_job(f"slow-{number}", running=1) for number in range(3))

    with stops_at_work(client, db, first, second) as at_work:
        assert db.execute(f"SELECT pg_terminate_backend(pid) {GROUP_SESSION}").fetchall() == [(True,)]
        assert client.stop(third).json["executions_stopped"] == 1
    assert [answer.json["executions_stopped"] for answer in at_work.all] == [1, 1]
    assert db.execute("SELECT count(*), count(DISTINCT job_id) FROM emergency_stops").fetchone() == (3, 3)


def test_a_group_that_hangs_holds_up_nobody_who_is_not_in_it(make_app, db, make_job, slow):
    app = make_app()
    client = client_of(app)
    first, hangs = make_job("slow-1", running=1), make_job(running=1)
    others = [make_job(running=1) for _ in range(20)]
    (pid,) = db.execute(f"SELECT pid {GROUP_SESSION}").fetchone()

    with ThreadPoolExecutor(1) as executor:
        with stops_at_work(client, db, first):
            os.kill(pid, signal.SIGSTOP)
            try:
                stuck = executor.submit(client.stop, hangs)
                wait_until(lambda: app.group.pool.get_stats()["pool_available"] == 0)  # the group is at work on it
                assert {answer.json["executions_stopped"] for answer in stop_all(client, others)} == {1}
                assert not stuck.done()
            finally:
                os.kill(pid, signal.SIGCONT)
        assert stuck.result().json["executions_stopped"] == 1


def test_groups_are_back_by_themselves_when_the_database_is(make_app, connect, server_url, db, make_job, slow, monkeypatch):
    monkeypatch.setattr(beacon_stop, "GROUP_PAUSE", 1.0)
    app = make_app()
    client = client_of(app)

    server, name = connect(server_url), db.info.dbname
    server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    try:
        assert db.execute(f"SELECT pg_terminate_backend(pid) {GROUP_SESSION}").fetchall() == [(True,)]
        with stops_at_work(client, db, make_job("slow-1", running=1)):
            assert client.stop(make_job(running=1)).json["executions_stopped"] == 1
        wait_until(lambda: not app.group.can_group)
    finally:
        server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    wait_until(lambda: app.group.can_group)


def test_without_the_right_to_the_function_each_goes_by_itself(make_app, db, make_job, slow, seen):
    db.execute("REVOKE EXECUTE ON FUNCTION emergency_stop_jobs FROM beacon_service")
    client = Client(make_app())
    client.stop("nix")  # connects
    wait_until(lambda: db.execute(f"SELECT 1 {GROUP_SESSION}").rowcount)
    others = [make_job(f"job-{number}", running=1) for number in range(6)]

    with stops_at_work(client, db, make_job("slow-1", running=1), make_job("slow-2", running=1)):
        answers = stop_all(client, others)
    assert {answer.json["executions_stopped"] for answer in answers} == {1}
    assert db.execute("SELECT name, count(*) FROM seen GROUP BY name").fetchall() == [("beacon-stop admin", 8)]
    ((query,),) = db.execute(f"SELECT query {GROUP_SESSION}").fetchall()
    assert "FROM emergency_stop_jobs" not in query


def test_a_forced_stop_and_a_second_call_for_the_same_job_are_in_no_group(client, db, make_job, slow, seen):
    first, second, third = make_job("slow-1", running=1), make_job("slow-2", running=1), make_job(running=1)

    with stops_at_work(client, db, first, second) as at_work:
        assert client.stop(third, b'{"force": true}').json["executions_stopped"] == 1
        assert client.stop(first).json["action"] == "none"
    assert [answer.json["executions_stopped"] for answer in at_work.all] == [1, 1]
    assert db.execute("SELECT DISTINCT name FROM seen WHERE job_id IN (%s, %s)", (first, third)).fetchall() == [("beacon-stop admin",)]
