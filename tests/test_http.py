"""The application, called through wsgiref's validator: routes, answers, refusals, limits, the log."""

import io
import json
import re
import socket
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import beacon_stop
import psutil
import psycopg
import psycopg_pool
import pytest
from psycopg.conninfo import make_conninfo

from conftest import (
    GENEROUS,
    SERVICE_PASSWORD,
    TOKEN,
    Client,
    count_active,
    in_thread,
    log_lines,
    new_database,
    slow_down_stops,
    url_of,
    wait_until,
)  # fmt: skip
from processes import suspended

# --- The stop ---


def test_stop(client, make_job, db):
    job_id = make_job(running=3)

    answer = client.stop(job_id)
    assert answer.status == 200
    assert list(answer.json) == [
        "ok",
        "message",
        "job_id",
        "previous_status",
        "new_status",
        "executions_stopped",
        "stopped_at",
    ]
    assert (answer.json["executions_stopped"], count_active(db, job_id)) == (3, 0)

    answer = client.stop(job_id)
    assert answer.status == 200
    assert answer.json == {
        "ok": True, "message": "Job already in terminal state", "job_id": job_id, "status": "failed", "action": "none",
    }  # fmt: skip


def test_the_answer_is_postgresqls_own(client, make_job, db):
    job_id = make_job(running=1)
    client.stop(job_id)

    assert client.stop(job_id).body.decode() == db.execute("SELECT emergency_stop_job(%s)::text", (job_id,)).fetchone()[0] + "\n"


def test_an_unknown_job(client):
    answer = client.stop("nix")

    assert (answer.status, answer.json) == (404, {"error": "job not found", "job_id": "nix"})


def test_leftovers(client, make_job):
    answer = client.stop(make_job(status="cancelled", running=2))

    assert (answer.status, answer.json["action"], answer.json["executions_stopped"]) == (200, "executions_stopped", 2)


IDS = [
    "a/b",
    "a/emergency-stop",
    "/",
    "//",
    "100%",
    "%2F",
    "a b",
    "äöü",
    "日本",
    "\n",
    "\r\n",
    "\x01",
    "?x=1#y",
    "..",
    "'\"\\",
    "x" * 255,
    "𝔘" * 255,
]


@pytest.mark.parametrize("id", IDS)
def test_ids_of_any_characters(client, make_job, id):
    make_job(id, running=1)

    assert client.stop(id).json["job_id"] == id
    assert client("GET", f"/api/v1/jobs/{id}".encode().decode("latin-1")).json["job"]["id"] == id


@pytest.mark.parametrize("id", ["", "x" * 256, "a\0b", "\udcff"])
def test_ids_that_no_table_can_hold(shared_client, id):
    path = f"/admin/jobs/{id}/emergency-stop".encode("utf-8", "surrogateescape").decode("latin-1")

    answer = shared_client("POST", path, HTTP_X_ADMIN_TOKEN=TOKEN)
    assert answer.status == 400
    assert answer.json["error"].startswith("job id cannot be used: expected text of 1 to 255 characters")


TIDIED = {
    "joined slashes": (
        "a//b",
        "/admin/jobs/a/b/emergency-stop",
        {"REQUEST_URI": "/admin/jobs/a%2F%2Fb/emergency-stop"},
    ),
    "a joined slash at the end": (
        "a/",
        "/admin/jobs/a/emergency-stop",
        {"REQUEST_URI": "/admin/jobs/a%2f/emergency-stop?x=/"},
    ),
    "resolved dots": (
        "a/../b",
        "/admin/jobs/b/emergency-stop",
        {"REQUEST_URI": "/admin/jobs/a%2F..%2Fb/emergency-stop"},
    ),
    "slashes left as they are": (
        "ä/b",
        "/admin/jobs/\u00c3\u00a4%2Fb/emergency-stop",
        {"REQUEST_URI": "/admin/jobs/%C3%A4%2Fb/emergency-stop"},
    ),
    "nothing decoded": ("a/b", "/admin/jobs/a%2Fb/emergency-stop", {"REQUEST_URI": "/admin/jobs/a%2Fb/emergency-stop"}),
    "a percent sign": ("a%2Fb", "/admin/jobs/a%2Fb/emergency-stop", {"RAW_URI": "/admin/jobs/a%252Fb/emergency-stop"}),
    "bytes": (
        "ä//b",
        "/admin/jobs/\u00c3\u00a4/b/emergency-stop",
        {"REQUEST_URI": "/admin/jobs/\u00c3\u00a4%2F/b/emergency-stop"},
    ),
    "below a prefix": (
        "a//b",
        "/admin/jobs/a/b/emergency-stop",
        {"SCRIPT_NAME": "/x", "RAW_URI": "/x/admin/jobs/a//b/emergency-stop"},
    ),
    "an absolute target": (
        "//",
        "/admin/jobs/emergency-stop",
        {"REQUEST_URI": "HTTP://x:1/admin/jobs/%2F%2F/emergency-stop"},
    ),
    "rewritten": ("a", "/admin/jobs/a/emergency-stop", {"REQUEST_URI": "/brake?job=a"}),
    "rewritten below a prefix": (
        "a",
        "/admin/jobs/a/emergency-stop",
        {"SCRIPT_NAME": "/x", "REQUEST_URI": "/admin/jobs/b/emergency-stop"},
    ),
    "a prefix taken away": ("a", "/admin/jobs/a/emergency-stop", {"REQUEST_URI": "/x/admin/jobs/a/emergency-stop"}),
}


@pytest.mark.parametrize("name", TIDIED)
def test_a_path_that_the_server_tidied_up_is_not_taken_for_another_jobs(client, make_job, db, name):
    id, path, environ = TIDIED[name]
    for each in {id, "a", "b", "a/b", "a%2Fb"}:
        make_job(each, running=1)

    assert client("POST", path, HTTP_X_ADMIN_TOKEN=TOKEN, **environ).json["job_id"] == id
    assert db.execute("SELECT job_id FROM emergency_stops").fetchall() == [(id,)]


def test_dots_lead_to_no_route_but_the_one_that_the_server_sees(client, make_job, db):
    make_job("x", running=1)
    sent = "/admin/jobs/../../api/v1/jobs/x/emergency-stop"

    assert client("GET", "/api/v1/jobs/x/emergency-stop", REQUEST_URI=sent).json == {
        "error": "job not found",
        "job_id": "x/emergency-stop",
    }


def test_the_reason(client, make_job, db):
    job_id = make_job(running=1)

    assert client.stop(job_id, b'{"reason": "costs", "actor": "ann"}').json["reason"] == "costs"
    assert db.execute("SELECT reason, database_user FROM emergency_stops").fetchone() == ("costs", "beacon_service")


def test_the_record_says_who_called(client, make_job, db):
    client.stop(make_job(running=1), b'{"actor": "ann"}', HTTP_X_REQUEST_ID="req-1")

    caller = {"actor": "ann", "client": "127.0.0.1", "request_id": "req-1"}
    assert db.execute("SELECT caller, stopped_by FROM emergency_stops").fetchone() == (caller, "admin")


@pytest.mark.parametrize("body", [b"", b"{}", b" { } ", b'{"reason": null, "force": null, "actor": null}', b'{"force": false}'])
def test_bodies_that_ask_for_nothing_special(client, make_job, body):
    answer = client.stop(make_job(running=1), body)

    assert (answer.status, "reason" in answer.json) == (200, False)


BODIES = {
    b"x": "body is not JSON",
    b" ": "body is not JSON",
    b"{": "body is not JSON",
    b'{"a": NaN}': "body is not JSON",
    b'{"a": -Infinity}': "body is not JSON",
    b"\xff": "body is not JSON",
    b"\xef\xbb\xbf{}": "body is not JSON",
    b"[" * 16_000: "body is not JSON",
    b'{"a":' * 3_000: "body is not JSON",
    b"[]": "body is not a JSON object",
    b"null": "body is not a JSON object",
    b'"x"': "body is not a JSON object",
    b'{"reason": 1}': "reason cannot be used",
    b'{"reason": ["x"]}': "reason cannot be used",
    b'{"reason": "\\u0000"}': "reason cannot be used",
    b'{"reason": "\\ud800"}': "reason cannot be used",
    json.dumps({"reason": "x" * 1_001}).encode(): "reason cannot be used: expected text of at most 1000 characters",
    b'{"force": 1}': "force cannot be used",
    b'{"force": "true"}': "force cannot be used",
    b'{"force": ' + b"9" * 9_000 + b"}": "force cannot be used",
    b'{"dry_run": 0}': "dry_run cannot be used",
    b'{"actor": 1}': "actor cannot be used",
    json.dumps({"actor": "x" * 201}).encode(): "actor cannot be used: expected text of at most 200 characters",
    # 1.0 stopped the job, and lost the reason.
    b'{"dryrun": true, "reson": "x"}': "body has an unknown key 'dryrun': expected reason, force, actor, dry_run",
    b'{"forced": true}': "body has an unknown key 'forced'",
    b'{"dry_run": true, "dry_run": false}': "body has a key twice",
}


def test_bodies_that_cannot_be_used_stop_nothing(client, make_job, db):
    job_id = make_job(running=1)

    for body, message in BODIES.items():
        answer = client.stop(job_id, body)
        assert (answer.status, answer.json["error"][: len(message)]) == (400, message)
        assert count_active(db, job_id) == 1


