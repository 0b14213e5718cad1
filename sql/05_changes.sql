-- What an installation has to change, and the lock under which it does so.

-- lock_all_tables(): locks all of our tables that exist in ACCESS EXCLUSIVE mode, or none of them. Workers lock jobs and
-- executions in either order, so an installer that kept one of them while it waits for the other would be in a deadlock
-- with some. So it waits for a short time only, and lets go of all after one wait that was not enough. It tries often and
-- at random times, until no worker is between the two.
-- Raises   lock_not_available (55P03)  others have used the tables for longer than lock_timeout, or a minute where that is 0
CREATE OR REPLACE FUNCTION lock_all_tables()
RETURNS void LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_deadline     CONSTANT timestamptz := clock_timestamp() + COALESCE(NULLIF(v_lock_timeout, '0'), '1min')::interval;
    v_first_wait   int := 100;  -- milliseconds; the longer, the longer the transactions that it can wait for
    v_table        regclass;
    v_tables       regclass[] := array_remove(ARRAY[to_regclass('executions'), to_regclass('jobs'),
                                                    to_regclass('emergency_stops'), to_regclass('batch_changes')], NULL);
BEGIN
    LOOP
        BEGIN
            PERFORM set_config('lock_timeout', v_first_wait || 'ms', true);
            FOREACH v_table IN ARRAY v_tables LOOP
                EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', v_table);
                -- Mostly a few milliseconds, and sometimes as long as one may hold up workers of both kinds.
                PERFORM set_config('lock_timeout', 1 + 300 * random() ^ 4 || 'ms', true);
            END LOOP;
            EXIT;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            IF clock_timestamp() > v_deadline THEN
                RAISE lock_not_available
                    USING MESSAGE = 'the tables are in use: nothing was changed',
                          DETAIL = 'Sessions that use them: ' || (
                              SELECT string_agg(DISTINCT format('pid %s (%s, %s)', l.pid, a.usename, a.application_name), '; ')
                              FROM pg_locks l
                              LEFT JOIN pg_stat_activity a ON a.pid = l.pid
                              WHERE l.granted AND l.relation = ANY (v_tables)),
                          HINT = 'Wait for their transactions or end them, or set a longer lock_timeout; then try again.';
            END IF;
            IF v_table = v_tables[1] THEN
                v_first_wait := least(v_first_wait * 2, 1600);
            END IF;
            -- The table that was not free comes first now.
            v_tables := v_table || array_remove(v_tables, v_table);
            PERFORM pg_sleep(0.01 * random());
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', v_lock_timeout, true);
END;
$$;

