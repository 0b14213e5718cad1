-- emergency_stop_job(id, reason): stops a job and all its executions, in the caller's transaction, for good.
-- Returns  {"ok": true, "message": "Job emergency stopped", "job_id": "a", "previous_status": "processing",
--           "new_status": "failed", "executions_stopped": 42, "stopped_at": "2025-09-29T23:48:00Z"}
--          {"ok": true, "message": "Job already in terminal state", "job_id": "a", "status": "failed", "action": "none"}
--          the same with "action": "executions_stopped", "executions_stopped": 3, "stopped_at": ..., if a job that
--          had ended still had active executions
--          {"error": "job not found", "job_id": "a"}
--          and, where something was stopped and a reason was given, "reason" as the last key
-- Raises   invalid_parameter_value (22023)    reason has more than 1,000 characters
--          invalid_transaction_state (25000)  the transaction is REPEATABLE READ or SERIALIZABLE
--          read_only_sql_transaction (25006)  the transaction is read-only, as every one on a standby
--          lock_not_available (55P03)         other transactions held the job for longer than lock_timeout
-- Locks    the job's barrier, alone; then its active executions, then its row, FOR NO KEY UPDATE, or its row first where
--          that does not work; once it has waited for rows, also the sign by which those who queue for the barrier give
--          way; all until the transaction ends. Each wait is bounded by lock_timeout, by 10 s where that is 0. With
--          nothing left to stop it locks and writes nothing, and only waits until a synchronous standby, if there is
--          one, has what was written before.

CREATE OR REPLACE FUNCTION emergency_stop_job(id text, reason text DEFAULT NULL)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_barrier      CONSTANT bigint := hashtextextended(emergency_stop_job.id, 'jobs'::regclass::oid::bigint);
    v_yield        CONSTANT bigint := hashtextextended(emergency_stop_job.id, 'emergency_stops'::regclass::oid::bigint);
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_patience     CONSTANT interval := CASE v_lock_timeout WHEN '0' THEN '10s' ELSE v_lock_timeout END::interval;
    v_mark         CONSTANT jsonb := '{"error": "Emergency stop by admin", "emergency_stop": true}';
    v_rest         interval := v_patience;  -- what is left of it
    v_wait         interval;
    v_deadline     timestamptz;
    v_attempt      int := 1;
    v_job_locked   boolean;
    v_held         bigint;
    v_status       text;  -- not jobs%ROWTYPE: compiling that would wait, unbounded, where somebody has locked the table
    v_terminal     boolean;
    v_done         boolean := false;
    v_locked       boolean := false;
    v_stopped      bigint;
    v_now          timestamptz;
    v_stopped_at   text;
    v_notice       text;
