"""A primary and its synchronous standby: killed, switched over, hanging, and a standby that is away."""

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import beacon_stop
import psutil
import psycopg
import pytest

from conftest import SERVICE_PASSWORD, TOKEN, Client, Service, create_service_role, new_folder, wait_until
from processes import Cluster, suspended


@pytest.fixture(scope="module")
def prepared() -> Iterator[Path]:
    """The folders of a primary with sql/ in it and of its standby, both ended in good order: each test gets copies."""
    with new_folder() as name:
        folder = Path(name)
        folder.chmod(0o755)
        primary, standby = Cluster(folder / "primary"), Cluster(folder / "standby")
        try:
            primary.create(wal_retrieve_retry_interval="100ms").start()
            beacon_stop.init_db(primary.url)
            create_service_role(host="127.0.0.1", port=primary.port, user="postgres", dbname="postgres", autocommit=True)
            standby.copy_from(primary).start()
        finally:
            primary.stop()
            standby.stop()
        yield folder


@pytest.fixture
def pair(prepared: Path, folder: Path) -> Iterator[tuple[Cluster, Cluster]]:
    """A primary whose commits wait for its standby, and the standby."""
    folder.chmod(0o755)
    primary, standby = Cluster(folder / "primary"), Cluster(folder / "standby")
    for cluster in (primary, standby):
        subprocess.run(["cp", "-a", prepared / cluster.data.parent.name / "data", cluster.data], check=True)
    primary.configure(synchronous_standby_names="standby")
    standby.configure(primary_conninfo=f"host=127.0.0.1 port={primary.port} user=postgres application_name=standby")
    try:
        primary.start()
        standby.start()
        with psycopg.connect(primary.url, autocommit=True) as db:
            wait_until(lambda: db.execute("SELECT sync_state = 'sync' FROM pg_stat_replication").fetchone() == (True,), 30)
        yield primary, standby
    finally:
        for cluster in (primary, standby):
            if cluster.process and cluster.process.poll() is None:
                cluster.kill()


def url_of(*clusters: Cluster, **parameters: str) -> str:
    """What the service connects to: several hosts, in this order."""
    ports = ",".join(str(cluster.port) for cluster in clusters)
    hosts = ",".join("127.0.0.1" for _ in clusters)
    return psycopg.conninfo.make_conninfo(
        host=hosts, port=ports, dbname="postgres", user="beacon_service", password=SERVICE_PASSWORD,
        **{"target_session_attrs": "read-write", **parameters},
    )  # fmt: skip


# What the service waits for, as long as that takes here.
IMPATIENT = """
beacon_stop.POOL_TIMEOUT, beacon_stop.AWAY_TIMEOUT = 2.0, 0.3
beacon_stop.SILENCE = beacon_stop.BoundedConnection.patience = 1.5
"""


def add_jobs(cluster: Cluster, count: int) -> list[str]:
    """Jobs with three running executions each."""
    jobs = [f"job-{number}" for number in range(count)]
    with psycopg.connect(cluster.url) as db:
        db.execute("INSERT INTO jobs (id, status) SELECT unnest(%s::text[]), 'processing'", (jobs,))
        db.execute("INSERT INTO executions (job_id, status) SELECT id, 'running' FROM jobs, generate_series(1, 3)")
    return jobs


def stopped_jobs(cluster: Cluster) -> set[str]:
    """The jobs that are stopped, with all their executions and exactly one audit row; there must be no half-stopped one."""
    with psycopg.connect(cluster.url) as db:
        rows = db.execute("""
            SELECT j.id, j.status = 'failed',
                   (SELECT count(*) FROM executions e WHERE e.job_id = j.id AND e.status = 'failed'),
                   (SELECT count(*) FROM emergency_stops s WHERE s.job_id = j.id)
            FROM jobs j
            """).fetchall()
    assert {row[1:] for row in rows} <= {(True, 3, 1), (False, 0, 0)}
    return {row[0] for row in rows if row[1]}


def promote(standby: Cluster) -> None:
    """Make it the primary, and wait until it is."""
    standby.run("pg_ctl", "promote", "-D", standby.data)


def family(cluster: Cluster) -> list[psutil.Process]:
    assert cluster.process
    postmaster = psutil.Process(cluster.process.pid)
    return [postmaster, *postmaster.children(recursive=True)]


