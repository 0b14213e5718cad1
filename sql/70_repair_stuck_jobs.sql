-- repair_stuck_jobs(max_age, max_jobs): republishes the jobs that failed within max_age, those that failed first first.
-- Their status goes back to pending; their executions stay as they are. Left out are jobs with the emergency_stop mark,
-- or whose last record is a stop; jobs that were republished three times; and jobs with active executions.
-- Returns  {"ok": true, "message": "Failed jobs republished", "republished_count": 1,
--           "republished_jobs": [{"job_id": "a", "previous_status": "failed", "attempt": 1}],
--           "skipped": {"emergency_stopped": 2, "attempts_exhausted": 1, "active": 1}, "more": false}
--          "skipped": each job that is left out, once, under the first reason; "more": some are left: beyond max_jobs,
--          after 5 seconds, locked, or refused by a trigger or constraint of the application's, of which a WARNING says
--          more
-- Raises   22023 for a max_age over 8,760 hours or max_jobs over 1,000, 25000 above READ COMMITTED, 25006 in a
--          read-only transaction, 55P03 where a whole table was locked for longer than lock_timeout
-- Locks    for each job its row, FOR NO KEY UPDATE, and its barrier, alone and shared, until the transaction ends. It
--          waits for neither: a job that others hold is left for the next call.

-- next_attempt(id, metadata): which attempt it is to republish this failed job, and why it is skipped, if so.
CREATE OR REPLACE FUNCTION next_attempt(id text, metadata jsonb, OUT attempt int, OUT skipped text)
LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id    CONSTANT jobs.id%TYPE := to_job_id(next_attempt.id);
    v_count CONSTANT jsonb := metadata -> 'republish_count';
BEGIN
    -- By the record, since a worker may write metadata of its own; and by the metadata, since the record may be purged.
    SELECT 1 + least(3, greatest(
        0, max(b.attempt), CASE jsonb_typeof(v_count) WHEN 'number' THEN v_count::numeric END))::int INTO attempt
    FROM batch_changes b
    WHERE b.job_id = next_attempt.id;
    skipped := CASE
        -- A job that had failed by itself before it was stopped has a record of the stop, but no mark.
        WHEN metadata @> '{"emergency_stop": true}' OR last_record(next_attempt.id) = 'stop' THEN 'emergency_stopped'
        WHEN attempt > 3 THEN 'attempts_exhausted'
        WHEN EXISTS (SELECT FROM executions e
                     WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing')) THEN 'active'
    END;
END;
$$;

CREATE OR REPLACE FUNCTION repair_stuck_jobs(max_age interval DEFAULT '24 hours', max_jobs int DEFAULT 100)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET timezone FROM CURRENT  -- for columns of type timestamp
SET row_security = off     -- an error where rows would be hidden from us
AS $$
DECLARE
    v_now     CONSTANT timestamptz := clock_timestamp();
    v_ids     text[];
    v_key     text;
    v_job     record;
    v_jobs    json[] := '{}'::json[];
    v_skipped json;
BEGIN
    PERFORM require_read_committed('repair_stuck_jobs');
    IF (max_age > '0' AND extract(epoch FROM max_age) <= 8760 * 3600 AND max_jobs BETWEEN 0 AND 1000) IS NOT TRUE THEN
        RAISE invalid_parameter_value USING MESSAGE = format(
            'max_age is %L: expected more than 0, at most 8760 hours; max_jobs is %L: expected 0 to 1000',
            max_age, max_jobs);
    END IF;
    -- All of them are counted before the first one is locked: with many that takes its time.
    SELECT json_build_object('emergency_stopped', count(*) FILTER (WHERE n.skipped = 'emergency_stopped'),
                             'attempts_exhausted', count(*) FILTER (WHERE n.skipped = 'attempts_exhausted'),
                             'active', count(*) FILTER (WHERE n.skipped = 'active')),
           COALESCE(array_agg(j.id::text ORDER BY j.updated_at, j.id) FILTER (WHERE n.skipped IS NULL), '{}')
    INTO v_skipped, v_ids
    FROM jobs j, next_attempt(j.id::text, j.metadata) n
    WHERE j.status = 'failed' AND j.updated_at >= v_now - repair_stuck_jobs.max_age;

    FOREACH v_key IN ARRAY v_ids LOOP
        EXIT WHEN cardinality(v_jobs) >= max_jobs OR clock_timestamp() > v_now + interval '5 s';
        -- Alone at the barrier, so that a stop that comes now does not take the job for ended; and shared, by which it
        -- knows that we hold the job until we commit. Then nobody else can change any of it, and we look again.
        BEGIN
            PERFORM FROM jobs j WHERE j.id = to_job_id(v_key) AND j.status = 'failed' FOR NO KEY UPDATE SKIP LOCKED;
            CONTINUE WHEN NOT FOUND OR NOT pg_try_advisory_xact_lock(job_barrier(v_key))
                          OR NOT pg_try_advisory_xact_lock_shared(job_barrier(v_key));
            UPDATE jobs j
            SET status = 'pending', updated_at = v_now, metadata = as_object(j.metadata, 'previous_metadata')
                    || jsonb_build_object('republish_count', n.attempt, 'republished_at', utc_seconds(v_now))
            FROM jobs f, next_attempt(v_key, f.metadata) n
            WHERE j.id = to_job_id(v_key) AND f.id = j.id AND n.skipped IS NULL
            RETURNING j.status, n.attempt INTO v_job;
        EXCEPTION WHEN plpgsql_error OR integrity_constraint_violation OR data_exception
                       OR syntax_error_or_access_rule_violation OR object_not_in_prerequisite_state
                       OR serialization_failure OR deadlock_detected THEN  -- lets go of what it has locked
            RAISE WARNING 'job % is not republished: %', quote_literal(v_key), SQLERRM;
            CONTINUE;
        END;
        CONTINUE WHEN v_job.status IS DISTINCT FROM 'pending';  -- such as when a trigger of the application's keeps it
        PERFORM notify_workers('job_republished', json_build_object(
            'job_id', v_key, 'republished_at', utc_seconds(v_now), 'attempt', v_job.attempt));
        v_jobs := v_jobs || json_build_object('job_id', v_key, 'previous_status', 'failed', 'attempt', v_job.attempt);
    END LOOP;

    PERFORM commit_durably() WHERE cardinality(v_jobs) > 0;
    INSERT INTO batch_changes (operation, job_id, previous_status, attempt, changed_at)
    SELECT 'repair_stuck_jobs', b ->> 'job_id', b ->> 'previous_status', (b ->> 'attempt')::int, v_now
    FROM unnest(v_jobs) AS b;
    RETURN json_build_object(
        'ok', true, 'message', 'Failed jobs republished', 'republished_count', cardinality(v_jobs),
        'republished_jobs', array_to_json(v_jobs), 'skipped', v_skipped, 'more', EXISTS (
            SELECT FROM unnest(v_ids) AS c (id)
            JOIN jobs j ON j.id = to_job_id(c.id) AND j.status = 'failed'
            WHERE (next_attempt(c.id, j.metadata)).skipped IS NULL));
END;
$$;
REVOKE ALL ON FUNCTION repair_stuck_jobs(interval, int) FROM PUBLIC;
COMMENT ON FUNCTION repair_stuck_jobs(interval, int) IS
    'Sets jobs that failed within max_age back to pending, three times each, never a stopped one; returns JSON.';
