-- release_job(id, reason, status, caller): lifts an emergency stop, on purpose and on record. The job goes on in this
-- status, without the mark, its updated_at is now; the rest of its metadata and its executions stay as they are.
-- Returns  {"ok": true, "message": "Job released", "job_id": "a", "previous_status": "failed", "new_status": "pending",
--           "released_at": "2025-09-29T23:48:00Z", "reason": "fixed"}
--          {"error": "job is not stopped", "job_id": "a", "status": "processing"}
--          {"error": "job not found", "job_id": "a"}
-- Raises   invalid_parameter_value (22023)    reason or status is missing, too long, or status is failed
--          invalid_transaction_state (25000)  the transaction is REPEATABLE READ or SERIALIZABLE
--          read_only_sql_transaction (25006)  the transaction is read-only, as every one on a standby
--          lock_not_available (55P03)         others held the job for longer than lock_timeout (10 s where that is 0);
--                                             DETAIL has them as a JSON array, as emergency_stop_job's has
--          triggered_data_change_violation (27000)  a trigger or rule of the application's kept it from being released
-- Locks    the job's barrier, alone and shared; the tables jobs and emergency_stops, ROW EXCLUSIVE; the job's row, FOR
--          NO KEY UPDATE; where sessions share its lock, the table jobs, EXCLUSIVE; all until the transaction ends

-- lock_stopped_job(id, asked_id, deadline): locks a job for its release, by this time.
-- Returns NULL, or what release_job answers if there is nothing to release. Raises 55P03 or 40P01 if it gets no lock.
CREATE OR REPLACE FUNCTION lock_stopped_job(id text, asked_id text, deadline timestamptz)
RETURNS json LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id      CONSTANT jobs.id%TYPE := to_job_id(lock_stopped_job.id);
    v_barrier CONSTANT bigint := job_barrier(lock_stopped_job.id);
    v_job     record;