def sender(primary: Cluster) -> psutil.Process:
    """The process that sends the standby what is written; not the standby's receiver, which has more in its socket."""
    (process,) = [process for process in family(primary) if "walsender" in " ".join(process.cmdline())]
    return process


class Operators:
    """Callers who stop each of the jobs, and call again until they are told that it is stopped."""

    def __init__(self, service: Service, jobs: list[str], number: int = 8) -> None:
        self.service = service
        self.acknowledged: list[tuple[float, str, str]] = []  # when, which job, what was said
        self.executor = ThreadPoolExecutor(number)
        self.calls = [self.executor.submit(self.stop, job_id) for job_id in jobs]

    def stop(self, job_id: str) -> None:
        deadline = time.monotonic() + 60
        while (answer := self.service.stop(job_id)).status != 200:
            assert answer.status == 503 and time.monotonic() < deadline, answer.json
            time.sleep(0.05)
        self.acknowledged.append((time.monotonic(), job_id, answer.json["message"]))

    def join(self) -> None:
        for call in self.calls:
            call.result(90)
        self.executor.shutdown()


@pytest.mark.parametrize("synchronous_commit", ["on", "local", "off"])
def test_no_acknowledged_stop_is_lost_when_the_primary_is_killed_and_its_standby_takes_over(pair, start_service, synchronous_commit):
    """The standby is cut off a moment before the end: what is acknowledged without it then is lost for certain."""
    primary, standby = pair
    with psycopg.connect(primary.url, autocommit=True) as db:
        db.execute(f"ALTER DATABASE postgres SET synchronous_commit = {synchronous_commit}")
        jobs = add_jobs(primary, 400)
        wait_until(lambda: db.execute("SELECT replay_lsn >= pg_current_wal_lsn() FROM pg_stat_replication").fetchone()[0])
    service = start_service(IMPATIENT, DATABASE_URL=url_of(primary, standby))
    assert service("GET", "/health/ready").status == 200
    operators = Operators(service, jobs)
    wait_until(lambda: len(operators.acknowledged) >= 100)
    with suspended(sender(primary)):
        time.sleep(0.3)
        primary.kill()
    assert service("GET", "/health/ready").status == 503
    known = {job_id for _, job_id, _ in operators.acknowledged}

    promote(standby)
    promoted = time.monotonic()
    assert known <= stopped_jobs(standby)
    wait_until(lambda: operators.acknowledged[-1][0] > promoted, 5)
    wait_until(lambda: service("GET", "/health/ready").status == 200, 5)
    assert service("GET", "/api/v1/jobs/job-0").status == 200
    operators.join()
    assert stopped_jobs(standby) == set(jobs)
    told = [job_id for _, job_id, message in operators.acknowledged if message == "Job emergency stopped"]
    assert len(told) == len(set(told))
    assert service.process.poll() is None


def test_a_caller_who_waits_is_answered_once_the_standby_has_taken_over(pair, monkeypatch):
    """Though the attempts to connect that its call gave rise to have all failed before."""
    monkeypatch.setattr(beacon_stop, "POOL_TIMEOUT", 60.0)
    primary, standby = pair
    add_jobs(primary, 1)
    with closing(beacon_stop.create_app({}, admin_token=TOKEN, database_url=url_of(primary, standby))) as app:
        client = Client(app)
        assert client.stop("unknown").status == 404
        app.admin_pool.wait()  # or an attempt to connect from before the call would fail before it
        primary.kill()
        with ThreadPoolExecutor(1) as operator:
            call = operator.submit(client.stop, "job-0")
            wait_until(lambda: app.admin_pool.is_away, 30)

            promote(standby)
            assert call.result(20).status == 200


