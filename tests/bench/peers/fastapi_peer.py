"""The emergency stop as a FastAPI team would write it: an asyncpg pool a worker, prepared statements, no reset of connections."""

import hmac
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from typing import Annotated

import asyncpg
from fastapi import FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

LOOK = """
    SELECT status, EXISTS (SELECT FROM executions WHERE job_id = $1 AND status IN ('pending', 'running', 'processing')) AS active
    FROM jobs WHERE id = $1
"""
LOCK_JOB = "SELECT status FROM jobs WHERE id = $1 FOR UPDATE"
STOP_EXECUTIONS = """
    UPDATE executions SET status = 'failed', completed_at = $2,
        output = COALESCE(output, '{}') || '{"error": "Emergency stop by admin", "emergency_stop": true}'
    WHERE job_id = $1 AND status IN ('pending', 'running', 'processing')
"""
STOP_JOB = "UPDATE jobs SET status = 'failed', updated_at = $2, metadata = COALESCE(metadata, '{}') || $3 WHERE id = $1"
AUDIT = "INSERT INTO emergency_stops (job_id, previous_status, executions_stopped, reason, stopped_at) VALUES ($1, $2, $3, $4, $5)"
NOTIFY = "SELECT pg_notify('emergency_stop', $1)"

TERMINAL = ("completed", "failed", "cancelled")
TOKEN = os.environ["ADMIN_TOKEN"].encode()


class StopRequest(BaseModel):
    reason: Annotated[str | None, Field(max_length=1000)] = None


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async def no_reset(connection: asyncpg.Connection) -> None:
        """Nothing here changes a session's state, so that a round trip to undo it would be wasted."""

    async with asyncpg.create_pool(
        os.environ["DATABASE_URL"], min_size=int(os.environ["POOL"]), max_size=int(os.environ["POOL"]), reset=no_reset
    ) as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)


@app.post("/admin/jobs/{job_id}/emergency-stop")
async def emergency_stop(
    job_id: str, request: Request, body: StopRequest | None = None, x_admin_token: Annotated[str, Header()] = ""
) -> Response:
    started = time.monotonic()
    if hmac.compare_digest(x_admin_token.encode(), TOKEN):
        status, answer = await stop(request.app.state.pool, job_id, body.reason if body else None)
    else:
        status, answer = 403, {"error": "forbidden"}
    line = {
        "time": datetime.now(timezone.utc).isoformat(), "event": "emergency_stop", "client": request.client.host, "job_id": job_id,
        "executions_stopped": answer.get("executions_stopped"), "status": status,
        "duration_ms": round((time.monotonic() - started) * 1000, 3),
    }  # fmt: skip
    sys.stderr.write(json.dumps(line) + "\n")
    return JSONResponse(answer, status)


async def stop(pool: asyncpg.Pool, job_id: str, reason: str | None) -> tuple[int, dict]:
    done = {"ok": True, "message": "Job already in terminal state", "job_id": job_id}
    given = {"reason": reason} if reason else {}
    async with pool.acquire() as connection:
        # A round trip more for a stop, several less for a job that has ended: as fast there and much faster here, as measured.
        look = await connection.fetchrow(LOOK, job_id)
        if not look:
            return 404, {"error": "job not found", "job_id": job_id}
        if look["status"] in TERMINAL and not look["active"]:
            return 200, {**done, "status": look["status"], "action": "none"}
        transaction = connection.transaction()
        await transaction.start()
        try:
            previous = await connection.fetchval(LOCK_JOB, job_id)
            now = datetime.now(timezone.utc)
            stopped_at = now.strftime("%Y-%m-%dT%H:%M:%SZ")
            count = int((await connection.execute(STOP_EXECUTIONS, job_id, now)).removeprefix("UPDATE "))
            if previous in TERMINAL and not count:  # another stop was here meanwhile
                await transaction.rollback()
                return 200, {**done, "status": previous, "action": "none"}
            if previous not in TERMINAL:
                mark = {"emergency_stop": True, "stopped_at": stopped_at, "stopped_by": "admin", **given}
                await connection.execute(STOP_JOB, job_id, now, json.dumps(mark))
            await connection.execute(AUDIT, job_id, previous, count, reason, now)
            payload = {"job_id": job_id, "stopped_at": stopped_at, "executions_stopped": count}
            await connection.execute(NOTIFY, json.dumps(payload))
        except BaseException:
            await transaction.rollback()
            raise
        await transaction.commit()
    summary = {"executions_stopped": count, "stopped_at": stopped_at, **given}
    if previous in TERMINAL:
        return 200, {**done, "status": previous, "action": "executions_stopped", **summary}
    return 200, {
        "ok": True, "message": "Job emergency stopped", "job_id": job_id, "previous_status": previous, "new_status": "failed", **summary,
    }  # fmt: skip
