"""sql/plproxy/router.sql: the service, unchanged, on a front database over shards, on Debian's PostgreSQL 15."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import beacon_stop
import psutil
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from conftest import (
    ROOT,
    SERVICE_PASSWORD,
    TOKEN,
    Service,
    age,
    count_active,
    create_service_role,
    in_thread,
    new_folder,
    readme_block,
    wait_until,
)
from processes import Cluster, suspended

PARTITIONS = 4
NOT_ON_THE_FRONT = "confirm_stopped"  # the ids of executions belong to a shard


class Shards:
    """A front database and the shards behind it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.front_url = make_conninfo(url, dbname="front", user="beacon_service", password=SERVICE_PASSWORD)
        self.front = psycopg.connect(make_conninfo(url, dbname="front"), autocommit=True)
        self.service = psycopg.connect(self.front_url, autocommit=True, options="-c statement_timeout=20s")
        self.shards = [psycopg.connect(make_conninfo(url, dbname=f"shard{number}"), autocommit=True) for number in range(2)]

    def partition_of(self, job_id: str) -> int:
        return self.front.execute("SELECT hashtext(%s) & %s", (job_id, PARTITIONS - 1)).fetchone()[0]

    def of(self, job_id: str) -> psycopg.Connection:
        return self.shards[self.partition_of(job_id) % 2]

    def other(self, job_id: str) -> psycopg.Connection:
        return self.shards[1 - self.partition_of(job_id) % 2]

    def connect_to_shard_of(self, job_id: str, **options: Any) -> psycopg.Connection:
        return psycopg.connect(make_conninfo(self.url, dbname=self.of(job_id).info.dbname), **options)

    def call(self, call: str, *parameters: Any) -> Any:
        """Call a function on the front as the service's role, and return its one value."""
        return self.service.execute(f"SELECT {call}", parameters).fetchone()[0]

    def make_job(self, id: str, status: str = "processing", **executions: int) -> str:
        db = self.of(id)
        db.execute("INSERT INTO jobs (id) VALUES (%s)", (id,))
        for execution_status, count in executions.items():
            db.execute(
                "INSERT INTO executions (job_id, status) SELECT %s, %s FROM generate_series(1, %s)",
                (id, execution_status, count),
            )
        db.execute("UPDATE jobs SET status = %s WHERE id = %s", (status, id))
        return id

    def close(self) -> None:
        for session in (self.front, self.service, *self.shards):
            session.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with new_folder() as folder:
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


def test_the_functions_have_the_signatures_of_the_shards_and_nothing_is_open_to_public(shards):
    functions = """
        SELECT p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid),
               has_function_privilege('public', p.oid, 'EXECUTE'), p.prosecdef, p.proconfig,
               obj_description(p.oid, 'pg_proc')
        FROM pg_proc p
        WHERE p.pronamespace = 'public'::regnamespace
          AND has_function_privilege('beacon_service', p.oid, 'EXECUTE') = %s
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
        ORDER BY 1"""

    front, shard = (db.execute(functions, (True,)).fetchall() for db in (shards.front, shards.shards[0]))
    assert [row[:3] for row in front] == [row[:3] for row in shard if row[0] != NOT_ON_THE_FRONT]
    assert len(front) >= 11
    for name, *_, public, as_owner, config, comment in front + shards.front.execute(functions, (False,)).fetchall():
        assert not public, name
        assert as_owner == (name in {row[0] for row in front}), name
        assert config == ["search_path=public, pg_temp"], name
        assert comment, name


def test_plpgsql_check_finds_nothing(shards):
    shards.front.execute("CREATE EXTENSION plpgsql_check")

    functions, findings = shards.front.execute("""
        SELECT count(DISTINCT p.oid), array_agg(DISTINCT r ORDER BY r) FILTER (WHERE r IS NOT NULL)
        FROM pg_proc p
        LEFT JOIN LATERAL plpgsql_check_function(p.oid, all_warnings => true) r ON true
        WHERE p.pronamespace = 'public'::regnamespace
          AND p.prolang = (SELECT oid FROM pg_language WHERE lanname = 'plpgsql')
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')""").fetchone()
    assert functions > 10
    assert findings is None


