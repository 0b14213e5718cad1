"""sql/37_runaway_jobs.sql: which job it is, at a cost that the size of the tables has no part in."""

import psycopg
import pytest

from conftest import change_function, wait_until

READ = """
    SELECT COALESCE(sum(seq_tup_read + idx_tup_fetch), 0)::int
    FROM pg_stat_xact_user_tables WHERE relname = 'executions'"""


@pytest.fixture
def runaways(service):
    def runaways(minutes=5, max_jobs=20):
        return service.execute("SELECT runaway_jobs(%s, %s)", (minutes, max_jobs)).fetchone()[0]

    return runaways


def add(db, job_id, count, minutes_ago=0, status="completed"):
    """Executions as they are after a while: the guard, which forbids nothing here, is left out for speed."""
    db.execute("SET session_replication_role = replica")
    db.execute(
        "INSERT INTO executions (job_id, status, created_at) SELECT %s, %s, now() - make_interval(mins => %s) FROM generate_series(1, %s)",
        (job_id, status, minutes_ago, count),
    )
    db.execute("RESET session_replication_role")


def test_the_job_that_starts_most_comes_first_then_the_one_with_most_active(db, make_job, runaways):
    few, many, waiting, old = make_job("few"), make_job("many"), make_job("waiting"), make_job("old")
    add(db, old, 50, minutes_ago=60)
    add(db, waiting, 30, minutes_ago=60, status="pending")
    add(db, few, 2, status="running")
    add(db, many, 12)
    add(db, many, 8, minutes_ago=2, status="processing")

    answer = runaways()
    assert list(answer) == ["minutes", "jobs", "truncated"]
    assert (answer["minutes"], answer["truncated"]) == (5, False)
    assert [list(job.values())[:5] for job in answer["jobs"]] == [
        ["many", "processing", 20, 4, 8],
        ["few", "processing", 2, 0.4, 2],
        ["waiting", "processing", 0, 0, 30],
    ]
    assert list(answer["jobs"][0]) == ["job_id", "status", "started", "per_minute", "active", "oldest_active_at"]
    oldest = """
        SELECT to_char(min(created_at) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
        FROM executions WHERE job_id = %s AND status = %s"""
    assert answer["jobs"][0]["oldest_active_at"] == db.execute(oldest, ("many", "processing")).fetchone()[0]
    assert [job["job_id"] for job in runaways(minutes=1)["jobs"]] == ["many", "few", "waiting"]
    assert runaways(minutes=1)["jobs"][0]["started"] == 12


def test_a_job_that_was_stopped_shows_that_it_was(make_job, stop, runaways):
    job_id = make_job(running=3)
    stop(job_id)

    (job,) = runaways()["jobs"]
    assert (job["status"], job["started"], job["active"], job["oldest_active_at"]) == ("failed", 3, 0, None)


def test_without_any_execution_there_is_none(runaways):
    assert runaways() == {"minutes": 5, "jobs": [], "truncated": False}


def test_executions_in_other_states_are_started_but_not_active(make_job, runaways):
    make_job(queued=3, running=1)

    (job,) = runaways()["jobs"]
    assert (job["started"], job["active"]) == (4, 1)


def test_more_jobs_than_asked_for_are_cut_off_and_that_is_said(db, make_job, service, runaways):
    add(db, make_job("waiting"), 9, minutes_ago=60, status="pending")
    for count in (1, 5, 3, 2, 4):
        make_job(f"job-{count}", running=count)

    answer = runaways(max_jobs=2)
    assert ([job["job_id"] for job in answer["jobs"]], answer["truncated"]) == (["job-5", "job-4"], True)
    assert runaways(max_jobs=6)["truncated"] is False
    service.execute("SET enable_nestloop = off; SET enable_hashjoin = off")  # so that jobs are met in another order
    assert runaways(max_jobs=2) == answer


def test_one_execution_that_has_started_or_is_active_is_enough_and_any_other_is_not(db, make_job, runaways):
    add(db, make_job("started"), 1)
    for job_id, status in {"active": "running", "queued": "queued", "ended": "completed"}.items():
        add(db, make_job(job_id), 1, minutes_ago=60, status=status)

    assert [(job["job_id"], job["started"], job["active"]) for job in runaways()["jobs"]] == [
        ("started", 1, 0),
        ("active", 0, 1),
    ]
    assert [runaways(max_jobs=number)["truncated"] for number in (1, 2)] == [True, False]
    assert [job["per_minute"] for job in runaways(minutes=3)["jobs"]] == [0.3, 0]


