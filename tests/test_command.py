"""The command beacon-stop: settings, the demo, and what is packaged."""

import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import psycopg
import pytest
from conftest import ROOT, TOKEN, send, wait_until

import beacon_stop

GOOD = {"ADMIN_TOKEN": TOKEN, "DATABASE_URL": "postgresql://u:secret-password@127.0.0.1:9/x"}

BAD = {
    "no token": ({"ADMIN_TOKEN": ""}, "ADMIN_TOKEN is not set: expected a secret of at least 16 characters"),
    "a short token": ({"ADMIN_TOKEN": "x" * 15}, "ADMIN_TOKEN is too short: expected at least 16 characters"),
    "a token with a line break": ({"ADMIN_TOKEN": "x" * 20 + "\n"}, "ADMIN_TOKEN cannot be sent in a header"),
    "no database": ({"DATABASE_URL": ""}, "DATABASE_URL is not set: expected a libpq URL"),
    "a bad database": ({"DATABASE_URL": "postgresql://u:secret-password@[/x"}, "DATABASE_URL cannot be read: expected a libpq URL"),
    "an unknown parameter": ({"DATABASE_URL": "postgresql://u:secret-password@h/x?y=z"}, "DATABASE_URL cannot be read"),
    "bytes": ({"DATABASE_URL": "postgresql://u:secret-password\udcff@h/x"}, "DATABASE_URL cannot be read"),
    "a timeout": ({"DATABASE_URL": "postgresql://u:secret-password@h/x?connect_timeout=soon"}, "DATABASE_URL cannot be read"),
    "a database port": ({"DATABASE_URL": "postgresql://u:secret-password@h:99999/x"}, "DATABASE_URL has a port that is none"),
    "an @ in the password": ({"DATABASE_URL": "postgresql://u:secret@secret-password@h/x"}, "DATABASE_URL has an @ in its host"),
    "a bad database for readers": (
        {"BEACON_READ_DATABASE_URL": "postgresql://u:secret-password@[/x"},
        "BEACON_READ_DATABASE_URL cannot be read",
    ),
    "a port for readers": ({"BEACON_READ_DATABASE_URL": "postgresql://h:0/x"}, "BEACON_READ_DATABASE_URL has a port that is none"),
    "a name with two dots": ({"HOST": "a..b"}, "HOST is 'a..b': expected an address or a name of this machine"),
    "a port": ({"PORT": "http"}, "PORT is 'http': expected a whole number from 0 to 65535"),
    "a large port": ({"PORT": "65536"}, "PORT is '65536': expected a whole number from 0 to 65535"),
    "an address": ({"HOST": "300.1.1.1"}, "HOST is '300.1.1.1': expected an address or a name of this machine"),
    "another machine's address": ({"HOST": "192.0.2.1"}, "cannot listen on 192.0.2.1 port 8080: Cannot assign requested address"),
    "proxies": ({"BEACON_TRUSTED_PROXIES": "-1"}, "BEACON_TRUSTED_PROXIES is '-1': expected a whole number from 0 to 100"),
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
    settings = beacon_stop.Settings.from_environment(GOOD)
    assert (settings.lock_timeout, settings.statement_timeout, settings.admin_pool, settings.read_pool) == (2, 60, 4, 4)
    assert (settings.admin_rate, settings.failed_rate) == (beacon_stop.Rate(600, 60), beacon_stop.Rate(10, 60))
    assert (settings.read_rate, settings.trusted_proxies) == (beacon_stop.Rate(300, 60), 0)

    assert settings.read_database_url == settings.database_url == GOOD["DATABASE_URL"]

    settings = beacon_stop.Settings.from_environment({**GOOD, "BEACON_LOCK_TIMEOUT": "250ms", "BEACON_STATEMENT_TIMEOUT": "2min"})
    assert (settings.lock_timeout, settings.statement_timeout) == (0.25, 120)

    settings = beacon_stop.Settings.from_environment({**GOOD, "BEACON_LOCK_TIMEOUT": "3s", "BEACON_STATEMENT_TIMEOUT": "2s"})
    assert (settings.lock_timeout, settings.statement_timeout) == (1.6, 2)

    settings = beacon_stop.Settings.from_environment({**GOOD, "BEACON_READ_DATABASE_URL": "postgresql:///standby"})
    assert (settings.database_url, settings.read_database_url) == (GOOD["DATABASE_URL"], "postgresql:///standby")
    assert "postgresql" not in repr(settings)


def test_the_readme_lists_every_setting():
    named = set(re.findall(r"^    ([A-Z][A-Z_]+)", beacon_stop.__doc__, re.MULTILINE)) | {"PORT"}

    assert set(re.findall(r"^\| `([A-Z_]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)) == named


def test_importing_needs_no_environment_and_asking_for_help_no_settings(tmp_path):
    for arguments in (["-c", "import beacon_stop; beacon_stop.application"], ["-m", "beacon_stop", "--help"]):
        subprocess.run([sys.executable, *arguments], env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path, check=True, capture_output=True)


def test_the_demo_from_its_first_line_to_its_last_process(folder):
    temporary = folder / "tmp"
    temporary.mkdir()
    folder /= "it's a folder"
    folder.mkdir()
    environment = {
        "TMPDIR": str(temporary),
        "PATH": os.environ["PATH"], "HOME": str(folder), "PORT": "0", "PYTHONPATH": str(ROOT),
        "LC_ALL": "xx_XX.UTF-8", "PGSERVICE": "no-such-service",
    }  # fmt: skip
    environment["DATABASE_URL"] = environment["BEACON_READ_DATABASE_URL"] = "postgresql://nobody@127.0.0.1:9/not-this-one"
    process = subprocess.Popen(
        [sys.executable, "-m", "beacon_stop", "serve", "--demo"],
        env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout
        lines = iter(process.stdout.readline, "")
        curl = next(line for line in lines if line.startswith("curl"))
        match = re.fullmatch(
            r"""curl -X POST (http://[^/]+)(/admin/jobs/([^/]+)/emergency-stop) -H "X-Admin-Token: (\S+)" -d '{}'\n""", curl
        )
        url, path, job_id, token = match.groups()

        answer = send(url, "POST", path, b"{}", **{"X-Admin-Token": token})
        assert (answer.status, answer.json["previous_status"], answer.json["executions_stopped"]) == (200, "processing", 42)
        listed = send(url, "GET", f"/api/v1/executions?job_id={job_id}").json["executions"]
        assert sorted(execution["status"] for execution in listed) == ["completed"] * 10 + ["failed"] * 42
        postmaster = int((folder / ".beacon" / "postgresql-18" / "postmaster.pid").read_text().splitlines()[0])
        assert [runtime.stat().st_mode & 0o777 for runtime in temporary.iterdir()] == [0o700], "whoever gets at the socket is a superuser"

        again = subprocess.run(
            [sys.executable, "-m", "beacon_stop", "serve", "--demo"], env=environment, cwd=folder, capture_output=True, text=True
        )
        assert again.returncode == 2
        assert "another demo is running" in again.stderr
    finally:
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in log
    assert token not in log
    wait_until(lambda: not Path(f"/proc/{postmaster}").exists())
    assert list(temporary.iterdir()) == []


def test_a_folder_that_the_demo_cannot_use_is_named(tmp_path):
    def serve_demo(folder):
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "beacon_stop", "serve", "--demo"]
        result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        return result.returncode, result.stderr

    odd, taken = tmp_path / "a$b", tmp_path / "taken"
    odd.mkdir(), taken.mkdir()
    (taken / ".beacon").touch()
    assert serve_demo(odd) == (
        2, f'beacon-stop: PostgreSQL does not start in {odd}/.beacon: expected a path without any of " $ ` \\\n'
    )  # fmt: skip
    assert serve_demo(taken) == (2, f"beacon-stop: {taken}/.beacon cannot be written to: File exists\n")


def test_the_wheel_works_from_any_folder(tmp_path, bare_database, server_url):
    wheel = tmp_path / "wheel"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheel, ROOT], check=True, capture_output=True
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