UNKNOWN_PARAMETERS = {  # 1.0 did not look at them: it stopped the job of ?dry_run=true
    "POST /admin/jobs/{job_id}/emergency-stop?dry_run=true": "'dry_run': expected none",
    "POST /admin/jobs/{job_id}/emergency-stop?force": "'force': expected none",
    "GET /admin/jobs/{job_id}/emergency-stop?x=": "'x': expected none",
    "POST /admin/jobs/{job_id}/release?reason=x&status=pending": "'reason': expected none",
    "POST /admin/emergency-stop?job_ids={job_id}": "'job_ids': expected none",
    "GET /admin/runaways?minutes=5&m%C3%A4x=1": "'mäx': expected minutes, max_jobs",
    "POST /admin/timeout-stuck-jobs?threshold=90": "'threshold': expected threshold_minutes",
    "POST /admin/repair-stuck-jobs?max_age=1": "'max_age': expected max_age_hours",
}


def test_parameters_that_are_not_known_change_nothing(client, make_job, db):
    job_id = make_job(running=1)

    for call, problem in UNKNOWN_PARAMETERS.items():
        method, target = call.format(job_id=job_id).split()
        path, _, query = target.partition("?")
        assert client(method, path, query=query).status == 403
        answer = client(method, path, query=query, HTTP_X_ADMIN_TOKEN=TOKEN)
        assert (answer.status, answer.json) == (400, {"error": f"query has an unknown parameter {problem}"})
        assert count_active(db, job_id) == 1


def test_a_body_of_16_kib_and_not_one_byte_more(client, make_job, db):
    job_id = make_job(running=1)
    body = b"{}".ljust(16 * 1024)

    assert client.stop(job_id, body + b" ").status == 413
    assert client.stop(job_id, b"x" * 100_000).status == 413
    assert count_active(db, job_id) == 1
    assert client.stop(job_id, body).status == 200


def test_a_body_of_unknown_length(client, make_job):
    job_id = make_job(running=1)

    assert client.stop(job_id, CONTENT_LENGTH="", HTTP_TRANSFER_ENCODING="chunked").status == 411
    assert client.stop(job_id, b"{}", CONTENT_LENGTH="9").status == 400


# --- The token ---


@pytest.mark.parametrize("token", [None, "", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), f"{TOKEN},{TOKEN}", "ä" * 20])
def test_without_the_token_nothing_is_told(client, make_job, db, token):
    job_id = make_job(running=1)
    headers = {} if token is None else {"HTTP_X_ADMIN_TOKEN": token}

    answers = [
        client("POST", f"/admin/jobs/{id}/emergency-stop", body, **headers) for id in (job_id, "nix", "x" * 300) for body in (b"{}", b"[")
    ]
    assert {(answer.status, answer.body) for answer in answers} == {(403, b'{"error": "forbidden"}\n')}
    assert count_active(db, job_id) == 1


def test_a_token_of_other_letters(make_app, make_job):
    client = Client(make_app(admin_token="schlüssel-für-alle-fälle"))

    assert client.stop(make_job(), token="schlüssel-für-alle-fälle".encode().decode("latin-1")).status == 200


def test_the_token_in_any_other_place_is_not_looked_at(client, make_job):
    job_id = make_job(running=1)
    path = f"/admin/jobs/{job_id}/emergency-stop"

    assert client("POST", path, query=f"token={TOKEN}&X-Admin-Token={TOKEN}").status == 403
    assert client("POST", path, HTTP_AUTHORIZATION=f"Bearer {TOKEN}").status == 403
    assert client("POST", path, json.dumps({"token": TOKEN}).encode(), HTTP_COOKIE=f"token={TOKEN}").status == 403


# --- Reading ---


def test_a_job(client, make_job):
    job_id = make_job(metadata={"a": 1})

    answer = client("GET", f"/api/v1/jobs/{job_id}")
    assert answer.status == 200
    assert list(answer.json) == ["job", "status"]
    assert list(answer.json["job"]) == ["id", "status", "metadata", "created_at", "updated_at"]
    answer = client("GET", "/api/v1/jobs/nix")
    assert (answer.status, answer.json) == (404, {"error": "job not found", "job_id": "nix"})


def test_a_job_whose_metadata_has_an_error_is_found(client, make_job):
    assert client("GET", f"/api/v1/jobs/{make_job(metadata={'error': 'x'})}").status == 200


@pytest.mark.parametrize("metadata", ['{"n": 1e5000}', '{"a": ' + "[" * 3_000 + "]" * 3_000 + "}"])
def test_metadata_that_python_could_not_read(client, db, make_job, metadata):
    job_id = make_job()
    db.execute("UPDATE jobs SET metadata = %s", (metadata,))

    assert client("GET", f"/api/v1/jobs/{job_id}").status == 200
    assert client.stop(job_id).status == 200


def test_executions(client, make_job, db):
    make_job(running=1)
    job_id = make_job(running=3, completed=2)

    def ids(query):
        answer = client("GET", "/api/v1/executions", query=query)
        assert answer.status == 200
        assert list(answer.json) == ["executions"]
        return [execution["id"] for execution in answer.json["executions"]]

    assert ids(f"job_id={job_id}") == [2, 3, 4, 5, 6]
    assert ids(f"job_id={job_id}&status=completed") == [5, 6]
    assert ids(f"job_id={job_id}&limit=2") == [2, 3]
    assert ids(f"job_id={job_id}&after=3&limit=2&unknown=x") == [4, 5]
    assert ids("job_id=nix") == []
    assert ids(f"job_id={job_id}&status=no+such") == []
    db.execute("INSERT INTO executions (id, job_id) VALUES (-5, %s), (-3, %s)", (job_id, job_id))
    assert ids(f"job_id={job_id}&limit=3") == [-5, -3, 2]
    assert ids(f"job_id={job_id}&after=-5&limit=2") == [-3, 2]
    make_job("jöb", running=1)
    assert ids("job_id=j%C3%B6b") == ids("job_id=jöb".encode().decode("latin-1")) == [7]


@pytest.mark.parametrize("count", [999, 1_000, 1_001, 2_500])
def test_executions_of_several_pages(client, make_job, count):
    answer = client("GET", "/api/v1/executions", query=f"job_id={make_job(completed=count)}")

    assert [execution["id"] for execution in answer.json["executions"]] == list(range(1, count + 1))
    assert "Content-Length" not in answer.headers


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("", "job_id is missing"),
        ("job_id=", "job id cannot be used"),
        ("job_id=a%00", "job id cannot be used"),
        ("job_id=%ff", "query cannot be read"),
        ("job_id=\xff", "query cannot be read"),
        ("job_id=" + "x" * 256, "job id cannot be used"),
        ("job_id=a&job_id=b", "job_id is given 2 times"),
        ("job_id=a&limit=0", "limit cannot be used: expected a whole number from 1 to"),
        ("job_id=a&limit=-1", "limit cannot be used"),
        ("job_id=a&limit=1.5", "limit cannot be used"),
        ("job_id=a&limit=%D9%A3", "limit cannot be used"),
        ("job_id=a&limit=99999999999999999999", "limit cannot be used"),
        ("job_id=a&after=x", "after is 'x': expected the id of an execution"),
        ("job_id=a&after=", "after cannot be used"),
        ("job_id=a&status=", "status cannot be used"),
        ("job_id=a&status=%00", "status cannot be used"),
        ("&".join("x" for _ in range(200)), "query cannot be read"),
    ],
)
def test_queries_that_cannot_be_used(shared_client, query, error):
    answer = shared_client("GET", "/api/v1/executions", query=query)

    assert answer.status == 400
    assert answer.json["error"].startswith(error)


def test_health(client, make_app, db):
    assert client("GET", "/health/live").json == {"ok": True}
    assert client("GET", "/health/ready").json == {"ok": True}

    db.execute("DROP FUNCTION get_job(text)")
    db.execute("REVOKE EXECUTE ON FUNCTION emergency_stop_status(text) FROM beacon_service")
    answer = client("GET", "/health/ready")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
    assert set(answer.json["faults"]) == {
        "role beacon_service may not execute function emergency_stop_status(text)", "function get_job(text) is missing"
    }  # fmt: skip
    assert client("GET", "/api/v1/jobs/a").status == 503


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("REVOKE EXECUTE ON FUNCTION emergency_stop_faults() FROM beacon_service", "permission denied for function"),
        ("DROP FUNCTION emergency_stop_faults()", "function emergency_stop_faults() does not exist"),
    ],
)
def test_readiness_where_it_cannot_be_asked_for(client, db, change, said):
    assert client("GET", "/health/ready").status == 200
    db.execute(change)

    answer = client("GET", "/health/ready")
    assert (answer.status, answer.json["faults"]) == (503, [answer.json["error"]])
    assert answer.json["error"].startswith(said)
    assert "emergency_stop_faults" in answer.json["error"]
    assert answer.json["error"].endswith("see Roles and grants in sql/README.md, or use init-db")


def test_without_a_database(make_app, monkeypatch):
    monkeypatch.setattr(beacon_stop, "POOL_TIMEOUT", 1.5)
    monkeypatch.setattr(beacon_stop, "AWAY_TIMEOUT", 0.1)
    client = Client(make_app(database_url="postgresql://nobody:secret-password@127.0.0.1:9/nowhere?connect_timeout=1"))

    assert client("GET", "/health/live").status == 200
    told = {"error": "database unavailable"}
    for answer in (client("GET", "/api/v1/jobs/a"), client.stop("a")):
        assert (answer.status, answer.json, answer.headers["Retry-After"]) == (503, told, "2")
    ready = client("GET", "/health/ready")
    assert (ready.status, ready.json) == (503, told | {"faults": ["database unavailable"]})
    assert ready.headers["Retry-After"] == "2"


