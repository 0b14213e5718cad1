-- emergency_stop_job(id, reason, force, caller): stops a job and all its executions, in the caller's transaction, for good.
-- Returns  {"ok": true, "message": "Job emergency stopped", "job_id": "a", "previous_status": "processing",
--           "new_status": "failed", "executions_stopped": 42, "stopped_at": "2025-09-29T23:48:00Z"}
--          {"ok": true, "message": "Job already in terminal state", "job_id": "a", "status": "failed", "action": "none"}
--          the same with "action": "executions_stopped", "executions_stopped": 3, "stopped_at": ..., if a job that
--          had ended still had active executions
--          {"error": "job not found", "job_id": "a"}
--          and, as the last keys, where they apply: "reason"; "sessions_ended": 2; "left_alone": {"queued": 10}, the
--          executions in states that are none of the six
-- Raises   invalid_parameter_value (22023)    reason has more than 1,000 characters, or caller is no JSON object
--          invalid_transaction_state (25000)  the transaction is REPEATABLE READ or SERIALIZABLE
--          read_only_sql_transaction (25006)  the transaction is read-only, as every one on a standby
--          lock_not_available (55P03)         others held the job for longer than lock_timeout (10 s where that is 0). DETAIL
--                                             is JSON, the rows of emergency_stop_blockers(id); with force, where one of
--                                             them may not be ended and so none is: {"blocked_by": [...], "not_ended": [...]}
--          triggered_data_change_violation (27000)  a trigger or a rule of the application's undid the stop
-- Locks    the job's barrier, alone; then its active executions and its row, FOR NO KEY UPDATE, in the order that works;
--          where sessions share the row's lock, the table jobs, EXCLUSIVE; all until the transaction ends. With nothing
--          left to stop it locks nothing. With force it ends the sessions that have held the job for that long, and then
--          waits for as long once more.

-- limit_lock_wait(wait): makes the next wait for a lock fail after that time.
-- Returns  nothing
-- Raises   lock_not_available (55P03)  no time is left
-- Locks    nothing
CREATE OR REPLACE FUNCTION limit_lock_wait(wait interval)
RETURNS void LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
BEGIN
    IF wait <= '0' THEN
        RAISE lock_not_available USING MESSAGE = 'the time to wait for locks is over';
    END IF;
    PERFORM set_config('lock_timeout', ceil(extract(epoch FROM wait) * 1000)::bigint::text, true);
END;
$$;
REVOKE ALL ON FUNCTION limit_lock_wait(interval) FROM PUBLIC;
COMMENT ON FUNCTION limit_lock_wait(interval) IS 'Sets lock_timeout for this transaction; raises 55P03 if no time is left.';

-- wait_for_barrier(barrier, wait): takes a job's barrier alone, in its turn.
-- Returns  whether it was got in that time
-- Raises   nothing of its own
-- Locks    the barrier, until the transaction ends
CREATE OR REPLACE FUNCTION wait_for_barrier(barrier bigint, wait interval)
RETURNS boolean LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
BEGIN
    PERFORM limit_lock_wait(wait);
    PERFORM pg_advisory_xact_lock(barrier);
    RETURN true;
EXCEPTION WHEN lock_not_available OR deadlock_detected THEN  -- in a deadlock the caller's transaction holds what another one needs
    RETURN false;
END;
$$;
REVOKE ALL ON FUNCTION wait_for_barrier(bigint, interval) FROM PUBLIC;
COMMENT ON FUNCTION wait_for_barrier(bigint, interval) IS 'Takes a barrier alone; false if that was not possible in this time.';

-- lock_job_row(id, wait, lock_table): locks a job's row.
-- Returns  how much of the time is left
-- Raises   lock_not_available (55P03)  others hold the row for longer; or sessions share it and the table may not be locked
-- Locks    the row, FOR NO KEY UPDATE; before it, if sessions share it, the table, EXCLUSIVE
CREATE OR REPLACE FUNCTION lock_job_row(id text, wait interval, lock_table boolean)
RETURNS interval LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id    CONSTANT jobs.id%TYPE := to_job_id(lock_job_row.id);
    v_began timestamptz;
