"""One application under every WSGI server: started for real, as the README says, on a real database, by several callers at once."""

import http.client
import json
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import beacon_stop
import psutil
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from conftest import (
    ROOT,
    SERVICE_PASSWORD,
    TOKEN,
    Answer,
    create_service_role,
    new_folder,
    readme_block,
    send,
    url_of,
    wait_until,
)
from processes import Cluster, Running, accepts_connections, free_port, has_ended, running

LARGE = b'{"reason": "' + b"x" * 20_000 + b'"}'


@dataclass(frozen=True)
class Kind:
    """How a server is started, and what it does by itself."""

    command: str
    mount: str = ""  # the prefix below which it serves the application
    processes: int = 1  # that answer
    watched: bool = True  # by a process that answers nothing
    at_once: int = 4  # calls that it answers beside another one, at least
    keeps_alive: bool = True
    takes_chunks: bool = True
    stop_signal: int = signal.SIGTERM
    status: int = 0  # with which it ends
    environment: dict[str, str] = field(default_factory=dict)


GUNICORN = "gunicorn --no-control-socket --bind 127.0.0.1:{port}"
UWSGI = (
    "uwsgi --http-socket 127.0.0.1:{port} --master --die-on-term --need-app --disable-logging"
    " --processes 2 --threads 8 --virtualenv {venv} --add-header 'Connection: close'"
)

KINDS = {
    "gunicorn sync": Kind(f"{GUNICORN} --workers 2 beacon_stop:application", processes=2, at_once=1, keeps_alive=False),
    "gunicorn gthread": Kind(
        f"{GUNICORN} --worker-class gthread --workers 2 --threads 8 beacon_stop:application",
        mount="/prefix", processes=2, environment={"SCRIPT_NAME": "/prefix"},
    ),
    "gunicorn gevent": Kind(f"{GUNICORN} --worker-class gevent beacon_stop:application"),
    "gunicorn gevent preload": Kind(
        f"{GUNICORN} --config {{folder}}/gunicorn.conf.py --preload --worker-class gevent --workers 2 beacon_stop:application",
        processes=2,
    ),
    "gunicorn preload": Kind(f"{GUNICORN} --preload --workers 2 --threads 8 beacon_stop:application", processes=2),
    "gunicorn preload create_app": Kind(f"{GUNICORN} --preload --workers 2 --threads 8 'beacon_stop:create_app()'", processes=2),
    "gunicorn under wsgiref.validate": Kind(f"{GUNICORN} --threads 8 --pythonpath {{folder}} validated:application"),
    "waitress": Kind(
        "waitress-serve --listen 127.0.0.1:{port} --threads 16 --url-prefix /prefix beacon_stop:application",
        mount="/prefix", watched=False, stop_signal=signal.SIGINT,
    ),
    "cheroot": Kind("cheroot --bind 127.0.0.1:{port} --threads 8 beacon_stop:application", watched=False, status=-signal.SIGTERM),
    "granian": Kind(
        "granian --interface wsgi --port {port} --workers 2 --blocking-threads 8 --backpressure 8"
        " --url-path-prefix /prefix beacon_stop:application",
        mount="/prefix", processes=2,
    ),
    "uwsgi": Kind(f"{UWSGI} --module beacon_stop:application", processes=2, keeps_alive=False, takes_chunks=False),
    "uwsgi lazy-apps": Kind(
        f"{UWSGI} --lazy-apps --mount /prefix=beacon_stop:application --manage-script-name",
        mount="/prefix", processes=2, keeps_alive=False, takes_chunks=False,
    ),
    "apache": Kind("/usr/sbin/apache2 -f {folder}/apache.conf -D FOREGROUND", mount="/prefix", processes=2),
    "beacon-stop serve": Kind("beacon-stop serve --port {port}", watched=False, takes_chunks=False),
}  # fmt: skip


def test_the_readme_says_how_each_server_is_started_here():
    block = readme_block("bash", "gunicorn --workers 2").replace("\\\n", "")
    shown = [shlex.split(line) for line in block.splitlines() if not line.startswith("#")]
    started = [{*shlex.split(kind.command.format(port=8080, folder="", venv="")), "SCRIPT_NAME=/prefix"} for kind in KINDS.values()]

    assert len(shown) >= len(KINDS) - 3  # Apache's has no command, and two others only options
    for command in shown:
        assert any(set(command) <= options for options in started), command


VALIDATED = "from wsgiref.validate import validator; import beacon_stop; application = validator(beacon_stop.application)"

GUNICORN_CONF = "from gevent import monkey; monkey.patch_all()"  # else it would come after what is preloaded

