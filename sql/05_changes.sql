-- What an installation has to change, and the lock under which it does so. Nobody but the owner may call these.

-- lock_all_tables(): takes all of our tables alone, or none of them.
-- Workers lock jobs and executions in either order: whoever keeps one of them and waits for the other is in a deadlock
-- with some of them. So each wait is short, and all is let go of after one that was not enough. The moment at which no
-- worker is between the two is found by trying often, at random times.
-- Returns  nothing
-- Raises   lock_not_available (55P03)  others have used the tables for longer than lock_timeout, or a minute where that is 0
-- Locks    jobs, executions, emergency_stops and batch_changes, as many as there are, in ACCESS EXCLUSIVE mode
CREATE OR REPLACE FUNCTION lock_all_tables()
RETURNS void LANGUAGE plpgsql VOLATILE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_lock_timeout CONSTANT text := current_setting('lock_timeout');
    v_deadline     CONSTANT timestamptz := clock_timestamp() + CASE v_lock_timeout WHEN '0' THEN '1min' ELSE v_lock_timeout END::interval;
    v_first_wait   int := 100;  -- milliseconds; the longer, the longer the transactions that it can wait for
    v_table        text;
    v_tables       text[] := ARRAY(
        SELECT t.name
        FROM unnest('{executions,jobs,emergency_stops,batch_changes}'::text[]) WITH ORDINALITY AS t (name, place)
        WHERE to_regclass(t.name) IS NOT NULL
        ORDER BY t.place);
BEGIN
    LOOP
        BEGIN
            PERFORM set_config('lock_timeout', v_first_wait || 'ms', true);
            FOREACH v_table IN ARRAY v_tables LOOP
                EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', v_table);
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
                              WHERE l.granted AND l.relation IN (SELECT to_regclass(t.name) FROM unnest(v_tables) AS t (name))),
                          HINT = 'Wait for their transactions or end them, or set a longer lock_timeout; then try again.';
            END IF;
            IF v_table = v_tables[1] THEN
                v_first_wait := least(v_first_wait * 2, 1600);
            END IF;
            v_tables := v_table || array_remove(v_tables, v_table);
            PERFORM pg_sleep(0.01 * random());
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', v_lock_timeout, true);
END;
$$;

-- What has to be changed, each in a function of its own: what is done, and the statement that does it, in their order.
-- A trigger that is missing has no statement: the file that has its function makes it.
-- Returns  rows of both; none where all is as it should be
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION outdated_functions()
RETURNS TABLE (does text, statement text) LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    WITH outdated (signature) AS (
        VALUES ('emergency_stop_end_blockers(text)'), ('emergency_stop_job(text,text)'), ('emergency_stop_jobs(text[],text[])'),
               ('list_executions(text,text,bigint,bigint,bigint)'),
               ('guard_started_execution()'), ('guard_stopped_execution()'), ('guard_stopped_job()')
        UNION ALL
        -- Of version 1.0, which is known by a function that it alone had: those of which this version has others.
        SELECT o.signature
        FROM (VALUES ('emergency_stop_blockers(text)'), ('admit_execution(text)'), ('guard_inserted_executions()'),
                     ('guard_updated_execution()'), ('guard_updated_job()'),
                     ('job_has_progressed(text,timestamptz)'), ('republications(text)')) AS o (signature)
        WHERE to_regprocedure('emergency_stop_end_blockers(text)') IS NOT NULL
        UNION ALL
        -- Those with a type that an id had before.
        SELECT p.oid::regprocedure::text
        FROM pg_proc p
        JOIN (VALUES ('to_job_id', 'jobs'), ('to_execution_id', 'executions'), ('confirm_stopped', 'executions')) AS f (name, table_name)
            ON f.name = p.proname
        JOIN pg_attribute a ON a.attrelid = to_regclass(f.table_name) AND a.attname = 'id'
        JOIN pg_type t ON t.oid = a.atttypid
        WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
          AND CASE p.proname WHEN 'confirm_stopped' THEN p.proargtypes[0] <> t.typarray ELSE p.prorettype <> t.oid END
    )
    SELECT format('function %s: dropped', o.signature), format('DROP FUNCTION %s CASCADE', to_regprocedure(o.signature))
    FROM outdated o
    WHERE to_regprocedure(o.signature) IS NOT NULL;
$$;

CREATE OR REPLACE FUNCTION missing_columns()
RETURNS TABLE (does text, statement text) LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT format('column %s.%s: added', c.table_name, c.column_name),
           format('ALTER TABLE %I ADD COLUMN %I %s', c.table_name, c.column_name, c.definition)
    FROM (VALUES
        ('jobs',            'metadata',       'jsonb'),
        -- A default for new rows only: nobody knows it of the old ones.
        ('jobs',            'created_at',     'timestamptz, ALTER COLUMN created_at SET DEFAULT now()'),
        ('jobs',            'updated_at',     'timestamptz, ALTER COLUMN updated_at SET DEFAULT now()'),
        ('executions',      'output',         'jsonb'),
        ('executions',      'created_at',     'timestamptz, ALTER COLUMN created_at SET DEFAULT now()'),
        ('executions',      'started_at',     'timestamptz'),
        ('executions',      'completed_at',   'timestamptz'),
        ('emergency_stops', 'action',         $q$text NOT NULL DEFAULT 'stop' CHECK (action IN ('stop', 'release'))$q$),
        ('emergency_stops', 'new_status',     'text'),
        ('emergency_stops', 'sessions_ended', 'int NOT NULL DEFAULT 0 CHECK (sessions_ended >= 0)'),
        ('emergency_stops', 'caller',         $q$jsonb CHECK (jsonb_typeof(caller) = 'object')$q$)
    ) AS c (table_name, column_name, definition)
    WHERE NOT EXISTS (
        SELECT FROM pg_attribute a
        WHERE a.attrelid = to_regclass(c.table_name) AND a.attname = c.column_name AND NOT a.attisdropped);
