-- What an installation has to change in a database, and the lock under which it does so.

-- limit_lock_wait(wait): makes the next wait for a lock fail after that time. Raises 55P03 if no time is left.
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

-- lock_all_tables(): locks those of our tables that exist, all of them or none, in ACCESS EXCLUSIVE mode.
-- Workers lock jobs and executions in either order. An installer that kept one table while it waits for the other would
-- be in a deadlock with some of them. So each wait is short, and if it fails, the installer lets go of all tables. It
-- tries often and at random times, until it meets a moment at which no worker holds only one of the two. Where there
-- are many workers, there may be none. After half of the time the installer insists: PostgreSQL then ends the deadlock
-- at the cost of the workers, who get 40P01 once, because they have waited for longer than the installer.
-- Raises   lock_not_available (55P03)  others use the tables for longer than lock_timeout, or a minute where that is 0
CREATE OR REPLACE FUNCTION lock_all_tables()
RETURNS void LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_patience     CONSTANT interval := COALESCE(NULLIF(v_lock_timeout, '0'), '1min')::interval;
    v_check        CONSTANT interval := current_setting('deadlock_timeout')::interval;  -- each wait is looked at then
    v_began        CONSTANT timestamptz := clock_timestamp();
    v_first_wait   interval := interval '100ms';  -- the longer, the longer the transactions that it can wait for
    v_attempt      timestamptz;
    v_waited       interval;
    v_table        regclass;
    v_tables       regclass[] := ARRAY(
        SELECT to_regclass(t.name) FROM unnest('{executions,jobs,emergency_stops,batch_changes}'::text[]) AS t (name)
        WHERE to_regclass(t.name) IS NOT NULL);
BEGIN
    LOOP
        BEGIN
            v_attempt := clock_timestamp();
            PERFORM limit_lock_wait(v_first_wait);
            FOREACH v_table IN ARRAY v_tables LOOP
                EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', v_table);
                v_waited := clock_timestamp() - v_attempt;
                PERFORM limit_lock_wait(CASE
                    WHEN v_attempt > v_began + v_patience / 2 AND v_waited < 0.6 * v_check
                         AND clock_timestamp() + 1.5 * v_check < v_began + v_patience THEN 1.5 * v_check
                    -- Mostly a few milliseconds, and sometimes as long as one may hold up workers of both kinds. A
                    -- worker who waits for longer than v_check would get 40P01.
                    ELSE greatest(least(interval '300ms' * random() ^ 4, 0.9 * v_check - v_waited), '1ms') END);
            END LOOP;
            EXIT;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            IF clock_timestamp() > v_began + v_patience THEN
                RAISE lock_not_available
                    USING MESSAGE = 'the tables are in use: nothing was changed', DETAIL = (
                        SELECT 'They are used by ' || string_agg(DISTINCT format(
                            'pid %s (%s, %s)', l.pid, a.usename, a.application_name), '; ')
                        FROM pg_locks l
                        LEFT JOIN pg_stat_activity a ON a.pid = l.pid
                        WHERE l.granted AND l.relation = ANY (v_tables)
                    ), HINT = 'Wait for their transactions or end them, or set a longer lock_timeout; then try again.';
            END IF;
            IF v_table = v_tables[1] THEN
                v_first_wait := least(v_first_wait * 2, '1.6s');
            END IF;
            -- The table that was not free comes first now.
            v_tables := v_table || array_remove(v_tables, v_table);
            PERFORM pg_sleep(0.01 * random());
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', v_lock_timeout, true);
END;
$$;

