-- repair_stuck_jobs(max_age, max_jobs): republishes the jobs that failed within max_age, those that failed first first.
-- Their status goes back to pending; their executions stay as they are. Left out are jobs with the emergency_stop mark,
-- or whose last record in emergency_stops is a stop; jobs that were republished three times; and jobs with active
-- executions, beside which nothing may be started again.
-- Returns  {"ok": true, "message": "Failed jobs republished", "republished_count": 1,
--           "republished_jobs": [{"job_id": "a", "previous_status": "failed", "attempt": 1}],
--           "skipped": {"emergency_stopped": 2, "attempts_exhausted": 1, "active": 1}, "more": false}
--          "skipped" counts each job that is left out under the first that is true of it
--          "more" tells that some are left: beyond max_jobs (0 to 1,000), locked, or kept by triggers of the application's own
-- Raises   invalid_parameter_value (22023)    max_age is not between 0 and 8,760 hours, max_jobs not between 0 and 1,000
--          invalid_transaction_state (25000)  the transaction is REPEATABLE READ or SERIALIZABLE
--          read_only_sql_transaction (25006)  the transaction is read-only, as every one on a standby
--          lock_not_available (55P03)         a whole table was locked for longer than lock_timeout
-- Locks    for each job its row, FOR NO KEY UPDATE, and its barrier, alone and shared, until the transaction ends. It
--          waits for neither: a job that others hold is left for the next call.

-- republications(id): how often a job was republished, as far as it matters.
-- Returns  0 to 3, where 3 means 3 or more
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION republications(id text)
RETURNS int LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id CONSTANT jobs.id%TYPE := to_job_id(republications.id);
BEGIN
    -- By the record, since a worker may write metadata of its own; and by the metadata, since the record may be purged.
    RETURN least(3, greatest(0,
        CASE WHEN jsonb_typeof(j.metadata -> 'republish_count') = 'number' THEN (j.metadata ->> 'republish_count')::numeric END,
        (SELECT max(b.attempt) FROM batch_changes b WHERE b.job_id = republications.id AND b.operation = 'repair_stuck_jobs')))::int
    FROM jobs j
    WHERE j.id = v_id;
END;
$$;
REVOKE ALL ON FUNCTION republications(text) FROM PUBLIC;
COMMENT ON FUNCTION republications(text) IS 'How often repair_stuck_jobs has republished this job: 0 to 3, where 3 means 3 or more. Locks nothing.';

