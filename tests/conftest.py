"""What several test modules share: a real server, a database for each test, the service's role, the application.

The server is the embedded PostgreSQL; with BEACON_TEST_POSTGRES one of the installation whose bin/ that names; or the
running one that BEACON_TEST_DATABASE_URL (of a superuser) names.
"""

import http.client
import io
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import beacon_stop
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pytest_postgresql import factories

from processes import Cluster

ROOT = Path(__file__).parent.parent
TOKEN = "a-token-that-only-operators-have"
SERVICE_PASSWORD = "service-password-in-tests"
GENEROUS = {"admin_rate": "1000000/second", "failed_rate": "1000000/second", "read_rate": "1000000/second"}


READMES = ["README.md", "sql/README.md", "sql/plproxy/README.md", "tests/README.md", "tests/servers/README.md",
           "tests/bench/README.md"]  # fmt: skip


def readme_block(language: str, containing: str) -> str:
    """A fenced block of one of the READMEs, so that what it shows is what runs here."""
    text = "\n".join((ROOT / name).read_text() for name in READMES)
    (block,) = [block for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if containing in block]
    return block


LONGEST = 60  # seconds for a test, or for what its fixtures do before it or after it


@pytest.hookimpl(wrapper=True, trylast=True)  # inside of what captures the output
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """Fail a test that takes too long, whatever it waits for: an answer that never ends must not hang the suite."""

    def fail(*_: Any) -> None:
        pytest.fail(f"it has not ended after {LONGEST} seconds")

    signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, LONGEST, 5)  # every 5 s from then on: leaving the test may wait for the same
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for handler in logging.getLogger("beacon_stop").handlers:
            handler.flush()  # a line that is written later would stand among pytest's own


pytest_runtest_setup = pytest_runtest_teardown = pytest_runtest_call


def new_folder() -> TemporaryDirectory[str]:
    """For a server's data, in memory where there is plenty: a tenth of the time for each new database.

    pytest's own folders belong to its user alone, whom PostgreSQL does not run as if that is root.
    """
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * 1024**3
    return TemporaryDirectory(prefix="beacon-test-", ignore_cleanup_errors=True, dir=memory if has_room else None)


@pytest.fixture
def folder() -> Iterator[Path]:
    with new_folder() as folder:
        yield Path(folder)


# Nothing in it has to last: what tests durability has a server of its own.
SERVER_SETTINGS = {"fsync": "off", "max_connections": 200, "max_prepared_transactions": 4}


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    if url := os.environ.get("BEACON_TEST_DATABASE_URL"):
        yield url
    elif bindir := os.environ.get("BEACON_TEST_POSTGRES"):
        with new_folder() as folder:
            cluster = Cluster(Path(folder), Path(bindir)).create(**SERVER_SETTINGS).start()
            yield cluster.url
            maintenance(cluster.url).close()
            cluster.stop()
    else:
        with new_folder() as folder:
            with beacon_stop.embedded_postgres(Path(folder)) as url, psycopg.connect(url, autocommit=True) as db:
                for name, value in SERVER_SETTINGS.items():
                    db.execute(f"ALTER SYSTEM SET {name} = {value}")
            with beacon_stop.embedded_postgres(Path(folder)) as url:
                yield url
                maintenance(url).close()


@pytest.fixture(scope="session")
def database_server(server_url: str) -> SimpleNamespace:
    """The server in the form that pytest-postgresql takes it."""
    parts = conninfo_to_dict(server_url)
    return SimpleNamespace(
        host=parts.get("host"), port=parts.get("port", 5432), user=parts.get("user"), password=parts.get("password"),
        options="", maintenance_dbname="postgres", template_dbname=None,
    )  # fmt: skip


def create_service_role(**connection: Any) -> None:
    connection.pop("autocommit")
    create_role, grants = readme_block("sql", "CREATE ROLE beacon_service").split(";", 1)
    with psycopg.connect(**connection, autocommit=True) as db:
        with suppress(psycopg.errors.DuplicateObject):  # roles are the server's, and this one may be from an earlier run
            db.execute(create_role)
        db.execute(f"ALTER ROLE beacon_service PASSWORD '{SERVICE_PASSWORD}'")
        db.execute(grants)


def install(**connection: Any) -> None:
    connection.pop("autocommit")
    beacon_stop.init_db(make_conninfo(**connection))