def test_the_router_takes_the_place_of_the_one_of_version_1(shards, cluster):
    router = (ROOT / "sql/plproxy/router.sql").read_bytes()
    with psycopg.connect(make_conninfo(cluster.url, dbname="front"), autocommit=True) as front:
        for name, arguments, result in (
            ("emergency_stop_job", "id text, reason text DEFAULT NULL", "json"),
            ("emergency_stop_end_blockers", "id text", "json"),
            ("batch_on_all_shards", "operation text, span interval, max_jobs int", "SETOF json"),
            (
                "list_executions",
                "job_id text, status text, after bigint, max_rows bigint, max_bytes bigint",
                "TABLE (id bigint, execution json)",
            ),
        ):
            front.execute(f"DROP FUNCTION IF EXISTS {name}")
            front.execute(
                f"CREATE FUNCTION {name}({arguments}) RETURNS {result} LANGUAGE plproxy AS $$ CLUSTER 'beacon_stop'; RUN ON 0; $$"
            )
        front.execute("DROP FUNCTION emergency_stop_blockers")
        front.execute("""
            CREATE FUNCTION emergency_stop_blockers(id text) RETURNS TABLE (pid int, application_name text)
            LANGUAGE plproxy AS $$ CLUSTER 'beacon_stop'; RUN ON 0; $$""")
        front.execute(router)
        names = "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace GROUP BY 1 HAVING count(*) > 1"
        assert front.execute(names).fetchall() == []
        assert front.execute("SELECT to_regproc('emergency_stop_end_blockers')").fetchone() == (None,)
        front.execute("GRANT EXECUTE ON FUNCTION emergency_stop_blockers TO beacon_service")
        front.execute(router)  # once more: rights stay
        assert shards.service.execute("SELECT * FROM emergency_stop_blockers('x')").fetchall() == []
        locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        assert (front.execute(locks).fetchone(), front.execute("SHOW search_path").fetchone()) == (
            (0,),
            ('"$user", public',),
        )


def test_installers_of_the_router_take_turns(shards, cluster):
    with (
        psycopg.connect(make_conninfo(cluster.url, dbname="front")) as first,
        psycopg.connect(make_conninfo(cluster.url, dbname="front"), autocommit=True) as second,
    ):
        first.execute("SELECT pg_advisory_xact_lock(hashtext('beacon-stop install'))")
        with in_thread(second.execute, (ROOT / "sql/plproxy/router.sql").read_bytes()):
            waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND pid = %s"
            wait_until(lambda: shards.front.execute(waits, (second.info.backend_pid,)).fetchone() == (1,))
            first.rollback()


@pytest.mark.parametrize(("setup", "sqlstate"), [("CREATE TABLE jobs ()", "42P07"), ("DROP SERVER beacon_stop CASCADE", "42704")])
def test_the_router_does_not_go_where_it_does_not_belong(shards, setup, sqlstate):
    shards.front.execute(setup)
    before = shards.front.execute("SELECT count(*) FROM pg_proc").fetchone()

    with pytest.raises(psycopg.Error) as refused:
        shards.front.execute((ROOT / "sql/plproxy/router.sql").read_bytes())
    assert refused.value.sqlstate == sqlstate
    shards.front.execute("ROLLBACK")
    assert shards.front.execute("SELECT count(*) FROM pg_proc").fetchone() == before


# --- In SQL ---


