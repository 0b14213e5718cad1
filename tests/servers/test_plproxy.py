"""sql/plproxy/router.sql: the service, unchanged, on a front database over shards. Real ones, on Debian's PostgreSQL 15."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from conftest import (
    ROOT,
    SERVICE_PASSWORD,
    TOKEN,
    Service,
    age,
    count_active,
    create_service_role,
    new_folder_in_memory,
    readme_block,
    wait_until,
)
from processes import Cluster, suspended
from psycopg.conninfo import make_conninfo

import beacon_stop

PARTITIONS = 4


class Shards:
    """A front database and the shards behind it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.front_url = make_conninfo(url, dbname="front", user="beacon_service", password=SERVICE_PASSWORD)
        self.front = psycopg.connect(make_conninfo(url, dbname="front"), autocommit=True)
        self.shards = [psycopg.connect(make_conninfo(url, dbname=f"shard{number}"), autocommit=True) for number in range(2)]

    def partition_of(self, job_id: str) -> int:
        return self.front.execute("SELECT hashtext(%s) & %s", (job_id, PARTITIONS - 1)).fetchone()[0]

    def of(self, job_id: str) -> psycopg.Connection:
        return self.shards[self.partition_of(job_id) % 2]

    def other(self, job_id: str) -> psycopg.Connection:
        return self.shards[1 - self.partition_of(job_id) % 2]

    def make_job(self, id: str, status: str = "processing", **executions: int) -> str:
        db = self.of(id)
        db.execute("INSERT INTO jobs (id) VALUES (%s)", (id,))
        for execution_status, count in executions.items():
            db.execute("INSERT INTO executions (job_id, status) SELECT %s, %s FROM generate_series(1, %s)", (id, execution_status, count))
        db.execute("UPDATE jobs SET status = %s WHERE id = %s", (status, id))
        return id

    def close(self) -> None:
        for session in (self.front, *self.shards):
            session.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with new_folder_in_memory() as folder:
        cluster = Cluster(Path(folder)).create(fsync="off", max_connections=200).start()
        yield cluster
        cluster.stop()


@pytest.fixture
def shards(cluster: Cluster) -> Iterator[Shards]:
    with psycopg.connect(cluster.url, autocommit=True) as server:
        for name in ("front", "shard0", "shard1", "shard2"):
            server.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            server.execute(f"CREATE DATABASE {name}")
    for name in ("shard0", "shard1"):
        beacon_stop.init_db(make_conninfo(cluster.url, dbname=name))
        create_service_role(conninfo=make_conninfo(cluster.url, dbname=name), autocommit=True)
    setup = readme_block("sql", "CREATE EXTENSION plproxy").replace("choose-one", SERVICE_PASSWORD)
    for number in range(2):
        setup = setup.replace(f"host=shard{number}.example dbname=app", f"host=127.0.0.1 port={cluster.port} dbname=shard{number}")
    with psycopg.connect(make_conninfo(cluster.url, dbname="front"), autocommit=True) as front:
        front.execute(setup)
        for _ in range(2):  # like the other files, it can be loaded again
            front.execute((ROOT / "sql" / "plproxy" / "router.sql").read_bytes())
    create_service_role(conninfo=make_conninfo(cluster.url, dbname="front"), autocommit=True)
    shards = Shards(cluster.url)
    yield shards
    shards.close()


@pytest.fixture
def service(shards: Shards, start_service: Callable[..., Service]) -> Service:
    return start_service(DATABASE_URL=shards.front_url, BEACON_LOCK_TIMEOUT="500ms")


def batch(service: Service, name: str, query: str = "") -> dict[str, Any]:
    answer = service("POST", f"/admin/{name}{query}", **{"X-Admin-Token": TOKEN})
    assert answer.status == 200, answer.json
    return answer.json


def test_every_function_of_the_service_is_there_and_nothing_is_open_to_public(shards, service):
    assert service("GET", "/health/ready").status == 200

    functions = shards.front.execute("""
        SELECT p.oid::regprocedure::text, p.proconfig, has_function_privilege('public', p.oid, 'EXECUTE'),
               has_function_privilege('beacon_service', p.oid, 'EXECUTE'), obj_description(p.oid, 'pg_proc')
        FROM pg_proc p
        WHERE p.pronamespace = 'public'::regnamespace AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
        """).fetchall()
    assert sorted(name for name, _, _, service_may, _ in functions if service_may) == sorted(beacon_stop.FUNCTIONS)
    for name, config, public, _, comment in functions:
        assert config == ["search_path=public, pg_temp"], name
        assert not public, name
        assert comment, name


