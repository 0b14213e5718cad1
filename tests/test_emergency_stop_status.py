"""sql/34_emergency_stop_status.sql: what a stop would meet, what stops have done, what the workers have confirmed."""

import pytest

from conftest import TOKEN, Client, wait_until

STATUS = "SELECT emergency_stop_status(%s)"
KEYS = ["job_id", "status", "stopped", "active", "blocked_by", "confirmation", "history"]
NONE_ACTIVE = {"pending": 0, "running": 0, "processing": 0}


@pytest.fixture
def status_of(service):
    def status_of(id):
        return service.execute(STATUS, (id,)).fetchone()[0]

    return status_of


@pytest.fixture
def make_worked_job(db, make_job):
    """A job of which a worker has begun so many executions, and others are only pending; gives its id and their ids."""

    def make_worked_job(begun, pending=0):
        job_id = make_job(pending=pending)
        rows = db.execute(
            "INSERT INTO executions (job_id, status, started_at) SELECT %s, 'running', now() FROM generate_series(1, %s) RETURNING id",
            (job_id, begun),
        )
        return job_id, [id for (id,) in rows]

    return make_worked_job


def confirm(db, *ids):
    return db.execute("SELECT confirm_stopped(%s)", (list(ids),)).fetchone()[0]


def test_of_a_job_that_goes_on_it_counts_what_is_active(make_job, status_of):
    job_id = make_job(pending=3, running=2, processing=1, completed=4, failed=5)

    answer = status_of(job_id)
    assert list(answer) == KEYS
    assert answer == {
        "job_id": job_id, "status": "processing", "stopped": False,
        "active": {"pending": 3, "running": 2, "processing": 1},
        "blocked_by": [], "confirmation": None, "history": [],
    }  # fmt: skip
    assert list(answer["active"]) == ["pending", "running", "processing"]


def test_states_of_the_application_s_own_are_named_as_left_alone(make_job, status_of):
    job_id = make_job(running=1, queued=10, RUNNING=2)

    answer = status_of(job_id)
    assert list(answer) == [*KEYS[:4], "left_alone", *KEYS[4:]]
    assert (answer["active"]["running"], answer["left_alone"]) == (1, {"queued": 10, "RUNNING": 2})


def test_an_unknown_job_is_not_found(status_of):
    assert status_of("unknown") == {"error": "job not found", "job_id": "unknown"}


def test_the_history_shows_stops_and_releases_newest_first(db, service, make_job, status_of):
    job_id = make_job(running=2)
    caller = '{"actor": "ann", "client": "192.0.2.1", "request_id": "r-1"}'
    service.execute("SELECT emergency_stop_job(%s, 'too many', caller => %s)", (job_id, caller))
    service.execute("SELECT release_job(%s, 'mended', 'pending')", (job_id,))
    times = db.execute("SELECT to_char(stopped_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') FROM emergency_stops ORDER BY id")
    (stopped_at,), (released_at,) = times.fetchall()

    released, stopped = status_of(job_id)["history"]
    assert stopped == {
        "action": "stop", "at": stopped_at, "previous_status": "processing", "new_status": "failed",
        "executions_stopped": 2,
        "sessions_ended": 0, "reason": "too many", "actor": "ann", "client": "192.0.2.1", "request_id": "r-1",
        "database_user": "beacon_service",
    }  # fmt: skip
    assert list(stopped) == list(released) == [
        "action", "at", "previous_status", "new_status", "executions_stopped", "sessions_ended", "reason", "actor",
        "client",
        "request_id", "database_user",
    ]  # fmt: skip
    assert (released["action"], released["at"], released["reason"], released["actor"]) == (
        "release",
        released_at,
        "mended",
        None,
    )


