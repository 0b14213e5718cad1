-- emergency_stop_job(id, reason, force, caller): stops a job and all its executions, for good, in the caller's
-- transaction.
-- Returns  {"ok": true, "message": "Job emergency stopped", "job_id": "a", "previous_status": "processing",
--           "new_status": "failed", "executions_stopped": 42, "stopped_at": "2025-09-29T23:48:00Z"}
--          {"ok": true, "message": "Job already in terminal state", "job_id": "a", "status": "failed",
--           "action": "none"}
--          the same with "action": "executions_stopped", "executions_stopped": 3, "stopped_at": ..., if a job that
--          had ended still had active executions
--          {"error": "job not found", "job_id": "a"}
--          and, as the last keys, where they apply: "reason"; "sessions_ended": 2; "left_alone": {"queued": 10}, the
--          executions in states that are none of the six
-- Raises   invalid_parameter_value (22023)    reason has more than 1,000 characters, or caller is no JSON object
--          invalid_transaction_state (25000)  the transaction is REPEATABLE READ or SERIALIZABLE
--          read_only_sql_transaction (25006)  the transaction is read-only, as every one on a standby
--          lock_not_available (55P03)         others held the job for longer than lock_timeout (10 s where that is 0).
--                                             DETAIL is a JSON array, the rows of emergency_stop_blockers(id); it is
--                                             empty where another stop of the job is at work, or transactions have
--                                             held the job in turn. There is none where a trigger of the
--                                             application's has waited for something else. With force, if one may
--                                             not be ended and so none is: {"blocked_by": [...], "not_ended": [...]};
--                                             if others hold it after some were ended: "sessions_ended": 2 is added
--          triggered_data_change_violation (27000)  a trigger or a rule of the application's undid the stop
-- Locks    the job's barrier, alone; then its active executions and its row, FOR NO KEY UPDATE, in the order that
--          works; where sessions share the lock of a row, its table, EXCLUSIVE; all until the transaction ends. With
--          nothing to stop or to record it locks nothing. With force it ends the sessions that have held the job for
--          lock_timeout, and then waits for as long once more, but at least 1 s.
--
-- The cost of a stop is mostly that of plpgsql's own: each function that is called, each statement and each expression
-- is made ready anew in each transaction. So the way of a stop that meets nobody has few of them.

-- wait_for_barrier(barrier, wait): takes a job's barrier alone, in its turn; returns whether it was got in that time.
CREATE OR REPLACE FUNCTION wait_for_barrier(barrier bigint, wait interval)
RETURNS boolean LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
BEGIN
    PERFORM limit_lock_wait(wait);
    PERFORM pg_advisory_xact_lock(barrier);
    RETURN true;
EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
    RETURN false;  -- in a deadlock the caller's transaction holds what another one needs
END;
$$;

-- lock_job_row(id, wait, lock_table): locks a job's row FOR NO KEY UPDATE; before it, if sessions share it, the table.
-- Returns how much of the time is left. Raises 55P03 if others hold the row for longer.
CREATE OR REPLACE FUNCTION lock_job_row(id text, wait interval, lock_table boolean)
RETURNS interval LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id    CONSTANT jobs.id%TYPE := lock_job_row.id;
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

-- lock_rows(id, wait, job_first): locks a job's active executions and its row, first what is free, then what is held.
-- The time counts only while it waits, since locking many executions takes a while by itself. Raises 55P03 after it.
CREATE OR REPLACE FUNCTION lock_rows(id text, wait interval, job_first boolean)
RETURNS void LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id    CONSTANT jobs.id%TYPE := lock_rows.id;
    v_rest  interval := wait;
    v_held  record;
    v_began timestamptz;