def test_each_function_about_one_job_runs_on_its_shard(shards):
    jobs = [shards.make_job(f"job-ä/{number}", running=3, completed=1) for number in range(8)]
    assert {shards.partition_of(job_id) for job_id in jobs} == {0, 1, 2, 3}

    for job_id in jobs:
        assert shards.call("emergency_stop_dry_run(%s)", job_id)["executions_stopped"] == 3
        assert shards.call("emergency_stop_status(%s)", job_id)["active"]["running"] == 3
        answer = shards.call("emergency_stop_job(%s, %s, caller => %s)", job_id, "it's \\ 100 %", '{"actor": "ann", "client": null}')
        assert list(answer) == [
            "ok",
            "message",
            "job_id",
            "previous_status",
            "new_status",
            "executions_stopped",
            "stopped_at",
            "reason",
        ]
        assert (answer["executions_stopped"], answer["reason"]) == (3, "it's \\ 100 %")
        assert shards.call("get_job(%s)", job_id)["job"]["metadata"]["reason"] == "it's \\ 100 %"
        assert shards.of(job_id).execute("SELECT caller FROM emergency_stops WHERE job_id = %s", (job_id,)).fetchall() == [
            ({"actor": "ann", "client": None},)
        ]
        assert shards.other(job_id).execute("SELECT count(*) FROM emergency_stops WHERE job_id = %s", (job_id,)).fetchone() == (0,)
        status = shards.call("emergency_stop_status(%s)", job_id)
        assert (status["stopped"], status["history"][0]["actor"]) == (True, "ann")
        listed = shards.service.execute("SELECT id, execution FROM list_executions(%s)", (job_id,)).fetchall()
        assert [id for id, _ in listed] == [str(execution["id"]) for _, execution in listed]
        assert len(listed) == 4
        after = shards.service.execute("SELECT id FROM list_executions(%s, after => %s, max_rows => 2)", (job_id, listed[0][0])).fetchall()
        assert after == [(listed[1][0],), (listed[2][0],)]
        assert shards.call("release_job(%s, 'all clear', 'pending', %s)", job_id, '{"actor": "bob"}')["new_status"] == "pending"
        assert shards.call("emergency_stop_status(%s)", job_id)["history"][0]["actor"] == "bob"
        assert shards.call("release_job(%s, 'all clear', 'pending')", job_id)["error"] == "job is not stopped"
    for function in ("emergency_stop_job", "emergency_stop_dry_run", "emergency_stop_status", "get_job"):
        assert shards.call(f"{function}('nix')") == {"error": "job not found", "job_id": "nix"}
    assert shards.call("emergency_stop_job(NULL)") == {"error": "job not found", "job_id": None}
    assert shards.service.execute("SELECT * FROM list_executions('nix')").fetchall() == []


def test_a_locked_job_is_said_to_be_with_all_who_hold_it_and_force_ends_those(shards):
    job_id = shards.make_job("job", running=2)
    shards.service.execute("SET lock_timeout = '300ms'")
    with (
        shards.connect_to_shard_of(job_id, application_name="holder") as holder,
        shards.connect_to_shard_of(job_id, application_name="other") as other,
        psycopg.connect(make_conninfo(shards.url, dbname=shards.other(job_id).info.dbname)) as bystander,
    ):
        shards.other(job_id).execute("INSERT INTO jobs (id) VALUES (%s)", (job_id,))
        for session in (holder, bystander):
            session.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (job_id,))
        other.execute("SELECT FROM executions WHERE job_id = %s FOR UPDATE", (job_id,))

        began = time.monotonic()
        with pytest.raises(psycopg.errors.LockNotAvailable, match=f"job '{job_id}' is locked") as locked:
            shards.call("emergency_stop_job(%s)", job_id)
        assert 0.3 <= time.monotonic() - began < 2  # by the lock_timeout of the session on the front
        blocked_by = json.loads(locked.value.diag.message_detail)
        assert {blocker["pid"]: blocker["application_name"] for blocker in blocked_by} == {
            holder.info.backend_pid: "holder", other.info.backend_pid: "other",
        }  # fmt: skip
        assert locked.value.diag.message_hint.startswith("Others have held it for")
        assert "force => true" in locked.value.diag.message_hint
        blockers = shards.service.execute("SELECT pid, application_name, transaction_seconds > 0.3 FROM emergency_stop_blockers('job')")
        assert sorted(blockers.fetchall()) == sorted([(holder.info.backend_pid, "holder", True), (other.info.backend_pid, "other", True)])
        with pytest.raises(psycopg.errors.LockNotAvailable, match="is locked"):
            shards.call("emergency_stop_dry_run(%s)", job_id)
        answer = shards.call("emergency_stop_job(%s, force => true)", job_id)
        assert (answer["executions_stopped"], answer["sessions_ended"]) == (2, 2)
        bystander.execute("SELECT")
        for session in (holder, other):
            with pytest.raises(psycopg.OperationalError):
                session.execute("SELECT")