def test_the_history_has_the_twenty_last(make_job, service, status_of):
    job_id = make_job()
    for number in range(11):
        service.execute("SELECT emergency_stop_job(%s, %s)", (job_id, f"stop {number}"))
        service.execute("SELECT release_job(%s, %s, 'processing')", (job_id, f"release {number}"))

    history = status_of(job_id)["history"]
    assert len(history) == 20
    assert [record["reason"] for record in history] == [
        f"{action} {number}" for number in range(10, 0, -1) for action in ("release", "stop")
    ]


def test_stopped_is_what_has_ended_by_a_stop_and_was_not_released(db, service, make_job, stop, status_of):
    going_on, failed, stopped, released = (
        make_job(),
        make_job(status="failed"),
        make_job(running=1),
        make_job(running=1),
    )
    failed_and_stopped = make_job(status="failed")
    marked_only, marked_but_going_on = (
        [make_job(status=status, metadata={"emergency_stop": True}) for status in statuses]
        for statuses in (("completed", "failed", "cancelled"), ("created", "pending", "processing", "archived"))
    )
    for job_id in (stopped, released, failed_and_stopped):
        stop(job_id)
    service.execute("SELECT release_job(%s, 'mended', 'cancelled')", (released,))

    assert {status_of(job_id)["stopped"] for job_id in (stopped, *marked_only, failed_and_stopped)} == {True}
    assert {status_of(job_id)["stopped"] for job_id in (going_on, *marked_but_going_on, failed, released)} == {False}


def test_three_who_hold_the_job_are_named_while_no_stop_waits(make_job, connect, status_of):
    job_id = make_job(running=3)
    holders = [connect(autocommit=False, application_name=f"worker {number}") for number in range(3)]
    holders[0].execute("INSERT INTO executions (job_id, status) VALUES (%s, 'running')", (job_id,))
    holders[1].execute("UPDATE jobs SET updated_at = now() WHERE id = %s", (job_id,))
    holders[2].execute(
        "UPDATE executions SET started_at = now() WHERE id = (SELECT min(id) FROM executions WHERE job_id = %s)",
        (job_id,),
    )

    named = status_of(job_id)["blocked_by"]
    assert {session["pid"]: session["application_name"] for session in named} == {
        holder.info.backend_pid: f"worker {number}" for number, holder in enumerate(holders)
    }
    assert list(named[0]) == ["pid", "application_name", "database_user", "state", "transaction_seconds", "query"]
    for holder in holders:
        holder.rollback()
    assert status_of(job_id)["blocked_by"] == []


def test_it_changes_nothing_and_its_locks_do_not_outlive_it(db, make_job, connect, service_url):
    job_id = make_job(running=3)
    holder = connect(autocommit=False)
    holder.execute(
        "UPDATE executions SET started_at = now() WHERE id = (SELECT min(id) FROM executions WHERE job_id = %s)",
        (job_id,),
    )
    operator = connect(service_url, autocommit=False)
    before = db.execute("SELECT array_agg(j) FROM jobs j").fetchone()

    operator.execute(STATUS, (job_id,))
    modes = """
        SELECT DISTINCT mode FROM pg_locks
        WHERE pid = %s AND locktype IN ('relation', 'tuple', 'advisory') AND mode <> 'RowShareLock'"""
    assert db.execute(modes, (operator.info.backend_pid,)).fetchall() == [("AccessShareLock",)]
    db.execute("SET lock_timeout = '100ms'")
    db.execute(
        "UPDATE executions SET started_at = now() WHERE id = (SELECT max(id) FROM executions WHERE job_id = %s)",
        (job_id,),
    )
    assert db.execute("SELECT array_agg(j) FROM jobs j").fetchone() == before