BEGIN
    PERFORM FROM jobs j WHERE j.id = v_id FOR NO KEY UPDATE SKIP LOCKED;
    IF FOUND THEN
        RETURN wait;
    END IF;
    v_began := clock_timestamp();
    PERFORM limit_lock_wait(wait);
    -- A share lock on a row is not fair: new sharers keep joining, and PostgreSQL waits for each of them in turn, each
    -- within lock_timeout. A table lock is fair, and once it is granted nobody holds any row any more.
    BEGIN
        PERFORM FROM jobs j WHERE j.id = v_id FOR SHARE SKIP LOCKED;
        IF FOUND THEN
            RAISE triggered_action_exception;
        END IF;
    EXCEPTION WHEN triggered_action_exception THEN
        IF NOT lock_table THEN
            RETURN wait;
        END IF;
        LOCK TABLE jobs IN EXCLUSIVE MODE;
    END;
    PERFORM FROM jobs j WHERE j.id = v_id FOR NO KEY UPDATE;
    RETURN wait - (clock_timestamp() - v_began);
END;
$$;
REVOKE ALL ON FUNCTION lock_job_row(text, interval, boolean) FROM PUBLIC;
COMMENT ON FUNCTION lock_job_row(text, interval, boolean) IS
    'Locks a job''s row, if sessions share it by way of the table; returns the time that is left, raises 55P03 when it is over.';

-- lock_rows(id, wait, job_first): locks a job's active executions and its row, first what is free, then what is held.
-- The time counts only while it waits, since locking many executions takes a while by itself.
-- Returns  nothing
-- Raises   lock_not_available (55P03)  others hold a row for longer
-- Locks    the executions and the job's row, FOR NO KEY UPDATE; before the row, if sessions share it, the table, EXCLUSIVE
CREATE OR REPLACE FUNCTION lock_rows(id text, wait interval, job_first boolean)
RETURNS void LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id    CONSTANT jobs.id%TYPE := to_job_id(lock_rows.id);
    v_rest  interval := wait;
    v_held  record;
    v_began timestamptz;
BEGIN
    IF job_first THEN
        v_rest := lock_job_row(lock_rows.id, v_rest, lock_table => false);
    END IF;
    FOR v_held IN
        WITH free AS (
            SELECT e.id
            FROM executions e
            WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing')
            FOR NO KEY UPDATE SKIP LOCKED
        )
        SELECT e.id
        FROM executions e
        WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing')
        EXCEPT
        SELECT f.id FROM free f
    LOOP
        v_began := clock_timestamp();
        PERFORM limit_lock_wait(v_rest);
        PERFORM
        FROM executions e
        WHERE e.id = v_held.id AND e.job_id = v_id AND e.status IN ('pending', 'running', 'processing')
        FOR NO KEY UPDATE;
        v_rest := v_rest - (clock_timestamp() - v_began);
    END LOOP;
    PERFORM lock_job_row(lock_rows.id, v_rest, lock_table => true);
END;
$$;
REVOKE ALL ON FUNCTION lock_rows(text, interval, boolean) FROM PUBLIC;
COMMENT ON FUNCTION lock_rows(text, interval, boolean) IS
    'Locks a job''s active executions and its row; raises 55P03 when it has waited for that long.';

-- unfinished_executions(id): how many executions of a job are in each state that is not terminal.
-- Returns  {"pending": 14, "queued": 10}, or NULL if there are none
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION unfinished_executions(id text)
RETURNS jsonb LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id     CONSTANT jobs.id%TYPE := to_job_id(unfinished_executions.id);
    v_counts jsonb;
BEGIN
    SELECT jsonb_object_agg(u.status, u.executions) INTO v_counts
    FROM (SELECT e.status, count(*) AS executions
          FROM executions e
          WHERE e.job_id = v_id AND e.status NOT IN ('completed', 'failed', 'cancelled')
          GROUP BY e.status) u;
    RETURN v_counts;
END;
$$;
REVOKE ALL ON FUNCTION unfinished_executions(text) FROM PUBLIC;
COMMENT ON FUNCTION unfinished_executions(text) IS 'How many executions of this job are in each state that is not terminal; NULL if none.';

-- last_record(id): whether the last record of a job is a stop or a release.
-- Returns  'stop', 'release', or NULL where there is no record
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION last_record(id text)
RETURNS text LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN (SELECT s.action FROM emergency_stops s WHERE s.job_id = last_record.id ORDER BY s.id DESC LIMIT 1);
END;
$$;
REVOKE ALL ON FUNCTION last_record(text) FROM PUBLIC;
COMMENT ON FUNCTION last_record(text) IS 'The action of this job''s last record in emergency_stops: stop, release, or NULL.';