def test_several_jobs_are_stopped_each_on_its_shard_and_answered_in_order(shards):
    jobs = [shards.make_job(f"job-{number}", running=2) for number in range(8)]
    ids = [*jobs[5:], "nix", *jobs[:5]]
    callers = json.dumps([{"actor": f"for {job_id}"} for job_id in ids])
    with shards.connect_to_shard_of(jobs[2], application_name="holder") as holder:
        holder.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (jobs[2],))

        pid = holder.info.backend_pid
        answers = shards.service.execute("SELECT * FROM emergency_stop_jobs(%s, 'incident 7', %s)", (ids, callers)).fetchall()
    assert [id for id, _ in answers] == [summary["job_id"] for _, summary in answers] == ids
    for job_id, summary in answers:
        if job_id == "nix":
            assert summary == {"error": "job not found", "job_id": "nix"}
        elif job_id == jobs[2]:
            assert summary["error"] == "job is locked"
            assert [blocker["pid"] for blocker in summary["blocked_by"]] == [pid]
        else:
            assert (summary["executions_stopped"], summary["reason"]) == (2, "incident 7")
            caller = "SELECT caller FROM emergency_stops WHERE job_id = %s"
            assert shards.of(job_id).execute(caller, (job_id,)).fetchone() == ({"actor": f"for {job_id}"},)
    one = shards.service.execute("SELECT summary FROM emergency_stop_jobs(%s, caller => %s)", ([jobs[2]], '{"actor": "all"}')).fetchone()[0]
    assert one["executions_stopped"] == 2
    assert shards.service.execute("SELECT * FROM emergency_stop_jobs('{}')").fetchall() == []


def test_several_jobs_with_patience_and_force(shards):
    held, other = shards.make_job("held", running=2), shards.make_job("other", running=1)
    shards.service.execute("SET lock_timeout = '300ms'")
    stop = "SELECT summary FROM emergency_stop_jobs(%s, patience => '400 ms', force => %s)"
    with shards.connect_to_shard_of(held) as holder:
        holder.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (held,))

        began = time.monotonic()
        answers = [summary for (summary,) in shards.service.execute(stop, ([held, other], False))]
        assert 0.4 <= time.monotonic() - began < 2
        assert [summary.get("error") for summary in answers] == ["job is locked", None]
        ((answer,),) = shards.service.execute(stop, ([held], True)).fetchall()
        assert (answer["executions_stopped"], answer["sessions_ended"]) == (2, 1)
        with pytest.raises(psycopg.OperationalError):
            holder.execute("SELECT")


def test_runaways_of_all_shards_most_started_first(shards):
    jobs = [shards.make_job(f"job-{number}", running=number + 1) for number in range(8)]

    answer = shards.call("runaway_jobs()")
    assert list(answer) == ["minutes", "jobs", "truncated"]
    assert [job["job_id"] for job in answer["jobs"]] == jobs[::-1]
    assert [job["active"] for job in answer["jobs"]] == list(range(8, 0, -1))
    assert (answer["minutes"], answer["truncated"]) == (5, False)
    answer = shards.call("runaway_jobs(10, 3)")
    assert [job["job_id"] for job in answer["jobs"]] == jobs[:-4:-1]
    assert (answer["minutes"], answer["truncated"]) == (10, True)
    # Each shard has shown all that it has, but together these are too many.
    on_each = [sum(shards.partition_of(job_id) % 2 == number for job_id in jobs) for number in range(2)]
    assert max(on_each) < 8
    answer = shards.call("runaway_jobs(10, %s)", max(on_each))
    assert (len(answer["jobs"]), answer["truncated"]) == (max(on_each), True)


def test_runaways_of_which_one_shard_has_not_shown_all(shards):
    jobs = [id for id in (f"job-{number}" for number in range(16)) if shards.partition_of(id) % 2 == 0]
    for job_id in jobs[:4]:
        shards.make_job(job_id, running=1)

    assert [shards.call("runaway_jobs(5, %s)", number)["truncated"] for number in (3, 4)] == [True, False]