BEGIN
    IF job_first THEN
        v_rest := lock_job_row(lock_rows.id, v_rest, lock_table => false);
    END IF;
    LOOP
        -- What is free is locked anew after each wait: workers who have given way would take it again.
        WITH free AS (
            SELECT e.id
            FROM executions e
            WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing')
            FOR NO KEY UPDATE SKIP LOCKED
        )
        SELECT h.id INTO v_held
        FROM (SELECT e.id
              FROM executions e
              WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing')
              EXCEPT
              SELECT f.id FROM free f) h
        LIMIT 1;
        EXIT WHEN NOT FOUND;
        v_began := clock_timestamp();
        PERFORM limit_lock_wait(v_rest);
        BEGIN  -- as in lock_job_row()
            PERFORM FROM executions e WHERE e.id = v_held.id FOR SHARE SKIP LOCKED;
            IF FOUND THEN
                RAISE triggered_action_exception;
            END IF;
        EXCEPTION WHEN triggered_action_exception THEN
            LOCK TABLE executions IN EXCLUSIVE MODE;
        END;
        PERFORM
        FROM executions e
        WHERE e.id = v_held.id AND e.job_id = v_id AND e.status IN ('pending', 'running', 'processing')
        FOR NO KEY UPDATE;
        v_rest := v_rest - (clock_timestamp() - v_began);
    END LOOP;
    PERFORM lock_job_row(lock_rows.id, v_rest, lock_table => true);
END;
$$;

-- unfinished_executions(id): how many executions of a job are in each state that is not terminal.
-- Returns  {"pending": 14, "queued": 10}, or NULL if there are none
CREATE OR REPLACE FUNCTION unfinished_executions(id text)
RETURNS jsonb LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id CONSTANT jobs.id%TYPE := unfinished_executions.id;
BEGIN
    RETURN (SELECT jsonb_object_agg(u.status, u.executions)
            FROM (SELECT e.status, count(*) AS executions
                  FROM executions e
                  WHERE e.job_id = v_id AND e.status NOT IN ('completed', 'failed', 'cancelled')
                  GROUP BY e.status) u);
END;
$$;

-- last_record(id): the action of a job's last record, 'stop' or 'release'; NULL where there is none.
CREATE OR REPLACE FUNCTION last_record(id text)
RETURNS text LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN (SELECT s.action FROM emergency_stops s WHERE s.job_id = last_record.id ORDER BY s.id DESC LIMIT 1);
END;
$$;

-- last_stop_reason(id): the reason of a job's last stop, which has left it in the job's metadata; NULL if it had none.
CREATE OR REPLACE FUNCTION last_stop_reason(id text)
RETURNS text LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN (SELECT s.reason FROM emergency_stops s
            WHERE s.job_id = last_stop_reason.id AND s.action = 'stop'
            ORDER BY s.id DESC LIMIT 1);
END;
$$;

-- marked_executions(id): how many executions of a job are failed, with the mark of a stop.
CREATE OR REPLACE FUNCTION marked_executions(id text)
RETURNS bigint LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id CONSTANT jobs.id%TYPE := marked_executions.id;
BEGIN
    RETURN (SELECT count(*) FROM executions e
            WHERE e.job_id = v_id AND e.status = 'failed' AND e.output @> '{"emergency_stop": true}');
END;
$$;

-- require_stopped(id, new_status, marked, left_alone): raises 27000 if the job has not this status, if left_alone has
-- executions that are active, or if the job or not so many of its executions have the mark of a stop; marked is NULL
-- where there need be none.
CREATE OR REPLACE FUNCTION require_stopped(id text, new_status text, marked bigint, left_alone jsonb)
RETURNS void LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id        CONSTANT jobs.id%TYPE := require_stopped.id;
    v_status    text;
    v_is_marked boolean;
    v_unmarked  CONSTANT bigint :=
        CASE WHEN marked IS NULL THEN 0 ELSE greatest(marked - marked_executions(id), 0) END;
BEGIN
    SELECT j.status, require_stopped.marked IS NULL OR j.metadata @> '{"emergency_stop": true}'
    INTO v_status, v_is_marked
    FROM jobs j WHERE j.id = v_id;
    IF v_unmarked > 0 OR left_alone ?| '{pending,running,processing}'
       OR (v_status = new_status AND v_is_marked) IS NOT TRUE THEN
        RAISE triggered_data_change_violation
            USING MESSAGE = format('job %L could not be stopped: a trigger or a rule of the application undoes it',
                                   require_stopped.id),
                  DETAIL = format('After the updates the job is %s, with the mark: %s. Executions that still run: %s. '
                                  'Executions that are not failed and marked: %s.', COALESCE(v_status, 'gone'),
                                  COALESCE(v_is_marked, false), COALESCE(left_alone::text, 'none'), v_unmarked),
                  HINT = E'Look at the triggers and rules of the tables jobs and executions (\\d in psql), '
                         'and disable the one that does it.';
    END IF;