BEGIN
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        RAISE invalid_transaction_state
            USING MESSAGE = format('emergency_stop_job cannot run in a %s transaction', upper(current_setting('transaction_isolation'))),
                  DETAIL = 'Its snapshot would not show executions that others have added since.',
                  HINT = 'Call it in a READ COMMITTED transaction.';
    END IF;
    IF current_setting('transaction_read_only')::boolean THEN
        RAISE read_only_sql_transaction
            USING MESSAGE = 'emergency_stop_job cannot run in a read-only transaction',
                  DETAIL = 'On a standby, jobs may be missing, or not yet be what they are on the primary.',
                  HINT = 'Call it on the primary.';
    END IF;
    IF length(emergency_stop_job.reason) > 1000 THEN
        RAISE invalid_parameter_value
            USING MESSAGE = format('reason has %s characters: expected at most 1000', length(emergency_stop_job.reason));
    END IF;

    BEGIN
        -- First a look that locks nothing. Should the whole table be locked, the wait for it is behind the barrier, by
        -- which emergency_stop_blockers knows a stop that waits.
        PERFORM set_config('lock_timeout', '100ms', true);
        SELECT j.status INTO v_status FROM jobs j WHERE j.id = emergency_stop_job.id;
        IF NOT FOUND THEN
            RAISE no_data_found;
        END IF;
        -- Nobody starts an execution of a job that has ended, so what is committed is all there is, unless a transaction
        -- that was admitted before the end is still open: it holds the barrier. Taken and let go in one expression,
        -- because a lock that outlives the call would cost more than this look.
        IF v_status IN ('completed', 'failed', 'cancelled') AND pg_try_advisory_lock(v_barrier) AND pg_advisory_unlock(v_barrier) THEN
            PERFORM FROM executions e
            WHERE e.job_id = emergency_stop_job.id AND e.status IN ('pending', 'running', 'processing')
            LIMIT 1;
            v_done := NOT FOUND;
        END IF;
    EXCEPTION
        WHEN lock_not_available THEN
            v_done := false;
        WHEN no_data_found THEN
            RETURN json_build_object('error', 'job not found', 'job_id', emergency_stop_job.id);
    END;

    -- From the barrier on nobody else starts an execution. What is left to wait for are the rows that others hold.
    WHILE NOT v_done AND NOT v_locked AND NOT pg_try_advisory_xact_lock(v_barrier) LOOP
        v_now := clock_timestamp();
        BEGIN
            PERFORM set_config('lock_timeout', extract(epoch FROM greatest('1ms', v_rest)) || 's', true);
            PERFORM pg_advisory_xact_lock(v_barrier);
            v_rest := v_rest - (clock_timestamp() - v_now);
            EXIT;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            v_rest := v_rest - (clock_timestamp() - v_now);
            v_locked := v_rest <= '0';
        END;
    END LOOP;
    WHILE NOT v_done AND NOT v_locked LOOP
        BEGIN
            -- Workers lock in different orders, so there are three ways. First, rows are waited for where they are met; not for
            -- long, for meanwhile others would lock rows further on and queue for the barrier. Then, what is free is locked
            -- before anything is waited for, and whoever queues has to yield. Last, the same with the job before all else.
            -- Nothing is updated in the latter two until all is locked: what was done for a large job is lost once at most.
            v_job_locked := false;
            LOOP
                v_wait := greatest('1ms', least(v_rest, CASE v_attempt WHEN 1 THEN '2ms' WHEN 2 THEN v_patience / 3 END));
                PERFORM set_config('lock_timeout', extract(epoch FROM v_wait) || 's', true);
                EXIT WHEN v_attempt = 1;
                PERFORM pg_advisory_xact_lock(v_yield);
                v_now := clock_timestamp();
                IF v_attempt = 3 AND NOT v_job_locked THEN
                    PERFORM FROM jobs j WHERE j.id = emergency_stop_job.id FOR NO KEY UPDATE;
                    v_rest := v_rest - (clock_timestamp() - v_now);
                    v_job_locked := true;
                    CONTINUE;
                END IF;
                WITH free AS (
                    SELECT e.id
                    FROM executions e
                    WHERE e.job_id = emergency_stop_job.id AND e.status IN ('pending', 'running', 'processing')
                    FOR NO KEY UPDATE SKIP LOCKED
                ), held AS (
                    SELECT e.id
                    FROM executions e
                    WHERE e.job_id = emergency_stop_job.id AND e.status IN ('pending', 'running', 'processing')
                    EXCEPT
                    SELECT f.id FROM free f
                )
                SELECT min(h.id) INTO v_held FROM held h;
                v_now := clock_timestamp();
                IF v_held IS NULL THEN
                    PERFORM FROM jobs j WHERE j.id = emergency_stop_job.id FOR NO KEY UPDATE;
                    EXIT;
                END IF;
                PERFORM
                FROM executions e
                WHERE e.job_id = emergency_stop_job.id AND e.id = v_held AND e.status IN ('pending', 'running', 'processing')
                FOR NO KEY UPDATE;
                v_rest := v_rest - (clock_timestamp() - v_now);
            END LOOP;
            v_now := clock_timestamp();
            v_stopped_at := to_char(v_now AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');
            UPDATE executions e
            SET status = 'failed',
                completed_at = v_now,
                output = CASE WHEN jsonb_typeof(e.output) = 'object' THEN e.output || v_mark
                              WHEN e.output <> 'null' THEN jsonb_build_object('previous_output', e.output) || v_mark
                              ELSE v_mark
                         END
            WHERE e.job_id = emergency_stop_job.id AND e.status IN ('pending', 'running', 'processing');
            GET DIAGNOSTICS v_stopped = ROW_COUNT;

            -- Another stop may have been here before us: with nothing left, nothing is locked or written.
            SELECT j.status INTO STRICT v_status FROM jobs j WHERE j.id = emergency_stop_job.id;
            v_terminal := COALESCE(v_status IN ('completed', 'failed', 'cancelled'), false);
            v_done := v_stopped = 0 AND v_terminal;
            EXIT WHEN v_done;

            -- After the executions: workers who lock one of them and then the job must not find it locked by us.
            SELECT j.status INTO v_status FROM jobs j WHERE j.id = emergency_stop_job.id FOR NO KEY UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                v_attempt := 2;  -- after which the job comes first
                v_wait := greatest('1ms', least(v_rest, v_patience / 3));
                PERFORM set_config('lock_timeout', extract(epoch FROM v_wait) || 's', true);
                PERFORM pg_advisory_xact_lock(v_yield);
                SELECT j.status INTO STRICT v_status FROM jobs j WHERE j.id = emergency_stop_job.id FOR NO KEY UPDATE;
            END IF;
            v_terminal := COALESCE(v_status IN ('completed', 'failed', 'cancelled'), false);
            v_done := v_stopped = 0 AND v_terminal;  -- it has ended while we waited
            EXIT WHEN v_done;
            UPDATE jobs j
            SET status = CASE WHEN v_terminal THEN j.status ELSE 'failed' END,
                updated_at = v_now,
                -- Without the reason of an earlier stop, after which the job was released.
                metadata = CASE WHEN jsonb_typeof(j.metadata) = 'object'
                                THEN j.metadata - CASE WHEN j.metadata ? 'stopped_by' THEN '{reason}' ELSE '{}' END::text[]
                                WHEN j.metadata <> 'null' THEN jsonb_build_object('previous_metadata', j.metadata)
                                ELSE '{}'
                           END || jsonb_strip_nulls(jsonb_build_object('emergency_stop', true, 'stopped_at', v_stopped_at,
                                                                       'stopped_by', 'admin', 'reason', emergency_stop_job.reason))
            WHERE j.id = emergency_stop_job.id;
            INSERT INTO emergency_stops (job_id, previous_status, executions_stopped, reason, stopped_at)
            VALUES (emergency_stop_job.id, COALESCE(v_status, 'unknown'), v_stopped, emergency_stop_job.reason, v_now);
            EXIT;
        EXCEPTION
            WHEN deadlock_detected THEN  -- our rows are let go of, so that the other one can finish; the barrier is kept
                -- By the clock from now on: where each try ends in one at once, the waits alone would add up too slowly.
                v_deadline := COALESCE(v_deadline, clock_timestamp() + v_rest - current_setting('deadlock_timeout')::interval);
                v_locked := clock_timestamp() >= v_deadline;
                v_attempt := CASE v_attempt WHEN 2 THEN 3 ELSE 2 END;
            WHEN lock_not_available THEN
                v_rest := v_rest - v_wait;
                v_locked := v_rest <= '0';
                v_attempt := least(v_attempt + 1, 3);
            WHEN no_data_found THEN  -- deleted while we waited
                PERFORM set_config('lock_timeout', v_lock_timeout, true);
                RETURN json_build_object('error', 'job not found', 'job_id', emergency_stop_job.id);
        END;
    END LOOP;
    IF v_locked THEN
        RAISE lock_not_available
            USING MESSAGE = format('job %s is locked', quote_literal(emergency_stop_job.id)),
                  DETAIL = format('Other transactions have held it for %s; nothing was changed.', v_patience),
                  HINT = 'While a stop waits, SELECT * FROM emergency_stop_blockers(id) in a second session names them.';
    END IF;
    PERFORM set_config('lock_timeout', v_lock_timeout, true);

    -- Acknowledged means flushed, here and by a synchronous standby. It has to hold until the commit, which a SET clause
    -- of the function would not.
    IF current_setting('synchronous_commit') IN ('off', 'local') THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    IF v_done THEN
        -- A commit whose wait for the standby was cut short is visible nevertheless. With a record of our own, which
        -- nobody reads, we wait for all that was written before it.
        IF current_setting('synchronous_standby_names') <> '' THEN
            PERFORM pg_logical_emit_message(true, 'beacon-stop', '');
        END IF;
        RETURN json_build_object('ok', true, 'message', 'Job already in terminal state', 'job_id', emergency_stop_job.id,
                                 'status', v_status, 'action', 'none');
    END IF;

    v_notice := json_build_object('job_id', emergency_stop_job.id, 'stopped_at', v_stopped_at, 'executions_stopped', v_stopped)::text;
    IF octet_length(v_notice) < 8000 THEN  -- else NOTIFY refuses it
        PERFORM pg_notify('emergency_stop', v_notice);
    END IF;

    IF v_terminal THEN
        RETURN json_strip_nulls(json_build_object(
            'ok', true, 'message', 'Job already in terminal state', 'job_id', emergency_stop_job.id, 'status', v_status,
            'action', 'executions_stopped', 'executions_stopped', v_stopped, 'stopped_at', v_stopped_at,
            'reason', emergency_stop_job.reason));
    END IF;
    RETURN json_strip_nulls(json_build_object(
        'ok', true, 'message', 'Job emergency stopped', 'job_id', emergency_stop_job.id,
        'previous_status', COALESCE(v_status, 'unknown'), 'new_status', 'failed',
        'executions_stopped', v_stopped, 'stopped_at', v_stopped_at, 'reason', emergency_stop_job.reason));
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_job(text, text) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_job(text, text) IS
    'Stops a job and all its executions for good; returns the JSON summary, or {error, job_id} for an unknown job. '
    'Raises 55P03 when others hold the job for longer than lock_timeout (10 s where that is 0), 25000 above READ COMMITTED, '
    '25006 in a read-only transaction, 22023 for a reason of more than 1000 characters. Locks the job''s barrier, its row and its active executions until the transaction ends.';