def test_faults_name_their_shard(shards):
    assert [
        fault for (fault,) in shards.service.execute("SELECT emergency_stop_faults()") if not fault.startswith("warning: shard p")
    ] == []
    shards.shards[1].execute("ALTER TABLE jobs DISABLE TRIGGER guard_updated_job")
    shards.shards[0].execute("ALTER TABLE executions DROP CONSTRAINT executions_job_id_fkey")
    shards.front.execute("REVOKE EXECUTE ON FUNCTION get_job FROM beacon_service")

    faults = [fault for (fault,) in shards.service.execute("SELECT emergency_stop_faults()")]
    assert "shard p1: trigger guard_updated_job on table jobs is disabled" in faults
    assert any(fault.startswith("warning: shard p0: no foreign key") for fault in faults)
    assert "role beacon_service may not execute function get_job(text) on the front" in faults
    shards.shards[1].execute("DROP FUNCTION emergency_stop_status")
    faults = [fault for (fault,) in shards.service.execute("SELECT emergency_stop_faults()")]
    assert any(fault.startswith("shard p1: ") and "emergency_stop_status" in fault for fault in faults)


def test_a_shard_that_is_away_is_a_fault_and_takes_only_its_own_jobs_with_it_in_sql(shards):
    jobs = [shards.make_job(f"job-{number}", running=1) for number in range(8)]
    away = [job_id for job_id in jobs if not shards.partition_of(job_id) % 2]
    there = [job_id for job_id in jobs if job_id not in away]
    notices: list[tuple[str, str]] = []
    shards.service.add_notice_handler(
        lambda notice: notices.append((notice.severity_nonlocalized or "", (notice.message_primary or "").partition(":")[0]))
    )
    shards.call("get_job(%s)", away[0])  # so that there is a connection to be lost
    with psycopg.connect(shards.url, autocommit=True) as server:
        server.execute("ALTER DATABASE shard0 ALLOW_CONNECTIONS false")
        server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'shard0' AND usename = 'beacon_service'")

        calls = [f"{function}('{away[0]}')" for function in ("emergency_stop_job", "emergency_stop_status", "get_job", "list_executions")]
        for call in [*calls, "timeout_stuck_jobs()", "repair_stuck_jobs()"]:
            with pytest.raises(psycopg.errors.ConnectionFailure, match="shard p0 is away"):
                shards.call(call)
        with pytest.raises(psycopg.errors.ConnectionFailure, match="shard p0 is away"):
            shards.service.execute("SELECT * FROM emergency_stop_jobs(%s)", (jobs[:6],))
        assert {job_id: count_active(shards.of(job_id), job_id) for job_id in there} == {
            job_id: int(job_id in jobs[6:]) for job_id in there
        }
        answer = shards.call("runaway_jobs()")
        assert sorted(job["job_id"] for job in answer["jobs"]) == there
        assert answer["truncated"]
        assert [text for severity, text in notices if severity == "WARNING"] == ["shard p0 is away"]
        faults = [fault for (fault,) in shards.service.execute("SELECT emergency_stop_faults()")]
        assert [fault.startswith("shard p0 is away: ") for fault in faults if not fault.startswith("warning: shard p1")] == [True]
        server.execute("ALTER DATABASE shard0 ALLOW_CONNECTIONS true")
    assert shards.call("emergency_stop_job(%s)", away[0])["executions_stopped"] == 1


def test_a_session_of_a_shard_that_ends_while_it_is_called_costs_no_call_in_sql(shards):
    job_id = shards.make_job("job", running=1)
    with shards.connect_to_shard_of(job_id) as holder:
        holder.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (job_id,))
        with in_thread(lambda: shards.call("emergency_stop_job(%s)", job_id)) as stop:
            waiting = "SELECT pid FROM pg_stat_activity WHERE usename = 'beacon_service' AND datname LIKE 'shard_' AND state = 'active'"
            (pid,) = wait_until(lambda: shards.front.execute(waiting).fetchone())
            shards.front.execute("SELECT pg_terminate_backend(%s)", (pid,))
            wait_until(lambda: shards.front.execute(waiting + " AND pid <> %s", (pid,)).fetchone())
            holder.rollback()
    assert stop.result["executions_stopped"] == 1


