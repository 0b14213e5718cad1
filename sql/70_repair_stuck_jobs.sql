-- repair_stuck_jobs(max_age, max_jobs): republishes the jobs that failed within max_age, those that failed first first.
-- Their status goes back to pending; their executions stay as they are. Never one with the emergency_stop mark, and
-- none more than three times.
-- Returns  {"ok": true, "message": "Failed jobs republished", "republished_count": 1,
--           "republished_jobs": [{"job_id": "a", "previous_status": "failed", "attempt": 1}],
--           "skipped": {"emergency_stopped": 2, "attempts_exhausted": 1}, "more": false}
--          "more" tells that some are left: beyond max_jobs (0 to 1,000), or locked
-- Raises   invalid_parameter_value (22023)    max_age is not between 0 and 8,760 hours, max_jobs not between 0 and 1,000
--          invalid_transaction_state (25000)  the transaction is REPEATABLE READ or SERIALIZABLE
--          lock_not_available (55P03)         a whole table was locked for longer than lock_timeout
-- Locks    for each job its row, FOR NO KEY UPDATE, and its barrier, alone, until the transaction ends. It waits for
--          neither: a job that others hold is left for the next call.

-- republications(id): how often a job was republished, as far as it matters.
-- Returns  0 to 3, where 3 means 3 or more
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION republications(id text)
RETURNS int LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    -- By the record, since a worker may write metadata of its own; and by the metadata, since the record may be purged.
    RETURN least(3, greatest(0,
        CASE WHEN jsonb_typeof(j.metadata -> 'republish_count') = 'number' THEN (j.metadata ->> 'republish_count')::numeric END,
        (SELECT max(b.attempt) FROM batch_changes b WHERE b.job_id = j.id AND b.operation = 'repair_stuck_jobs')))::int
    FROM jobs j
    WHERE j.id = republications.id;
END;
$$;
REVOKE ALL ON FUNCTION republications(text) FROM PUBLIC;
COMMENT ON FUNCTION republications(text) IS 'How often repair_stuck_jobs has republished this job: 0 to 3, where 3 means 3 or more. Locks nothing.';