def test_the_functions_have_the_signatures_of_the_shards(shards):
    signatures = """
        SELECT p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid)
        FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace AND p.oid::regprocedure::text = ANY (%s) ORDER BY 1"""

    front, shard = (db.execute(signatures, (beacon_stop.FUNCTIONS,)).fetchall() for db in (shards.front, shards.shards[0]))
    assert len(front) == len(beacon_stop.FUNCTIONS)
    assert front == shard


def test_a_job_is_stopped_and_read_on_its_shard(shards, service):
    jobs = [shards.make_job(f"job-ä/{number}", running=3, completed=1) for number in range(8)]
    assert {shards.partition_of(job_id) for job_id in jobs} == {0, 1, 2, 3}

    for job_id in jobs:
        answer = service.stop(job_id, json.dumps({"reason": "it's \\ 100 %"}).encode())
        assert list(answer.json) == [
            "ok", "message", "job_id", "previous_status", "new_status", "executions_stopped", "stopped_at", "reason",
        ]  # fmt: skip
        assert (answer.status, answer.json["executions_stopped"], answer.json["reason"]) == (200, 3, "it's \\ 100 %")
        assert service.stop(job_id).json["action"] == "none"
        assert count_active(shards.of(job_id), job_id) == 0
        assert shards.of(job_id).execute("SELECT count(*) FROM emergency_stops WHERE job_id = %s", (job_id,)).fetchone() == (1,)
        assert shards.other(job_id).execute("SELECT count(*) FROM emergency_stops WHERE job_id = %s", (job_id,)).fetchone() == (0,)
        path = job_id.replace("ä", "%C3%A4").replace("/", "%2F")
        assert service("GET", f"/api/v1/jobs/{path}").json["job"]["metadata"]["reason"] == "it's \\ 100 %"
        assert len(service("GET", f"/api/v1/executions?job_id={path}").json["executions"]) == 4
        assert len(service("GET", f"/api/v1/executions?job_id={path}&status=failed&limit=2").json["executions"]) == 2
    assert (service.stop("nix").status, service("GET", "/api/v1/jobs/nix").status) == (404, 404)


def test_40_callers_at_once(shards, service):
    jobs = [shards.make_job(f"job-{number}", running=3) for number in range(8)]

    with ThreadPoolExecutor(40) as callers:
        answers = list(callers.map(service.stop, jobs * 5))
    assert [answer.status for answer in answers] == [200] * 40
    assert sorted(answer.json["job_id"] for answer in answers if "executions_stopped" in answer.json) == jobs


def test_who_holds_a_job_on_its_shard_is_named_and_ended_and_nobody_else(shards, service):
    job_id = shards.make_job("job", running=2)
    with (
        psycopg.connect(make_conninfo(shards.url, dbname=shards.of(job_id).info.dbname), application_name="holder") as holder,
        psycopg.connect(make_conninfo(shards.url, dbname=shards.other(job_id).info.dbname)) as bystander,
    ):
        shards.other(job_id).execute("INSERT INTO jobs (id) VALUES (%s)", (job_id,))
        for session in (holder, bystander):
            session.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (job_id,))

        answer = service.stop(job_id)
        assert (answer.status, answer.json["error"]) == (503, "job is locked")
        assert [(blocker["pid"], blocker["application_name"]) for blocker in answer.json["blocked_by"]] == [
            (holder.info.backend_pid, "holder")
        ]
        answer = service.stop(job_id, b'{"force": true}')
        assert (answer.status, answer.json["executions_stopped"], answer.json["sessions_ended"]) == (200, 2, 1)
        bystander.execute("SELECT")
        with pytest.raises(psycopg.OperationalError):
            holder.execute("SELECT")