def test_a_planned_switchover_after_which_the_first_host_is_the_standby(pair, start_service):
    old, new = pair
    jobs = add_jobs(old, 400)
    service = start_service(DATABASE_URL=url_of(old, new))
    operators = Operators(service, jobs)
    wait_until(lambda: len(operators.acknowledged) >= 50)

    old.stop()
    promote(new)
    promoted = time.monotonic()
    wait_until(lambda: operators.acknowledged[-1][0] > promoted, 5)
    (old.data / "standby.signal").touch()
    old.configure(primary_conninfo=f"host=127.0.0.1 port={new.port} user=postgres", synchronous_standby_names="")
    old.start()
    operators.join()
    assert stopped_jobs(new) == set(jobs)

    with psycopg.connect(new.url, autocommit=True) as db:  # so that the service has to choose again
        db.execute("INSERT INTO jobs (id, status) VALUES ('later', 'processing')")
        db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'beacon-stop%'")
    assert service.stop("later").json["message"] == "Job emergency stopped"
    assert service("GET", "/health/ready").status == 200


def test_a_primary_that_has_become_read_only_is_left_for_the_new_one(pair, start_service):
    """Its sessions go on, so that nothing but its refusals shows that it is no longer the primary."""
    old, new = pair
    service = start_service(DATABASE_URL=url_of(old, new))
    assert service.stop("later").status == 404
    with psycopg.connect(old.url, autocommit=True) as db:
        db.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        db.execute("SELECT pg_reload_conf()")
    promote(new)
    with psycopg.connect(new.url, autocommit=True) as db:
        db.execute("INSERT INTO jobs (id, status) VALUES ('later', 'processing')")

    def stopped() -> bool:
        answer = service.stop("later")
        assert answer.status == 200 or (answer.status, answer.json) == (503, {"error": "database is read-only"})
        return answer.status == 200

    wait_until(stopped, 5)


def test_a_standby_says_nothing_of_jobs(pair, start_service):
    """What it does not hold yet may run away on the primary."""
    primary, standby = pair
    service = start_service(DATABASE_URL=url_of(standby, primary, target_session_attrs="any"))

    answer = service.stop("unknown")
    assert (answer.status, answer.json) == (503, {"error": "database is read-only"})


def test_a_primary_that_hangs_is_given_up(pair, start_service):
    """Its kernel goes on to acknowledge what is sent, so that no timeout of TCP's ends the wait."""
    primary, standby = pair
    jobs = add_jobs(primary, 4)
    url = url_of(primary, standby, connect_timeout="2")  # psycopg's least
    service = start_service(IMPATIENT, DATABASE_URL=url, BEACON_STATEMENT_TIMEOUT="1s", BEACON_LOCK_TIMEOUT="300ms")
    assert service.stop("unknown").status == 404
    with suspended(*family(primary)):
        with ThreadPoolExecutor(4) as operators:
            started = time.monotonic()
            answers = list(operators.map(service.stop, jobs))
            assert [answer.status for answer in answers] == [503] * 4
            assert time.monotonic() - started < 10

        promote(standby)
        for job_id in jobs:
            wait_until(lambda job_id=job_id: service.stop(job_id).status == 200, 20)
        wait_until(lambda: service("GET", "/health/ready").status == 200, 20)
        assert stopped_jobs(standby) == set(jobs)


def sessions_waiting_for_the_standby(db: psycopg.Connection) -> list[int]:
    return [pid for (pid,) in db.execute("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'").fetchall()]


def test_a_stop_that_the_standby_does_not_confirm_is_not_acknowledged_and_its_caller_not_kept_for_ever(pair, start_service):
    """PostgreSQL's statement timeout does not bound the wait of a commit."""
    primary, standby = pair
    add_jobs(primary, 1)
    service = start_service(IMPATIENT, DATABASE_URL=url_of(primary, standby), BEACON_STATEMENT_TIMEOUT="1s", BEACON_LOCK_TIMEOUT="300ms")
    with suspended(sender(primary)):
        answer = service.stop("job-0")
        assert (answer.status, answer.json["error"]) == (
            503,
            "job is locked",
        )  # by the call that goes on waiting, unheard
        assert service("GET", "/health/ready").status == 200

    wait_until(lambda: service.stop("job-0").status == 200)
    assert stopped_jobs(primary) == {"job-0"}