# --- All answers ---


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/admin/jobs/a", 404),
        ("POST", "/admin/jobs/emergency-stop", 404),
        ("GET", "/health", 404),
        ("GET", "/api/v1/jobs", 404),
        ("GET", "/api/v1/executions/", 404),
        ("GET", "/admin/jobs/a/emergency-stop", 403),
        ("HEAD", "/admin/jobs/a/emergency-stop", 403),
        ("DELETE", "/admin/jobs/a/emergency-stop", 405),
        ("GET", "/admin/jobs/a/release", 405),
        ("GET", "/admin/emergency-stop", 405),
        ("POST", "/admin/runaways", 405),
        ("POST", "/admin/jobs/a/release", 403),
        ("POST", "/admin/emergency-stop", 403),
        ("GET", "/admin/runaways", 403),
        ("DELETE", "/api/v1/jobs/a", 405),
        ("POST", "/health/live", 405),
        ("OPTIONS", "/api/v1/executions", 405),
        ("POST", "/admin/jobs/a/emergency-stop", 403),
        ("GET", "/api/v1/jobs/a", 404),
        ("HEAD", "/api/v1/jobs/a", 404),
        ("GET", "/health/live", 200),
        ("HEAD", "/health/live", 200),
        ("HEAD", "/health/ready", 200),
    ],
)
def test_every_answer_has_its_headers(shared_client, method, path, status):
    answer = shared_client(method, path)

    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-ID"])
    if method == "HEAD":
        assert answer.body == b""
        assert int(answer.headers["Content-Length"]) > 0
    else:
        assert int(answer.headers["Content-Length"]) == len(answer.body)
        assert answer.json
    if status == 405:
        allowed = {"/admin/jobs/a/emergency-stop": "POST, GET, HEAD", "/admin/runaways": "GET, HEAD"}
        assert answer.headers["Allow"] == allowed.get(path, "POST" if path.startswith("/admin") else "GET, HEAD")


def test_head_of_the_listing(client, make_job):
    answer = client("HEAD", "/api/v1/executions", query=f"job_id={make_job(running=1)}")

    assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize(
    ("given", "taken"),
    [("a", True), ("x" * 128, True), ("!~", True), ("x" * 129, False), ("a b", False), ("ä", False), ("", False)],
)
def test_the_callers_request_id(shared_client, given, taken):
    answer = shared_client("GET", "/health/live", HTTP_X_REQUEST_ID=given)

    assert (answer.headers["X-Request-ID"] == given) == taken


REFUSALS = {
    "SELECT to_json(1 / length(right(id, 0)))": ("22012", "division by zero"),
    "SELECT to_json(repeat('9', 99)::int)": ("22003", f'value "{"9" * 99}" is out of range for type integer'),
    "DO $$ BEGIN RAISE 'no' USING ERRCODE = 'P0001'; END $$": ("P0001", "no"),
    "DO $$ BEGIN RAISE unique_violation USING MESSAGE = 'twice'; END $$": ("23505", "twice"),
    "DO $$ BEGIN RAISE object_not_in_prerequisite_state USING MESSAGE = 'not now'; END $$": ("55000", "not now"),
    "DO $$ BEGIN RAISE lock_not_available USING MESSAGE = 'mine', DETAIL = 'no JSON'; END $$": ("55P03", "mine"),
    "DO $$ BEGIN RAISE statement_too_complex USING MESSAGE = 'deep'; END $$": ("54001", "deep"),
    "DO $$ BEGIN RAISE invalid_parameter_value USING MESSAGE = 'odd'; END $$": ("22023", "odd"),
    "DO $$ BEGIN RAISE internal_error USING MESSAGE = 'broken'; END $$": ("XX000", "broken"),
}


def replace_function(db, signature, arguments, statement):
    """Put a function of an application's in the place of one that the service calls."""
    db.execute(f"DROP FUNCTION {signature} CASCADE")
    if statement.startswith("DO"):
        body = statement.removeprefix("DO $$ ").removesuffix(" $$")
        db.execute(f"CREATE FUNCTION {arguments} RETURNS json LANGUAGE plpgsql AS $$ {body} $$")
    else:
        db.execute(f"CREATE FUNCTION {arguments} RETURNS json LANGUAGE sql AS $$ {statement} $$")


@pytest.mark.parametrize("statement", REFUSALS)
def test_the_admin_is_told_what_the_database_refused_and_strangers_nothing(client, make_job, db, capsys, statement):
    """1.0 said "database unavailable" of the classes 22, 23, 54 and 55, and nothing of any."""
    sqlstate, message = REFUSALS[statement]
    job_id = make_job(running=1)
    stop = "emergency_stop_job(id text, reason text, force boolean, caller jsonb)"
    replace_function(db, "emergency_stop_job(text,text,boolean,jsonb)", stop, statement)
    replace_function(db, "get_job(text)", "get_job(id text)", statement)

    answer = client.stop(job_id, HTTP_X_REQUEST_ID="req-1")
    told = {"message": message, "sqlstate": sqlstate}
    assert (answer.status, answer.json) == (500, {"error": "internal error", "request_id": "req-1", **told})
    answer = client("GET", "/api/v1/jobs/x", HTTP_X_REQUEST_ID="req-2")
    if sqlstate == "55P03":
        assert (answer.status, answer.json) == (503, {"error": "tables are locked"})
    else:
        assert (answer.status, answer.json) == (500, {"error": "internal error", "request_id": "req-2"})
    assert any("Traceback" in line["traceback"] for line in log_lines(capsys, "error"))


def test_a_bug_leaks_no_detail(client, make_job, db, capsys):
    stop = "emergency_stop_job(id text, reason text, force boolean, caller jsonb)"
    replace_function(db, "emergency_stop_job(text,text,boolean,jsonb)", stop, "SELECT NULL::json")

    answer = client.stop("a", HTTP_X_REQUEST_ID="req-1")
    assert (answer.status, answer.json) == (500, {"error": "internal error", "request_id": "req-1"})
    (line,) = log_lines(capsys, "error")
    assert (line["request_id"], "Traceback" in line["traceback"]) == ("req-1", True)


def test_what_the_databases_encoding_does_not_have(installed, server_url):
    with new_database(server_url, "template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'") as database:
        url = url_of(database, server_url)
        beacon_stop.init_db(url)
        database.execute("INSERT INTO jobs (id) VALUES ('jöb')")
        database.commit()
        app = beacon_stop.create_app({}, admin_token=TOKEN, database_url=url, **GENEROUS)
        try:
            client = Client(app)
            assert client.stop("jöb").json["new_status"] == "failed"
            answer = client.stop("日本")
        finally:
            app.close()
    assert (answer.status, answer.json) == (400, {"error": "a value cannot be used: the database cannot hold it"})


def test_a_value_of_one_caller_that_cannot_be_used_is_no_error_of_another_one_at_the_same_job(installed, server_url):
    """Both got 400, and the job went on."""
    with new_database(server_url, "template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'") as database:
        url = url_of(database, server_url)
        beacon_stop.init_db(url)
        database.execute("INSERT INTO jobs (id, status) VALUES ('a', 'processing'), ('busy', 'processing')")
        database.commit()
        app = beacon_stop.create_app({}, admin_token=TOKEN, database_url=url, admin_pool=1, lock_timeout="10s", **GENEROUS)
        try:
            client = Client(app)
            with ThreadPoolExecutor(3) as callers:
                assert client.stop("nix").status == 404  # and so there is a connection
                database.execute("SELECT FROM jobs WHERE id = 'busy' FOR UPDATE")
                busy = callers.submit(client.stop, "busy")
                wait_until(lambda: app.admin_pool.get_stats()["pool_available"] == 0)
                first = callers.submit(client.stop, "a", '{"actor": "Ж", "force": true}'.encode())
                wait_until(lambda: ("a", True) in app._stops)
                second = callers.submit(client.stop, "a", b'{"actor": "ann", "force": true}')
                wait_until(lambda: app.admin_pool.get_stats()["requests_waiting"] == 1 and second.running())
                database.rollback()
            assert (first.result().status, second.result().status, busy.result().status) == (400, 200, 200)
            assert second.result().json["message"] == "Job emergency stopped"
        finally:
            app.close()


def test_a_commit_that_waits_for_another_one_too_long_is_no_bug(folder):
    """To send NOTIFY, each commit waits for those before it, here for one that waits for a standby: 500, without a reason."""
    with beacon_stop.embedded_postgres(folder) as url, psycopg.connect(url, autocommit=True) as db:
        beacon_stop.init_db(url)
        db.execute("INSERT INTO jobs (id, status) VALUES ('a', 'processing'), ('b', 'processing')")
        db.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        db.execute("SELECT pg_reload_conf()")
        app = beacon_stop.create_app({}, admin_token=TOKEN, database_url=url, lock_timeout="300ms", **GENEROUS)
        try:
            client = Client(app)
            with ThreadPoolExecutor(1) as callers:
                wait_until(lambda: db.execute("SHOW synchronous_standby_names").fetchone() == ("nobody",))
                first = callers.submit(client.stop, "a")
                waiting = "SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%emergency_stop_job(%'"
                wait_until(lambda: db.execute(waiting).rowcount)
                second = client.stop("b", b'{"force": true}')
                db.execute("ALTER SYSTEM RESET synchronous_standby_names")
                db.execute("SELECT pg_reload_conf()")
            told = {"error": "another commit keeps this one waiting for too long: nothing was changed"}
            assert (first.result().status, second.status, second.json) == (200, 503, told)
            assert client.stop("b").json["message"] == "Job emergency stopped"
        finally:
            app.close()