def test_all_of_many_new_executions_are_counted_among_more_old_ones(db, make_job, runaways):
    add(db, make_job("old"), 20_000, minutes_ago=60)
    add(db, make_job("runaway"), 30_000)

    # On a machine that is busy it may read fewer at first, and says so.
    answer = wait_until(lambda: not (answer := runaways())["truncated"] and answer)
    assert [(job["job_id"], job["started"]) for job in answer["jobs"]] == [("runaway", 30_000)]


def test_all_of_many_active_ones_are_counted_although_none_is_new(db, make_job, runaways):
    add(db, make_job("a"), 3_000, minutes_ago=60, status="pending")
    change_function(db, "runaway_jobs", "'300 ms'", "'60 s'")  # on a machine that is busy

    answer = runaways()
    assert ([(job["started"], job["active"]) for job in answer["jobs"]], answer["truncated"]) == ([(0, 3_000)], False)


@pytest.mark.parametrize("has_index", [True, False])
def test_beyond_a_hundred_thousand_it_says_that_there_are_more(db, make_job, runaways, has_index):
    if has_index:
        db.execute("CREATE INDEX executions_created_at ON executions (created_at)")
    add(db, make_job("a"), 30_000, status="pending")
    add(db, make_job("b"), 90_000, status="pending")
    db.execute("VACUUM ANALYZE executions")

    answer = runaways()
    first = answer["jobs"][0]
    assert (first["job_id"], answer["truncated"]) == ("b", True)
    assert 1_000 <= first["started"] <= 90_000
    assert 100 <= first["active"] <= 90_000


def test_what_is_active_in_a_job_listed_is_counted_although_others_have_more_than_it_looks_at(db, make_job, runaways):
    add(db, make_job("a"), 100_001, minutes_ago=60, status="pending")
    add(db, make_job("b"), 50, status="running")
    db.execute("VACUUM ANALYZE executions")
    change_function(db, "runaway_jobs", "'300 ms'", "'60 s'")  # it ends before, whatever is left

    answer = runaways()
    first = answer["jobs"][0]
    assert (first["job_id"], first["started"], first["active"], answer["truncated"]) == ("b", 50, 50, True)
    assert first["oldest_active_at"] is not None


def test_an_index_on_the_time_finds_what_the_order_of_the_ids_hides(db, make_job, runaways):
    db.execute("CREATE INDEX executions_created_at ON executions (created_at)")
    add(db, make_job("hidden"), 3)
    add(db, make_job("old"), 2_000, minutes_ago=60)

    assert [(job["job_id"], job["started"]) for job in runaways()["jobs"]] == [("hidden", 3)]


@pytest.mark.parametrize(
    "statements",
    [
        "ALTER TABLE executions DROP CONSTRAINT executions_pkey",
        "ALTER TABLE executions DROP CONSTRAINT executions_pkey; CREATE INDEX ON executions USING hash (created_at)",
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'executions_pkey'::regclass",
        "ALTER TABLE executions ALTER id DROP IDENTITY; ALTER TABLE executions ALTER id TYPE text",
    ],
    ids=["none", "without an order", "invalid", "on ids that do not ascend"],
)
def test_without_any_index_that_tells_it_knows_what_has_not_ended(db, make_job, runaways, statements):
    job_id = make_job(running=3, completed=4)
    add(db, make_job("old"), 5, minutes_ago=60, status="running")
    db.execute(statements)

    answer = runaways()
    assert [(job["job_id"], job["started"], job["active"]) for job in answer["jobs"]] == [(job_id, 3, 3), ("old", 0, 5)]
    assert answer["truncated"] is True


def test_where_the_latest_have_no_time_it_does_not_say_that_there_is_nothing(db, make_job, runaways):
    """As where the column was added without a default: the rows that come after that have no time either."""
    db.execute("ALTER TABLE executions ALTER created_at DROP DEFAULT, ALTER created_at DROP NOT NULL")
    make_job(completed=3)

    assert runaways() == {"minutes": 5, "jobs": [], "truncated": True}
    db.execute("UPDATE executions SET created_at = now()")
    assert [job["started"] for job in runaways()["jobs"]] == [3]
    assert runaways()["truncated"] is False


@pytest.mark.parametrize("type", ["bigint", "int", "smallint"])
def test_ids_that_ascend_tell_of_whatever_type_they_are(db, make_job, runaways, type):
    job_id = make_job(running=3, completed=4)
    db.execute(f"ALTER TABLE executions ALTER id TYPE {type}")

    answer = runaways()
    assert ([(job["job_id"], job["started"]) for job in answer["jobs"]], answer["truncated"]) == ([(job_id, 7)], False)


def test_without_arguments_it_looks_for_twenty_jobs_in_the_last_five_minutes(db, make_job, service):
    for number in range(21):
        make_job(f"job-{number}", running=1)

    answer = service.execute("SELECT runaway_jobs()").fetchone()[0]
    assert (answer["minutes"], len(answer["jobs"]), answer["truncated"]) == (5, 20, True)