-- fail_job(id, reason, at): fails a job and its active executions, those included that triggers start meanwhile.
-- Returns  executions_stopped: how many executions were failed; left_alone: as unfinished_executions
-- Raises   triggered_data_change_violation (27000)  a trigger or a rule of the application's undid it
-- Locks    the rows that it updates, executions before the job
CREATE OR REPLACE FUNCTION fail_job(id text, reason text, at timestamptz, OUT executions_stopped bigint, OUT left_alone jsonb)
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id      CONSTANT jobs.id%TYPE := to_job_id(fail_job.id);
    v_mark    CONSTANT jsonb := jsonb '{"error": "Emergency stop by admin", "emergency_stop": true}';
    v_updated  bigint;
    v_unmarked bigint := 0::bigint;  -- executions whose mark a trigger has taken away
    v_job     record;
BEGIN
    executions_stopped := 0;
    PERFORM set_config('beacon_stop.stopping', fail_job.id, true);
    FOR v_round IN 1..10 LOOP
        -- as_object() is written out here, because calling a function for each row would cost more than the rest.
        UPDATE executions e
        SET status = 'failed',
            completed_at = fail_job.at,
            output = CASE WHEN jsonb_typeof(e.output) = 'object' THEN e.output || v_mark
                          WHEN e.output <> 'null' THEN jsonb_build_object('previous_output', e.output) || v_mark
                          ELSE v_mark
                     END
        WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing');
        GET DIAGNOSTICS v_updated = ROW_COUNT;
        executions_stopped := executions_stopped + v_updated;
        IF v_round = 1 THEN
            UPDATE jobs j
            SET status = CASE WHEN j.status IN ('completed', 'cancelled') THEN j.status ELSE 'failed' END,
                updated_at = fail_job.at,
                metadata = without_reason_of_last_stop(fail_job.id, as_object(j.metadata, 'previous_metadata'))
                           || jsonb_strip_nulls(jsonb_build_object('emergency_stop', true, 'stopped_at', utc_seconds(fail_job.at),
                                                                   'stopped_by', 'admin', 'reason', fail_job.reason))
            WHERE j.id = v_id;
        END IF;
        SET CONSTRAINTS ALL IMMEDIATE;  -- a deferred trigger would start its executions after the look that follows
        left_alone := unfinished_executions(fail_job.id);
        EXIT WHEN (left_alone ?| '{pending,running,processing}') IS NOT TRUE;
    END LOOP;
    PERFORM set_config('beacon_stop.stopping', '', true);

    -- Triggers of the application's that fire before ours may have taken marks away. Without any, nothing is looked through.
    IF EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = 'executions'::regclass AND NOT t.tgisinternal AND t.tgtype & 18 = 18) THEN
        SELECT count(*) INTO v_unmarked
        FROM executions e
        WHERE e.job_id = v_id AND e.status = 'failed' AND e.completed_at = fail_job.at
          AND (e.output @> '{"emergency_stop": true}') IS NOT TRUE;
    END IF;
    SELECT j.status, j.metadata @> '{"emergency_stop": true}' AS marked INTO v_job FROM jobs j WHERE j.id = v_id;
    IF v_unmarked > 0 OR left_alone ?| '{pending,running,processing}' OR (v_job.status IN ('completed', 'failed', 'cancelled') AND v_job.marked) IS NOT TRUE THEN
        RAISE triggered_data_change_violation
            USING MESSAGE = format('job %s could not be stopped: a trigger or a rule of the application undoes the stop',
                                   quote_literal(fail_job.id)),
                  DETAIL = format('After the updates the job is %s, with the mark: %s. Executions that still run: %s. Executions without the mark: %s.',
                                  COALESCE(v_job.status, 'gone'), COALESCE(v_job.marked, false), COALESCE(left_alone::text, 'none'), v_unmarked),
                  HINT = 'Look at the triggers and rules of the tables jobs and executions (\d in psql), and disable the one that does it.';
    END IF;
END;
$$;
REVOKE ALL ON FUNCTION fail_job(text, text, timestamptz) FROM PUBLIC;
COMMENT ON FUNCTION fail_job(text, text, timestamptz) IS
    'Fails a job and its active executions; returns how many these were, and what is in other states. Raises 27000 if a trigger or a rule undoes it.';

