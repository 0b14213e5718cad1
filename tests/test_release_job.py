"""sql/36_release_job.sql: the one way back, on purpose, with a reason, on record."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import beacon_stop
import psycopg
import pytest

from conftest import change_function, in_thread, is_waiting, url_of, wait_until

RELEASE = "SELECT release_job(%s, %s, %s)"


@pytest.fixture
def release(service):
    def release(id, reason="mended", status="pending"):
        return service.execute(RELEASE, (id, reason, status)).fetchone()[0]

    return release


def test_the_job_goes_on_and_its_executions_stay_failed(db, make_job, stop, release):
    job_id = make_job(metadata={"owner": "me"}, running=2, completed=1)
    stop(job_id, "too many")
    executions = db.execute("SELECT * FROM executions ORDER BY id").fetchall()

    answer = release(job_id)
    status, metadata, updated_at, utc = db.execute(
        "SELECT status, metadata, updated_at > now() - interval '10 s',"
        " to_char(updated_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')"
        " FROM jobs"
    ).fetchone()
    assert list(answer) == ["ok", "message", "job_id", "previous_status", "new_status", "released_at", "reason"]
    assert answer == {
        "ok": True, "message": "Job released", "job_id": job_id, "previous_status": "failed", "new_status": "pending",
        "released_at": utc, "reason": "mended",
    }  # fmt: skip
    assert (status, updated_at) == ("pending", True)
    assert list(metadata) == ["owner", "reason", "stopped_at", "stopped_by"]
    assert db.execute("SELECT * FROM executions ORDER BY id").fetchall() == executions
    db.execute("INSERT INTO executions (job_id, status) VALUES (%s, 'running')", (job_id,))
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        db.execute("UPDATE executions SET status = 'running', output = '{}' WHERE status = 'failed'")
    assert stop(job_id)["executions_stopped"] == 1


def test_it_is_on_record(db, service, make_job, stop):
    job_id = make_job(running=2)
    stop(job_id)
    service.execute("SELECT release_job(%s, 'mended', 'paused', '{\"actor\": \"ann\"}')", (job_id,))

    columns = "action, job_id, previous_status, new_status, executions_stopped, sessions_ended, reason, caller, database_user"
    assert db.execute(f"SELECT {columns} FROM emergency_stops ORDER BY id DESC LIMIT 1").fetchone() == (
        "release", job_id, "failed", "paused", 0, 0, "mended", {"actor": "ann"}, "beacon_service",
    )  # fmt: skip
    assert db.execute("SELECT stopped_at = (SELECT updated_at FROM jobs) FROM emergency_stops ORDER BY id DESC LIMIT 1").fetchone() == (
        True,
    )


def test_what_is_not_stopped_is_not_released(db, make_job, stop, release):
    going_on, failed, released = make_job(), make_job(status="failed"), make_job(running=1)
    stop(released)
    release(released)
    before = db.execute("SELECT * FROM jobs").fetchall()

    assert release("unknown") == {"error": "job not found", "job_id": "unknown"}
    assert list(release(going_on)) == ["error", "job_id", "status"]
    assert release(going_on) == {"error": "job is not stopped", "job_id": going_on, "status": "processing"}
    assert release(failed) == {"error": "job is not stopped", "job_id": failed, "status": "failed"}
    assert release(released) == {"error": "job is not stopped", "job_id": released, "status": "pending"}
    assert db.execute("SELECT * FROM jobs").fetchall() == before
    assert db.execute("SELECT count(*) FROM emergency_stops").fetchone() == (2,)


def test_where_there_is_nothing_to_release_nobody_is_waited_for(make_job, connect, service, release):
    job_id, holder = make_job(), connect(autocommit=False)
    holder.execute("SELECT pg_advisory_xact_lock(job_barrier(id)) FROM jobs WHERE id = %s FOR UPDATE", (job_id,))
    service.execute("SET lock_timeout = '100ms'")

    assert release(job_id)["error"] == "job is not stopped"


@pytest.mark.parametrize("metadata", [None, {"owner": "me"}, [1, 2], "text"])
def test_a_job_that_failed_by_itself_and_was_stopped_then_is_released(db, make_job, stop, release, metadata):
    job_id = make_job(status="failed", metadata=metadata)
    assert stop(job_id)["action"] == "none"

    assert release(job_id)["previous_status"] == "failed"
    assert db.execute("SELECT status, metadata FROM jobs").fetchone() == ("pending", metadata)


def test_a_job_that_only_has_the_mark_is_released(db, make_job, release):
    job_id = make_job(status="completed", metadata={"emergency_stop": True, "owner": "me"})

    assert release(job_id, status="completed")["new_status"] == "completed"
    assert db.execute("SELECT status, metadata FROM jobs").fetchone() == ("completed", {"owner": "me"})


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (None, "pending"),
        ("", "pending"),
        ("  ", "pending"),
        ("x" * 1001, "pending"),
        ("r", None),
        ("r", ""),
        ("r", "x" * 256),
        ("r", "failed"),
    ],
)
def test_without_a_reason_or_a_state_to_go_on_in_it_is_refused(db, make_job, stop, release, reason, status):
    job_id = make_job(running=1)
    stop(job_id)

    with pytest.raises(psycopg.errors.InvalidParameterValue, match="expected"):
        release(job_id, reason, status)
    assert db.execute("SELECT status FROM jobs").fetchone() == ("failed",)


def test_a_state_that_the_column_cannot_hold_is_refused(db, make_job, stop, release):
    job_id = make_job(running=1)
    stop(job_id)
    db.execute("DROP TRIGGER guard_updated_job ON jobs; ALTER TABLE jobs ALTER status TYPE varchar(12)")

    with pytest.raises(psycopg.errors.InvalidParameterValue, match="status has 13 characters: expected what"):
        release(job_id, status="x" * 13)
    assert release(job_id, status="x" * 12)["new_status"] == "x" * 12


def test_a_caller_that_is_no_object_is_refused(make_job, stop, service):
    job_id = make_job(running=1)
    stop(job_id)

    with pytest.raises(psycopg.errors.InvalidParameterValue, match="caller"):
        service.execute("SELECT release_job(%s, 'mended', 'pending', '[1]')", (job_id,))


@pytest.mark.parametrize(("reason", "status"), [("x", "y"), ("x" * 1000, "y" * 255)])
def test_the_shortest_and_the_longest_reason_and_state_do(make_job, stop, release, reason, status):
    job_id = make_job(running=1)
    stop(job_id)

    answer = release(job_id, reason, status)
    assert (answer["reason"], answer["new_status"]) == (reason, status)


def test_above_read_committed_and_in_a_read_only_transaction_it_is_refused(make_job, stop, service):
    job_id = make_job(running=1)
    stop(job_id)

    service.execute("SET default_transaction_isolation = 'repeatable read'")
    with pytest.raises(psycopg.errors.InvalidTransactionState):
        service.execute(RELEASE, (job_id, "mended", "pending"))
    service.execute("RESET default_transaction_isolation; SET default_transaction_read_only = on")
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        service.execute(RELEASE, (job_id, "mended", "pending"))


def test_a_job_that_row_level_security_hides_is_an_error_and_not_called_unknown(db, make_job, stop, release):
    """The function belongs to a role that is no superuser and does not own the table."""
    job_id = make_job(running=1)
    stop(job_id)
    with suppress(psycopg.errors.DuplicateObject):
        db.execute("CREATE ROLE beacon_weak_owner")
    db.execute("""
        GRANT ALL ON SCHEMA public TO beacon_weak_owner;
        GRANT ALL ON ALL TABLES IN SCHEMA public TO beacon_weak_owner;
        GRANT ALL ON ALL FUNCTIONS IN SCHEMA public TO beacon_weak_owner;
        ALTER FUNCTION release_job OWNER TO beacon_weak_owner;
        ALTER TABLE jobs ENABLE ROW LEVEL SECURITY""")

    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
        release(job_id)
    db.execute("ALTER TABLE jobs DISABLE ROW LEVEL SECURITY")
    assert release(job_id)["ok"]


@pytest.mark.parametrize("hold", ["UPDATE jobs SET updated_at = now()", "SELECT FROM jobs FOR SHARE", "LOCK TABLE jobs IN SHARE MODE"])
def test_those_who_hold_the_job_are_named_after_one_lock_timeout(db, make_job, stop, connect, service, release, hold):
    job_id = make_job(running=1)
    stop(job_id)
    holder = connect(autocommit=False, application_name="a worker")
    holder.execute(hold)
    service.execute("SET lock_timeout = '200ms'")

    with pytest.raises(psycopg.errors.LockNotAvailable, match=f"job '{job_id}' is locked") as error:
        release(job_id)
    (named,) = json.loads(error.value.diag.message_detail)
    assert (named["pid"], named["application_name"]) == (holder.info.backend_pid, "a worker")
    assert list(named) == ["pid", "application_name", "database_user", "state", "transaction_seconds", "query"]
    assert service.execute("SHOW lock_timeout").fetchone() == ("200ms",)
    assert db.execute("SELECT status FROM jobs").fetchone() == ("failed",)
    holder.rollback()
    assert release(job_id)["ok"]


def test_what_a_trigger_waits_for_is_not_waited_for_without_end(db, connect, make_job, stop, service, release):
    job_id = make_job(running=1)
    stop(job_id)
    change_function(db, "release_job", "'10s'", "'300ms'")
    db.execute("""
        CREATE TABLE notes (id int);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO notes VALUES (1); RETURN NULL; END $$;
        CREATE TRIGGER note AFTER UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION note()""")
    connect(autocommit=False).execute("LOCK TABLE notes")

    service.execute("SET lock_timeout = 0")
    with pytest.raises(psycopg.errors.LockNotAvailable):
        release(job_id)
    assert service.execute("SHOW lock_timeout").fetchone() == ("0",)


def test_the_permission_that_has_ended_is_no_permission_for_a_job_whose_id_is_empty(db, make_job, stop, connect):
    """An existing table may have such a one. Once it was used, PostgreSQL shows a setting that is not set as empty."""
    for (name,) in db.execute("SELECT conname FROM pg_constraint WHERE conrelid = 'jobs'::regclass AND contype = 'c'").fetchall():
        db.execute(f"ALTER TABLE jobs DROP CONSTRAINT {name}")
    empty, other = make_job("", running=1), make_job(running=1)
    db.execute("CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$")
    db.execute("CREATE TRIGGER watch AFTER UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION watch()")
    session = connect()
    for job_id in (empty, other):
        session.execute("SELECT emergency_stop_job(%s)", (job_id,))
    session.execute(RELEASE, (other, "mended", "pending"))

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="by an emergency stop and stays so"):
        session.execute("UPDATE jobs SET status = 'processing', metadata = NULL WHERE id = ''")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="no execution of it may start"):
        session.execute("INSERT INTO executions (job_id) VALUES ('')")


@pytest.mark.parametrize("metadata", ['["emergency_stop"]', '"emergency_stop"'])
def test_metadata_that_only_has_the_word_keeps_no_job_from_being_released(db, make_job, stop, release, metadata):
    job_id = make_job(status="failed")
    db.execute("UPDATE jobs SET metadata = %s", (metadata,))
    stop(job_id)

    assert release(job_id)["new_status"] == "pending"


def test_it_waits_for_lock_timeout_or_ten_seconds_where_that_is_0(db, service, release):
    db.execute("""
        CREATE OR REPLACE FUNCTION lock_stopped_job(id text, asked_id text, deadline timestamptz)
        RETURNS json LANGUAGE plpgsql AS $$ BEGIN
            RETURN json_build_object('seconds', extract(epoch FROM deadline - clock_timestamp())); END $$""")

    for lock_timeout, seconds in (("0", 10), ("4s", 4)):
        service.execute("SELECT set_config('lock_timeout', %s, false)", (lock_timeout,))
        assert seconds - 2 < release("a")["seconds"] <= seconds


def test_already_the_first_look_does_not_wait_for_ever(db, make_job, stop, connect, service, release):
    """As in a session that has no lock_timeout, while another one changes the table."""
    job_id, session = make_job(running=1), connect(autocommit=False)
    stop(job_id)
    session.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
    change_function(db, "release_job", "'10s'", "'100ms'")
    service.execute("SET statement_timeout = '5s'")

    with pytest.raises(psycopg.errors.LockNotAvailable, match="is locked") as error:
        release(job_id)
    assert [each["pid"] for each in json.loads(error.value.diag.message_detail)] == [session.info.backend_pid]


def test_if_the_barrier_took_all_the_time_no_other_lock_is_waited_for(db, make_job, stop, service, release):
    job_id = make_job(running=1)
    stop(job_id)
    change_function(db, "wait_for_barrier", "PERFORM pg_advisory_xact_lock(barrier)", "PERFORM pg_sleep(0.15)")
    service.execute("SET lock_timeout = '100ms'")

    with pytest.raises(psycopg.errors.LockNotAvailable, match="is locked"):
        release(job_id)
    assert db.execute("SELECT status FROM jobs").fetchone() == ("failed",)


@pytest.mark.parametrize("hold", ["SELECT pg_advisory_xact_lock_shared(job_barrier(%s))", "SELECT FROM jobs WHERE id = %s FOR UPDATE"])
def test_who_holds_the_job_and_waits_for_the_same_transaction_is_named(db, make_job, stop, connect, hold):
    """A deadlock, which PostgreSQL would end by an error of one of them that says nothing of the job."""
    job_id = make_job(running=1)
    stop(job_id)
    settings = "-c statement_timeout=20s -c lock_timeout={} -c deadlock_timeout={}"
    operator = connect(autocommit=False, options=settings.format("300ms", "10ms"))
    worker = connect(autocommit=False, options=settings.format("0", "1min"))
    operator.execute("SELECT pg_advisory_xact_lock(1)")
    worker.execute(hold, (job_id,))

    with in_thread(worker.execute, "SELECT pg_advisory_xact_lock(1)"):
        try:
            wait_until(lambda: is_waiting(db, worker))
            with pytest.raises(psycopg.errors.LockNotAvailable, match="is locked") as error:
                operator.execute(RELEASE, (job_id, "mended", "pending"))
        finally:
            operator.rollback()
    assert [each["pid"] for each in json.loads(error.value.diag.message_detail)] == [worker.info.backend_pid]


def test_a_release_that_is_not_committed_is_named_to_a_stop(db, make_job, stop, connect, service, service_url):
    """Also while its session is busy with something else."""
    job_id = make_job(running=1)
    stop(job_id)
    operator, other = connect(service_url, autocommit=False), connect()
    operator.execute(RELEASE, (job_id, "mended", "pending"))
    blockers = "SELECT pid FROM emergency_stop_blockers(%s)"
    assert service.execute(blockers, (job_id,)).fetchall() == [(operator.info.backend_pid,)]
    assert operator.execute("SHOW lock_timeout").fetchone() == ("0",)

    other.execute("SELECT pg_advisory_lock(1)")
    with in_thread(operator.execute, "SELECT pg_advisory_xact_lock(1)"):
        wait_until(lambda: is_waiting(db, operator))
        assert service.execute(blockers, (job_id,)).fetchall() == [(operator.info.backend_pid,)]
        other.execute("SELECT pg_advisory_unlock(1)")


def test_of_two_at_once_one_releases_the_job(db, make_job, stop, connect, service_url):
    job_id = make_job(running=1)
    stop(job_id)
    first, second = connect(service_url, autocommit=False), connect(service_url)

    assert first.execute(RELEASE, (job_id, "mended", "pending")).fetchone()[0]["ok"]
    with in_thread(lambda: second.execute(RELEASE, (job_id, "mended", "paused")).fetchone()[0]) as waiting:
        wait_until(lambda: is_waiting(db, second))
        first.commit()
    assert waiting.result == {"error": "job is not stopped", "job_id": job_id, "status": "pending"}
    assert db.execute("SELECT count(*) FROM emergency_stops WHERE action = 'release'").fetchone() == (1,)


def test_the_permission_ends_with_the_release_even_in_its_transaction(make_job, stop, connect):
    job_id = make_job(running=1)
    stop(job_id)
    owner = connect(autocommit=False)
    owner.execute(RELEASE, (job_id, "mended", "pending"))
    owner.execute("SELECT emergency_stop_job(%s)", (job_id,))

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        owner.execute("UPDATE jobs SET status = 'pending', metadata = '{}' WHERE id = %s", (job_id,))


@pytest.mark.parametrize(
    "body",
    [
        "RETURN NULL",
        "NEW.status := OLD.status; RETURN NEW",
        "NEW.status := NULL; RETURN NEW",
        "NEW.metadata := OLD.metadata; RETURN NEW",
    ],
)
def test_a_trigger_that_undoes_the_release_makes_it_fail(db, make_job, stop, release, body):
    job_id = make_job(running=1)
    stop(job_id)
    db.execute("ALTER TABLE jobs ALTER status DROP NOT NULL")  # as in a table from before the installation
    db.execute(f"""
        CREATE FUNCTION undo() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; END $$;
        CREATE TRIGGER undo BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION undo()""")

    with pytest.raises(psycopg.errors.TriggeredDataChangeViolation, match="was not released") as error:
        release(job_id)
    assert error.value.diag.message_detail.startswith("Its status is ")
    assert db.execute("SELECT count(*) FROM emergency_stops WHERE action = 'release'").fetchone() == (0,)


def test_it_leaves_the_settings_of_its_session_as_they_are(service, make_job, stop, release):
    """Also those of a release whose trigger has called this one."""
    job_id = make_job(running=1)
    stop(job_id)
    settings = "SELECT current_setting('lock_timeout'), current_setting('beacon_stop.releasing')"
    service.execute("SET lock_timeout = '3s'; SET beacon_stop.releasing = 'another'")

    with service.transaction():
        service.execute("SET LOCAL lock_timeout = '5s'; SET LOCAL beacon_stop.releasing = 'a third'")
        release(job_id)
        assert service.execute(settings).fetchone() == ("5s", "a third")
    assert service.execute(settings).fetchone() == ("3s", "another")


def test_a_column_without_a_time_zone_has_the_installers_time_whatever_the_session_says(bare_database, server_url, connect):
    url = url_of(bare_database, server_url)
    db, session = connect(url), connect(url)
    db.execute("CREATE TABLE jobs (id text PRIMARY KEY, status text, updated_at timestamp)")
    beacon_stop.init_db(url)
    db.execute("INSERT INTO jobs (id, status) VALUES ('a', 'processing')")
    session.execute("SET timezone = 'Asia/Tokyo'")
    session.execute("SELECT emergency_stop_job('a')")
    session.execute(RELEASE, ("a", "mended", "pending"))

    off = "SELECT abs(extract(epoch FROM updated_at - localtimestamp)) < 60 FROM jobs"
    assert db.execute(off).fetchone() == (True,)


def test_it_waits_for_the_disk_although_the_session_does_not(make_job, stop, connect, service_url):
    job_id = make_job(running=1)
    stop(job_id)
    operator = connect(service_url, autocommit=False)
    operator.execute("SET synchronous_commit = off")

    operator.execute(RELEASE, (job_id, "mended", "pending"))
    assert operator.execute("SHOW synchronous_commit").fetchone() == ("on",)


def test_a_flood_of_sharers_does_not_starve_it(db, make_job, stop, connect, release):
    """Careful workers lock the job FOR SHARE before they insert."""
    job_id = make_job(running=1)
    stop(job_id)
    sessions = [connect(autocommit=False) for _ in range(8)]
    over = []

    def share(session):
        while not over:
            session.execute("SELECT FROM jobs WHERE id = %s FOR SHARE", (job_id,))
            session.execute("SELECT pg_sleep(0.002)")
            session.rollback()

    with (
        in_thread(share, sessions[0]),
        in_thread(share, sessions[1]),
        in_thread(share, sessions[2]),
        in_thread(share, sessions[3]),
    ):
        try:
            answer = release(job_id)
        finally:
            over.append(True)
    assert answer["ok"]


def test_releases_beside_each_other_that_all_have_to_lock_the_table(connect, make_job, stop, service_url):
    """Sessions share the rows for a moment. Of six releases up to four failed at once, each being in a deadlock with another."""
    jobs, ended = [make_job() for _ in range(6)], threading.Event()
    for job_id in jobs:
        stop(job_id)
    sharers = [connect(autocommit=False) for _ in range(12)]

    def share(session, job_id):
        while not ended.is_set():
            session.execute("SELECT FROM jobs WHERE id = %s FOR SHARE", (job_id,))
            ended.wait(0.005)
            session.commit()

    with ThreadPoolExecutor(len(sharers) + len(jobs)) as threads:
        sharing = [threads.submit(share, session, jobs[number % 6]) for number, session in enumerate(sharers)]
        try:
            ended.wait(0.1)
            sessions = [connect(service_url, options="-c lock_timeout=10s") for _ in jobs]
            calls = [
                threads.submit(session.execute, RELEASE, (job_id, "mended", "pending"))
                for session, job_id in zip(sessions, jobs, strict=True)
            ]
            answers = [call.result().fetchone()[0] for call in calls]
        finally:
            ended.set()
    assert [answer.get("ok") for answer in answers] == [True] * 6
    assert all(call.exception() is None for call in sharing)


def test_a_worker_that_has_locked_the_job_and_asks_for_the_barrier_gives_way_to_the_release_at_once(connect, db, make_job, stop, service):
    """With 24 such workers, each of whom kept the row for 50 ms at the barrier, the release got no turn within 2 s."""
    job_id, worker = make_job(), connect(autocommit=False)
    stop(job_id)
    change_function(db, "admit_execution", "'50ms'", "'1h'")
    worker.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (job_id,))
    service.execute("SET lock_timeout = '15s'")

    with in_thread(service.execute, RELEASE, (job_id, "mended", "pending")):
        wait_until(lambda: is_waiting(db, service))
        with pytest.raises(psycopg.errors.SerializationFailure, match="is under way"):
            worker.execute("INSERT INTO executions (job_id) VALUES (%s)", (job_id,))
        worker.rollback()
    assert db.execute("SELECT status FROM jobs").fetchone() == ("pending",)