def test_batches_run_on_all_shards_and_their_answers_are_merged(shards, service):
    jobs = [shards.make_job(f"job-{number}", running=2) for number in range(12)]
    for job_id in jobs:
        age(shards.of(job_id), 20, job_id)

    first = service.stop(jobs[0])
    assert first.status == 200
    few = shards.front.execute("SELECT timeout_stuck_jobs(max_jobs => 3)").fetchone()[0]
    assert (few["timed_out_count"], few["more"]) == (3, True)
    assert {shards.partition_of(job["job_id"]) % 2 for job in few["timed_out_jobs"]} == {0, 1}
    rest = batch(service, "timeout-stuck-jobs", "?threshold_minutes=10")
    assert list(rest) == ["ok", "message", "timed_out_count", "timeout_threshold_minutes", "timed_out_jobs", "more"]
    assert (rest["ok"], rest["message"], rest["timeout_threshold_minutes"]) == (True, "Stuck jobs timeout completed", 10)
    assert (rest["timed_out_count"], rest["more"]) == (8, False)
    assert sorted(job["job_id"] for job in few["timed_out_jobs"] + rest["timed_out_jobs"]) == sorted(jobs[1:])
    assert {job["executions_stopped"] for job in rest["timed_out_jobs"]} == {2}
    assert batch(service, "timeout-stuck-jobs") == rest | {
        "timed_out_count": 0, "timed_out_jobs": [], "timeout_threshold_minutes": 15,
    }  # fmt: skip

    few = shards.front.execute("SELECT repair_stuck_jobs(max_jobs => 1)").fetchone()[0]
    assert (few["republished_count"], few["more"]) == (1, True)
    rest = batch(service, "repair-stuck-jobs")
    assert list(rest) == ["ok", "message", "republished_count", "republished_jobs", "skipped", "more"]
    assert (rest["message"], rest["republished_count"], rest["more"]) == ("Failed jobs republished", 10, False)
    assert rest["skipped"] == {"emergency_stopped": 1, "attempts_exhausted": 0}
    assert sorted(job["job_id"] for job in few["republished_jobs"] + rest["republished_jobs"]) == sorted(jobs[1:])


@pytest.mark.parametrize("call", ["timeout_stuck_jobs(max_jobs => -1)", "repair_stuck_jobs(max_jobs => 1001)", "timeout_stuck_jobs('0')"])
def test_what_a_shard_refuses_is_refused(shards, call):
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="expected"):
        shards.front.execute(f"SELECT {call}")


def test_the_statement_timeout_ends_the_call_on_the_shard_too(shards, start_service):
    service = start_service(DATABASE_URL=shards.front_url, BEACON_LOCK_TIMEOUT="30s", BEACON_STATEMENT_TIMEOUT="500ms")
    job_id = shards.make_job("job", running=1)
    with psycopg.connect(make_conninfo(shards.url, dbname=shards.of(job_id).info.dbname)) as holder:
        holder.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (job_id,))

        assert service.stop(job_id).status == 503
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        wait_until(lambda: shards.of(job_id).execute(waiting).fetchone() == (0,))
    assert count_active(shards.of(job_id), job_id) == 1


def test_a_shard_that_is_away_takes_only_its_own_jobs_with_it(shards, service):
    jobs = [shards.make_job(f"job-{number}", running=1) for number in range(16)]
    shard0 = [job_id for job_id in jobs if not shards.partition_of(job_id) % 2]
    shard1 = [job_id for job_id in jobs if job_id not in shard0]
    service.stop(shard0.pop())  # so that there is a connection to be lost
    for job_id in shard1[:2]:
        age(shards.of(job_id), 20, job_id)
    with psycopg.connect(shards.url, autocommit=True) as server:
        server.execute("ALTER DATABASE shard0 ALLOW_CONNECTIONS false")
        server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'shard0' AND usename = 'beacon_service'")

        for _ in range(2):
            answer = service.stop(shard0[0])
            assert (answer.status, answer.json, answer.headers["Retry-After"]) == (503, {"error": "database unavailable"}, "2")
        assert service("GET", f"/api/v1/jobs/{shard0[0]}").status == 503
        assert service.stop(shard1[2]).status == 200
        assert service("POST", "/admin/timeout-stuck-jobs", **{"X-Admin-Token": TOKEN}).status == 503
        assert [count_active(shards.of(job_id), job_id) for job_id in shard1[:2]] == [0, 0]
        server.execute("ALTER DATABASE shard0 ALLOW_CONNECTIONS true")
    wait_until(lambda: service.stop(shard0[0]).status == 200)


