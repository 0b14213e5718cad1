-- The guard: what is stopped stays stopped, whoever writes, however they write.
--
-- Every job has a barrier, an advisory lock whose key is made of the job's id. Whoever starts an execution holds
-- it shared until their transaction ends, and the stop takes it alone. Advisory locks queue fairly, row locks do
-- not: a stop that waits for the job's row is overtaken by inserters (their foreign key shares it) for ever.
-- A second advisory lock is the stop's sign that it waits for rows: whoever queues for the barrier then gives way.

-- admit_execution(job_id): lets the calling transaction start executions of a job, if the job has not ended.
-- Raises   object_not_in_prerequisite_state (55000)  the job is in a terminal state
--          serialization_failure (40001)             above READ COMMITTED: the job has changed since the snapshot
--          deadlock_detected (40P01)                 a stop of it waits for rows that this transaction, or another, has locked
--          lock_not_available (55P03)                a stop of it has taken longer than lock_timeout, if that is set
-- Locks    the job's barrier, shared, until the transaction ends; above READ COMMITTED the job's row for a moment
CREATE OR REPLACE FUNCTION admit_execution(job_id text)
RETURNS void LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_barrier      CONSTANT bigint := hashtextextended(admit_execution.job_id, 'jobs'::regclass::oid::bigint);
    v_yield        CONSTANT bigint := hashtextextended(admit_execution.job_id, 'emergency_stops'::regclass::oid::bigint);
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_deadline     timestamptz;
    v_turn         interval;
    v_turns        int := 0;  -- that we have waited for
    v_in_its_way   boolean;
    v_status       text;
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared(v_barrier) THEN
        -- A stop is at work, or queues for the barrier: so do we. If it waits for us, one has to give way, and
        -- PostgreSQL looks for that only once a wait, too early where a stop waits for several. Hence turns. A stop
        -- that waits for the job's rows says so: it will need ours, if we have any, and will refuse us in any case.
        -- For other ways to be in its way we look after the first turn, since most stops take less, and then ever more
        -- rarely: among many who queue it is dear.
        v_deadline := clock_timestamp() + CASE v_lock_timeout WHEN '0' THEN '100 years' ELSE v_lock_timeout END::interval;
        LOOP
            v_in_its_way := NOT (pg_try_advisory_lock_shared(v_yield) AND pg_advisory_unlock_shared(v_yield));
            IF NOT v_in_its_way AND (v_turns IN (1, 2, 4) OR v_turns > 0 AND v_turns % 8 = 0) THEN
                v_in_its_way := EXISTS (
                    WITH RECURSIVE waits (pid) AS (
                        SELECT l.pid
                        FROM pg_locks l
                        WHERE l.locktype = 'advisory' AND l.mode = 'ExclusiveLock' AND l.objsubid = 1
                          AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
                          AND l.classid = (v_barrier >> 32 & 4294967295)::oid AND l.objid = (v_barrier & 4294967295)::oid
                        UNION
                        SELECT b.pid FROM waits w CROSS JOIN unnest(pg_blocking_pids(w.pid)) AS b (pid)
                    )
                    SELECT FROM waits w WHERE w.pid = pg_backend_pid());
            END IF;
            IF v_in_its_way THEN
                RAISE deadlock_detected
                    USING MESSAGE = format('deadlock with an emergency stop of job %s', quote_literal(admit_execution.job_id)),
                          DETAIL = 'The stop waits for rows that this transaction, or another, has locked. It goes first.';
            ELSIF clock_timestamp() >= v_deadline THEN
                RAISE lock_not_available
                    USING MESSAGE = format('an emergency stop of job %s is under way', quote_literal(admit_execution.job_id));
            END IF;
            BEGIN
                v_turn := greatest('1ms', least('200ms', v_deadline - clock_timestamp()));
                PERFORM set_config('lock_timeout', extract(epoch FROM v_turn) || 's', true);
                PERFORM pg_advisory_xact_lock_shared(v_barrier);
                EXIT;
            EXCEPTION WHEN lock_not_available THEN
                v_turns := v_turns + 1;
            END;
        END LOOP;
        PERFORM set_config('lock_timeout', v_lock_timeout, true);
    END IF;

    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        -- An old snapshot shows the status from before the stop. Locking the row fails if it has changed since; but not
        -- FOR KEY SHARE, which the foreign key may have got before that, and SKIP LOCKED passes over a changed row that
        -- others still queue for. The lock is let go of at once, since it would hold up every update of the job, and
        -- not waited for: who holds it is most likely about to change the row.
        BEGIN
            SELECT j.status INTO v_status FROM jobs j WHERE j.id = admit_execution.job_id FOR SHARE NOWAIT;
            RAISE triggered_action_exception;
        EXCEPTION
            WHEN triggered_action_exception THEN
            WHEN lock_not_available THEN
                RAISE serialization_failure
                    USING MESSAGE = format('could not serialize access: job %s is being changed', quote_literal(admit_execution.job_id)),
                          HINT = 'Try the transaction again, or use READ COMMITTED.';
        END;
    ELSE
        SELECT j.status INTO v_status FROM jobs j WHERE j.id = admit_execution.job_id;
    END IF;

    IF v_status IN ('completed', 'failed', 'cancelled') THEN
        RAISE object_not_in_prerequisite_state
            USING MESSAGE = format('job %s is %s: no execution of it may start', quote_literal(admit_execution.job_id), v_status),
                  HINT = 'A job in a terminal state takes executions again when its status is set back first.';
    END IF;
