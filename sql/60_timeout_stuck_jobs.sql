-- timeout_stuck_jobs(threshold, max_jobs): fails the jobs that have come to a standstill, those at it longest first.
-- A job is stuck when it has not ended and neither it nor any of its executions was added, started, completed or
-- updated for the threshold. It becomes failed with its active executions; it gets no emergency_stop mark.
-- Of a job, or an active execution, without any time nobody knows that: it is not stuck.
-- Returns  {"ok": true, "message": "Stuck jobs timeout completed", "timed_out_count": 1, "timeout_threshold_minutes": 15,
--           "timed_out_jobs": [{"job_id": "a", "previous_status": "processing", "executions_stopped": 3}], "more": false}
--          "more" tells that some are left: beyond max_jobs (0 to 1,000), after 5 seconds, or locked
-- Raises   invalid_parameter_value (22023)    threshold is not between 0 and 525,600 minutes, max_jobs not between 0 and 1,000
--          invalid_transaction_state (25000)  the transaction is REPEATABLE READ or SERIALIZABLE
--          lock_not_available (55P03)         a whole table was locked for longer than lock_timeout
-- Locks    for each job its barrier, alone, then its active executions, then its row, FOR NO KEY UPDATE, until the
--          transaction ends. A job that others hold for longer than 1 ms (100 ms while none is locked) is left for the
--          next call.

-- job_has_progressed(id, since): whether an execution of the job was added, started or completed after that, or may have been.
-- Returns  true or false
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION job_has_progressed(id text, since timestamptz)
RETURNS boolean LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    -- The latest first: of a job with a long history that goes on, few are looked at. Written so that only the index on
    -- (job_id, id) gives the order: after a runaway the statistics make the one on id look better, and all is read.
    PERFORM FROM executions e
    WHERE e.job_id >= job_has_progressed.id AND e.job_id <= job_has_progressed.id
      AND COALESCE(greatest(e.created_at, e.started_at, e.completed_at) > since, e.status IN ('pending', 'running', 'processing'))
    ORDER BY e.job_id DESC, e.id DESC
    LIMIT 1;
    RETURN FOUND;
END;
$$;
REVOKE ALL ON FUNCTION job_has_progressed(text, timestamptz) FROM PUBLIC;
COMMENT ON FUNCTION job_has_progressed(text, timestamptz) IS
    'Whether an execution of this job was added, started or completed since, or may have been. Locks nothing.';

CREATE OR REPLACE FUNCTION timeout_stuck_jobs(threshold interval DEFAULT '15 minutes', max_jobs int DEFAULT 100)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET timezone FROM CURRENT  -- for columns of type timestamp
AS $$
DECLARE
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_now          CONSTANT timestamptz := clock_timestamp();
    v_candidates   CURSOR (before timestamptz) FOR  -- planned for its first rows, so that a long backlog is not sorted
        SELECT j.id
        FROM jobs j
        WHERE (j.status IN ('completed', 'failed', 'cancelled')) IS NOT TRUE
          AND COALESCE(j.updated_at, '-infinity') <= before AND greatest(j.created_at, j.updated_at) <= before
        ORDER BY COALESCE(j.updated_at, '-infinity'), j.id;
    v_before       timestamptz;
    v_status       text;
    v_stopped      bigint;
    v_jobs         json[] := '{}'::json[];
    v_more         boolean := false;
