-- list_executions(job_id, status, after, max_rows, max_bytes): a job's executions in the order of their ids.
-- Only those in that status, if given; only ids above after; at most max_rows, and no further row once the JSON
-- of those before it has reached max_bytes (bytes), so that a caller who pages can bound what a page weighs.
-- Returns  rows of id, as text, and {"id": 1, "job_id": "a", "status": "failed", "output": {...}, "created_at":
--          "2025-09-29T23:48:00.000000Z", "started_at": ..., "completed_at": ...}; none for an unknown job
-- Raises   invalid_parameter_value (22023)  after is none that the type of executions.id can hold
-- Locks    nothing
CREATE OR REPLACE FUNCTION list_executions(
    job_id text, status text DEFAULT NULL, after text DEFAULT NULL, max_rows bigint DEFAULT NULL,
    max_bytes bigint DEFAULT NULL)
RETURNS TABLE (id text, execution json) LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET timezone FROM CURRENT                   -- of columns without a time zone
SET row_security = off                      -- an error rather than executions that are not listed
SET plan_cache_mode = 'force_custom_plan'   -- a plan for any page would read all that is before it
AS $$
DECLARE
    v_format CONSTANT text := 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"';
    v_job_id CONSTANT jobs.id%TYPE := to_job_id(list_executions.job_id);
    v_after  CONSTANT executions.id%TYPE := to_execution_id(list_executions.after);
    v_bytes  bigint := 0::bigint;
BEGIN
    IF v_after IS NULL AND list_executions.after IS NOT NULL THEN
        RAISE invalid_parameter_value USING SCHEMA = 'beacon_stop', MESSAGE = format(
            'after is %L: expected the id of an execution, of type %s', list_executions.after, pg_typeof(v_after));
    END IF;
    FOR id, execution IN
        SELECT e.id::text, json_build_object(
            'id', e.id, 'job_id', list_executions.job_id, 'status', e.status, 'output', e.output,
            'created_at', to_char(e.created_at::timestamptz AT TIME ZONE 'UTC', v_format),
            'started_at', to_char(e.started_at::timestamptz AT TIME ZONE 'UTC', v_format),
            'completed_at', to_char(e.completed_at::timestamptz AT TIME ZONE 'UTC', v_format))
        FROM executions e
        -- Written so that only the index on (job_id, id) gives the order: after a runaway the statistics make the one
        -- on id look better, and for the few executions of another job all would be read.
        WHERE e.job_id >= v_job_id AND e.job_id <= v_job_id
          AND (v_after IS NULL OR (e.job_id, e.id) > (v_job_id, v_after))
          AND (list_executions.status IS NULL OR e.status = list_executions.status)
        ORDER BY e.job_id, e.id
        LIMIT list_executions.max_rows
    LOOP
        RETURN NEXT;
        v_bytes := v_bytes + octet_length(execution::text);
        EXIT WHEN v_bytes >= list_executions.max_bytes;
    END LOOP;
END;
$$;
REVOKE ALL ON FUNCTION list_executions(text, text, text, bigint, bigint) FROM PUBLIC;
COMMENT ON FUNCTION list_executions(text, text, text, bigint, bigint) IS
    'A job''s executions as JSON in id order, of one status, above an id, up to so many rows or bytes. Locks nothing.';
