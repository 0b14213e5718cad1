"""Behind PgBouncer 1.18 in transaction mode, where each statement may run in another session than the last one."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from conftest import SERVICE_PASSWORD, Client, Service, count_active, slow_down_stops, wait_until
from processes import Running, accepts_connections, free_port, running, unprivileged

DEFAULTS = {"lock_timeout": "0", "statement_timeout": "0", "default_transaction_isolation": "read committed"}


class Pooler:
    """A PgBouncer with three server connections for each user, of which the service is one."""

    def __init__(self, folder: Path, server_url: str) -> None:
        parts = conninfo_to_dict(server_url)
        self.port = free_port()
        self.server_url = server_url
        self.folder = folder
        self.config = folder / "pgbouncer.ini"
        (folder / "users").write_text(f'"{parts["user"]}" "{parts.get("password", "")}"\n"beacon_service" "{SERVICE_PASSWORD}"\n')
        self.config.write_text(
            f"[databases]\n* = host={parts['host']} port={parts.get('port', 5432)}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\n"
            f"auth_type = trust\nauth_file = {folder / 'users'}\n"
            "pool_mode = transaction\ndefault_pool_size = 3\n"
        )
        self.options = unprivileged()
        if self.options:
            if (socket := Path(parts["host"], f".s.PGSQL.{parts.get('port', 5432)}")).exists():  # only its owner gets there
                self.options |= {"user": socket.owner(), "group": socket.group()}
            for path in (folder, *folder.iterdir()):
                shutil.chown(path, self.options["user"], self.options["group"])

    def url(self, url: str) -> str:
        """The same database for the same user by way of the pooler."""
        return make_conninfo(url, host="127.0.0.1", port=self.port)

    @contextmanager
    def running(self) -> Iterator[Running]:
        command = ["/usr/sbin/pgbouncer", self.config]
        with running(command, self.folder / "pgbouncer.log", lambda: accepts_connections(self.port), **self.options) as server:
            yield server


@pytest.fixture
def pooler(folder, server_url) -> Pooler:
    return Pooler(folder, server_url)


@pytest.fixture
def pooled_url(pooler, service_url) -> Iterator[str]:
    with pooler.running():
        yield pooler.url(service_url)


@pytest.fixture
def start_pooled(start_service, pooled_url) -> Callable[..., Service]:
    return lambda **environment: start_service(DATABASE_URL=pooled_url, **environment)


def outcomes(service: Service) -> set[str]:
    """What the log says became of the calls; anything else in it is shown whole."""
    return {
        line["outcome"] if line["event"] == "emergency_stop" else json.dumps(line) for line in service.log if line["event"] != "serving"
    }


@contextmanager
def each_server_connection(url: str) -> Iterator[list[psycopg.Connection]]:
    """Clients of the pooler with a transaction each, so that together they have all of its server connections."""
    with ExitStack() as stack:
        clients = [stack.enter_context(psycopg.connect(url, prepare_threshold=None)) for _ in range(3)]
        assert len({client.execute("SELECT pg_backend_pid()").fetchone() for client in clients}) == 3
        yield clients


def test_80_stops_over_3_server_connections(db, make_job, start_pooled, pooled_url):
    service = start_pooled()
    jobs = [make_job(running=3) for _ in range(80)]
    with ThreadPoolExecutor(80) as executor:
        answers = list(executor.map(service.stop, jobs))

    assert [answer.json for answer in answers if answer.status != 200] == []
    assert sum(count_active(db, job) for job in jobs) == 0
    assert db.execute("SELECT job_id, executions_stopped FROM emergency_stops ORDER BY job_id").fetchall() == sorted(
        (job, 3) for job in jobs
    )
    assert outcomes(service) == {"stopped"}
    query = "SELECT application_name FROM pg_stat_activity WHERE usename = 'beacon_service' AND datname = current_database()"
    assert ("beacon-stop admin",) in db.execute(query).fetchall()
    with each_server_connection(pooled_url) as clients:
        query = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'beacon_service' AND datname = current_database()"
        assert db.execute(query).fetchone()[0] == 3
        for client in clients:
            assert {name: client.execute(f"SHOW {name}").fetchone()[0] for name in DEFAULTS} == DEFAULTS
            assert client.execute("SELECT name FROM pg_prepared_statements").fetchall() == []


def test_stops_share_no_transaction(make_app, pooled_url):
    app = make_app(database_url=pooled_url)
    assert Client(app).stop("nix").status == 404
    wait_until(lambda: app.group.pool.is_pooled)
    assert not app.group.can_group


class Holder:
    """A session in the middle of a transaction that has locked a job."""

    def __init__(self, url: str, job: str) -> None:
        self.session = psycopg.connect(url, prepare_threshold=None)
        (self.pid,) = self.session.execute("SELECT pg_backend_pid()").fetchone()
        self.session.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (job,))

    def is_alive(self) -> bool:
        try:
            return self.session.execute("SELECT pg_backend_pid()").fetchone() == (self.pid,)
        except psycopg.OperationalError:
            return False


@pytest.fixture
def hold() -> Iterator[Callable[[str, str], Holder]]:
    holders = []

    def hold(url: str, job: str) -> Holder:
        holders.append(Holder(url, job))
        return holders[-1]

    yield hold
    for holder in holders:
        holder.session.close()


@pytest.mark.parametrize("forced", [(), (0, 1, 2, 3), (1, 2)], ids=["none", "all", "some"])
def test_four_locked_jobs_at_once(make_job, hold, pooler, start_pooled, pooled_url, owner_url, forced):
    """Four stops that wait, and whoever looks at them, share what a bystander has left of the three server connections."""
    service = start_pooled(BEACON_LOCK_TIMEOUT="500ms")
    jobs = [make_job(running=3) for _ in range(4)]
    urls = [owner_url, pooler.url(owner_url)]
    holders = [hold(url, job) for url, job in zip(urls * 2, jobs, strict=True)]
    bystanders = [hold(url, make_job(running=1)) for url in urls]
    with psycopg.connect(pooled_url, prepare_threshold=None) as in_the_services_pool:
        in_the_services_pool.execute("SELECT 1")
        with ThreadPoolExecutor(4) as executor:
            answers = list(executor.map(service.stop, jobs, [b'{"force": true}' if n in forced else b"{}" for n in range(4)]))

        for n, (answer, holder) in enumerate(zip(answers, holders, strict=True)):
            if n in forced:
                assert (answer.status, answer.json.get("sessions_ended")) == (200, 1), answer.json
            else:
                assert (answer.status, [one["pid"] for one in answer.json["blocked_by"]]) == (503, [holder.pid])
        assert [holder.is_alive() for holder in holders] == [n not in forced for n in range(4)]
        assert [bystander.is_alive() for bystander in bystanders] == [True, True]
        in_the_services_pool.execute("SELECT 1")


def test_two_sessions_of_the_pooler_are_enough_for_any_number_of_locked_jobs(db, make_job, hold, start_pooled, pooled_url, owner_url):
    service = start_pooled(BEACON_LOCK_TIMEOUT="300ms", BEACON_ADMIN_POOL="8")
    jobs = [make_job(running=3) for _ in range(8)]
    holders = [hold(owner_url, job) for job in jobs]
    with psycopg.connect(pooled_url, prepare_threshold=None) as bystander:
        bystander.execute("SELECT 1")
        with ThreadPoolExecutor(16) as executor:
            answers = list(executor.map(service.stop, jobs * 2))

    assert [[one["pid"] for one in answer.json["blocked_by"]] for answer in answers] == [[holder.pid] for holder in holders] * 2


@pytest.mark.parametrize("standard", ["on", "off"])
def test_any_characters_pass(db, make_job, start_pooled, standard):
    db.execute(f"ALTER DATABASE {db.info.dbname} SET standard_conforming_strings = {standard}")
    service = start_pooled()
    for id in [
        "it's",
        "back\\slash",
        "\\'; SELECT 1; --",
        "100% %s %(id)s",
        'quo"ted',
        "$$ $1 ?",
        "čšž/日本 \N{PILE OF POO}",
        "line\nend\t",
    ]:
        answer = service.stop(make_job(id, running=1), json.dumps({"reason": id}).encode())
        assert (answer.status, answer.json.get("job_id"), answer.json.get("reason")) == (200, id, id)
        assert service("GET", f"/api/v1/jobs/{quote(id, safe='')}").json["job"]["metadata"]["reason"] == id
        assert len(service("GET", f"/api/v1/executions?job_id={quote(id)}&status={quote('failed')}").json["executions"]) == 1


def test_timeouts_are_honoured(db, make_job, start_pooled):
    service = start_pooled(BEACON_STATEMENT_TIMEOUT="300ms")
    job = make_job(running=1)
    slow_down_stops(db, 2)
    answer = service.stop(job)

    assert (answer.status, answer.json) == (503, {"error": "statement timeout: the database took too long"})
    assert count_active(db, job) == 1


def test_a_database_that_defaults_to_serializable(db, make_job, start_pooled):
    db.execute(f"ALTER DATABASE {db.info.dbname} SET default_transaction_isolation = serializable")
    service = start_pooled()

    assert service.stop(make_job(running=1)).status == 200


def test_a_listening_worker_is_told(connect, make_job, start_pooled):
    service = start_pooled()
    listener = connect()
    listener.execute("LISTEN emergency_stop")
    job = make_job(running=2)
    service.stop(job)

    (notification,) = listener.notifies(timeout=10, stop_after=1)
    assert json.loads(notification.payload)["job_id"] == job


def test_a_listing_of_several_pages(make_job, start_pooled):
    service = start_pooled()
    job = make_job(pending=2_500)

    assert len({one["id"] for one in service("GET", f"/api/v1/executions?job_id={job}").json["executions"]}) == 2_500


def test_a_restart_of_the_pooler_and_of_its_sessions(db, make_job, pooler, service_url, start_service):
    with pooler.running():
        constants = "beacon_stop.POOL_TIMEOUT, beacon_stop.AWAY_TIMEOUT = 2.0, 0.3"
        service = start_service(constants, DATABASE_URL=pooler.url(service_url))
        assert service("GET", "/health/ready").status == 200
        assert service.stop(make_job(running=1)).status == 200
        db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'beacon_service'")
        assert service.stop(make_job(running=1)).status == 200
    assert service("GET", "/health/ready").status == 503
    assert service.stop(make_job(running=1)).status == 503
    with pooler.running():
        wait_until(lambda: service("GET", "/health/ready").status == 200)

        assert service.stop(make_job(running=1)).status == 200