# --- Limits ---


def test_the_buckets_are_separate(make_app, make_job, db):
    client = Client(make_app(admin_rate="3/minute", failed_rate="2/minute", read_rate="4/minute"))
    job_id = make_job(running=1)

    assert [client.stop("x", token="wrong").status for _ in range(4)] == [403, 403, 429, 429]
    assert [client("GET", "/api/v1/jobs/x").status for _ in range(5)] == [404, 404, 404, 404, 429]
    answers = [client.stop(job_id) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert answers[-1].json == {"error": "too many requests", "retry_after": int(answers[-1].headers["Retry-After"])}
    assert 1 <= answers[-1].json["retry_after"] <= 20
    assert [client("GET", path).status for path in ("/health/live", "/health/ready") * 5] == [200] * 10


def test_clients_are_told_apart_by_address_and_ipv6_network(make_app):
    client = Client(make_app(read_rate="1/hour"))

    def status(address, **more):
        return client("GET", "/api/v1/jobs/x", REMOTE_ADDR=address, **more).status

    assert [status("10.0.0.1"), status("10.0.0.1"), status("10.0.0.2")] == [404, 429, 404]
    assert [status("2001:db8::1"), status("2001:db8::2"), status("2001:db8:0:1::1")] == [404, 429, 404]
    assert [status("::ffff:10.0.0.1"), status("::ffff:10.0.0.3"), status("10.0.0.3")] == [429, 404, 429]
    assert status("10.0.0.1", HTTP_X_FORWARDED_FOR="10.0.0.9") == 429, "nobody trusts that header unless told to"


def test_the_client_behind_trusted_proxies(make_app, capsys):
    client = Client(make_app(read_rate="1/hour", trusted_proxies="2"))

    def status(forwarded, address="10.9.9.9"):
        return client("GET", "/api/v1/jobs/x", REMOTE_ADDR=address, HTTP_X_FORWARDED_FOR=forwarded).status

    assert [status("1.1.1.1, 2.2.2.2"), status("9.9.9.9,1.1.1.1 , 3.3.3.3"), status("1.1.1.2, 2.2.2.2")] == [
        404,
        429,
        404,
    ]
    assert [status("[2001:db8::1]:443, x"), status("2001:db8::2, x"), status("1.1.1.1:80, x")] == [404, 429, 429]
    assert [status("only-one"), status("nonsense, x"), status("", "10.9.9.8")] == [404, 429, 404], "then it is the peer"
    for forwarded in ("1.1.1.1, 2.2.2.2", "only-one"):
        client.stop("nix", REMOTE_ADDR="10.9.9.9", HTTP_X_FORWARDED_FOR=forwarded)
    assert [line["client"] for line in log_lines(capsys)] == ["1.1.1.1", "10.9.9.9"]


def test_a_bucket_refills_evenly():
    now = [0.0]
    limiter = beacon_stop.RateLimiter(beacon_stop.Rate(60, 60), clock=lambda: now[0])

    def taken(count):
        accepted = 0
        for _ in range(count):
            try:
                limiter.take("a")
                accepted += 1
            except beacon_stop.HTTPError as error:
                assert error.status == 429
        return accepted

    assert taken(100) == 60
    now[0] += 1.5
    assert taken(100) == 1
    now[0] += 0.5
    assert taken(100) == 1
    now[0] += 1_000
    assert taken(100) == 60
    with pytest.raises(beacon_stop.HTTPError) as refused:
        limiter.take("a")
    assert refused.value.headers == {"Retry-After": "1"}


def test_any_number_of_clients_takes_bounded_memory():
    limiter = beacon_stop.RateLimiter(beacon_stop.Rate(10, 60))
    tracemalloc.start()
    for number in range(20_000):
        limiter.take(f"10.0.{number // 256}.{number % 256}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(limiter._full_at) == limiter.max_clients < 20_000
    assert peak < 10_000_000


# --- The log ---


def test_every_admin_call_is_a_line_in_the_log(make_app, make_job, capsys):
    client = Client(make_app(failed_rate="1/minute"))
    job_id = make_job(running=2)
    client.stop(job_id, b'{"reason": "line\\nbreak", "actor": "ann"}', HTTP_X_REQUEST_ID="req-1")
    client.stop(job_id)
    client.stop("nix")
    client.stop(make_job(status="failed", running=1))
    client.stop(job_id, b"[")
    client.stop(job_id, token="wrong-but-long-enough")
    client.stop(job_id, token="wrong-but-long-enough")

    lines = log_lines(capsys)
    assert [line["outcome"] for line in lines] == [
        "stopped", "already_terminal", "not_found", "executions_stopped", "body is not JSON: expected a JSON object or no body",
        "forbidden", "too many requests",
    ]  # fmt: skip
    assert [line["status"] for line in lines] == [200, 200, 404, 200, 400, 403, 429]
    assert {line["client"] for line in lines} == {"127.0.0.1"}
    first = lines[0]
    assert first | {"time": None, "duration_ms": None} == {
        "time": None, "event": "emergency_stop", "request_id": "req-1", "client": "127.0.0.1", "job_id": job_id, "outcome": "stopped",
        "executions_stopped": 2, "sessions_ended": 0, "reason": "line\nbreak", "actor": "ann", "duration_ms": None,
        "status": 200,
    }  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert 0 < first["duration_ms"] < 60_000
    assert [line["job_id"] for line in lines[-2:]] == [job_id, job_id]


def test_secrets_stay_secret(make_app, capsys, monkeypatch):
    monkeypatch.setattr(beacon_stop, "POOL_TIMEOUT", 1.5)
    monkeypatch.setattr(beacon_stop, "AWAY_TIMEOUT", 0.1)
    app = make_app(database_url="postgresql://u:secret-password@127.0.0.1:9/nowhere?connect_timeout=1")
    client = Client(app)
    client.stop("a")
    client.stop("a", token=TOKEN + "x")
    client("GET", "/health/ready")

    written = capsys.readouterr()
    assert TOKEN not in written.err + written.out
    assert "secret-password" not in written.err + written.out
    assert TOKEN not in repr(app.settings)
    assert "secret-password" not in repr(app.settings)


def test_a_log_that_nobody_reads_keeps_no_job_running(client, make_job, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Closed())

    assert client.stop(make_job(running=1)).json["executions_stopped"] == 1


def test_the_log_is_not_left_in_the_buffer_of_another_servers_stderr(client, make_job, monkeypatch):
    binary = io.BytesIO()

    class Buffered(io.TextIOWrapper):
        def fileno(self):
            raise OSError

    monkeypatch.setattr("sys.stderr", Buffered(binary))

    client.stop(make_job(running=1))
    beacon_stop.LOG_HANDLER.flush()
    assert b'"outcome": "stopped"' in binary.getvalue()


# --- Configuration of an embedded application ---


def test_a_bad_configuration_answers_503_and_is_logged(capsys):
    client = Client(beacon_stop.Application(lambda: beacon_stop.Settings({"ADMIN_TOKEN": TOKEN})))

    answer = client.stop("a")
    assert (answer.status, answer.json) == (503, {"error": "service is not configured"})
    assert "DATABASE_URL is not set" in log_lines(capsys, "configuration_error")[0]["error"]
    ready = client("GET", "/health/ready")
    assert (ready.status, ready.json["faults"]) == (503, ["the service is not configured"])


def test_create_app_checks_explicit_settings_at_once():
    with pytest.raises(beacon_stop.ConfigurationError, match="ADMIN_TOKEN is too short: expected at least 16 characters"):
        beacon_stop.create_app({}, admin_token="short", database_url="postgresql:///x")
    with pytest.raises(beacon_stop.ConfigurationError, match="unknown setting rate: expected one of admin_token"):
        beacon_stop.create_app({}, rate=1)


def test_the_module_holds_the_application():
    assert isinstance(vars(beacon_stop)["application"], beacon_stop.Application)


# --- The database behind ---


def test_a_lost_connection_is_replaced_and_the_call_tried_again(client, make_job, db):
    job_id = make_job(running=1)
    client.stop("warm up")
    db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'beacon-stop%'")

    assert client.stop(job_id).json["executions_stopped"] == 1
    assert client("GET", f"/api/v1/jobs/{job_id}").status == 200


def test_readers_have_a_database_of_their_own_if_they_are_given_one(make_app, make_job, monkeypatch):
    monkeypatch.setattr(beacon_stop, "POOL_TIMEOUT", 1.5)
    client = Client(make_app(read_database_url="postgresql://nobody@127.0.0.1:9/nowhere"))

    assert client("GET", "/api/v1/jobs/a").json == {"error": "database unavailable"}
    assert client.stop(make_job(running=1)).json["executions_stopped"] == 1


def test_readers_never_use_the_admins_connections(client, make_job, db):
    client.stop(make_job())
    for _ in range(8):
        client("GET", "/api/v1/jobs/x")
        client("GET", "/api/v1/executions", query="job_id=x")
        client("GET", "/health/ready")

    last = db.execute("SELECT application_name, query FROM pg_stat_activity WHERE application_name LIKE 'beacon-stop%'").fetchall()
    admin = [query for name, query in last if name == "beacon-stop admin"]
    assert len(admin) == 4
    settings = "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED"
    assert {re.split("[(;]", query)[0] for query in admin} <= {settings, "SELECT emergency_stop_job"}
    assert [name for name, query in last if "emergency_stop_faults" in query] == ["beacon-stop health"]


def test_a_database_that_defaults_to_serializable(db, make_app, make_job):
    db.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = serializable', current_database()); END $$"
    )

    assert Client(make_app()).stop(make_job(running=1)).json["executions_stopped"] == 1


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_of_another_encoding(database_server, server_url, make_app, encoding):
    with psycopg.connect(server_url, autocommit=True) as db:
        db.execute("DROP DATABASE IF EXISTS other")
        db.execute(f"CREATE DATABASE other ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'")
    url = psycopg.conninfo.make_conninfo(server_url, dbname="other")
    beacon_stop.init_db(url)
    with psycopg.connect(url, autocommit=True, client_encoding="UTF8") as db:
        db.execute("INSERT INTO jobs (id, status) VALUES ('jöb', 'processing')")
        db.execute("INSERT INTO executions (job_id, output) VALUES ('jöb', '{\"ü\": 1}')")
    client = Client(make_app(database_url=url))

    assert client("GET", "/api/v1/executions", query="job_id=j%C3%B6b").json["executions"][0]["output"] == {"ü": 1}
    assert client.stop("jöb", '{"reason": "groß"}'.encode()).json["reason"] == "groß"
    assert client("GET", "/api/v1/jobs/" + "jöb".encode().decode("latin-1")).json["job"]["id"] == "jöb"
    assert client.stop("日本").status == (404 if encoding == "SQL_ASCII" else 400)
    with psycopg.connect(server_url, autocommit=True) as db:
        db.execute("DROP DATABASE other WITH (FORCE)")


def test_a_call_beyond_the_statement_timeout_is_refused_and_changes_nothing(db, make_app, make_job):
    client = Client(make_app(statement_timeout="300ms"))
    job_id = make_job(running=1)
    slow_down_stops(db, 2)

    answer = client.stop(job_id)
    assert (answer.status, answer.json) == (503, {"error": "statement timeout: the database took too long"})
    assert count_active(db, job_id) == 1


def test_a_lock_timeout_beyond_the_statement_timeout_does_not_hide_who_holds_the_job(db, connect, make_app, make_job):
    client = Client(make_app(statement_timeout="500ms", lock_timeout="10s"))
    job_id = make_job(running=1)
    holder = connect(autocommit=False)
    holder.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (job_id,))

    answer = client.stop(job_id)
    assert (answer.status, answer.json["error"]) == (503, "job is locked")
    assert [blocker["pid"] for blocker in answer.json["blocked_by"]] == [holder.info.backend_pid]
    assert count_active(db, job_id) == 1
    assert client.stop(job_id, b'{"force": true}').json["sessions_ended"] == 1


