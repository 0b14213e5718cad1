"""The stdlib server: what is on the wire, slow and hostile clients, the end of it, and the database going away."""

import contextlib
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import beacon_stop
import pytest

from conftest import (
    ROOT,
    TOKEN,
    Answer,
    Client,
    count_active,
    hold_stops,
    let_stops_go,
    log_lines,
    send,
    serving,
    stops_are_held,
    wait_until,
)
from processes import accepts_connections, free_port


def connect_to(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def read_answer(file) -> Answer:
    status = int(file.readline().split()[1])
    headers = {}
    while line := file.readline().strip():
        name, value = line.decode().split(": ", 1)
        headers[name] = value
    return Answer(status, headers, file.read(int(headers["Content-Length"])))


def exchange(url: str, data: bytes) -> list[Answer]:
    """Send bytes as they are and read every answer until the server closes the connection, or rests."""
    with connect_to(url) as sock, sock.makefile("rb") as file:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answers = []
        while file.peek():
            answers.append(read_answer(file))
        return answers


@pytest.fixture
def server(make_app, serve_app):
    return serve_app(make_app())


STOP = f"POST /admin/jobs/nix/emergency-stop HTTP/1.1\r\nHost: x\r\nX-Admin-Token: {TOKEN}\r\n".encode()
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"

REFUSED = {
    "two lengths": (STOP + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
    "two different lengths": (STOP + b"Content-Length: 2\r\nContent-Length: 0\r\n\r\n{}", 400),
    "a list of lengths": (STOP + b"Content-Length: 2, 2\r\n\r\n{}", 400),
    "a sign": (STOP + b"Content-Length: +2\r\n\r\n{}", 400),
    "a negative length": (STOP + b"Content-Length: -2\r\n\r\n{}", 400),
    "a space in the length": (STOP + b"Content-Length: 0 2\r\n\r\n{}", 400),
    "an underscore in the length": (STOP + b"Content-Length: 0_2\r\n\r\n{}", 400),
    "a hexadecimal length": (STOP + b"Content-Length: 0x2\r\n\r\n{}", 400),
    "an empty length": (STOP + b"Content-Length:\r\n\r\n{}", 400),
    "a length without end": (STOP + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}", 400),
    "length and encoding": (STOP + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "encoding and length": (STOP + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n", 400),
    "chunks": (STOP + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
    # 1.0 answered 411 to each of these, and 200 to what has no Host or an odd one.
    "chunks twice": (STOP + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked not last": (STOP + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400),
    "an unknown coding": (STOP + b"Transfer-Encoding: gzip\r\n\r\n", 400),
    "an unknown coding before chunked": (STOP + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "chunks in HTTP/1.0": (STOP.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "no host": (b"GET /health/live HTTP/1.1\r\n\r\n", 400),
    "an empty host": (b"GET /health/live HTTP/1.1\r\nHost:\r\n\r\n", 400),
    "a host with a space": (b"GET /health/live HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "a host with a path": (b"GET /health/live HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    "a host with a user": (b"GET /health/live HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
    "a port that is none": (b"GET /health/live HTTP/1.1\r\nHost: a:b\r\n\r\n", 400),
    "an absolute target at an address that is none": (b"GET http://[/health/live HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a large body": (STOP + b"Content-Length: 20000\r\n\r\n" + b"x" * 20_000, 413),
    "a space before the colon": (STOP + b"Content-Length : 2\r\n\r\n{}", 400),
    "a folded header": (STOP + b"X-A: 1\r\n 2\r\n\r\n", 400),
    "a folded length": (STOP + b"Content-Length:\r\n 2\r\n\r\n{}", 400),
    "a bare line feed": (b"GET /health/live HTTP/1.1\nHost: x\n\n", 400),
    "a bare line feed in a header": (LIVE + b"X-A: 1\nX-B: 2\r\n\r\n", 400),
    "a bare carriage return": (LIVE + b"X-A: 1\rX-B: 2\r\n\r\n", 400),
    "a NUL in a header": (LIVE + b"X-A: \0\r\n\r\n", 400),
    "a header without a name": (LIVE + b": x\r\n\r\n", 400),
    "a header without a colon": (LIVE + b"X-A\r\n\r\n", 400),
    "two hosts": (LIVE + b"Host: y\r\n\r\n", 400),
    "no version": (b"GET /health/live\r\n\r\n", 400),
    "two spaces": (b"GET  /health/live HTTP/1.1\r\n\r\n", 400),
    "nonsense": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    "another protocol": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "a target of another scheme": (b"GET ftp://x/health/live HTTP/1.1\r\n\r\n", 400),
    "a huge header": (LIVE + b"X-A: " + b"x" * 20_000 + b"\r\n\r\n", 431),
    "a head that ends with bare line feeds": (b"GET /health/live HTTP/1.1\r\nHost: x\n\nGET / HTTP/1.1\r\n\r\n", 400),
    "an empty encoding": (STOP + b"Transfer-Encoding:\r\n\r\n{}", 400),
    "a request id of white space that ends badly": (LIVE + b"X-Request-ID:" + b" " * 16_000 + b"\n\n", 400),
    "a value of white space that ends badly": (LIVE + b"X-A:" + b" " * 16_000 + b"\0\r\n\r\n", 400),
    "headers without end": (LIVE + b"X-A: x\r\n" * 5_000, 431),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_read_in_two_ways_is_refused(shared_server, name):
    data, status = REFUSED[name]

    (answer,) = exchange(shared_server.url, data)
    assert answer.status == status
    assert answer.json["error"]
    assert answer.headers["Connection"] == "close"
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Request-ID"]


READ = {
    "plain": LIVE + b"\r\n",
    "empty lines before": b"\r\n\r\n" + LIVE + b"\r\n",
    "HTTP/1.0": b"GET /health/live HTTP/1.0\r\n\r\n",
    "an address and a port": b"GET /health/live HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n",
    "an odd name": b"GET /health/live HTTP/1.1\r\nHost: my_service.internal.:80\r\n\r\n",
    "an absolute target": b"GET http://x:1/health/live HTTP/1.1\r\nHost: x\r\n\r\n",
    "a query": b"GET /health/live?a=%zz&\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "a body that nobody asked for": LIVE + b"Content-Length: 2\r\n\r\n{}",
    "bytes that are spaces in Latin-1": b"GET /health/live?a=\x85\xa0 HTTP/1.1\r\nHost: x\r\n\r\n",
    "odd but clear headers": LIVE + b"X-A:\r\nX-B:\t\xff \t\r\nx-c:1\r\n\r\n",
}


@pytest.mark.parametrize("name", READ)
def test_what_can_be_read_is_answered(shared_server, name):
    (answer,) = exchange(shared_server.url, READ[name])

    assert (answer.status, answer.json) == (200, {"ok": True})
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT", answer.headers["Date"])
    assert "Server" not in answer.headers


def test_a_header_with_an_underscore_is_not_the_token(server):
    (answer,) = exchange(
        server.url,
        b"POST /admin/jobs/x/emergency-stop HTTP/1.1\r\nHost: x\r\nX_Admin_Token: " + TOKEN.encode() + b"\r\n\r\n",
    )

    assert answer.status == 403


@pytest.mark.parametrize("path", ["a%2Fb", "a/b", "a%20b%25", "%C3%A4", "\u00e4".encode().decode("latin-1")])
def test_percent_encoded_ids(server, make_job, path):
    make_job({"a%2Fb": "a/b", "a/b": "a/b", "a%20b%25": "a b%"}.get(path, "ä"), running=1)

    (answer,) = exchange(server.url, STOP.replace(b"/nix/", f"/{path}/".encode("latin-1")) + b"\r\n")
    assert (answer.status, answer.json["executions_stopped"]) == (200, 1)


def test_requests_on_one_connection_one_after_the_other_and_all_at_once(server):
    with connect_to(server.url) as sock, sock.makefile("rb") as file:
        for _ in range(3):
            sock.sendall(LIVE + b"\r\n")
            assert read_answer(file).status == 200
        sock.sendall((LIVE + b"\r\n") * 5 + b"HEAD /health/live HTTP/1.1\r\nHost: x\r\n\r\n" + LIVE + b"Connection: close\r\n\r\n")
        for _ in range(5):
            assert read_answer(file).status == 200
        while file.readline().strip():  # of HEAD: headers only
            pass
        assert read_answer(file).headers["Connection"] == "close"
        assert file.read() == b""


def test_a_request_that_arrives_byte_by_byte(server, make_job):
    data = STOP.replace(b"/nix/", f"/{make_job(running=1)}/".encode()) + b"Content-Length: 2\r\n\r\n{}"
    with connect_to(server.url) as sock, sock.makefile("rb") as file:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(len(data)):
            sock.sendall(data[number : number + 1])
        assert read_answer(file).json["executions_stopped"] == 1


def test_a_client_that_waits_to_be_told_to_go_on(server):
    with connect_to(server.url) as sock, sock.makefile("rb") as file:
        sock.sendall(STOP + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert file.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert file.readline() == b"\r\n"
        sock.sendall(b"{}")
        assert read_answer(file).status == 404


def test_refusals_of_the_server_keep_the_callers_request_id_and_the_rules_of_head(server):
    with connect_to(server.url) as sock, sock.makefile("rb") as file:
        sock.sendall(b"HEAD /health/live HTTP/1.1\r\nX-Request-Id: req-1\r\nContent-Length: x\r\n\r\n")
        answer = file.read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"X-Request-ID: req-1\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


def test_what_the_server_refuses_is_logged_like_any_other_refused_call(start_service):
    """Without request id, job and duration until 2.0."""
    service = start_service()
    exchange(service.url, STOP.replace(b"/nix/", b"/a%2Fb/") + b"X-Request-ID: req-1\r\nContent-Length: x\r\n\r\n")

    (line,) = wait_until(lambda: [line for line in service.log if line["event"] == "refused"])
    assert (line["request_id"], line["client"], line["job_id"], line["status"]) == ("req-1", "127.0.0.1", "a/b", 400)
    assert line["outcome"].startswith("Content-Length cannot be read") and line["duration_ms"] >= 0
    assert {"time", "actor", "executions_stopped", "sessions_ended", "reason"} < set(line)


def test_head_of_the_listing_claims_no_length(server, make_job):
    with connect_to(server.url) as sock, sock.makefile("rb") as file:
        sock.sendall(f"HEAD /api/v1/executions?job_id={make_job(running=1)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = file.read()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"Content-Length" not in answer


def test_an_answer_that_fails_before_its_first_byte_is_a_500(serve_app):
    def application(environ, start_response):
        start_response("200 OK", [("Content-Type", "application/json")])
        raise RuntimeError("a bug")
        yield b""

    (answer,) = exchange(serve_app(application).url, LIVE + b"\r\n")
    assert (answer.status, answer.json) == (
        500,
        {"error": "internal error", "request_id": answer.headers["X-Request-ID"]},
    )


def test_a_body_of_16_kib_and_not_one_byte_more(shared_server):
    for length, status in ((16 * 1024, 404), (16 * 1024 + 1, 413)):
        (answer,) = exchange(shared_server.url, STOP + b"Content-Length: %d\r\n\r\n" % length + b"{}".ljust(length))
        assert answer.status == status


def test_a_large_body_is_refused_without_reading_it(server):
    with connect_to(server.url) as sock, sock.makefile("rb") as file:
        sock.sendall(STOP + b"Content-Length: 1000000000\r\n\r\n")
        assert read_answer(file).status == 413


@pytest.mark.parametrize("begun", [LIVE, STOP + b"Content-Length: 9000\r\n\r\n"], ids=["a header", "a body"])
def test_a_request_that_does_not_end_is_given_up(server, monkeypatch, begun):
    monkeypatch.setattr(beacon_stop, "READ_TIMEOUT", 0.5)
    with connect_to(server.url) as sock, sock.makefile("rb") as file:
        sock.sendall(begun)
        started = time.monotonic()
        assert read_answer(file).status == 408
        assert 0.4 < time.monotonic() - started < 3
        assert file.read() == b""


def test_a_caller_who_hangs_up_does_not_cancel_the_stop(server, make_job, db, connect):
    job_id = make_job(running=3)
    holder = connect(autocommit=False)
    holder.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (job_id,))
    with connect_to(server.url) as sock:
        sock.sendall(STOP.replace(b"/nix/", f"/{job_id}/".encode()) + b"\r\n")
        wait_until(lambda: db.execute("SELECT FROM pg_locks WHERE NOT granted").rowcount)
    holder.rollback()

    wait_until(lambda: count_active(db, job_id) == 0)


def test_empty_lines_do_not_put_off_the_end_of_a_request(server, monkeypatch):
    """Each began the time anew."""
    monkeypatch.setattr(beacon_stop, "READ_TIMEOUT", 0.5)
    started = time.monotonic()
    with connect_to(server.url) as sock:
        for _ in range(4):
            sock.sendall(b"\r\n")
            assert not select.select([sock], [], [], 0.12)[0]
        assert sock.recv(1) == b""
    assert time.monotonic() - started < 3


def test_a_few_empty_lines_before_a_request_do_no_harm_and_more_are_refused(server):
    """64 connections with nothing else kept the operator's stop waiting for 13 s."""
    for lines, status in ((0, 200), (4, 200), (5, 400), (5_000, 400)):
        with connect_to(server.url) as sock, sock.makefile("rb") as file:
            sock.sendall(b"\r\n" * lines + LIVE + b"Connection: close\r\n\r\n")
            assert read_answer(file).status == status
            assert file.read() == b""


def test_at_the_limit_of_connections_an_idle_one_is_shut_before_one_that_is_new(server, monkeypatch):
    """The time of a new one is up sooner, but its request is on the way."""
    monkeypatch.setattr(server, "max_connections", 2)
    request = LIVE + b"\r\n"
    wait_until(lambda: not server.connections)
    with connect_to(server.url) as idle, idle.makefile("rb") as file:
        idle.sendall(request)
        assert read_answer(file).status == 200
        wait_until(lambda: [phase for phase, _ in server.connections.values()] == ["idle"])
        with connect_to(server.url) as new, new.makefile("rb") as new_file:
            wait_until(lambda: len(server.connections) == 2)
            with connect_to(server.url) as third, third.makefile("rb") as third_file:
                third.sendall(request)
                assert read_answer(third_file).status == 200
                assert file.read() == b""
                new.sendall(request)
                assert read_answer(new_file).status == 200


def test_a_connection_that_was_shut_is_answered_once_more_at_most_whatever_was_sent_before(server, monkeypatch):
    """What has arrived can still be read then: strangers who send ahead would be served beyond the limit for ever."""
    monkeypatch.setattr(server, "max_connections", 1)
    with connect_to(server.url) as ahead, ahead.makefile("rb") as file:
        ahead.sendall((LIVE + b"\r\n") * 400)  # which would take 20 seconds
        assert read_answer(file).status == 200
        assert send(server.url, "GET", "/health/live").status == 200
        wait_until(lambda: [phase for phase, _ in server.connections.values()].count("shut") == 0, 5)
        assert file.read().count(b"HTTP/1.1 200") < 100
    wait_until(lambda: not server.connections)


def test_the_files_of_the_pools_are_not_for_clients(monkeypatch, make_app, serve_app):
    monkeypatch.setattr(beacon_stop.resource, "getrlimit", lambda _: (500, 500))
    asked_for = []

    def listen(*arguments):
        asked_for.extend(arguments)
        raise OSError(98, "in use")

    with contextlib.closing(beacon_stop.Server(make_app(), "127.0.0.1", 0, 123).socket):
        pass
    assert beacon_stop.Server(make_app(), "127.0.0.1", 0, 123).max_connections == 500 - beacon_stop.SPARE_FILES - 123
    monkeypatch.setattr(beacon_stop, "Server", listen)
    environment = {"ADMIN_TOKEN": TOKEN, "DATABASE_URL": "postgresql:///x", "BEACON_ADMIN_POOL": "30", "BEACON_READ_POOL": "7"}
    with pytest.raises(beacon_stop.ConfigurationError):
        beacon_stop.serve(environment, "127.0.0.1", 1)
    assert asked_for[1:] == ["127.0.0.1", 1, 37]


@pytest.mark.parametrize("token", ["mot-de-passe-voil\u00e0", "le-passe-mot-de-\u00c5"])
def test_a_token_whose_last_byte_is_white_space_in_latin_1_is_the_token(make_app, serve_app, token):
    server = serve_app(make_app(admin_token=token))

    request = b"GET /admin/jobs/nix/emergency-stop HTTP/1.1\r\nHost: x\r\nX-Admin-Token:  %b \t\r\n\r\n"
    (answer,) = exchange(server.url, request % token.encode())
    assert answer.status == 404


def test_idle_clients_who_take_all_files_that_the_process_may_open_do_not_keep_an_operator_out(make_job, start_service):
    """The operator's stop was answered after 75 s, when the first of them were shut."""
    service = start_service("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))")
    job_id = make_job(running=1)
    with contextlib.ExitStack() as idle:
        for _ in range(70):
            sock = idle.enter_context(connect_to(service.url))
            sock.sendall(LIVE + b"\r\n")
            assert sock.recv(1_000).startswith(b"HTTP/1.1 200")

        path = f"/admin/jobs/{job_id}/emergency-stop"
        assert send(service.url, "POST", path, b"{}", timeout=10, **{"X-Admin-Token": TOKEN}).json["executions_stopped"] == 1


def test_400_slow_clients_do_not_keep_an_operator_out(make_job, start_service):
    service = start_service()
    job_id = make_job(running=42)
    slow = [connect_to(service.url) for _ in range(400)]
    ended = threading.Event()

    def dribble() -> None:
        while not ended.wait(0.05):
            for sock in slow:
                with contextlib.suppress(OSError):
                    sock.send(b"X")

    for sock in slow:
        sock.send(b"POST /admin/jobs/x/emergency-stop HTTP/1.1\r\n")
    thread = threading.Thread(target=dribble)
    thread.start()
    try:
        started = time.monotonic()
        assert service.stop(job_id).json["executions_stopped"] == 42
        assert time.monotonic() - started < 15
    finally:
        ended.set()
        thread.join()
        for sock in slow:
            sock.close()


def test_readers_of_large_lists_do_not_hold_up_a_stop(make_job, start_service, db):
    service = start_service()
    big = make_job(completed=5_000)
    job_id = make_job(running=42)
    read = []
    ended = threading.Event()

    def list_it(_: int) -> None:
        while not ended.is_set():
            answer = service("GET", f"/api/v1/executions?job_id={big}")
            read.append((answer.status, answer.body[-3:]))

    with ThreadPoolExecutor(24) as executor:
        readers = [executor.submit(list_it, number) for number in range(24)]
        try:
            wait_until(lambda: read, 30)
            started = time.monotonic()
            assert service.stop(job_id).json["executions_stopped"] == 42
            assert time.monotonic() - started < 10
        finally:
            ended.set()
    for reader in readers:
        reader.result()
    assert set(read) == {(200, b"]}\n")}


def resident(pid: int, peak: bool = False) -> int:
    """Bytes of memory that a process has, or has had at most."""
    return int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def test_listing_200_000_executions_takes_little_memory(make_job, start_service, db):
    service = start_service()
    job_id = make_job(completed=200_000)
    db.execute("VACUUM ANALYZE executions")
    service("GET", "/health/ready")
    idle = resident(service.process.pid)

    with connect_to(service.url) as sock:
        sock.sendall(f"GET /api/v1/executions?job_id={job_id} HTTP/1.0\r\n\r\n".encode())
        rows = 0
        while data := sock.recv(1 << 20):
            rows += data.count(b'"id" :')
    assert abs(rows - 200_000) < 100  # a name may be cut in two
    assert resident(service.process.pid, peak=True) - idle < 15_000_000


def test_a_reader_that_goes_away_frees_its_connection_at_once(make_job, start_service, db):
    service = start_service(BEACON_READ_POOL="1")
    job_id = make_job(completed=100_000)
    with connect_to(service.url) as sock:
        sock.sendall(f"GET /api/v1/executions?job_id={job_id} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert sock.recv(100)
        assert service("GET", f"/api/v1/jobs/{job_id}").status == 200, "it holds none while it does not read"
    assert service("GET", f"/api/v1/jobs/{job_id}").status == 200


def test_a_listing_that_breaks_off_cannot_be_taken_for_a_whole_one(make_job, start_service, db):
    service = start_service()
    job_id = make_job(completed=100_000)
    with connect_to(service.url) as sock, sock.makefile("rb") as file:
        sock.sendall(f"GET /api/v1/executions?job_id={job_id} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        file.readline()
        db.execute("DROP FUNCTION list_executions")
        body = file.read()
    with pytest.raises(json.JSONDecodeError):
        json.loads(body.split(b"\r\n\r\n", 1)[1])
    wait_until(lambda: [line for line in service.log if line["event"] == "error"])


def test_sigterm_lets_the_call_in_flight_finish(make_job, start_service, db):
    service = start_service()
    job_id = make_job(running=3)
    hold_stops(db)
    with ThreadPoolExecutor(1) as executor:
        stop = executor.submit(service.stop, job_id)
        wait_until(lambda: stops_are_held(db))
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not accepts_connections(int(service.url.rsplit(":", 1)[1])))
        assert not stop.done()
        let_stops_go(db)

        answer = stop.result()
    assert (answer.status, answer.json["executions_stopped"]) == (200, 3)
    assert service.process.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_service_ends_at_once_with_status_0(start_service, number):
    service = start_service()
    with connect_to(service.url) as kept:
        kept.sendall(LIVE + b"\r\n")
        assert kept.recv(1000)

        service.process.send_signal(number)
        assert service.process.wait(3) == 0, "long before the ten seconds that others get who are connected"


def test_the_token_is_in_no_log_and_in_nothing_that_the_database_is_told(start_service, db, make_job):
    service = start_service()
    for token in (TOKEN, TOKEN + "x"):
        service.stop(make_job(running=1), token=token)
        service.stop("nix", b"{", token=token)
    wait_until(lambda: len(service.log) >= 5)

    assert TOKEN not in json.dumps(service.log)
    told = db.execute("SELECT string_agg(a::text, ' ') FROM pg_stat_activity a WHERE usename = 'beacon_service'").fetchone()[0]
    assert "emergency_stop_job" in told and TOKEN not in told
    assert TOKEN not in db.execute("SELECT string_agg(s::text, ' ') FROM emergency_stops s").fetchone()[0]


class OwnPostgres:
    """A PostgreSQL of a test's own, to be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        self.url = self.stack.enter_context(beacon_stop.embedded_postgres(self.folder))

    def stop(self) -> None:
        self.stack.close()


@pytest.fixture
def own_postgres(folder):
    postgres = OwnPostgres(folder)
    beacon_stop.init_db(postgres.url)
    yield postgres
    postgres.stop()


def test_the_database_restarts_under_the_service(own_postgres, start_service):
    constants = "beacon_stop.POOL_TIMEOUT, beacon_stop.AWAY_TIMEOUT = 2.0, 0.3"
    service = start_service(constants, DATABASE_URL=own_postgres.url)
    assert service.stop("nix").status == 404
    assert service("GET", "/api/v1/jobs/nix").status == 404

    own_postgres.stop()
    for _ in range(2):
        with ThreadPoolExecutor(1) as executor:
            ready = executor.submit(service, "GET", "/health/ready")
            answer = service.stop("nix")
        assert (answer.status, answer.json, answer.headers["Retry-After"]) == (
            503,
            {"error": "database unavailable"},
            "2",
        )
        assert ready.result().status == 503
    assert service("GET", "/health/live").status == 200
    own_postgres.start()
    returned = time.monotonic()
    wait_until(lambda: service.stop("nix").status == 404 and service("GET", "/api/v1/jobs/nix").status == 404, 15)
    assert time.monotonic() - returned < 5
    trouble = [line["message"] for line in service.log if line["event"] == "log"]
    assert any("error connecting" in message for message in trouble)
    assert len(trouble) == len(set(trouble))  # though the attempts were many


def test_the_service_starts_before_its_database(own_postgres, start_service):
    own_postgres.stop()

    service = start_service(DATABASE_URL=own_postgres.url)
    assert service("GET", "/health/ready").status == 503
    own_postgres.start()
    wait_until(lambda: service("GET", "/health/ready").status == 200, 10)


# --- Hostile clients and logs ---


def test_64_clients_that_pipeline_and_never_read_do_not_hold_up_a_stop(make_job, start_service):
    """A stop of 1.0 got no answer for 81 s."""
    service = start_service()
    job_id = make_job(running=3)
    clients = [connect_to(service.url) for _ in range(64)]
    try:
        for sock in clients:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.send(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n" * 2_300)
        started = time.monotonic()
        assert service.stop(job_id).json["executions_stopped"] == 3
        assert time.monotonic() - started < 2
    finally:
        for sock in clients:
            sock.close()


def test_a_log_that_nobody_reads_holds_up_no_answer_and_no_end(make_job, service_url):
    """1.0 froze after 241 refused calls, and SIGTERM did nothing."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "beacon_stop", "serve", "--port", str(port)], cwd=ROOT, stderr=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "ADMIN_TOKEN": TOKEN, "DATABASE_URL": service_url},
    )  # fmt: skip
    try:
        wait_until(lambda: accepts_connections(port))
        with connect_to(url) as sock, sock.makefile("rb") as file:
            for _ in range(2_500):  # more than a pipe and the queue take together
                sock.sendall(b"POST /admin/jobs/" + b"x" * 200 + b"/emergency-stop HTTP/1.1\r\nHost: x\r\n\r\n")
                assert read_answer(file).status in (403, 429)
        answer = send(url, "POST", f"/admin/jobs/{make_job(running=3)}/emergency-stop", b"{}", **{"X-Admin-Token": TOKEN})
        assert answer.json["executions_stopped"] == 3
    finally:
        process.terminate()
    assert process.wait(20) == 0
    lines = process.stderr.read().decode().splitlines()
    process.stderr.close()
    assert all(json.loads(line)["event"] in ("serving", "emergency_stop") for line in lines[:-1])


def test_the_first_line_of_a_process_does_not_wait_for_others_to_gather():
    """A server that ends at once on SIGTERM, as waitress does, lost the line of a stop that it had answered before."""
    program = "import beacon_stop; beacon_stop.LOG_PAUSE = 3600; beacon_stop.log_event('first'); input()"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert json.loads(process.stderr.readline())["event"] == "first"
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_was_forked_after_the_first_line_writes_its_own():
    program = """
import os, beacon_stop
beacon_stop.log_event("before")
beacon_stop.LOG_HANDLER.flush()
if child := os.fork():
    os.waitpid(child, 0)
else:
    beacon_stop.log_event("of the child")
    beacon_stop.LOG_HANDLER.flush()
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=20)

    assert [list(json.loads(line)) for line in done.stderr.splitlines()] == [["time", "event"]] * 2  # without lines_dropped
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["before", "of the child"]


def test_the_log_outlives_whatever_another_servers_stderr_raises(monkeypatch, capsys):
    class Odd:
        def write(self, text):
            raise RuntimeError("not in this greenlet")

    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", Odd())
        beacon_stop.log_event("refused by it")
        beacon_stop.LOG_HANDLER.flush()
    beacon_stop.log_event("odd", number=1)
    assert [line["number"] for line in log_lines(capsys, "odd")] == [1]


def test_the_log_begins_again_where_a_thread_could_not_be_started(monkeypatch, capsys):
    handler = beacon_stop.LogHandler()

    def start(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        patch.setattr(logging, "raiseExceptions", False)
        handler.handle(logging.makeLogRecord({"msg": "odd", "fields": {"event": "odd", "number": 1}}))
    handler.handle(logging.makeLogRecord({"msg": "odd", "fields": {"event": "odd", "number": 2}}))
    handler.flush()
    assert [line["number"] for line in log_lines(capsys, "odd")] == [1, 2]


def test_what_the_pools_warn_of_is_left_to_the_log_that_waits_for_nobody(capsys):
    """logging's own way out writes to stderr at once: the pools stood still where nobody read it, and never connected again."""
    logging.getLogger("psycopg.pool").warning("error connecting in %r", "a test")

    (line,) = log_lines(capsys, "log")
    assert (line["logger"], line["level"], line["message"]) == ("psycopg.pool", "warning", "error connecting in 'a test'")
    assert beacon_stop.LOG_HANDLER in logging.getLogger("psycopg").handlers


def test_what_was_dropped_from_the_log_is_counted(monkeypatch):
    handler, lines, go = beacon_stop.LogHandler(), [], threading.Event()
    monkeypatch.setattr(beacon_stop, "LOG_HANDLER", handler)
    monkeypatch.setattr(beacon_stop.LogHandler, "write", lambda self, line: (go.wait(10), lines.append(line)))
    for number in range(beacon_stop.LOG_LINES + 100):
        handler.handle(logging.makeLogRecord({"msg": "x", "fields": {"number": number}}))
    dropped = handler.dropped
    go.set()
    handler.flush()

    assert 0 < dropped <= 100
    assert len(lines) == beacon_stop.LOG_LINES + 100 - dropped


def test_a_refused_request_of_15_kb_is_a_short_line(start_service):
    """A line of 90 kB in 1.0."""
    service = start_service()
    service("POST", f"/admin/jobs/{'%01' * 5_000}/emergency-stop", b"{}")

    line = wait_until(lambda: [line for line in service.log if line["event"] == "emergency_stop"])[0]
    assert len(line["job_id"]) == 255


def test_hops_that_are_no_address_take_no_memory(make_app):
    """Each one of 14 kB was kept by 1.0."""
    client = Client(make_app(trusted_proxies="1"))
    client("GET", "/api/v1/jobs/x")
    tracemalloc.start()
    for number in range(300):
        assert client("GET", "/api/v1/jobs/x", HTTP_X_FORWARDED_FOR=f"{number:x}".ljust(14_000, "x")).status == 404
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    assert kept < 2_000_000


def test_all_addresses_of_both_families(shared_app):
    """`--host ::` of 1.0 refused IPv4."""
    with serving(shared_app, "::") as server:
        for address in ("127.0.0.1", "[::1]"):
            assert send(f"http://{address}:{server.port}", "GET", "/health/live").json == {"ok": True}


def test_sigterm_while_300_requests_are_sent(start_service):
    """1.0 cut some off without an answer."""
    service = start_service()
    cut_off, answered, refused = [], [], []

    def call(_: int) -> None:
        try:
            sock = connect_to(service.url)
        except OSError as error:
            return refused.append(error)
        with sock:
            try:
                sock.sendall(LIVE + b"Connection: close\r\n\r\n")
                (answered if sock.recv(100).startswith(b"HTTP/1.1 200") else cut_off).append(1)
            except OSError as error:
                cut_off.append(error)

    with ThreadPoolExecutor(40) as executor:
        calls = executor.map(call, range(300))
        wait_until(lambda: len(answered) > 20)
        service.process.send_signal(signal.SIGTERM)
        list(calls)
    assert service.process.wait(10) == 0
    assert (cut_off, len(answered) + len(refused)) == ([], 300)


def test_a_client_that_does_not_take_its_answer_is_given_up(serve_app, monkeypatch):
    monkeypatch.setattr(beacon_stop, "ANSWER_TIMEOUT", 0.3)

    def application(environ, start_response):
        start_response("200 OK", [("Content-Length", "50000000")])
        return [b"x" * 50_000_000]

    server = serve_app(application)
    with connect_to(server.url) as sock:
        sock.sendall(LIVE + b"\r\n")
        wait_until(lambda: len(server.connections) == 1)
        wait_until(lambda: len(server.connections) == 0, 5)


def test_too_many_connections_end_those_whose_time_is_up_next(serve_app, shared_app, monkeypatch):
    monkeypatch.setattr(beacon_stop, "MAX_CONNECTIONS", 10)
    server = serve_app(shared_app)
    slow = [connect_to(server.url) for _ in range(30)]
    try:
        wait_until(lambda: len(server.connections) <= 10)
        assert send(server.url, "GET", "/health/live").status == 200
    finally:
        for sock in slow:
            sock.close()


@pytest.mark.parametrize(
    ("begun", "more"),
    [(LIVE, b"x"), (LIVE, b"X-A: b\r\n"), (STOP + b"Content-Length: 9999\r\n\r\n", b"x")],
    ids=["a byte of a header", "a header", "a byte of a body"],
)
def test_something_now_and_then_does_not_put_off_the_end_of_a_request(server, monkeypatch, begun, more):
    monkeypatch.setattr(beacon_stop, "READ_TIMEOUT", 0.5)
    with connect_to(server.url) as sock, sock.makefile("rb") as file:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(begun)

        for _ in range(60):
            if select.select([sock], [], [], 0.05)[0]:
                break
            sock.sendall(more)
        else:
            pytest.fail("it was put off")
        assert read_answer(file).status == 408
        assert file.read() == b""


@pytest.mark.parametrize(
    ("request_line", "header", "is_kept"),
    [
        (b"GET /health/live HTTP/1.1", b"", True),
        (b"GET /health/live HTTP/1.1", b"Connection: Close\r\n", False),
        (b"GET /health/live HTTP/1.0", b"", False),
        (b"GET /health/live HTTP/1.0", b"Connection: keep-alive\r\n", False),
    ],
)
def test_a_connection_is_kept_for_the_next_request_only_where_both_know_of_it(server, request_line, header, is_kept):
    request = request_line + b"\r\nHost: x\r\n" + header + b"\r\n"
    with connect_to(server.url) as sock, sock.makefile("rb") as file:
        sock.sendall(request)
        answer = read_answer(file)
        assert (answer.status, answer.headers.get("Connection")) == (200, None if is_kept else "close")
        if is_kept:
            sock.sendall(request)
            assert read_answer(file).status == 200
        else:
            assert file.read() == b""


def test_a_hangup_ends_the_service_like_sigterm(start_service):
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # by nohup, with which the tests may have been started
    try:
        service = start_service()
    finally:
        signal.signal(signal.SIGHUP, ignored)

    service.process.send_signal(signal.SIGHUP)
    assert service.process.wait(5) == 0


def test_who_has_begun_a_request_is_given_time_to_end_it_at_the_end_of_the_service(make_app, monkeypatch):
    monkeypatch.setitem(beacon_stop.PATIENCE, "reading", 2.0)
    server = beacon_stop.Server(make_app(), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with connect_to(server.url) as prompt, connect_to(server.url) as slow, prompt.makefile("rb") as file:
        prompt.sendall(LIVE)
        slow.sendall(LIVE)
        wait_until(lambda: len(server.connections) == 2)
        wait_until(lambda: {phase for phase, _ in server.connections.copy().values()} == {"reading"})
        server.stop()
        began = time.monotonic()
        wait_until(lambda: not accepts_connections(server.port))

        prompt.sendall(b"\r\n")
        answer = read_answer(file)
        assert (answer.status, answer.headers["Connection"], file.read()) == (200, "close", b"")
        assert slow.recv(1_000).startswith(b"HTTP/1.1 408 ")
        thread.join(10)
        assert not thread.is_alive()
        assert 1.5 < time.monotonic() - began < 8


def test_a_connection_that_rests_after_an_answer_is_ended(server, monkeypatch):
    monkeypatch.setattr(beacon_stop, "IDLE_TIMEOUT", 0.3)
    with connect_to(server.url) as sock, sock.makefile("rb") as file:
        sock.settimeout(8)
        sock.sendall(LIVE + b"\r\n")
        assert read_answer(file).status == 200
        assert file.read() == b""