def test_a_shard_whose_sessions_were_ended_costs_no_call(shards, service):
    jobs = [shards.make_job(f"job-{number}", running=1) for number in range(8)]
    with ThreadPoolExecutor(4) as callers:
        list(callers.map(service.stop, jobs[:4]))
    with psycopg.connect(shards.url, autocommit=True) as server:
        server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'shard_' AND usename = 'beacon_service'")

    assert [service.stop(job_id).status for job_id in jobs] == [200] * 8


def test_nor_does_a_session_of_a_shard_that_ends_when_it_is_called(shards, service):
    """The second try does not go to another connection, whose session there may be about to end as well."""
    jobs = [shards.make_job(f"job-{number}", running=1) for number in range(40)]
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(service.stop, jobs[1:]))
    shard = shards.of(jobs[0])
    sessions = {
        port: psutil.Process(pid)
        for port, pid in shard.execute(
            "SELECT client_port, pid FROM pg_stat_activity WHERE datname = current_database() AND usename = 'beacon_service'"
        )
    }
    assert len(sessions) >= 2
    with ThreadPoolExecutor(1) as caller, suspended(*sessions.values()):
        call = caller.submit(service.stop, jobs[0])
        (front,) = wait_until(
            lambda: shards.front.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'beacon-stop admin' AND datname = 'front' AND state = 'active'"
            ).fetchone()
        )
        ports = {connection.laddr.port for connection in psutil.Process(front).net_connections()}
        (called,) = (session for port, session in sessions.items() if port in ports)
        called.terminate()
        called.resume()
        assert call.result(10).status == 200


def test_a_partition_moves_to_a_new_shard_as_the_readme_says(shards, service, cluster):
    """Stops of its jobs are refused meanwhile; none is lost, and none is answered by the old shard afterwards."""
    jobs = [shards.make_job(f"job-{number}", running=3, completed=1) for number in range(16)]
    moved = [job_id for job_id in jobs if shards.partition_of(job_id) == 3]
    stopped, running = moved[0], moved[1]
    service.stop(stopped)
    url = make_conninfo(shards.url, dbname="shard2")
    beacon_stop.init_db(url)
    create_service_role(conninfo=url, autocommit=True)
    new = psycopg.connect(url, autocommit=True)

    def start_moving(front: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-ec", readme_block("bash", "LOCK TABLE jobs, executions IN EXCLUSIVE MODE")],
            env={
                "PATH": os.environ["PATH"], "OLD_SHARD": make_conninfo(shards.url, dbname="shard1"), "NEW_SHARD": url,
                "FRONT": make_conninfo(shards.url, dbname=front),
                "NEW_SHARD_OPTIONS": f"host=127.0.0.1 port={cluster.port} dbname=shard2",
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    move = start_moving(front="nowhere")
    output, _ = move.communicate(timeout=30)
    assert move.returncode != 0, output
    assert shards.shards[1].execute("SELECT count(*) FROM jobs WHERE id = ANY (%s)", (moved,)).fetchone() == (len(moved),)
    new.execute("DELETE FROM executions; DELETE FROM jobs")

    with psycopg.connect(make_conninfo(shards.url, dbname="shard1")) as worker:  # the move has to wait for it, and others for the move
        worker.execute("UPDATE jobs SET metadata = '{}' WHERE id = %s", (running,))
        move = start_moving(front="front")
        wait_until(lambda: worker.execute("SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'ExclusiveLock'").fetchone()[0])
        assert service.stop(running).status == 503
    output, _ = move.communicate(timeout=30)
    assert (move.returncode, "ERROR" in output) == (0, False), output

    assert service.stop(stopped).json["action"] == "none"
    assert service.stop(running).json["executions_stopped"] == 3
    assert len(service("GET", f"/api/v1/executions?job_id={running}").json["executions"]) == 4
    assert sorted(id for (id,) in new.execute("SELECT id FROM jobs")) == sorted(moved)
    assert new.execute("SELECT count(*) FROM executions").fetchone() == (4 * len(moved),)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        new.execute("UPDATE jobs SET status = 'processing' WHERE id = %s", (stopped,))
    assert shards.shards[1].execute("SELECT count(*) FROM jobs WHERE id = ANY (%s)", (moved,)).fetchone() == (0,)
    assert batch(service, "timeout-stuck-jobs")["ok"]
    new.close()