$$;

-- The stop finds a job's active executions, and the listing a job's executions in id order, at a cost that the size of
-- the tables has no part in; so do the batches their jobs, in the order in which they take them. An index that a stop
-- adds to, a second entry beside the first for each active execution, has room for it.
CREATE OR REPLACE FUNCTION missing_indexes()
RETURNS TABLE (does text, statement text) LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT format('index %s: %s', w.index_name, CASE WHEN m.oid IS NULL THEN 'made' ELSE 'invalid or not as it must be, made again' END),
           CASE WHEN m.oid IS NOT NULL THEN format('DROP INDEX %I; ', w.index_name) ELSE '' END
           || format('CREATE INDEX %I ON %I %s', w.index_name, w.table_name, w.definition)
    FROM (VALUES
        ('executions_job_id_unfinished_idx', 'executions', true, '{job_id,status}'::name[],
            $q$(job_id, status) WHERE status NOT IN ('completed', 'failed', 'cancelled')$q$),
        ('executions_job_id_id_idx', 'executions', false, '{job_id,id}', '(job_id, id) WITH (fillfactor = 60)'),
        ('jobs_updated_at_ongoing_idx', 'jobs', true, '{NULL,id}',
            $q$(COALESCE(updated_at, '-infinity'), id) WHERE status IN ('created', 'pending', 'processing')$q$),
        ('jobs_updated_at_failed_idx', 'jobs', true, '{updated_at,id}', $q$(updated_at, id) WHERE status = 'failed'$q$),
        ('emergency_stops_job_id_id_idx', 'emergency_stops', false, '{job_id,id}', '(job_id, id)'),
        ('batch_changes_job_id_idx', 'batch_changes', false, '{job_id}', '(job_id)')
    ) AS w (index_name, table_name, is_partial, keys, definition)
    LEFT JOIN pg_class m ON m.relname = w.index_name AND m.relnamespace = quote_ident(current_schema())::regnamespace
    WHERE NOT EXISTS (
        SELECT
        FROM pg_index i
        WHERE i.indexrelid = m.oid AND i.indrelid = to_regclass(w.table_name) AND i.indisvalid
          AND (i.indpred IS NOT NULL) = w.is_partial AND 0 = ALL (i.indoption::int2[])
          AND w.keys = ARRAY(SELECT a.attname
                             FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k (number, place)
                             LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
                             ORDER BY k.place))
    UNION ALL
    SELECT format('index %s of version 1.0: dropped', o.index_name), format('DROP INDEX %I', o.index_name)
    FROM (VALUES ('executions_job_id_active_idx', 'executions'), ('jobs_updated_at_unfinished_idx', 'jobs')) AS o (index_name, table_name)
    JOIN pg_index i ON i.indexrelid = to_regclass(o.index_name) AND i.indrelid = to_regclass(o.table_name);
$$;

CREATE OR REPLACE FUNCTION missing_triggers()
RETURNS TABLE (does text, statement text) LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT format('trigger %s on %s: %s', w.trigger_name, w.table_name,
                  CASE WHEN t.oid IS NULL THEN 'made' WHEN k.as_it_must_be THEN 'switched on again' ELSE 'not as it must be, made again' END),
           CASE WHEN k.as_it_must_be THEN format('ALTER TABLE %I ENABLE TRIGGER %I', w.table_name, w.trigger_name)
                WHEN t.oid IS NOT NULL THEN format('DROP TRIGGER %I ON %I', w.trigger_name, w.table_name) END
    FROM (VALUES  -- with when they fire, as in pg_trigger.tgtype, and whether they have a WHEN clause
        ('executions',      'guard_inserted_executions', 4,  false),
        ('executions',      'guard_updated_execution',   17, true),
        ('jobs',            'guard_updated_job',         17, true),
        ('emergency_stops', 'append_only',               58, false),
        ('batch_changes',   'append_only',               58, false)
    ) AS w (table_name, trigger_name, type, has_when)
    LEFT JOIN pg_trigger t ON t.tgrelid = to_regclass(w.table_name) AND t.tgname = w.trigger_name
    CROSS JOIN LATERAL (SELECT t.tgtype = w.type AND (t.tgqual IS NOT NULL) = w.has_when) AS k (as_it_must_be)
    WHERE t.oid IS NULL OR t.tgenabled NOT IN ('O', 'A') OR NOT k.as_it_must_be;
$$;

CREATE OR REPLACE FUNCTION installation_steps()
RETURNS TABLE (does text, statement text) LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT * FROM outdated_functions()
    UNION ALL SELECT * FROM missing_columns()
    UNION ALL SELECT * FROM missing_indexes()
    UNION ALL SELECT * FROM missing_triggers();
$$;
COMMENT ON FUNCTION installation_steps() IS 'All that an installation has to change in what is there; no row if nothing.';
