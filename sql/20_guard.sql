-- The guard: triggers that refuse every statement that would start again what was stopped.
--
-- Every job has a barrier, an advisory lock whose key is made of the job's id. A transaction that starts an execution
-- holds the barrier shared until it ends. A stop takes the barrier alone. Advisory locks queue fairly; row locks do
-- not: inserters, whose foreign key shares the job's row, would for ever overtake a stop that waited for that row.
-- A stop or a release that has the barrier, and waits for rows, has a second lock, whose key differs in the last bit.

-- admit_execution(job_id): lets the calling transaction start executions of a job, if the job has not ended.
-- Raises   object_not_in_prerequisite_state (55000)  the job is in a terminal state
--          serialization_failure (40001)             a stop of the job is at work: try the transaction again; or, above
--                                                    READ COMMITTED, the job has changed since the snapshot
-- Locks    the job's barrier, shared, until the transaction ends. It waits for it for 50 ms at most, and not at all if
--          the stop waits for rows, and others for this transaction. Above READ COMMITTED the job's row for a moment
CREATE OR REPLACE FUNCTION admit_execution(job_id text)
RETURNS void LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
SET row_security = off
AS $$
DECLARE
    v_id           CONSTANT jobs.id%TYPE := to_job_id(admit_execution.job_id);
    v_barrier      CONSTANT bigint := job_barrier(admit_execution.job_id);
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_status       text;
BEGIN
    -- A trigger of the application's that starts an execution inside a stop of this job: the stop fails that one, too.
    -- And what no job can have as its id belongs to none.
    IF current_setting('beacon_stop.stopping', true) = v_barrier::text OR v_id IS NULL THEN
        RETURN;
    END IF;
    IF NOT pg_try_advisory_xact_lock_shared(v_barrier) THEN
        -- A stop is at work. Without any wait, callers who try again at once would take the processor time that it
        -- needs. But while it waits for rows, a transaction whose rows others wait for gives way at once: the stop may
        -- be one of them, or wait for the rows of one. To look for them costs much.
        BEGIN
            IF (pg_try_advisory_lock_shared(v_barrier # 1) AND pg_advisory_unlock_shared(v_barrier # 1)) IS NOT TRUE
               AND EXISTS (SELECT
                           FROM pg_locks w
                           JOIN pg_locks o ON o.transactionid = w.transactionid AND o.pid = pg_backend_pid()
                           WHERE w.locktype = 'transactionid' AND NOT w.granted) THEN
                RAISE lock_not_available;
            END IF;
            PERFORM set_config('lock_timeout', '50ms', true);
            PERFORM pg_advisory_xact_lock_shared(v_barrier);
            PERFORM set_config('lock_timeout', v_lock_timeout, true);
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            RAISE serialization_failure
                USING MESSAGE = format('an emergency stop of job %L is under way', admit_execution.job_id),
                      HINT = 'Try the transaction again.';
        END;
    END IF;

    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        -- An old snapshot shows the status from before the stop. Locking the row fails if it has changed since. It has
        -- to be FOR SHARE, because the foreign key may have got FOR KEY SHARE before the change. The lock is given back
        -- at once, because it would hold up every update of the job. It is not waited for: a session that holds it is
        -- most likely about to change the row. A job that is younger than the snapshot is not seen at all.
        BEGIN
            SELECT j.status INTO v_status FROM jobs j WHERE j.id = v_id FOR SHARE NOWAIT;
            IF NOT FOUND THEN
                RAISE lock_not_available;
            END IF;
            RAISE triggered_action_exception;
        EXCEPTION
            WHEN triggered_action_exception THEN
            WHEN lock_not_available THEN
                RAISE serialization_failure
                    USING MESSAGE = format('could not serialize access: job %L is being changed, '
                                           'or is not in this snapshot', admit_execution.job_id),
                          HINT = 'Try the transaction again, or use READ COMMITTED.';
        END;
    ELSE
        SELECT j.status INTO v_status FROM jobs j WHERE j.id = v_id;
    END IF;

    IF v_status IN ('completed', 'failed', 'cancelled') THEN
        RAISE object_not_in_prerequisite_state
            USING MESSAGE = format('job %L is %s: no execution of it may start', admit_execution.job_id, v_status),
                  HINT = 'A job that was emergency-stopped takes executions again after release_job, '
                         'another one after its status is set back.';
    END IF;
END;
$$;

-- guard_inserted_executions(): refuses new active executions of a job that has ended, once a job, not once a row.
-- Raises   what admit_execution raises
-- Locks    what admit_execution locks, for each distinct job in the order of the ids
CREATE OR REPLACE FUNCTION guard_inserted_executions()
RETURNS trigger LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_job_id executions.job_id%TYPE;
BEGIN
    -- The common case, for which every insert pays: one job, which goes on, and no stop of it about. It is found out in
    -- few statements and expressions, since each costs more than what it does; so job_barrier() is written out here.
    SELECT CASE WHEN pg_try_advisory_xact_lock_shared(hashtextextended(i.job_id::text, 'jobs'::regclass::oid::bigint))
                     AND current_setting('transaction_isolation') = 'read committed' THEN i.job_id END
    INTO v_job_id
    FROM inserted i
    LIMIT 1;  -- INTO would take the first row by itself, but plpgsql.extra_errors can make an error of the others
    -- In a statement of its own, whose snapshot is younger than the lock. EXISTS would cost more than the join.
    PERFORM
    FROM jobs j
    LEFT JOIN inserted i ON i.job_id <> j.id
    WHERE j.id = v_job_id AND j.status NOT IN ('completed', 'failed', 'cancelled') AND i.job_id IS NULL;
    IF FOUND THEN
        RETURN NULL;
    END IF;

    PERFORM admit_execution(i.job_id::text)
    FROM (SELECT DISTINCT n.job_id FROM inserted n WHERE n.status IN ('pending', 'running', 'processing') ORDER BY 1) i;
    RETURN NULL;
END;
$$;

-- guard_updated_execution(): refuses an update that makes an execution active, or moves an active one to another job,
-- when the job it then belongs to has ended. An execution that an emergency stop failed stays failed and keeps its
-- mark for ever; other keys of its output may be added or changed.
-- Raises   what admit_execution raises; object_not_in_prerequisite_state (55000)
-- Locks    what admit_execution locks, after the execution's row
CREATE OR REPLACE FUNCTION guard_updated_execution()
RETURNS trigger LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    IF NEW.status IN ('pending', 'running', 'processing') THEN
        PERFORM admit_execution(NEW.job_id::text);
    END IF;
    IF OLD.status = 'failed' AND OLD.output @> '{"emergency_stop": true}'
       AND (NEW.status = 'failed' AND NEW.output @> '{"emergency_stop": true}') IS NOT TRUE THEN
        RAISE object_not_in_prerequisite_state
            USING MESSAGE = format('execution %s of job %L was failed by an emergency stop and stays so',
                                   OLD.id, OLD.job_id),
                  HINT = 'Start a new execution after the job has been released with release_job.';
    END IF;
    RETURN NULL;
END;
$$;

-- guard_updated_job(): a job that was emergency-stopped keeps its status, its mark and its id, whatever else the
-- statement does; other keys of its metadata may be added or changed. Only release_job takes the mark away.
-- Raises   object_not_in_prerequisite_state (55000)
-- Locks    nothing
CREATE OR REPLACE FUNCTION guard_updated_job()
RETURNS trigger LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    IF OLD.metadata @> '{"emergency_stop": true}'
       AND (NEW.id = OLD.id AND NEW.status = OLD.status AND NEW.metadata @> '{"emergency_stop": true}') IS NOT TRUE
       AND current_setting('beacon_stop.releasing', true) IS DISTINCT FROM job_barrier(OLD.id::text)::text THEN
        RAISE object_not_in_prerequisite_state
            USING MESSAGE = format('job %L is %s by an emergency stop and stays so', OLD.id, OLD.status),
                  HINT = 'To let it go on: SELECT release_job(id, reason, status).';
    END IF;
    RETURN NULL;
END;
$$;