-- unfit_tables(): what keeps the tables that are there from working, and no installation changes. A sentence each.
CREATE OR REPLACE FUNCTION unfit_tables()
RETURNS SETOF text LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    WITH columns AS (
        SELECT n.table_name, u.column_name, n.types, a.atttypid::regtype AS type, a.attgenerated, t.typcategory,
               c.collname, c.collisdeterministic, array_to_string(n.types, ' or ') AS expected,
               CASE a.atttypid WHEN 'varchar'::regtype THEN NULLIF(a.atttypmod, -1) - 4 END AS max_length,
               format('column %s.%s', n.table_name, u.column_name) AS title
        FROM (VALUES
            ('jobs', '{id}'::name[], '{text,varchar,uuid,bigint,int}'::regtype[]),
            ('executions', '{id,job_id}', '{text,varchar,uuid,bigint,int,smallint}'),
            ('jobs', '{status}', '{text,varchar}'),
            ('executions', '{status}', '{text,varchar}'),
            ('jobs', '{metadata}', '{jsonb}'),
            ('executions', '{output}', '{jsonb}'),
            ('jobs', '{created_at,updated_at}', '{timestamptz,timestamp}'),
            ('executions', '{created_at,started_at,completed_at}', '{timestamptz,timestamp}'),
            ('emergency_stops', '{job_id,previous_status,reason,stopped_by,database_user}', '{text,varchar}'),
            ('emergency_stops', '{id,executions_stopped}', '{bigint,int}'),
            ('emergency_stops', '{stopped_at}', '{timestamptz,timestamp}'),
            ('batch_changes', '{operation,job_id,previous_status}', '{text,varchar}'),
            ('batch_changes', '{executions_stopped,attempt}', '{bigint,int}'),
            ('batch_changes', '{changed_at}', '{timestamptz,timestamp}')
        ) AS n (table_name, column_names, types)
        CROSS JOIN unnest(n.column_names) AS u (column_name)
        LEFT JOIN pg_attribute a
            ON a.attrelid = to_regclass(n.table_name) AND a.attname = u.column_name AND NOT a.attisdropped
        LEFT JOIN pg_type t ON t.oid = a.atttypid
        LEFT JOIN pg_collation c ON c.oid = a.attcollation
    ), refusals (message) AS (
        -- Rows that move between partitions, or are written to a child, pass by the triggers of the guard.
        SELECT format('%s is not an ordinary table: expected one without partitions or children', c.relname)
        FROM pg_class c
        WHERE c.oid IN (to_regclass('jobs'), to_regclass('executions'))
          AND (c.relkind <> 'r' OR EXISTS (SELECT FROM pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent)))
        UNION ALL
        SELECT CASE
            WHEN c.type IS NULL AND c.column_name <> ALL (
                '{metadata,output,created_at,updated_at,started_at,completed_at}') THEN  -- which the installation adds
                format('%s is missing: expected %s', c.title, c.expected)
            WHEN c.attgenerated <> '' THEN format('%s is generated: expected one that can be set', c.title)
            WHEN c.type <> ALL (c.types) THEN format('%s has type %s: expected %s', c.title, c.type, c.expected)
            WHEN c.column_name = 'status' AND c.max_length < length('pending') THEN
                format('%s is varchar(%s): expected room for at least 7 characters', c.title, c.max_length)
            WHEN c.column_name <> 'status' AND NOT c.collisdeterministic THEN
                format('%s has the nondeterministic collation %I: expected one in which only the same text is equal',
                       c.title, c.collname)
        END
        FROM columns c
        WHERE to_regclass(c.table_name) IS NOT NULL
        UNION ALL
        SELECT 'column jobs.id is not unique: expected a primary key or a unique index on it alone'
        WHERE to_regclass('jobs') IS NOT NULL AND NOT EXISTS (
            SELECT
            FROM pg_index i
            JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] AND a.attname = 'id'
            WHERE i.indrelid = to_regclass('jobs') AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
              AND i.indnkeyatts = 1)
        UNION ALL
        -- A new table of jobs has ids of type text. Types of one category compare: texts, integers, uuid.
        SELECT CASE
            WHEN e.typcategory <> COALESCE(j.typcategory, 'S') THEN
                format('%s has type %s: expected one that compares with jobs.id, which has type %s',
                       e.title, e.type, COALESCE(j.type, 'text'::regtype))
            WHEN e.collname <> COALESCE(j.collname, 'default') THEN
                format('%s has the collation %I: expected that of jobs.id, %I',
                       e.title, e.collname, COALESCE(j.collname, 'default'))
        END
        FROM columns e
        JOIN columns j ON j.title = 'column jobs.id' AND e.title = 'column executions.job_id'
    )
    SELECT r.message FROM refusals r WHERE r.message IS NOT NULL;
$$;