-- without_reason_of_last_stop(id, metadata): a job's metadata without the reason that its last stop has left there.
-- A reason of somebody else's stays.
-- Returns  the metadata
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION without_reason_of_last_stop(id text, metadata jsonb)
RETURNS jsonb LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    IF metadata ? 'reason' AND metadata ->> 'reason' = (
        SELECT s.reason FROM emergency_stops s
        WHERE s.job_id = without_reason_of_last_stop.id AND s.action = 'stop'
        ORDER BY s.id DESC LIMIT 1
    ) THEN
        RETURN metadata - 'reason';
    END IF;
    RETURN metadata;
END;
$$;
REVOKE ALL ON FUNCTION without_reason_of_last_stop(text, jsonb) FROM PUBLIC;
COMMENT ON FUNCTION without_reason_of_last_stop(text, jsonb) IS 'A job''s metadata without the reason that its last stop has left there.';

-- attempt_stop(id, reason, sessions_ended, caller, wait, attempt): stops a job, or fails as soon as a lock is not to be had in that time.
-- Returns  outcome: 'not found', 'none' (there was nothing to stop), 'stopped', 'leftovers stopped'; status: the job's before;
--          executions_stopped; at; left_alone: counts of executions by states that are none of the six
-- Raises   lock_not_available (55P03), deadlock_detected (40P01)  to be tried again once the caller's block has let go of all locks
--          triggered_data_change_violation (27000)  as fail_job
-- Locks    the barrier alone; from the second attempt on the rows before anything is updated: in the even ones executions
--          first, in the odd ones the job first, because workers lock in either order
CREATE OR REPLACE FUNCTION attempt_stop(
    id text, reason text, sessions_ended int, caller jsonb, wait interval, attempt int,
    OUT outcome text, OUT status text, OUT executions_stopped bigint, OUT at timestamptz, OUT left_alone jsonb)
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id         CONSTANT jobs.id%TYPE := to_job_id(attempt_stop.id);
    v_key        CONSTANT text := v_id::text;  -- the id as it is in the tables
    v_barrier    CONSTANT bigint := job_barrier(v_key);
    v_terminal   boolean;
    v_marked     boolean;
    v_xmax       xid;      -- of whoever changes the job's row, or has locked it
    v_ended      boolean;  -- for good: with nothing active, there is nothing to do
    v_failed     record;
BEGIN
    PERFORM limit_lock_wait(wait);
    SELECT j.status, j.status IN ('completed', 'failed', 'cancelled'), COALESCE(j.metadata @> '{"emergency_stop": true}', false), j.xmax
    INTO attempt_stop.status, v_terminal, v_marked, v_xmax
    FROM jobs j WHERE j.id = v_id;
    IF NOT FOUND THEN
        outcome := 'not found';
        RETURN;
    END IF;
    -- Nobody starts an execution of a job that has ended, so what is committed is all there is, unless a transaction that
    -- was admitted before the end is still open: it holds the barrier. Who is just setting the job back shows in xmax.
    v_ended := v_terminal AND v_marked;
    IF v_terminal AND NOT v_marked THEN
        v_ended := (attempt_stop.status <> 'failed' OR last_record(v_key) = 'stop') AND (v_xmax = '0' OR mxid_age(v_xmax) <= 0 AND NOT is_running(v_xmax));
    END IF;
    -- Taken and given back in one expression where that is enough, because a lock that outlives the call costs more.
    IF (v_ended AND pg_try_advisory_lock(v_barrier) AND pg_advisory_unlock(v_barrier)) IS NOT TRUE
       AND NOT pg_try_advisory_xact_lock(v_barrier) THEN
        RAISE lock_not_available USING MESSAGE = 'others hold the barrier';
    END IF;
    IF v_ended THEN
        left_alone := unfinished_executions(v_key);
        IF (left_alone ?| '{pending,running,processing}') IS NOT TRUE THEN
            outcome := 'none';
            RETURN;
        END IF;
        PERFORM pg_advisory_xact_lock(v_barrier);
    END IF;

    IF attempt > 1 THEN
        PERFORM lock_rows(v_key, wait, job_first => attempt % 2 = 1);
    END IF;
    SELECT j.status INTO attempt_stop.status FROM jobs j WHERE j.id = v_id FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RAISE lock_not_available USING MESSAGE = 'others hold the row of the job, or have deleted it';
    END IF;
    at := clock_timestamp();
    v_terminal := COALESCE(attempt_stop.status IN ('completed', 'failed', 'cancelled'), false);
    outcome := CASE WHEN v_terminal THEN 'leftovers stopped' ELSE 'stopped' END;
    IF v_terminal THEN
        left_alone := unfinished_executions(v_key);
        IF (left_alone ?| '{pending,running,processing}') IS NOT TRUE THEN
            outcome := 'none';  -- it has ended while we waited; or it failed by itself, which is put on record now
            executions_stopped := 0;
        END IF;
    END IF;
    IF outcome <> 'none' THEN
        v_failed := fail_job(v_key, attempt_stop.reason, at);
        executions_stopped := v_failed.executions_stopped;
        left_alone := v_failed.left_alone;
    END IF;
    IF outcome <> 'none' OR attempt_stop.status = 'failed' AND last_record(v_key) IS DISTINCT FROM 'stop' THEN
        INSERT INTO emergency_stops (action, job_id, previous_status, new_status, executions_stopped, sessions_ended, reason, caller, stopped_at)
        VALUES ('stop', v_key, COALESCE(attempt_stop.status, 'unknown'), CASE WHEN v_terminal THEN attempt_stop.status ELSE 'failed' END,
                attempt_stop.executions_stopped, attempt_stop.sessions_ended, attempt_stop.reason, attempt_stop.caller, at);
    END IF;
    PERFORM pg_advisory_xact_lock_shared(v_barrier);  -- by which emergency_stop_blockers knows a stop that is done