def test_what_else_a_shard_raises_keeps_its_sqlstate(shards):
    shards.make_job("job")
    for call, error in (
        ("emergency_stop_job('job', repeat('x', 1001))", psycopg.errors.InvalidParameterValue),
        ("list_executions('job', after => 'x')", psycopg.errors.InvalidParameterValue),
        ("runaway_jobs(0)", psycopg.errors.InvalidParameterValue),
        ("timeout_stuck_jobs(max_jobs => -1)", psycopg.errors.InvalidParameterValue),
        ("repair_stuck_jobs(max_jobs => 1001)", psycopg.errors.InvalidParameterValue),
        ("timeout_stuck_jobs('0')", psycopg.errors.InvalidParameterValue),
    ):
        with pytest.raises(error, match="expected"):
            shards.call(call)


@pytest.mark.parametrize("error", ["internal_error", "raise_exception", "no_data_found"])
def test_what_a_trigger_on_a_shard_raises_is_not_taken_for_a_shard_that_is_away(shards, error):
    job_id = shards.make_job("job", running=1)
    shards.of(job_id).execute(f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            RAISE {error} USING MESSAGE = 'not on Sundays'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION refuse()""")

    with pytest.raises(psycopg.Error, match="not on Sundays") as raised:
        shards.call("emergency_stop_job(%s)", job_id)
    assert raised.value.sqlstate == {"internal_error": "XX000", "raise_exception": "P0001", "no_data_found": "P0002"}[error]


# --- Over HTTP ---


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


def test_stops_share_no_transaction_over_shards(shards, service):
    """They would wait for the slowest shard. What one had committed when another fails would be done again."""
    jobs = [shards.make_job(f"job-{number}", running=1) for number in range(60)]
    for shard in shards.shards:
        shard.execute("ALTER TABLE emergency_stops ADD transaction xid8 DEFAULT pg_current_xact_id()")

    with ThreadPoolExecutor(30) as callers:
        answers = list(callers.map(service.stop, jobs))
    assert {answer.json["message"] for answer in answers} == {"Job emergency stopped"}
    for shard in shards.shards:
        stops, transactions = shard.execute("SELECT count(*), count(DISTINCT transaction) FROM emergency_stops").fetchone()
        assert stops == transactions > 20


def test_several_jobs_over_http(shards, service):
    jobs = [shards.make_job(f"job-{number}", running=1) for number in range(8)]
    body = json.dumps({"job_ids": [*jobs, "nix"], "actor": "ann"}).encode()

    answer = service("POST", "/admin/emergency-stop", body, **{"X-Admin-Token": TOKEN})
    assert [result["job_id"] for result in answer.json["results"]] == [*jobs, "nix"]
    assert {key: answer.json[key] for key in ("stopped", "already_terminal", "not_found", "locked")} == {
        "stopped": 8, "already_terminal": 0, "not_found": 1, "locked": 0,
    }  # fmt: skip


def test_what_one_shard_has_done_is_told_whatever_happens_on_another_one(shards, service):
    """Each shard commits for itself. The call that had stopped a job said that it had been stopped before."""
    jobs = [shards.make_job(f"job-{number}", running=1) for number in range(8)]
    shard0, shard1 = ([job_id for job_id in jobs if shards.partition_of(job_id) % 2 == number] for number in range(2))
    refused, *others = shard1
    shards.of(refused).execute(f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not on Sundays'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW WHEN (NEW.id = '{refused}') EXECUTE FUNCTION refuse()""")

    def stop_all():
        body = json.dumps({"job_ids": jobs}).encode()
        return service("POST", "/admin/emergency-stop", body, **{"X-Admin-Token": TOKEN}).json

    answer = stop_all()
    assert (answer["stopped"], answer["already_terminal"], answer["failed"]) == (7, 0, 1)
    assert answer["results"][jobs.index(refused)]["message"].endswith("not on Sundays")
    with psycopg.connect(shards.url, autocommit=True) as server:
        server.execute("ALTER DATABASE shard0 ALLOW_CONNECTIONS false")
        server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'shard0' AND usename = 'beacon_service'")
        answer = stop_all()
        server.execute("ALTER DATABASE shard0 ALLOW_CONNECTIONS true")
    assert (answer["already_terminal"], answer["failed"]) == (len(others), len(shard0) + 1)
    assert {answer["results"][jobs.index(job_id)]["error"] for job_id in shard0} == {"database unavailable"}