-- missing_parts(): the columns, indexes and triggers that our tables lack, or that do not do what they should.
-- Returns  for each what the installation says, the statement that mends it, and the fault if a stop needs that part
--
-- The indexes serve the stop, which looks for a job's active executions, the listing, which reads a job's executions in
-- the order of their ids, and the batches, which look for their jobs. With them the size of the tables does not matter.
-- A stop adds a second entry for each active execution to the index on (job_id, id), which has room for it.
-- AFTER triggers see the row as it ends up, whatever other triggers have made of it. A WHEN clause is read and planned
-- anew in each statement; a long one would cost more than the rest of a one-row update. So the WHEN clauses are short:
-- they only save the function call for the updates that every worker makes. The functions look closer.
CREATE OR REPLACE FUNCTION missing_parts()
RETURNS TABLE (does text, statement text, fault text) LANGUAGE sql STABLE
SET search_path FROM CURRENT
SET quote_all_identifiers = off
AS $$
    SELECT format(s.does, p.name, p.table_name),
           format(s.statement, p.name, p.table_name, p.definition, split_part(p.shape, ' ', 1)),
           CASE WHEN to_regclass(p.table_name) IS NOT NULL
                     AND (p.kind <> 'index' OR p.table_name IN ('executions', 'emergency_stops'))
                THEN format(s.fault, p.name, p.table_name) END
    -- shape: what the catalogs have of it, keys and WHERE of an index, function, tgtype and WHEN of a trigger.
    FROM (VALUES
        ('column', 'jobs', 'metadata', NULL, 'jsonb'),
        -- A default for new rows only: nobody knows it of the old ones.
        ('column', 'jobs', 'created_at', NULL, 'timestamptz, ALTER COLUMN created_at SET DEFAULT now()'),
        ('column', 'jobs', 'updated_at', NULL, 'timestamptz, ALTER COLUMN updated_at SET DEFAULT now()'),
        ('column', 'executions', 'output', NULL, 'jsonb'),
        ('column', 'executions', 'created_at', NULL, 'timestamptz, ALTER COLUMN created_at SET DEFAULT now()'),
        ('column', 'executions', 'started_at', NULL, 'timestamptz'),
        ('column', 'executions', 'completed_at', NULL, 'timestamptz'),
        -- Version 1.0 did not have these four.
        ('column', 'emergency_stops', 'action', NULL,
            $q$text NOT NULL DEFAULT 'stop' CHECK (action IN ('stop', 'release'))$q$),
        ('column', 'emergency_stops', 'new_status', NULL, 'text'),
        ('column', 'emergency_stops', 'sessions_ended', NULL, 'int NOT NULL DEFAULT 0 CHECK (sessions_ended >= 0)'),
        ('column', 'emergency_stops', 'caller', NULL, $q$jsonb CHECK (jsonb_typeof(caller) = 'object')$q$),
        ('index', 'executions', 'executions_job_id_unfinished_idx', 'job_id status WHERE',
            $q$(job_id, status) WHERE status NOT IN ('completed', 'failed', 'cancelled')$q$),
        ('index', 'executions', 'executions_job_id_id_idx', 'job_id id', '(job_id, id) WITH (fillfactor = 60)'),
        ('index', 'jobs', 'jobs_updated_at_ongoing_idx', 'coalesce id WHERE',
            $q$(COALESCE(updated_at, '-infinity'), id) WHERE status IN ('created', 'pending', 'processing')$q$),
        ('index', 'jobs', 'jobs_updated_at_failed_idx', 'updated_at id WHERE',
            $q$(updated_at, id) WHERE status = 'failed'$q$),
        ('index', 'emergency_stops', 'emergency_stops_job_id_id_idx', 'job_id id', '(job_id, id)'),
        ('index', 'batch_changes', 'batch_changes_job_id_idx', 'job_id', '(job_id)'),
        ('trigger', 'executions', 'guard_inserted_executions', 'guard_inserted_executions() 4',
            'AFTER INSERT ON executions REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT'),
        ('trigger', 'executions', 'guard_updated_execution', 'guard_updated_execution() 17 WHEN',
            $q$AFTER UPDATE ON executions FOR EACH ROW WHEN (
                (OLD.status = ANY ('{pending,running,processing}')) IS NOT TRUE
                OR NEW.job_id IS DISTINCT FROM OLD.job_id)$q$),
        ('trigger', 'jobs', 'guard_updated_job', 'guard_updated_job() 17 WHEN',
            $q$AFTER UPDATE ON jobs FOR EACH ROW WHEN (OLD.status = ANY ('{completed,failed,cancelled}'))$q$),
        ('trigger', 'emergency_stops', 'append_only', 'keep_append_only() 58',
            'BEFORE UPDATE OR DELETE OR TRUNCATE ON emergency_stops FOR EACH STATEMENT'),
        ('trigger', 'batch_changes', 'append_only', 'keep_append_only() 58',
            'BEFORE UPDATE OR DELETE OR TRUNCATE ON batch_changes FOR EACH STATEMENT')
    ) AS p (kind, table_name, name, shape, definition)
    LEFT JOIN LATERAL (
        SELECT true AS works
        FROM pg_attribute a
        WHERE p.kind = 'column' AND a.attrelid = to_regclass(p.table_name) AND a.attname = p.name AND NOT a.attisdropped
        UNION ALL
        SELECT i.indisvalid AND 0 = ALL (i.indoption::int2[])
               AND p.shape = concat_ws(' ', string_agg(a.attname, ' ' ORDER BY a.attnum),
                                       CASE WHEN i.indpred IS NOT NULL THEN 'WHERE' END)
        FROM pg_index i
        JOIN pg_attribute a ON a.attrelid = i.indexrelid
        -- If there is one of this name on another table, PostgreSQL refuses to make ours.
        WHERE p.kind = 'index' AND i.indexrelid = to_regclass(p.name) AND i.indrelid = to_regclass(p.table_name)
        GROUP BY i.indexrelid
        UNION ALL
        SELECT t.tgenabled IN ('O', 'A') AND t.tgattr::text = ''
        FROM pg_trigger t
        WHERE p.kind = 'trigger' AND t.tgrelid = to_regclass(p.table_name) AND t.tgname = p.name
          AND p.shape = concat_ws(' ', t.tgfoid::regprocedure, t.tgtype, CASE WHEN t.tgqual IS NOT NULL THEN 'WHEN' END)
    ) AS c ON true
    JOIN (VALUES
        ('column', false, 'column %2$s.%1$s: added', 'column %2$s.%1$s is missing',
            'ALTER TABLE %2$I ADD COLUMN %1$I %3$s'),
        ('index', false, 'index %1$s: made', 'index %1$s is missing', 'CREATE INDEX %1$I ON %2$I %3$s'),
        ('index', true, 'index %1$s: invalid or not as it must be, made again', 'index %1$s is not valid',
            'DROP INDEX %1$I; CREATE INDEX %1$I ON %2$I %3$s'),
        ('trigger', false, 'trigger %1$s on %2$s: made', 'trigger %1$s on table %2$s is missing',
            'CREATE OR REPLACE TRIGGER %1$I %3$s EXECUTE FUNCTION %4$s'),
        ('trigger', true, 'trigger %1$s on %2$s: switched on again', 'trigger %1$s on table %2$s is disabled',
            'CREATE OR REPLACE TRIGGER %1$I %3$s EXECUTE FUNCTION %4$s')
    ) AS s (kind, is_there, does, fault, statement) ON s.kind = p.kind AND s.is_there = (c.works IS NOT NULL)
    WHERE c.works IS NOT TRUE;