def test_only_what_a_worker_had_begun_is_in_hand(db, make_worked_job, stop, status_of):
    job_id, begun = make_worked_job(3, pending=2)
    assert status_of(job_id)["confirmation"] is None

    stop(job_id)
    started_at = db.execute(
        "SELECT to_char(min(started_at) AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') FROM executions"
    ).fetchone()[0]
    assert status_of(job_id)["confirmation"] == {
        "in_hand": 3, "confirmed": 0, "outstanding": [{"id": id, "started_at": started_at} for id in begun],
    }  # fmt: skip
    assert confirm(db, begun[1]) == 1
    confirmation = status_of(job_id)["confirmation"]
    assert (confirmation["confirmed"], [execution["id"] for execution in confirmation["outstanding"]]) == (
        1,
        [begun[0], begun[2]],
    )
    assert confirm(db, *begun) == 2
    assert status_of(job_id)["confirmation"] == {"in_hand": 3, "confirmed": 3, "outstanding": []}


def test_twenty_of_those_outstanding_are_named_the_oldest_first(make_worked_job, stop, status_of):
    job_id, begun = make_worked_job(25)
    stop(job_id)

    confirmation = status_of(job_id)["confirmation"]
    assert (confirmation["in_hand"], [execution["id"] for execution in confirmation["outstanding"]]) == (25, begun[:20])


def test_confirmations_of_a_first_stop_do_not_count_for_the_second(db, service, make_worked_job, stop, status_of):
    job_id, first = make_worked_job(3)
    stop(job_id)
    confirm(db, *first[:2])
    service.execute("SELECT release_job(%s, 'mended', 'processing')", (job_id,))
    assert status_of(job_id)["confirmation"]["confirmed"] == 2

    add = "INSERT INTO executions (job_id, status, started_at) VALUES (%s, 'running', now()) RETURNING id"
    second = [db.execute(add, (job_id,)).fetchone()[0] for _ in range(2)]
    stop(job_id)
    assert status_of(job_id)["confirmation"]["in_hand"] == 2
    assert confirm(db, *first) == 1
    assert [execution["id"] for execution in status_of(job_id)["confirmation"]["outstanding"]] == second


def test_an_execution_that_is_gone_is_not_made_up_for_by_one_of_an_earlier_stop(db, service, make_worked_job, stop, status_of):
    job_id, _ = make_worked_job(3)
    stop(job_id)
    service.execute("SELECT release_job(%s, 'mended', 'processing')", (job_id,))
    db.execute("INSERT INTO executions (job_id, status, started_at) VALUES (%s, 'running', now())", (job_id,))
    stop(job_id)

    db.execute("DELETE FROM executions WHERE id = (SELECT max(id) FROM executions)")
    assert status_of(job_id)["confirmation"] == {"in_hand": 0, "confirmed": 0, "outstanding": []}


def test_nor_by_one_of_another_job_that_was_stopped_later(db, make_worked_job, stop, status_of):
    (before, _), (job_id, begun), (after, _) = (make_worked_job(2) for _ in range(3))
    for id in (job_id, before, after):
        stop(id)

    db.execute("DELETE FROM executions WHERE id = %s", (begun[0],))
    confirmation = status_of(job_id)["confirmation"]
    assert (confirmation["in_hand"], [execution["id"] for execution in confirmation["outstanding"]]) == (1, begun[1:])


@pytest.mark.parametrize(("status", "output"), [("failed", "{}"), ("completed", '{"emergency_stop": true}')])
def test_what_ends_after_the_stop_by_itself_is_not_in_hand(db, make_worked_job, stop, status_of, status, output):
    job_id, begun = make_worked_job(2)
    stop(job_id)
    db.execute(
        "INSERT INTO executions (job_id, status, output, started_at, completed_at)"
        " VALUES (%s, %s, %s, now(), clock_timestamp() + interval '1 second')",
        (job_id, status, output),
    )

    assert [execution["id"] for execution in status_of(job_id)["confirmation"]["outstanding"]] == begun


def test_a_stop_that_stopped_no_execution_has_nothing_outstanding(make_job, stop, status_of):
    job_id = make_job()
    stop(job_id)

    answer = status_of(job_id)
    assert answer["confirmation"] == {"in_hand": 0, "confirmed": 0, "outstanding": []}
    assert answer["active"] == NONE_ACTIVE