# --- A locked job ---


def hold(connect, job_id, **options):
    holder = connect(autocommit=False, **options)
    holder.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (job_id,))
    return holder


def test_a_locked_job_names_its_holders_after_one_lock_timeout(connect, make_app, make_job, db):
    """1.0 answered after two, and named one of them."""
    client = Client(make_app(lock_timeout="500ms"))
    job_id = make_job(running=1)
    holder = hold(connect, job_id, application_name="holder")
    started = time.monotonic()

    answer = client.stop(job_id)
    assert 0.4 < time.monotonic() - started < 0.95
    assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
    assert list(answer.json) == ["error", "job_id", "blocked_by", "hint"]
    assert (answer.json["error"], answer.json["job_id"]) == ("job is locked", job_id)
    (blocker,) = answer.json["blocked_by"]
    assert list(blocker) == ["pid", "application_name", "database_user", "state", "transaction_seconds", "query"]
    assert (blocker["pid"], blocker["application_name"]) == (holder.info.backend_pid, "holder")
    assert '{"force": true}' in answer.json["hint"]
    assert count_active(db, job_id) == 1


def test_force_ends_the_holders_and_stops(connect, make_app, make_job, db):
    client = Client(make_app(lock_timeout="300ms"))
    job_id = make_job(running=1)
    hold(connect, job_id)

    answer = client.stop(job_id, b'{"force": true}')
    assert (answer.status, answer.json["sessions_ended"], answer.json["executions_stopped"]) == (200, 1, 1)


def test_a_lock_that_a_trigger_does_not_get_is_not_a_locked_job(make_app, make_job, db):
    client = Client(make_app(lock_timeout="300ms"))
    job_id = make_job(running=1)
    db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE lock_not_available USING MESSAGE = 'the depot is locked', DETAIL = 'by nobody'; END $$;"
        "CREATE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION refuse()"
    )

    answer = client.stop(job_id)
    assert (answer.status, answer.json["error"], answer.json["sqlstate"]) == (500, "internal error", "55P03")
    assert answer.json["message"].endswith("the depot is locked")


def test_callers_for_one_locked_job_leave_the_connections_to_others(connect, make_app, make_job, db):
    client = Client(make_app(lock_timeout="1s", admin_pool=2))
    locked, free = make_job(running=1), make_job(running=1)
    holder = hold(connect, locked)
    with ThreadPoolExecutor(12) as callers:
        calls = [callers.submit(client.stop, locked) for _ in range(12)]
        wait_until(lambda: is_waiting_at_all(db))
        assert client.stop(free).json["executions_stopped"] == 1
        assert not any(call.done() for call in calls)
        answers = [call.result() for call in calls]

    assert {answer.status for answer in answers} == {503}
    assert {answer.json["blocked_by"][0]["pid"] for answer in answers} == {holder.info.backend_pid}


def is_waiting_at_all(db):
    return db.execute("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)").fetchone()[0]


def test_callers_for_one_job_that_is_let_go_are_all_told_the_truth(connect, make_app, make_job, db):
    client = Client(make_app(lock_timeout="5s"))
    job_id = make_job(running=2)
    holder = hold(connect, job_id)
    with ThreadPoolExecutor(8) as callers:
        calls = [callers.submit(client.stop, job_id) for _ in range(8)]
        wait_until(lambda: is_waiting_at_all(db))
        holder.rollback()
        messages = sorted(call.result().json["message"] for call in calls)

    assert messages == ["Job already in terminal state"] * 7 + ["Job emergency stopped"]


def test_a_caller_with_force_does_not_wait_for_one_without(connect, make_app, make_job, db):
    client = Client(make_app(lock_timeout="1s"))
    job_id = make_job(running=1)
    hold(connect, job_id)
    with ThreadPoolExecutor(1) as callers:
        call = callers.submit(client.stop, job_id)
        wait_until(lambda: is_waiting_at_all(db))
        assert client.stop(job_id, b'{"force": true}').status == 200

    assert call.result().status in (200, 503)


def test_stops_that_come_together_share_transactions(make_app, make_job, db, monkeypatch):
    sizes, fetch = [], beacon_stop.Pool.fetch

    def noting_sizes(pool, query, *values, **options):
        if (pool.name, query) == ("group", beacon_stop.STOP_JOBS):
            sizes.append(len(values[0]))
        return fetch(pool, query, *values, **options)

    monkeypatch.setattr(beacon_stop.Pool, "fetch", noting_sizes)
    app = make_app()
    client = Client(app)
    jobs = [make_job(running=2) for _ in range(100)]
    client.stop("warm up")
    wait_until(lambda: app.group.can_group)
    with ThreadPoolExecutor(20) as callers:
        answers = list(callers.map(client.stop, jobs))

    assert {answer.json["message"] for answer in answers} == {"Job emergency stopped"}
    assert [answer.json["job_id"] for answer in answers] == jobs
    callers_told_apart = "SELECT count(*), count(DISTINCT caller->>'request_id') FROM emergency_stops"
    assert db.execute(callers_told_apart).fetchone() == (100, 100)
    assert max(sizes) > 1


def test_a_group_that_fails_leaves_each_stop_to_go_by_itself(make_app, make_job, db, capsys):
    app = make_app()
    client = Client(app)
    good, bad = [make_job(running=1) for _ in range(30)], make_job("bad", running=1)
    client.stop("warm up")
    wait_until(lambda: app.group.can_group)
    db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;"
        "CREATE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW WHEN (OLD.id = 'bad') EXECUTE FUNCTION refuse()"
    )
    with ThreadPoolExecutor(16) as callers:
        answers = list(callers.map(client.stop, [bad, *good, bad, bad]))

    assert [answer.json.get("message") for answer in answers] == [
        "not this one", *["Job emergency stopped"] * 30, "not this one", "not this one",
    ]  # fmt: skip


def test_a_group_that_fails_is_logged_and_the_next_is_tried_after_a_pause(make_app, make_job, db, capsys, monkeypatch):
    monkeypatch.setattr(beacon_stop, "GROUP_PAUSE", 0.05)
    app = make_app()
    app.open()
    wait_until(lambda: app.group.can_group)
    db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;"
        "CREATE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION refuse()"
    )

    assert app.group.stop(make_job("bad", running=1), None, "{}") is None
    (line,) = log_lines(capsys, "group_failed")
    assert line["error"].startswith("not this one")
    db.execute("DROP TRIGGER refuse ON jobs")
    wait_until(lambda: app.group.can_group)
    assert json.loads(app.group.stop("bad", None, "{}"))["executions_stopped"] == 1


def test_a_group_ends_no_session(make_app, make_job, connect):
    """Nobody has asked for force. The session has held the job for longer than the lock timeout."""
    app = make_app(lock_timeout="20ms")
    app.open()
    wait_until(lambda: app.group.can_group)
    job_id = make_job(running=1)
    holder = connect(autocommit=False)
    holder.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (job_id,))
    time.sleep(0.05)

    assert app.group.stop(job_id, None, "{}") is None
    holder.commit()
    assert json.loads(app.group.stop(job_id, None, "{}"))["executions_stopped"] == 1


