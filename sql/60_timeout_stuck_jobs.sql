-- timeout_stuck_jobs(threshold, max_jobs): fails the jobs that have come to a standstill, those at it longest first.
-- A job is stuck when it is created, pending or processing, and neither it nor any of its executions was added,
-- started, completed or updated for the threshold, nor the job released. It becomes failed with its active executions;
-- it gets no emergency_stop mark. A job in any other state, or without any time, is left alone: it may have ended.
-- Returns  {"ok": true, "message": "Stuck jobs timeout completed", "timed_out_count": 1,
--           "timeout_threshold_minutes": 15, "more": false,
--           "timed_out_jobs": [{"job_id": "a", "previous_status": "processing", "executions_stopped": 3}]}
--          "more": some are left: beyond max_jobs, after 5 seconds, locked, or refused by a trigger or constraint of
--          the application's, of which a WARNING says more
-- Raises   22023 for a threshold over 525,600 minutes or max_jobs over 1,000, 25000 above READ COMMITTED, 25006 in a
--          read-only transaction, 55P03 where a whole table was locked for longer than lock_timeout
-- Locks    for each job its barrier, alone and shared, its active executions and its row, FOR NO KEY UPDATE, until the
--          transaction ends. A job that others hold for longer than 1 ms (100 ms while none is locked) is left.

-- job_has_progressed(id, since): whether an execution of the job was added, started or completed after that, or may
-- have been, or the job stopped or released. A release counts by its record: a worker may write back an old updated_at.
CREATE OR REPLACE FUNCTION job_has_progressed(id text, since timestamptz)
RETURNS boolean LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id CONSTANT jobs.id%TYPE := to_job_id(job_has_progressed.id);
BEGIN
    -- The latest first: of a job that goes on, few are looked at. Only the index on (job_id, id) gives this order.
    PERFORM FROM executions e
    WHERE e.job_id >= v_id AND e.job_id <= v_id
      AND COALESCE(greatest(e.created_at, e.started_at, e.completed_at) > job_has_progressed.since,
                   e.status IN ('pending', 'running', 'processing'))
    ORDER BY e.job_id DESC, e.id DESC
    LIMIT 1;
    RETURN FOUND OR EXISTS (
        SELECT FROM emergency_stops s
        WHERE s.job_id = job_has_progressed.id AND s.stopped_at > job_has_progressed.since);
END;
$$;

-- time_out_job(id, since, at): fails one job with its active executions. Raises BS001 if it is not stuck any more: the
-- caller then lets go of what was locked; and what fail_job raises.
CREATE OR REPLACE FUNCTION time_out_job(id text, since timestamptz, at timestamptz)
RETURNS json LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id      CONSTANT jobs.id%TYPE := to_job_id(time_out_job.id);
    v_status  text;
    v_stopped bigint;
BEGIN
    -- Alone, so that no execution starts; and shared, by which a stop knows that we hold the job until we commit.
    PERFORM pg_advisory_xact_lock(job_barrier(id)), pg_advisory_xact_lock_shared(job_barrier(id));
    PERFORM FROM executions e
    WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing') FOR NO KEY UPDATE;
    SELECT j.status INTO v_status
    FROM jobs j
    WHERE j.id = v_id AND j.status IN ('created', 'pending', 'processing')
      AND greatest(j.created_at, j.updated_at) <= time_out_job.since FOR NO KEY UPDATE;
    IF NOT FOUND OR job_has_progressed(time_out_job.id, since) THEN
        RAISE SQLSTATE 'BS001';
    END IF;

    SELECT f.executions_stopped INTO v_stopped
    FROM fail_job(time_out_job.id, 'failed',
                  jsonb_build_object('timed_out', true, 'timed_out_at', utc_seconds(time_out_job.at)),
                  '{"error": "Job timed out"}', time_out_job.at) f;
    RETURN json_build_object('job_id', time_out_job.id, 'previous_status', v_status, 'executions_stopped', v_stopped);