def test_columns_without_fractions_of_seconds_hide_no_execution(db, service, make_worked_job, stop, status_of):
    """They round the time of the stop, down as well as up."""
    db.execute("ALTER TABLE executions ALTER completed_at TYPE timestamp(0) USING completed_at AT TIME ZONE 'UTC'")
    service.execute("SET timezone = 'Asia/Tokyo'")
    jobs = [make_worked_job(1)[0] for _ in range(10)]

    def stop_at_another_fraction(number):
        tenth = "SELECT extract(milliseconds FROM clock_timestamp())::int / 100 %% 10 = %s"
        wait_until(lambda: db.execute(tenth, (number,)).fetchone()[0])
        stop(jobs[number])

    for number in range(10):
        stop_at_another_fraction(number)
    assert [status_of(job_id)["confirmation"]["in_hand"] for job_id in jobs] == [1] * 10


def test_a_trigger_that_sets_its_own_time_of_completion_hides_no_execution(db, service, make_worked_job, stop, status_of):
    """now() is the start of the stop's transaction, a little before the stop. Before, nothing was in hand."""
    db.execute("""
        CREATE FUNCTION set_time() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.completed_at := now(); RETURN NEW; END';
        CREATE TRIGGER set_time BEFORE UPDATE ON executions FOR EACH ROW WHEN (NEW.status = 'failed')
            EXECUTE FUNCTION set_time()""")
    job_id, ids = make_worked_job(3)
    stop(job_id)
    confirm(db, ids[0])

    assert status_of(job_id)["confirmation"]["in_hand"] == 3
    assert [each["id"] for each in status_of(job_id)["confirmation"]["outstanding"]] == ids[1:]
    service.execute("SELECT release_job(%s, 'fixed', 'processing')", (job_id,))
    db.execute("INSERT INTO executions (job_id, status, started_at) VALUES (%s, 'running', now())", (job_id,))
    stop(job_id)
    assert status_of(job_id)["confirmation"]["in_hand"] == 1


@pytest.mark.parametrize("table", ["jobs", "executions", "emergency_stops"])
def test_who_locks_a_whole_table_is_named(make_app, connect, make_job, table):
    """Before, the answer was that tables are locked, and nobody was named."""
    job_id, session = make_job(running=1), connect(autocommit=False)
    session.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")

    answer = Client(make_app())("GET", f"/admin/jobs/{job_id}/emergency-stop", HTTP_X_ADMIN_TOKEN=TOKEN)
    assert (answer.status, answer.json["error"], answer.json["job_id"]) == (503, "job is locked", job_id)
    assert [each["pid"] for each in answer.json["blocked_by"]] == [session.info.backend_pid]
    assert answer.json["hint"].endswith("cannot be looked at. A stop with force would end those who lock it.")


def test_of_a_job_with_a_long_history_few_executions_are_read(db, connect, make_worked_job, stop):
    """Neither its earlier ones nor the later ones of another job, with statistics of the time of a runaway."""
    (job_id, _), (runaway, _) = make_worked_job(3), make_worked_job(0)
    add = (
        "INSERT INTO executions (id, job_id, status, output, started_at, completed_at) SELECT n, %s, 'failed',"
        """ '{"emergency_stop": true}', now() - interval '1 h', now() - interval '1 h'"""
        " FROM generate_series(%s::bigint, %s) n"
    )
    db.execute("SET session_replication_role = replica")
    db.execute(add, (job_id, -2_000, 0))
    db.execute(add, (runaway, 1_000, 10_000))
    db.execute("RESET session_replication_role")
    stop(job_id)
    db.execute("VACUUM ANALYZE executions")
    session = connect(autocommit=False)
    read = "SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'executions'"

    assert session.execute(STATUS, (job_id,)).fetchone()[0]["confirmation"]["in_hand"] == 3
    assert session.execute(read).fetchone() == (0, 3)
