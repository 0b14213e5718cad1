"""sql/50_list_executions.sql. Ids of other types than bigint are in test_tables.py."""

import psycopg
import pytest


@pytest.fixture
def ids(service):
    def ids(*arguments, **named):
        names = "".join(f", {name} => %s" for name in named)
        query = f"SELECT id FROM list_executions(%s{names})"
        return [int(row[0]) for row in service.execute(query, (*arguments, *named.values()))]

    return ids


def test_all_of_a_job_in_id_order(db, service, make_job, ids):
    make_job(running=3)
    job_id = make_job(running=2, completed=2)
    make_job(running=3)
    db.execute("UPDATE executions SET started_at = '2025-01-01 00:00:00+00', output = '{\"x\": 1}' WHERE id = 4")

    assert ids(job_id) == [4, 5, 6, 7]
    first = service.execute("SELECT execution FROM list_executions(%s)", (job_id,)).fetchone()[0]
    assert list(first) == ["id", "job_id", "status", "output", "created_at", "started_at", "completed_at"]
    assert (first["id"], first["job_id"], first["status"], first["output"]) == (4, job_id, "running", {"x": 1})
    assert (first["started_at"], first["completed_at"]) == ("2025-01-01T00:00:00.000000Z", None)


def test_selected_by_status_and_id_and_number(make_job, ids):
    job_id = make_job(running=5, completed=5)

    assert ids(job_id, status="completed") == [6, 7, 8, 9, 10]
    assert ids(job_id, after="8") == [9, 10]
    assert ids(job_id, max_rows=3) == [1, 2, 3]
    assert ids(job_id, status="running", after="2", max_rows=2) == [3, 4]
    assert ids(job_id, status="no such") == ids("nix") == []


def test_a_page_ends_with_the_row_that_reaches_its_bytes(db, service, make_job, ids):
    job_id = make_job(running=5)
    db.execute("UPDATE executions SET output = jsonb_build_object('x', repeat('\u00e9', 1000))")
    first = "SELECT octet_length(execution::text) FROM list_executions(%s, max_rows => 1)"
    (size,) = service.execute(first, (job_id,)).fetchone()

    assert ids(job_id, max_bytes=1) == ids(job_id, max_bytes=size) == [1]
    assert ids(job_id, max_bytes=size + 1) == ids(job_id, max_bytes=2 * size - 1) == [1, 2]
    assert ids(job_id, max_bytes=1_000_000) == [1, 2, 3, 4, 5]


def test_a_page_is_read_by_index(db, connect, make_job):
    """With statistics of the time of a runaway: no other job has executions."""
    make_job("runaway", completed=20_000)
    db.execute("VACUUM ANALYZE executions")
    job_id = make_job(running=20)

    for after in (None, "20010"):
        session = connect(autocommit=False)
        session.execute("SELECT FROM list_executions(%s, after => %s, max_rows => 10)", (job_id, after))
        read = "SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'executions'"
        sequentially, by_index = session.execute(read).fetchone()
        assert sequentially == 0
        assert by_index <= 11, "the page, and without after the first one to know where it begins"


def test_pages_of_a_large_job_are_read_by_index_however_often_they_are_asked_for(db, connect, make_job):
    """PostgreSQL plans the first five calls anew. The plan for all later ones must not read what is before a page."""
    job_id = make_job(running=5_000)
    db.execute("VACUUM ANALYZE executions")
    session = connect(autocommit=False)
    read = "SELECT idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'executions'"

    for _ in range(12):
        session.execute("SELECT FROM list_executions(%s, after => '4900', max_rows => 10)", (job_id,))
    assert session.execute(read).fetchone()[0] <= 12 * 11


@pytest.mark.parametrize("after", ["", "x", "1.5", "9223372036854775808"])
def test_after_that_is_no_id_is_refused(service, make_job, after):
    make_job("a", running=1)

    with pytest.raises(psycopg.errors.InvalidParameterValue) as refused:
        service.execute("SELECT FROM list_executions('a', after => %s)", (after,))
    assert refused.value.diag.message_primary == f"after is '{after}': expected the id of an execution, of type bigint"