-- missing_indexes(): the indexes that our tables lack, or that are of no use; see installation_steps().
-- The stop finds a job's active executions, the listing a job's executions in the order of their ids, and the batches
-- their jobs, whatever the size of the tables. A stop adds a second entry for each active execution to the index on
-- (job_id, id), which has room for it.
CREATE OR REPLACE FUNCTION missing_indexes()
RETURNS TABLE (does text, statement text, fault text) LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT format('index %s: %s', w.name, CASE WHEN c.oid IS NULL THEN 'made' ELSE 'invalid or not as it must be, made again' END),
           CASE WHEN c.oid IS NOT NULL THEN format('DROP INDEX %I; ', w.name) ELSE '' END
           || format('CREATE INDEX %I ON %I %s', w.name, w.table_name, w.definition),
           CASE WHEN w.stops_need_it AND to_regclass(w.table_name) IS NOT NULL
                THEN format('index %s is %s', w.name, CASE WHEN c.oid IS NULL THEN 'missing' ELSE 'not valid' END) END
    FROM (VALUES
        ('executions_job_id_unfinished_idx', 'executions', true, '{job_id,status}'::name[],
            $q$(job_id, status) WHERE status NOT IN ('completed', 'failed', 'cancelled')$q$),
        ('executions_job_id_id_idx', 'executions', true, '{job_id,id}', '(job_id, id) WITH (fillfactor = 60)'),
        ('emergency_stops_job_id_id_idx', 'emergency_stops', true, '{job_id,id}', '(job_id, id)'),
        ('batch_changes_job_id_idx', 'batch_changes', false, '{job_id}', '(job_id)'),
        ('jobs_updated_at_ongoing_idx', 'jobs', false, '{coalesce,id}',
            $q$(COALESCE(updated_at, '-infinity'), id) WHERE status IN ('created', 'pending', 'processing')$q$),
        ('jobs_updated_at_failed_idx', 'jobs', false, '{updated_at,id}', $q$(updated_at, id) WHERE status = 'failed'$q$)
    ) AS w (name, table_name, stops_need_it, keys, definition)
    LEFT JOIN pg_class c ON c.oid = to_regclass(w.name)
    LEFT JOIN pg_index i ON i.indexrelid = c.oid AND i.indrelid = to_regclass(w.table_name) AND i.indisvalid
                         AND (i.indpred IS NOT NULL) = (w.definition LIKE '% WHERE %') AND 0 = ALL (i.indoption::int2[])
                         AND w.keys = ARRAY(SELECT a.attname FROM pg_attribute a WHERE a.attrelid = c.oid ORDER BY a.attnum)
    WHERE i.indexrelid IS NULL
    UNION ALL
    SELECT format('index %s of version 1.0: dropped', o.name), format('DROP INDEX %I', o.name), NULL
    FROM (VALUES ('executions_job_id_active_idx', 'executions'), ('jobs_updated_at_unfinished_idx', 'jobs')) AS o (name, table_name)
    JOIN pg_index i ON i.indexrelid = to_regclass(o.name) AND i.indrelid = to_regclass(o.table_name);
$$;

-- missing_triggers(): the triggers that our tables lack, or that do not fire when they have to; see installation_steps().
-- AFTER triggers see the row as it ends up, whatever other triggers have made of it. A WHEN clause is read and planned
-- anew in each statement, which would cost more than the rest of a one-row update. So the WHEN clauses only let through
-- what every worker does, in as few words as possible, and the functions look closer.
CREATE OR REPLACE FUNCTION missing_triggers()
RETURNS TABLE (does text, statement text, fault text) LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT format('trigger %s on %s: %s', w.name, w.table_name, CASE WHEN t.oid IS NULL THEN 'made' ELSE 'switched on again' END),
           format('CREATE OR REPLACE TRIGGER %I %s ON %I %s EXECUTE FUNCTION %s', w.name, w.event, w.table_name, w.clauses, w.function),
           CASE WHEN to_regclass(w.table_name) IS NOT NULL
                THEN format('trigger %s on table %s is %s', w.name, w.table_name, CASE WHEN t.oid IS NULL THEN 'missing' ELSE 'disabled' END) END
    FROM (VALUES  -- the number is what pg_trigger.tgtype has for this event
        ('guard_inserted_executions', 'executions', 'guard_inserted_executions()', 4, 'AFTER INSERT',
            'REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT'),
        ('guard_updated_execution', 'executions', 'guard_updated_execution()', 17, 'AFTER UPDATE', $q$FOR EACH ROW WHEN (
            (OLD.status = ANY ('{pending,running,processing}')) IS NOT TRUE OR NEW.job_id IS DISTINCT FROM OLD.job_id)$q$),
        ('guard_updated_job', 'jobs', 'guard_updated_job()', 17, 'AFTER UPDATE',
            $q$FOR EACH ROW WHEN (OLD.status = ANY ('{completed,failed,cancelled}'))$q$),
        ('append_only', 'emergency_stops', 'keep_append_only()', 58, 'BEFORE UPDATE OR DELETE OR TRUNCATE', 'FOR EACH STATEMENT'),
        ('append_only', 'batch_changes', 'keep_append_only()', 58, 'BEFORE UPDATE OR DELETE OR TRUNCATE', 'FOR EACH STATEMENT')
    ) AS w (name, table_name, function, type, event, clauses)
    LEFT JOIN pg_trigger t ON t.tgrelid = to_regclass(w.table_name) AND t.tgname = w.name AND t.tgfoid = to_regprocedure(w.function)
                           AND t.tgtype = w.type AND (t.tgqual IS NOT NULL) = (w.clauses LIKE '% WHEN %')
    WHERE t.oid IS NULL OR t.tgenabled NOT IN ('O', 'A');
