"""Behind nginx and HAProxy, configured as the README shows it."""

import http.client
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

from conftest import ROOT, TOKEN, Answer, Service, count_active, readme_block, wait_until
from processes import accepts_connections, free_port, running

PROXIES = ["nginx", "haproxy"]


@dataclass
class Proxy:
    """A proxy in front of the service, and how to call it."""

    port: int

    @contextmanager
    def client(self, address: str = "127.0.0.1") -> Iterator[http.client.HTTPConnection]:
        """One connection from one of this machine's addresses."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60, source_address=(address, 0))
        try:
            yield connection
        finally:
            connection.close()

    def __call__(self, method: str, path: str, body: object = None, address: str = "127.0.0.1", **headers: str) -> Answer:
        with self.client(address) as connection:
            return ask(connection, method, path, body, **headers)

    def stop(self, id: str, body: object = b"{}", address: str = "127.0.0.1", token: str = TOKEN, **headers: str) -> Answer:
        return self(
            "POST",
            f"/admin/jobs/{quote(id, safe='')}/emergency-stop",
            body,
            address,
            **{"X-Admin-Token": token, **headers},
        )


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: object = None, **headers: str) -> Answer:
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def nginx_command(folder: Path, listen: int, backend: int) -> list[object]:
    block = readme_block("nginx", "proxy_pass").replace("listen 80;", f"listen 127.0.0.1:{listen};").replace(":8080", f":{backend}")
    paths = "".join(f"{name}_temp_path {folder / name};\n" for name in ("client_body", "proxy", "fastcgi", "scgi", "uwsgi"))
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off;\nmaster_process off;\npid {folder / 'nginx.pid'};\nerror_log stderr;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{paths}{block}}}\n"
    )
    return ["/usr/sbin/nginx", "-p", folder, "-c", config]


def haproxy_command(folder: Path, listen: int, backend: int) -> list[object]:
    block = (
        readme_block("haproxy", "forwardfor")
        .replace("bind :80", f"bind 127.0.0.1:{listen}")
        .replace(":8080", f":{backend}")
        .replace("inter 1s", "inter 200ms")
        .replace("timeout check 5s", "timeout check 1s")
    )
    config = folder / "haproxy.cfg"
    config.write_text(block)
    return ["/usr/sbin/haproxy", "-db", "-f", config]


COMMANDS = {"nginx": nginx_command, "haproxy": haproxy_command}


@pytest.fixture
def start_proxy(tmp_path) -> Iterator[Callable[[str, int], Proxy]]:
    with ExitStack() as stack:

        def start_proxy(name: str, backend: int) -> Proxy:
            port = free_port()
            folder = tmp_path / f"{name}-{port}"
            folder.mkdir()
            command = COMMANDS[name](folder, port, backend)
            stack.enter_context(running(command, folder / "log", lambda: accepts_connections(port)))
            return Proxy(port)

        yield start_proxy


def port_of(service: Service) -> int:
    return int(service.url.rpartition(":")[2])


@pytest.fixture
def service(start_service) -> Service:
    return start_service(BEACON_TRUSTED_PROXIES="1")


@pytest.fixture(params=PROXIES)
def proxy(request, start_proxy, service) -> Proxy:
    return start_proxy(request.param, port_of(service))


def peers(service: Service) -> set[int]:
    """The ports from which others are connected to the service."""
    connections = psutil.Process(service.process.pid).net_connections("tcp")
    return {one.raddr.port for one in connections if one.laddr.port == port_of(service) and one.status == psutil.CONN_ESTABLISHED}


def test_both_connections_are_kept(make_job, proxy, service):
    upstream = []
    with proxy.client() as connection:
        for _ in range(20):
            path = f"/admin/jobs/{make_job(running=1)}/emergency-stop"
            assert ask(connection, "POST", path, b"{}", **{"X-Admin-Token": TOKEN}).json["executions_stopped"] == 1
            upstream.append(peers(service))
            client = connection.sock.getsockname()
            assert ask(connection, "GET", "/health/ready").status == 200
            upstream.append(peers(service))
            assert connection.sock.getsockname() == client

    assert len(set.intersection(*upstream)) == 1
    assert len(set.union(*upstream)) < 20  # of 40 requests; HAProxy looks after the service's health meanwhile


IDS = [
    "a/b",
    "/a//b/",
    "a%2Fb",
    "100%",
    "a b+c",
    "a/../b/./c",
    "příliš/žluťoučký",
    "日本💩",
    "a?b=c#d;e&f",
    "back\\slash\"'",
]


def test_ids_are_passed_on_unchanged(db, make_job, proxy):
    for id in IDS:
        make_job(id, running=2)

        assert proxy.stop(id).json["job_id"] == id
        assert count_active(db, id) == 0
        assert proxy("GET", f"/api/v1/jobs/{quote(id, safe='')}").json["job"]["id"] == id
        assert {one["job_id"] for one in proxy("GET", f"/api/v1/executions?job_id={quote(id)}").json["executions"]} == {id}


@pytest.mark.parametrize("name", PROXIES)
def test_a_forged_address_does_not_help(start_proxy, start_service, make_job, name):
    service = start_service(BEACON_TRUSTED_PROXIES="1", BEACON_FAILED_RATE="3/hour", BEACON_ADMIN_RATE="2/hour")
    proxy = start_proxy(name, port_of(service))
    jobs = [make_job(running=1) for _ in range(3)]
    forged = [{"X-Forwarded-For": f"10.0.0.{n}, 192.168.0.{n}"} for n in range(5)]

    assert [proxy.stop(jobs[0], token="wrong", address="127.0.0.2", **header).status for header in forged] == [403] * 3 + [429] * 2
    assert proxy.stop(jobs[0], token="wrong", address="127.0.0.3", **{"X-Forwarded-For": "127.0.0.2"}).status == 403
    assert [proxy.stop(job, address="127.0.0.4", **header).status for job, header in zip(jobs, forged, strict=False)] == [200, 200, 429]
    assert proxy.stop(jobs[2], address="127.0.0.2").status == 200
    wait_until(lambda: len(service.log) == 11)
    assert [line["client"] for line in service.log[1:]] == ["127.0.0.2"] * 5 + ["127.0.0.3"] + ["127.0.0.4"] * 3 + ["127.0.0.2"]


@pytest.mark.parametrize("outer, inner", [("nginx", "haproxy"), ("haproxy", "nginx"), ("haproxy", "haproxy")])
def test_two_proxies_in_a_chain(start_proxy, start_service, make_job, outer, inner):
    service = start_service(BEACON_TRUSTED_PROXIES="2")
    proxy = start_proxy(outer, start_proxy(inner, port_of(service)).port)

    id = make_job("a/b č", running=1)
    assert proxy.stop(id, address="127.0.0.2", **{"X-Forwarded-For": "10.0.0.1, 10.0.0.2, 10.0.0.3"}).status == 200
    assert proxy.stop(id, address="127.0.0.3").status == 200
    wait_until(lambda: len(service.log) == 3)
    assert [line["client"] for line in service.log[1:]] == ["127.0.0.2", "127.0.0.3"]


def test_a_body_in_chunks(db, make_job, proxy, request):
    job = make_job(running=1)
    answer = proxy.stop(job, iter([b'{"rea', b'son": "x"}']))

    if "nginx" in request.node.name:
        assert (answer.status, answer.json["reason"]) == (200, "x")
    else:
        assert (answer.status, count_active(db, job)) == (411, 1)


def test_a_body_too_large(db, make_job, proxy):
    job = make_job(running=1)

    assert proxy.stop(job, b" " * 100_000 + b"{}").status == 413
    assert count_active(db, job) == 1


def test_head(make_job, proxy):
    with proxy.client() as connection:
        for path in (f"/api/v1/jobs/{make_job()}", f"/api/v1/executions?job_id={make_job(running=3)}", "/health/ready"):
            answer = ask(connection, "HEAD", path)
            assert (answer.status, answer.body, answer.headers["cache-control"]) == (200, b"", "no-store")
            assert ask(connection, "GET", path).body


def test_a_long_listing_is_complete(make_job, proxy):
    job = make_job(pending=20_000)
    with proxy.client() as connection:
        for _ in range(2):
            answer = ask(connection, "GET", f"/api/v1/executions?job_id={job}")
            ids = [one["id"] for one in answer.json["executions"]]

            assert (len(ids), ids) == (20_000, sorted(set(ids)))


def test_request_ids_pass(make_job, proxy, service):
    answer = proxy.stop(make_job(running=1), **{"X-Request-ID": "mine-1"})

    assert answer.headers["x-request-id"] == "mine-1"
    wait_until(lambda: len(service.log) == 2)
    assert service.log[1]["request_id"] == "mine-1"


@pytest.mark.parametrize("name", PROXIES)
def test_a_restart_of_the_service(tmp_path, make_job, start_proxy, service_url, name):
    port = free_port()
    proxy = start_proxy(name, port)
    command = [sys.executable, "-m", "beacon_stop", "serve", "--port", port]
    environment = {"ADMIN_TOKEN": TOKEN, "DATABASE_URL": service_url}
    for _ in range(2):
        with running(command, tmp_path / "service.log", lambda: accepts_connections(port), environment, cwd=ROOT):
            wait_until(lambda: proxy("GET", "/health/live").status == 200)

            assert [proxy.stop(make_job(running=1)).status for _ in range(5)] == [200] * 5
        assert proxy("GET", "/health/live").status in (502, 503)


def test_haproxy_asks_a_service_that_is_not_ready_for_nothing(db, start_proxy, service):
    proxy = start_proxy("haproxy", port_of(service))
    assert proxy("GET", "/health/live").headers["x-request-id"]
    db.execute("REVOKE EXECUTE ON FUNCTION get_job(text) FROM beacon_service")

    wait_until(lambda: (answer := proxy("GET", "/health/live")).status == 503 and "x-request-id" not in answer.headers, 20)
    db.execute("GRANT EXECUTE ON FUNCTION get_job(text) TO beacon_service")
    wait_until(lambda: proxy("GET", "/health/live").status == 200, 20)