def test_columns_without_a_time_zone_are_in_that_of_the_installation(db, make_job, service, runaways):
    db.execute("ALTER TABLE executions ALTER created_at TYPE timestamp USING created_at AT TIME ZONE 'UTC'")
    job_id = make_job(running=1)
    db.execute("UPDATE executions SET created_at = now() AT TIME ZONE 'UTC'")
    service.execute("SET timezone = 'Asia/Tokyo'")

    (job,) = runaways()["jobs"]
    created_at = db.execute('SELECT to_char(created_at, \'YYYY-MM-DD"T"HH24:MI:SS"Z"\') FROM executions').fetchone()[0]
    assert (job["job_id"], job["started"], job["oldest_active_at"]) == (job_id, 1, created_at)


@pytest.mark.parametrize("has_index", [True, False])
def test_when_its_time_is_over_it_has_read_the_latest_thousand_and_a_thousand_active(db, connect, make_job, has_index):
    if has_index:
        db.execute("CREATE INDEX executions_created_at ON executions (created_at)")
    add(db, make_job("early"), 5_000, minutes_ago=2, status="pending")
    add(db, make_job("late"), 600, status="running")
    add(db, make_job("last"), 570)
    for status in ("pending", "running", "processing"):
        add(db, "last", 10, status=status)
    db.execute("VACUUM ANALYZE executions")
    change_function(db, "runaway_jobs", "'300 ms'", "'0 ms'")
    session = connect(autocommit=False)

    answer = session.execute("SELECT runaway_jobs()").fetchone()[0]
    assert [(job["job_id"], job["started"], job["active"]) for job in answer["jobs"]] == [
        ("last", 600, 30),
        ("late", 400, 100),
        ("early", 0, 1000),
    ]
    assert answer["truncated"] is True
    assert session.execute(READ).fetchone() == (2 * 1000 + 30 + 2 * 100,)


@pytest.mark.parametrize(("count", "truncated"), [(899, False), (900, True)])
def test_nine_new_of_the_ten_latest_may_not_be_all_that_are_new(db, make_job, runaways, count, truncated):
    """A transaction that took long has added rows that look old."""
    add(db, make_job("old"), 1_000, minutes_ago=60)
    add(db, make_job("new"), count)
    change_function(db, "runaway_jobs", "'300 ms'", "'0 ms'")

    answer = runaways()
    assert ([job["started"] for job in answer["jobs"]], answer["truncated"]) == ([count], truncated)


def test_executions_of_a_job_that_is_gone_are_shown_without_a_status(db, make_job, runaways):
    job_id = make_job(running=2)
    db.execute("ALTER TABLE executions DROP CONSTRAINT executions_job_id_fkey; DELETE FROM jobs")

    (job,) = runaways()["jobs"]
    assert (job["job_id"], job["status"], job["started"]) == (job_id, None, 2)


@pytest.mark.parametrize(
    ("minutes", "max_jobs", "named"),
    [(number, 20, "minutes") for number in (0, 1441, None)] + [(5, number, "max_jobs") for number in (0, 101, None)],
)
def test_arguments_out_of_range_are_refused(runaways, minutes, max_jobs, named):
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"{named} is"):
        runaways(minutes, max_jobs)
    assert runaways(1440, 100)["jobs"] == runaways(1, 1)["jobs"] == []


def test_it_works_in_a_read_only_transaction(make_job, service, runaways):
    make_job(running=1)
    service.execute("SET default_transaction_read_only = on")

    assert len(runaways()["jobs"]) == 1


@pytest.mark.parametrize("analyzed", [True, False])
def test_of_many_old_executions_it_reads_few(db, make_job, connect, analyzed):
    """Also where the statistics are those of an empty table, and where an index on the time has only some of them."""
    db.execute("CREATE INDEX executions_created_at ON executions (created_at) WHERE status = 'completed'")
    if not analyzed:
        db.execute("ANALYZE executions")
    add(db, make_job("old"), 200_000, minutes_ago=60)
    add(db, make_job("runaway"), 400, status="running")
    if analyzed:
        db.execute("ANALYZE executions")
    reader = connect()

    for _ in range(8):  # after five calls PostgreSQL may take a plan that knows no arguments
        with reader.transaction():
            before = reader.execute(READ).fetchone()[0]
            answer = reader.execute("SELECT runaway_jobs()").fetchone()[0]
            rows = reader.execute(READ).fetchone()[0] - before
        assert (answer["jobs"][0]["job_id"], answer["jobs"][0]["started"]) == ("runaway", 400)
        assert 400 < rows < 10_000