END;
$$;
REVOKE ALL ON FUNCTION attempt_stop(text, text, int, jsonb, interval, int) FROM PUBLIC;
COMMENT ON FUNCTION attempt_stop(text, text, int, jsonb, interval, int) IS
    'One attempt to stop a job, which raises 55P03 or 40P01 if a lock is not to be had in that time. Locks barrier, executions and job.';

-- stop_answer(...): what emergency_stop_job answers of an attempt that has come to an end.
-- Returns  the JSON, its keys in the order of the specification
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION stop_answer(
    id text, reason text, sessions_ended int, outcome text, status text, executions_stopped bigint, at timestamptz, left_alone jsonb)
RETURNS json LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_left_alone CONSTANT jsonb := NULLIF(left_alone, '{}');
BEGIN
    IF outcome = 'stopped' THEN
        RETURN json_strip_nulls(json_build_object(
            'ok', true, 'message', 'Job emergency stopped', 'job_id', id, 'previous_status', COALESCE(status, 'unknown'),
            'new_status', 'failed', 'executions_stopped', executions_stopped, 'stopped_at', utc_seconds(at),
            'reason', reason, 'sessions_ended', NULLIF(sessions_ended, 0), 'left_alone', v_left_alone));
    ELSIF outcome = 'leftovers stopped' THEN
        RETURN json_strip_nulls(json_build_object(
            'ok', true, 'message', 'Job already in terminal state', 'job_id', id, 'status', status,
            'action', 'executions_stopped', 'executions_stopped', executions_stopped, 'stopped_at', utc_seconds(at),
            'reason', reason, 'sessions_ended', NULLIF(sessions_ended, 0), 'left_alone', v_left_alone));
    ELSIF v_left_alone IS NULL AND COALESCE(sessions_ended, 0) = 0 THEN
        RETURN json_build_object('ok', true, 'message', 'Job already in terminal state', 'job_id', id, 'status', status, 'action', 'none');
    END IF;
    RETURN json_strip_nulls(json_build_object(
        'ok', true, 'message', 'Job already in terminal state', 'job_id', id, 'status', status, 'action', 'none',
        'sessions_ended', NULLIF(sessions_ended, 0), 'left_alone', v_left_alone));
END;
$$;
REVOKE ALL ON FUNCTION stop_answer(text, text, int, text, text, bigint, timestamptz, jsonb) FROM PUBLIC;
COMMENT ON FUNCTION stop_answer(text, text, int, text, text, bigint, timestamptz, jsonb) IS 'The JSON that emergency_stop_job answers.';

