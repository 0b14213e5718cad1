-- The tables: refuses what cannot work, then makes and adds what is missing, under one lock of all of them.
-- Where nothing is missing, nothing is locked.
--
-- Raises   invalid_table_definition (42P16)  an existing table cannot work; the message says what is in the way
--          lock_not_available (55P03)        others use the tables; nothing was changed
DO $$
DECLARE
    v_refused text[];
BEGIN
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
            ('executions', '{created_at,started_at,completed_at}', '{timestamptz,timestamp}')
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
            WHEN c.type IS NULL AND c.column_name IN ('id', 'job_id', 'status') THEN
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
    SELECT array_agg(r.message) INTO v_refused FROM refusals r WHERE r.message IS NOT NULL;
    IF v_refused IS NOT NULL THEN
        RAISE invalid_table_definition
            USING MESSAGE = v_refused[1], DETAIL = array_to_string(v_refused, E'\n'),
                  HINT = 'Nothing was installed or changed.';
    END IF;
END;
$$;

DO $$
DECLARE
    v_table text;
BEGIN
    IF EXISTS (SELECT FROM installation_steps()) THEN
        PERFORM lock_all_tables();
    END IF;
    FOREACH v_table IN ARRAY '{jobs,executions,emergency_stops,batch_changes}'::text[] LOOP
        RAISE NOTICE 'table %: %', v_table, CASE WHEN to_regclass(v_table) IS NULL THEN 'made' ELSE 'found' END;
    END LOOP;
    IF to_regclass('jobs') IS NULL THEN
        CREATE TABLE jobs (
            id         text PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 255),
            status     text NOT NULL DEFAULT 'created',
            metadata   jsonb,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now()
        );
    END IF;
    IF to_regclass('executions') IS NULL THEN
        -- Its job_id has the type of the jobs that are there.
        EXECUTE (SELECT format('
            CREATE TABLE executions (
                id           bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY WITH (fillfactor = 60),
                job_id       %s %s NOT NULL REFERENCES jobs (id),
                status       text NOT NULL DEFAULT ''pending'',
                output       jsonb,
                created_at   timestamptz NOT NULL DEFAULT now(),
                started_at   timestamptz,
                completed_at timestamptz
            )', format_type(a.atttypid, a.atttypmod), 'COLLATE ' || NULLIF(a.attcollation, 0)::regcollation)
            FROM pg_attribute a
            WHERE a.attrelid = to_regclass('jobs') AND a.attname = 'id');
    END IF;
    IF to_regclass('emergency_stops') IS NULL THEN
        CREATE TABLE emergency_stops (
            id                 bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            action             text NOT NULL DEFAULT 'stop' CHECK (action IN ('stop', 'release')),
            job_id             text NOT NULL,  -- jobs.id as text; no foreign key, since the record outlives the job
            previous_status    text NOT NULL,
            new_status         text,
            executions_stopped bigint NOT NULL CHECK (executions_stopped >= 0),
            sessions_ended     int NOT NULL DEFAULT 0 CHECK (sessions_ended >= 0),
            reason             text CHECK (length(reason) <= 1000),
            caller             jsonb CHECK (jsonb_typeof(caller) = 'object'),
            stopped_by         text NOT NULL DEFAULT 'admin',
            database_user      text NOT NULL DEFAULT session_user,
            client_address     inet DEFAULT inet_client_addr(),
            stopped_at         timestamptz NOT NULL
        );
    END IF;
    IF to_regclass('batch_changes') IS NULL THEN
        CREATE TABLE batch_changes (
            id                 bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            operation          text NOT NULL CHECK (operation IN ('timeout_stuck_jobs', 'repair_stuck_jobs')),
            job_id             text NOT NULL,
            previous_status    text NOT NULL,
            executions_stopped bigint CHECK (executions_stopped >= 0),
            attempt            int CHECK (attempt > 0),
            changed_by         text NOT NULL DEFAULT 'admin',
            database_user      text NOT NULL DEFAULT session_user,
            client_address     inet DEFAULT inet_client_addr(),
            changed_at         timestamptz NOT NULL,
            CHECK (CASE operation WHEN 'timeout_stuck_jobs' THEN executions_stopped ELSE attempt END IS NOT NULL)
        );
    END IF;
END;
$$;
COMMENT ON TABLE emergency_stops IS
    'Append-only: a row for each stop and each release, made at stopped_at. Rows of version 1.0 have no new_status.';
COMMENT ON TABLE batch_changes IS
    'Append-only: a row for each job that timeout_stuck_jobs or repair_stuck_jobs has changed.';

-- keep_append_only(): trigger of both records. Nobody but the owner may change them, whatever rights were granted.
-- Raises   insufficient_privilege (42501)
CREATE OR REPLACE FUNCTION keep_append_only()
RETURNS trigger LANGUAGE plpgsql SECURITY INVOKER
SET search_path FROM CURRENT
AS $$
BEGIN
    IF current_user <> (SELECT pg_get_userbyid(c.relowner) FROM pg_class c WHERE c.oid = TG_RELID) THEN
        RAISE insufficient_privilege
            USING MESSAGE = format('table %s is append-only', TG_TABLE_NAME),
                  HINT = 'Only its owner may change or remove a row.';
    END IF;
    RETURN NULL;
END;
$$;

DO $$
DECLARE
    v_step record;
BEGIN
    -- 98_manifest.sql gives the rights on functions that are dropped to those that replace them.
    PERFORM set_config('beacon_stop.rights', (
        SELECT COALESCE(jsonb_agg(DISTINCT jsonb_build_object('function', p.proname, 'role', g.grantee)), '[]')::text
        FROM pg_proc p, aclexplode(p.proacl) AS g
        WHERE p.pronamespace = quote_ident(current_schema())::regnamespace AND g.grantee NOT IN (0, p.proowner)
          AND 'search_path=' || current_setting('search_path') = ANY (p.proconfig)), true);
    FOR v_step IN SELECT * FROM installation_steps() LOOP
        RAISE NOTICE USING MESSAGE = v_step.does;
        -- 98_manifest.sql makes the triggers, when their functions exist.
        IF v_step.does NOT LIKE 'trigger %' THEN
            EXECUTE v_step.statement;
        END IF;
    END LOOP;
    IF NOT FOUND THEN
        RAISE NOTICE 'columns, indexes, triggers: all there already';
    END IF;
END;
$$;