END;
$$;
REVOKE ALL ON FUNCTION admit_execution(text) FROM PUBLIC;
COMMENT ON FUNCTION admit_execution(text) IS
    'Lets this transaction start executions of a job that has not ended; raises 55000 otherwise. Holds the job''s barrier, shared, until the transaction ends.';

-- guard_inserted_executions(): refuses new active executions of a job that has ended, once a job, not once a row.
-- Raises   what admit_execution raises
-- Locks    what admit_execution locks, for each distinct job in the order of the ids
CREATE OR REPLACE FUNCTION guard_inserted_executions()
RETURNS trigger LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_job_id text;
BEGIN
    -- The common case, for which every insert pays: one job, which goes on, and no stop of it about. What is known of it
    -- is asked for in few statements and expressions, since each costs more than what it does.
    SELECT CASE WHEN pg_try_advisory_xact_lock_shared(hashtextextended(i.job_id, 'jobs'::regclass::oid::bigint))
                     AND current_setting('transaction_isolation') = 'read committed' THEN i.job_id END
    INTO v_job_id
    FROM inserted i;  -- INTO takes one row, LIMIT would cost more
    -- In a statement of its own, whose snapshot is younger than the lock. EXISTS would cost more than the join.
    PERFORM
    FROM jobs j
    LEFT JOIN inserted i ON i.job_id <> j.id
    WHERE j.id = v_job_id AND j.status NOT IN ('completed', 'failed', 'cancelled') AND i.job_id IS NULL;
    IF FOUND THEN
        RETURN NULL;
    END IF;

    PERFORM admit_execution(i.job_id)
    FROM (SELECT DISTINCT n.job_id FROM inserted n WHERE n.status IN ('pending', 'running', 'processing') ORDER BY 1) i;
    RETURN NULL;
END;
$$;
REVOKE ALL ON FUNCTION guard_inserted_executions() FROM PUBLIC;
COMMENT ON FUNCTION guard_inserted_executions() IS 'Trigger: no active execution is added to a job that has ended.';

-- guard_updated_execution(): refuses an update that makes an execution active, or moves an active one to another job,
-- when the job it then belongs to has ended. Keeps an execution that an emergency stop failed as it is, its mark
-- included: other keys of its output may be added or changed, and it is released by taking the mark away and setting
-- another status in one UPDATE that keeps the rest of the output.
-- Raises   what admit_execution raises; object_not_in_prerequisite_state (55000)
-- Locks    what admit_execution locks, after the execution's row
CREATE OR REPLACE FUNCTION guard_updated_execution()
RETURNS trigger LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    IF NEW.status IN ('pending', 'running', 'processing') THEN
        PERFORM admit_execution(NEW.job_id);
    END IF;
    IF OLD.status = 'failed' AND OLD.output @> '{"emergency_stop": true}' AND (
        NEW.status = 'failed' AND NEW.output @> '{"emergency_stop": true}'
        OR NEW.status <> 'failed' AND NOT NEW.output ? 'emergency_stop' AND NEW.output @> (OLD.output - 'emergency_stop')
    ) IS NOT TRUE THEN
        RAISE object_not_in_prerequisite_state
            USING MESSAGE = format('execution %s of job %s was failed by an emergency stop and stays so', OLD.id, quote_literal(OLD.job_id)),
                  HINT = 'To release it on purpose: UPDATE executions SET output = output - ''emergency_stop'', status = ... in one statement.';
    END IF;
    RETURN NULL;