END;
$$;

-- fire_deferred_triggers(): fires at once what constraint triggers of the two tables would do at the commit.
-- Not those of all tables: before version 18, a trigger that the caller has deferred would get our owner's rights.
CREATE OR REPLACE FUNCTION fire_deferred_triggers()
RETURNS void LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_name name;
BEGIN
    FOR v_name IN
        SELECT c.conname FROM pg_constraint c
        WHERE c.conrelid IN ('jobs'::regclass, 'executions'::regclass) AND c.contype = 't' AND c.condeferrable
    LOOP
        EXECUTE format('SET CONSTRAINTS %I IMMEDIATE', v_name);
    END LOOP;
END;
$$;

-- fail_job(id, new_status, mark, output, at): gives a job this status and mark, and fails its active executions with
-- this output, those included that triggers start meanwhile.
-- Returns  executions_stopped, how many executions it has failed; left_alone, as unfinished_executions
-- Raises   triggered_data_change_violation (27000)  a trigger or a rule of the application's undid it
CREATE OR REPLACE FUNCTION fail_job(
    id text, new_status text, mark jsonb, output jsonb, at timestamptz,
    OUT executions_stopped bigint, OUT left_alone jsonb)
LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id         CONSTANT jobs.id%TYPE := fail_job.id;
    v_is_watched boolean;  -- by triggers or rules of the application's
    v_marked     bigint;   -- executions of earlier stops, where something can change what is written
    v_outer      text;     -- the stop whose trigger has called this one
    v_updated    bigint;
    v_jobs       bigint;
BEGIN
    executions_stopped := 0;
    -- A foreign key that follows what a stop changes leads to a table whose triggers may start executions, too.
    v_is_watched := EXISTS (SELECT FROM pg_trigger t
                            WHERE t.tgrelid IN ('jobs'::regclass, 'executions'::regclass)
                              AND CASE WHEN t.tgisinternal THEN t.tgfoid::regproc IN (
                                           '"RI_FKey_cascade_upd"', '"RI_FKey_setnull_upd"', '"RI_FKey_setdefault_upd"')
                                       ELSE t.tgname NOT IN ('guard_inserted_executions', 'guard_updated_execution',
                                                             'guard_updated_job') END)
        OR EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class IN ('jobs'::regclass, 'executions'::regclass));
    IF v_is_watched THEN
        v_outer := current_setting('beacon_stop.stopping', true);
        -- By the barrier's number, since another schema can have a job of this id.
        PERFORM set_config('beacon_stop.stopping', job_barrier(fail_job.id)::text, true);
        -- Triggers that fire before ours, and rules.
        IF EXISTS (SELECT FROM pg_trigger t
                   WHERE t.tgrelid IN ('jobs'::regclass, 'executions'::regclass)
                     AND NOT t.tgisinternal AND t.tgtype & 18 = 18)
           OR EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class IN ('jobs'::regclass, 'executions'::regclass)) THEN
            v_marked := CASE WHEN mark ? 'emergency_stop' THEN marked_executions(fail_job.id) ELSE 0 END;
        END IF;
    END IF;
    FOR v_round IN 1..10 LOOP
        -- as_object() is written out here, because calling a function for each row would cost more than the rest.
        UPDATE executions e
        SET status = 'failed',
            completed_at = fail_job.at,
            output = CASE WHEN jsonb_typeof(e.output) = 'object' THEN e.output || fail_job.output
                          WHEN e.output <> 'null'
                          THEN jsonb_build_object('previous_output', e.output) || fail_job.output
                          ELSE fail_job.output
                     END
        WHERE e.job_id = v_id AND e.status IN ('pending', 'running', 'processing');
        GET DIAGNOSTICS v_updated = ROW_COUNT;
        executions_stopped := executions_stopped + v_updated;
        IF v_round = 1 THEN
            UPDATE jobs j
            SET status = fail_job.new_status,
                updated_at = fail_job.at,
                metadata = CASE WHEN j.metadata IS NULL THEN fail_job.mark
                                -- Without the reason of the last stop. A reason of somebody else's stays.
                                WHEN fail_job.mark ? 'emergency_stop'
                                     AND j.metadata ->> 'reason' = last_stop_reason(fail_job.id)
                                THEN j.metadata - 'reason' || fail_job.mark
                                ELSE as_object(j.metadata, 'previous_metadata') || fail_job.mark
                           END
            WHERE j.id = v_id;
            GET DIAGNOSTICS v_jobs = ROW_COUNT;
        END IF;
        IF v_is_watched THEN  -- a deferred trigger would start its executions after the look that follows
            PERFORM fire_deferred_triggers();
        END IF;
        PERFORM FROM executions e
        WHERE e.job_id = v_id AND e.status NOT IN ('completed', 'failed', 'cancelled') LIMIT 1;
        IF NOT FOUND THEN
            left_alone := NULL;
            EXIT;
        END IF;
        left_alone := unfinished_executions(fail_job.id);
        EXIT WHEN (left_alone ?| '{pending,running,processing}') IS NOT TRUE;
    END LOOP;
    IF v_is_watched THEN
        PERFORM set_config('beacon_stop.stopping', v_outer, true);
    END IF;

    IF v_marked IS NOT NULL OR v_jobs <> 1 OR left_alone ?| '{pending,running,processing}' THEN
        PERFORM require_stopped(fail_job.id, new_status, CASE
            WHEN mark ? 'emergency_stop' THEN COALESCE(v_marked, 0) + executions_stopped END, left_alone);
    END IF;
