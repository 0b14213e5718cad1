-- get_job(id): one job as it is now.
-- Returns  {"job": {"id": "a", "status": "failed", "metadata": {...}, "created_at": "2025-09-29T23:48:00.000000Z",
--           "updated_at": ...}, "status": "failed"}, or {"error": "job not found", "job_id": "a"}; id as it was given
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION get_job(id text)
RETURNS json LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET timezone FROM CURRENT  -- of columns without a time zone
SET row_security = off     -- an error rather than a job that is not found
AS $$
DECLARE
    v_format CONSTANT text := 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"';
BEGIN
    RETURN COALESCE((
        SELECT json_build_object(
            'job', json_build_object(
                'id', get_job.id, 'status', j.status, 'metadata', j.metadata,
                'created_at', to_char(j.created_at::timestamptz AT TIME ZONE 'UTC', v_format),
                'updated_at', to_char(j.updated_at::timestamptz AT TIME ZONE 'UTC', v_format)),
            'status', j.status)
        FROM jobs j
        WHERE j.id = to_job_id(get_job.id)), json_build_object('error', 'job not found', 'job_id', get_job.id));
END;
$$;
REVOKE ALL ON FUNCTION get_job(text) FROM PUBLIC;
COMMENT ON FUNCTION get_job(text) IS 'One job as JSON: {job, status}, or {error, job_id}. Locks nothing.';