WSGI_FILE = """
import sys
sys.stderr = open(2, "w", closefd=False)  # Apache's own log object would escape what JSON has escaped
from beacon_stop import application
"""

APACHE = """
ServerName localhost
Listen 127.0.0.1:{port}
PidFile {folder}/apache.pid
ErrorLog /dev/stderr
ErrorLogFormat %M
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule wsgi_module /usr/lib/apache2/modules/mod_wsgi.so
User www-data
Group www-data
WSGISocketPrefix {folder}/wsgi
WSGIDaemonProcess beacon processes=2 threads=8 python-path={folder}
WSGIScriptAlias /prefix {folder}/beacon.wsgi process-group=beacon application-group=%{{GLOBAL}}
WSGIChunkedRequest On
AllowEncodedSlashes On
"""


def prepare(folder: Path, port: int) -> None:
    """What the command lines expect in a folder. Apache's users read the module there: the clone may be closed to them."""
    site_packages = Path(sysconfig.get_path("purelib"))
    folder.chmod(0o755)
    (folder / "validated.py").write_text(VALIDATED)
    (folder / "gunicorn.conf.py").write_text(GUNICORN_CONF)
    (folder / "beacon.wsgi").write_text(WSGI_FILE)
    (folder / "apache.conf").write_text(APACHE.format(port=port, folder=folder))
    (folder / "beacon_stop.py").write_bytes(Path(beacon_stop.__file__).read_bytes())
    for package in [*site_packages.glob("psycopg*"), *site_packages.glob("typing_extensions*")]:
        if package.is_dir():
            shutil.copytree(package, folder / package.name)
        else:
            shutil.copy(package, folder)