installed = factories.postgresql_noproc(depends_on="database_server", load=[install, create_service_role])
database_numbers = itertools.count(1)


@cache
def maintenance(server_url: str) -> psycopg.Connection:
    """The session that makes and drops databases, one for all: to connect takes as long as to make one."""
    return psycopg.connect(server_url, autocommit=True)


@contextmanager
def new_database_name(server_url: str, template: str) -> Iterator[str]:
    """A database of a name that no other test has: what an earlier one may have left running does not find it."""
    name, server = f"test_{next(database_numbers)}", maintenance(server_url)
    server.execute(f"DROP DATABASE IF EXISTS {name}")  # an interrupted run's, where the server outlives it
    server.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")  # in memory half the time of wal_log
    try:
        yield name
    finally:
        sessions = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
        wait_until(lambda: not server.execute(sessions, (name,)).fetchall())  # DROP DATABASE looks every 100 ms only
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def new_database(server_url: str, template: str) -> Iterator[psycopg.Connection]:
    with new_database_name(server_url, template) as name, psycopg.connect(server_url, dbname=name) as connection:
        yield connection


@pytest.fixture
def database(installed: Any, server_url: str) -> Iterator[SimpleNamespace]:
    """Has its name in `info.dbname`, as a connection has: hardly a test needs this one, too."""
    with new_database_name(server_url, installed.template_dbname) as name:
        yield SimpleNamespace(info=SimpleNamespace(dbname=name))


@pytest.fixture
def bare_database(server_url: str) -> Iterator[psycopg.Connection]:
    with new_database(server_url, "template0") as connection:
        yield connection


def url_of(database: Any, server_url: str, **changes: Any) -> str:
    return make_conninfo(server_url, dbname=database.info.dbname, **changes)


@pytest.fixture
def owner_url(database: Any, server_url: str) -> str:
    return url_of(database, server_url)


@pytest.fixture
def service_url(database: Any, server_url: str) -> str:
    return url_of(database, server_url, user="beacon_service", password=SERVICE_PASSWORD)


@pytest.fixture
def connect(owner_url: str) -> Iterator[Callable[..., psycopg.Connection]]:
    """Open a session, the owner's unless another URL is given. Statements end after 20 s: a lost lock does not hang."""
    sessions = []

    def connect(url: str = owner_url, **options: Any) -> psycopg.Connection:
        session = psycopg.connect(url, **{"autocommit": True, "options": "-c statement_timeout=20s", **options})
        sessions.append(session)
        return session

    yield connect
    for session in sessions:
        session.close()


@pytest.fixture
def db(connect: Callable[..., psycopg.Connection]) -> psycopg.Connection:
    """The owner's session, for setting up and looking."""
    return connect()


@pytest.fixture
def service(connect: Callable[..., psycopg.Connection], service_url: str) -> psycopg.Connection:
    """The service role's session, which may call functions and nothing else."""
    return connect(service_url)


@pytest.fixture
def make_job(db: psycopg.Connection) -> Callable[..., str]:
    """Add a job with executions, as many as are asked for of each status."""
    numbers = itertools.count(1)

    def make_job(id: str | None = None, status: str = "processing", metadata: Any = None, **executions: int) -> str:
        id = f"job-{next(numbers)}" if id is None else id
        db.execute(
            "INSERT INTO jobs (id, status, metadata) VALUES (%s, 'processing', %s)",
            (id, json.dumps(metadata) if metadata else None),
        )
        for execution_status, count in executions.items():
            db.execute("SELECT set_config('session_replication_role', %s, false)", ("replica" if count > 10_000 else "origin",))  # quick
            db.execute(
                "INSERT INTO executions (job_id, status) SELECT %s, %s FROM generate_series(1, %s)",
                (id, execution_status, count),
            )
        db.execute("SET session_replication_role = origin")
        if status != "processing":
            db.execute("UPDATE jobs SET status = %s WHERE id = %s", (status, id))
        return id

    return make_job


@pytest.fixture
def stop(service: psycopg.Connection) -> Callable[..., dict[str, Any]]:
    """Stop a job as the service does, but for HTTP."""

    def stop(id: str, reason: str | None = None) -> dict[str, Any]:
        return service.execute("SELECT emergency_stop_job(%s, %s)", (id, reason)).fetchone()[0]

    return stop