-- reason_to_skip(id): why a failed job is not republished.
-- Returns  'emergency_stopped', 'attempts_exhausted' or 'active'; NULL if it may be republished
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION reason_to_skip(id text)
RETURNS text LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id CONSTANT jobs.id%TYPE := to_job_id(reason_to_skip.id);
BEGIN
    -- A job that had failed by itself before it was stopped has a record of the stop, but no mark.
    IF EXISTS (SELECT FROM jobs j WHERE j.id = v_id AND j.metadata @> '{"emergency_stop": true}')
       OR last_record(reason_to_skip.id) = 'stop' THEN
        RETURN 'emergency_stopped';
    ELSIF republications(reason_to_skip.id) >= 3 THEN
        RETURN 'attempts_exhausted';
    ELSIF EXISTS (SELECT FROM executions e WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing')) THEN
        RETURN 'active';
    END IF;
    RETURN NULL;
END;
$$;
REVOKE ALL ON FUNCTION reason_to_skip(text) FROM PUBLIC;
COMMENT ON FUNCTION reason_to_skip(text) IS
    'Why repair_stuck_jobs leaves out this job: emergency_stopped, attempts_exhausted, active, or NULL. Locks nothing.';

-- republish_job(id, at): sets a failed job back to pending, if nobody holds it and it may still be republished.
-- Returns  {"job_id": "a", "previous_status": "failed", "attempt": 1}, or NULL if it was left as it is
-- Raises   nothing of its own
-- Locks    its row, FOR NO KEY UPDATE, and its barrier, alone and shared, or nothing
CREATE OR REPLACE FUNCTION republish_job(id text, at timestamptz)
RETURNS json LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id      CONSTANT jobs.id%TYPE := to_job_id(republish_job.id);
    v_barrier CONSTANT bigint := job_barrier(republish_job.id);
    v_attempt int;
    v_status  text;
BEGIN
    PERFORM FROM jobs j WHERE j.id = v_id AND j.status = 'failed' FOR NO KEY UPDATE SKIP LOCKED;
    -- We are alone at the barrier, so that an emergency stop that comes now does not take the job for ended. We hold it
    -- shared as well, by which that stop knows that we hold the job until we commit. Now nobody else can change any of it,
    -- so we look again.
    IF NOT FOUND OR NOT pg_try_advisory_xact_lock(v_barrier) OR NOT pg_try_advisory_xact_lock_shared(v_barrier)
       OR reason_to_skip(republish_job.id) IS NOT NULL THEN
        RETURN NULL;
    END IF;
    v_attempt := republications(republish_job.id) + 1;
    UPDATE jobs j
    SET status = 'pending',
        updated_at = republish_job.at,
        metadata = as_object(j.metadata, 'previous_metadata')
                   || jsonb_build_object('republish_count', v_attempt, 'republished_at', utc_seconds(republish_job.at))
    WHERE j.id = v_id
    RETURNING j.status INTO v_status;
    IF v_status IS DISTINCT FROM 'pending' THEN  -- a trigger of the application's own has kept it from that
        RETURN NULL;
    END IF;
    PERFORM notify_workers('job_republished', json_build_object(
        'job_id', republish_job.id, 'republished_at', utc_seconds(republish_job.at), 'attempt', v_attempt));
    RETURN json_build_object('job_id', republish_job.id, 'previous_status', 'failed', 'attempt', v_attempt);
END;
$$;
REVOKE ALL ON FUNCTION republish_job(text, timestamptz) FROM PUBLIC;
COMMENT ON FUNCTION republish_job(text, timestamptz) IS
    'Sets a failed job back to pending and notifies the workers, or returns NULL if others hold it or it is to be left out.';

CREATE OR REPLACE FUNCTION repair_stuck_jobs(max_age interval DEFAULT '24 hours', max_jobs int DEFAULT 100)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET timezone FROM CURRENT  -- for columns of type timestamp
SET row_security = off     -- an error where rows would be hidden from us
AS $$
DECLARE
    v_now     CONSTANT timestamptz := clock_timestamp();
    v_ids     text[];
    v_id      text;
    v_job     json;
    v_jobs    json[] := '{}'::json[];
    v_skipped json;
    v_more    boolean := false;
BEGIN
    PERFORM require_read_committed('repair_stuck_jobs');
    IF (max_age > '0' AND extract(epoch FROM max_age) <= 8760 * 3600) IS NOT TRUE THEN
        RAISE invalid_parameter_value
            USING MESSAGE = format('max_age is %s: expected more than 0, at most 8760 hours', COALESCE(max_age::text, 'null'));
    END IF;
    IF (max_jobs BETWEEN 0 AND 1000) IS NOT TRUE THEN
        RAISE invalid_parameter_value
            USING MESSAGE = format('max_jobs is %s: expected 0 to 1000', COALESCE(max_jobs::text, 'null'));
    END IF;

    -- All of them are counted before the first one is locked: with many that takes its time.
    SELECT json_build_object('emergency_stopped', count(*) FILTER (WHERE f.skipped = 'emergency_stopped'),
                             'attempts_exhausted', count(*) FILTER (WHERE f.skipped = 'attempts_exhausted'),
                             'active', count(*) FILTER (WHERE f.skipped = 'active')),
           array_agg(f.id::text ORDER BY f.updated_at, f.id) FILTER (WHERE f.skipped IS NULL)
    INTO v_skipped, v_ids
    FROM (SELECT j.id, j.updated_at, reason_to_skip(j.id::text) AS skipped
          FROM jobs j
          WHERE j.status = 'failed' AND j.updated_at >= v_now - max_age
          OFFSET 0) f;  -- asked once for each job, not once for each count
    FOREACH v_id IN ARRAY COALESCE(v_ids, '{}') LOOP
        IF cardinality(v_jobs) >= max_jobs THEN
            v_more := true;
            EXIT;
        END IF;
        v_job := republish_job(v_id, v_now);
        IF v_job IS NOT NULL THEN
            v_jobs := v_jobs || v_job;
        ELSIF reason_to_skip(v_id) IS NULL THEN  -- others hold it, or it has gone on
            v_more := v_more OR EXISTS (SELECT FROM jobs j WHERE j.id = to_job_id(v_id) AND j.status = 'failed');
        END IF;
    END LOOP;

    IF cardinality(v_jobs) > 0 THEN
        PERFORM commit_durably();
    END IF;
    INSERT INTO batch_changes (operation, job_id, previous_status, attempt, changed_at)
    SELECT 'repair_stuck_jobs', b ->> 'job_id', b ->> 'previous_status', (b ->> 'attempt')::int, v_now
    FROM unnest(v_jobs) AS b;
    RETURN json_build_object(
        'ok', true, 'message', 'Failed jobs republished', 'republished_count', cardinality(v_jobs),
        'republished_jobs', array_to_json(v_jobs), 'skipped', v_skipped, 'more', v_more);
END;
$$;
REVOKE ALL ON FUNCTION repair_stuck_jobs(interval, int) FROM PUBLIC;
COMMENT ON FUNCTION repair_stuck_jobs(interval, int) IS
    'Sets jobs that failed within max_age back to pending, up to max_jobs, three times each at most; never an emergency-stopped '
    'one, nor one with active executions; returns the JSON summary. Raises 25000 above READ COMMITTED, 25006 on a standby, 22023 '
    'for arguments out of range. Locks each job''s row and barrier until the transaction ends, leaving out jobs that others hold.';