# --- The other questions ---


def test_a_dry_run_changes_nothing(client, make_job, db, capsys):
    job_id = make_job(running=3)

    answer = client.stop(job_id, b'{"dry_run": true}')
    assert (answer.status, answer.json["dry_run"], answer.json["executions_stopped"]) == (200, True, 3)
    assert count_active(db, job_id) == 3
    assert client.stop("nix", b'{"dry_run": true}').status == 404
    assert [line["outcome"] for line in log_lines(capsys)] == ["dry_run", "not_found"]


def test_a_dry_run_of_a_job_too_large_for_it(client, make_job):
    answer = client.stop(make_job(running=10_001), b'{"dry_run": true}')

    assert (answer.status, "more than 10000 active executions" in answer.json["error"]) == (400, True)


def test_the_status(client, make_job):
    job_id = make_job(running=2)

    def status():
        return client("GET", f"/admin/jobs/{job_id}/emergency-stop", HTTP_X_ADMIN_TOKEN=TOKEN)

    assert (status().status, status().json["stopped"], status().json["active"]["running"]) == (200, False, 2)
    client.stop(job_id, b'{"actor": "ann"}')
    assert (status().json["stopped"], status().json["history"][0]["actor"]) == (True, "ann")
    assert client("GET", "/admin/jobs/nix/emergency-stop", HTTP_X_ADMIN_TOKEN=TOKEN).status == 404
    answer = client("HEAD", f"/admin/jobs/{job_id}/emergency-stop", HTTP_X_ADMIN_TOKEN=TOKEN)
    assert (answer.status, answer.body) == (200, b"")


def test_a_release(client, make_job, db, capsys):
    db.execute("DROP TRIGGER guard_updated_job ON jobs; ALTER TABLE jobs ALTER status TYPE varchar(20)")
    job_id = make_job(running=1)

    def release(id=job_id, **body):
        return client("POST", f"/admin/jobs/{id}/release", json.dumps(body).encode(), HTTP_X_ADMIN_TOKEN=TOKEN)

    assert (release(reason="x", status="pending").status, release(reason="x", status="pending").json) == (
        409, {"error": "job is not stopped", "job_id": job_id, "status": "processing"}
    )  # fmt: skip
    client.stop(job_id)
    assert release("nix", reason="x", status="pending").status == 404
    for body, error in {
        "{}": "reason is missing",
        '{"reason": "x"}': "status is missing",
        '{"status": "pending"}': "reason is missing",
        '{"reason": "x", "status": "failed"}': "status is missing, too long, or failed",
        '{"reason": "x", "status": 1}': "status cannot be used: expected text of 1 to 255 characters",
        '{"reason": "x", "status": "pending", "force": true}': "body has an unknown key 'force': expected reason, status, actor",
    }.items():
        answer = release(**json.loads(body))
        assert (answer.status, answer.json["error"][: len(error)]) == (400, error)
    answer = release(reason="x", status="longer than the column")
    assert (answer.status, answer.json["error"][:29]) == (400, "status has 22 characters: exp")
    answer = release(reason="mended", status="pending", actor="ann")
    assert (answer.status, answer.json["new_status"], answer.json["reason"]) == (200, "pending", "mended")
    assert db.execute("SELECT status FROM jobs").fetchone() == ("pending",)
    last = db.execute("SELECT action, caller->>'actor' FROM emergency_stops ORDER BY id DESC LIMIT 1").fetchone()
    assert last == ("release", "ann")
    assert log_lines(capsys, "release")[-1]["outcome"] == "completed"


def test_the_runaways(client, make_job):
    job_id = make_job(running=5)

    def runaways(query=""):
        return client("GET", "/admin/runaways", query=query, HTTP_X_ADMIN_TOKEN=TOKEN)

    assert (runaways().status, runaways().json["jobs"][0]["job_id"]) == (200, job_id)
    assert runaways("minutes=60&max_jobs=1").json["minutes"] == 60
    assert [runaways(query).status for query in ("minutes=0", "minutes=x", "minutes=2000", "max_jobs=101")] == [400] * 4


def stop_several(client, **body):
    return client("POST", "/admin/emergency-stop", json.dumps(body).encode(), HTTP_X_ADMIN_TOKEN=TOKEN)


def test_several_jobs(connect, make_app, make_job, db, capsys):
    client = Client(make_app(lock_timeout="500ms", admin_rate="2/hour"))
    jobs, ended = [make_job(running=2) for _ in range(5)], make_job(status="completed")
    locked = make_job(running=1)
    holder = hold(connect, locked)
    ids = ["nix", *jobs, locked, ended]
    started = time.monotonic()

    answer = stop_several(client, job_ids=ids, reason="costs", actor="ann")
    assert time.monotonic() - started < 0.95
    assert answer.status == 200
    assert list(answer.json) == ["results", "stopped", "already_terminal", "not_found", "locked"]
    assert [result["job_id"] for result in answer.json["results"]] == ids
    assert [answer.json[kind] for kind in ("stopped", "already_terminal", "not_found", "locked")] == [5, 1, 1, 1]
    (blocked,) = [result for result in answer.json["results"] if result.get("error") == "job is locked"]
    assert (blocked["job_id"], blocked["blocked_by"][0]["pid"]) == (locked, holder.info.backend_pid)
    assert db.execute("SELECT array_agg(DISTINCT reason), count(*) FROM emergency_stops").fetchone() == (["costs"], 5)

    answer = stop_several(client, job_ids=[locked], force=True)
    assert (answer.json["stopped"], answer.json["results"][0]["sessions_ended"]) == (1, 1)
    assert stop_several(client, job_ids=[locked]).status == 429, "each call takes one from the limit"
    (first, second, _) = log_lines(capsys, "emergency_stop_several")
    assert (first["stopped"], first["executions_stopped"], first["actor"], second["job_ids"]) == (
        5,
        10,
        "ann",
        [locked],
    )


@pytest.mark.parametrize(("slow", "seconds"), [("slow", 5), ("%", 0.3)], ids=["one of them", "all of them together"])
def test_what_takes_one_of_several_too_long_keeps_no_other_from_being_stopped(make_app, make_job, db, capsys, slow, seconds):
    """A statement timeout undid all of them, and the log did not say of which jobs."""
    client = Client(make_app(statement_timeout="1s"))
    ids = [make_job(id, running=1) for id in ("a", "b", "slow", "z")]
    slow_down_stops(db, seconds)
    db.execute("DROP TRIGGER slow_down ON jobs")
    db.execute(f"CREATE TRIGGER slow_down BEFORE UPDATE ON jobs FOR EACH ROW WHEN (NEW.id LIKE '{slow}') EXECUTE FUNCTION slow_down()")

    answer = stop_several(client, job_ids=ids)
    too_slow = [id for id in ids if count_active(db, id)]
    told = [{"error": "statement timeout: the database took too long", "job_id": id} for id in too_slow]
    assert too_slow == (["slow"] if seconds == 5 else [])
    assert (answer.status, answer.json["stopped"], answer.json.get("failed", 0)) == (200, 4 - len(told), len(told))
    assert [result for result in answer.json["results"] if "error" in result] == told
    assert log_lines(capsys, "emergency_stop_several")[0]["job_ids"] == ids


def test_if_none_of_several_can_be_stopped_for_one_reason_that_is_the_answer(make_app, make_job, db, capsys):
    client = Client(make_app(statement_timeout="500ms"))
    ids = [make_job(running=1) for _ in range(2)]
    slow_down_stops(db, 5)

    answer = stop_several(client, job_ids=ids)
    assert (answer.status, answer.json) == (503, {"error": "statement timeout: the database took too long"})
    assert log_lines(capsys, "emergency_stop_several")[0]["job_ids"] == ids


def test_if_the_database_refuses_each_of_several_each_has_its_answer(client, make_job, db):
    ids = [make_job(running=1) for _ in range(2)]
    db.execute("ALTER TABLE jobs ADD CHECK (NOT metadata ? 'emergency_stop')")

    answer = stop_several(client, job_ids=ids)
    assert (answer.status, answer.json["failed"]) == (200, 2)
    assert [(result["job_id"], result["sqlstate"]) for result in answer.json["results"]] == [(id, "23514") for id in ids]


def test_while_the_database_is_away_a_call_for_several_does_not_try_each(make_app, capsys, monkeypatch):
    monkeypatch.setattr(beacon_stop, "POOL_TIMEOUT", 1.5)
    client = Client(make_app(database_url="postgresql://127.0.0.1:9/x"))
    started = time.monotonic()

    answer = stop_several(client, job_ids=[*"abcdefghij"])
    assert (answer.status, answer.json) == (503, {"error": "database unavailable"})
    assert time.monotonic() - started < 4.5
    assert log_lines(capsys, "emergency_stop_several")[0]["job_ids"] == [*"abcdefghij"]


def test_a_job_that_is_let_go_in_time_is_stopped_with_the_others(connect, make_app, make_job, db):
    client = Client(make_app(lock_timeout="5s"))
    locked = [make_job(running=1) for _ in range(3)]
    holders = [hold(connect, job_id) for job_id in locked]
    with ThreadPoolExecutor(1) as callers:
        call = callers.submit(stop_several, client, job_ids=locked)
        wait_until(lambda: is_waiting_at_all(db))
        for holder in holders:
            holder.rollback()

        assert call.result().json["stopped"] == 3