CREATE OR REPLACE FUNCTION emergency_stop_job(
    id text, reason text DEFAULT NULL, force boolean DEFAULT false, caller jsonb DEFAULT NULL)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET timezone FROM CURRENT
SET row_security = off
AS $$
DECLARE
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_patience     CONSTANT interval := CASE v_lock_timeout WHEN '0' THEN '10s' ELSE v_lock_timeout END::interval;
    v_barrier      bigint;
    v_barred       boolean := false;  -- whether we have the barrier
    v_deadline     timestamptz := clock_timestamp() + v_patience;
    v_began        timestamptz;
    v_wait         interval := interval '5ms';
    v_attempt      int := 1;
    v_ended        int;  -- sessions, once force has been used
    v_gone         int;
    v_problem      text;
    v_stop         record;
BEGIN
    PERFORM require_read_committed('emergency_stop_job');
    IF length(reason) > 1000 THEN
        RAISE invalid_parameter_value USING MESSAGE = format('reason has %s characters: expected at most 1000', length(reason));
    ELSIF jsonb_typeof(caller) <> 'object' THEN
        RAISE invalid_parameter_value USING MESSAGE = format('caller is a JSON %s: expected an object', jsonb_typeof(caller));
    END IF;

    LOOP
        v_began := clock_timestamp();
        BEGIN
            v_stop := attempt_stop(id, reason, COALESCE(v_ended, 0), caller, v_wait, v_attempt);
            EXIT;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            v_problem := SQLERRM;  -- all locks of the attempt are given back, which dissolves a deadlock with workers
        END;
        IF NOT v_barred THEN
            v_barrier := job_barrier(to_job_id(id)::text);
            v_barred := wait_for_barrier(v_barrier, greatest(v_deadline - clock_timestamp(), '1ms'));
            CONTINUE WHEN v_barred AND clock_timestamp() < v_deadline;
        END IF;
        -- Each wait is longer than the last, and at least as long as it took to lock what was free.
        v_wait := greatest(v_wait * CASE v_attempt WHEN 1 THEN 4 ELSE 2 END, clock_timestamp() - v_began - v_wait);
        v_wait := least(v_wait, v_deadline - clock_timestamp());
        v_attempt := v_attempt + 1;
        CONTINUE WHEN v_barred AND v_wait > '0';

        v_gone := end_or_name_holders(id, v_patience, force AND v_ended IS NULL, CASE WHEN v_gone = 0 THEN v_problem END);
        IF v_gone = 0 THEN  -- nobody holds it any more: one last try
            v_deadline := clock_timestamp() + '100ms';
        ELSE
            v_ended := v_gone;
            v_deadline := clock_timestamp() + v_patience;
        END IF;
        v_wait := '20ms';
    END LOOP;
    PERFORM set_config('lock_timeout', v_lock_timeout, true);

    IF v_stop.outcome = 'not found' THEN
        RETURN json_build_object('error', 'job not found', 'job_id', id);
    ELSIF v_stop.at IS NOT NULL THEN
        PERFORM commit_durably();
    ELSIF current_setting('synchronous_standby_names') <> '' OR pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn() THEN
        -- Whoever ended the job may have done so without waiting for the disk or the standby. With a record of our own,
        -- which nobody reads, we wait for all that was written before it.
        PERFORM commit_durably(), pg_logical_emit_message(true, 'beacon-stop', '');
    END IF;
    IF v_stop.outcome IN ('stopped', 'leftovers stopped') THEN
        PERFORM notify_workers('emergency_stop', json_build_object(
            'job_id', id, 'stopped_at', utc_seconds(v_stop.at), 'executions_stopped', v_stop.executions_stopped));
    END IF;
    RETURN stop_answer(id, reason, v_ended, v_stop.outcome, v_stop.status, v_stop.executions_stopped, v_stop.at, v_stop.left_alone);
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_job(text, text, boolean, jsonb) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_job(text, text, boolean, jsonb) IS
    'Stops a job and all its executions for good; returns the JSON summary, or {error, job_id} for an unknown job. Raises 55P03, '
    'with the sessions that hold the job as JSON in DETAIL, after lock_timeout (10 s where that is 0); force => true ends those first. '
    '25000 above READ COMMITTED, 25006 in a read-only transaction, 22023 for a reason of more than 1000 characters, 27000 if a trigger '
    'or a rule undoes the stop. Locks the job''s barrier, its active executions and its row until the transaction ends.';
