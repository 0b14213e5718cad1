-- emergency_stop_status(id): what a stop of this job would meet now, what stops and releases have done to it, and which
-- of the executions that the last stop failed a worker has confirmed to have dropped.
-- Returns  {"job_id": "a", "status": "failed", "stopped": true,
--           "active": {"pending": 0, "running": 0, "processing": 0}, "blocked_by": [rows of emergency_stop_blockers],
--           "confirmation": {"in_hand": 21, "confirmed": 19,
--                            "outstanding": [{"id": 7, "started_at": "2025-09-29T23:47:00Z"}, ...]},
--           "history": [{"action": "stop", "at": "2025-09-29T23:48:00Z", "previous_status": "processing",
--                        "new_status": "failed", "executions_stopped": 42, "sessions_ended": 0, "reason": null,
--                        "actor": "ann", "client": "192.0.2.1", "request_id": "r1", "database_user": "beacon"}]}
--          After "active" it has "left_alone": {"queued": 10} if there are executions in states of the application's
--          own. "confirmation" is null if no stop is on record. "outstanding" has 20 executions at most, in the order
--          of their ids; "history" the 20 last records, newest first.
--          {"error": "job not found", "job_id": "a"}
-- Raises   read_only_sql_transaction (25006)  the transaction is read-only, and others hold rows of the job
--          lock_not_available (55P03)         others hold a whole table; DETAIL has them, as a JSON array
-- Locks    what emergency_stop_blockers locks: nothing that outlives the call. It waits for 1 s at most
--          for each table that is locked

-- is_emergency_stopped(id, status, metadata): whether this job has ended and a stop was the last that was done to it.
CREATE OR REPLACE FUNCTION is_emergency_stopped(id text, status text, metadata jsonb)
RETURNS boolean LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT COALESCE(status IN ('completed', 'failed', 'cancelled')
                    AND (metadata @> '{"emergency_stop": true}' OR last_record(id) = 'stop'), false);
$$;

CREATE OR REPLACE FUNCTION emergency_stop_status(id text)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET timezone FROM CURRENT
SET row_security = off
SET lock_timeout = '1s'
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
AS $$
DECLARE
    v_id           CONSTANT jobs.id%TYPE := to_job_id(emergency_stop_status.id);
    v_key          CONSTANT text := v_id::text;  -- the id as it is in the tables
    v_counts       jsonb;
    v_job          record;
    v_executions   bigint;  -- of the last stop
    v_history      json;
    v_confirmation json;
    -- In the type of the column, so that they are rounded as the column's values are.
    v_previous     executions.completed_at%TYPE;
    v_stopped_at   executions.completed_at%TYPE;
BEGIN
    v_counts := unfinished_executions(v_key);
    SELECT j.status, j.metadata INTO v_job FROM jobs j WHERE j.id = v_id;
    IF NOT FOUND THEN
        RETURN json_build_object('error', 'job not found', 'job_id', emergency_stop_status.id);
    END IF;
    SELECT json_agg(json_build_object(
        'action', s.action, 'at', utc_seconds(s.stopped_at), 'previous_status', s.previous_status,
        'new_status', s.new_status, 'executions_stopped', s.executions_stopped, 'sessions_ended', s.sessions_ended,
        'reason', s.reason, 'actor', s.caller -> 'actor', 'client', s.caller -> 'client',
        'request_id', s.caller -> 'request_id', 'database_user', s.database_user) ORDER BY s.id DESC)
    INTO v_history
    FROM (SELECT * FROM emergency_stops r WHERE r.job_id = v_key ORDER BY r.id DESC LIMIT 20) s;

    SELECT s.executions_stopped, s.stopped_at, lead(s.stopped_at, 1, '-infinity') OVER w
    INTO v_executions, v_stopped_at, v_previous
    FROM emergency_stops s WHERE s.job_id = v_key AND s.action = 'stop'
    WINDOW w AS (ORDER BY s.id DESC)
    ORDER BY s.id DESC LIMIT 1;
    IF FOUND THEN
        -- The latest first, and no more than the stop has failed: of a job with a long history few executions are
        -- looked at. Only the index on (job_id, id) gives this order, and this function's settings make the planner use
        -- it. A trigger of the application's may have set completed_at to the start of the stop's transaction, so each
        -- execution counts that was completed after the previous stop.
        WITH failed AS MATERIALIZED (
            SELECT e.id, e.started_at, e.output ? 'confirmed_at' AS is_confirmed
            FROM executions e
            WHERE e.job_id >= v_id AND e.job_id <= v_id AND e.status = 'failed'
              AND e.output @> '{"emergency_stop": true}'
              AND (e.completed_at > v_previous OR e.completed_at >= v_stopped_at)
            ORDER BY e.job_id DESC, e.id DESC
            LIMIT v_executions
        ), begun AS (
            SELECT * FROM failed f WHERE f.started_at IS NOT NULL
        )
        SELECT json_build_object(
            'in_hand', count(*), 'confirmed', count(*) FILTER (WHERE f.is_confirmed), 'outstanding', (
                SELECT COALESCE(json_agg(json_build_object('id', o.id, 'started_at', utc_seconds(o.started_at))), '[]')
                FROM (SELECT * FROM begun b WHERE NOT b.is_confirmed ORDER BY b.id LIMIT 20) o))
        INTO v_confirmation
        FROM begun f;
    END IF;

    RETURN (
        SELECT json_object_agg(a.key, a.value)
        FROM json_each(json_build_object(
            'job_id', emergency_stop_status.id, 'status', v_job.status,
            'stopped', is_emergency_stopped(v_key, v_job.status, v_job.metadata),
            'active', (SELECT json_object_agg(s.status, COALESCE(v_counts -> s.status, '0'))
                       FROM unnest('{pending,running,processing}'::text[]) AS s (status)),
            'left_alone', NULLIF(v_counts - '{pending,running,processing}'::text[], '{}'),
            'blocked_by', (SELECT COALESCE(json_agg(b), '[]') FROM emergency_stop_blockers(emergency_stop_status.id) b),
            'confirmation', v_confirmation, 'history', COALESCE(v_history, '[]'))) a
        WHERE a.key <> 'left_alone' OR a.value::text <> 'null');
EXCEPTION WHEN lock_not_available THEN
    RAISE lock_not_available
        USING MESSAGE = format('job %L is locked', emergency_stop_status.id),
              DETAIL = (SELECT COALESCE(json_agg(b), '[]') FROM emergency_stop_blockers(emergency_stop_status.id) b),
              HINT = 'A whole table is locked, so that the job cannot be looked at. A stop with force would end those '
                     'who lock it.';
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_status(text) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_status(text) IS
    'What a stop of this job would meet now, what stops have done, and what workers have confirmed, as JSON; '
    '{error, job_id} for an unknown job. Locks nothing that outlives the call.';