def test_ids_of_several_jobs_that_cannot_be_used(shared_client):
    for ids in (
        None,
        [],
        "a",
        {"a": 1},
        ["a", "a"],
        [1],
        [""],
        ["x" * 256],
        ["a\0"],
        [str(n) for n in range(101)],
        [["a"]],
    ):
        answer = stop_several(shared_client, job_ids=ids)
        assert (answer.status, "cannot be used" in answer.json["error"]) == (400, True)
    assert stop_several(shared_client, job_ids=["ä" * 250 + str(n) for n in range(100)]).json["not_found"] == 100
    assert shared_client("POST", "/admin/emergency-stop", b" " * 256 * 1024 + b"{}", HTTP_X_ADMIN_TOKEN=TOKEN).status == 413


# --- Connections ---


def test_a_stop_goes_through_when_others_have_filled_the_connections_of_the_role(make_app, make_job, db, connect, owner_url, monkeypatch):
    """And years have passed: 1.0 gave its working connection up for its age, and had none from then on."""
    db.execute(
        "DROP ROLE IF EXISTS beacon_limited;"
        f"CREATE ROLE beacon_limited LOGIN PASSWORD '{SERVICE_PASSWORD}' CONNECTION LIMIT 6 IN ROLE beacon_service"
    )
    limited_url = make_conninfo(owner_url, user="beacon_limited", password=SERVICE_PASSWORD)
    app = make_app(database_url=limited_url, read_database_url=limited_url, admin_pool=1, read_pool=1)
    client = Client(app)
    client.stop("warm up")
    (connection,) = app.admin_pool._pool
    with pytest.raises(psycopg.OperationalError, match="too many connections for role"):
        for _ in range(7):
            connect(limited_url)
    for module in (psycopg_pool.pool, psycopg_pool.base):
        monkeypatch.setattr(module, "monotonic", lambda: time.monotonic() + 10 * 365 * 86_400)

    for _ in range(3):
        assert client.stop(make_job(running=2)).json["executions_stopped"] == 2
        assert list(app.admin_pool._pool) == [connection]
    app.close()
    db.execute("DROP ROLE beacon_limited")


def test_a_database_that_refuses_more_connections_is_not_away_while_others_work(make_app, make_job, db, owner_url, monkeypatch):
    """Any call that had to wait for more than a second was told that the database is unavailable."""
    db.execute(f"DROP ROLE IF EXISTS beacon_few; CREATE ROLE beacon_few LOGIN PASSWORD '{SERVICE_PASSWORD}' IN ROLE beacon_service")
    monkeypatch.setattr(beacon_stop, "POOL_TIMEOUT", 1.5)
    tried, try_anew = [], beacon_stop.Pool.try_anew
    monkeypatch.setattr(beacon_stop.Pool, "try_anew", lambda pool: (try_anew(pool), tried.append(pool)))
    app = make_app(database_url=make_conninfo(owner_url, user="beacon_few", password=SERVICE_PASSWORD), admin_pool=2)
    client = Client(app)
    client.stop("warm up")
    wait_until(lambda: len(app.admin_pool._pool) == 2)
    db.execute("ALTER ROLE beacon_few CONNECTION LIMIT 0")
    pids = [connection.info.backend_pid for connection in app.admin_pool._pool]
    db.execute("SELECT pg_terminate_backend(%s, 5000)", (pids[0],))

    assert client.stop(make_job(running=2)).json["executions_stopped"] == 2
    wait_until(lambda: app.admin_pool in tried)
    assert app.admin_pool.is_away is False
    db.execute("SELECT pg_terminate_backend(%s, 5000)", (pids[1],))
    assert client.stop("a").json == {"error": "database unavailable"}
    app.close()
    db.execute("DROP ROLE beacon_few")


def test_a_caller_who_waits_while_the_database_refuses_connections_is_served_once_it_does_not(
    make_app, make_job, db, owner_url, monkeypatch
):
    """The pool gives up after a second. Nobody else would make it try again."""
    db.execute(f"DROP ROLE IF EXISTS beacon_few; CREATE ROLE beacon_few LOGIN PASSWORD '{SERVICE_PASSWORD}' IN ROLE beacon_service")
    tried, try_anew = [], beacon_stop.Pool.try_anew
    monkeypatch.setattr(beacon_stop.Pool, "try_anew", lambda pool: (try_anew(pool), tried.append(pool)))
    app = make_app(database_url=make_conninfo(owner_url, user="beacon_few", password=SERVICE_PASSWORD), admin_pool=1)
    client = Client(app)
    client.stop("warm up")
    (connection,) = app.admin_pool._pool
    db.execute("ALTER ROLE beacon_few CONNECTION LIMIT 0")
    db.execute("SELECT pg_terminate_backend(%s, 5000)", (connection.info.backend_pid,))

    with in_thread(client.stop, make_job(running=2)) as stop:
        wait_until(lambda: app.admin_pool in tried)
        db.execute("ALTER ROLE beacon_few CONNECTION LIMIT -1")
    assert stop.result.json["executions_stopped"] == 2
    app.close()
    db.execute("DROP ROLE beacon_few")


def test_stops_are_grouped_also_where_the_functions_came_after_the_start(make_app, bare_database, server_url, monkeypatch, capsys):
    monkeypatch.setattr(beacon_stop, "GROUP_PAUSE", 0.05)
    app = make_app(database_url=url_of(bare_database, server_url))
    app.open()
    time.sleep(0.2)
    assert app.group.can_group is False

    beacon_stop.init_db(url_of(bare_database, server_url))
    wait_until(lambda: app.group.can_group)
    assert log_lines(capsys, "group_failed") == []
    app.close()


def test_warnings_of_the_database_are_logged(client, make_job, db, capsys):
    job_id = make_job(running=1)
    db.execute(
        "CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        "    RAISE WARNING 'mind the gap' USING DETAIL = 'It is wide.'; RETURN NEW; END $$;"
        "CREATE TRIGGER warn BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION warn()"
    )
    assert client.stop(job_id).status == 200

    (line,) = log_lines(capsys, "database_warning")
    assert (line["message"], line["detail"]) == ("mind the gap", "It is wide.")


def test_faults_and_warnings_are_told_by_readiness(client, db):
    def ready(*sentences):
        db.execute("DROP FUNCTION emergency_stop_faults()")
        values = ", ".join(f"('{sentence}')" for sentence in sentences)
        db.execute(f"CREATE FUNCTION emergency_stop_faults() RETURNS SETOF text LANGUAGE sql AS $$ VALUES {values} $$")
        answer = client("GET", "/health/ready")
        return answer.status, answer.json

    assert ready("warning: no foreign key") == (200, {"ok": True, "warnings": ["no foreign key"]})
    assert ready("warning: no foreign key", "trigger x is disabled") == (
        503, {"error": "the emergency stop would not work: see faults", "faults": ["trigger x is disabled"]}
    )  # fmt: skip