@dataclass
class Served:
    """A server that runs."""

    kind: Kind
    port: int
    running: Running
    database_port: int
    startup: int = 0  # the length of the log when it was ready

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        answer = send(f"http://127.0.0.1:{self.port}", method, self.kind.mount + path, body, **headers)
        return replace(answer, headers={name.lower(): value for name, value in answer.headers.items()})  # servers write them as they like

    def stop(self, id: str, body: Any = b"{}", **headers: str) -> Answer:
        return self("POST", f"/admin/jobs/{quote(id, safe='')}/emergency-stop", body, **{"X-Admin-Token": TOKEN, **headers})

    def stop_in_chunks(self, id: str, body: bytes) -> Answer:
        """A stop with a body of unknown length, sent whole before the answer is awaited: it may be refused unread."""
        encoded = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:1], body[1:], b""))
        return self.stop(id, encoded, **{"Transfer-Encoding": "chunked"})

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged since it was ready, which is our JSON and nothing else."""
        lines = self.running.log_file.read_bytes()[self.startup :].decode().splitlines()
        assert [line for line in lines if not line.startswith("{")] == []
        return [json.loads(line) for line in lines]

    def family(self) -> list[psutil.Process]:
        process = psutil.Process(self.running.process.pid)
        return [process, *process.children(recursive=True)]

    def database_ports(self) -> dict[int, set[int]]:
        """The local ports of the database connections, by the process that has them open."""
        ports = {
            process.pid: {
                connection.laddr.port
                for connection in process.net_connections("tcp")
                if connection.raddr and connection.raddr.port == self.database_port
            }
            for process in self.family()
        }
        return {pid: numbers for pid, numbers in ports.items() if numbers}

    def all_answer(self) -> bool:
        """Call until each process has answered, which is when it connects."""
        with suppress(OSError, http.client.HTTPException), ThreadPoolExecutor(8) as callers:
            statuses = {answer.status for answer in callers.map(lambda _: self("GET", "/health/ready"), range(16))}
            return statuses == {200} and len(self.database_ports()) == self.kind.processes
        return False


@contextmanager
def serving(kind: Kind, url: str, folder: Path) -> Iterator[Served]:
    port = free_port()
    prepare(folder, port)
    program, *arguments = shlex.split(kind.command.format(port=port, folder=folder, venv=sys.prefix))
    environment = {
        "ADMIN_TOKEN": TOKEN, "DATABASE_URL": url, "BEACON_LOCK_TIMEOUT": "300ms",
        **{f"BEACON_{name}_RATE": "1000000/second" for name in ("ADMIN", "FAILED", "READ")}, **kind.environment,
    }  # fmt: skip
    with running(
        [Path(sys.executable).parent / program, *arguments],
        folder / "log",
        lambda: accepts_connections(port),
        environment,
        cwd=ROOT,
    ) as process:
        server = Served(kind, port, process, int(conninfo_to_dict(url)["port"]))
        wait_until(server.all_answer, 30)
        server.startup = process.log_file.stat().st_size
        yield server


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    """PostgreSQL on TCP, where the two ends of a connection can be told from outside."""
    with new_folder() as folder:
        cluster = Cluster(Path(folder)).create(fsync="off").start()
        try:
            yield cluster.url
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def database(server_url: str) -> Iterator[psycopg.Connection]:
    """One database for all: a server starts once for several tests."""
    beacon_stop.init_db(server_url)
    create_service_role(conninfo=server_url, autocommit=True)
    with psycopg.connect(server_url) as connection:
        yield connection


@pytest.fixture(scope="module", params=KINDS)
def started(request: pytest.FixtureRequest, database: psycopg.Connection, server_url: str) -> Iterator[Served]:
    with new_folder() as folder:
        url = url_of(database, server_url, user="beacon_service", password=SERVICE_PASSWORD)
        with serving(KINDS[request.param], url, Path(folder)) as server:
            yield server


@pytest.fixture
def server(started: Served) -> Iterator[Served]:
    before = len(started.lines())
    yield started
    assert [line for line in started.lines()[before:] if "outcome" not in line] == []


@pytest.fixture
def make_job(make_job: Callable[..., str]) -> Callable[..., str]:
    return lambda id="job", **options: make_job(f"{id}-{uuid.uuid4()}", **options)


def test_eight_callers_stop_their_jobs_and_a_shared_one(server, make_job, db):
    shared = make_job(running=42, completed=10)
    jobs = [[make_job(running=3) for _ in range(3)] for _ in range(8)]
    before = len(server.lines())

    def call(caller: int) -> list[Answer]:
        reason = json.dumps({"reason": f"caller {caller}"}).encode()
        answers = []
        for job_id in [*jobs[caller], shared]:
            assert server("GET", f"/api/v1/jobs/{job_id}").json["job"]["id"] == job_id
            answers.append((server.stop_in_chunks if server.kind.takes_chunks else server.stop)(job_id, reason))
            assert server("GET", f"/api/v1/jobs/{job_id}").json["status"] == "failed"
            listed = server("GET", f"/api/v1/executions?job_id={job_id}").json["executions"]
            assert Counter(each["status"] for each in listed) == ({"failed": 42, "completed": 10} if job_id == shared else {"failed": 3})
        return answers

    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(call, range(8)))

    for caller, own in enumerate(answers):
        assert [(a.status, a.json["message"], a.json["executions_stopped"]) for a in own[:3]] == [(200, "Job emergency stopped", 3)] * 3
        assert db.execute("SELECT array_agg(DISTINCT reason) FROM emergency_stops WHERE job_id = ANY(%s)", (jobs[caller],)).fetchone() == (
            [f"caller {caller}"],
        )
    messages = sorted(own[3].json["message"] for own in answers)
    assert messages == ["Job already in terminal state"] * 7 + ["Job emergency stopped"]
    assert db.execute("SELECT count(*), sum(executions_stopped) FROM emergency_stops WHERE job_id = %s", (shared,)).fetchone() == (1, 42)
    answered = sorted(answer.headers["x-request-id"] for own in answers for answer in own)
    wait_until(lambda: len(server.lines()) >= before + len(answered))  # no answer waits for its line
    assert sorted(line["request_id"] for line in server.lines()[before:]) == answered


def test_bodies_of_any_kind(server, make_job, db):
    job_id = make_job(running=1)

    assert server.stop(job_id, LARGE).status == 413
    answer = server.stop_in_chunks(job_id, LARGE)
    assert (answer.status, answer.headers["content-type"]) == (
        413 if server.kind.takes_chunks else 411,
        "application/json",
    )
    assert server.stop_in_chunks(job_id, b"[]").status == (400 if server.kind.takes_chunks else 411)
    assert server.stop(job_id, b"{").status == 400
    assert db.execute("SELECT status FROM jobs WHERE id = %s", (job_id,)).fetchone() == ("processing",)
    assert server.stop(job_id, None).json["executions_stopped"] == 1


IDS = [
    "a b",
    "a/b",
    "/",
    "//",
    "a//b",
    "a/",
    "..",
    ".",
    "a/../b",
    "a/./b",
    "a%2Fb",
    "a%2fb",
    "%2F",
    "100%",
    "ä",
    "日本",
    "?x=1#y",
    "\r\n",
]
IDS += ["'\"\\", "a;b", "x" * 255]


def test_an_id_of_any_characters_is_that_job_and_no_other(server, db):
    for id in IDS:
        db.execute("INSERT INTO jobs (id, status) VALUES (%s, 'processing') ON CONFLICT (id) DO NOTHING", (id,))

    assert [server("GET", f"/api/v1/jobs/{quote(id, safe='')}").json.get("job", {}).get("id") for id in IDS] == IDS
    assert [server.stop(id).json.get("job_id") for id in IDS] == IDS
    wait_until(lambda: sorted(line["job_id"] for line in server.lines() if line["job_id"] in IDS) == sorted(IDS))


REFUSALS = {
    "no token": ("POST", "/admin/jobs/x/emergency-stop", {"X-Admin-Token": "wrong"}, 403, "forbidden"),
    "an unknown job": ("POST", "/admin/jobs/nix/emergency-stop", {"X-Admin-Token": TOKEN}, 404, "job not found"),
    "an id that is not UTF-8": (
        "POST",
        "/admin/jobs/%ff/emergency-stop",
        {"X-Admin-Token": TOKEN},
        400,
        "job id cannot be used: expected text of 1 to 255 characters of UTF-8",
    ),
    "no such route": ("GET", "/admin", {}, 404, "no such route"),
    "another method": ("DELETE", "/api/v1/jobs/x", {}, 405, "method not allowed"),
    "no job": ("GET", "/api/v1/executions", {}, 400, "job_id is missing"),
}


def test_errors_are_json_and_name_the_request(server):
    for name, (method, path, headers, status, error) in REFUSALS.items():
        answer = server(method, path, **headers, **{"X-Request-ID": "mine"})
        assert answer.status == status, name
        assert answer.json["error"].startswith(error)
        assert (answer.headers["x-request-id"], answer.headers["content-type"]) == ("mine", "application/json")
        assert answer.headers["cache-control"] == "no-store"


def test_head(server, make_job):
    path = f"/api/v1/jobs/{make_job()}"

    full, head = server("GET", path), server("HEAD", path)
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(full.body))


def test_a_connection_is_used_again(server, make_job):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    sockets = set()
    with closing(connection):
        for job_id in [make_job(running=1) for _ in range(5)]:
            connection.request(
                "POST",
                f"{server.kind.mount}/admin/jobs/{job_id}/emergency-stop",
                b'{"reason": "again"}',
                {"X-Admin-Token": TOKEN},
            )
            sockets.add(connection.sock)
            assert json.loads(connection.getresponse().read())["job_id"] == job_id

    assert len(sockets) == (1 if server.kind.keeps_alive else 5)


def test_a_listing_of_many_pages(server, make_job):
    job_id = make_job(completed=5_000, pending=1)

    answer = server("GET", f"/api/v1/executions?job_id={job_id}")
    ids = [execution["id"] for execution in answer.json["executions"]]
    assert (len(ids), ids) == (5_001, sorted(set(ids)))
    assert len(server("GET", f"/api/v1/executions?job_id={job_id}&status=pending").json["executions"]) == 1


def test_a_locked_job_keeps_no_others_out_and_can_be_forced(server, make_job, connect):
    locked = make_job(running=1)
    holder = connect(autocommit=False, application_name="holder")
    holder.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (locked,))

    others = 0
    with ThreadPoolExecutor(server.kind.at_once) as callers:
        calls = [callers.submit(server.stop, locked) for _ in range(server.kind.at_once)]
        while not any(call.done() for call in calls):
            assert server.stop(make_job(running=1)).json["executions_stopped"] == 1
            others += 1
    assert others
    for call in calls:
        answer = call.result()
        assert (answer.status, answer.json["error"], answer.headers["retry-after"]) == (503, "job is locked", "2")
        (blocker,) = answer.json["blocked_by"]
        assert (blocker["pid"], blocker["application_name"]) == (holder.info.backend_pid, "holder")
        assert blocker["state"] == "idle in transaction"
    assert server.stop(locked, b'{"force": true}').json["sessions_ended"] == 1


def test_each_process_has_connections_of_its_own_and_the_one_that_watches_them_has_none(server, db):
    ports = server.database_ports()

    assert len(ports) == server.kind.processes
    assert (server.running.process.pid in ports) == (not server.kind.watched)
    backends = [port for (port,) in db.execute("SELECT client_port FROM pg_stat_activity WHERE usename = 'beacon_service'")]
    assert sorted(port for numbers in ports.values() for port in numbers) == sorted(backends)


def test_a_signal_ends_it_and_leaves_nothing_behind(started, db):
    """The last test of each server, which is not there any more afterwards."""
    family = started.family()
    assert db.execute("SELECT pid FROM pg_stat_activity WHERE usename = 'beacon_service'").fetchone()

    started.running.process.send_signal(started.kind.stop_signal)
    assert started.running.process.wait(20) == started.kind.status
    wait_until(lambda: all(map(has_ended, family)))
    wait_until(lambda: not db.execute("SELECT pid FROM pg_stat_activity WHERE usename = 'beacon_service'").fetchone())
    assert not re.search("Traceback|Exception|error", started.running.log)