$$;

-- installation_steps(): all that has to be changed in what is there. Triggers come last: they need their functions.
-- Returns  for each what the installation says, and the statement
CREATE OR REPLACE FUNCTION installation_steps()
RETURNS TABLE (does text, statement text) LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT format('function %s: dropped', p.oid::regprocedure), format('DROP FUNCTION %s', p.oid::regprocedure)
    FROM pg_proc p
    JOIN pg_attribute a ON a.attname = 'id'
        AND a.attrelid = to_regclass(CASE p.proname WHEN 'to_job_id' THEN 'jobs' ELSE 'executions' END)
    JOIN pg_type t ON t.oid = a.atttypid
    WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
      AND CASE
          -- The type of an id has changed.
          WHEN p.oid::regprocedure::text IN ('to_job_id(text)', 'to_execution_id(text)') THEN p.prorettype <> t.oid
          WHEN p.proname = 'confirm_stopped' THEN p.proargtypes[0] <> t.typarray
          -- Version 1.0 had these with other arguments or results.
          WHEN p.proname = 'emergency_stop_blockers' THEN NOT 'database_user' = ANY (p.proargnames)
          ELSE p.oid::regprocedure::text IN (
              'emergency_stop_end_blockers(text)', 'emergency_stop_job(text,text)',
              'emergency_stop_jobs(text[],text[])', 'list_executions(text,text,bigint,bigint,bigint)',
              'republications(text)')
      END
    UNION ALL
    SELECT format('index %s of version 1.0: dropped', o.name), format('DROP INDEX %I', o.name)
    FROM (VALUES ('executions_job_id_active_idx', 'executions'), ('jobs_updated_at_unfinished_idx', 'jobs'))
        AS o (name, table_name)
    JOIN pg_index i ON i.indexrelid = to_regclass(o.name) AND i.indrelid = to_regclass(o.table_name)
    UNION ALL
    SELECT m.does, m.statement FROM missing_parts() AS m;
$$;