def slow_down_stops(db: psycopg.Connection, seconds: float) -> None:
    db.execute(f"""
        CREATE FUNCTION slow_down() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN PERFORM pg_sleep({seconds}); RETURN NEW; END $$;
        CREATE TRIGGER slow_down BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION slow_down()""")


def hold_stops(db: psycopg.Connection) -> None:
    """Let each stop wait, when it has just failed the executions, until `let_stops_go`."""
    db.execute("""
        CREATE FUNCTION wait_to_go_on() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            WHILE NOT pg_try_advisory_xact_lock_shared(42) LOOP  -- which no lock_timeout ends
                PERFORM pg_sleep(0.01);
            END LOOP;
            RETURN NULL; END $$;
        CREATE TRIGGER wait_to_go_on AFTER UPDATE ON executions EXECUTE FUNCTION wait_to_go_on()""")
    db.execute("SELECT pg_advisory_lock(42)")


def stops_are_held(db: psycopg.Connection) -> bool:
    held = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database())"
    return db.execute(held).fetchone()[0]


def let_stops_go(db: psycopg.Connection) -> None:
    db.execute("SELECT pg_advisory_unlock(42)")


def change_function(db: psycopg.Connection, name: str, found: str, instead: str) -> None:
    """Change a number in a function, so that a test need not wait as long, or can be sure to be in time."""
    (definition,) = db.execute("SELECT pg_get_functiondef(%s::regproc)", (name,)).fetchone()
    assert definition.count(found) == 1, definition
    db.execute(definition.replace(found, instead))


def age(db: psycopg.Connection, minutes: float, *job_ids: str) -> None:
    """Make jobs and all their executions look as if nothing had happened to them for so many minutes."""
    for statement in (
        "UPDATE jobs SET created_at = now() - %(age)s, updated_at = now() - %(age)s WHERE id = ANY (%(ids)s)",
        "UPDATE executions SET created_at = now() - %(age)s, started_at = started_at - %(age)s,"
        " completed_at = completed_at - %(age)s WHERE job_id = ANY (%(ids)s)",
    ):
        db.execute(statement, {"age": timedelta(minutes=minutes), "ids": list(job_ids)})


def count_active(db: psycopg.Connection, job_id: str) -> int:
    query = "SELECT count(*) FROM executions WHERE job_id = %s AND status IN ('pending', 'running', 'processing')"
    return db.execute(query, (job_id,)).fetchone()[0]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Calls a WSGI application under wsgiref's validator."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = validator(app)

    def __call__(self, method: str, path: str, body: bytes = b"", query: str = "", **environ: str) -> Answer:
        full: dict[str, Any] = {
            "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "CONTENT_LENGTH": str(len(body)),
            "REMOTE_ADDR": "127.0.0.1", "SCRIPT_NAME": "", "wsgi.input": io.BytesIO(body), **environ,
        }  # fmt: skip
        setup_testing_defaults(full)
        started: list[Any] = []
        parts = self.app(full, lambda status, headers, exc_info=None: started.append((status, headers)))
        try:
            data = b"".join(parts)
        finally:
            parts.close()
        status, headers = started[0]
        return Answer(int(status.split()[0]), dict(headers), data)

    def stop(self, id: str, body: bytes = b"{}", token: str = TOKEN, **environ: str) -> Answer:
        path = f"/admin/jobs/{id}/emergency-stop".encode().decode("latin-1")
        return self("POST", path, body, HTTP_X_ADMIN_TOKEN=token, **environ)


@pytest.fixture
def make_app(service_url: str) -> Iterator[Callable[..., beacon_stop.Application]]:
    apps = []

    def make_app(**settings: Any) -> beacon_stop.Application:
        app = beacon_stop.create_app({}, **{"admin_token": TOKEN, "database_url": service_url, **GENEROUS, **settings})
        apps.append(app)
        return app

    yield make_app
    for app in apps:
        app.close()


@pytest.fixture(scope="session")
def shared_url(installed: Any, server_url: str) -> Iterator[str]:
    """A database for tests that leave no trace in it: one for all, since making one takes a while."""
    with new_database(server_url, installed.template_dbname) as connection:
        yield url_of(connection, server_url, user="beacon_service", password=SERVICE_PASSWORD)


