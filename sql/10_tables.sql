-- The tables jobs and executions: refuses what cannot work, then locks all tables if anything is missing, and makes them.
--
-- Raises   invalid_table_definition (42P16)  an existing table cannot work; the message says what is in the way
--          lock_not_available (55P03)        others use the tables; nothing was changed
DO $$
DECLARE
    v_text    CONSTANT regtype[] := '{text,varchar}';
    v_time    CONSTANT regtype[] := '{timestamptz,timestamp}';
    v_id      CONSTANT regtype[] := '{text,varchar,uuid,bigint,int}';
    v_refused text[];
BEGIN
    WITH columns AS (
        SELECT n.*, format('column %s.%s', n.table_name, n.column_name) AS title, array_to_string(n.types, ' or ') AS expected,
               a.attgenerated, a.atttypid::regtype AS type, t.typcategory, c.collname, c.collisdeterministic,
               CASE a.atttypid WHEN 'varchar'::regtype THEN NULLIF(a.atttypmod, -1) - 4 END AS max_length
        FROM (VALUES
            ('jobs',       'id',           false, v_id),
            ('jobs',       'status',       false, v_text),
            ('jobs',       'metadata',     true,  '{jsonb}'::regtype[]),
            ('jobs',       'created_at',   true,  v_time),
            ('jobs',       'updated_at',   true,  v_time),
            ('executions', 'id',           false, v_id || 'smallint'::regtype),
            ('executions', 'job_id',       false, v_id || 'smallint'::regtype),
            ('executions', 'status',       false, v_text),
            ('executions', 'output',       true,  '{jsonb}'::regtype[]),
            ('executions', 'created_at',   true,  v_time),
            ('executions', 'started_at',   true,  v_time),
            ('executions', 'completed_at', true,  v_time)
        ) AS n (table_name, column_name, can_be_added, types)
        LEFT JOIN pg_attribute a ON a.attrelid = to_regclass(n.table_name) AND a.attname = n.column_name AND NOT a.attisdropped
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
            WHEN c.type IS NULL AND NOT c.can_be_added THEN format('%s is missing: expected %s', c.title, c.expected)
            WHEN c.attgenerated <> '' THEN format('%s is generated: expected one that can be set', c.title)
            WHEN c.type <> ALL (c.types) THEN format('%s has type %s: expected %s', c.title, c.type, c.expected)
            WHEN c.column_name = 'status' AND c.max_length < length('pending') THEN
                format('%s is varchar(%s): expected room for at least 7 characters', c.title, c.max_length)
            WHEN c.column_name <> 'status' AND NOT c.collisdeterministic THEN
                format('%s has the nondeterministic collation %I: expected one in which only the same text is equal', c.title, c.collname)
        END
        FROM columns c
        WHERE to_regclass(c.table_name) IS NOT NULL
        UNION ALL
        SELECT 'column jobs.id is not unique: expected a primary key or a unique index on it alone'
        WHERE to_regclass('jobs') IS NOT NULL AND NOT EXISTS (
            SELECT
            FROM pg_index i
            JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] AND a.attname = 'id'
            WHERE i.indrelid = to_regclass('jobs') AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = 1)
        UNION ALL
        -- A new table of jobs has ids of type text. Types of one category compare: texts, integers, uuid.
        SELECT CASE
            WHEN e.typcategory <> COALESCE(j.typcategory, 'S') THEN
                format('%s has type %s: expected one that compares with jobs.id, which has type %s',
                       e.title, e.type, COALESCE(j.type, 'text'::regtype))
            WHEN e.collname <> COALESCE(j.collname, 'default') THEN
                format('%s has the collation %I: expected that of jobs.id, %I', e.title, e.collname, COALESCE(j.collname, 'default'))
        END
        FROM columns e
        JOIN columns j ON e.table_name = 'executions' AND e.column_name = 'job_id' AND j.table_name = 'jobs' AND j.column_name = 'id'
    )
    SELECT array_agg(r.message) INTO v_refused FROM refusals r WHERE r.message IS NOT NULL;
    IF v_refused IS NOT NULL THEN
        RAISE invalid_table_definition
            USING MESSAGE = v_refused[1], DETAIL = array_to_string(v_refused, E'\n'), HINT = 'Nothing was installed or changed.';
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
        RAISE NOTICE USING MESSAGE = format('table %s: %s', v_table, CASE WHEN to_regclass(v_table) IS NULL THEN 'made' ELSE 'found' END);
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
END;
$$;