BEGIN
    PERFORM limit_lock_wait(deadline - clock_timestamp());
    -- The first look takes no lock: where there is nothing to release, nobody is waited for.
    FOR v_look IN 1..2 LOOP
        SELECT j.status, j.metadata INTO v_job FROM jobs j WHERE j.id = v_id;
        IF NOT FOUND THEN
            RETURN json_build_object('error', 'job not found', 'job_id', asked_id);
        ELSIF NOT is_emergency_stopped(lock_stopped_job.id, v_job.status, v_job.metadata) THEN
            RETURN json_build_object('error', 'job is not stopped', 'job_id', asked_id, 'status', v_job.status);
        END IF;
        EXIT WHEN v_look = 2;
        -- Alone; and shared, by which emergency_stop_blockers knows us.
        PERFORM pg_advisory_xact_lock(v_barrier), pg_advisory_xact_lock_shared(v_barrier);
        PERFORM wait_for_barrier(v_barrier # 1, '20ms');  -- who holds the row must not wait for the barrier
        PERFORM limit_lock_wait(deadline - clock_timestamp());
        LOCK TABLE jobs, emergency_stops IN ROW EXCLUSIVE MODE;
        PERFORM lock_job_row(lock_stopped_job.id, deadline - clock_timestamp(), lock_table => true);
    END LOOP;
    RETURN NULL;
END;
$$;

CREATE OR REPLACE FUNCTION release_job(id text, reason text, status text, caller jsonb DEFAULT NULL)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET timezone FROM CURRENT
SET row_security = off
AS $$
DECLARE
    v_id           CONSTANT jobs.id%TYPE := to_job_id(release_job.id);
    v_key          CONSTANT text := v_id::text;  -- the id as it is in the tables
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_patience     CONSTANT text := CASE v_lock_timeout WHEN '0' THEN '10s' ELSE v_lock_timeout END;
    v_deadline     CONSTANT timestamptz := clock_timestamp() + v_patience::interval;
    v_outer        CONSTANT text := current_setting('beacon_stop.releasing', true);  -- whose trigger has called this
    v_previous     text;
    v_released     record;
    v_now          timestamptz;
    v_answer       json;
BEGIN
    PERFORM require_read_committed('release_job');
    IF (length(btrim(reason)) > 0 AND length(reason) <= 1000) IS NOT TRUE THEN
        RAISE invalid_parameter_value USING SCHEMA = 'beacon_stop',
            MESSAGE = 'reason is missing or too long: expected 1 to 1000 characters';
    ELSIF (length(release_job.status) BETWEEN 1 AND 255 AND release_job.status <> 'failed') IS NOT TRUE THEN
        RAISE invalid_parameter_value USING SCHEMA = 'beacon_stop', MESSAGE =
            'status is missing, too long, or failed: expected the state that the job goes on in, 1 to 255 characters';
    ELSIF length(release_job.status) > (
        SELECT a.atttypmod - 4 FROM pg_attribute a  -- of varchar(n) it is n + 4, of others -1
        WHERE a.attrelid = 'jobs'::regclass AND a.attname = 'status' AND a.atttypmod > 0) THEN
        RAISE invalid_parameter_value USING SCHEMA = 'beacon_stop', MESSAGE = format(
            'status has %s characters: expected what the column jobs.status can hold', length(release_job.status));
    ELSIF jsonb_typeof(caller) <> 'object' THEN
        RAISE invalid_parameter_value USING MESSAGE = 'caller is not a JSON object';
    END IF;

    LOOP
        BEGIN
            v_answer := lock_stopped_job(v_key, release_job.id, v_deadline);
            EXIT;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            -- In a deadlock, such as with another release that has to lock the table, it lets go and tries again.
            PERFORM pg_sleep(0.02 * random());
            CONTINUE WHEN clock_timestamp() < v_deadline;
            RAISE lock_not_available
                USING MESSAGE = format('job %L is locked', release_job.id),
                      DETAIL = (SELECT COALESCE(json_agg(b), '[]') FROM emergency_stop_blockers(release_job.id) b),
                      HINT = 'Those that are named hold it. Nothing was changed. Try again when they have ended; a '
                             'prepared transaction, with the pid 0, ends with ROLLBACK PREPARED or COMMIT PREPARED.';
        END;
    END LOOP;
    -- Nor is what a trigger of the application's waits for waited for without end.
    PERFORM set_config('lock_timeout', CASE WHEN v_answer IS NULL THEN v_patience ELSE v_lock_timeout END, true);
    IF v_answer IS NOT NULL THEN
        RETURN v_answer;
    END IF;

    v_now := clock_timestamp();
    SELECT j.status INTO v_previous FROM jobs j WHERE j.id = v_id;
    PERFORM set_config('beacon_stop.releasing', job_barrier(v_key)::text, true);
    UPDATE jobs j
    SET status = release_job.status,
        updated_at = v_now,
        metadata = CASE WHEN jsonb_typeof(j.metadata) = 'object' THEN j.metadata - 'emergency_stop' ELSE j.metadata END
    WHERE j.id = v_id;
    PERFORM set_config('beacon_stop.releasing', v_outer, true);
    SELECT j.status, j.metadata INTO v_released FROM jobs j WHERE j.id = v_id;
    IF v_released.status IS DISTINCT FROM release_job.status OR v_released.metadata @> '{"emergency_stop": true}' THEN
        RAISE triggered_data_change_violation
            USING MESSAGE = format('job %L was not released: a trigger or rule on table jobs has changed the update',
                                   release_job.id),
                  DETAIL = format('Its status is %L, its metadata %L.', v_released.status, v_released.metadata);
    END IF;

    INSERT INTO emergency_stops (
        action, job_id, previous_status, new_status, executions_stopped, reason, caller, stopped_at)
    VALUES ('release', v_key, v_previous, release_job.status, 0, release_job.reason, release_job.caller, v_now);
    IF NOT FOUND THEN
        RAISE triggered_data_change_violation USING
            MESSAGE = format('the release of job %L could not be recorded', release_job.id),
            HINT = 'A trigger or a rule on table emergency_stops keeps the row from being added. Disable it.';
    END IF;
    PERFORM set_config('lock_timeout', v_lock_timeout, true), commit_durably();
    RETURN json_build_object(
        'ok', true, 'message', 'Job released', 'job_id', release_job.id, 'previous_status', v_previous,
        'new_status', release_job.status, 'released_at', utc_seconds(v_now), 'reason', release_job.reason);
END;
$$;
REVOKE ALL ON FUNCTION release_job(text, text, text, jsonb) FROM PUBLIC;
COMMENT ON FUNCTION release_job(text, text, text, jsonb) IS
    'Lifts the emergency stop of a job, which goes on in the status given; returns the JSON summary, {error, job_id} '
    'for an unknown job, {error, job_id, status} for one that is not stopped. Raises 55P03 when others hold it.';