CREATE OR REPLACE FUNCTION repair_stuck_jobs(max_age interval DEFAULT '24 hours', max_jobs int DEFAULT 100)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET timezone FROM CURRENT  -- for columns of type timestamp
AS $$
DECLARE
    v_now         CONSTANT timestamptz := clock_timestamp();
    v_republished CONSTANT text := to_char(v_now AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');
    v_ids         text[];
    v_id          text;
    v_notice      text;
    v_attempt     int;
    v_jobs        json[] := '{}'::json[];
    v_stopped     bigint;
    v_exhausted   bigint;
    v_more        boolean := false;
BEGIN
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        RAISE invalid_transaction_state
            USING MESSAGE = format('repair_stuck_jobs cannot run in a %s transaction', upper(current_setting('transaction_isolation'))),
                  DETAIL = 'Its snapshot would not show what others have done to the jobs since.',
                  HINT = 'Call it in a READ COMMITTED transaction.';
    END IF;
    IF (max_age > '0' AND extract(epoch FROM max_age) <= 8760 * 3600) IS NOT TRUE THEN
        RAISE invalid_parameter_value
            USING MESSAGE = format('max_age is %s: expected more than 0, at most 8760 hours', COALESCE(max_age::text, 'null'));
    END IF;
    IF (max_jobs BETWEEN 0 AND 1000) IS NOT TRUE THEN
        RAISE invalid_parameter_value
            USING MESSAGE = format('max_jobs is %s: expected 0 to 1000', COALESCE(max_jobs::text, 'null'));
    END IF;

    PERFORM pg_advisory_xact_lock_shared(hashtext('beacon-stop batch'));  -- by which emergency_stop_blockers knows a batch
    -- All of them are counted before the first one is locked: with many that takes its time.
    SELECT count(*) FILTER (WHERE f.emergency_stopped), count(*) FILTER (WHERE f.attempts >= 3),
           array_agg(f.id ORDER BY f.updated_at, f.id) FILTER (WHERE f.attempts < 3)
    INTO v_stopped, v_exhausted, v_ids
    FROM (SELECT j.id, j.updated_at, s.emergency_stopped, CASE WHEN NOT s.emergency_stopped THEN republications(j.id) END AS attempts
          FROM jobs j
          CROSS JOIN LATERAL (SELECT COALESCE(j.metadata @> '{"emergency_stop": true}', false) AS emergency_stopped) s
          WHERE j.status = 'failed' AND j.updated_at >= v_now - max_age) f;
    FOREACH v_id IN ARRAY COALESCE(v_ids, '{}') LOOP
        IF cardinality(v_jobs) >= max_jobs THEN
            v_more := true;
            EXIT;
        END IF;
        PERFORM FROM jobs j
        WHERE j.id = v_id AND j.status = 'failed' AND (j.metadata @> '{"emergency_stop": true}') IS NOT TRUE
        FOR NO KEY UPDATE SKIP LOCKED;
        -- Alone at the barrier, so that an emergency stop which comes now does not take the job for ended.
        IF NOT FOUND OR NOT pg_try_advisory_xact_lock(hashtextextended(v_id, 'jobs'::regclass::oid::bigint)) THEN
            v_more := v_more OR EXISTS (SELECT FROM jobs j WHERE j.id = v_id AND j.status = 'failed');
            CONTINUE;
        END IF;
        v_attempt := republications(v_id) + 1;  -- now that nobody else adds one
        CONTINUE WHEN v_attempt > 3;
        UPDATE jobs j
        SET status = 'pending',
            updated_at = v_now,
            metadata = CASE WHEN jsonb_typeof(j.metadata) = 'object' THEN j.metadata
                            WHEN j.metadata <> 'null' THEN jsonb_build_object('previous_metadata', j.metadata)
                            ELSE '{}'
                       END || jsonb_build_object('republish_count', v_attempt, 'republished_at', v_republished)
        WHERE j.id = v_id;
        v_notice := json_build_object('job_id', v_id, 'republished_at', v_republished, 'attempt', v_attempt)::text;
        IF octet_length(v_notice) < 8000 THEN  -- else NOTIFY refuses it
            PERFORM pg_notify('job_republished', v_notice);
        END IF;
        v_jobs := v_jobs || json_build_object('job_id', v_id, 'previous_status', 'failed', 'attempt', v_attempt);
    END LOOP;

    IF cardinality(v_jobs) > 0 AND current_setting('synchronous_commit') IN ('off', 'local') THEN  -- acknowledged means flushed
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    INSERT INTO batch_changes (operation, job_id, previous_status, attempt, changed_at)
    SELECT 'repair_stuck_jobs', b ->> 'job_id', b ->> 'previous_status', (b ->> 'attempt')::int, v_now
    FROM unnest(v_jobs) AS b;
    RETURN json_build_object(
        'ok', true, 'message', 'Failed jobs republished', 'republished_count', cardinality(v_jobs),
        'republished_jobs', array_to_json(v_jobs),
        'skipped', json_build_object('emergency_stopped', v_stopped, 'attempts_exhausted', v_exhausted), 'more', v_more);
END;
$$;
REVOKE ALL ON FUNCTION repair_stuck_jobs(interval, int) FROM PUBLIC;
COMMENT ON FUNCTION repair_stuck_jobs(interval, int) IS
    'Sets jobs that failed within max_age back to pending, up to max_jobs, three times each at most, never an emergency-stopped one; '
    'returns the JSON summary. Raises 25000 above READ COMMITTED, 22023 for arguments out of range. '
    'Locks each job''s barrier and row until the transaction ends, leaving out jobs that others hold.';