BEGIN
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        RAISE invalid_transaction_state
            USING MESSAGE = format('timeout_stuck_jobs cannot run in a %s transaction', upper(current_setting('transaction_isolation'))),
                  DETAIL = 'Its snapshot would not show executions that others have added since.',
                  HINT = 'Call it in a READ COMMITTED transaction.';
    END IF;
    IF (threshold > '0' AND extract(epoch FROM threshold) <= 525600 * 60) IS NOT TRUE THEN
        RAISE invalid_parameter_value
            USING MESSAGE = format('threshold is %s: expected more than 0, at most 525600 minutes', COALESCE(threshold::text, 'null'));
    END IF;
    IF (max_jobs BETWEEN 0 AND 1000) IS NOT TRUE THEN
        RAISE invalid_parameter_value
            USING MESSAGE = format('max_jobs is %s: expected 0 to 1000', COALESCE(max_jobs::text, 'null'));
    END IF;
    v_before := v_now - threshold;

    PERFORM pg_advisory_xact_lock_shared(hashtext('beacon-stop batch'));  -- by which emergency_stop_blockers knows a batch
    FOR v_job IN v_candidates(v_before) LOOP
        CONTINUE WHEN job_has_progressed(v_job.id, v_before);
        IF cardinality(v_jobs) >= max_jobs OR clock_timestamp() > v_now + '5s'::interval THEN
            v_more := true;
            EXIT;
        END IF;
        BEGIN
            -- While nothing is locked yet, we can afford to queue for a moment, so that a flood of short transactions, of
            -- which one or another always holds the job, does not keep it from being timed out for ever.
            PERFORM set_config('lock_timeout', CASE WHEN cardinality(v_jobs) = 0 AND clock_timestamp() < v_now + '1s'::interval
                                                    THEN '100ms' ELSE '1ms' END, true);
            PERFORM pg_advisory_xact_lock(hashtextextended(v_job.id, 'jobs'::regclass::oid::bigint));
            PERFORM FROM executions e
            WHERE e.job_id = v_job.id AND e.status IN ('pending', 'running', 'processing')
            FOR NO KEY UPDATE;
            SELECT j.status INTO v_status
            FROM jobs j
            WHERE j.id = v_job.id
              AND (j.status IN ('completed', 'failed', 'cancelled')) IS NOT TRUE AND greatest(j.created_at, j.updated_at) <= v_before
            FOR NO KEY UPDATE;
            -- Now that nobody else can change any of it:
            IF NOT FOUND OR job_has_progressed(v_job.id, v_before) THEN
                RAISE SQLSTATE 'BS001';
            END IF;
            UPDATE executions e
            SET status = 'failed',
                completed_at = v_now,
                output = CASE WHEN jsonb_typeof(e.output) = 'object' THEN e.output
                              WHEN e.output <> 'null' THEN jsonb_build_object('previous_output', e.output)
                              ELSE '{}'
                         END || '{"error": "Job timed out"}'
            WHERE e.job_id = v_job.id AND e.status IN ('pending', 'running', 'processing');
            GET DIAGNOSTICS v_stopped = ROW_COUNT;
            UPDATE jobs j
            SET status = 'failed',
                updated_at = v_now,
                metadata = CASE WHEN jsonb_typeof(j.metadata) = 'object' THEN j.metadata
                                WHEN j.metadata <> 'null' THEN jsonb_build_object('previous_metadata', j.metadata)
                                ELSE '{}'
                           END || jsonb_build_object('timed_out', true,
                                                     'timed_out_at', to_char(v_now AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'))
            WHERE j.id = v_job.id;
        EXCEPTION
            WHEN lock_not_available OR deadlock_detected THEN  -- somebody is at work on it
                v_more := true;
                CONTINUE;
            WHEN SQLSTATE 'BS001' THEN  -- it has got on, ended or gone: whatever was locked is let go of
                CONTINUE;
        END;
        v_jobs := v_jobs || json_build_object('job_id', v_job.id, 'previous_status', COALESCE(v_status, 'unknown'),
                                              'executions_stopped', v_stopped);
    END LOOP;
    PERFORM set_config('lock_timeout', v_lock_timeout, true);

    IF cardinality(v_jobs) > 0 AND current_setting('synchronous_commit') IN ('off', 'local') THEN  -- acknowledged means flushed
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
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
    'Fails jobs, with their active executions, that have not progressed for the threshold; up to max_jobs, the oldest first; '
    'returns the JSON summary. Raises 25000 above READ COMMITTED, 22023 for arguments out of range. '
    'Locks each job''s barrier, active executions and row until the transaction ends, leaving out jobs that others hold.';
