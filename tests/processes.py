"""Real servers for tests: processes of their own, on free ports, ended by their ids."""

import os
import pwd
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg

DEBIAN_POSTGRES = Path("/usr/lib/postgresql/15/bin")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def accepts_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def unprivileged() -> dict[str, Any]:
    """How to start what refuses to run as root: as Debian's user postgres. As any other user, simply so."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}


@dataclass
class Running:
    """A server in a process group of its own."""

    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        """What it has written so far, to stdout and stderr."""
        return self.log_file.read_text(errors="replace")


@contextmanager
def running(
    command: Sequence[Any],
    log_file: Path,
    ready: Callable[[], Any],
    environment: Mapping[str, str] | None = None,
    stop_signal: int = signal.SIGTERM,
    seconds: float = 30,
    **options: Any,
) -> Iterator[Running]:
    """Run a server for the time of a block, which begins when `ready()` is true; else fail with its log."""
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
            env={"PATH": os.environ["PATH"], **(environment or {})}, **options,
        )  # fmt: skip
    server = Running(process, log_file)
    try:
        deadline = time.monotonic() + seconds
        while not ready():
            assert process.poll() is None and time.monotonic() < deadline, f"{command[0]} did not start: {server.log}"
            time.sleep(0.05)
        yield server
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        if family:
            process.send_signal(stop_signal)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for member in family:  # what it has left behind, or what did not end
            if member.is_running():
                member.kill()
        process.wait(10)


def has_ended(process: psutil.Process) -> bool:
    """Whether it runs no more. Its entry may stay for a while: an init takes its time to ask for orphans' status."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill_family(pid: int) -> None:
    """kill -9 for a process, which may be our child, and all its descendants at once; returns when they have ended."""
    head = psutil.Process(pid)
    head.suspend()  # it must not start anything more
    family = head.children(recursive=True)
    for member in [*family, head]:
        member.kill()
    head.wait(10)
    deadline = time.monotonic() + 10
    while not all(map(has_ended, family)):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def suspended(*processes: psutil.Process) -> Iterator[None]:
    """SIGSTOP for the time of a block."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            if process.is_running():
                process.resume()


class Cluster:
    """A private PostgreSQL of a given installation, with trust for everyone on the loopback interface."""

    def __init__(self, folder: Path, bindir: Path = DEBIAN_POSTGRES) -> None:
        self.data = folder / "data"
        self.bindir = bindir
        self.log_file = folder / "postgresql.log"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def run(self, program: str, *arguments: Any, **environment: str) -> None:
        """Run one of the installation's programs to its end."""
        command = [str(self.bindir / program), *(str(argument) for argument in arguments)]
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            cwd="/",
            env={"PATH": os.environ["PATH"], **environment},
            **unprivileged(),
        )

    def create(self, **settings: Any) -> "Cluster":
        """Make the data folder and write the settings; `copy_from` takes the place of this for a standby."""
        self.run("initdb", "-D", self.data, "-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        self.configure(**settings)
        return self

    def copy_from(self, primary: "Cluster", **settings: Any) -> "Cluster":
        """Make the data folder a standby's of a cluster that runs."""
        self.run(
            "pg_basebackup",
            "-D",
            self.data,
            "-d",
            f"{primary.url}?application_name=standby",
            "-R",
            "-X",
            "stream",
            "-c",
            "fast",
        )
        self.configure(**settings)
        return self

    def configure(self, **settings: Any) -> None:
        with (self.data / "postgresql.auto.conf").open("a") as file:
            for name, value in {
                "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "port": self.port,
                "dynamic_shared_memory_type": "mmap",  # in its own folder: nothing is left behind when it is killed
                **settings,
            }.items():  # fmt: skip
                file.write(f"{name} = '{value}'\n")

    def start(self) -> "Cluster":
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.bindir / "postgres"), "-D", str(self.data)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd="/",
                env={"PATH": os.environ["PATH"]}, **unprivileged(),
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
                return self
            except psycopg.OperationalError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(self.log_file.read_text(errors="replace")) from error
                time.sleep(0.05)

    def stop(self) -> None:
        """Fast shutdown, if it runs."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)

    def kill(self) -> None:
        """kill -9 for the whole of it at once."""
        assert self.process
        kill_family(self.process.pid)
        self.process.wait(10)