END;
$$;

-- answer_if_ended(id, asked_id, sessions_ended, barrier): what emergency_stop_job answers if nothing is to be stopped
-- or recorded, else NULL. It changes and locks nothing. Raises 55P03 if the job has ended, but others hold its barrier.
CREATE OR REPLACE FUNCTION answer_if_ended(id text, asked_id text, sessions_ended int, barrier bigint)
RETURNS json LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id         CONSTANT jobs.id%TYPE := answer_if_ended.id;
    v_status     text;
    v_is_marked  boolean;
    v_left_alone jsonb;
    v_xmax       xid;
    v_last_xmax  xid;
BEGIN
    -- Nobody starts an execution of a job that has ended, so what is committed is all there is. A transaction that was
    -- admitted before the end may still be open, but then it holds the barrier. A transaction that sets the job back
    -- shows in xmax; a job with a mark is set back only by a release, which holds the barrier. The barrier is given
    -- back at once, because a lock that outlives the call costs more.
    LOOP
        SELECT j.status, j.xmax, j.metadata @> '{"emergency_stop": true}'
        INTO v_status, v_xmax, v_is_marked
        FROM jobs j
        WHERE j.id = v_id AND j.status IN ('completed', 'failed', 'cancelled');
        IF NOT FOUND THEN
            RETURN NULL;
        END IF;
        IF NOT (pg_try_advisory_lock(barrier) AND pg_advisory_unlock(barrier)) THEN
            -- A mark that the last stop has left, and no release has taken: nobody was admitted since. Then those who
            -- share the barrier insert executions that have ended. A release does not share it.
            PERFORM
            FROM jobs j, LATERAL (SELECT s.action, s.stopped_at FROM emergency_stops s
                                  WHERE s.job_id = answer_if_ended.id ORDER BY s.id DESC LIMIT 1) AS r
            WHERE j.id = v_id AND v_is_marked AND r.action = 'stop'
              AND j.metadata ->> 'stopped_at' = utc_seconds(r.stopped_at);
            IF NOT FOUND OR NOT (pg_try_advisory_lock_shared(barrier) AND pg_advisory_unlock_shared(barrier)) THEN
                RAISE lock_not_available USING MESSAGE = 'others hold the barrier';
            END IF;
        END IF;
        EXIT WHEN v_is_marked;
        IF (v_status = 'failed' OR answer_if_ended.sessions_ended > 0)
           AND last_record(answer_if_ended.id) IS DISTINCT FROM 'stop'
           OR v_xmax <> '0' AND (mxid_age(v_xmax) > 0 OR is_running(v_xmax)) THEN
            RETURN NULL;
        END IF;
        -- That transaction may have committed since this statement began: then another look finds another row.
        EXIT WHEN v_xmax IN ('0', v_last_xmax);
        v_last_xmax := v_xmax;
    END LOOP;
    PERFORM FROM executions e
    WHERE e.job_id = v_id AND e.status NOT IN ('completed', 'failed', 'cancelled') LIMIT 1;
    IF FOUND THEN
        v_left_alone := unfinished_executions(answer_if_ended.id);
        IF v_left_alone ?| '{pending,running,processing}' THEN
            RETURN NULL;
        END IF;
    END IF;

    IF pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn()
       OR current_setting('synchronous_standby_names') <> '' THEN
        -- The transaction that ended the job may not have waited for the disk or the standby. We write a record that
        -- nobody reads: to wait for it is to wait for all that was written before it.
        PERFORM pg_logical_emit_message(true, 'beacon-stop', '');
    END IF;
    RETURN json_strip_nulls(json_build_object(
        'ok', true, 'message', 'Job already in terminal state', 'job_id', asked_id, 'status', v_status,
        'action', 'none', 'sessions_ended', NULLIF(sessions_ended, 0), 'left_alone', v_left_alone));