def test_the_other_routes_on_a_front(shards, service):
    job_id = shards.make_job("job", running=1)
    token = {"X-Admin-Token": TOKEN}
    assert service("GET", "/health/ready").status == 200
    assert service.stop(job_id, b'{"dry_run": true}').json["dry_run"]
    assert service.stop(job_id, b'{"actor": "ann"}').json["executions_stopped"] == 1

    status = service("GET", f"/admin/jobs/{job_id}/emergency-stop", **token)
    assert (status.json["stopped"], status.json["history"][0]["actor"]) == (True, "ann")
    released = service("POST", f"/admin/jobs/{job_id}/release", b'{"reason": "all clear", "status": "pending"}', **token)
    assert (released.status, released.json["new_status"]) == (200, "pending")
    released = service("POST", f"/admin/jobs/{job_id}/release", b'{"reason": "all clear", "status": "pending"}', **token)
    assert (released.status, released.json["error"]) == (409, "job is not stopped")
    assert service("GET", "/admin/runaways", **token).json["jobs"][0]["job_id"] == job_id
    shards.shards[1].execute("ALTER TABLE jobs DISABLE TRIGGER guard_updated_job")
    ready = service("GET", "/health/ready")
    assert (ready.status, ready.json["faults"]) == (
        503,
        ["shard p1: trigger guard_updated_job on table jobs is disabled"],
    )


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
    shards.make_job("active", status="failed", running=1)
    exhausted = shards.make_job("exhausted", status="failed")
    shards.of(exhausted).execute("UPDATE jobs SET metadata = '{\"republish_count\": 3}' WHERE id = %s", (exhausted,))
    for job_id in jobs:
        age(shards.of(job_id), 20, job_id)

    first = service.stop(jobs[0])
    assert first.status == 200
    few = shards.front.execute("SELECT timeout_stuck_jobs(max_jobs => 3)").fetchone()[0]
    assert (few["timed_out_count"], few["more"]) == (3, True)
    assert {shards.partition_of(job["job_id"]) % 2 for job in few["timed_out_jobs"]} == {0, 1}
    rest = batch(service, "timeout-stuck-jobs", "?threshold_minutes=10")
    assert list(rest) == ["ok", "message", "timed_out_count", "timeout_threshold_minutes", "timed_out_jobs", "more"]
    assert (rest["ok"], rest["message"], rest["timeout_threshold_minutes"]) == (
        True,
        "Stuck jobs timeout completed",
        10,
    )
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
    assert rest["skipped"] == {"emergency_stopped": 1, "attempts_exhausted": 1, "active": 1}
    assert sorted(job["job_id"] for job in few["republished_jobs"] + rest["republished_jobs"]) == sorted(jobs[1:])


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
            assert (answer.status, answer.json, answer.headers["Retry-After"]) == (
                503,
                {"error": "database unavailable"},
                "2",
            )
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
    stopped, running, by_record = moved[0], moved[1], moved[2]
    service.stop(stopped)
    shards.of(by_record).execute("UPDATE executions SET status = 'failed' WHERE job_id = %s", (by_record,))
    shards.of(by_record).execute("UPDATE jobs SET status = 'failed' WHERE id = %s", (by_record,))
    service.stop(by_record, b'{"reason": "it must not run again"}')
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
    new.execute("DELETE FROM executions; DELETE FROM jobs; DELETE FROM emergency_stops; DELETE FROM batch_changes")

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
    # What was recorded has come along: a stop of a job that had failed by itself left no mark.
    assert batch(service, "repair-stuck-jobs")["republished_count"] == 0
    assert [record["reason"] for record in shards.call("emergency_stop_status(%s)", by_record)["history"]] == ["it must not run again"]
    new.close()