@pytest.fixture(scope="session")
def shared_service(shared_url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(shared_url, autocommit=True) as session:
        yield session


@pytest.fixture(scope="session")
def shared_app(shared_url: str) -> Iterator[beacon_stop.Application]:
    app = beacon_stop.create_app({}, admin_token=TOKEN, database_url=shared_url, **GENEROUS)
    yield app
    app.close()


@pytest.fixture(scope="session")
def shared_client(shared_app: beacon_stop.Application) -> Client:
    return Client(shared_app)


@pytest.fixture
def client(make_app: Callable[..., beacon_stop.Application]) -> Client:
    return Client(make_app())


@contextmanager
def serving(app: Callable[..., Any], host: str = "127.0.0.1") -> Iterator[beacon_stop.Server]:
    """Serve an application with the stdlib server, in threads of this process."""
    server = beacon_stop.Server(app, host, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(30)


@pytest.fixture
def serve_app() -> Iterator[Callable[..., beacon_stop.Server]]:
    with ExitStack() as servers:
        yield lambda app: servers.enter_context(serving(app))


@pytest.fixture(scope="session")
def shared_server(shared_app: beacon_stop.Application) -> Iterator[beacon_stop.Server]:
    with serving(shared_app) as server:
        yield server


@dataclass
class Service:
    """`beacon-stop serve` in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    log: list[dict[str, Any]]

    def __call__(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        return send(self.url, method, path, body, **headers)

    def stop(self, id: str, body: bytes = b"{}", token: str = TOKEN) -> Answer:
        return self("POST", f"/admin/jobs/{quote(id, safe='')}/emergency-stop", body, **{"X-Admin-Token": token})


def send(url: str, method: str, path: str, body: bytes | None = None, timeout: float = 60, **headers: str) -> Answer:
    """One HTTP request on a connection of its own."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


@pytest.fixture
def start_service(service_url: str) -> Iterator[Callable[..., Service]]:
    started: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []

    def start_service(constants: str = "", **environment: str) -> Service:
        """With `constants`, statements that change some of the module's, such as how long it waits."""
        program = f"import beacon_stop, sys\n{constants}\nsys.exit(beacon_stop.main())"
        process = subprocess.Popen(
            [sys.executable, *(["-c", program] if constants else ["-m", "beacon_stop"]), "serve", "--port", "0"],
            env={
                "PATH": os.environ["PATH"], "ADMIN_TOKEN": TOKEN, "DATABASE_URL": service_url,
                **{f"BEACON_{name}_RATE": "1000000/second" for name in ("ADMIN", "FAILED", "READ")}, **environment,
            },
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        log: list[dict[str, Any]] = []
        assert process.stderr
        while not log or log[-1]["event"] != "serving":
            log.append(json.loads(process.stderr.readline()))
        url = log[-1]["url"]
        reader = threading.Thread(target=lambda: log.extend(json.loads(line) for line in process.stderr))
        reader.start()
        readers.append(reader)
        return Service(process, url, log)

    yield start_service
    for process in started:
        process.terminate()
        process.wait(30)
    for process, reader in zip(started, readers, strict=False):
        reader.join(10)
        process.stderr.close()


def log_lines(capsys: pytest.CaptureFixture[str], event: str = "emergency_stop") -> list[dict[str, Any]]:
    """What the application has logged of an event since this was asked for the last time."""
    beacon_stop.LOG_HANDLER.flush()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    return [line for line in lines if line["event"] == event]


@contextmanager
def in_thread(function: Callable[..., Any], *arguments: Any) -> Iterator[SimpleNamespace]:
    """Run a function beside the block; its result is there after the block, or its exception is raised."""
    outcome = SimpleNamespace(result=None, error=None)

    def run() -> None:
        try:
            outcome.result = function(*arguments)
        except Exception as error:
            outcome.error = error

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield outcome
    finally:
        thread.join(60)
    assert not thread.is_alive(), "the function is still running"
    if outcome.error:
        raise outcome.error


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """Wait for a condition and return its value; fails when the time is up."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)
    return value


def is_waiting(db: psycopg.Connection, session: psycopg.Connection) -> bool:
    """Whether a session waits for a lock, and not in passing: a stop's first wait ends after a few milliseconds."""
    query = """
        SELECT EXISTS (
            SELECT FROM pg_locks WHERE pid = %s AND NOT granted AND waitstart < clock_timestamp() - interval '20 ms')"""
    return db.execute(query, (session.info.backend_pid,)).fetchone()[0]