def test_a_stop_whose_wait_for_the_standby_was_cut_short_is_acknowledged_only_when_the_standby_has_it(pair, start_service):
    """Its job is seen to be stopped on the primary, which a second call must not take for enough."""
    primary, standby = pair
    add_jobs(primary, 1)
    service = start_service(DATABASE_URL=url_of(primary, standby))
    with psycopg.connect(primary.url, autocommit=True) as db, ThreadPoolExecutor(1) as operator:
        with suspended(sender(primary)):
            call = operator.submit(service.stop, "job-0")
            (first,) = wait_until(lambda: sessions_waiting_for_the_standby(db))
            db.execute("SELECT pg_terminate_backend(%s)", (first,))
            wait_until(lambda: set(sessions_waiting_for_the_standby(db)) - {first})
            assert stopped_jobs(primary) == {"job-0"}
            assert not call.done()
        answer = call.result(30)
    assert (answer.status, answer.json["action"]) == (200, "none")
    primary.kill()
    promote(standby)
    assert stopped_jobs(standby) == {"job-0"}


def test_readers_on_a_standby_and_stops_on_the_primary(pair, start_service):
    primary, standby = pair
    with psycopg.connect(primary.url, autocommit=True) as db:
        db.execute("ALTER SYSTEM SET synchronous_standby_names = ''")  # or stops would wait for the standby that is to go
        db.execute("SELECT pg_reload_conf()")
        add_jobs(primary, 3)
        wait_until(lambda: db.execute("SELECT replay_lsn >= pg_current_wal_lsn() FROM pg_stat_replication").fetchone()[0])
    settings = {"DATABASE_URL": url_of(primary), "BEACON_ADMIN_POOL": "1"}
    strict = start_service(IMPATIENT, **settings, BEACON_READ_DATABASE_URL=url_of(standby, target_session_attrs="standby"))
    lenient = start_service(IMPATIENT, **settings, BEACON_READ_DATABASE_URL=url_of(primary, standby, target_session_attrs="prefer-standby"))

    with psycopg.connect(standby.url, autocommit=True) as replica:
        replica.execute("SELECT pg_wal_replay_pause()")
        wait_until(lambda: replica.execute("SELECT pg_get_wal_replay_pause_state() = 'paused'").fetchone()[0])
        assert strict.stop("job-0").json["message"] == "Job emergency stopped"
        for service in (strict, lenient):
            assert service("GET", "/api/v1/jobs/job-0").json["status"] == "processing"
            executions = service("GET", "/api/v1/executions?job_id=job-0").json["executions"]
            assert [execution["status"] for execution in executions] == ["running"] * 3
        replica.execute("SELECT pg_wal_replay_resume()")
        wait_until(lambda: strict("GET", "/api/v1/jobs/job-0").json["status"] == "failed")

    standby.kill()
    assert lenient("GET", "/api/v1/jobs/job-0").status == 200
    assert strict("GET", "/api/v1/jobs/job-0").status == 503
    for service in (strict, lenient):
        assert service("GET", "/health/ready").status == 200
    with (
        psycopg.connect(primary.url) as holder,
        ThreadPoolExecutor(2) as operators,
    ):  # stops wait for their connection as ever
        holder.execute("SELECT FROM jobs WHERE id = 'job-1' FOR UPDATE")
        held = operators.submit(strict.stop, "job-1")
        wait_until(lambda: holder.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone())
        next_in_line = operators.submit(strict.stop, "job-2")
        time.sleep(0.8)  # longer than a call waits for a database that is away
        holder.rollback()
        assert (held.result().status, next_in_line.result().status) == (200, 200)

    standby.start()
    wait_until(lambda: strict("GET", "/api/v1/jobs/job-2").status == 200, 5)


def test_the_standby_answers_which_job_it_is_and_that_nothing_can_be_stopped_there(pair):
    primary, standby = pair
    add_jobs(primary, 2)
    with psycopg.connect(url_of(standby, target_session_attrs="any"), autocommit=True) as service:
        runaways = "SELECT runaway_jobs() -> 'jobs'"
        jobs = wait_until(lambda: service.execute(runaways).fetchone()[0])

        assert [(job["job_id"], job["started"], job["active"]) for job in jobs] == [("job-0", 3, 3), ("job-1", 3, 3)]
        assert service.execute("SELECT * FROM emergency_stop_faults()").fetchall() == [
            ("this server is a standby: nothing can be stopped here, only on the primary",)
        ]
        status = service.execute("SELECT emergency_stop_status('job-0')").fetchone()[0]
        assert (status["active"]["running"], status["blocked_by"]) == (3, [])
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            service.execute("SELECT emergency_stop_dry_run('job-0')")