END;
$$;

-- attempt_stop(id, ...): stops a job, or fails as soon as it cannot get a lock. The first attempt waits for no lock. A
-- later one waits for the given time, and locks all rows before it updates any: an even attempt locks the executions
-- first, an odd one the job, because workers lock in either order. id is the id as it is in the table, asked_id as the
-- caller wrote it.
-- Returns  what emergency_stop_job answers
-- Raises   lock_not_available (55P03), deadlock_detected (40P01)  to be tried again once all locks have been let go of
--          triggered_data_change_violation (27000)  as fail_job
CREATE OR REPLACE FUNCTION attempt_stop(
    id text, asked_id text, reason text, sessions_ended int, caller jsonb, barrier bigint, wait interval, attempt int)
RETURNS json LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
SET lock_timeout = '5ms'
AS $$
DECLARE
    v_id           CONSTANT jobs.id%TYPE := attempt_stop.id;
    v_at           CONSTANT timestamptz := clock_timestamp();
    v_status       text;
    v_new_status   text := 'failed';
    v_has_ended    boolean;
    v_left_alone   jsonb;
    v_stopped_at   text;  -- this and the next are NULL where there is nothing to stop
    v_executions   bigint;
    v_failed       record;
BEGIN
    IF pg_try_advisory_xact_lock(barrier) THEN
        IF attempt > 1 THEN
            PERFORM limit_lock_wait(wait);
            PERFORM lock_rows(attempt_stop.id, wait, job_first => attempt % 2 = 1);
        END IF;
        SELECT COALESCE(j.status, 'unknown'), COALESCE(j.status IN ('completed', 'failed', 'cancelled'), false)
        INTO v_status, v_has_ended
        FROM jobs j WHERE j.id = v_id FOR NO KEY UPDATE SKIP LOCKED;
    END IF;
    IF v_status IS NULL THEN
        PERFORM FROM jobs j WHERE j.id = v_id;
        IF FOUND THEN
            RAISE lock_not_available
                USING MESSAGE = 'others hold the barrier or the row of the job, or have replaced it';
        END IF;
        RETURN json_build_object('error', 'job not found', 'job_id', asked_id);
    END IF;

    IF v_has_ended THEN
        v_new_status := v_status;
        v_left_alone := unfinished_executions(attempt_stop.id);
    END IF;
    IF NOT v_has_ended OR v_left_alone ?| '{pending,running,processing}' THEN
        v_stopped_at := to_char(v_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');
        v_failed := fail_job(
            attempt_stop.id, v_new_status, jsonb_strip_nulls(jsonb_build_object(
                'emergency_stop', true, 'stopped_at', v_stopped_at, 'stopped_by', 'admin', 'reason', reason)),
            '{"error": "Emergency stop by admin", "emergency_stop": true}', v_at);
        v_executions := v_failed.executions_stopped;
        v_left_alone := v_failed.left_alone;
        PERFORM notify_workers('emergency_stop', json_build_object(
            'job_id', asked_id, 'stopped_at', v_stopped_at, 'executions_stopped', v_executions));
    END IF;
    -- A job that failed by itself is put on record, too, so that no batch restarts it; and that sessions were ended.
    IF v_stopped_at IS NOT NULL
       OR (v_status = 'failed' OR sessions_ended > 0) AND last_record(attempt_stop.id) IS DISTINCT FROM 'stop' THEN
        INSERT INTO emergency_stops (
            action, job_id, previous_status, new_status, executions_stopped, sessions_ended, reason, caller, stopped_at)
        VALUES ('stop', attempt_stop.id, v_status, v_new_status, COALESCE(v_executions, 0),
                attempt_stop.sessions_ended, attempt_stop.reason, attempt_stop.caller, v_at);
        IF NOT FOUND THEN
            RAISE triggered_data_change_violation USING
                MESSAGE = format('the stop of job %L could not be recorded', asked_id),
                HINT = 'A trigger or a rule on table emergency_stops keeps the row from being added. Disable it.';
        END IF;
    END IF;
    -- By the shared lock emergency_stop_blockers tells a stop that is done from one at work, also on other jobs.
    IF current_setting('beacon_stop.is_several', true) IS DISTINCT FROM 'on' THEN
        PERFORM pg_advisory_xact_lock_shared(barrier);
    END IF;
    RETURN json_strip_nulls(json_build_object(
        'ok', true,
        'message', CASE WHEN v_has_ended THEN 'Job already in terminal state' ELSE 'Job emergency stopped' END,
        'job_id', asked_id,
        'status', CASE WHEN v_has_ended THEN v_status END,
        'action', CASE WHEN v_has_ended AND v_stopped_at IS NULL THEN 'none'
                       WHEN v_has_ended THEN 'executions_stopped' END,
        'previous_status', CASE WHEN NOT v_has_ended THEN v_status END,
        'new_status', CASE WHEN NOT v_has_ended THEN v_new_status END,
        'executions_stopped', v_executions, 'stopped_at', v_stopped_at,
        'reason', CASE WHEN v_stopped_at IS NOT NULL THEN reason END,
        'sessions_ended', NULLIF(sessions_ended, 0), 'left_alone', v_left_alone));
END;
$$;

-- stop_in_turn(id, asked_id, ..., began): the stop of a job of which others hold a lock. It gets the barrier in its
-- turn, and then tries again and again. lock_timeout after the call began, it names who holds the job, or ends them and
-- waits once more.
-- Returns  what emergency_stop_job answers
-- Raises   lock_not_available (55P03), as emergency_stop_job
CREATE OR REPLACE FUNCTION stop_in_turn(
    id text, asked_id text, reason text, force boolean, caller jsonb, barrier bigint, began timestamptz)
RETURNS json LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_patience     CONSTANT interval := v_lock_timeout::interval;
    v_deadline     timestamptz := began + v_patience;
    -- Whether we have the barrier.
    v_barred       boolean := wait_for_barrier(barrier, greatest(v_deadline - clock_timestamp(), '1ms'));
    v_began        timestamptz;
    v_wait         interval := interval '5ms';
    v_attempt      int := 1;
    v_terminated   int;  -- how many sessions force has ended; NULL until it has been used
    v_gone         int;
    v_is_last      boolean := false;  -- whether this is the last attempt
    v_problem      text;
    v_context      text;
    v_answer       json;
BEGIN
    LOOP
        v_began := clock_timestamp();
        BEGIN
            v_answer := COALESCE(
                answer_if_ended(id, asked_id, COALESCE(v_terminated, 0), barrier),
                attempt_stop(id, asked_id, reason, COALESCE(v_terminated, 0), caller, barrier, v_wait, v_attempt));
            EXIT;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            -- All locks of the attempt are given back, which dissolves a deadlock with workers.
            GET STACKED DIAGNOSTICS v_problem = MESSAGE_TEXT, v_context = PG_EXCEPTION_CONTEXT;
        END;
        v_barred := v_barred OR wait_for_barrier(barrier, greatest(v_deadline - clock_timestamp(), '1ms'));
        -- Each wait is longer than the last, and at least as long as it took to lock what was free: in each attempt the
        -- stop begins anew at the end of the queue for a row, which may be long.
        v_wait := greatest(v_wait * 4, clock_timestamp() - v_began - v_wait);
        v_wait := least(v_wait, v_deadline - clock_timestamp());
        v_attempt := v_attempt + 1;
        -- From now on it waits for rows, and those who hold them must not wait for the barrier.
        PERFORM wait_for_barrier(barrier # 1, '20ms') WHERE v_attempt = 2;
        CONTINUE WHEN v_barred AND v_wait > '0';

        v_gone := end_or_name_holders(
            asked_id, v_patience, force AND v_terminated IS NULL, CASE
                WHEN NOT v_is_last THEN NULL
                -- All rows were locked by then. So it has waited for something else, such as what a trigger waits for.
                WHEN v_context LIKE ANY ('{%fail_job(%,%INSERT INTO emergency_stops%}') THEN v_problem
                ELSE '' END, v_terminated, substring(v_context FROM 'LOCK TABLE ([a-z]+) IN'));
        v_is_last := v_gone IS NULL;  -- nobody holds it any more
        v_terminated := COALESCE(v_gone, v_terminated);
        v_deadline := clock_timestamp() + CASE WHEN v_is_last THEN '100ms' ELSE greatest(v_patience, '1s') END;
        v_wait := '20ms';
    END LOOP;
    PERFORM set_config('lock_timeout', v_lock_timeout, true);
    RETURN v_answer;
END;
$$;

CREATE OR REPLACE FUNCTION emergency_stop_job(
    id text, reason text DEFAULT NULL, force boolean DEFAULT false, caller jsonb DEFAULT NULL)
RETURNS json LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET timezone FROM CURRENT
SET row_security = off
AS $$
DECLARE
    v_began   CONSTANT timestamptz := clock_timestamp();
    v_id      CONSTANT jobs.id%TYPE := to_job_id(id);
    v_barrier CONSTANT bigint := hashtextextended(v_id::text, 'jobs'::regclass::oid::bigint);  -- as job_barrier()
    v_answer  json;
BEGIN
    IF length(reason) > 1000 OR jsonb_typeof(caller) <> 'object' OR current_setting('lock_timeout') = '0'
       OR current_setting('transaction_read_only')::boolean
       OR current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        PERFORM require_read_committed('emergency_stop_job');
        IF length(reason) > 1000 THEN
            RAISE invalid_parameter_value USING
                MESSAGE = format('reason has %s characters: expected at most 1000', length(reason));
        ELSIF jsonb_typeof(caller) <> 'object' THEN
            RAISE invalid_parameter_value USING
                MESSAGE = format('caller is a JSON %s: expected an object', jsonb_typeof(caller));
        END IF;
        PERFORM set_config('lock_timeout', '10s', true);
        v_answer := emergency_stop_job(id, reason, force, caller);
        PERFORM set_config('lock_timeout', '0', true);
        RETURN v_answer;
    END IF;

    IF v_id IS NULL THEN  -- the type of the column cannot hold this id
        RETURN json_build_object('error', 'job not found', 'job_id', id);
    END IF;
    BEGIN
        v_answer := COALESCE(answer_if_ended(v_id::text, id, 0, v_barrier),
                             attempt_stop(v_id::text, id, reason, 0, caller, v_barrier, '5ms', 1));
    EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
        v_answer := stop_in_turn(v_id::text, id, reason, force, caller, v_barrier, v_began);
    END;
    IF current_setting('synchronous_commit') IN ('off', 'local') THEN
        PERFORM commit_durably();
    END IF;
    RETURN v_answer;
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_job(text, text, boolean, jsonb) FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_job(text, text, boolean, jsonb) IS
    'Stops a job and all its executions for good; returns the JSON summary, or {error, job_id} for an unknown job. '
    'Raises 55P03, with the sessions that hold the job as JSON in DETAIL, after lock_timeout (10 s where that is 0); '
    'force => true ends those first. Raises 25000 above READ COMMITTED, 25006 in a read-only transaction, 22023 for a '
    'reason of more than 1000 characters, 27000 if a trigger or a rule undoes the stop. '
    'Locks the job''s barrier, its active executions and its row until the transaction ends.';