def test_a_job_that_the_database_refuses_to_stop_keeps_none_of_the_others_running(client, db, make_job):
    jobs = [make_job(id, running=1) for id in ("t1", "t2", "t3", "t4")]
    db.execute("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'the application says no';
        END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW WHEN (NEW.id = 't3') EXECUTE FUNCTION refuse()""")

    body = json.dumps({"job_ids": [*jobs, "nix"]}).encode()
    answer = client("POST", "/admin/emergency-stop", body, HTTP_X_ADMIN_TOKEN=TOKEN)
    assert answer.status == 200
    counts = {key: value for key, value in answer.json.items() if key != "results"}
    assert counts == {"stopped": 3, "already_terminal": 0, "not_found": 1, "locked": 0, "failed": 1}
    refused = answer.json["results"][2]
    assert (refused["job_id"], refused["message"], refused["sqlstate"]) == ("t3", "the application says no", "P0001")
    assert [count_active(db, id) for id in jobs] == [0, 0, 1, 0]


def test_an_admin_call_without_a_route_is_logged_too(client, capsys):
    assert client("PUT", "/admin/jobs/x/emergency-stop", HTTP_X_ADMIN_TOKEN=TOKEN).status == 405
    assert client("POST", "/admin/nope", HTTP_X_ADMIN_TOKEN=TOKEN).status == 404

    lines = log_lines(capsys, "refused")
    assert [(line["outcome"], line["status"]) for line in lines] == [
        ("method not allowed", 405),
        ("no such route", 404),
    ]


def test_beyond_the_most_clients_those_longest_unseen_are_forgotten_and_newcomers_limited():
    limiter = beacon_stop.RateLimiter(beacon_stop.Rate(1, 3600), max_clients=2)

    def is_taken(client):
        try:
            limiter.take(client)
        except beacon_stop.HTTPError:
            return False
        return True

    assert [is_taken(client) for client in "abba"] == [True, True, False, False]
    assert [is_taken(client) for client in "cc"] == [True, False], "in the place of b, which was added after a"
    assert [is_taken(client) for client in "ac"] == [False, False]
    assert [is_taken(client) for client in "bac"] == [True, True, True], "each in the place of the next"


def test_a_client_is_told_how_long_to_wait_for_the_next_call():
    now = [0.0]
    limiter = beacon_stop.RateLimiter(beacon_stop.Rate(6, 3600), clock=lambda: now[0])
    for _ in range(6):
        limiter.take("a")

    for now[0], seconds in {0.0: 600, 0.5: 600, 100.0: 500, 599.9: 1}.items():
        with pytest.raises(beacon_stop.HTTPError) as refused:
            limiter.take("a")
        assert (refused.value.headers, refused.value.details) == ({"Retry-After": str(seconds)}, {"retry_after": seconds})
    now[0] = 600.0
    limiter.take("a")


def test_a_reason_of_1000_characters_and_an_actor_of_200_over_http(client, make_job, db):
    job_id, reason, actor = make_job(running=1), "ä€𝄞x" * 250, "ä€𝄞x" * 50

    answer = client.stop(job_id, json.dumps({"reason": reason, "actor": actor}).encode())
    assert (answer.status, answer.json["reason"]) == (200, reason)
    assert db.execute("SELECT reason, caller ->> 'actor' FROM emergency_stops").fetchone() == (reason, actor)


def test_readers_are_sent_where_their_url_says_and_operators_are_not(make_app, make_job, service_url, db):
    client = Client(make_app(read_database_url=make_conninfo(service_url, application_name="for readers")))
    job_id = make_job(running=1)

    def who_asked_last_for(function):
        query = "SELECT DISTINCT application_name FROM pg_stat_activity WHERE query LIKE %s AND pid <> pg_backend_pid()"
        return [name for (name,) in db.execute(query, (f"%{function}(%",))]

    assert client("GET", f"/api/v1/jobs/{job_id}").status == 200
    assert who_asked_last_for("get_job") == ["for readers"]
    assert client("GET", "/api/v1/executions", query=f"job_id={job_id}").status == 200
    assert who_asked_last_for("list_executions") == ["for readers"]
    assert client("GET", f"/admin/jobs/{job_id}/emergency-stop", HTTP_X_ADMIN_TOKEN=TOKEN).status == 200
    assert who_asked_last_for("emergency_stop_status") == ["beacon-stop admin"]
    assert client("GET", "/health/ready").status == 200
    assert who_asked_last_for("emergency_stop_faults") == ["beacon-stop health"]


def test_a_connection_that_is_read_only_is_not_kept(make_app, make_job, db):
    """A primary has become a standby, and the URL has another host that is the primary now."""
    client = Client(make_app(admin_pool="1"))
    job_id = make_job(running=1)
    db.execute(f"ALTER DATABASE {db.info.dbname} SET default_transaction_read_only = on")
    answer = client.stop(job_id)
    assert (answer.status, answer.json) == (503, {"error": "database is read-only"})
    db.execute(f"ALTER DATABASE {db.info.dbname} RESET default_transaction_read_only")

    assert client.stop(job_id).json["executions_stopped"] == 1


def test_of_a_silent_server_no_other_connection_is_tried(make_app, make_job, monkeypatch):
    """Each of them would take as long."""
    monkeypatch.setattr(beacon_stop, "SILENCE", 1.0)
    app = make_app(read_pool="4", statement_timeout="100ms")
    client, path = Client(app), f"/api/v1/jobs/{make_job()}"
    assert client("GET", path).status == 200
    with ExitStack() as stack:
        connections = [stack.enter_context(app.read_pool.connection()) for _ in range(4)]
        silent = [psutil.Process(connection.info.backend_pid) for connection in connections]

    with suspended(*silent):
        started = time.monotonic()
        assert client("GET", path).status == 200
        assert time.monotonic() - started < 3


def test_of_a_database_that_says_nothing_readiness_says_that_it_is_away(make_app, make_job, monkeypatch):
    """It had said, after more than a minute, that all connections were busy."""
    monkeypatch.setattr(beacon_stop, "SILENCE", 0.3)
    monkeypatch.setattr(beacon_stop, "AWAY_TIMEOUT", 0.1)
    monkeypatch.setattr(beacon_stop, "STATEMENT_TIMEOUTS", {"health": 0.2})
    app = make_app()
    client = Client(app)
    assert client("GET", "/health/ready").status == 200
    with app.health_pool.connection() as connection:
        server = psutil.Process(connection.info.backend_pid).parent()
    unready = (503, {"error": "database unavailable", "faults": ["database unavailable"]})

    with suspended(server, psutil.Process(connection.info.backend_pid)):
        started = time.monotonic()
        for _ in range(2):
            answer = client("GET", "/health/ready")
            assert (answer.status, answer.json) == unready
        assert time.monotonic() - started < 5


def test_of_a_host_that_takes_connections_and_says_nothing_nobody_says_that_they_are_busy(make_app, monkeypatch):
    monkeypatch.setattr(beacon_stop, "POOL_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = Client(make_app(database_url=f"postgresql://127.0.0.1:{mute.getsockname()[1]}/nowhere"))
        assert client.stop("a").json == {"error": "database unavailable"}


def test_a_call_that_the_database_works_at_is_not_taken_for_silence(make_app, make_job, db, monkeypatch):
    monkeypatch.setattr(beacon_stop, "SILENCE", 0.2)
    client = Client(make_app(admin_pool="1", statement_timeout="10s"))
    assert client.stop(make_job()).status == 200
    slow_down_stops(db, 1)

    assert client.stop(make_job(running=1)).json["message"] == "Job emergency stopped"


def test_once_the_database_is_known_to_be_away_nobody_waits_long_for_it(make_app, monkeypatch):
    monkeypatch.setattr(beacon_stop, "POOL_TIMEOUT", 20.0)
    monkeypatch.setattr(beacon_stop, "AWAY_TIMEOUT", 0.1)
    app = make_app(database_url="postgresql://127.0.0.1:9/nowhere")
    app.open()
    wait_until(lambda: app.admin_pool.is_away and app.read_pool.is_away)
    client = Client(app)

    started = time.monotonic()
    assert client.stop("a").json == client("GET", "/api/v1/jobs/a").json == {"error": "database unavailable"}
    assert time.monotonic() - started < 5


def test_all_of_an_ipv6_network_of_64_bits_is_one_client():
    first, last, beyond = "2001:db8:0:7::", "2001:db8:0:7:ffff:ffff:ffff:ffff", "2001:db8:0:8::"

    keys = [beacon_stop.rate_key(beacon_stop.read_address(each)) for each in (first, last, beyond)]
    assert keys[0] == keys[1] != keys[2]
    assert beacon_stop.rate_key("unix:/run/proxy") == "unix:/run/proxy"


@pytest.mark.parametrize("length", ["+2", " 2", "0_2", "2.0", "-2", "2" * 30])
def test_a_content_length_that_is_no_number_is_refused(make_app, length):
    """As some servers hand it on. They are told so before they are asked for a byte."""
    started = []
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/admin/jobs/nix/emergency-stop", "CONTENT_LENGTH": length,
               "HTTP_X_ADMIN_TOKEN": TOKEN, "wsgi.input": None}  # fmt: skip

    (body,) = make_app()(environ, lambda status, headers: started.append(status))
    assert (started, json.loads(body)["error"][:14]) == (["400 Bad Request"], "Content-Length")


def test_a_body_that_the_server_delimits_is_read_to_its_end_and_bounded(client, make_job):
    job_id, reason = make_job(running=1), "to the very end"
    chunked = {"CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
    body = json.dumps({"reason": reason}).encode().rjust(16 * 1024)

    assert client.stop(job_id, b" " + body, **chunked).status == 413
    assert client.stop(job_id, body, **chunked).json["reason"] == reason


def test_a_body_that_was_cut_off_is_refused_also_by_a_server_that_says_where_it_ends(client, make_job):
    """A dry run whose caller had died after the headers was a stop in earnest, under gunicorn."""
    job_id = make_job(running=1)

    for sent in (b"", b'{"dry_run": '):
        answer = client.stop(job_id, sent, CONTENT_LENGTH="17", **{"wsgi.input_terminated": True})
        assert (answer.status, answer.json["error"]) == (400, "body is shorter than its Content-Length")
    assert client.stop(job_id, b'{"dry_run": true}', **{"wsgi.input_terminated": True}).json["dry_run"] is True


def test_a_caller_who_is_gone_before_the_end_of_the_body_is_no_bug(make_app, make_job, capsys):
    class Reset:
        def read(self, size):
            raise ConnectionResetError

    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": f"/admin/jobs/{make_job(running=1)}/emergency-stop", "CONTENT_LENGTH": "17",
               "HTTP_X_ADMIN_TOKEN": TOKEN, "wsgi.input": Reset()}  # fmt: skip
    started = []
    make_app()(environ, lambda status, headers: started.append(status))
    assert started == ["400 Bad Request"]
    assert log_lines(capsys, "error") == []


def test_the_log_has_the_status_of_each_answer_and_the_client_behind_the_proxy(make_app, make_job, capsys):
    client = Client(make_app(failed_rate="1/hour", trusted_proxies="1"))
    behind = {"HTTP_X_FORWARDED_FOR": "192.0.2.7", "REMOTE_ADDR": "10.0.0.1"}
    answers = [
        client.stop(make_job(running=1), **behind),
        client.stop("nix", **behind),
        client.stop("nix", b"[", **behind),
        client.stop("nix", token="wrong-but-long-enough", **behind),
        client.stop("nix", token="wrong-but-long-enough", **behind),
    ]

    lines = log_lines(capsys)
    assert [line["status"] for line in lines] == [answer.status for answer in answers] == [200, 404, 400, 403, 429]
    assert {line["client"] for line in lines} == {"192.0.2.7"}
    client.stop(job_id := make_job(running=1), HTTP_X_FORWARDED_FOR="[2001:DB8:0:7::9]:443")
    (line,) = log_lines(capsys)
    history = client("GET", f"/admin/jobs/{job_id}/emergency-stop", HTTP_X_ADMIN_TOKEN=TOKEN).json["history"]
    assert line["client"] == history[0]["client"] == "2001:db8:0:7::9", "not the network that its rate limit is for"
