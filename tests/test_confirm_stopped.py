"""sql/35_confirm_stopped.sql: workers say which executions they have dropped after a stop."""

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from conftest import in_thread, is_waiting, wait_until

CONFIRM = "SELECT confirm_stopped(%s)"


@pytest.fixture
def worker_url(db, owner_url):
    """A worker's role, which reads and writes executions and may confirm."""
    db.execute("DO $$ BEGIN CREATE ROLE beacon_worker LOGIN PASSWORD 'worker-in-tests';EXCEPTION WHEN duplicate_object THEN END $$")
    db.execute("GRANT SELECT, INSERT, UPDATE ON executions TO beacon_worker")
    db.execute("GRANT EXECUTE ON FUNCTION confirm_stopped(bigint[]) TO beacon_worker")
    return make_conninfo(owner_url, user="beacon_worker", password="worker-in-tests")


@pytest.fixture
def worker(connect, worker_url):
    return connect(worker_url)


def ids_of(db, job_id):
    return [id for (id,) in db.execute("SELECT id FROM executions WHERE job_id = %s ORDER BY id", (job_id,))]


def confirm(session, *ids):
    return session.execute(CONFIRM, (list(ids),)).fetchone()[0]


def test_each_that_a_stop_failed_is_confirmed_once(db, make_job, stop, worker):
    job_id = make_job(running=3)
    db.execute("""UPDATE executions SET output = '{"so far": 1}'""")
    ids = ids_of(db, job_id)
    stop(job_id)

    assert confirm(worker, ids[0], ids[0], ids[1]) == 2
    first = db.execute("SELECT * FROM executions ORDER BY id").fetchall()
    output = db.execute("SELECT output FROM executions WHERE id = %s", (ids[0],)).fetchone()[0]
    now = db.execute("SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI')").fetchone()[0]
    assert output.pop("confirmed_at")[:14] == f"{now}:00Z"[:14]
    assert output == {"so far": 1, "error": "Emergency stop by admin", "emergency_stop": True}
    assert confirm(worker, ids[1]) == 0
    assert db.execute("SELECT * FROM executions ORDER BY id").fetchall() == first
    assert confirm(worker, *ids) == 1


def test_what_no_stop_failed_stays_as_it_is(db, make_job, worker):
    job_id = make_job(running=2, completed=2, failed=2)
    db.execute("""UPDATE executions SET output = '{"so far": 1}'""")
    db.execute("""UPDATE executions SET output = '{"emergency_stop": true}' WHERE status = 'completed'""")
    before = db.execute("SELECT * FROM executions ORDER BY id").fetchall()

    assert confirm(worker, *ids_of(db, job_id), 1_000_000) == 0
    assert worker.execute("SELECT confirm_stopped('{}'), confirm_stopped(NULL), confirm_stopped('{NULL}')").fetchone() == (0, 0, 0)
    assert db.execute("SELECT * FROM executions ORDER BY id").fetchall() == before


def test_a_late_report_is_refused_and_then_confirmed(db, make_job, stop, worker):
    job_id = make_job(running=1)
    stop(job_id)

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        worker.execute("UPDATE executions SET status = 'completed', output = '{}' WHERE job_id = %s", (job_id,))
    assert confirm(worker, *ids_of(db, job_id)) == 1
    assert db.execute("SELECT status FROM executions").fetchone() == ("failed",)


def test_what_is_confirmed_stays_failed_and_marked(db, make_job, stop, worker):
    job_id = make_job(running=1)
    stop(job_id)
    confirm(worker, *ids_of(db, job_id))

    for change in ("status = 'running'", "output = '{}'", "output = output - 'emergency_stop'"):
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            worker.execute(f"UPDATE executions SET {change} WHERE job_id = '{job_id}'")


def test_two_workers_that_confirm_the_same_in_opposite_orders_count_each_once(db, make_job, stop, connect, worker_url):
    job_id = make_job(running=4)
    ids = ids_of(db, job_id)
    stop(job_id)
    first, second = connect(worker_url, autocommit=False), connect(worker_url, autocommit=False)

    assert confirm(first, ids[3], ids[2], ids[1]) == 3
    with in_thread(lambda: confirm(second, *ids)) as waiting:
        wait_until(lambda: is_waiting(db, second))
        first.commit()
    assert waiting.result == 1


def test_while_it_waits_for_one_it_holds_none_of_a_higher_id(db, make_job, stop, connect, worker):
    job_id = make_job(running=3)
    ids = ids_of(db, job_id)
    stop(job_id)
    db.execute("UPDATE executions SET created_at = created_at WHERE id = %s", (ids[0],))  # now it is the last in the table
    worker.execute("SET enable_indexscan = off; SET enable_bitmapscan = off")
    holder = connect(autocommit=False)
    holder.execute("SELECT FROM executions WHERE id = %s FOR UPDATE", (ids[0],))

    with in_thread(lambda: confirm(worker, *ids)) as waiting:
        wait_until(lambda: is_waiting(db, worker))
        db.execute("SELECT FROM executions WHERE id = ANY (%s) FOR UPDATE NOWAIT", (ids[1:],))
        holder.rollback()
    assert waiting.result == 3


def test_the_wait_for_one_that_is_held_is_bounded_by_the_worker_s_lock_timeout(db, make_job, stop, connect, worker):
    job_id = make_job(running=1)
    stop(job_id)
    holder = connect(autocommit=False)
    holder.execute("UPDATE executions SET output = output || '{}'")
    worker.execute("SET lock_timeout = '50ms'")

    with pytest.raises(psycopg.errors.LockNotAvailable):
        confirm(worker, *ids_of(db, job_id))
    holder.rollback()
    assert confirm(worker, *ids_of(db, job_id)) == 1


def test_while_the_stop_is_not_committed_it_waits_for_the_stop(db, make_job, connect, worker):
    job_id = make_job(running=1)
    stopper = connect(autocommit=False)
    stopper.execute("SELECT emergency_stop_job(%s)", (job_id,))

    with in_thread(lambda: confirm(worker, *ids_of(db, job_id))) as waiting:
        wait_until(lambda: is_waiting(db, worker))
        stopper.commit()
    assert waiting.result == 1


def test_the_service_s_role_may_not_confirm_in_the_workers_place(service):
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        service.execute("SELECT confirm_stopped('{1}')")