END;
$$;
REVOKE ALL ON FUNCTION guard_updated_execution() FROM PUBLIC;
COMMENT ON FUNCTION guard_updated_execution() IS
    'Trigger: no execution becomes active in a job that has ended; one that an emergency stop failed stays failed and marked.';

-- guard_updated_job(): keeps a job that was emergency-stopped as it is, its mark and its id included.
-- Other keys of its metadata may be added or changed. It is released by taking the mark away and setting another
-- status in one UPDATE that keeps the rest of the metadata: a stale copy written back does not do that by chance.
-- Raises   object_not_in_prerequisite_state (55000)
-- Locks    nothing
CREATE OR REPLACE FUNCTION guard_updated_job()
RETURNS trigger LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    IF OLD.metadata @> '{"emergency_stop": true}' AND (
        NEW.id = OLD.id
        AND (NEW.status = OLD.status AND NEW.metadata @> '{"emergency_stop": true}'
             OR NEW.status <> OLD.status AND NOT NEW.metadata ? 'emergency_stop' AND NEW.metadata @> (OLD.metadata - 'emergency_stop'))
    ) IS NOT TRUE THEN
        RAISE object_not_in_prerequisite_state
            USING MESSAGE = format('job %s is %s by an emergency stop and stays so', quote_literal(OLD.id), OLD.status),
                  HINT = 'To release it on purpose: UPDATE jobs SET metadata = metadata - ''emergency_stop'', status = ... in one statement.';
    END IF;
    RETURN NULL;
END;
$$;
REVOKE ALL ON FUNCTION guard_updated_job() FROM PUBLIC;
COMMENT ON FUNCTION guard_updated_job() IS 'Trigger: a job that was emergency-stopped keeps its status, its mark and its id.';

-- AFTER triggers see the row as it ends up, whatever other triggers have made of it. A WHEN clause is read and planned
-- anew in each statement, which would cost more than the rest of a one-row update: so they only let through what every
-- worker does, in as few words as possible, and the functions look closer.
DO $$
DECLARE
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_deadline     CONSTANT timestamptz := clock_timestamp() + interval '10s';
    v_tables       text[] := '{jobs,executions}';
BEGIN
    IF to_regprocedure('guard_started_execution()') IS NOT NULL THEN  -- of an earlier installation, with all rules in the WHEN clauses
        -- Workers lock the tables in either order. Whichever we took first and kept, some of them would be in a deadlock with us.
        LOOP
            BEGIN
                PERFORM set_config('lock_timeout', '200ms', true);
                EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', v_tables[1]);
                PERFORM set_config('lock_timeout', '20ms', true);
                EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', v_tables[2]);
                EXIT;
            EXCEPTION WHEN lock_not_available THEN
                IF clock_timestamp() > v_deadline THEN
                    RAISE;
                END IF;
                v_tables := ARRAY[v_tables[2], v_tables[1]];
                PERFORM pg_sleep(0.05);
            END;
        END LOOP;
        PERFORM set_config('lock_timeout', v_lock_timeout, true);
        DROP FUNCTION guard_started_execution(), guard_stopped_execution(), guard_stopped_job() CASCADE;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = to_regclass('executions') AND t.tgname = 'guard_inserted_executions') THEN
        CREATE TRIGGER guard_inserted_executions AFTER INSERT ON executions
            REFERENCING NEW TABLE AS inserted
            FOR EACH STATEMENT EXECUTE FUNCTION guard_inserted_executions();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = to_regclass('executions') AND t.tgname = 'guard_updated_execution') THEN
        CREATE TRIGGER guard_updated_execution AFTER UPDATE ON executions
            FOR EACH ROW WHEN ((OLD.status = ANY ('{pending,running,processing}')) IS NOT TRUE OR NEW.job_id IS DISTINCT FROM OLD.job_id)
            EXECUTE FUNCTION guard_updated_execution();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = to_regclass('jobs') AND t.tgname = 'guard_updated_job') THEN
        CREATE TRIGGER guard_updated_job AFTER UPDATE ON jobs
            FOR EACH ROW WHEN (OLD.status = ANY ('{completed,failed,cancelled}'))
            EXECUTE FUNCTION guard_updated_job();
    END IF;
END;
$$;
