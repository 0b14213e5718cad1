"""The emergency stop as a Flask team would write it: SQLAlchemy Core, a pool a worker, behind gunicorn's threads.

DRIVER is psycopg2, which prepares nothing, or psycopg, SQLAlchemy's own choice, which prepares what it has seen five times."""

import hmac
import json
import os
import sys
import time
from datetime import datetime, timezone

from flask import Flask, Response, jsonify, request
from sqlalchemy import create_engine, text

LOCK_JOB = text("SELECT status FROM jobs WHERE id = :id FOR UPDATE")
STOP_EXECUTIONS = text("""
    UPDATE executions SET status = 'failed', completed_at = :now,
        output = COALESCE(output, '{}') || '{"error": "Emergency stop by admin", "emergency_stop": true}'
    WHERE job_id = :id AND status IN ('pending', 'running', 'processing')
""")
STOP_JOB = text(
    "UPDATE jobs SET status = 'failed', updated_at = :now, metadata = COALESCE(metadata, '{}') || CAST(:mark AS jsonb) WHERE id = :id"
)
AUDIT = text("""
    INSERT INTO emergency_stops (job_id, previous_status, executions_stopped, reason, stopped_at)
    VALUES (:id, :previous, :count, :reason, :now)
""")
NOTIFY = text("SELECT pg_notify('emergency_stop', :payload)")

TOKEN = os.environ["ADMIN_TOKEN"].encode()

app = Flask(__name__)
app.json.sort_keys = False
url = os.environ["DATABASE_URL"].replace("postgresql:", f"postgresql+{os.environ['DRIVER']}:")
engine = create_engine(url, pool_size=int(os.environ["POOL"]), max_overflow=0)


@app.post("/admin/jobs/<job_id>/emergency-stop")
def emergency_stop(job_id: str) -> tuple[Response, int]:
    started = time.monotonic()
    if hmac.compare_digest(request.headers.get("X-Admin-Token", "").encode(), TOKEN):
        body = request.get_json(force=True) if request.content_length else {}
        status, answer = stop(job_id, body.get("reason"))
    else:
        status, answer = 403, {"error": "forbidden"}
    line = {
        "time": datetime.now(timezone.utc).isoformat(), "event": "emergency_stop", "client": request.remote_addr, "job_id": job_id,
        "executions_stopped": answer.get("executions_stopped"), "status": status,
        "duration_ms": round((time.monotonic() - started) * 1000, 3),
    }  # fmt: skip
    sys.stderr.write(json.dumps(line) + "\n")
    return jsonify(answer), status


def stop(job_id: str, reason: str | None) -> tuple[int, dict]:
    with engine.connect() as connection:
        previous = connection.scalar(LOCK_JOB, {"id": job_id})
        if previous is None:
            return 404, {"error": "job not found", "job_id": job_id}
        if previous in ("completed", "failed", "cancelled"):
            return 200, {
                "ok": True, "message": "Job already in terminal state", "job_id": job_id, "status": previous, "action": "none",
            }  # fmt: skip
        now = datetime.now(timezone.utc)
        stopped_at = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        given = {"reason": reason} if reason else {}
        count = connection.execute(STOP_EXECUTIONS, {"id": job_id, "now": now}).rowcount
        mark = {"emergency_stop": True, "stopped_at": stopped_at, "stopped_by": "admin", **given}
        connection.execute(STOP_JOB, {"id": job_id, "now": now, "mark": json.dumps(mark)})
        connection.execute(AUDIT, {"id": job_id, "previous": previous, "count": count, "reason": reason, "now": now})
        payload = {"job_id": job_id, "stopped_at": stopped_at, "executions_stopped": count}
        connection.execute(NOTIFY, {"payload": json.dumps(payload)})
        connection.commit()
    return 200, {
        "ok": True, "message": "Job emergency stopped", "job_id": job_id, "previous_status": previous, "new_status": "failed",
        "executions_stopped": count, "stopped_at": stopped_at, **given,
    }  # fmt: skip
