"""sql/50_list_executions.sql."""

import pytest


@pytest.fixture
def ids(service):
    def ids(*arguments, **named):
        names = "".join(f", {name} => %s" for name in named)
        query = f"SELECT id FROM list_executions(%s{names})"
        return [row[0] for row in service.execute(query, (*arguments, *named.values()))]

    return ids


def test_all_of_a_job_in_id_order(db, service, make_job, ids):
    make_job(running=3)
    job_id = make_job(running=2, completed=2)
    db.execute("UPDATE executions SET started_at = '2025-01-01 00:00:00+00', output = '{\"x\": 1}' WHERE id = 4")

    assert ids(job_id) == [4, 5, 6, 7]
    first = service.execute("SELECT execution FROM list_executions(%s)", (job_id,)).fetchone()[0]
    assert list(first) == ["id", "job_id", "status", "output", "created_at", "started_at", "completed_at"]
    assert (first["id"], first["job_id"], first["status"], first["output"]) == (4, job_id, "running", {"x": 1})
    assert (first["started_at"], first["completed_at"]) == ("2025-01-01T00:00:00.000000Z", None)


def test_selected_by_status_and_id_and_number(make_job, ids):
    job_id = make_job(running=5, completed=5)

    assert ids(job_id, status="completed") == [6, 7, 8, 9, 10]
    assert ids(job_id, after=8) == [9, 10]
    assert ids(job_id, max_rows=3) == [1, 2, 3]
    assert ids(job_id, status="running", after=2, max_rows=2) == [3, 4]
    assert ids(job_id, status="no such") == ids("nix") == []


def test_a_page_ends_with_the_row_that_reaches_its_bytes(db, make_job, ids):
    job_id = make_job(running=5)
    db.execute("UPDATE executions SET output = jsonb_build_object('x', repeat('y', 1000))")

    assert ids(job_id, max_bytes=1) == [1]
    assert ids(job_id, max_bytes=2_000) == [1, 2]
    assert ids(job_id, max_bytes=1_000_000) == [1, 2, 3, 4, 5]


def test_a_page_is_read_by_index(db, connect, make_job):
    """With statistics of the time of a runaway: no other job has executions."""
    make_job("runaway", completed=20_000)
    db.execute("VACUUM ANALYZE executions")
    job_id = make_job(running=20)

    for after in (None, 20_010):
        session = connect(autocommit=False)
        session.execute("SELECT FROM list_executions(%s, after => %s, max_rows => 10)", (job_id, after))
        read = "SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'executions'"
        assert session.execute(read).fetchone() == (0, 10)