END;
$$;

CREATE OR REPLACE FUNCTION timeout_stuck_jobs(threshold interval DEFAULT '15 minutes', max_jobs int DEFAULT 100)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET timezone FROM CURRENT  -- for columns of type timestamp
SET row_security = off     -- an error where rows would be hidden from us
AS $$
DECLARE
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_now          CONSTANT timestamptz := clock_timestamp();
    v_before       timestamptz;
    v_jobs         json[] := '{}'::json[];
    v_more         boolean := false;
    v_stuck        CURSOR FOR  -- planned for its first rows, so that a long backlog is not sorted
        SELECT j.id::text AS id
        FROM jobs j
        WHERE j.status IN ('created', 'pending', 'processing') AND greatest(j.created_at, j.updated_at) <= v_before
          AND COALESCE(j.updated_at, '-infinity') <= v_before AND NOT job_has_progressed(j.id::text, v_before)
        ORDER BY COALESCE(j.updated_at, '-infinity'), j.id;
BEGIN
    PERFORM require_read_committed('timeout_stuck_jobs');
    IF (threshold > '0' AND extract(epoch FROM threshold) <= 525600 * 60 AND max_jobs BETWEEN 0 AND 1000) IS NOT TRUE
    THEN
        RAISE invalid_parameter_value USING MESSAGE = format(
            'threshold is %L: expected more than 0, at most 525600 minutes; max_jobs is %L: expected 0 to 1000',
            threshold, max_jobs);
    END IF;
    v_before := v_now - threshold;
    FOR v_job IN v_stuck LOOP
        IF cardinality(v_jobs) >= max_jobs OR clock_timestamp() > v_now + interval '5 s' THEN
            v_more := true;
            EXIT;
        END IF;
        BEGIN
            -- While nothing is locked yet, we can afford to queue for a moment. A flood of short transactions, of which
            -- one or another always holds the job, would otherwise keep it from being timed out for ever.
            PERFORM set_config('lock_timeout', CASE
                WHEN v_jobs[1] IS NULL AND clock_timestamp() - v_now < '1 s' THEN '100ms' ELSE '1ms' END, true);
            v_jobs := v_jobs || time_out_job(v_job.id, v_before, v_now);
        EXCEPTION
            WHEN SQLSTATE 'BS001' THEN
            WHEN lock_not_available OR deadlock_detected OR triggered_data_change_violation THEN
                v_more := true;
            WHEN plpgsql_error OR integrity_constraint_violation OR data_exception
                 OR syntax_error_or_access_rule_violation OR object_not_in_prerequisite_state
                 OR serialization_failure THEN
                v_more := true;
                RAISE WARNING 'job % is not timed out: %', quote_literal(v_job.id), SQLERRM;
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', v_lock_timeout, true);
    PERFORM commit_durably() WHERE cardinality(v_jobs) > 0;
    INSERT INTO batch_changes (operation, job_id, previous_status, executions_stopped, changed_at)
    SELECT 'timeout_stuck_jobs', b ->> 'job_id', b ->> 'previous_status', (b ->> 'executions_stopped')::bigint, v_now
    FROM unnest(v_jobs) AS b;
    RETURN json_build_object(
        'ok', true, 'message', 'Stuck jobs timeout completed', 'timed_out_count', cardinality(v_jobs),
        'timeout_threshold_minutes', trim_scale(round(extract(epoch FROM threshold)::numeric / 60, 3)),
        'timed_out_jobs', array_to_json(v_jobs), 'more', v_more);
END;
$$;
REVOKE ALL ON FUNCTION timeout_stuck_jobs(interval, int) FROM PUBLIC;
COMMENT ON FUNCTION timeout_stuck_jobs(interval, int) IS
    'Fails the jobs that have made no progress for the threshold, with their active executions; returns JSON.';