$$;

-- installation_steps(): all that has to be changed in what is there: functions, columns, indexes, triggers, in this order.
-- Returns  for each what is done, the statement that does it, and the fault that it mends if a stop needs it
CREATE OR REPLACE FUNCTION installation_steps()
RETURNS TABLE (does text, statement text, fault text) LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT format('function %s: dropped', p.oid::regprocedure), format('DROP FUNCTION %s', p.oid::regprocedure), NULL
    FROM pg_proc p
    LEFT JOIN pg_attribute a
        ON a.attrelid = to_regclass(CASE p.proname WHEN 'to_job_id' THEN 'jobs' ELSE 'executions' END) AND a.attname = 'id'
    LEFT JOIN pg_type t ON t.oid = a.atttypid
    WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
      AND CASE
          -- The type of an id has changed.
          WHEN p.oid::regprocedure::text IN ('to_job_id(text)', 'to_execution_id(text)') THEN p.prorettype <> t.oid
          WHEN p.proname = 'confirm_stopped' THEN p.proargtypes[0] <> t.typarray
          -- Version 1.0 had these with other arguments or results.
          WHEN p.proname = 'emergency_stop_blockers' THEN NOT 'database_user' = ANY (p.proargnames)
          ELSE p.oid::regprocedure::text IN ('emergency_stop_end_blockers(text)', 'emergency_stop_job(text,text)',
                                             'emergency_stop_jobs(text[],text[])', 'list_executions(text,text,bigint,bigint,bigint)')
      END
    UNION ALL
    SELECT format('column %s.%s: added', c.table_name, c.column_name),
           format('ALTER TABLE %I ADD COLUMN %I %s', c.table_name, c.column_name, c.definition), NULL
    FROM (VALUES
        ('jobs',            'metadata',       'jsonb'),
        -- A default for new rows only: nobody knows it of the old ones.
        ('jobs',            'created_at',     'timestamptz, ALTER COLUMN created_at SET DEFAULT now()'),
        ('jobs',            'updated_at',     'timestamptz, ALTER COLUMN updated_at SET DEFAULT now()'),
        ('executions',      'output',         'jsonb'),
        ('executions',      'created_at',     'timestamptz, ALTER COLUMN created_at SET DEFAULT now()'),
        ('executions',      'started_at',     'timestamptz'),
        ('executions',      'completed_at',   'timestamptz'),
        -- Version 1.0 did not have these.
        ('emergency_stops', 'action',         $q$text NOT NULL DEFAULT 'stop' CHECK (action IN ('stop', 'release'))$q$),
        ('emergency_stops', 'new_status',     'text'),
        ('emergency_stops', 'sessions_ended', 'int NOT NULL DEFAULT 0 CHECK (sessions_ended >= 0)'),
        ('emergency_stops', 'caller',         $q$jsonb CHECK (jsonb_typeof(caller) = 'object')$q$)
    ) AS c (table_name, column_name, definition)
    WHERE NOT EXISTS (
        SELECT FROM pg_attribute a
        WHERE a.attrelid = to_regclass(c.table_name) AND a.attname = c.column_name AND NOT a.attisdropped)
    UNION ALL
    SELECT * FROM missing_indexes()
    UNION ALL
    SELECT * FROM missing_triggers();
$$;
